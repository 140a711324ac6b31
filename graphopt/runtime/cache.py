"""Engines with a cache: how its tensors are named, and running a whole text through in steps."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.dims import Dim, Size
from graphopt.ir import Graph, types_of
from graphopt.tensors import DimRange, TensorType

LOGITS = "logits"
"""The output that generation reads, ``[batch, sequence, vocabulary]``, or of last tokens only ``[batch, 1, vocabulary]``."""

PAST_LENGTHS = "past_lengths"
"""The input of a static cache that says how many positions each row has filled, i64 ``[batch]``."""

PAST_EVICTED = "past_evicted"
"""The input of a static cache with windows: how many of the first positions buffers of windows have dropped, i64 ``[batch]``."""

NEW_LENGTHS = "new_lengths"
"""The input of a static cache with logits of last tokens only: how many new tokens each row has, i64 ``[batch]``."""


def past_name(layer: int, part: str) -> str:
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    return f"present.{layer}.{part}"


def cross_name(layer: int, part: str) -> str:
    """Keys and values of an encoder, made once."""
    return f"cross_key_values.{layer}.{part}"


def once_name(value: str) -> str:
    """Anything else that is made once."""
    return f"encoder.{value}"


_ONCE = ("cross_key_values.", "encoder.")
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)$")


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a graph or engine by its inputs and outputs.

    ``sequence`` names the number of new tokens; ``past`` the number of past ones in a growing cache, which has the padding
    mask of all positions, if any, as ``mask``; ``max_length`` is the number of positions of a static one, ``window`` the
    number of positions that its shorter buffers keep and may be given at once."""

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    names: Mapping[str, str]  # present by past
    sequence: str
    past: str | None = None
    mask: str | None = None
    max_length: int | None = None
    window: int | None = None

    @classmethod
    def of(
        cls, inputs: Mapping[str, TensorType], outputs: Mapping[str, TensorType], dims: Mapping[str, DimRange]
    ) -> CacheLayout | None:
        """None where there is no cache."""
        names = {name: name.replace("past_key_values", "present", 1) for name in inputs if _PAST.match(name)}
        if not names or not all(present in outputs for present in names.values()):
            return None
        first, present = (
            types[name].shape[2] for types, name in zip((inputs, outputs), next(iter(names.items())), strict=True)
        )
        if isinstance(first, int):
            sequence = _sequence(inputs, names)
            shortest = min(_number(inputs[name].shape[2]) for name in names)
            window = (shortest + 1) // 2 if PAST_EVICTED in inputs else None
            return cls(inputs, outputs, names, sequence, max_length=dims[sequence].max, window=window)
        mask = next((name for name, type in inputs.items() if name not in names and present in type.shape), None)
        return cls(inputs, outputs, names, _name(present - first), _name(first), mask)

    @functools.cached_property
    def once(self) -> list[str]:
        """The inputs that a prologue gives, the same in every step."""
        return [name for name in self.inputs if name.startswith(_ONCE)]

    @functools.cached_property
    def tokens(self) -> list[str]:
        """The inputs that hold new tokens: an axis of the sequence alone."""
        return [name for name, type in self.inputs.items() if name not in self.names and self.axis_of(type) is not None]

    @functools.cached_property
    def results(self) -> list[str]:
        """The outputs that are no cache."""
        return [name for name in self.outputs if name not in self.names.values()]

    def is_last(self, name: str) -> bool:
        """Whether an output is of each row's last new token only."""
        return name == LOGITS and self.outputs[name].shape[1:2] == (1,)

    def axis_of(self, type: TensorType) -> int | None:
        """The axis of new tokens."""
        sizes = list(type.shape)
        return sizes.index(Dim.named(self.sequence)) if Dim.named(self.sequence) in sizes else None

    @functools.cached_property
    def whole(self) -> list[str]:
        """The buffers of all positions, not of a window."""
        window = None if self.window is None else window_length(self.window)
        return [name for name in self.names if self.inputs[name].shape[2] in {self.max_length} - {window, None}]

    def empty(self, batch: int, device: torch.device | str = "cpu", length: int | None = None) -> dict[str, Tensor]:
        """A cache of no tokens: nothing in it, or buffers of zeros, the whole ones of ``length`` positions if it is given."""
        found = {}
        for name in self.names:
            _, heads, own, size = self.inputs[name].shape
            positions = length if length is not None and name in self.whole else own
            shape = batch, _number(heads), positions if isinstance(positions, int) else 0, _number(size)
            found[name] = _zeros(shape, self.inputs[name].dtype, device)
        return found


def _sequence(inputs: Mapping[str, TensorType], names: Mapping[str, str]) -> str:
    """The name of the tokens' length: of no size that an encoder's results or their padding have."""
    others = {size for name, type in inputs.items() if name.startswith(_ONCE) for size in type.shape}
    left = (type.shape for name, type in inputs.items() if name not in names and not name.startswith(_ONCE))
    return next(
        _name(shape[1]) for shape in left if len(shape) > 1 and isinstance(shape[1], Dim) and shape[1] not in others
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """On the CPU pages that the system zeroes when they are first touched: a long cache costs nothing until it is filled."""
    known = {torch.float32: np.float32, torch.float16: np.float16, torch.int8: np.int8}
    if str(device) != "cpu" or dtype not in known:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, known[dtype]))


def _number(size: Size) -> int:
    assert isinstance(size, int)
    return size


def _name(size: Size) -> str:
    assert isinstance(size, Dim)
    assert size.name is not None
    return size.name


def window_length(window: int) -> int:
    """Positions of a buffer that keeps ``window`` positions: those before a token, and as many new ones at once."""
    return 2 * window - 1


def make_room(
    layout: CacheLayout, tensors: Mapping[str, Tensor], feeds: Mapping[str, Tensor], evicted: Tensor
) -> Tensor:
    """Move what buffers of windows still need to their front, in place, if the new tokens do not fit behind it; how many
    positions each row has dropped by now."""
    if layout.window is None:
        return evicted
    length, width = window_length(layout.window), new_tokens(layout, feeds)
    used = feeds[PAST_LENGTHS] - evicted
    if int(used.max()) + width <= length:
        return evicted
    dropped = (used - (layout.window - 1)).clamp(min=0)
    index = (torch.arange(length) + dropped[:, None]).clamp(max=length - 1)
    for name, tensor in tensors.items():
        if name not in layout.whole:
            tensor.copy_(take(tensor, index.to(tensor.device), 2))
    return evicted + dropped


def new_tokens(layout: CacheLayout, feeds: Mapping[str, Tensor]) -> int:
    """How many tokens a step gives each row, padding included."""
    name = layout.tokens[0]
    axis = layout.axis_of(layout.inputs[name])
    assert axis is not None
    return feeds[name].shape[axis]


def layout_of(graph: Graph) -> CacheLayout | None:
    """The cache of a graph, if it has one."""
    inputs, outputs = map(types_of, (graph.inputs, graph.outputs))
    return CacheLayout.of(inputs, outputs, graph.dims)


# A text without a cache, run in steps

Call = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def compacted(mask: Tensor) -> Tensor:
    """Which position comes at each place, ``[batch, sequence]``, so that real tokens come first and padding last."""
    return torch.argsort((mask == 0).to(torch.uint8), dim=1, stable=True)


def take(tensor: Tensor, index: Tensor, axis: int = 1) -> Tensor:
    """``tensor`` with the entries ``index[b]`` of row b along ``axis``; the first axis is the batch."""
    rows = torch.arange(index.shape[0], device=tensor.device).unsqueeze(1)
    return tensor.movedim(axis, 1)[rows, index].movedim(1, axis)


@dataclass(frozen=True)
class Step:
    """One call: row b's tokens ``starts[b] .. starts[b] + counts[b]``, what it is fed with and what it gives."""

    starts: Tensor
    counts: Tensor
    feeds: dict[str, Tensor]
    results: Mapping[str, Tensor]


@dataclass(frozen=True)
class Text:
    """What steps give for whole texts: outputs along the sequence put together, and which positions they tell of."""

    outputs: dict[str, Tensor]
    seen: Tensor | None


def as_if_uncached(
    call: Call, layout: CacheLayout, inputs: Mapping[str, Tensor], mask: Tensor | None, before: Call | None = None
) -> Text:
    """What a graph or engine with a cache gives for whole texts, which it is run through in several steps.

    ``inputs`` are those of the model without a cache, real tokens first in each row; ``mask`` ``[batch, sequence]`` says which
    those are; ``before`` is the prologue. The outputs compare with the model's."""
    inputs, mask, found = _after(before, layout, inputs, mask)
    length = new_tokens(layout, inputs)
    seen = None if mask is None else mask.clone()
    for step in steps_of(call, layout, inputs, mask):
        starts, counts = step.starts, step.counts
        if any(layout.is_last(name) for name in layout.results):
            starts, counts = starts + counts - 1, (counts > 0).to(counts.dtype)
            if seen is None or int(step.starts.max()) == 0:
                seen = torch.zeros(len(starts), length, dtype=torch.int64)
            seen[counts > 0, starts[counts > 0]] = 1
        for name in layout.results:
            axis, result = 1 if layout.is_last(name) else layout.axis_of(layout.outputs[name]), step.results[name]
            if axis is None:
                found[name] = result
                continue
            if name not in found:
                found[name] = result.new_zeros((*result.shape[:axis], length, *result.shape[axis + 1 :]))
            for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
                found[name][row].narrow(axis - 1, start, count).copy_(result[row].narrow(axis - 1, 0, count))
    if layout.max_length is None and mask is not None:
        back = torch.argsort(_padding_first(mask), dim=1)
        for name in layout.results:
            axis = 1 if layout.is_last(name) else layout.axis_of(layout.outputs[name])
            found[name] = found[name] if axis is None else take(found[name], back, axis)
        seen = None if seen is None else take(seen, back) * mask
    return Text(found, seen)


def last_step(
    call: Call, layout: CacheLayout, inputs: Mapping[str, Tensor], mask: Tensor | None, before: Call | None = None
) -> dict[str, Tensor]:
    """What the last of those steps is called with."""
    inputs, mask, _ = _after(before, layout, inputs, mask)
    return [step.feeds for step in steps_of(call, layout, inputs, mask)][-1]


def prompt_feeds(
    layout: CacheLayout, inputs: Mapping[str, Tensor], mask: Tensor | None, before: Call | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """One call that reads whole texts on an empty cache, and which of its positions mean something; of a cache with windows
    only as many of the first tokens as it takes at once."""
    inputs, mask, _ = _after(before, layout, inputs, mask)
    given = {name: tensor for name, tensor in inputs.items() if name in layout.inputs}
    length = new_tokens(layout, given)
    batch = next(iter(given.values())).shape[0]
    cache = layout.empty(batch)
    if layout.max_length is None:
        return given | cache, mask
    nothing, width = torch.zeros(batch, dtype=torch.int64), min(length, layout.window or length)
    if mask is not None:
        order = compacted(mask)
        given = {name: _turned(layout, name, tensor, order) for name, tensor in given.items()}
        mask = take(mask, order)[:, :width]
    feeds = {name: _part(layout, name, tensor, nothing, width) for name, tensor in given.items()} | cache
    feeds[PAST_LENGTHS] = nothing
    if layout.window is not None:
        feeds[PAST_EVICTED] = nothing
    if NEW_LENGTHS in layout.inputs:
        feeds[NEW_LENGTHS] = torch.full((batch,), width) if mask is None else mask.sum(1).clamp(min=1)
    return feeds, mask


def _after(
    before: Call | None, layout: CacheLayout, inputs: Mapping[str, Tensor], mask: Tensor | None
) -> tuple[Mapping[str, Tensor], Tensor | None, dict[str, Tensor]]:
    """The inputs with what the prologue gives, the tokens' own padding mask, and the prologue's results."""
    if before is None:
        return inputs, mask, {}
    made = dict(before(inputs))
    once = {name: made.pop(name) for name in layout.once}
    return {**inputs, **once}, None, made


def steps_of(call: Call, layout: CacheLayout, inputs: Mapping[str, Tensor], mask: Tensor | None) -> Iterator[Step]:
    """A prompt, several tokens on top of it, single tokens: each row its own numbers of them in a static cache, all alike
    and with padding in front in a growing one."""
    length = new_tokens(layout, inputs)
    given = {name: tensor for name, tensor in inputs.items() if name in layout.inputs}
    batch = next(iter(given.values())).shape[0]
    cache = layout.empty(batch)
    lengths = torch.full((batch,), length) if mask is None else mask.sum(1)
    if layout.max_length is None:
        lengths = torch.full((batch,), length)
        if mask is not None:
            order = _padding_first(mask)
            given = {name: _turned(layout, name, tensor, order) for name, tensor in given.items()}
    starts, evicted = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    steps = torch.tensor([step_lengths(int(length)) for length in lengths]).T
    for counts in _narrowed(steps, layout.window):
        width = int(counts.max())
        if not width:
            continue
        feeds = {name: _part(layout, name, tensor, starts, width) for name, tensor in given.items()} | cache
        if layout.max_length is not None:
            feeds |= {NEW_LENGTHS: counts.clamp(min=1)} if NEW_LENGTHS in layout.inputs else {}
            feeds[PAST_LENGTHS] = starts.clamp(max=layout.max_length - width)  # of a row that is through already
        if layout.window is not None:
            cache = {name: tensor.clone() for name, tensor in cache.items()}  # they may be a result's own memory
            evicted = make_room(layout, cache, feeds, evicted)
            feeds |= cache | {PAST_EVICTED: evicted}
        results = call(feeds)
        yield Step(starts, counts, feeds, results)
        cache = {past: results[present] for past, present in layout.names.items()}
        starts = starts + counts


def _narrowed(steps: Tensor, widest: int | None) -> Iterator[Tensor]:
    """The counts of each step, those of more than ``widest`` tokens in several."""
    for counts in steps:
        while widest is not None and int(counts.max()) > widest:
            part = counts.clamp(max=widest)
            yield part
            counts = counts - part
        yield counts


def _padding_first(mask: Tensor) -> Tensor:
    return torch.argsort((mask != 0).to(torch.uint8), dim=1, stable=True)


def _turned(layout: CacheLayout, name: str, tensor: Tensor, order: Tensor) -> Tensor:
    axis = 1 if name == layout.mask else layout.axis_of(layout.inputs[name])
    return tensor if axis is None else take(tensor, order, axis)


def _part(layout: CacheLayout, name: str, tensor: Tensor, starts: Tensor, width: int) -> Tensor:
    """What a step sees of an input: its own tokens, or all positions up to them."""
    if name == layout.mask:
        return tensor[:, : int(starts.max()) + width].contiguous()
    axis = layout.axis_of(layout.inputs[name])
    if axis is None:
        return tensor
    index = (starts.unsqueeze(1) + torch.arange(width)).clamp(max=tensor.shape[axis] - 1)
    return take(tensor, index, axis).contiguous()


def step_lengths(length: int) -> list[int]:
    """How many tokens a text of ``length`` gives to each of four steps."""
    prompt = (length + 1) // 2
    singles = min(2, length - prompt)
    return [prompt, length - prompt - singles, *(int(step < singles) for step in range(2))]
