"""Rotary embeddings: pairs that are turned and put together, a part of the features, models' own spellings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from graphopt.passes.rotary import ROTARY, FusePairs, FusePartialRotary, FuseRotary
from graphopt.pipeline import load_passes, run_passes
from tests.rules import (
    DIMS,
    assert_becomes,
    assert_computes_as,
    assert_keeps,
    assert_not_matched,
    assert_refuses,
    lines,
    mended,
    traced,
)
from tests.test_rotary import COS_SIN, HEADS_LAST, INTERLEAVED, LAST, X, doubled, misfit, rotary, turn

# Pairs that are turned and put together


def pairs(parts: str = "halves", put: str = "halves", head: str = X, order: str = "bc as") -> str:
    """``a * cos - b * sin`` and ``b * cos + a * sin`` side by side (halves) or interleaved (neighbours)."""
    steps = {
        "halves": ("start=0, end=4", "start=4, end=8"),
        "neighbours": ("start=0, end=8, step=2", "start=1, end=8, step=2"),
    }
    made = {
        "halves": ["a = slice.Tensor(self=%x, dim=3, {})", "b = slice.Tensor(self=%x, dim=3, {})"],
        "split": ["a, %b = split_with_sizes.default(self=%x, split_sizes=[4, 4], dim=3)"],
        "chunk": ["a, %b = chunk.default(self=%x, chunks=2, dim=3)"],
        "last axis": ["a = select.int(self=%x, dim=4, index=0)", "b = select.int(self=%x, dim=4, index=1)"],
    }  # fmt: skip
    taken = made["halves" if parts == "neighbours" else parts]
    shape = "batch, sequence, 4, 8" if "[batch, sequence, 4" in head else "batch, 4, sequence, 8"
    first, second = order.split()
    together = {
        "halves": ["o = cat.default(tensors=[%l, %r], dim=3)"],
        "neighbours": ["st = stack.default(tensors=[%l, %r], dim=4)", f"o = reshape.default(self=%st, shape=[{shape}])"],
    }  # fmt: skip
    return (
        head
        + lines(
            *(line.format(step) for line, step in zip(taken, steps.get(parts, ("", "")), strict=False)),
            "ac = mul.Tensor(self=%a, other=%cos)",
            "bs = mul.Tensor(self=%b, other=%sin)",
            "l = sub.Tensor(self=%ac, other=%bs)",
            "bc = mul.Tensor(self=%cos, other=%b)",
            "as = mul.Tensor(self=%a, other=%sin)",
            f"r = add.Tensor(self=%{first}, other=%{second})",
            *together[put],
        )
        + "output y = %o\n"
    )


def given(shape: str, of: str = X, sin: str | None = None) -> str:
    return f"{of}input %cos: f32[{shape}]\ninput %sin: f32[{shape if sin is None else sin}]\n"


FLAT = given("sequence, 4")
FLAT_ANGLES = (
    "c = reshape.default(self=%cos, shape=[1, sequence, 4])",
    "s = reshape.default(self=%sin, shape=[1, sequence, 4])",
)
OF_BATCHES = tuple(line.replace("[1, ", "[batch, ") for line in FLAT_ANGLES)
PAIRED = given("1, sequence, 1, 4", f"{DIMS}input %x: f32[batch, sequence, 4, 4, 2]\n")
SIDE_BY_SIDE = "x2 = cat.default(tensors=[%a, %b], dim=3)"


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (pairs(head=FLAT), FLAT + rotary(*FLAT_ANGLES)),
        (pairs(head=FLAT, order="as bc"), FLAT + rotary(*FLAT_ANGLES)),
        (pairs("split", head=FLAT), FLAT + rotary(*FLAT_ANGLES)),
        (pairs("chunk", head=FLAT), FLAT + rotary(*FLAT_ANGLES)),
        (pairs(head=given("1, sequence, 4")), given("1, sequence, 4") + rotary(*FLAT_ANGLES)),
        (pairs(head=given("batch, 1, sequence, 4")), given("batch, 1, sequence, 4") + rotary(*OF_BATCHES)),
        (
            pairs(head=given("batch, sequence, 1, 4", LAST)),
            given("batch, sequence, 1, 4", LAST) + rotary(*OF_BATCHES, args=HEADS_LAST),
        ),
        (pairs("neighbours", "neighbours", FLAT), FLAT + rotary(*FLAT_ANGLES, args=INTERLEAVED)),
        (
            pairs("neighbours", "halves", FLAT),
            FLAT
            + lines(
                "a = slice.Tensor(self=%x, dim=3, start=0, end=8, step=2)",
                "b = slice.Tensor(self=%x, dim=3, start=1, end=8, step=2)",
            )
            + rotary(SIDE_BY_SIDE, *FLAT_ANGLES, x="%x2"),
        ),
        (
            pairs("last axis", "neighbours", PAIRED),
            PAIRED
            + rotary(
                "x4 = reshape.default(self=%x, shape=[batch, sequence, 4, 8])",
                *FLAT_ANGLES, x="%x4", args=INTERLEAVED + HEADS_LAST,
            ),
        ),
    ],
)  # fmt: skip
def test_pairs_turn(body: str, after: str) -> None:
    assert_becomes(body, after, [FusePairs()])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (pairs("halves", "neighbours", FLAT), "halves are turned and put side by side"),
        (pairs(head=given("sequence, 4").replace("f32[sequence", "f64[sequence")), "x, cos and sin differ in dtype"),
        (pairs(head=given("batch, 4, sequence, 4")), misfit("cos", "f32[batch, 4, sequence, 4]")),
        (pairs(head=given("sequence, 4", sin="4")), misfit("sin", "f32[4]")),
        (pairs(head=FLAT) + "output l = %l", "%l (aten.sub.Tensor) is also used by an output"),
    ],
)
def test_pairs_refuse(body: str, reason: str) -> None:
    assert_refuses(body, FusePairs(), reason)


@pytest.mark.parametrize(
    "body",
    [
        pairs(head=FLAT).replace("start=4, end=8", "start=3, end=7"),
        pairs(head=FLAT).replace("%b = aten.slice.Tensor(self=%x", "%b = aten.slice.Tensor(self=%z")
        .replace("input %cos", "input %z: f32[batch, 4, sequence, 8]\ninput %cos"),
        pairs(head=FLAT).replace("sub.Tensor", "add.Tensor"),
        pairs(head=FLAT).replace("self=%cos, other=%b", "self=%sin, other=%b"),
        pairs("last axis", "neighbours", PAIRED).replace("index=0", "index=1"),
    ],
)  # fmt: skip
def test_what_is_no_pair_does_not_match(body: str) -> None:
    assert_not_matched(body, FusePairs())


# A part of the features


def partial(kind: str = "slices", first: str = "start=0, end=6", rest: str = "start=6, end=8", args: str = "") -> str:
    made = {
        "slices": [f"a = slice.Tensor(self=%x, dim=3, {first})", f"b = slice.Tensor(self=%x, dim=3, {rest})"],
        "split": ["a, %b = split_with_sizes.default(self=%x, split_sizes=[6, 2], dim=3)"],
    }  # fmt: skip
    head = given("batch, sequence, 3", LAST if "heads_last" in args else X)
    turned = f"%t = graphopt.rotary_embedding.default(x=%a, cos=%cos, sin=%sin{args})\n"
    return f"{head}{lines(*made[kind])}{turned}{lines('o = cat.default(tensors=[%t, %b], dim=3)')}output y = %o"


@pytest.mark.parametrize("kind", ["slices", "split"])
@pytest.mark.parametrize("args", ["", INTERLEAVED, HEADS_LAST])
def test_a_part_turns_in_the_whole(kind: str, args: str) -> None:
    head = given("batch, sequence, 3", LAST if "heads_last" in args else X)
    after = f"{head}%o = graphopt.rotary_embedding.default(x=%x, cos=%cos, sin=%sin{args})\noutput y = %o"
    assert_becomes(partial(kind, args=args), after, [FusePartialRotary()])


@pytest.mark.parametrize(
    "body",
    [
        partial(rest="start=7, end=8"),
        partial(rest="start=6, end=7"),
        partial(first="start=1, end=7", rest="start=6, end=8"),
        partial().replace("tensors=[%t, %b]", "tensors=[%b, %t]"),
        partial()
        .replace("%b = aten.slice.Tensor(self=%x, dim=3", "%b = aten.slice.Tensor(self=%x, dim=1")
        .replace("start=6, end=8", "start=0, end=4"),
    ],
)
def test_parts_that_are_not_the_whole_do_not_match(body: str) -> None:
    assert_not_matched(body, FusePartialRotary())


# Models' own spellings, traced


def frequencies(count: int) -> Tensor:
    return torch.outer(torch.arange(count).float(), 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8))


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


TABLE = torch.cat([frequencies(16), frequencies(16)], -1)


def llama(x: Tensor, places: Tensor) -> Tensor:
    inverse = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
    angle = (inverse[None, :, None].expand(places.shape[0], -1, 1) @ places[:, None, :].float()).transpose(1, 2)
    both = torch.cat((angle, angle), -1)
    cos, sin = (both.cos() * 1.5).to(x.dtype).unsqueeze(1), (both.sin() * 1.5).to(x.dtype).unsqueeze(1)
    return x * cos + rotate_half(x) * sin


def gpt_neox(x: Tensor, places: Tensor) -> Tensor:
    turned, passed = x[..., :8], x[..., 8:]
    cos, sin = TABLE.cos()[places].unsqueeze(1), TABLE.sin()[places].unsqueeze(1)
    return torch.cat((turned * cos + rotate_half(turned) * sin, passed), -1)


def table(x: Tensor) -> Tensor:
    return x * TABLE.cos()[: x.shape[2]] + rotate_half(x) * TABLE.sin()[: x.shape[2]]


def gpt_j(x: Tensor, places: Tensor) -> Tensor:
    turned, passed = x[..., :8], x[..., 8:]
    joined = torch.cat((frequencies(16).sin(), frequencies(16).cos()), 1)[places]
    sin, cos = (torch.repeat_interleave(half[:, :, None, :], 2, 3) for half in torch.split(joined, 4, -1))
    every_two = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    return torch.cat([turned * cos + every_two * sin, passed], -1)


def roformer(x: Tensor) -> Tensor:
    angle = frequencies(16)[: x.shape[2]]
    sin, cos = (
        torch.stack([f, f], -1).reshape(1, 1, -1, 8) for f in (angle.sin()[None, None], angle.cos()[None, None])
    )
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sin


def complex_llama(x: Tensor) -> Tensor:
    angle = frequencies(16)[: x.shape[1]]
    turned = (
        torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        * torch.polar(torch.ones_like(angle), angle)[None, :, None, :]
    )
    return torch.view_as_real(turned).flatten(3).type_as(x)


def gpt_oss(x: Tensor) -> Tensor:
    angle = frequencies(16)[: x.shape[2]]
    cos, sin = angle.cos()[None, None], angle.sin()[None, None]
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def deepseek(x: Tensor) -> Tensor:
    batch, heads, rows, width = x.shape
    both = TABLE[:rows]
    x = x.view(batch, heads, rows, width // 2, 2).transpose(4, 3).reshape(batch, heads, rows, width)
    return x * both.cos() + rotate_half(x) * both.sin()


FIRST, PLACES = {"x": "f32[batch, 4, sequence, 8]"}, {"places": "i64[batch, sequence]"}
WIDER = {"x": "f32[batch, 4, sequence, 12]"}


@pytest.mark.parametrize(
    ("function", "types", "args"),
    [
        (llama, FIRST | PLACES, ""),
        (gpt_neox, WIDER | PLACES, ""),
        (table, FIRST, ""),
        (gpt_j, {"x": "f32[batch, sequence, 4, 12]"} | PLACES, INTERLEAVED + HEADS_LAST),
        (roformer, FIRST, INTERLEAVED),
        (complex_llama, {"x": "f32[batch, sequence, 4, 8]"}, INTERLEAVED + HEADS_LAST),
        (gpt_oss, FIRST, ""),
        (deepseek, FIRST, ""),
    ],
)
def test_models_spellings_are_one_op(function: Callable[..., Tensor], types: Mapping[str, str], args: str) -> None:
    graph = traced(function, types)
    kinds = ["decompose_complex"] * (function is complex_llama) + ["canonicalize", "fuse_attention"]
    run_passes(graph, load_passes([{"kind": kind, "allow_no_match": True} for kind in kinds]))
    last = list(graph.nodes)[-1]
    assert last.op == "graphopt.rotary_embedding.default", str(graph)
    assert repr(last).rstrip(")").endswith(args)
    assert_computes_as(graph, function)


def test_nothing_is_left_beside_the_rules() -> None:
    assert [type(rule) for rule in ROTARY] == [FuseRotary, FusePairs, FusePartialRotary]


# What is still rewritten wrongly


MIXED_BATCHES = doubled("batch, 1, sequence", f"{X}input %g: f32[sequence, 4]\n").replace(
    "%sin = aten.sin.default(self=%angle)",
    "%other = aten.cat.default(tensors=[%g, %g], dim=1)\n%sin = aten.sin.default(self=%other)",
)
NARROW = given("sequence, 4", X.replace("sequence, 8", "sequence, 2"))


def permuted_angles(call: str) -> str:
    head = doubled("sequence", f"{X}input %place: i64[8]\n")
    return head.replace("self=%angle", "self=%moved").replace("%cos =", f"%moved = aten.{call}\n%cos =", 1) + turn()


STACKED_EARLY = f"""{DIMS}
    input %x: f32[batch, 4, sequence, 24]
    input %f: f32[batch, sequence, 4, 3]
    %st2 = aten.stack.default(tensors=[%f, %f], dim=3)
    %flat = aten.reshape.default(self=%st2, shape=[batch, sequence, 24])
    %angle = aten.unsqueeze.default(self=%flat, dim=1)
    {COS_SIN}
    {turn("neighbours", shape="batch, 4, sequence, 24").replace("end=8", "end=24")}"""


@pytest.mark.parametrize(
    "body",
    [
        mended("one angle for all pairs turns the first pair only", pairs(head=given("batch, 1, sequence, 1"))),
        mended("one angle for all neighbours too", pairs("neighbours", "neighbours", given("batch, 1, sequence, 1"))),
        mended("cos and sin of different batches (GraphError)", pairs(head=given("batch, 1, sequence, 4", sin="sequence, 4"))),
        mended("cos and sin of different widths (GraphError)", pairs(head=given("sequence, 4", sin="sequence, 1"))),
        mended(
            "more angles than pairs (GraphError)",
            pairs(head=NARROW).replace("start=0, end=4", "start=0, end=1").replace("start=4, end=8", "start=1, end=2"),
        ),
        mended("cos and sin of different batches, whole heads (GraphError)", MIXED_BATCHES + turn()),
        mended(
            "features of angles that are picked in another order",
            permuted_angles("index_select.default(self=%angle, dim=1, index=%place)"),
        ),
        mended(
            "features of angles that are indexed in another order",
            permuted_angles("index.Tensor(self=%angle, indices=[None, %place])"),
        ),
        mended(
            "the last axis of angles selected away",
            permuted_angles("select.int(self=%angle, dim=2, index=3)").replace("%f: f32[sequence, 4]", "%f: f32[sequence, 8, 4]")
            .replace("tensors=[%f, %f], dim=1", "tensors=[%f, %f], dim=2"),
        ),
        mended("angles that are stacked before their last axis", STACKED_EARLY),
    ],
)  # fmt: skip
def test_what_they_do_not_understand_they_leave(body: str) -> None:
    assert_keeps(body, *ROTARY)
