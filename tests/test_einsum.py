"""ProductOfEinsum: Einstein sums that are a batched product, and those that are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt import attentions
from graphopt.passes.einsum import ProductOfEinsum
from tests.rules import DIMS, apply, assert_becomes, assert_equal_runs, assert_not_matched, fused, program

RULE = ProductOfEinsum()


def einsum(equation: str, a: str, b: str, more: str = "") -> str:
    return f"""{DIMS}
        input %n: f32[batch, sequence]
        input %a: f32[{a}]
        input %b: f32[{b}]
        %o = aten.einsum.default(equation="{equation}", tensors=[%a, %b]{more})
        output y = %o"""


def product(equation: str, a: str, b: str, *calls: str) -> str:
    """The same with calls in the place of the sum; the last makes the output."""
    lines = [f"%{call.replace(' = ', ' = aten.', 1)}" for call in calls]
    return "\n".join([*einsum(equation, a, b).splitlines()[:-2], *lines, f"output y = %{calls[-1].split()[0]}"])


@pytest.mark.parametrize(
    ("equation", "a", "b", "calls"),
    [
        ("ij,jk->ik", "batch, 4", "4, 5", ("o = matmul.default(self=%a, other=%b)",)),
        (
            "ij,jk->ki", "batch, 4", "4, 5",
            ("p = matmul.default(self=%a, other=%b)", "o = transpose.int(self=%p, dim0=0, dim1=1)"),
        ),
        (
            "ji,kj->ik", "4, batch", "5, 4",
            (
                "s = transpose.int(self=%a, dim0=0, dim1=1)", "t = transpose.int(self=%b, dim0=0, dim1=1)",
                "o = matmul.default(self=%s, other=%t)",
            ),
        ),
        (
            "bhid,bhjd->bhij", "batch, 3, 4, 8", "batch, 3, 5, 8",
            ("t = transpose.int(self=%b, dim0=2, dim1=3)", "o = matmul.default(self=%a, other=%t)"),
        ),
        ("bhij,bhjd->bhid", "batch, 3, 4, 5", "batch, 3, 5, 8", ("o = matmul.default(self=%a, other=%b)",)),
        (
            "bqhd,bkhd->bhqk", "batch, 4, 3, 8", "batch, sequence, 3, 8",
            (
                "s = transpose.int(self=%a, dim0=1, dim1=2)", "t = permute.default(self=%b, dims=[0, 2, 3, 1])",
                "o = matmul.default(self=%s, other=%t)",
            ),
        ),
        (
            "bhqk,bkhd->bqhd", "batch, 3, 4, sequence", "batch, sequence, 3, 8",
            (
                "t = transpose.int(self=%b, dim0=1, dim1=2)", "p = matmul.default(self=%a, other=%t)",
                "o = transpose.int(self=%p, dim0=1, dim1=2)",
            ),
        ),
        (
            "...id,...jd->...ij", "batch, 3, 4, 8", "batch, 3, 5, 8",
            ("t = transpose.int(self=%b, dim0=2, dim1=3)", "o = matmul.default(self=%a, other=%t)"),
        ),
        (
            "i...d,j...d->...ij", "4, batch, 8", "5, batch, 8",
            (
                "s = transpose.int(self=%a, dim0=0, dim1=1)", "t = permute.default(self=%b, dims=[1, 2, 0])",
                "o = matmul.default(self=%s, other=%t)",
            ),
        ),
        (
            "i...,j...->ij", "4, batch", "5, batch",
            ("t = transpose.int(self=%b, dim0=0, dim1=1)", "o = matmul.default(self=%a, other=%t)"),
        ),
        (" b i d , b d j -> b i j ", "batch, 4, 8", "batch, 8, 5", ("o = matmul.default(self=%a, other=%b)",)),
        ("AiB,ABj->Aij", "batch, 4, 8", "batch, 8, 5", ("o = matmul.default(self=%a, other=%b)",)),
        ("ij,jk->ik", "sequence, sequence", "sequence, sequence", ("o = matmul.default(self=%a, other=%b)",)),
    ],
)  # fmt: skip
def test_a_sum_that_is_a_product_becomes_it(equation: str, a: str, b: str, calls: tuple[str, ...]) -> None:
    assert_becomes(einsum(equation, a, b), product(equation, a, b, *calls), [RULE])


@pytest.mark.parametrize(
    ("equation", "a", "b"),
    [
        ("bi,bj->bij", "batch, 4", "batch, 5"),  # nothing is summed
        ("bid,bjd->bij", "1, 4, 8", "batch, 5, 8"),  # a batch is broadcast
        ("bid,dj->bij", "batch, 4, 8", "8, 5"),  # two axes of one operand alone
        ("bdi,bdj->b", "batch, 3, 4", "batch, 3, 5"),  # rows are summed
        ("ide,jde->ij", "batch, 3, 4", "5, 3, 4"),  # two axes are summed
        ("iid,jd->ij", "4, 4, 8", "batch, 8"),  # a diagonal
        ("id,jd", "batch, 8", "5, 8"),  # no result is written
        ("...id,jd->...ij", "batch, 3, 4, 8", "5, 8"),  # axes of one operand alone
        ("id,...jd->...ij", "4, 8", "batch, 3, 5, 8"),
        ("...id,...jd->...ij", "batch, 3, 4, 8", "3, 5, 8"),  # the ellipses hide axes of different number
        ("...d,...d->...", "batch, 8", "batch, 8"),  # no rows and columns
        ("d,d->", "8", "8"),
    ],
)
def test_a_sum_that_is_no_product_does_not_match(equation: str, a: str, b: str) -> None:
    assert_not_matched(einsum(equation, a, b), RULE)


@pytest.mark.parametrize("tensors", ["[%a]", "[%a, %b, %c]"])
def test_sums_of_one_and_of_three_operands_do_not_match(tensors: str) -> None:
    equation = "ij->ji" if tensors == "[%a]" else "ij,jk,kl->il"
    body = einsum(equation, "4, 4", "4, 4").replace("[%a, %b]", tensors)
    body = body.replace("input %b: f32[4, 4]", "input %b: f32[4, 4]\ninput %c: f32[4, 4]")
    assert_not_matched(body, RULE)


def test_an_operand_may_stand_on_both_sides() -> None:
    body = einsum("id,jd->ij", "batch, 8", "batch, 8").replace("[%a, %b]", "[%a, %a]")
    applied = apply(body, RULE)
    assert applied.matches == {"ProductOfEinsum": 1}
    assert_equal_runs(program(body), applied.text)


@pytest.mark.parametrize(
    ("scores", "result"),
    [("bhid,bhjd->bhij", "bhij,bhjd->bhid"), ("...id,...jd->...ij", "...ij,...jd->...id")],
)
def test_attention_in_sums_is_one_op(scores: str, result: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum(scores, q, k) * 0.5, -1)
        return torch.einsum(result, weights, v)

    types = {"q": "f32[batch, 4, sequence, 8]", "k": "f32[batch, 4, keys, 8]", "v": "f32[batch, 4, keys, 6]"}
    (node,) = attentions.fused(fused(attend, types))
    assert repr(node).endswith("(q=%q, k=%k, v=%v, scale=0.5)")


def test_attention_in_sums_with_heads_last_is_one_op() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k), -1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    types = {"q": "f32[batch, sequence, 4, 8]", "k": "f32[batch, keys, 4, 8]", "v": "f32[batch, keys, 4, 6]"}
    fused(attend, types)
