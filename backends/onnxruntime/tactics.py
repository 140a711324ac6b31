"""Timed tactics: of an op's correct forms, the one that is fastest on this machine at the sizes that are built for.

A candidate is built as a model of that op alone, compared with the op's reference, and timed against the others in turns.
Results are kept by op signature, onnxruntime version, CPU features and threads, so that a layer is timed once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import Dialect, Emitter, Unsupported, packet
from graphopt.backends.onnx.weights import embed
from graphopt.backends.onnxruntime.engine import caller_of, make_session, onnxruntime
from graphopt.backends.onnxruntime.widened import widened
from graphopt.dims import Dim
from graphopt.errors import BackendError, LoweringError
from graphopt.execution import run
from graphopt.ir import Graph, Node, Value, map_arg
from graphopt.runtime.cache import layout_of
from graphopt.runtime.engine import to_numpy, to_torch
from graphopt.schemas.report import TacticReport
from graphopt.tensors import DimRange, TensorType
from graphopt.text import arg_text

ROUNDS = 15  # timed runs of each candidate at each size, taken in turns
SECONDS = 0.12  # at most, for one candidate at one size
HOW = "threads rest between runs"  # how times are taken: those that were taken otherwise do not compare
WRONG = 1e-4  # relative difference from the reference at which a form is out


@cache
def cpu_features() -> str:
    """The instruction sets that decide which kernel is fast."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        flags = set(next(line for line in text.splitlines() if line.startswith("flags")).split())
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
    return " ".join(name for name in known if name in flags) or platform.machine()


DECODING = ((1, 1, 128), (1, 1, 1024), (1, 128, 1))  # batch, tokens, past


def tuning_sizes(graph: Graph, dims: Mapping[str, DimRange]) -> list[dict[str, int]]:
    """Sizes to time at: one short, several short, one long, as far as ``dims`` allows them; with a cache a prompt and single
    tokens on a past of several lengths. Dims at the first axis of an input count the examples of a batch."""
    counts = {
        size.name
        for value in graph.inputs.values()
        if value.type.shape
        for size in value.type.shape[:1]
        if isinstance(size, Dim)
    }
    layout = layout_of(graph)
    past = None if layout is None else layout.past
    found: list[dict[str, int]] = []
    for count, length, before in ((1, 128, 0), (8, 128, 0), (1, 512, 0)) if layout is None else DECODING:
        sizes = {}
        for name, bounds in dims.items():
            size = max(count if name in counts else before if name == past else length, bounds.min)
            sizes[name] = size if bounds.max is None else min(size, bounds.max)
        if sizes not in found:
            found.append(sizes)
    return found


class Tuner:
    """Chooses forms and times graphs for one target. ``reports`` tells what was chosen."""

    def __init__(
        self, dialect: Dialect, sizes: list[dict[str, int]], threads: int | None, cache_file: Path | None
    ) -> None:
        self.dialect, self.sizes, self.threads, self.cache_file = dialect, sizes, threads, cache_file
        self.reports: dict[str, TacticReport] = {}
        self._cache: dict[str, Any] = _read(cache_file)

    @property
    def _identity(self) -> str:
        return f"{HOW} | onnxruntime {onnxruntime().__version__} | {cpu_features()} | threads {self.threads} | {self.sizes}"

    def choose(self, node: Node) -> str | None:
        """The fastest right form of a node."""
        signature = signature_of(node)
        if signature in self.reports:
            report = self.reports[signature]
            self.reports[signature] = report.model_copy(update={"uses": report.uses + 1})
            return report.chosen
        kept = self._cache.get(self._key(self._choice(node)))
        report = TacticReport(**kept, how="timed before") if kept else self._time_forms(node, signature)
        self.reports[signature] = report
        if not kept:
            self._keep(self._choice(node), report.model_dump(include={"signature", "chosen", "milliseconds", "notes"}))
        return report.chosen

    def _choice(self, node: Node) -> str:
        return f"{signature_of(node)} | {', '.join(self.dialect.forms[packet(node)])}"

    def milliseconds(self, graph: Graph) -> float:
        """Time of a graph: the geometric mean of its medians over the sizes."""
        key = graph.text()
        kept = self._cache.get(self._key(key))
        if kept is None:
            session = self._session(Emitter(widened(graph)[0], self.dialect))
            times = [_median_times([self._runner(session, inputs)])[0] for inputs in self._inputs(graph)]
            kept = _geometric_mean(times)
            self._keep(key, kept)
        return float(kept)

    def _time_forms(self, node: Node, signature: str) -> TacticReport:
        graph = single_op(node)
        sessions: dict[str, Any] = {}
        notes: dict[str, str] = {}
        target = next(iter(graph.nodes))
        for form in self.dialect.forms[packet(node)]:
            try:
                sessions[form] = self._session(self._emit_form(graph, target, form))
            except (BackendError, LoweringError, Unsupported) as error:
                notes[form] = str(error).splitlines()[0]
        times: dict[str, list[float]] = {form: [] for form in sessions}
        for inputs in self._inputs(graph):
            right = self._right_forms(graph, inputs, sessions, notes)
            found = _median_times([self._runner(sessions[form], inputs) for form in right])
            for form, each in zip(right, found, strict=True):
                times[form].append(each)
        means = {form: _geometric_mean(each) for form, each in times.items() if form not in notes}
        if not means:
            raise BackendError(f"no form of {packet(node)} is right on this machine: {notes}", where=node.where)
        chosen = min(means, key=lambda form: means[form])
        every = {form: means.get(form) for form in self.dialect.forms[packet(node)]}
        return TacticReport(signature=signature, chosen=chosen, how="timed", milliseconds=every, notes=notes)

    def _emit_form(self, graph: Graph, target: Node, form: str) -> Emitter:
        """The one-op model in one form, and in no other."""
        alone = Dialect(
            self.dialect.name, self.dialect.opsets, {}, {packet(target): {form: self.dialect.forms[packet(target)][form]}},
            self.dialect.quirks,
        )  # fmt: skip
        return Emitter(graph, alone)

    def _right_forms(
        self, graph: Graph, inputs: dict[str, torch.Tensor], sessions: dict[str, Any], notes: dict[str, str]
    ) -> list[str]:
        expected = run(graph, inputs)["result"].double()
        scale = float(expected.abs().max()) or 1.0
        right = []
        for form, session in sessions.items():
            if form in notes:
                continue
            try:
                got = to_torch(self._runner(session, inputs)()[0]).double()
            except Exception as error:
                notes[form] = str(error).splitlines()[0][:200]
                continue
            difference = float((got - expected).abs().max()) / scale
            if difference <= WRONG:
                right.append(form)
            else:
                notes[form] = f"differs from the reference by {difference:.2g} of its scale"
        return right

    def _inputs(self, graph: Graph) -> Iterator[dict[str, torch.Tensor]]:
        """Examples of each size; where a mask says which keys are padding, one of the same sizes without any."""
        generator = torch.Generator().manual_seed(0)
        for sizes in self.sizes:
            made = {name: _example(value.type.concrete(sizes), generator) for name, value in graph.inputs.items()}
            yield made
            if "key_mask" in made:
                yield {**made, "key_mask": torch.ones_like(made["key_mask"])}

    def _session(self, emitter: Emitter) -> Any:
        embed(emitter)
        return make_session(ir.to_proto(emitter.model).SerializeToString(), "cpu", self.threads, beside_others=True)

    def _runner(self, session: Any, inputs: Mapping[str, torch.Tensor]) -> Callable[[], list[Any]]:
        known = {given.name for given in session.get_inputs()}
        feeds = {name: to_numpy(tensor) for name, tensor in inputs.items() if name in known}
        call = caller_of(session)
        return lambda: call(None, feeds)

    def _key(self, what: str) -> str:
        return hashlib.sha256(f"{self._identity}\n{what}".encode()).hexdigest()

    def _keep(self, what: str, result: Any) -> None:
        self._cache[self._key(what)] = result
        if self.cache_file is None:
            return
        kept = _read(self.cache_file) | self._cache
        staged = self.cache_file.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # where nothing can be kept, the next build takes its times again
            self.cache_file.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(json.dumps(kept), encoding="utf-8")
            staged.replace(self.cache_file)


def _read(file: Path | None) -> dict[str, Any]:
    """The kept results; none if the file is not there or cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def signature_of(node: Node) -> str:
    """What decides which form is fast: the op, its operands' types, its attributes."""

    def leaf(arg: Any) -> str:
        return str(arg.type) if isinstance(arg, Value) else arg_text(arg)

    args = ", ".join(f"{name}={map_arg(arg, leaf)}" for name, arg in node.args.items() if arg is not None)
    return f"{node.op}({args})"


def single_op(node: Node) -> Graph:
    """A graph of that one op, its tensors as inputs."""
    owner = node.graph
    assert owner is not None
    graph = Graph()
    known: dict[Value, Value] = {}
    for name, arg in node.args.items():
        if isinstance(arg, Value) and arg not in known:
            known[arg] = graph.add_input(name, arg.type)
    graph.dims = {
        name: bounds for name, bounds in owner.dims.items() if any(name in value.type.names for value in known.values())
    }
    args = {name: known[arg] if isinstance(arg, Value) else arg for name, arg in node.args.items()}
    made = graph.insert(node.op, args, [value.type for value in node.outputs])
    graph.outputs["result"] = made.outputs[0]
    return graph


def _example(type: TensorType, generator: torch.Generator) -> torch.Tensor:
    shape = [int(size) for size in type.shape]  # type: ignore[arg-type]  # concrete
    if type.dtype == torch.bool:
        mask = torch.rand(shape, generator=generator) < 0.8
        mask[..., 0] = True  # a query that sees no key means nothing
        return mask
    if type.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(type.dtype)
    return torch.randint(1, 4, shape, generator=generator).to(type.dtype)


def _median_times(runners: list[Callable[[], Any]]) -> list[float]:
    """Median milliseconds of each, run in turns so that a slow moment of the machine hits all alike."""
    times: list[list[float]] = [[] for _ in runners]
    for runner in runners:
        runner()
    deadline = time.perf_counter() + SECONDS * len(runners)
    for round_ in range(ROUNDS):
        for runner, own in zip(runners, times, strict=True):
            start = time.perf_counter()
            runner()
            own.append(1000 * (time.perf_counter() - start))
        if round_ >= 2 and time.perf_counter() > deadline:
            break
    return [statistics.median(own) for own in times]


def _geometric_mean(numbers: list[float]) -> float:
    return math.exp(sum(math.log(number) for number in numbers) / len(numbers))
