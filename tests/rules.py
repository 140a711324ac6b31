"""What the tests of passes share: apply rules to the text of a graph, run a text at sizes, compare two of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.execution import run
from graphopt.ir import Graph, TensorType
from graphopt.pipeline import Context, Pass, diff_text, run_passes
from graphopt.rewrite import Rule, apply_rules
from graphopt.text import parse

#: The traced size, one that is not nice, and the smallest.
SIZES: tuple[dict[str, int], ...] = (
    {"batch": 2, "sequence": 6, "keys": 8},
    {"batch": 3, "sequence": 7, "keys": 5},
    {"batch": 1, "sequence": 1, "keys": 1},
)


@dataclass(frozen=True)
class Applied:
    """A graph's text after some rules, and what these said."""

    text: str
    matches: dict[str, int]
    reasons: list[str]


def program(body: str) -> str:
    """The text of a graph from its lines, however they are indented."""
    lines = [line.strip() for line in body.strip().splitlines()]
    return "graph {\n" + "".join(f"  {line}\n" for line in lines if line) + "}\n"


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
    """The rule matches, refuses with exactly these reasons, and leaves the graph as it was."""
    applied = apply(body, rule)
    assert applied.reasons == list(reasons), f"it says {applied.reasons}"
    assert applied.matches == {}, applied.matches
    assert applied.text == program(body), difference(program(body), applied.text)


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
