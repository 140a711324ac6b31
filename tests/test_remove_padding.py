"""remove_padding: golden text, equality at real positions, refusals by reason."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.remove_padding import RemovePadding
from graphopt.pipeline import run_passes
from tests.onnx_helpers import ONNXRUNTIME, emit, run_onnxruntime

BEFORE = """graph {
  dim batch in [1, 8]
  dim sequence in [1, 64]
  input %x: f32[batch, sequence, 8]
  input %mask: bool[batch, sequence]
  weight %w: f32[8, 8]
  %f: f32[batch*sequence, 8] = aten.reshape.default(self=%x, shape=[batch*sequence, 8])
  %l: f32[batch*sequence, 8] = aten.linear.default(input=%f, weight=%w)
  %h: f32[batch, sequence, 2, 4] = aten.reshape.default(self=%l, shape=[batch, sequence, 2, 4])
  %a: f32[batch, sequence, 2, 4] = graphopt.attention.default(q=%h, k=%h, v=%h, key_mask=%mask, scale=0.5, heads_last=True)
  %g: f32[batch*sequence, 8] = aten.reshape.default(self=%a, shape=[batch*sequence, 8])
  %s: f32[batch*sequence, 8] = aten.add.Tensor(self=%g, other=%f)
  %y: f32[batch, sequence, 8] = aten.reshape.default(self=%s, shape=[batch, sequence, 8])
  %c: f32[batch, 8] = aten.select.int(self=%y, dim=1, index=0)
  output hidden = %y
  output first = %c
}
"""
AFTER = """graph {
  dim batch in [1, 8]
  dim sequence in [1, 64]
  input %x: f32[batch, sequence, 8]
  input %mask: bool[batch, sequence]
  weight %w: f32[8, 8]
  %f: f32[batch*sequence, 8] = graphopt.pack_tokens.default(x=%x, mask=%mask)
  %l: f32[batch*sequence, 8] = aten.linear.default(input=%f, weight=%w)
  %unpack_tokens: f32[batch, sequence, 8] = graphopt.unpack_tokens.default(x=%l, mask=%mask)
  %h: f32[batch, sequence, 2, 4] = aten.reshape.default(self=%unpack_tokens, shape=[batch, sequence, 2, 4])
  %a: f32[batch, sequence, 2, 4] = graphopt.attention.default(q=%h, k=%h, v=%h, key_mask=%mask, scale=0.5, heads_last=True)
  %reshape: f32[batch, sequence, 8] = aten.reshape.default(self=%a, shape=[batch, sequence, 8])
  %g: f32[batch*sequence, 8] = graphopt.pack_tokens.default(x=%reshape, mask=%mask)
  %s: f32[batch*sequence, 8] = aten.add.Tensor(self=%g, other=%f)
  %y: f32[batch, sequence, 8] = graphopt.unpack_tokens.default(x=%s, mask=%mask)
  %c: f32[batch, 8] = aten.select.int(self=%y, dim=1, index=0)
  output hidden = %y
  output first = %c
}
"""


def graph(text: str = BEFORE) -> Graph:
    return graphopt.parse(text, {"w": torch.randn(8, 8)})


def test_golden() -> None:
    found = graph()
    (report,) = run_passes(found, [RemovePadding()])
    assert str(found) == AFTER
    assert report.matches == {"pack": 2, "unpack": 2}


@pytest.mark.parametrize(("batch", "sequence"), [(2, 5), (3, 17), (1, 1)])
def test_equal_where_the_mask_is_set(batch: int, sequence: int) -> None:
    before = graph()
    after = before.clone()
    run_passes(after, [RemovePadding()])
    inputs = {"x": torch.randn(batch, sequence, 8), "mask": torch.rand(batch, sequence) < 0.6}
    inputs["mask"][:, -1] = True  # left padding, and a row may lack its first position
    expected, got = run(before, inputs), run(after, inputs)
    torch.testing.assert_close(got, expected)  # in torch even padding is the same
    results = run_onnxruntime(emit(after, ONNXRUNTIME), inputs)
    torch.testing.assert_close(torch.from_numpy(results[0])[inputs["mask"]], expected["hidden"][inputs["mask"]])
    torch.testing.assert_close(torch.from_numpy(results[1]), expected["first"])


def test_engine_computes_real_tokens_only() -> None:
    """The rows that linears see are counted: real ones, and the first of each row."""
    after = graph()
    run_passes(after, [RemovePadding()])
    after.outputs["packed"] = after.value("s")
    mask = torch.tensor([[True, True, False, False], [False, False, False, True]])
    results = run_onnxruntime(emit(after, ONNXRUNTIME), {"x": torch.randn(2, 4, 8), "mask": mask})
    assert results[2].shape == (4, 8)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (", key_mask=%mask", "", "an attention has no proven key mask, so it sees padding"),
        (
            "aten.add.Tensor(self=%g, other=%f)",
            "aten.cumsum.default(self=%g, dim=0)",
            "%s = aten.cumsum.default does not work token by token",
        ),
        ("dim=1, index=0", "dim=1, index=1", "%c = aten.select.int reads tokens across positions"),
        ("output hidden = %y", "output hidden = %s", "the output 'hidden' is flat"),
    ],
)
def test_refusal(old: str, new: str, reason: str) -> None:
    found = graph(BEFORE.replace(old, new))
    text = str(found)
    (report,) = run_passes(found, [RemovePadding(allow_no_match=True)])
    assert [refusal.reason for refusal in report.refusals] == [reason]
    assert str(found) == text


def test_refuses_a_graph_without_attention() -> None:
    lines = [line for line in BEFORE.splitlines(keepends=True) if "%a:" not in line]
    found = graph("".join(lines).replace("self=%a,", "self=%h,"))
    (report,) = run_passes(found, [RemovePadding(allow_no_match=True)])
    assert report.refusals[0].reason == "there is no attention"


MERGED = """graph {
  dim batch in [1, 8]
  dim sequence in [1, 64]
  input %x: f32[batch, sequence, 8]
  input %mask: bool[batch, sequence]
  weight %w: f32[8, 8]
  %f: f32[batch*sequence, 8] = aten.reshape.default(self=%x, shape=[batch*sequence, 8])
  %l: f32[batch*sequence, 8] = aten.linear.default(input=%f, weight=%w)
  %p: f32[batch*sequence, 4], %r: f32[batch*sequence, 4] = aten.split_with_sizes.default(self=%l, split_sizes=[4, 4], dim=1)
  %q: f32[batch, sequence, 1, 4] = aten.reshape.default(self=%p, shape=[batch, sequence, 1, 4])
  %k: f32[batch, sequence, 1, 4] = aten.reshape.default(self=%r, shape=[batch, sequence, 1, 4])
  %a: f32[batch, sequence, 1, 4] = graphopt.attention.default(q=%q, k=%k, v=%k, key_mask=%mask, scale=0.5, heads_last=True)
  %g: f32[batch*sequence, 4] = aten.reshape.default(self=%a, shape=[batch*sequence, 4])
  %s: f32[batch*sequence, 4] = aten.add.Tensor(self=%g, other=%p)
  %y: f32[batch, sequence, 4] = aten.reshape.default(self=%s, shape=[batch, sequence, 4])
  output hidden = %y
}
"""


HALVES = "f32[batch*sequence, 4]"
SPLIT = f"""  %p: {HALVES}, %r: {HALVES} = aten.split_with_sizes.default(self=%l, split_sizes=[4, 4], dim=1)
"""
APART = """  %u: f32[batch, sequence, 8] = aten.reshape.default(self=%l, shape=[batch, sequence, 8])
  %p: f32[batch, sequence, 4], %r: f32[batch, sequence, 4] = aten.split_with_sizes.default(self=%u, split_sizes=[4, 4], dim={0})
"""
UNFLATTENED = MERGED.replace(SPLIT, APART.format(2)).replace("self=%g, other=%p", "self=%g, other=%g")


@pytest.mark.parametrize(("batch", "sequence"), [(2, 5), (3, 17), (1, 1)])
@pytest.mark.parametrize(("text", "unpacked"), [(MERGED, 3), (UNFLATTENED, 2)], ids=["flat", "unflattened"])
def test_merged_products_are_split_by_their_features(text: str, unpacked: int, batch: int, sequence: int) -> None:
    """What ``merge_linears`` leaves where one product is faster than several."""
    before = graph(text)
    after = before.clone()
    (report,) = run_passes(after, [RemovePadding()])
    assert report.matches == {"pack": 2, "unpack": unpacked}
    inputs = {"x": torch.randn(batch, sequence, 8), "mask": torch.rand(batch, sequence) < 0.6}
    inputs["mask"][:, 0] = True
    expected = run(before, inputs)["hidden"]
    torch.testing.assert_close(run(after, inputs)["hidden"], expected)
    (got,) = run_onnxruntime(emit(after, ONNXRUNTIME), inputs)
    real = inputs["mask"]
    torch.testing.assert_close(torch.from_numpy(got)[real], expected[real], atol=1e-5, rtol=1e-5)
