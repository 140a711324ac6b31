"""A cache whose buffers onnxruntime reads and writes where they are, through IO bindings made once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import BackendError
from graphopt.execution import bind_dims
from graphopt.runtime.cache import NEW_LENGTHS, CacheLayout
from graphopt.runtime.engine import signature
from graphopt.runtime.kv_cache import KvCache
from graphopt.tensors import TensorType

if TYPE_CHECKING:
    from graphopt.backends.onnxruntime.engine import OnnxRuntimeEngine

BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: of bf16 onnxruntime knows no arrays
#: What bindings call the elements of tensors.
_ELEMENTS = {
    torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: BFLOAT16, torch.int64: np.int64,
    torch.int32: np.int32, torch.int8: np.int8, torch.bool: np.bool_,
}  # fmt: skip


@contextlib.contextmanager
def running() -> Iterator[None]:
    """What onnxruntime raises while it runs a model, as BackendError."""
    try:
        yield
    except Exception as error:
        raise BackendError(f"onnxruntime cannot run the model: {str(error).splitlines()[0]}") from error


@dataclass
class _Call:
    """A binding of some rows of the cache, with the tensors, on the CPU, that one step's feeds are copied into.

    ``pasts`` and ``presents`` are the same buffers in a static layout; a binding does not keep them alive."""

    binding: Any
    feeds: dict[str, Tensor]
    pasts: dict[str, Tensor]
    presents: dict[str, Tensor] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)


class BoundCache(KvCache):
    """In a static layout past and present are one buffer, bound once; in a growing one a step's presents are bound as the
    next one's pasts. No step copies the cache."""

    engine: OnnxRuntimeEngine

    def __init__(self, engine: OnnxRuntimeEngine, layout: CacheLayout, batch: int, once: Mapping[str, Tensor]) -> None:
        self.device = torch.device("cuda" if engine.provider == "cuda" else "cpu")
        #: Whether some inputs may be read elsewhere than they lie: onnxruntime copies those when they are bound, and only then.
        self.binds_by_copy = self.device.type != "cpu"
        super().__init__(engine, layout, batch, {name: t.to(self.device).contiguous() for name, t in once.items()})
        self._calls: dict[tuple[int, int, int], _Call] = {}

    def _step(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.layout.max_length is None or not self.engine.must_be_apart(self.layout, feeds):
            return self._run(feeds, 0, self.batch)
        rows = [self._run(self._row(feeds, row), row, row + 1) for row in range(self.batch)]
        return {name: _stacked([each[name] for each in rows]) for name in self.layout.results}

    def _row(self, feeds: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        """One row's feeds, without the padding behind its tokens where the engine is told how many they are."""
        own = {name: tensor[row : row + 1] for name, tensor in feeds.items()}
        if NEW_LENGTHS in own:
            count = int(own[NEW_LENGTHS])
            own |= {
                name: own[name].narrow(self.layout.axis_of(self.layout.inputs[name]) or 1, 0, count)
                for name in self.layout.tokens
            }
        return own

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._calls.clear()

    def _run(self, feeds: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
        call = self._call(feeds, first, last)
        for name, tensor in feeds.items():
            call.feeds[name].copy_(tensor)
        if self.binds_by_copy:
            for name, tensor in call.feeds.items():
                _bind_tensor(call.binding.bind_input, name, tensor)
            call.binding.synchronize_inputs()
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        with running():
            self.engine.session.run_with_iobinding(call.binding)
        call.binding.synchronize_outputs()
        if self.layout.max_length is None:
            self.tensors = call.presents
        return call.results

    def _call(self, feeds: Mapping[str, Tensor], first: int, last: int) -> _Call:
        """The binding for such feeds. Only steps of single tokens come again and again; results of those are overwritten by
        the next."""
        width = feeds[self.layout.tokens[0]].shape[1]
        key = first, last, width
        if key in self._calls and not _fit(feeds, self._calls[key].feeds):
            del self._calls[key]  # binding them says what is wrong
        if key not in self._calls or self.layout.max_length is None:
            made = self._bind(feeds, first, last)
            if width > 1 or self.layout.max_length is None:
                return made
            self._calls[key] = made
        return self._calls[key]

    def _bind(self, feeds: Mapping[str, Tensor], first: int, last: int) -> _Call:
        layout = self.layout
        pasts = {name: tensor[first:last] for name, tensor in self.tensors.items()}
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in feeds.items()}
        pasts |= {name: tensor[first:last] for name, tensor in self.once.items()}
        given = {name: signature(name, tensor) for name, tensor in {**feeds, **pasts}.items()}
        env = bind_dims(self.engine.inputs, self.engine.dims, given)
        call = _Call(self.engine.session.io_binding(), copies, pasts)
        for name, tensor in (pasts if self.binds_by_copy else copies | pasts).items():
            _bind_tensor(call.binding.bind_input, name, tensor)
        for past, present in layout.names.items():
            grows = layout.max_length is None
            call.presents[past] = self._empty(layout.outputs[present], env) if grows else pasts[past]
            _bind_tensor(call.binding.bind_output, present, call.presents[past])
        for name in layout.results:
            call.results[name] = self._empty(layout.outputs[name], env)
            _bind_tensor(call.binding.bind_output, name, call.results[name])
        return call

    def _empty(self, type: TensorType, env: Mapping[str, int]) -> Tensor:
        return torch.empty(*type.concrete(env).shape, dtype=type.dtype, device=self.device)  # type: ignore[arg-type]  # numbers


def _fit(feeds: Mapping[str, Tensor], bound: Mapping[str, Tensor]) -> bool:
    return feeds.keys() == bound.keys() and all(
        tensor.shape == bound[name].shape and tensor.dtype == bound[name].dtype for name, tensor in feeds.items()
    )


def _stacked(rows: list[Tensor]) -> Tensor:
    """Results of several rows; those along the tokens padded to the longest."""
    if len({row.shape for row in rows}) == 1:
        return torch.cat(rows)
    return torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)


_NOTHING = torch.zeros(1)


def _bind_tensor(bind: Callable[..., None], name: str, tensor: Tensor) -> None:
    """Bind a contiguous tensor where it lies."""
    assert tensor.is_contiguous()
    pointer = tensor.data_ptr() or _NOTHING.data_ptr()  # an empty tensor lies nowhere
    device = tensor.device.index or 0
    bind(name, tensor.device.type, device, _ELEMENTS[tensor.dtype], tuple(tensor.shape), pointer)
