"""Engines with a cache: how its tensors are named, and running a sequence through in steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from graphopt.dims import Dim, Size
from graphopt.ir import Graph, TensorType


def past_name(layer: int, part: str) -> str:
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    return f"present.{layer}.{part}"


_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)$")


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a graph or engine by its inputs and outputs. ``past`` and ``sequence`` name the lengths."""

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    names: Mapping[str, str]  # present by past
    past: str
    sequence: str

    @classmethod
    def of(cls, inputs: Mapping[str, TensorType], outputs: Mapping[str, TensorType]) -> CacheLayout | None:
        """None where there is no cache."""
        names = {name: name.replace("past_key_values", "present", 1) for name in inputs if _PAST.match(name)}
        if not names or not all(present in outputs for present in names.values()):
            return None
        first, present = (
            types[name].shape[2] for types, name in zip((inputs, outputs), next(iter(names.items())), strict=True)
        )
        return cls(inputs, outputs, names, _name(first), _name(present - first))

    @property
    def tokens(self) -> list[str]:
        """The inputs that hold new tokens: an axis of the sequence alone."""
        return [name for name, type in self.inputs.items() if name not in self.names and self.axis_of(type) is not None]

    def axis_of(self, type: TensorType) -> int | None:
        """The axis of new tokens."""
        sizes = list(type.shape)
        return sizes.index(Dim.named(self.sequence)) if Dim.named(self.sequence) in sizes else None

    def empty(self, batch: int) -> dict[str, torch.Tensor]:
        """A cache of no tokens."""
        found = {}
        for name in self.names:
            _, heads, _, size = self.inputs[name].shape
            assert isinstance(heads, int)
            assert isinstance(size, int)
            found[name] = torch.zeros((batch, heads, 0, size), dtype=self.inputs[name].dtype)
        return found


def _name(size: Size) -> str:
    assert isinstance(size, Dim)
    assert size.name is not None
    return size.name


def layout_of(graph: Graph) -> CacheLayout | None:
    """The cache of a graph, if it has one."""
    types = ({name: value.type for name, value in values.items()} for values in (graph.inputs, graph.outputs))
    return CacheLayout.of(*types)


Call = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


Whole = Callable[..., Mapping[str, torch.Tensor]]


def as_if_uncached(call: Call, layout: CacheLayout) -> Whole:
    """A graph or engine with a cache, called with whole sequences: it runs them through in several steps.

    Outputs along the sequence are put together, so that they compare with those of a model without a cache."""

    def whole(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces: dict[str, list[torch.Tensor]] = {}
        for _, results in _steps(call, layout, inputs):
            for name, tensor in results.items():
                if name not in layout.names.values():
                    pieces.setdefault(name, []).append(tensor)
        return {name: _joined(layout, name, parts) for name, parts in pieces.items()}

    return whole


def last_step(call: Call, layout: CacheLayout, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the last of those steps is called with."""
    return [feeds for feeds, _ in _steps(call, layout, inputs)][-1]


def _steps(
    call: Call, layout: CacheLayout, inputs: Mapping[str, torch.Tensor]
) -> Iterator[tuple[dict[str, torch.Tensor], Mapping[str, torch.Tensor]]]:
    given = {name: tensor for name, tensor in inputs.items() if name in layout.inputs}
    cache = layout.empty(next(iter(given.values())).shape[0])
    start = 0
    for step in step_lengths(_tokens(layout, given)):
        end = start + step
        feeds = {name: _part(layout, name, tensor, start, end) for name, tensor in given.items()} | cache
        results = call(feeds)
        yield feeds, results
        cache = {past: results[present] for past, present in layout.names.items()}
        start = end


def _part(layout: CacheLayout, name: str, tensor: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """What a step sees of an input: its own tokens, or all positions up to them."""
    sizes = layout.inputs[name].shape
    for axis, size in enumerate(sizes):
        if size == Dim.named(layout.sequence):
            return tensor.narrow(axis, start, end - start).contiguous()
        if isinstance(size, Dim) and layout.sequence in size.names:
            return tensor.narrow(axis, 0, end).contiguous()
    return tensor


def _joined(layout: CacheLayout, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    axis = layout.axis_of(layout.outputs[name])
    return parts[-1] if axis is None else torch.cat(parts, axis)


def step_lengths(length: int) -> list[int]:
    """Steps that try everything: a prompt, several tokens on top of it, single tokens."""
    prompt = (length + 1) // 2
    singles = min(2, length - prompt)
    return [step for step in (prompt, length - prompt - singles, *[1] * singles) if step]


def _tokens(layout: CacheLayout, inputs: Mapping[str, torch.Tensor]) -> int:
    """How many tokens inputs without a cache have."""
    name = layout.tokens[0]
    axis = layout.axis_of(layout.inputs[name])
    assert axis is not None
    return inputs[name].shape[axis]
