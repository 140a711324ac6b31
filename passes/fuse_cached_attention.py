"""A cache's update and the attention that reads it as one op, with the rotary embedding inside where it is looked up.

::

    %c = aten.index.Tensor(self=%cos, indices=[%places])
    %s = aten.index.Tensor(self=%sin, indices=[%places])                 %a, %k2, %v2 = graphopt.cached_attention.default(
    %rq = graphopt.rotary_embedding.default(x=%q, cos=%c, sin=%s)            q=%q, k=%k, v=%v,
    %rk = graphopt.rotary_embedding.default(x=%k, cos=%c, sin=%s)   ->       k_cache=%past_k, v_cache=%past_v,
    %k2 = graphopt.kv_cache_update.default(%past_k, %rk, %starts)            starts=%starts, cos=%cos, sin=%sin, scale=0.125)
    %v2 = graphopt.kv_cache_update.default(%past_v, %v, %starts)
    %a = graphopt.attention.default(
        q=%rq, k=%k2, v=%v2, starts=%starts, causal="upper_left")

Kernels that write the cache in place take all of that at once; they read q, k and v with the sequence before the heads, so
that transposes before and behind go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphopt.dims import Dim
from graphopt.ir import Value
from graphopt.passes.moves import MergePermutations
from graphopt.patterns import Ops, TensorHole
from graphopt.pipeline import RulePass
from graphopt.rewrite import Build, Match, Rule, require

_KEPT = ("bias", "sinks", "scale", "window_left", "chunk", "softcap")  # what both ops have
_NONE = ("key_mask", "kv_lengths", "segments", "prefix")


class FuseCachedAttention(Rule):
    """attention(rotary(q), update(rotary(k)), update(v))  ->  cached_attention(q, k, v)"""

    def pattern(
        self,
        op: Ops,
        q: TensorHole,
        k: TensorHole,
        v: TensorHole,
        past_k: TensorHole,
        past_v: TensorHole,
        starts: TensorHole,
    ) -> Any:
        keys = op.graphopt.kv_cache_update(past_k, self.stored(op, k), starts)
        values = op.graphopt.kv_cache_update(past_v, self.stored(op, v), starts)
        return op.graphopt.attention(q, self.read(op, keys), self.read(op, values), ...), keys, values

    def stored(self, op: Ops, new: Any) -> Any:
        """What the cache is given of new keys or values."""
        return new

    def read(self, op: Ops, cache: Any) -> Any:
        """What attention is given of the cache."""
        return cache

    def scales(self, m: Match) -> dict[str, Value]:
        """What int8 caches are scaled by."""
        return {}

    def rewrite(self, op: Build, m: Match) -> tuple[Value, ...]:
        args = m.node.args
        require(
            args["starts"] is m.starts and args["causal"] == "upper_left", "its queries stand elsewhere than its keys"
        )
        require(not args["heads_last"], "its heads are last")
        size = m.q.type.shape[3]
        require(isinstance(size, int) and size % 8 == 0, f"its heads are of {size}, which kernels read in eights")
        require(m.v.type.shape[3] == size, "its values are of another size than its keys")
        masks = [name for name in _NONE if args[name] is not None]
        require(not masks, f"it has {' and '.join(masks)}")
        parts = {"q": m.q, "k": m.k, "v": m.v, "k_cache": m.past_k, "v_cache": m.past_v, "starts": m.starts}
        rotary = _rotary(m)
        if rotary is not None:
            parts |= {"q": rotary.q, "k": rotary.k, "cos": rotary.cos, "sin": rotary.sin}
        parts |= self.scales(m)
        kept = {name: args[name] for name in _KEPT} | {"interleaved": rotary is not None and rotary.interleaved}
        turned = {name: _turned(parts[name]) for name in ("q", "k", "v")}
        if any(value is None for value in turned.values()):
            return tuple(op.graphopt.cached_attention(**parts, **kept))
        result, keys, values = op.graphopt.cached_attention(**(parts | turned), **kept, heads_last=True)
        return op.transpose.int(result, 1, 2), keys, values


class FuseInt8CachedAttention(FuseCachedAttention):
    """attention(q, dequantize(update(quantize(k))), dequantize(update(quantize(v))))  ->  cached_attention(q, k, v, scales)"""

    def pattern(  # type: ignore[override]  # with scales
        self,
        op: Ops,
        q: TensorHole,
        k: TensorHole,
        v: TensorHole,
        past_k: TensorHole,
        past_v: TensorHole,
        starts: TensorHole,
        k_scale: TensorHole,
        v_scale: TensorHole,
    ) -> Any:
        keys = op.graphopt.kv_cache_update(past_k, op.graphopt.quantize(k, k_scale), starts)
        values = op.graphopt.kv_cache_update(past_v, op.graphopt.quantize(v, v_scale), starts)
        read = op.graphopt.dequantize(keys, k_scale), op.graphopt.dequantize(values, v_scale)
        return op.graphopt.attention(q, *read, ...), keys, values

    def scales(self, m: Match) -> dict[str, Value]:
        return {"k_scale": m.k_scale, "v_scale": m.v_scale}


class FuseHalfCachedAttention(FuseCachedAttention):
    """attention(q, to(update(to(k))), to(update(to(v))))  ->  cached_attention(q, k, v), caches in the inner dtype"""

    def stored(self, op: Ops, new: Any) -> Any:
        return op.to.dtype(new, ...)

    def read(self, op: Ops, cache: Any) -> Any:
        return op.to.dtype(cache, ...)


def _turned(value: Value) -> Value | None:
    """What a transpose of sequence and heads was made of."""
    node = value.producer
    is_turn = node is not None and node.op == "aten.transpose.int" and {node.args["dim0"], node.args["dim1"]} == {1, 2}
    return node.args["self"] if node is not None and is_turn else None


@dataclass(frozen=True)
class _Rotary:
    """Queries and keys before their rotation, and its angles for all positions."""

    q: Value
    k: Value
    cos: Value
    sin: Value
    interleaved: bool


def _rotary(m: Match) -> _Rotary | None:
    """The one rotation of queries and keys by the tokens' positions; None if they have none or another one."""
    q, k = m.q.producer, m.k.producer
    if q is None or k is None or not q.op == k.op == "graphopt.rotary_embedding.default":
        return None
    same = all(q.args[name] == k.args[name] for name in ("cos", "sin", "interleaved", "heads_last"))
    tables = [_looked_up(q.args[name], m.starts) for name in ("cos", "sin")]
    if not same or q.args["heads_last"] or tables[0] is None or tables[1] is None:
        return None
    half, size = tables[0].type.shape[1], m.q.type.shape[3]
    if not (isinstance(half, int) and isinstance(size, int)) or half % 8 or size % 16:  # what kernels read
        return None
    return _Rotary(q.args["x"], k.args["x"], tables[0], tables[1], q.args["interleaved"])


def _looked_up(angles: Value, starts: Value) -> Value | None:
    """The table that angles are rows of, at the positions that begin at ``starts``."""
    node = angles.producer
    if node is None or node.op != "aten.index.Tensor" or len(node.args["indices"]) != 1:
        return None
    table = node.args["self"]
    return table if len(table.type.shape) == 2 and _counts_from(node.args["indices"][0], starts) else None


def _counts_from(positions: Value, starts: Value) -> bool:
    """Whether positions are ``starts[:, None] + arange``."""
    total = positions.producer
    if total is None or total.op != "aten.add.Tensor" or not isinstance(total.args["other"], Value):
        return False
    if total.args["alpha"] != 1:
        return False
    column, count = total.args["self"].producer, total.args["other"].producer
    is_column = (
        column is not None and column.op == "aten.unsqueeze.default" and column.args == {"self": starts, "dim": 1}
    )
    is_count = count is not None and count.op.startswith("aten.arange.") and isinstance(count.args["end"], Dim | int)
    return bool(is_column and is_count and (count.args["start"], count.args["step"]) == (0, 1))  # type: ignore[union-attr]


class FuseCachedAttentions(RulePass):
    """Write and read a static cache by one op."""

    kind: Literal["fuse_cached_attention"] = "fuse_cached_attention"

    requires: ClassVar[frozenset[str]] = frozenset({"cache"})

    def rules(self) -> list[Rule]:
        return [FuseCachedAttention(), FuseInt8CachedAttention(), FuseHalfCachedAttention(), MergePermutations()]
