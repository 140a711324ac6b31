"""Every pass on random graphs: the result is still plain PyTorch's, and a second run changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from graphopt.execution import run
from graphopt.pipeline import known_passes, load_passes, run_passes
from tests.graphs import Case, cases

#: Every pass but those of caches, which change what a run is, and those that need options or data: they have tests of their own.
KINDS = sorted(
    known_passes().keys() - {"insert_kv_cache", "fuse_cached_attention", "quantize", "smooth_activations", "cast"}
)
NEEDS = {
    "heads_last": ["canonicalize", "fuse_attention"],
    "remove_padding": ["canonicalize", "fuse_attention", "flatten_tokens"],
}
LENIENT = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def steps_to(kind: str) -> list[dict[str, object]]:
    """The pass after what it needs, each free to change nothing."""
    before = NEEDS.get(kind, ["canonicalize"] if kind != "canonicalize" else [])
    return [{"kind": name, "allow_no_match": True} for name in (*before, kind)]


@pytest.mark.parametrize("kind", KINDS)
@LENIENT
@given(case=cases())
def test_a_pass_keeps_what_a_graph_computes(kind: str, case: Case) -> None:
    graph = case.graph.clone()
    run_passes(graph, load_passes(steps_to(kind)))
    for first in (3, 5):
        inputs = case.inputs(case.sizes(first))
        expected, got = case.reference(inputs), run(graph, inputs)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@LENIENT
@given(case=cases())
def test_a_pass_run_twice_changes_nothing_more(kind: str, case: Case) -> None:
    # what a pass writes twice, because the one that stands there stands behind it, is for canonicalize to merge
    steps = load_passes([*steps_to(kind), {"kind": "canonicalize", "allow_no_match": True}])
    graph = case.graph.clone()
    run_passes(graph, steps)
    once = graph.text()
    run_passes(graph, steps[-2:] if kind == "canonicalize" else steps)
    assert graph.text() == once
