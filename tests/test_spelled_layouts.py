"""FuseSpelledAttention: attention in every layout."""

from __future__ import annotations

import pytest

from tests.rules import (
    DIMS,
    GROUPED,
    QKV,
    SQUARE,
    apply,
    assert_becomes,
    assert_keeps,
    assert_refuses,
    attention,
    lines,
)
from tests.test_spelled_attention import BY_FACTOR, LOWEST, RULE, RULES, plus, spelled, times
from tests.test_spelled_models import MERGED, ONE_HEAD, WINDOWED, WINDOWS, batched, mask3, merged

# Layouts


GROUPS = GROUPED.replace("batch, 2, keys", "batch, 1, keys")
GIVEN_KEYS = QKV.replace("%k: f32[batch, 4, keys, 8]", "%t: f32[batch, 4, 8, keys]")
TURNED_BACK = f"{GIVEN_KEYS}{lines('transpose = transpose.int(self=%t, dim0=2, dim1=3)')}"


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (spelled(head=GROUPS), attention(GROUPS, "scale=1.0")),
        (
            spelled(head=GIVEN_KEYS).replace("%t = aten.transpose.int(self=%k, dim0=2, dim1=3)", ""),
            attention(TURNED_BACK, "scale=1.0", qkv="q=%q, k=%transpose, v=%v"),
        ),
        (spelled(head=SQUARE), attention(SQUARE, "scale=1.0")),
        (spelled(head=QKV.replace("keys, 6", "keys, 8")), attention(QKV.replace("keys, 6", "keys, 8"), "scale=1.0")),
    ],
)
def test_heads_and_sizes(body: str, after: str) -> None:
    """One head of keys for all queries; keys given as they are multiplied; as many keys as queries; values as wide as keys."""
    assert_becomes(body, after, RULES)


BACK = "%o = aten.reshape.default(self=%attention, shape=[4*batch, sequence, 6])\noutput y = %o"


def of_heads(head: str, *args: str, qkv: str = "q=%q, k=%k, v=%v") -> str:
    """One attention of four axes whose result has its heads in the batch."""
    return attention(head, *args, qkv=qkv).replace("%o =", "%attention =").replace("output y = %o", BACK)


OF_EACH = mask3(MERGED, "4*batch, sequence, keys")
SPLIT = "reshape = reshape.default(self=%bias, shape=[batch, 4, sequence, keys])"
SPLIT_FACTOR = lines(
    "reshape = reshape.default(self=%factor, shape=[batch, 4, 1, 1])", "mul = mul.Tensor(self=%q, other=%reshape)"
)
UNTURNED = lines(merged("q", 8), "kt = transpose.int(self=%k, dim0=2, dim1=3)", merged("v", 6))


def keep(head: str, *names: str) -> str:
    """A head of heads in the batch without what a rewrite leaves dead."""
    return "\n".join(line for line in head.splitlines() if "3 = " not in line or line.strip().startswith(names))


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (batched(), of_heads(QKV, "scale=1.0")),
        (batched(product="matmul.default(self=%q3, other=%t)"), of_heads(QKV, "scale=1.0")),
        (
            batched(turn="t = reshape.default(self=%kt, shape=[4*batch, 8, keys])", head=f"{QKV}{UNTURNED}"),
            of_heads(QKV, "scale=1.0"),
        ),
        (
            batched(head=f"{MERGED}{lines(times(0.5, 'q3', 'qs'))}", product="bmm.default(self=%qs, mat2=%t)"),
            of_heads(QKV, "scale=0.5"),
        ),
        (
            batched(times(2.0), plus(of="m"), head=OF_EACH),
            of_heads(f"{keep(OF_EACH)}\n{lines(SPLIT)}", "bias=%reshape", "scale=2.0"),
        ),
        (
            batched(plus(), head=mask3(MERGED, "1, sequence, keys")),
            of_heads(keep(mask3(MERGED, "1, sequence, keys")), "bias=%bias", "scale=1.0"),
        ),
        (
            batched("f = where.ScalarOther(condition=%mask, self=%s, other=-inf)", head=mask3(MERGED, "keys", "mask", "bool")),
            of_heads(keep(mask3(MERGED, "keys", "mask", "bool")), "bias=%mask", "scale=1.0"),
        ),
        (
            batched(BY_FACTOR, head=mask3(MERGED, "4*batch, 1, 1", "factor")),
            of_heads(f"{keep(mask3(MERGED, '4*batch, 1, 1', 'factor'))}\n{SPLIT_FACTOR}", "scale=1.0", qkv="q=%mul, k=%k, v=%v"),
        ),
    ],
)  # fmt: skip
def test_heads_in_the_batch_are_found(body: str, after: str) -> None:
    assert_becomes(body, after, RULES)


ALIBI = mask3(MERGED, "4*batch, 1, keys", "alibi")
ADDED_PRODUCT = "baddbmm.default(self=%alibi, batch1=%q3, batch2=%t, beta=0.5, alpha=0.25)"
WIDE = (
    "s4 = reshape.default(self=%s, shape=[batch, 4, sequence, keys])",
    "f = where.ScalarOther(condition=%mask, self=%s4, other=-inf)",
)


def test_a_product_that_is_added_to_is_read_with_its_factors() -> None:
    """BLOOM: ``baddbmm`` in three axes, the mask in four, the product with the values in three again."""
    head = mask3(ALIBI, "batch, 1, sequence, keys", "mask", "bool")
    body = batched(*WIDE, head=head, product=ADDED_PRODUCT).replace("dim=2)", "dim=3)")
    body = body.replace("self=%w, mat2", "self=%w3, mat2").replace(
        "%o =", "%w3 = aten.reshape.default(self=%w, shape=[4*batch, sequence, keys])\n%o ="
    )
    made = lines(
        "mul = mul.Tensor(self=%alibi, other=0.5)",
        "reshape = reshape.default(self=%mul, shape=[batch, 4, 1, keys])",
        f"where = where.ScalarOther(condition=%mask, self=%reshape, other={LOWEST})",
    )
    assert_becomes(body, of_heads(f"{keep(head)}\n{made}", "bias=%where", "scale=0.25"), RULES)


@pytest.mark.parametrize(
    ("product", "args"),
    [
        (ADDED_PRODUCT.replace(", beta=0.5, alpha=0.25", ""), ("bias=%reshape", "scale=1.0")),
        (ADDED_PRODUCT.replace("beta=0.5, ", ""), ("bias=%reshape", "scale=0.25")),
    ],
)
def test_a_product_that_is_added_to_without_factors(product: str, args: tuple[str, ...]) -> None:
    split = lines("reshape = reshape.default(self=%alibi, shape=[batch, 4, 1, keys])")
    assert_becomes(batched(head=ALIBI, product=product), of_heads(f"{keep(ALIBI)}\n{split}", *args), RULES)


def test_adding_zero_times_a_tensor_is_refused() -> None:
    body = batched(head=ALIBI, product=ADDED_PRODUCT.replace("beta=0.5", "beta=0"))
    assert_refuses(body, RULE, "it adds zero times a tensor")


ONE_BIAS = mask3(ONE_HEAD, "batch, 1, keys")


@pytest.mark.parametrize(
    ("body", "head", "args"),
    [
        (batched(head=ONE_HEAD), ONE_HEAD, ("scale=1.0",)),
        (batched(plus(), head=ONE_BIAS), ONE_BIAS, ("bias=%bias4", "scale=1.0")),
    ],
)
def test_three_axes_without_heads_are_one_head(body: str, head: str, args: tuple[str, ...]) -> None:
    made = lines(
        "t = transpose.int(self=%k3, dim0=1, dim1=2)",
        *["bias4 = reshape.default(self=%bias, shape=[batch, 1, 1, keys])"] * (head is ONE_BIAS),
        "q4 = reshape.default(self=%q3, shape=[batch, 1, sequence, 8])",
        "t4 = reshape.default(self=%t, shape=[batch, 1, 8, keys])",
        "k4 = transpose.int(self=%t4, dim0=2, dim1=3)",
        "v4 = reshape.default(self=%v3, shape=[batch, 1, keys, 6])",
    )
    after = of_heads(f"{head}\n{made}", *args, qkv="q=%q4, k=%k4, v=%v4").replace("4*batch", "batch")
    assert_becomes(body, after, RULES)


SEQUENCE_FIRST = f"""{DIMS}
    dim keys in [1, ...]
    input %q: f32[sequence, batch, 32]
    input %k: f32[batch, 4, keys, 8]
    input %v: f32[keys, batch, 24]
    %qh = aten.reshape.default(self=%q, shape=[sequence, 4*batch, 8])
    %q3 = aten.transpose.int(self=%qh, dim0=0, dim1=1)
    %k3 = aten.reshape.default(self=%k, shape=[4*batch, keys, 8])
    %vh = aten.reshape.default(self=%v, shape=[keys, 4*batch, 6])
    %v3 = aten.transpose.int(self=%vh, dim0=0, dim1=1)
"""


def test_heads_of_sequences_that_come_first_are_found() -> None:
    head = SEQUENCE_FIRST[: SEQUENCE_FIRST.index("%qh")]
    made = lines(
        "qs = reshape.default(self=%q, shape=[sequence, batch, 4, 8])",
        "q4 = permute.default(self=%qs, dims=[1, 2, 0, 3])",
        "vs = reshape.default(self=%v, shape=[keys, batch, 4, 6])",
        "v4 = permute.default(self=%vs, dims=[1, 2, 0, 3])",
    )
    after = of_heads(f"{head}\n{made}", "scale=1.0", qkv="q=%q4, k=%k, v=%v4")
    assert_becomes(batched(head=SEQUENCE_FIRST), after, RULES)


def test_windows_are_batches_and_have_masks_of_their_own() -> None:
    made = lines(
        "t = transpose.int(self=%k, dim0=3, dim1=4)",
        "reshape = reshape.default(self=%bias, shape=[1, 3, 1, 5, 7])",
        "expand = expand.default(self=%reshape, size=[batch, 3, 1, 5, 7])",
        "reshape_1 = reshape.default(self=%expand, shape=[3*batch, 1, 5, 7])",
        "reshape_2 = reshape.default(self=%q, shape=[3*batch, 4, 5, 8])",
        "reshape_3 = reshape.default(self=%t, shape=[3*batch, 4, 8, 7])",
        "transpose = transpose.int(self=%reshape_3, dim0=2, dim1=3)",
        "reshape_4 = reshape.default(self=%v, shape=[3*batch, 4, 7, 6])",
    )
    args = attention(
        f"{WINDOWS}\n{made}", "bias=%reshape_1", "scale=1.0", qkv="q=%reshape_2, k=%transpose, v=%reshape_4"
    )
    back = "%o = aten.reshape.default(self=%attention, shape=[batch, 3, 4, 5, 6])\noutput y = %o"
    after = args.replace("%o =", "%attention =").replace("output y = %o", back)
    assert_becomes(WINDOWED, after, RULES)


@pytest.mark.parametrize(
    "bias", ["4, 1, 1", "1, 1, 5, 7", "7", "1, 3, 4, 5, 7", "batch, 3, 1, 1, 7", "batch, 1, 4, 5, 1"]
)
def test_biases_of_windows_are_equal(bias: str) -> None:
    body = WINDOWED.replace("%bias: f32[3, 1, 5, 7]", f"%bias: f32[{bias}]")
    assert apply(body, *RULES).matches["FuseSpelledAttention"] == 1
    assert_keeps(body, *RULES)


def test_windows_with_masks_in_five_axes_and_a_softmax_in_four() -> None:
    """Swin: the relative bias in four axes, the windows' masks in five."""
    body = """
        dim batch in [1, ...]
        input %n: f32[batch]
        input %q: f32[3*batch, 4, 5, 8]
        input %k: f32[3*batch, 4, 7, 8]
        input %v: f32[3*batch, 4, 7, 6]
        input %relative: f32[1, 4, 5, 7]
        input %bias: f32[1, 3, 1, 5, 7]
        %t = aten.transpose.int(self=%k, dim0=2, dim1=3)
        %s = aten.matmul.default(self=%q, other=%t)
        %r = aten.add.Tensor(self=%s, other=%relative)
        %s5 = aten.reshape.default(self=%r, shape=[batch, 3, 4, 5, 7])
        %b = aten.add.Tensor(self=%s5, other=%bias)
        %s4 = aten.reshape.default(self=%b, shape=[3*batch, 4, 5, 7])
        %w = aten.softmax.int(self=%s4, dim=3)
        %o = aten.matmul.default(self=%w, other=%v)
        output y = %o"""
    applied = apply(body, *RULES)
    assert applied.matches["FuseSpelledAttention"] == 1
    assert "bias=%add, scale=1.0" in applied.text
    assert_keeps(body, *RULES)
