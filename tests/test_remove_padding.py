"""remove_padding: golden text, equality at real positions, refusals by reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers as t
from pydantic import ValidationError
from torch.nn import functional

import graphopt
from graphopt import attentions
from graphopt.eager import eager
from graphopt.errors import LoweringError, NoMatchError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.ops.attention import pack_tokens, packed_attention, unpack_tokens
from graphopt.parity import Probe, bisect
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.cast import Cast
from graphopt.passes.remove_padding import RemovePadding
from graphopt.pipeline import run_passes
from graphopt.sources import transformers_source
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


_SPLIT = "f32[batch*sequence, 2, 4] = aten.reshape.default(self=%l, shape=[batch*sequence, 2, 4])"
_ARGS = "q=%reshape_1, k=%reshape_1, v=%reshape_1, mask=%mask, scale=0.5"
PACKED = f"""{AFTER[: AFTER.index("  %unpack_tokens")]}\
  %reshape_1: {_SPLIT}
  %packed_attention: f32[batch*sequence, 2, 4] = graphopt.packed_attention.default({_ARGS})
  %g: f32[batch*sequence, 8] = aten.reshape.default(self=%packed_attention, shape=[batch*sequence, 8])
{AFTER[AFTER.index("  %s: ") :]}"""


def test_golden_of_packed_attention() -> None:
    found = graph()
    (report,) = run_passes(found, [RemovePadding(attention="packed", padding="behind")])
    assert str(found) == PACKED
    assert report.matches == {"pack": 1, "unpack": 1, "attention": 1}


@pytest.mark.parametrize(("batch", "sequence"), [(2, 5), (3, 17), (1, 1)])
def test_packed_attention_is_equal_where_the_mask_is_set(batch: int, sequence: int) -> None:
    before = graph()
    after = before.clone()
    run_passes(after, [RemovePadding(attention="packed", padding="behind")])
    inputs = {"x": torch.randn(batch, sequence, 8), "mask": torch.rand(batch, sequence) < 0.6}
    inputs["mask"][:, -1] = True
    expected, got = run(before, inputs), run(after, inputs)
    torch.testing.assert_close(got["hidden"][inputs["mask"]], expected["hidden"][inputs["mask"]])
    starts = inputs["mask"][:, 0]
    torch.testing.assert_close(got["first"][starts], expected["first"][starts])


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("scale=0.5", "scale=0.5, window_left=2", "packed attention has no window_left"),
        ("output first = %c", "output first = %c\n  output a = %a", "its result is read unpacked"),
        (
            "output first = %c",
            "%z: f32[batch, sequence, 8] = aten.reshape.default(self=%a, shape=[batch, sequence, 8])\n  output first = %z",
            "its result is read unpacked",
        ),
    ],
)
def test_nothing_is_done_where_no_attention_can_be_packed(old: str, new: str, reason: str) -> None:
    text = BEFORE.replace(old, new)
    found = graph(text)
    step = RemovePadding(attention="packed", padding="behind")
    with pytest.raises(NoMatchError, match=reason):
        run_passes(found, [step])
    (report,) = run_passes(found, [step.model_copy(update={"allow_no_match": True})])
    assert [refusal.reason for refusal in report.refusals] == [reason]
    assert str(found) == str(graph(text))


def test_parts_of_products_are_left_apart(tmp_path: Path) -> None:
    """ModernBERT takes queries, keys and values, and its gates, from one product each. Held to eager by compile, and here at
    sizes that compile did not try."""
    torch.manual_seed(0)
    config = t.ModernBertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, local_attention=8,
        global_attn_every_n_layers=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        cls_token_id=2, sep_token_id=1,
    )  # fmt: skip
    kinds = ("canonicalize", "fuse_attention", "fuse_norm", "fuse_activation", "heads_last", "flatten_tokens")
    passes: list[dict[str, Any]] = [{"kind": kind, "allow_no_match": True} for kind in kinds]
    source = transformers_source(t.ModernBertModel(config))
    made = graphopt.compile(
        source, tmp_path / "e", passes=[*passes, {"kind": "remove_padding"}], target={"tactics": "fixed"}
    )
    assert made.report.passes[-1].matches == {"pack": 5, "unpack": 5}  # of embeddings, and behind each attention
    for batch, sequence in ((1, 9), (4, 31)):
        ids = torch.randint(3, 99, (batch, sequence))
        real = torch.arange(sequence) < torch.linspace(2, sequence, batch).long()[:, None]
        feeds = {"input_ids": ids, "attention_mask": real.long()}
        got, expected = made.engine(**feeds)["last_hidden_state"], eager(source.module)(**feeds)["last_hidden_state"]
        torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


TWO_ATTENTIONS = BEFORE.replace(
    "  output first",
    """\
  %m: f32[batch*sequence, 8] = aten.linear.default(input=%s, weight=%w)
  %i: f32[batch, sequence, 2, 4] = aten.reshape.default(self=%m, shape=[batch, sequence, 2, 4])
  %b: f32[batch, sequence, 2, 4] = graphopt.attention.default(q=%i, k=%i, v=%i, key_mask=%mask, scale=0.5, heads_last=True, \
window_left=2)
  %j: f32[batch*sequence, 8] = aten.reshape.default(self=%b, shape=[batch*sequence, 8])
  %n: f32[batch*sequence, 8] = aten.add.Tensor(self=%j, other=%s)
  %z: f32[batch, sequence, 8] = aten.reshape.default(self=%n, shape=[batch, sequence, 8])
  output second = %z
  output first""",
)


def test_an_attention_that_stays_unpacked_beside_another() -> None:
    before = graph(TWO_ATTENTIONS)
    after = before.clone()
    (report,) = run_passes(after, [RemovePadding(attention="packed", padding="behind")])
    assert report.matches == {"pack": 2, "unpack": 3, "attention": 1}
    assert [refusal.reason for refusal in report.refusals] == ["packed attention has no window_left"]
    for batch, sequence in ((2, 5), (3, 17)):
        mask = torch.arange(sequence) < torch.randint(1, sequence + 1, (batch, 1))
        inputs = {"x": torch.randn(batch, sequence, 8), "mask": mask}
        expected, got = run(before, inputs), run(after, inputs)
        torch.testing.assert_close(got["second"][mask], expected["second"][mask])


def test_packed_attention_needs_a_promise_where_the_first_position_is_read() -> None:
    found = graph()
    (report,) = run_passes(found, [RemovePadding(attention="packed", allow_no_match=True)])
    assert "reads the first position, which packed attention may take for padding" in report.refusals[0].reason
    assert str(found) == BEFORE
    found = graph("".join(line for line in BEFORE.splitlines(keepends=True) if "%c" not in line))
    (report,) = run_passes(found, [RemovePadding(attention="packed")])
    assert report.matches["attention"] == 1


def test_what_is_promised_of_padding_is_what_is_compared(tmp_path: Path) -> None:
    """The pooled first token of a text with padding before it is eager's no longer."""
    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    source = transformers_source(t.BertModel(config), name="bert")
    kinds = ("canonicalize", "fuse_attention", "heads_last", "flatten_tokens")
    steps = [
        *({"kind": kind} for kind in kinds),
        {"kind": "remove_padding", "attention": "packed", "padding": "behind"},
    ]
    made = graphopt.compile(source, tmp_path / "e", passes=steps, target={"backend": "torch"})
    assert made.report.final_ops["graphopt.packed_attention.default"] == 2
    assert made.report.engine is not None
    assert made.report.engine.holds
    assert graphopt.verify(tmp_path / "e", source).holds
    ids = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    got, expected = made.engine(**feeds), eager(source.module)(**feeds)
    real = mask.bool()
    torch.testing.assert_close(got["last_hidden_state"][real], expected["last_hidden_state"][real])
    same = (got["pooler_output"] - expected["pooler_output"]).abs().amax(1) < 1e-5
    assert same.tolist() == [True, False]


def test_packed_attention_is_for_targets_that_have_kernels() -> None:
    found = graph()
    run_passes(found, [RemovePadding(attention="packed", padding="behind")])
    with pytest.raises(LoweringError, match="need remove_padding without attention: packed"):
        emit(found, ONNXRUNTIME)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (", key_mask=%mask", "", "an attention has no proven key mask, so it sees padding"),
        (
            "aten.add.Tensor(self=%g, other=%f)",
            "aten.cumsum.default(self=%g, dim=0)",
            "%s = aten.cumsum.default does not work token by token",
        ),
        ("dim=1, index=0", "dim=1, index=1", "%c = aten.select.int is not known to leave tokens apart"),
        ("output hidden = %y", "output hidden = %s", "the output 'hidden' is flat"),
    ],
)
def test_refusal(old: str, new: str, reason: str) -> None:
    found = graph(BEFORE.replace(old, new))
    text = str(found)
    (report,) = run_passes(found, [RemovePadding(allow_no_match=True)])
    assert [refusal.reason for refusal in report.refusals] == [reason]
    assert str(found) == text


READ_AT_ONCE = f"""{BEFORE[: BEFORE.index("  %g: ")]}\
  %r: f32[batch, sequence, 8] = aten.reshape.default(self=%a, shape=[batch, sequence, 8])
  %c: f32[batch, 8] = READ
  output first = %c
}}
"""


@pytest.mark.parametrize(
    ("read", "options", "reason"),
    [
        ("aten.mean.dim(self=%r, dim=[1])", {}, "%c = aten.mean.dim is not known to leave tokens apart"),
        ("aten.mean.dim(self=%r, dim=[1])", {"attention": "packed", "padding": "behind"}, "leave tokens apart"),
        ("aten.select.int(self=%r, dim=1, index=0)", {"attention": "packed"}, "set padding: behind"),
    ],
)
def test_what_reads_the_result_of_attention_is_looked_at(read: str, options: dict[str, Any], reason: str) -> None:
    found = graph(READ_AT_ONCE.replace("READ", read))
    (report,) = run_passes(found, [RemovePadding(**options, allow_no_match=True)])
    assert [reason in refusal.reason for refusal in report.refusals] == [True]


def test_a_weight_with_a_row_for_each_position_is_refused() -> None:
    """Sizes that are numbers: nothing but where it comes from tells a weight from tokens."""
    fixed = "".join(line for line in BEFORE.splitlines(keepends=True) if "  dim " not in line)
    fixed = fixed.replace("batch*sequence", "6").replace("batch", "1").replace("sequence", "6")
    fixed = fixed.replace("other=%f", "other=%p").replace("  weight %w", "  weight %p: f32[6, 8]\n  weight %w")
    found = graphopt.parse(fixed, {"w": torch.randn(8, 8), "p": torch.randn(6, 8)})
    (report,) = run_passes(found, [RemovePadding(allow_no_match=True)])
    assert [refusal.reason for refusal in report.refusals] == ["%s = aten.add.Tensor does not work token by token"]


def test_a_mask_that_is_made_late_is_made_before_the_first_pack() -> None:
    late = BEFORE.replace("input %mask: bool[batch, sequence]", "input %given: i64[batch, sequence] in {0, 1}")
    late = late.replace("  %h: ", "  %mask: bool[batch, sequence] = aten.to.dtype(self=%given, dtype=bool)\n  %h: ")
    before = graph(late)
    after = before.clone()
    run_passes(after, [RemovePadding()])
    assert [node.op for node in after.nodes][:2] == ["aten.to.dtype", "graphopt.pack_tokens.default"]
    inputs = {"x": torch.randn(2, 5, 8), "given": torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])}
    torch.testing.assert_close(run(after, inputs), run(before, inputs))


def test_padding_behind_is_a_promise_for_packed_attention() -> None:
    with pytest.raises(ValidationError, match="a promise for attention: packed"):
        RemovePadding(padding="behind")


def test_packed_attention_as_it_is_described() -> None:
    """Each row's real tokens among themselves, with grouped heads; a first token that is padding is alone."""
    mask = torch.tensor([[False, True, True, False], [True, False, True, True]])
    q, k, v = (torch.randn(2, 4, heads, 8) for heads in (4, 2, 2))
    rows = [pack_tokens(part.flatten(2), mask).unflatten(1, part.shape[2:]) for part in (q, k, v)]
    got = unpack_tokens(packed_attention(*rows, mask, scale=0.3).flatten(1), mask).unflatten(2, (4, 8))
    for row, places in ((0, [1, 2]), (0, [0]), (1, [0, 2, 3])):
        one, two, three = (part[row, places].transpose(0, 1)[None] for part in (q, k, v))
        expected = functional.scaled_dot_product_attention(one, two, three, scale=0.3, enable_gqa=True)[0].transpose(
            0, 1
        )
        torch.testing.assert_close(got[row, places], expected)


def test_cast_takes_packed_attention_as_attention() -> None:
    found = graph()
    run_passes(found, [Canonicalize(allow_no_match=True), RemovePadding(attention="packed", padding="behind"), Cast()])
    (node,) = [node for node in found.nodes if node.op == "graphopt.packed_attention.default"]
    assert {node.args[name].type.dtype for name in "qkv"} == {torch.float16}


def test_packed_attention_is_reported() -> None:
    found = graph()
    run_passes(found, [RemovePadding(attention="packed", padding="behind")])
    (row,) = attentions.table(found, [])
    assert (row.heads, row.size, row.keys, row.mask, row.refusal) == ("2", "4", "sequence", "padding, packed", "")


def test_packed_tokens_are_no_first_difference() -> None:
    """They are what was there before, in another order."""
    before = graph()
    after = before.clone()
    run_passes(after, [RemovePadding()])
    inputs = {"x": torch.randn(2, 5, 8), "mask": torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()}
    assert bisect(before, after, Probe({}, inputs, mask=inputs["mask"].long())) is None


@pytest.mark.parametrize("kind", ["unpacked", "packed"])
def test_models_whose_mask_is_made_late(kind: Literal["unpacked", "packed"], tmp_path: Path) -> None:
    """ELECTRA has a linear before its mask."""
    torch.manual_seed(0)
    config = t.ElectraConfig(
        vocab_size=99, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    source = transformers_source(t.ElectraModel(config), name="electra")
    kinds = ("canonicalize", "fuse_attention", "heads_last", "flatten_tokens")
    steps = [*({"kind": each} for each in kinds), {"kind": "remove_padding", "attention": kind}]
    made = graphopt.compile(source, tmp_path / "e", passes=steps, target={"backend": "torch"})
    assert made.report.engine is not None
    assert made.report.engine.holds


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
