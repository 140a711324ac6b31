"""What the tests of passes share: apply rules to the text of a graph, run a text at sizes, compare two of them.

A line of a text may leave out its types, ``%t = aten.transpose.int(self=%k, dim0=2, dim1=3)``: it gets the derived ones."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import attentions
from graphopt.dims import Dim
from graphopt.execution import run
from graphopt.inference import infer
from graphopt.ir import Graph
from graphopt.pipeline import Context, Pass, diff_text, load_passes, run_passes
from graphopt.rewrite import Rule, apply_rules
from graphopt.tensors import TensorType
from graphopt.text import parse, parse_type

#: The traced size, one that is not nice, and the smallest.
SIZES: tuple[dict[str, int], ...] = (
    {"batch": 2, "sequence": 6, "keys": 8},
    {"batch": 3, "sequence": 7, "keys": 5},
    {"batch": 1, "sequence": 1, "keys": 1},
)

# Heads of texts

DIMS = """
    dim batch in [1, ...]
    dim sequence in [1, ...]
"""
QKV = f"""{DIMS}
    dim keys in [1, ...]
    input %q: f32[batch, 4, sequence, 8]
    input %k: f32[batch, 4, keys, 8]
    input %v: f32[batch, 4, keys, 6]
"""
GROUPED = QKV.replace("batch, 4, keys", "batch, 2, keys")
"""Two heads of keys and values."""
SQUARE = QKV.replace("dim keys in [1, ...]", "").replace("keys", "sequence")
"""As many keys as queries."""


def lines(*calls: str) -> str:
    """Calls of aten, ``name = op(args)``, as lines of a text."""
    return "".join(f"%{call.replace(' = ', ' = aten.', 1)}\n" for call in calls)


def attention(head: str, *args: str, qkv: str = "q=%q, k=%k, v=%v") -> str:
    """A graph of one attention."""
    return f"{head}\n%o = graphopt.attention.default({', '.join((qkv, *args))})\noutput y = %o"


@dataclass(frozen=True)
class Applied:
    """A graph's text after some rules, and what these said."""

    text: str
    matches: dict[str, int]
    reasons: list[str]


@functools.cache
def program(body: str) -> str:
    """The text of a graph from its lines, however they are indented, with the types that they leave out."""
    done: list[str] = []
    for line in filter(None, map(str.strip, body.splitlines())):
        done.append(_typed(done, line))
    return _braced(done)


def _braced(lines: Sequence[str]) -> str:
    return "graph {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


_UNTYPED = re.compile(r"(%[\w.]+(?:, %[\w.]+)*) = (.*)$")


def _typed(before: Sequence[str], line: str) -> str:
    found = _UNTYPED.match(line)
    if found is None:
        return line
    names = found[1].split(", ")
    anything = ", ".join(f"{name}: f32[1]" for name in names)
    node = parse(_braced([*before, f"{anything} = {found[2]}"])).value(names[0][1:]).producer
    assert node is not None
    types = infer(node.op, node.args)
    return ", ".join(f"{name}: {type}" for name, type in zip(names, types, strict=True)) + f" = {found[2]}"


def read(body: str) -> Graph:
    """The graph of a body of lines, with weights of random numbers; the body must be in the form that is printed."""
    graph = load(program(body))
    assert str(graph) == program(body), difference(program(body), str(graph))
    graph.verify()
    return graph


def load(text: str) -> Graph:
    """The graph of a text, with weights of random numbers that depend on their names alone."""
    return parse(text, {name: tensor_of(name, weight.type) for name, weight in parse(text).weights.items()})


def difference(expected: str, got: str) -> str:
    """For a failed comparison of texts (pytest explains only what stands in the test files)."""
    return f"expected -, got +:\n{diff_text(expected, got)}"


def apply(body: str, *rules: Rule) -> Applied:
    """The text after the rules, without what is dead."""
    graph = read(body)
    log = apply_rules(graph, rules, "test")
    graph.prune()
    graph.verify()
    return Applied(str(graph), log.matches, [refused.reason for refused in log.refusals])


def apply_pass(body: str, step: Pass, context: Context | None = None) -> Applied:
    """The text after a pass, run as a pipeline runs it."""
    return pass_on(read(body), step, context)


def pass_on(graph: Graph, step: Pass, context: Context | None = None) -> Applied:
    (report,) = run_passes(graph, [step], context=context)
    return Applied(str(graph), report.matches, [refused.reason for refused in report.refusals])


def assert_refuses(body: str, rule: Rule, *reasons: str) -> None:
    """The rule matches, refuses with exactly these reasons, and leaves the graph as it was, but for what is dead."""
    applied, untouched = apply(body, rule), apply(body).text
    assert applied.reasons == list(reasons), f"it says {applied.reasons}"
    assert applied.matches == {}, applied.matches
    assert applied.text == untouched, difference(untouched, applied.text)


def assert_not_matched(body: str, *rules: Rule) -> None:
    """The rules neither rewrite nor refuse anything."""
    applied = apply(body, *rules)
    assert (applied.matches, applied.reasons) == ({}, []), f"{applied.matches}, {applied.reasons}"
    assert applied.text == program(body), difference(program(body), applied.text)


def assert_idempotent(body: str, step: Pass) -> None:
    """What the pass leaves, it leaves as it is the second time."""
    again = step.model_copy(update={"allow_no_match": True})
    graph = read(body)
    run_passes(graph, [again])
    once = str(graph)
    (report,) = run_passes(graph, [again])
    assert report.changes == 0, report.matches
    assert str(graph) == once, difference(once, str(graph))


def tensor_of(name: str, type: TensorType, env: Mapping[str, int] | None = None, seed: int = 0) -> Tensor:
    """Random numbers; masks (by name) let every row see its first key."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    shape = [int(size) for size in type.concrete(env or {}).shape]  # type: ignore[arg-type]
    if type.dtype == torch.bool or not type.dtype.is_floating_point:
        high = 2 if type.dtype == torch.bool or "mask" in name else 7
        numbers = torch.randint(0, high, shape, generator=generator)
        if "mask" in name and numbers.ndim:
            numbers[..., 0] = 1
        return numbers.to(type.dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(type.dtype)


def run_text(text: str, sizes: Mapping[str, int], weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The outputs of a text at these sizes, on inputs that depend on names and sizes alone."""
    graph = parse(text, weights) if weights is not None else load(text)
    return run(graph, inputs_of(graph, sizes))


def inputs_of(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return {name: tensor_of(name, value.type, sizes) for name, value in graph.inputs.items()}


def assert_equal_runs(before: str, after: str, sizes: Sequence[Mapping[str, int]] = SIZES) -> None:
    """Both texts give the same outputs up to rounding, at every size."""
    for size in sizes:
        expected, got = run_text(before, size), run_text(after, size)
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert_close(got[name], tensor)


def assert_computes(text: str, formula: Callable[..., Tensor], sizes: Sequence[Mapping[str, int]] = SIZES) -> None:
    """The output ``y`` of the text is ``formula`` of its inputs and weights, by name (dots as underscores)."""
    for size in sizes:
        graph = load(text)
        inputs = inputs_of(graph, size)
        named = inputs | {name.replace(".", "_"): weight.load() for name, weight in graph.weights.items()}
        assert_close(run(graph, inputs)["y"], formula(**named))


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal up to rounding, and not all NaN: that would compare nothing."""
    assert not expected.isnan().any()
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


@dataclass(frozen=True)
class Case:
    """One rule on one graph: what it makes of it."""

    name: str
    rule: Rule
    before: str
    after: str

    def __str__(self) -> str:
        return self.name


def assert_fires(case: Case) -> None:
    """The rule matches once and makes exactly the text it should."""
    applied = apply(case.before, case.rule)
    assert applied.text == program(case.after), difference(program(case.after), applied.text)
    assert applied.matches == {case.rule.name: 1}, applied.matches
    assert applied.reasons == [], applied.reasons


def assert_equal(case: Case) -> None:
    """What the rule makes computes the same, at every size."""
    assert_equal_runs(program(case.before), program(case.after))


def assert_becomes(
    body: str,
    after: str,
    rules: Sequence[Rule],
    sizes: Sequence[Mapping[str, int]] = SIZES,
    reasons: Sequence[str] = (),
) -> None:
    """The first rule fires once; with the others it makes this text, up to the names of what nodes compute, which
    computes the same. ``reasons``: why not more is rewritten."""
    applied = apply(body, *rules)
    expected, got = _numbered(program(after)), _numbered(applied.text)
    assert got == expected, difference(expected, got)
    assert applied.matches[rules[0].name] == 1, applied.matches
    assert applied.reasons == list(reasons), f"it says {applied.reasons}"
    assert_equal_runs(program(body), applied.text, sizes)


def _numbered(text: str) -> str:
    """The text with numbers for the names of what its nodes compute."""
    names = [name for line in text.splitlines() if line.startswith("  %") for name in _DEFINED.findall(line)]
    numbers = {name: f"%{index}" for index, name in enumerate(names)}
    return re.sub(r"%[\w.]+", lambda found: numbers.get(found[0], found[0]), text)


_DEFINED = re.compile(r"(%[\w.]+): ")


def assert_keeps(body: str, *rules: Rule, sizes: Sequence[Mapping[str, int]] = SIZES) -> None:
    """Whatever the rules do, the graph computes the same."""
    assert_equal_runs(program(body), apply(body, *rules).text, sizes)


def wrong(reason: str, body: str) -> object:
    """A graph that rules are known to rewrite wrongly, or to crash at, as a parameter."""
    return pytest.param(body, id=reason, marks=pytest.mark.xfail(strict=True, reason=reason))


def mended(reason: str, body: str) -> object:
    """A graph that was rewritten wrongly once, and is not any more, as a parameter."""
    return pytest.param(body, id=reason)


# Traced functions


def traced(function: Callable[..., Tensor], types: Mapping[str, str]) -> Graph:
    """The graph of a function of tensors of these types, as ``{"q": "f32[batch, 4, sequence, 8]"}``."""
    module = nn.Module().eval()
    module.forward = function
    parsed = {name: parse_type(type) for name, type in types.items()}
    axes = {name: [str(size) if isinstance(size, Dim) else None for size in t.shape] for name, t in parsed.items()}
    return graphopt.trace(module, {name: tensor_of(name, type, SIZES[0]) for name, type in parsed.items()}, axes)


def fused(function: Callable[..., Tensor], types: Mapping[str, str], *before: str) -> Graph:
    """The function's graph after ``canonicalize`` and ``fuse_attention``, with one attention that is one op. It computes
    what the function does, at sizes that were not traced too."""
    graph = traced(function, types)
    steps = (*before, "canonicalize", "fuse_attention")
    run_passes(graph, load_passes([{"kind": kind, "allow_no_match": True} for kind in steps]))
    assert (len(attentions.fused(graph)), len(attentions.unfused(graph))) == (1, 0), str(graph)
    assert_computes_as(graph, function)
    return graph


def assert_computes_as(graph: Graph, function: Callable[..., Tensor]) -> None:
    for size in SIZES:
        inputs = inputs_of(graph, size)
        assert_close(run(graph, inputs)["output"], function(**inputs))
