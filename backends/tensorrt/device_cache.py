"""A cache on the device: written in place by the engine, or with the new rows that it gives; steps of single tokens are
recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.backends.tensorrt.cached import open_type
from graphopt.backends.tensorrt.options import CACHE_LENGTH
from graphopt.execution import bind_dims
from graphopt.runtime.cache import PAST_EVICTED, PAST_LENGTHS, CacheLayout, new_tokens
from graphopt.runtime.engine import signature
from graphopt.runtime.kv_cache import KvCache
from graphopt.tensors import DimRange

if TYPE_CHECKING:
    from graphopt.backends.tensorrt.engine import TensorRtEngine


@dataclass
class Recorded:
    """A CUDA graph with the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    results: dict[str, Tensor]
    inputs: dict[str, Tensor]

    def replay(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The results for other inputs of the same sizes, as copies."""
        self.run(feeds)
        copies = {name: torch.empty_like(tensor) for name, tensor in self.results.items()}
        _copy(copies, self.results)
        return copies

    def run(self, feeds: Mapping[str, Tensor]) -> None:
        """Leaves the results where they were recorded."""
        _copy(self.inputs, feeds)
        self.graph.replay()


def _copy(places: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Tensors into others by name: those of one dtype by one kernel. (Single copies are memory copies to the driver, which take
    longer to begin behind a graph.)"""
    alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for name, place in places.items():
        into, of = alike.setdefault(place.dtype, ([], []))
        into.append(place)
        of.append(given[name])
    for into, of in alike.values():
        torch._foreach_copy_(into, of, non_blocking=True)


def record(run: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """What a function puts on the device, to be done again with the same tensors. It runs once before, which prepares it."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@dataclass
class _Stack:
    """Buffers of one shape, ``[n, B, H, M, D]``, by name: new rows of all of them are written at once."""

    names: list[str]
    buffers: Tensor

    def rows(self, width: int) -> Tensor:
        """Room for the new rows of ``width`` tokens."""
        count, batch, heads, _, size = self.buffers.shape
        return self.buffers.new_empty(count, batch, heads, width, size)

    def longer(self, length: int) -> _Stack:
        """With room for ``length`` positions."""
        count, batch, heads, own, size = self.buffers.shape
        made = self.buffers.new_zeros(count, batch, heads, length, size)
        made[:, :, :, :own] = self.buffers
        return _Stack(self.names, made)

    def write(self, rows: Tensor, starts: Tensor) -> None:
        """``rows`` ``[n, B, H, S, D]`` behind the first ``starts`` ``[B]`` positions."""
        places = starts[:, None] + torch.arange(rows.shape[3], device=starts.device)
        self.buffers.scatter_(3, places[None, :, None, :, None].expand_as(rows), rows)


class DeviceCache(KvCache):
    """The buffers of a static layout stay where they are; of a growing one the engine's outputs are the next step's inputs."""

    engine: TensorRtEngine
    #: Lengths that its buffers may have, shortest first, if they have several.
    lengths: Sequence[int]

    def __init__(self, engine: TensorRtEngine, layout: CacheLayout, batch: int, once: Mapping[str, Tensor]) -> None:
        self.device, self.lengths = engine.device, engine.cache_lengths
        self.gives_rows = layout.max_length is not None and engine.gives_new_rows(layout)
        self.recorded: Recorded | None = None
        super().__init__(engine, layout, batch, {name: tensor.to(self.device) for name, tensor in once.items()})

    def _fresh(self) -> dict[str, Tensor]:
        return self.layout.empty(self.batch, self.device, self.lengths[0] if self.lengths else None)

    def with_room(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.lengths:
            self._grow(self._fitting(feeds))
        return super().with_room(feeds)

    def _fitting(self, feeds: Mapping[str, Tensor], least: int = 0) -> int:
        """The shortest length that holds the texts after a step, and ``least`` positions."""
        needed = int(feeds[PAST_LENGTHS].max()) + new_tokens(self.layout, feeds)
        return next(length for length in self.lengths if length >= max(needed, least))

    def _grow(self, length: int) -> None:
        """Let the buffers have so many positions, if they have fewer."""
        if self.tensors[self.layout.whole[0]].shape[2] < length:
            whole = set(self.layout.whole)
            self._keep([stack.longer(length) if stack.names[0] in whole else stack for stack in self._stacks])

    def call_once(self, tensors: Mapping[str, Tensor], least: int = 0) -> dict[str, Tensor]:
        """In buffers as short as a text's would be, but of ``least`` positions; those behind them stay as they are given."""
        if not self.lengths:
            return super().call_once(tensors)
        length = self._fitting(tensors, least)
        results = super().call_once(dict(tensors) | {name: tensors[name][:, :, :length] for name in self.layout.whole})
        for name in self.layout.whole:
            present = self.layout.names[name]
            results[present] = torch.cat([results[present], tensors[name][:, :, length:].cpu()], 2)
        return results

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        alike: dict[tuple[torch.Size, torch.dtype, bool], list[str]] = {}
        for name, tensor in tensors.items() if self.gives_rows else ():
            alike.setdefault((tensor.shape, tensor.dtype, name in self.layout.whole), []).append(name)
        stacks = [_Stack(names, torch.stack([tensors[name] for name in names])) for names in alike.values()]
        self._keep(stacks, {} if stacks else tensors)

    def _keep(self, stacks: list[_Stack], others: Mapping[str, Tensor] | None = None) -> None:
        """Let these be the cache: what was recorded was of others."""
        self.recorded, self._stacks = None, stacks
        super().hold(
            {name: buffer for stack in stacks for name, buffer in zip(stack.names, stack.buffers, strict=True)}
            | dict(others or {})
        )

    def _step(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.layout.max_length is None or new_tokens(self.layout, feeds) > 1 or self.device.type != "cuda":
            return self.put({name: self.engine.on_device(tensor) for name, tensor in feeds.items()})
        if self.recorded is None:
            self.recorded = self._record({name: self.engine.on_device(tensor) for name, tensor in feeds.items()})
        self.recorded.run(feeds)
        return self.recorded.results

    def _record(self, feeds: Mapping[str, Tensor]) -> Recorded:
        """What a step of single tokens does; each step's results lie where the one's before lay."""
        inputs = {name: tensor.clone() for name, tensor in feeds.items()}
        return Recorded(*record(lambda: self.put(inputs)), inputs)

    def put(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put a step on the current stream: ``feeds`` on the device."""
        inputs = {**feeds, **self.once, **self.tensors}
        env = self._sizes({name: signature(name, own) for name, own in inputs.items()})
        rows = [stack.rows(new_tokens(self.layout, feeds)) for stack in self._stacks]
        presents: dict[str, Tensor] = {}
        if self.layout.max_length is not None and not rows:
            presents = {present: self.tensors[past] for past, present in self.layout.names.items()}
        for stack, own in zip(self._stacks, rows, strict=True):
            presents |= {self.layout.names[name]: each for name, each in zip(stack.names, own, strict=True)}
        made = self.engine.enqueue(inputs, env, presents)
        if self.layout.max_length is None:
            self.tensors = {past: made[present] for past, present in self.layout.names.items()}
        for stack, own in zip(self._stacks, rows, strict=True):
            stack.write(own, self._starts(stack, feeds))
        return {name: made[name] for name in self.layout.results}

    def _sizes(self, given: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, int]:
        """What the inputs' named sizes are, the buffers' length among them if it is open."""
        types, dims = dict(self.engine.inputs), dict(self.engine.dims)
        if self.lengths:
            types |= {name: open_type(types[name]) for name in self.layout.whole}
            dims[CACHE_LENGTH] = DimRange(1, self.lengths[-1])
        return bind_dims(types, dims, given)

    def _starts(self, stack: _Stack, feeds: Mapping[str, Tensor]) -> Tensor:
        """Where the new rows of each text go."""
        starts = feeds[PAST_LENGTHS]
        is_window = self.layout.window is not None and stack.names[0] not in self.layout.whole
        return starts - feeds[PAST_EVICTED] if is_window else starts
