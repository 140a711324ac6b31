"""The ONNX Runtime engine: a session behind the engine protocol."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from graphopt.backend import missing
from graphopt.backends.onnxruntime.bound_cache import BFLOAT16, BoundCache, running
from graphopt.backends.tensorrt.options import Options, profiles_of, shapes_in
from graphopt.errors import BackendError, MissingBackendError
from graphopt.runtime.cache import PAST_LENGTHS, CacheLayout
from graphopt.runtime.engine import Engine, to_numpy, to_torch
from graphopt.runtime.kv_cache import KvCache
from graphopt.schemas.manifest import Manifest
from graphopt.tensors import DimRange, TensorType

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}


def onnxruntime() -> Any:
    """The package. MissingBackendError if it is not installed."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise missing("onnxruntime", "cpu") from error
    return ort


def make_session(
    model: bytes | Path,
    provider: str = "cpu",
    threads: int | None = None,
    optimized: Path | None = None,
    provider_options: Mapping[str, str] | None = None,
    *,
    beside_others: bool = False,
) -> Any:
    """A session on one provider; ``optimized``: where to write the model that it runs; ``provider_options`` as onnxruntime
    has them; ``beside_others``: its threads rest between runs, so that those of another session have the cores.

    BackendError if onnxruntime refuses the model or would run part of it elsewhere."""
    ort = onnxruntime()
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise MissingBackendError(
            f"this onnxruntime has no {wanted}", hint="pip install 'graphopt[gpu]' on a machine with an NVIDIA GPU"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    if threads:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    if beside_others:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if provider != "cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        given = model if isinstance(model, bytes) else str(model)
        session = ort.InferenceSession(given, options, providers=[(wanted, dict(provider_options or {}))])
    except Exception as error:
        said = str(error).splitlines()[0]
        raise BackendError(f"onnxruntime refuses the model: {said}", where=_origin(model, said)) from error
    if session.get_providers()[0] != wanted:
        raise BackendError(f"onnxruntime runs the model on {session.get_providers()[0]}, not on {wanted}")
    if provider != "cpu":
        _refuse_fallback(session, wanted)
    return session


def _origin(model: bytes | Path, said: str) -> str | None:
    """Where a node comes from that onnxruntime names."""
    import onnx

    from graphopt.backends.onnx.emitter import ORIGIN

    named = re.search(r"node with name '([^']+)'", said)
    if named is None:
        return None
    whole = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)
    found = (each.metadata_props for each in whole.graph.node if each.name == named[1])
    return next((prop.value for props in found for prop in props if prop.key == ORIGIN), None)


Caller = Callable[[Sequence[str] | None, Mapping[str, np.ndarray]], list[np.ndarray]]


def caller_of(session: Any) -> Caller:
    """A session's ``run``, also for bf16, of which onnxruntime makes no arrays and takes none."""
    if all(value.type != "tensor(bfloat16)" for value in (*session.get_inputs(), *session.get_outputs())):
        run: Caller = session.run
        return run
    ort = onnxruntime()

    def value(array: np.ndarray) -> Any:
        if array.dtype != ml_dtypes.bfloat16:
            return ort.OrtValue.ortvalue_from_numpy(array)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.int16), BFLOAT16)

    def call(names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        made = session.run_with_ort_values(names, {name: value(array) for name, array in feeds.items()})
        return [
            to_numpy(from_dlpack(each)) if each.data_type() == "tensor(bfloat16)" else each.numpy() for each in made
        ]

    return call


#: What onnxruntime computes sizes with, on the CPU whatever the provider.
_OF_SIZES = frozenset(
    {
        "Shape", "Size", "Range", "Concat", "Unsqueeze", "Squeeze", "Cast", "Add", "Sub", "Mul", "Div", "Mod", "Min", "Max",
        "Gather", "Slice", "Reshape", "Expand", "ReduceMax", "Constant", "ConstantOfShape", "Where", "Equal", "Less",
        "LessOrEqual", "Not", "Identity", "MemcpyToHost", "MemcpyFromHost",
    }
)  # fmt: skip


def _refuse_fallback(session: Any, wanted: str) -> None:
    """BackendError if anything but the computation of sizes would run elsewhere."""
    assigned = session.get_provider_graph_assignment_info()
    ops = {node.op_type for part in assigned if part.ep_name != wanted for node in part.get_nodes()} - _OF_SIZES
    if ops:
        raise BackendError(
            f"onnxruntime has no kernel of {wanted} for {', '.join(sorted(ops))}: it would run elsewhere"
        )


_PREFIXES = {"tensorrt": "trt", "tensorrt_rtx": "nv"}


def shape_options(provider: str, inputs: Mapping[str, TensorType], dims: Mapping[str, DimRange]) -> dict[str, str]:
    """What the TensorRT providers are told of sizes, so that they build one engine for all of them; nothing for others.

    PipelineError for a size without an end."""
    prefix = _PREFIXES.get(provider)
    if prefix is None or not dims:
        return {}
    (profile,) = profiles_of(inputs, dims, Options())
    shapes = {name: shapes_in(type, profile) for name, type in inputs.items()}
    return {
        f"{prefix}_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, each[index]))}" for name, each in shapes.items()
        )
        for index, which in enumerate(("min", "opt", "max"))
    }


class OnnxRuntimeEngine(Engine):
    """A model file in a session. ``threads``: as many as there are cores, unless given."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        model: str,
        provider: str,
        threads: int | None,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(manifest)
        self.provider = provider
        options = {**shape_options(provider, self.inputs, self.dims), **(provider_options or {})}
        self.session = make_session(folder / model, provider, threads, provider_options=options)
        self._call = caller_of(self.session)

    def must_be_apart(self, layout: CacheLayout, feeds: Mapping[str, Any]) -> bool:
        """Whether the rows must run one by one: GroupQueryAttention takes several tokens on top of a past for one row only."""
        batch, width = feeds[layout.tokens[0]].shape[:2]
        return bool(batch > 1 and width > 1 and "GroupQueryAttention" in self.manifest.report.engine_ops)

    def run(self, tensors: Mapping[str, Any], as_torch: bool) -> dict[str, Any]:
        layout = self.layout
        if layout is not None and layout.max_length is not None:
            given = {name: t if isinstance(t, torch.Tensor) else to_torch(t) for name, t in tensors.items()}
            made = BoundCache(self, layout, len(given[PAST_LENGTHS]), {}).call_once(given)
            return {name: made[name] if as_torch else made[name].numpy() for name in self.outputs}
        results = self._run({name: to_numpy(tensor) for name, tensor in tensors.items()})
        return {name: to_torch(array) for name, array in results.items()} if as_torch else results

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with running():
            return dict(zip(self.outputs, self._call(list(self.outputs), feeds), strict=True))

    def _new_cache(self, layout: CacheLayout, batch: int, once: Mapping[str, torch.Tensor]) -> KvCache:
        return BoundCache(self, layout, batch, once)
