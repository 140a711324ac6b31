"""The ops of a cache against loops over rows, heads and tokens in plain torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.ops import SHAPES

OPS = torch.ops.graphopt  # registered by the import above
LENGTH = 9  # of the buffers

#: Tensors that a cached attention may do without.
NOTHING = {"cos": None, "sin": None, "k_scale": None, "v_scale": None}


def written(cache: Tensor, new: Tensor, starts: Tensor) -> Tensor:
    """One vector after another, those behind the end left out."""
    result = cache.clone()
    for row, head, token in itertools.product(*map(range, new.shape[:3])):
        place = int(starts[row]) + token
        if place < cache.shape[2]:
            result[row, head, place] = new[row, head, token]
    return result


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One vector ``[D]`` by one position's angles ``[R/2]``."""
    result, half = x.clone(), len(cos)
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        result[a] = x[a] * cos[pair] - x[b] * sin[pair]
        result[b] = x[b] * cos[pair] + x[a] * sin[pair]
    return result


@dataclass(frozen=True)
class Masking:
    """What attention over buffers may have besides being causal."""

    window_left: int = -1
    chunk: int = 0
    softcap: float = 0.0
    bias: str = ""
    sinks: bool = False

    def tensors(self, batch: int, heads: int, queries: int) -> dict[str, Tensor]:
        made = {}
        if self.bias:
            shape = {"b": batch, "h": heads, "s": queries, "m": LENGTH, "1": 1}
            made["bias"] = torch.randn([shape[size] for size in self.bias.removeprefix("bool ")])
        if self.bias.startswith("bool"):
            made["bias"] = made["bias"] < 0.5
        if self.sinks:
            made["sinks"] = torch.randn(heads)
        return made

    @property
    def args(self) -> dict[str, Any]:
        return {"window_left": self.window_left, "chunk": self.chunk, "softcap": self.softcap}


def attended(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, masking: Masking, **more: Tensor) -> Tensor:
    """One query after another, with the list of the keys that it sees."""
    batch, heads, queries, _ = q.shape
    bias = more.get("bias", torch.zeros(1)).expand(batch, heads, queries, k.shape[2])
    result = torch.zeros(*q.shape[:3], v.shape[3])
    for row, head, token in itertools.product(range(batch), range(heads), range(queries)):
        own, shared = int(starts[row]) + token, head // (heads // k.shape[1])
        first = max(0, own - masking.window_left) if masking.window_left >= 0 else 0
        if masking.chunk:
            first = max(first, own - own % masking.chunk)
        seen = [
            key
            for key in range(first, min(own + 1, k.shape[2]))
            if bias.dtype != torch.bool or bias[row, head, token, key]
        ]
        scores = []
        for key in seen:
            score = torch.dot(q[row, head, token], k[row, shared, key]) * scale
            if masking.softcap:
                score = masking.softcap * torch.tanh(score / masking.softcap)
            scores.append(score if bias.dtype == torch.bool else score + bias[row, head, token, key])
        if not seen:
            continue
        weights = torch.stack(scores).exp()
        total = weights.sum() + (more["sinks"][head].exp() if masking.sinks else 0)
        for weight, key in zip(weights / total, seen, strict=True):
            result[row, head, token] += weight * v[row, shared, key]
    return result


def close(got: Tensor, expected: Tensor) -> None:
    assert not expected.isnan().any()
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


#: Where each row's tokens begin, and how many there are.
STEPS = {
    "a prompt": ([0, 0], 4),
    "the whole buffer": ([0, 0], LENGTH),
    "one row, one token": ([0], 1),
    "ragged single tokens": ([3, 0, 7], 1),
    "the last place": ([8, 0], 1),
    "ragged chunks": ([5, 0, 2], 3),
    "up to the end": ([6, 1], 3),
    "behind the end": ([7, 9, 0], 4),
}
MASKINGS = {
    "causal": Masking(),
    "window": Masking(window_left=2),
    "window of itself": Masking(window_left=0),
    "chunk": Masking(chunk=4),
    "chunk and window": Masking(chunk=5, window_left=3),
    "softcap": Masking(softcap=2.0),
    "bias": Masking(bias="bhsm"),
    "bias of all rows": Masking(bias="1hsm"),
    "bias of all heads": Masking(bias="b1sm"),
    "bias of keys": Masking(bias="1h1m"),
    "boolean bias": Masking(bias="bool b1sm"),
    "sinks": Masking(sinks=True),
    "everything": Masking(window_left=3, chunk=4, softcap=3.0, bias="bhsm", sinks=True),
}


def starting(step: str) -> tuple[Tensor, int]:
    starts, count = STEPS[step]
    return torch.tensor(starts), count


# kv_cache_update


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("step", STEPS)
def test_update_is_the_loop(step: str, dtype: torch.dtype) -> None:
    starts, count = starting(step)
    cache, new = torch.randn(len(starts), 2, LENGTH, 3), torch.randn(len(starts), 2, count, 3)
    got = OPS.kv_cache_update(cache, new, starts.to(dtype))
    assert torch.equal(got, written(cache, new, starts))


def test_update_is_a_value_of_its_own() -> None:
    """Nothing is written into what came in."""
    cache, new = torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 2, 2)
    OPS.kv_cache_update(cache, new, torch.tensor([1]))
    assert not cache.any()


def test_more_tokens_than_places() -> None:
    new = torch.arange(5.0).reshape(1, 1, 5, 1)
    assert OPS.kv_cache_update(torch.zeros(1, 1, 3, 1), new, torch.tensor([1])).flatten().tolist() == [0, 0, 1]


def test_gradients_of_an_update() -> None:
    """They go to the new vectors that are in the buffer, and to the old ones that are left."""
    cache, new = torch.zeros(1, 1, 4, 1, requires_grad=True), torch.zeros(1, 1, 3, 1, requires_grad=True)
    factors = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 4, 1)
    (OPS.kv_cache_update(cache, new, torch.tensor([2])) * factors).sum().backward()
    assert cache.grad is not None
    assert new.grad is not None
    assert cache.grad.flatten().tolist() == [1, 2, 0, 0]
    assert new.grad.flatten().tolist() == [3, 4, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_update_in_other_dtypes(dtype: torch.dtype) -> None:
    cache, new, starts = torch.randn(2, 1, 4, 3).to(dtype), torch.randn(2, 1, 2, 3).to(dtype), torch.tensor([2, 0])
    got = OPS.kv_cache_update(cache, new, starts)
    assert got.dtype == dtype
    assert torch.equal(got, written(cache, new, starts))


@pytest.mark.parametrize(
    ("cache", "new"),
    [
        ((2, 4, 9, 8), (2, 2, 1, 8)),
        ((2, 4, 9, 8), (1, 4, 1, 8)),
        ((2, 4, 9, 8), (2, 4, 1, 6)),
        ((4, 9, 8), (4, 1, 8)),
    ],
)
def test_update_of_other_shapes_is_refused(cache: tuple[int, ...], new: tuple[int, ...]) -> None:
    args = {"cache": torch.empty(cache), "new": torch.empty(new), "starts": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"cache \[.*\] and new \[.*\] do not fit together"):
        SHAPES["graphopt.kv_cache_update.default"](args)


def test_update_of_another_dtype_is_refused() -> None:
    args = {"cache": torch.empty(1, 1, 4, 2), "new": torch.empty(1, 1, 1, 2).half(), "starts": torch.zeros(1)}
    with pytest.raises(ValueError, match="do not fit together"):
        SHAPES["graphopt.kv_cache_update.default"](args)


# attention over buffers


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("step", [step for step in STEPS if step != "behind the end"])
def test_attention_from_starts_is_the_loop(step: str, masking: str) -> None:
    starts, count = starting(step)
    q, k, v = (
        torch.randn(len(starts), heads, rows, size)
        for heads, rows, size in ((4, count, 6), (2, LENGTH, 6), (2, LENGTH, 5))
    )
    more = MASKINGS[masking].tensors(len(starts), 4, count)
    got = OPS.attention(q, k, v, starts=starts, scale=0.4, causal="upper_left", **more, **MASKINGS[masking].args)
    close(got, attended(q, k, v, starts, 0.4, MASKINGS[masking], **more))


def test_what_lies_behind_a_row_is_not_read() -> None:
    q, k = torch.randn(2, 1, 2, 4), torch.randn(2, 1, LENGTH, 4)
    starts = torch.tensor([1, 4])
    spoilt = k.clone()
    spoilt[0, :, 3:], spoilt[1, :, 6:] = 1e30, -1e30
    args = {"starts": starts, "scale": 1.0, "causal": "upper_left"}
    assert torch.equal(OPS.attention(q, k, k, **args), OPS.attention(q, spoilt, spoilt, **args))


def test_starts_of_zero_are_plain_causal_attention() -> None:
    q = torch.randn(2, 2, 5, 4)
    plain = OPS.attention(q, q, q, scale=0.5, causal="upper_left", window_left=2)
    close(
        OPS.attention(q, q, q, starts=torch.zeros(2, dtype=torch.int64), scale=0.5, causal="upper_left", window_left=2),
        plain,
    )


def test_equal_starts_are_causal_from_the_lower_right() -> None:
    q, k = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 8, 4)
    plain = OPS.attention(q, k, k, scale=0.5, causal="lower_right", chunk=3)
    close(OPS.attention(q, k, k, starts=torch.tensor([5, 5]), scale=0.5, causal="upper_left", chunk=3), plain)


# cached_attention


@dataclass(frozen=True)
class Rotary:
    """``width``: how many features are rotated."""

    width: int
    interleaved: bool = False
    positions: int = LENGTH

    def tables(self) -> tuple[Tensor, Tensor]:
        angles = torch.arange(self.positions)[:, None] * torch.rand(self.width // 2)
        return angles.cos(), angles.sin()


ROTARIES = {
    "no rotary": None,
    "halves": Rotary(6),
    "pairs": Rotary(6, interleaved=True),
    "part in halves": Rotary(4),
    "part in pairs": Rotary(2, interleaved=True),
    "more positions": Rotary(6, positions=LENGTH + 5),
}


def expected_of(
    parts: dict[str, Tensor],
    starts: Tensor,
    rotary: Rotary | None,
    tables: dict[str, Tensor],
    masking: Masking,
    **more: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three in turn: rotate, write, attend."""
    q, k = (parts[name].clone() for name in ("q", "k"))
    if rotary is not None:
        for x in (q, k):
            for row, head, token in itertools.product(*map(range, x.shape[:3])):
                place = int(starts[row]) + token
                cos, sin = tables["cos"][place], tables["sin"][place]
                x[row, head, token] = rotated(x[row, head, token], cos, sin, rotary.interleaved)
    keys, values = written(parts["k_cache"], k, starts), written(parts["v_cache"], parts["v"], starts)
    return attended(q, keys, values, starts, 0.4, masking, **more), keys, values


def parts_of(batch: int, count: int, value_size: int = 6) -> dict[str, Tensor]:
    """Four heads of queries, two of keys and values."""
    new = {"q": (4, count, 6), "k": (2, count, 6), "v": (2, count, value_size)}
    caches = {"k_cache": (2, LENGTH, 6), "v_cache": (2, LENGTH, value_size)}
    return {name: torch.randn(batch, *shape) for name, shape in (new | caches).items()}


def check_cached(step: str, rotary: Rotary | None, masking: Masking, heads_last: bool, value_size: int = 6) -> None:
    starts, count = starting(step)
    parts = parts_of(len(starts), count, value_size)
    tables = dict(zip(("cos", "sin"), rotary.tables(), strict=True)) if rotary else {}
    more = masking.tensors(len(starts), 4, count)
    turned = {name: t.transpose(1, 2) if heads_last and name in "qkv" else t for name, t in parts.items()}
    got = OPS.cached_attention(
        **turned, starts=starts, **tables, **more, **masking.args, scale=0.4, heads_last=heads_last,
        interleaved=bool(rotary and rotary.interleaved),
    )  # fmt: skip
    result, keys, values = expected_of(parts, starts, rotary, tables, masking, **more)
    close(got[0].transpose(1, 2) if heads_last else got[0], result)
    close(got[1], keys)
    close(got[2], values)


@pytest.mark.parametrize("heads_last", [True, False])
@pytest.mark.parametrize("rotary", ROTARIES)
@pytest.mark.parametrize("step", [step for step in STEPS if step != "behind the end"])
def test_cached_attention_is_the_loop(step: str, rotary: str, heads_last: bool) -> None:
    check_cached(step, ROTARIES[rotary], Masking(), heads_last)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("step", ["a prompt", "ragged single tokens", "ragged chunks"])
def test_cached_attention_with_masks_is_the_loop(step: str, masking: str) -> None:
    check_cached(step, Rotary(4), MASKINGS[masking], heads_last=True)


def test_values_of_another_size() -> None:
    check_cached("ragged chunks", None, Masking(), heads_last=False, value_size=3)
    check_cached("ragged chunks", None, Masking(), heads_last=True, value_size=3)


def test_padding_behind_the_end_changes_nothing_before_it() -> None:
    """Tokens that fall behind the buffer's end are padding: those before it are as they would be without."""
    starts, parts = torch.tensor([7, 2]), parts_of(2, 4)
    cos, sin = Rotary(6).tables()
    got = OPS.cached_attention(**parts, starts=starts, cos=cos, sin=sin, scale=0.4)
    kept = {name: t[:, :, :2] if name in "qkv" else t for name, t in parts.items()}
    expected = OPS.cached_attention(**kept, starts=starts, cos=cos, sin=sin, scale=0.4)
    close(got[0][:, :, :2], expected[0])
    close(got[1][0], expected[1][0])


def test_steps_are_the_whole_text() -> None:
    """A prompt, a chunk, single tokens: what torch's own attention gives for the text at once."""
    text = parts_of(2, LENGTH)
    caches = torch.zeros(2, 2, LENGTH, 6), torch.zeros(2, 2, LENGTH, 6)
    results = []
    for first, last in ((0, 4), (4, 7), (7, 8), (8, 9)):
        new = {name: text[name][:, :, first:last] for name in "qkv"}
        result, *caches = OPS.cached_attention(
            **new, k_cache=caches[0], v_cache=caches[1], starts=torch.full((2,), first), scale=0.4
        )
        results.append(result)
    whole = torch.nn.functional.scaled_dot_product_attention(
        text["q"], text["k"], text["v"], is_causal=True, scale=0.4, enable_gqa=True
    )
    close(torch.cat(results, 2), whole)


def test_gradients_of_cached_attention() -> None:
    """As numbers say: with the past, the rotation's tables, the bias and the sinks."""
    starts = torch.tensor([2, 0])
    parts = {name: tensor.double().requires_grad_() for name, tensor in parts_of(2, 2).items()}
    tables = [table.double().requires_grad_() for table in Rotary(4).tables()]
    bias, sinks = (torch.randn(shape).double().requires_grad_() for shape in ((2, 1, 2, LENGTH), (4,)))

    def call(*given: Tensor) -> Any:
        *five, cos, sin, bias, sinks = given
        return OPS.cached_attention(*five, starts, bias, sinks, cos, sin, scale=0.4)

    assert torch.autograd.gradcheck(call, (*parts.values(), *tables, bias, sinks), fast_mode=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": (2, 2, 3, 8)}, r"cache \[2, 2, 9, 6\] and new \[2, 2, 3, 8\] do not fit together"),
        ({"v_cache": (2, 4, 9, 6)}, r"cache \[2, 4, 9, 6\] and new \[2, 2, 3, 6\] do not fit together"),
        ({"q": (2, 5, 3, 6)}, "5 query heads cannot share 2 key heads"),
        ({"q": (2, 4, 3, 8)}, "do not fit together"),
        ({"k": (2, 2, 2, 6)}, "do not fit together"),
        ({"q": (4, 3, 6)}, "four dimensions"),
    ],
)
def test_cached_attention_of_other_shapes_is_refused(change: dict[str, tuple[int, ...]], reason: str) -> None:
    parts = parts_of(2, 3) | {name: torch.empty(shape) for name, shape in change.items()}
    args = parts | {"starts": torch.zeros(2, dtype=torch.int64), "heads_last": False, **NOTHING}
    with pytest.raises(ValueError, match=reason):
        SHAPES["graphopt.cached_attention.default"](args)


@pytest.mark.parametrize("heads_last", [True, False])
def test_shapes_are_those_of_the_body(heads_last: bool) -> None:
    starts = torch.zeros(2, dtype=torch.int64)
    parts = parts_of(2, 3, value_size=5)
    turned = {name: t.transpose(1, 2) if heads_last and name in "qkv" else t for name, t in parts.items()}
    args = turned | {"starts": starts, "heads_last": heads_last, **NOTHING}
    shapes = SHAPES["graphopt.cached_attention.default"](args)
    results = OPS.cached_attention(**turned, starts=starts, scale=1.0, heads_last=heads_last)
    assert [tensor.shape for tensor in shapes] == [tensor.shape for tensor in results]


@pytest.mark.parametrize("tables", [{"cos": (9, 3)}, {"cos": (9, 3), "sin": (9, 2)}, {"cos": (9, 4), "sin": (9, 4)}])
def test_tables_that_do_not_fit_are_refused(tables: dict[str, tuple[int, ...]]) -> None:
    """One without the other, of unlike shapes, of more features than a head has."""
    args: dict[str, Any] = parts_of(2, 3) | {"starts": torch.zeros(2, dtype=torch.int64), "heads_last": False}
    args |= NOTHING | {name: torch.empty(shape) for name, shape in tables.items()}
    with pytest.raises(ValueError, match="cos"):
        SHAPES["graphopt.cached_attention.default"](args)
