"""Run data through a graph and observe values on the way."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graphopt.calibration.data import batches, digest
from graphopt.calibration.observers import Observer, make_observer
from graphopt.dims import Dim, Size
from graphopt.errors import CalibrationError
from graphopt.execution import Run, Tap, run
from graphopt.ir import Graph, Node, Value
from graphopt.models import cache_folder
from graphopt.parity import Probe
from graphopt.runtime.cache import Call, layout_of, prompt_feeds
from graphopt.schemas.calibration import Calibration
from graphopt.sources import Source


@dataclass(frozen=True)
class Tapped:
    """A value to observe, and the axes whose every index has a range of its own; none for one range."""

    name: str
    axes: tuple[int, ...] = ()


def calibrate(
    graph: Graph,
    source: Source,
    config: Calibration,
    taps: Iterable[Tapped],
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Tensor]:
    """The magnitude up to which each tapped value is to be kept, f32, with the sizes of its own axes.

    Padding is left out. A graph with a cache reads every batch as prompts. Results for files are kept by a digest of graph,
    weights, data and options. CalibrationError for data that does not fit, NaN, or a value that no number but 0 reached."""
    taps = list(taps)
    key = _key(graph, source, config, taps)
    kept = None if key is None else _read(key)
    if kept is None:
        kept = _observe(graph, source, config, taps, progress)
        if key is not None:
            _write(key, kept)
    for tap in taps:
        if not bool((kept[tap.name] > 0).any()):
            where = _where(graph.value(tap.name))
            raise CalibrationError(
                f"%{tap.name} is 0 for all of the data", where=where, hint="give other data, or skip it"
            )
    return kept


def sample(graph: Graph, source: Source, config: Calibration, names: Iterable[str], rows: int) -> dict[str, Tensor]:
    """Some of each value's numbers ``[rows, last axis]``, f32: tokens at random, as many from every batch, padding left out."""
    wanted = set(names)
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    each = -(-rows * config.batch // config.samples)
    generator = torch.Generator().manual_seed(0)

    def see(value: Value, tensor: Tensor) -> None:
        if value.name in wanted:
            flat = tensor.reshape(-1, tensor.shape[-1])
            found[value.name].append(flat[torch.randperm(len(flat), generator=generator)[:each]].float())

    _run(graph, source, config, see, wanted, lambda done: None)
    return {name: torch.cat(parts)[:rows] for name, parts in found.items()}


def second_moments(
    graph: Graph,
    source: Source,
    config: Calibration,
    names: Iterable[str],
    progress: Callable[[float], None] = lambda done: None,
) -> Iterator[tuple[str, Tensor]]:
    """The mean of ``x.T @ x`` over the data's tokens, f32 ``[K, K]``, of each value ``[..., K]``. The data runs once for as
    many values as fit into a GiB."""
    for part in _in_parts(graph, list(dict.fromkeys(names))):
        found = {name: _Moment() for name in part}

        def see(value: Value, tensor: Tensor, found: Mapping[str, _Moment] = found) -> None:
            if value.name in found:
                found[value.name].add(tensor)

        _run(graph, source, config, see, found.keys(), progress)
        yield from ((name, moment.mean()) for name, moment in found.items())


def means(
    graph: Graph,
    source: Source,
    config: Calibration,
    names: Iterable[str],
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Tensor]:
    """The mean over the data's tokens of each value ``[..., K]``, f32 ``[K]``."""
    wanted = set(names)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(wanted, 0)

    def see(value: Value, tensor: Tensor) -> None:
        if value.name in wanted:
            flat = tensor.reshape(-1, tensor.shape[-1]).float()
            sums[value.name] = sums.get(value.name, 0) + flat.sum(0)
            counts[value.name] += len(flat)

    _run(graph, source, config, see, wanted, progress)
    return {name: total / max(counts[name], 1) for name, total in sums.items()}


def in_order(
    graph: Graph,
    source: Source,
    config: Calibration,
    linears: Set[Node],
    change: Callable[[Node, Tensor], Tensor],
    progress: Callable[[float], None] = lambda done: None,
) -> None:
    """All of the data through the graph a node at a time. ``change`` is given each of the linears in order with the second
    moment ``[K, K]`` of its input, as the changed ones before it make it, and returns the weight that it works with.

    Holds the values that are alive of all of the data at once: ``samples`` bounds that."""
    axes = () if source.mask is None else source.axes[source.mask]
    weights = {name: weight.load() for name, weight in graph.weights.items()}
    runs = [(Run(graph, probe.inputs, weights), probe.mask) for probe in feeds_of(graph, source, config)]
    moments: dict[Value, Tensor] = {}
    changed: dict[Value, Tensor] = {}
    with torch.no_grad():
        for index, node in enumerate(graph.nodes):
            if node in linears:
                x, weight = node.args["input"], node.args["weight"]
                if x not in moments:
                    moment = _Moment()
                    for own, mask in runs:
                        moment.add(real(x, own.values[x], mask, axes))
                    moments = {x: moment.mean()}
                if weight not in changed:
                    changed[weight] = change(node, moments[x])
                for own, _ in runs:
                    own.values[weight] = changed[weight]
            for own, _ in runs:
                own.step(node)
            progress(index / len(graph))


class _Moment:
    """The sum of ``x.T @ x``, and over how many tokens."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count = 0

    def add(self, tensor: Tensor) -> None:
        flat = tensor.reshape(-1, tensor.shape[-1]).float()
        product = flat.T @ flat
        self.sum = product if self.sum is None else self.sum.add_(product)
        self.count += len(flat)

    def mean(self) -> Tensor:
        assert self.sum is not None
        return self.sum / max(self.count, 1)


def _in_parts(graph: Graph, names: Sequence[str], limit: int = 1 << 28) -> Iterator[list[str]]:
    """Names whose moments have up to ``limit`` numbers together."""
    part: list[str] = []
    size = 0
    for name in names:
        own = _number(graph.value(name).type.shape[-1]) ** 2
        if part and size + own > limit:
            yield part
            part, size = [], 0
        part.append(name)
        size += own
    if part:
        yield part


def _observe(
    graph: Graph, source: Source, config: Calibration, taps: list[Tapped], progress: Callable[[float], None]
) -> dict[str, Tensor]:
    observers = {tap.name: make_observer(config) for tap in taps}
    axes = {tap.name: tap.axes for tap in taps}

    def see(value: Value, tensor: Tensor) -> None:
        if value.name in observers:
            _see(observers[value.name], value, tensor, axes[value.name])

    _run(graph, source, config, see, observers.keys(), progress)
    found = {}
    for name, observer in observers.items():
        threshold = observer.threshold()
        shape = [_number(graph.value(name).type.shape[axis]) for axis in axes[name]]
        found[name] = threshold.reshape(shape)
    return found


def _run(
    graph: Graph, source: Source, config: Calibration, see: Tap, names: Set[str], progress: Callable[[float], None]
) -> None:
    """All of the data through the graph; ``see`` is given every value without padding, inputs only if they are ``names``."""
    axes = () if source.mask is None else source.axes[source.mask]
    rows = 0
    for probe in feeds_of(graph, source, config):

        def tap(value: Value, tensor: Tensor, mask: Tensor | None = probe.mask) -> None:
            if value.name in names:
                see(value, real(value, tensor, mask, axes))

        for name in names & probe.inputs.keys():
            tap(graph.value(name), probe.inputs[name])
        with torch.no_grad():
            run(graph, probe.inputs, tap=tap)
        rows += len(next(iter(probe.inputs.values())) if probe.mask is None else probe.mask)
        progress(min(1.0, rows / config.samples))


def _see(observer: Observer, value: Value, tensor: Tensor, axes: tuple[int, ...]) -> None:
    moved = tensor.movedim(axes, tuple(range(len(axes))))
    count = math.prod(moved.shape[: len(axes)])
    try:
        observer.see(moved.reshape(count, -1).float())
    except CalibrationError as error:
        raise CalibrationError(
            f"{error.what} in %{value.name}", where=_where(value), hint="look at data and model"
        ) from error


def _where(value: Value) -> str:
    return f"%{value.name}" if value.producer is None else value.producer.where


def real(value: Value, tensor: Tensor, mask: Tensor | None, names: Sequence[str | None]) -> Tensor:
    """The numbers at positions that the mask ``[batch, sequence]`` keeps, where a value has those axes, of these ``names``:
    the batch's axis then has all kept positions, and the sequence's a single one. Other values as they are."""
    if mask is None or None in names:
        return tensor
    batch, sequence = (Dim.named(str(name)) for name in names)
    shape = value.type.shape
    if shape and shape[0] == batch * sequence:
        return tensor[mask.bool().flatten()]
    if sequence not in shape or shape[0] != batch:
        return tensor
    axis = shape.index(sequence)
    return tensor.movedim(axis, 1)[mask.bool()].unsqueeze(axis)


def _feeds(graph: Graph, probe: Probe) -> tuple[Mapping[str, Tensor], Tensor | None]:
    """What the graph takes of a batch, and which positions of it mean something."""
    layout = layout_of(graph)
    if layout is not None:
        return prompt_feeds(layout, probe.inputs, probe.mask, None if graph.prologue is None else _call(graph.prologue))
    return {name: tensor for name, tensor in probe.inputs.items() if name in graph.inputs}, probe.mask


def feeds_of(graph: Graph, source: Source, config: Calibration) -> Iterator[Probe]:
    """The data as the graph takes it, a batch at a time."""
    for probe in batches(source, config):
        feeds, mask = _feeds(graph, probe)
        yield Probe(probe.sizes, dict(feeds), mask)


def _call(graph: Graph) -> Call:
    return lambda inputs: run(graph, {name: inputs[name] for name in graph.inputs})


def _number(size: Size) -> int:
    assert isinstance(size, int), "a range of its own for an axis whose size is not fixed"
    return size


# Kept results


def _key(graph: Graph, source: Source, config: Calibration, taps: Iterable[Tapped]) -> str | None:
    data = digest(source, config)
    if data is None:
        return None
    made = hashlib.sha256(f"{graph.text()}\n{data}\n{sorted(map(repr, taps))}".encode())
    for _, weight in sorted(graph.weights.items()):
        made.update(weight.load().contiguous().flatten().view(torch.uint8).numpy().data)
    return made.hexdigest()


def _file(key: str) -> Path:
    return cache_folder() / "calibration" / f"{key}.json"


def _read(key: str) -> dict[str, Tensor] | None:
    try:
        return {name: torch.tensor(range) for name, range in json.loads(_file(key).read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError):
        return None


def _write(key: str, found: Mapping[str, Tensor]) -> None:
    file = _file(key)
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_suffix(f".{os.getpid()}.tmp")
    staged.write_text(json.dumps({name: range.tolist() for name, range in found.items()}))
    staged.replace(file)
