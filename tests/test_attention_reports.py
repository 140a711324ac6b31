"""Where a graph attends, and what is still rewritten wrongly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt import attentions
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.fuse_attention import FoldRepeatKv, FuseAttention
from graphopt.pipeline import run_passes
from graphopt.schemas.report import RefusalReport
from tests.rules import (
    DIMS,
    GROUPED,
    QKV,
    SIZES,
    SQUARE,
    assert_close,
    assert_keeps,
    attention,
    inputs_of,
    lines,
    mended,
    read,
    traced,
)
from tests.test_fuse_attention import LOWER, ONE, POSITIONS, UNPROVEN_SDPA, UPPER, sdpa, spelled

GIVEN_MASK = f"{QKV}input %mask: bool[batch, keys]\ninput %seen: bool[batch, keys]\n"


PACKED = f"{SQUARE}input %numbers: i64[batch, sequence]\n"


# Where a graph attends


def found(body: str) -> tuple[list[str], list[str]]:
    """The attentions of a graph that are one op, and those that are not, by name."""
    graph = read(body)
    return tuple([node.output.name for node in nodes] for nodes in (attentions.fused(graph), attentions.unfused(graph)))  # type: ignore[return-value]


def softmax_of(scores: str, use: str) -> str:
    """A softmax over scores that no product of activations makes, and what its weights are used for."""
    return f"""{DIMS}
        input %x: f32[batch, sequence, 8]
        input %experts: f32[batch, 3, 8]
        weight %router: f32[3, 8]
        weight %pool: f32[1, 8]
        {lines(scores)}
        %w = aten.softmax.int(self=%s, dim={1 if "pool" in scores else 2})
        {lines(use)}
        output y = %o"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (sdpa(), ([], ["o"])),
        (spelled(), ([], ["w"])),
        (spelled("m = mul.Tensor(self=%s, other=0.5)", "n = neg.default(self=%m)", scores="n"), ([], ["w"])),
        (attention(QKV, ONE), (["o"], [])),
        (
            softmax_of("s = linear.default(input=%x, weight=%router)", "o = matmul.default(self=%w, other=%experts)"),
            ([], []),
        ),
        (softmax_of("s = linear.default(input=%x, weight=%pool)", "o = mul.Tensor(self=%w, other=%x)"), ([], [])),
        (spelled().replace("aten.matmul.default(self=%w, other=%v)", "aten.relu.default(self=%w)"), ([], [])),
        (spelled().replace("softmax", "log_softmax"), ([], [])),
    ],
)
def test_attention_is_a_softmax_between_two_products(body: str, expected: tuple[list[str], list[str]]) -> None:
    """A router's softmax weighs values by scores of a linear; a pooling one weighs by a multiplication and a sum."""
    assert found(body) == expected


def test_weights_go_into_products_through_moves() -> None:
    body = (
        spelled(head=SQUARE)
        .replace("self=%w, other=%v", "self=%d, other=%v")
        .replace(
            "%o =", "%c = aten.clone.default(self=%w)\n%d = aten.dropout.default(input=%c, p=0.5, train=True)\n%o ="
        )
    )
    graph = read(body)
    (softmax,) = attentions.unfused(graph)
    assert [node.output.name for node in attentions.weighed(softmax)] == ["o"]
    (node,) = attentions.unfused(read(sdpa()))
    assert attentions.weighed(node) == [node]


def test_weights_may_go_into_several_products() -> None:
    body = spelled() + "\noutput z = %z"
    graph = read(body.replace("output y", "%z = aten.matmul.default(self=%w, other=%k)\noutput y"))
    (softmax,) = attentions.unfused(graph)
    assert {node.output.name for node in attentions.weighed(softmax)} == {"o", "z"}


def refusals(graph: Graph) -> list[RefusalReport]:
    (report,) = run_passes(graph, [FuseAttention(allow_no_match=True)])
    return list(report.refusals)


def test_the_table_describes_an_attention() -> None:
    head = GROUPED + "input %sinks: f32[4]\n" + POSITIONS + lines("b = bitwise_and.Tensor(self=%causal, other=%near)")
    graph = read(attention(head, "bias=%b", "sinks=%sinks", ONE, "softcap=5.0"))
    (row,) = attentions.table(graph, refusals(graph))
    assert row.fused
    assert (row.heads, row.kv_heads, row.size, row.value_size) == ("4", "2", "8", "6")
    assert (row.queries, row.keys, row.mask) == ("sequence", "keys", "causal, window left 2")
    assert (row.extras, row.unproven, row.refusal, row.name) == (["softcap", "sinks"], "", "", "o")


@pytest.mark.parametrize(
    ("head", "args", "mask"),
    [
        (QKV, (), "none"),
        (QKV, (UPPER,), "causal"),
        (QKV, (LOWER, "window_left=3", "window_right=2"), "causal (lower right), window left 3, window right 2"),
        (QKV, ("chunk=4",), "chunks of 4"),
        (GIVEN_MASK, ("key_mask=%mask", "prefix=%seen", UPPER), "causal, prefix, key padding"),
        (PACKED, ("segments=%numbers",), "segments"),
        (f"{QKV}input %bias: f32[1]\n", ("bias=%bias",), "bias"),
        (f"{QKV}input %lengths: i64[batch]\n", ("kv_lengths=%lengths",), "key lengths"),
    ],
)
def test_the_table_describes_masks(head: str, args: tuple[str, ...], mask: str) -> None:
    named = sorted(args, key=lambda arg: "%" not in arg)
    graph = read(attention(head, *(arg for arg in named if "%" in arg), ONE, *(arg for arg in named if "%" not in arg)))
    (row,) = attentions.table(graph, [])
    assert row.mask == mask


def test_the_table_of_heads_last_names_the_same_sizes() -> None:
    body = """
        dim batch in [1, ...]
        dim sequence in [1, ...]
        dim keys in [1, ...]
        input %q: f32[batch, sequence, 4, 8]
        input %k: f32[batch, keys, 2, 8]
        input %v: f32[batch, keys, 2, 6]"""
    (row,) = attentions.table(read(attention(body, ONE, "heads_last=True")), [])
    assert (row.heads, row.kv_heads, row.queries, row.keys) == ("4", "2", "sequence", "keys")


def test_the_table_says_what_is_not_one_op_and_why() -> None:
    graph = read(spelled("n = neg.default(self=%s)", scores="n"))
    (row,) = attentions.table(graph, [])
    assert (row.name, row.fused, row.refusal) == ("o", False, "fuse_attention was not run")
    (row,) = attentions.table(graph, refusals(graph))
    assert row.refusal.endswith("not %n, aten.neg.default")
    graph = read(UNPROVEN_SDPA)
    (row,) = attentions.table(graph, refusals(graph))
    assert (row.mask, row.unproven.startswith("the mask %unproven stays a bias")) == ("bias", True)


def test_a_table_of_several_attentions_is_in_their_order() -> None:
    first = "%p = graphopt.attention.default(q=%q, k=%k, v=%v, scale=2.0)\n"
    graph = read(sdpa(QKV + first, ", dropout_p=0.1") + "\noutput p = %p")
    rows = attentions.table(graph, refusals(graph))
    assert [(row.name, row.refusal) for row in rows] == [("p", ""), ("o", "it has dropout")]


class Pooling(nn.Module):
    """A weighted mean of tokens, and one of experts' results: softmaxes that attend to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.router = nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = (functional.softmax(self.score(x), 1) * x).sum(1)
        chosen = functional.softmax(self.router(pooled), -1)
        return (chosen[..., None] * torch.stack([pooled, -pooled, 2 * pooled], 1)).sum(1)


def test_pooling_and_routing_are_no_attention() -> None:
    graph = traced(Pooling().eval().forward, {"x": "f32[batch, sequence, 8]"})
    assert sum(node.op.startswith("aten.softmax") for node in graph.nodes) == 2
    assert attentions.unfused(graph) == []


# What is still rewritten wrongly


LAST_GROUPED = """
    dim batch in [1, ...]
    input %q: f32[batch, 4, 2, 8]
    input %k: f32[batch, 3, 2, 8]
    input %v: f32[batch, 3, 2, 6]
    input %mask: bool[batch, 6]
"""


def repeated_keys(name: str, width: int) -> str:
    """The keys of heads-last attention, each twice."""
    return lines(
        f"{name}u = unsqueeze.default(self=%{name}, dim=2)",
        f"{name}e = expand.default(self=%{name}u, size=[batch, 3, 2, 2, {width}])",
        f"{name}r = reshape.default(self=%{name}e, shape=[batch, 6, 2, {width}])",
    )


TWICE = LAST_GROUPED + repeated_keys("k", 8) + repeated_keys("v", 6)
REPEATED = "q=%q, k=%kr, v=%vr"


@pytest.mark.parametrize(
    "body",
    [
        mended(
            "keys that are repeated are no grouped heads", attention(TWICE, ONE, UPPER, "heads_last=True", qkv=REPEATED)
        ),
        mended(
            "keys that are repeated, with their mask (cannot run)",
            attention(TWICE, "key_mask=%mask", ONE, "heads_last=True", qkv=REPEATED),
        ),
    ],
)
def test_repeated_keys_of_heads_last_stay(body: str) -> None:
    assert_keeps(body, FoldRepeatKv())


@pytest.mark.xfail(
    strict=True, reason="sdpa gives zeros for a row of -inf, attention gives NaN where the bias is floating"
)
def test_a_query_that_sees_no_key_gives_zeros() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        bias = torch.where(seen[:, None], 0.0, float("-inf"))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    types = {"q": "f32[batch, 4, sequence, 8]", "k": "f32[batch, 4, keys, 8]", "v": "f32[batch, 4, keys, 6]"}
    graph = traced(attend, types | {"seen": "bool[batch, sequence, keys]"})
    run_passes(graph, [FuseAttention()])
    inputs = inputs_of(graph, SIZES[0])
    inputs["seen"][:, 0] = False
    assert_close(run(graph, inputs)["output"], attend(**inputs))
