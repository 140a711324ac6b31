"""The TensorRT engine: torch tensors on the GPU in and out where they lie, numpy through pinned memory."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.attentions import PACKED
from graphopt.backends.tensorrt.device_cache import DeviceCache, Recorded, record
from graphopt.backends.tensorrt.flavours import Flavour, listening, load_plugins, logger_of
from graphopt.backends.tensorrt.options import Options, nearest_profile, profiles_of
from graphopt.errors import BackendError, InputError, PipelineError
from graphopt.execution import bind_dims
from graphopt.measures import named_sizes
from graphopt.runtime.cache import PAST_LENGTHS, CacheLayout
from graphopt.runtime.engine import Engine, signature, to_torch
from graphopt.runtime.kv_cache import KvCache
from graphopt.schemas.manifest import Manifest

PLAN = "model.plan"
_BY_DATA = "NON_ZERO"  # the kind of layers whose results have sizes that depend on data
_RECORDED = 16  # CUDA graphs that are kept, the least recently used one first to go


@dataclass
class Opened:
    """A plan on a device. TensorRT's contexts are of one profile each, and of one thread; so are recorded calls."""

    library: Any
    engine: Any
    runtime: Any  # lives as long as the engine
    contexts: dict[tuple[int, int], Any] = field(default_factory=dict)
    recorded: dict[Hashable, Recorded] = field(default_factory=dict)


class TensorRtEngine(Engine):
    """A plan, opened when it is first called. ``options`` as it was built with; ``cuda_graphs``: whether calls of sizes that
    come again are recorded and replayed (their results are copies). Single tokens on a static cache always are."""

    device = torch.device("cuda")

    def __init__(
        self, folder: Path, manifest: Manifest, flavour: Flavour, options: Options, cuda_graphs: bool = False
    ) -> None:
        super().__init__(manifest)
        if cuda_graphs and _BY_DATA in manifest.report.engine_ops:
            raise PipelineError(
                "sizes in the engine depend on its data (as packed tokens do), so its calls cannot be recorded",
                where=str(folder),
                hint="load it without cuda_graphs; tokens: compile with target.options: {packed_padding: behind}",
            )
        self.folder, self.flavour, self.options, self.cuda_graphs = folder, flavour, options, cuda_graphs
        self.cache_lengths = manifest.cache_lengths
        self.profiles = profiles_of(self.inputs, self.dims, options, self.layout, self.cache_lengths)
        self._opened: Opened | None = None

    def opened(self) -> Opened:
        """BackendError if there is no GPU, or the plan is not for it or for this version."""
        if self._opened is None:
            reason = unrunnable(self.flavour)
            if reason is not None:
                raise BackendError(
                    f"the engine cannot run here: {reason}", hint="run it on the device it was built for"
                )
            if PACKED in self.manifest.report.final_ops:
                load_plugins(self.flavour.module())
            data = (self.folder / PLAN).read_bytes()
            built = self.manifest.versions.get(self.flavour.name, "?")
            self._opened = opened_plan(self.flavour, data, self.folder / PLAN, built)
        return self._opened

    @property
    def device_bytes(self) -> int:
        """Scratch memory of a context on the device."""
        return int(self.opened().engine.device_memory_size_v2)

    def check_device(self) -> None:
        """BackendError if the engine cannot run here."""
        self.opened()

    @property
    def ways(self) -> Sequence[Callable[..., dict[str, Any]]]:
        """One for each length that buffers may have."""
        return [functools.partial(self._on_cache, least=length) for length in self.cache_lengths] or [self]

    def _on_cache(self, least: int = 0, **tensors: Any) -> dict[str, Any]:
        """A call with a static cache that is given; in buffers of ``least`` positions or more. Results on the CPU."""
        given = {name: tensor if isinstance(tensor, Tensor) else to_torch(tensor) for name, tensor in tensors.items()}
        layout = self.cache_layout
        cache = DeviceCache(self, layout, len(given[PAST_LENGTHS]), {})
        results: dict[str, Any] = cache.call_once(given, least)
        return {name: results[name] for name in self.outputs}

    def run(self, tensors: Mapping[str, Any], as_torch: bool) -> dict[str, Any]:
        self.check_device()
        if self.layout is not None and self.layout.max_length is not None:
            results = self._on_cache(**tensors)
            return results if as_torch else {name: tensor.numpy() for name, tensor in results.items()}
        on_device = any(isinstance(tensor, Tensor) and tensor.is_cuda for tensor in tensors.values())
        env = bind_dims(self.inputs, self.dims, {name: signature(name, tensor) for name, tensor in tensors.items()})
        feeds = {name: self.on_device(tensor) for name, tensor in tensors.items()}
        results = self._recorded(feeds, env).replay(feeds) if self.cuda_graphs else self.enqueue(feeds, env, {})
        if as_torch and on_device:
            return dict(results)
        moved = self._in_memory(results)
        return {name: tensor if as_torch else tensor.numpy() for name, tensor in moved.items()}

    def on_device(self, tensor: Any) -> Tensor:
        """A tensor on the device, contiguous; from the CPU through pinned memory."""
        own = tensor if isinstance(tensor, Tensor) else to_torch(tensor)
        if own.device.type == self.device.type or not own.numel():
            return own.to(self.device).contiguous()
        return own.contiguous().pin_memory().to(self.device, non_blocking=True)

    def _in_memory(self, results: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Results on the CPU, through pinned memory."""
        moved = {}
        for name, tensor in results.items():
            pinned = tensor.is_cuda and tensor.numel() > 0
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            moved[name] = room.copy_(tensor, non_blocking=pinned)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return moved

    def _new_cache(self, layout: CacheLayout, batch: int, once: Mapping[str, Tensor]) -> KvCache:
        self.check_device()
        return DeviceCache(self, layout, batch, once)

    def gives_new_rows(self, layout: CacheLayout) -> bool:
        """Whether the engine gives the new rows of a static cache instead of writing them."""
        present = next(iter(layout.names.values()))
        return int(self.opened().engine.get_tensor_shape(present)[2]) != layout.outputs[present].shape[2]

    def enqueue(
        self, feeds: Mapping[str, Tensor], env: Mapping[str, int], results: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put one run on the current stream: ``feeds`` on the device, contiguous; outputs into ``results`` where given."""
        context = self.context_for(env)
        for name, tensor in feeds.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise InputError(f"{name} {list(tensor.shape)} fits no profile of the engine")
            context.set_tensor_address(name, tensor.data_ptr() or _nothing().data_ptr())
        made = dict(results)
        for name, type in self.outputs.items():
            if name not in made:
                shape = tuple(context.get_tensor_shape(name))
                if any(size < 0 for size in shape):
                    raise BackendError(f"the shape of output {name!r} depends on the data, which is not supported")
                made[name] = torch.empty(shape, dtype=type.dtype, device="cuda")
            context.set_tensor_address(name, made[name].data_ptr() or _nothing().data_ptr())
        with listening(self.opened().library) as said:
            is_done = context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        if not is_done:
            raise BackendError(f"{self.flavour.name} cannot run the engine: {said.why}")
        if said.errors:  # of a plugin, whose failure need not be the run's
            warnings.warn(f"{self.flavour.name} ran the engine, and says: {said.why}", stacklevel=2)
        return made

    def profile_for(self, env: Mapping[str, int]) -> int:
        """The number of the profile that sizes fit into."""
        index = nearest_profile(self.profiles, env)
        if index is None:
            raise InputError(f"{named_sizes(env)} fit no profile of the engine", hint=f"profiles: {self.profiles}")
        return index

    def context_for(self, env: Mapping[str, int]) -> Any:
        """The execution context of the profile that sizes fit into."""
        opened, index = self.opened(), self.profile_for(env)
        key = index, threading.get_ident()
        if key not in opened.contexts:
            opened.contexts[key] = self._new_context(opened, index)
        return opened.contexts[key]

    def _new_context(self, opened: Opened, index: int) -> Any:
        """A context of a profile, with as much scratch memory as that one needs."""
        stream = torch.cuda.current_stream()
        strategy = opened.library.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        with listening(opened.library) as said:
            context = opened.engine.create_execution_context(strategy)
            is_made = context is not None and context.set_optimization_profile_async(index, stream.cuda_stream)
        if not is_made:
            needed = opened.engine.get_device_memory_size_for_profile_v2(index) >> 20
            raise BackendError(f"{self.flavour.name} makes no context, which needs {needed} MiB: {said.why}")
        stream.synchronize()
        return context

    # CUDA graphs

    def __call__(self, **tensors: Any) -> dict[str, Any]:
        """Calls of sizes that were recorded before are known to fit: on the device nothing is left to check."""
        found = self._recalled(_call_of(tensors)) if self.cuda_graphs and self._opened is not None else None
        return super().__call__(**tensors) if found is None else found.replay(tensors)

    def _recalled(self, key: Hashable) -> Recorded | None:
        """A recorded call, which now is the one used last."""
        recorded = self.opened().recorded
        found = recorded.pop(key, None)
        if found is not None:
            recorded[key] = found
        return found

    def _recorded(self, feeds: Mapping[str, Tensor], env: Mapping[str, int]) -> Recorded:
        key = _call_of(feeds)
        found = self._recalled(key)
        if found is None:
            inputs = {name: tensor.clone() for name, tensor in feeds.items()}
            found = Recorded(*record(lambda: self.enqueue(inputs, env, {})), inputs)
            recorded = self.opened().recorded
            recorded[key] = found
            if len(recorded) > _RECORDED:
                recorded.pop(next(iter(recorded)), None)
        return found


def _call_of(tensors: Mapping[str, Any]) -> Hashable:
    """What a recorded call is known by: its thread, and the tensors' names, dtypes and shapes. None if one is not on the GPU."""
    key: list[Hashable] = [threading.get_ident()]
    for name in sorted(tensors):
        tensor = tensors[name]
        if not (isinstance(tensor, Tensor) and tensor.is_cuda):
            return None
        key += name, tensor.dtype, tensor.shape
    return tuple(key)


def opened_plan(flavour: Flavour, data: bytes, file: Path, built: str | None = None) -> Opened:
    """A plan's engine. BackendError if the plan is not for it, or not for this version; ``built``: the version that made it."""
    trt = flavour.module()
    with listening(trt) as said:
        runtime = trt.Runtime(logger_of(trt))
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise BackendError(
            f"{flavour.name} {trt.__version__} does not open the plan: {said.why}",
            where=str(file),
            hint=f"it was built with {built}: compile again here" if built else None,
        )
    return Opened(trt, engine, runtime)


def unrunnable(flavour: Flavour) -> str | None:
    """Why engines of a flavour cannot run on this machine; None if they can."""
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if flavour.builds_without_gpu and (capability in ((9, 0), (10, 0)) or capability < (7, 5)):
        return f"TensorRT-RTX has no kernels for compute capability {'.'.join(map(str, capability))}"
    return None


def _nothing() -> Tensor:
    """An empty tensor lies nowhere, and TensorRT wants an address."""
    return torch.empty(1, device="cuda")
