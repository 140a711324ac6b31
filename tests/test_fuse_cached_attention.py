"""fuse_cached_attention: a cache's update, the rotation before it and the attention behind it as one op."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import NoMatchError, PipelineError
from graphopt.execution import run
from graphopt.passes.fuse_cached_attention import FuseCachedAttention, FuseCachedAttentions
from graphopt.pipeline import load_passes
from tests.rules import (
    Case,
    apply,
    apply_pass,
    assert_close,
    assert_equal,
    assert_equal_runs,
    assert_fires,
    assert_idempotent,
    assert_not_matched,
    assert_refuses,
    load,
    program,
)

LENGTH = 20
STARTS = "dim batch in [1, ...]\ndim sequence in [1, 12]\n"
CACHES = f"""
    input %starts: i64[batch]
    input %past_k: f32[batch, 2, {LENGTH}, 32]
    input %past_v: f32[batch, 2, {LENGTH}, 32]
"""
FIRST = f"""{STARTS}
    input %q: f32[batch, 4, sequence, 32]
    input %k: f32[batch, 2, sequence, 32]
    input %v: f32[batch, 2, sequence, 32]
{CACHES}"""
LAST = f"""{STARTS}
    input %q: f32[batch, sequence, 4, 32]
    input %k: f32[batch, sequence, 2, 32]
    input %v: f32[batch, sequence, 2, 32]
{CACHES}"""
TABLES = f"""
    weight %cos: f32[{LENGTH}, 8]
    weight %sin: f32[{LENGTH}, 8]
"""
PLACES = """
    %column: i64[batch, 1] = aten.unsqueeze.default(self=%starts, dim=1)
    %count: i64[sequence] = aten.arange.start_step(start=0, end=sequence, dtype=i64)
    %places: i64[batch, sequence] = aten.add.Tensor(self=%column, other=%count)
"""
ANGLES = """
    %c: f32[batch, sequence, 8] = aten.index.Tensor(self=%cos, indices=[%places])
    %s: f32[batch, sequence, 8] = aten.index.Tensor(self=%sin, indices=[%places])
"""
ROTATED = """
    %rq = graphopt.rotary_embedding.default(x=%q, cos=%c, sin=%s)
    %rk = graphopt.rotary_embedding.default(x=%k, cos=%c, sin=%s)
"""
ROTARY = FIRST + TABLES + PLACES + ANGLES + ROTATED
TURNED = """
    %qt: f32[batch, 4, sequence, 32] = aten.transpose.int(self=%q, dim0=1, dim1=2)
    %kt: f32[batch, 2, sequence, 32] = aten.transpose.int(self=%k, dim0=1, dim1=2)
    %vt: f32[batch, 2, sequence, 32] = aten.transpose.int(self=%v, dim0=1, dim1=2)
"""
OUTPUTS = """
    output y = %a
    output present_k = %k2
    output present_v = %v2
"""


def attend(
    head: str = FIRST, names: str = "q k v", tensors: str = "", args: str = "", causal: str = "upper_left"
) -> str:
    """The graph before: arguments in the order in which they are printed."""
    q, k, v = names.split()
    said = "" if causal == "none" else f', causal="{causal}"'
    return f"""{head}
        %k2 = graphopt.kv_cache_update.default(cache=%past_k, new=%{k}, starts=%starts)
        %v2 = graphopt.kv_cache_update.default(cache=%past_v, new=%{v}, starts=%starts)
        %a = graphopt.attention.default(q=%{q}, k=%k2, v=%v2, {tensors}starts=%starts, scale=0.5{said}{args})
        {OUTPUTS}"""


def fused(head: str = FIRST, names: str = "q k v", tensors: str = "", args: str = "", turned: bool = False) -> str:
    q, k, v = names.split()
    call = f"q=%{q}, k=%{k}, v=%{v}, k_cache=%past_k, v_cache=%past_v, starts=%starts, {tensors}scale=0.5{args}"
    if not turned:
        return f"{head}\n%a, %k2, %v2 = graphopt.cached_attention.default({call})\n{OUTPUTS}"
    return f"""{head}
        %cached_attention, %k2, %v2 = graphopt.cached_attention.default({call}, heads_last=True)
        %a = aten.transpose.int(self=%cached_attention, dim0=1, dim1=2)
        {OUTPUTS}"""


BIAS = FIRST + f"input %bias: f32[batch, 1, sequence, {LENGTH}]\ninput %sinks: f32[4]\n"
EVERYTHING = ", window_left=7, chunk=9, softcap=5.0"
PAIRS = ROTATED.replace("sin=%s", "sin=%s, interleaved=True")
TURNED_ROTARY = TURNED + ROTATED.replace("x=%q", "x=%qt").replace("x=%k", "x=%kt")
MIXED = f"{FIRST.replace('%q: f32[batch, 4, sequence', '%q: f32[batch, sequence, 4')}{TURNED.splitlines()[1]}"
RULE = FuseCachedAttention()
CASES = [
    Case("plain", RULE, attend(), fused()),
    Case(
        "everything",
        RULE,
        attend(BIAS, tensors="bias=%bias, sinks=%sinks, ", args=EVERYTHING),
        fused(BIAS, tensors="bias=%bias, sinks=%sinks, ", args=EVERYTHING),
    ),
    Case("rotary", RULE, attend(ROTARY, "rq rk v"), fused(FIRST + TABLES, tensors="cos=%cos, sin=%sin, ")),
    Case(
        "rotary in pairs",
        RULE,
        attend(FIRST + TABLES + PLACES + ANGLES + PAIRS, "rq rk v"),
        fused(FIRST + TABLES, tensors="cos=%cos, sin=%sin, ", args=", interleaved=True"),
    ),
    Case("transposes", RULE, attend(LAST + TURNED, "qt kt vt"), fused(LAST, turned=True)),
    Case(
        "transposes and rotary",
        RULE,
        attend(LAST + TABLES + PLACES + ANGLES + TURNED_ROTARY, "rq rk vt"),
        fused(LAST + TABLES, tensors="cos=%cos, sin=%sin, ", turned=True),
    ),
    Case("only the queries turned", RULE, attend(MIXED, "qt k v"), fused(MIXED, "qt k v")),
    Case("window to the right of what is causal", RULE, attend(args=", window_right=0"), fused()),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fires(case: Case) -> None:
    assert_fires(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal(case: Case) -> None:
    assert_equal(case)


def test_equal_to_plain_torch() -> None:
    """At ragged starts, with a rotation and transposes; not compared with our own ops."""
    graph = load(apply(CASES[5].before, RULE).text)
    tables = {name: graph.weights[name].load() for name in ("cos", "sin")}
    inputs = {name: torch.randn(2, 3, heads, size) for name, heads, size in (("q", 4, 32), ("k", 2, 32), ("v", 2, 32))}
    inputs |= {"past_k": torch.randn(2, 2, LENGTH, 32), "past_v": torch.randn(2, 2, LENGTH, 32)}
    starts = [5, 2]
    got = run(graph, inputs | {"starts": torch.tensor(starts)})["y"]
    for row, start in enumerate(starts):
        angles = {name: table[start : start + 3, None] for name, table in tables.items()}
        q, k = (_turned(inputs[name][row], angles["cos"], angles["sin"]).transpose(0, 1) for name in "qk")
        keys = torch.cat([inputs["past_k"][row, :, :start], k], 1).repeat_interleave(2, 0)
        values = torch.cat([inputs["past_v"][row, :, :start], inputs["v"][row].transpose(0, 1)], 1).repeat_interleave(
            2, 0
        )
        hidden = torch.ones(3, start + 3, dtype=torch.bool).triu(start + 1)
        weights = (q @ keys.mT * 0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        assert_close(got[row], weights @ values)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Halves of the first sixteen features."""
    a, b, rest = x[..., :8], x[..., 8:16], x[..., 16:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


# Rotations that must not go inside


def rotary_stays(head: str, rotated: str = ROTATED, names: str = "rq rk v") -> Case:
    whole = head + rotated
    return Case("", RULE, attend(whole, names), fused(whole, names))


OTHER = ANGLES.replace("%c:", "%c2:").replace("%s:", "%s2:").replace("%cos,", "%sin,", 1)
TABLED = FIRST + TABLES + PLACES + ANGLES
COUNT = "%count: i64[sequence] = aten.arange.start_step(start=0, end=sequence, dtype=i64)"
OWN_STARTS = f"{FIRST}input %others: i64[batch]\n{TABLES}{PLACES.replace('%starts', '%others')}{ANGLES}"
ALIKE = f"""
    {COUNT}
    %row: i64[1, sequence] = aten.unsqueeze.default(self=%count, dim=0)
    %c: f32[1, sequence, 8] = aten.index.Tensor(self=%cos, indices=[%row])
    %s: f32[1, sequence, 8] = aten.index.Tensor(self=%sin, indices=[%row])
"""
STAYS = {
    "other angles for q and k": rotary_stays(
        TABLED + OTHER, ROTATED.replace("cos=%c, sin=%s", "cos=%c2, sin=%s2", 1)
    ),
    "fewer features than kernels rotate": rotary_stays(TABLED.replace(", 8]", ", 3]")),
    "only q": rotary_stays(TABLED, ROTATED.splitlines()[1], "rq k v"),
    "only k": rotary_stays(TABLED, ROTATED.splitlines()[2], "q rk v"),
    "q in halves, k in pairs": rotary_stays(
        TABLED, "\n".join([ROTATED.splitlines()[1], PAIRS.splitlines()[2]])
    ),
    "angles that are inputs": rotary_stays(
        FIRST + "input %c: f32[batch, sequence, 8]\ninput %s: f32[batch, sequence, 8]\n"
    ),
    "positions from elsewhere": rotary_stays(OWN_STARTS),
    "positions from one on": rotary_stays(
        TABLED.replace(COUNT, COUNT.replace("start=0, end=sequence", "start=1, end=sequence + 1"))
    ),
    "every other position": rotary_stays(
        TABLED.replace(COUNT, COUNT.replace("end=sequence", "end=2*sequence, step=2")).replace(f"[{LENGTH}, 8]", "[40, 8]")
    ),
    "positions one further": rotary_stays(
        TABLED.replace("%c:", "%next: i64[batch, sequence] = aten.add.Tensor(self=%places, other=1)\n    %c:").replace(
            "indices=[%places]", "indices=[%next]"
        )
    ),
    "positions that an input says": rotary_stays(
        FIRST + "input %places: i64[batch, sequence]\n" + TABLES + ANGLES
    ),
    "rows that are all alike": rotary_stays(FIRST + TABLES + ALIKE),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS.values(), ids=STAYS)
def test_a_rotation_that_stays_outside(case: Case) -> None:
    assert_fires(case)
    assert_equal(case)


def test_positions_of_every_other_place() -> None:
    head = TABLED.replace("other=%count)", "other=%count, alpha=2)").replace(f"[{LENGTH}, 8]", "[40, 8]")
    case = rotary_stays(head)
    assert_equal_runs(program(case.before), apply(case.before, RULE).text)


def test_a_rotated_key_that_others_read_stays() -> None:
    body = attend(ROTARY, "rq rk v") + "output rotated = %rk\n"
    applied = apply(body, RULE)
    assert applied.text.count("graphopt.rotary_embedding") == 1
    assert_equal_runs(program(body), applied.text)


# Refusals


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            attend(FIRST + "input %others: i64[batch]\n").replace("starts=%starts, scale", "starts=%others, scale"),
            "its queries stand elsewhere than its keys",
        ),
        (
            attend(
                FIRST.replace("%v: f32[batch, 2, sequence, 32]", "%v: f32[batch, 2, sequence, 6]").replace(
                    f"%past_v: f32[batch, 2, {LENGTH}, 32]", f"%past_v: f32[batch, 2, {LENGTH}, 6]"
                )
            ),
            "its values are of another size than its keys",
        ),
        (
            attend().replace(", 32]", ", 12]"),
            "its heads are of 12, which kernels read in eights",
        ),
        (attend(causal="lower_right"), "its queries stand elsewhere than its keys"),
        (attend(causal="none"), "its queries stand elsewhere than its keys"),
        (attend().replace("v=%v2, starts=%starts, ", "v=%v2, "), "its queries stand elsewhere than its keys"),
        (attend(FIRST + f"input %mask: bool[batch, {LENGTH}]\n", tensors="key_mask=%mask, "), "it has key_mask"),
        (attend(FIRST + "input %lengths: i64[batch]\n", tensors="kv_lengths=%lengths, "), "it has kv_lengths"),
        (
            attend(
                FIRST + f"input %segments: i64[batch, {LENGTH}]\ninput %prefix: bool[batch, {LENGTH}]\n",
                tensors="segments=%segments, prefix=%prefix, ",
            ),
            "it has segments and prefix",
        ),
    ],
)
def test_refusals(body: str, reason: str) -> None:
    assert_refuses(body, RULE, reason)


def test_heads_that_are_last_are_refused() -> None:
    """Buffers whose axes could be taken for one another: as many heads as places."""
    body = f"""{STARTS}
        input %q: f32[batch, 4, 6, 32]
        input %k: f32[batch, 6, sequence, 32]
        input %starts: i64[batch]
        input %past_k: f32[batch, 6, 6, 32]
        input %past_v: f32[batch, 6, 6, 32]
        %k2 = graphopt.kv_cache_update.default(cache=%past_k, new=%k, starts=%starts)
        %v2 = graphopt.kv_cache_update.default(cache=%past_v, new=%k, starts=%starts)
        %a = graphopt.attention.default(q=%q, k=%k2, v=%v2, starts=%starts, scale=1.0, causal="upper_left", heads_last=True)
        output y = %a"""
    assert_refuses(body, RULE, "its heads are last")


def test_one_update_alone_is_no_cache() -> None:
    """Keys that are written, values that are not."""
    head = FIRST.replace(f"%past_v: f32[batch, 2, {LENGTH}, 32]", f"%v2: f32[batch, 2, {LENGTH}, 32]")
    lines = [line for line in attend(head).splitlines() if "%v2 =" not in line]
    assert_not_matched("\n".join(lines), RULE)


SECOND = """
    %b = graphopt.attention.default(q=%q, k=%k2, v=%v2, starts=%starts, scale=0.25, causal="upper_left")
    output z = %b
"""


def test_two_attentions_over_one_cache() -> None:
    """The second reads what the first has written."""
    body = attend().replace(OUTPUTS, SECOND.replace("output z = %b", "") + OUTPUTS) + "output z = %b"
    applied = apply(body, RULE)
    assert applied.matches == {"FuseCachedAttention": 1}
    assert applied.text.count("graphopt.attention") == 1
    assert_equal_runs(program(body), applied.text)


# The pass


def test_every_transpose_goes() -> None:
    body = CASES[5].before.replace("output y = %a", "%b = aten.transpose.int(self=%a, dim0=1, dim1=2)\noutput y = %b")
    applied = apply_pass(body, FuseCachedAttentions())
    assert "transpose" not in applied.text
    assert applied.matches == {"FuseCachedAttention": 1, "MergePermutations": 1}
    assert_equal_runs(program(body), applied.text)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_idempotent(case: Case) -> None:
    assert_idempotent(case.before, FuseCachedAttentions())


def test_rules_of_the_pass() -> None:
    assert [type(rule).__name__ for rule in FuseCachedAttentions().rules()] == [
        "FuseCachedAttention", "FuseInt8CachedAttention", "FuseHalfCachedAttention", "MergePermutations",
    ]  # fmt: skip


def test_nothing_to_fuse_is_an_error() -> None:
    with pytest.raises(NoMatchError, match="fuse_cached_attention changed nothing"):
        apply_pass(attend(causal="none"), FuseCachedAttentions())


def test_it_comes_after_the_cache() -> None:
    kinds = ("canonicalize", "fuse_attention", "fuse_cached_attention")
    with pytest.raises(
        PipelineError, match=r"fuse_cached_attention needs cache.*\n.*\n.*add insert_kv_cache before it"
    ):
        load_passes([{"kind": kind} for kind in kinds])
