"""Attention as one op, whatever spelling it came in.

::

    %s = aten.matmul.default(self=%q, other=%k_transposed)         %a = graphopt.attention.default(
    %m = aten.mul.Tensor(self=%s, other=0.125)                         q=%q, k=%k, v=%v, key_mask=%mask,
    %b = aten.add.Tensor(self=%m, other=%mask_4d)            ->        scale=0.125, causal="upper_left")
    %p = aten.softmax.int(self=%b, dim=3)
    %o = aten.matmul.default(self=%p, other=%v)

Grouped heads (``repeat_kv``) and rotary embeddings are folded into ``graphopt`` ops as well. A mask becomes attributes only
when :mod:`graphopt.masks` proves what it says; otherwise it stays the ``bias`` operand, and the report says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any, ClassVar, Literal

import torch

from graphopt import attentions, masks
from graphopt.dims import Size
from graphopt.ir import Graph, Value
from graphopt.passes.einsum import ProductOfEinsum
from graphopt.passes.moves import MOVES
from graphopt.passes.rotary import ROTARY
from graphopt.passes.spelled_attention import FuseSpelledAttention, combined
from graphopt.patterns import Hole, Ops, TensorHole
from graphopt.pipeline import Context, RulePass
from graphopt.rewrite import Build, Match, Refused, RewriteLog, Rule, near_miss, require


class FuseSdpa(Rule):
    """scaled_dot_product_attention(q, k, v, mask)  ->  attention(q, k, v, bias=mask)

    Without ``enable_gqa`` there are as many heads of keys as of queries, or one that is broadcast to all."""

    def pattern(self, op: Ops, q: TensorHole, k: TensorHole, v: TensorHole) -> Any:
        return op.scaled_dot_product_attention(q, k, v, ...)

    def rewrite(self, op: Build, m: Match) -> Value:
        args = m.node.args
        dims = m.dims(q="b h s d", k="b n t d", v="b n t e")
        _require_no_widening(args["attn_mask"], dims)
        require(args["dropout_p"] == 0, "it has dropout")
        scale = args["scale"]
        if scale is None:
            require(isinstance(dims["d"], int), "the default scale of a dynamic head size")
            scale = 1 / math.sqrt(int(dims["d"]))  # type: ignore[arg-type]
        causal = "upper_left" if args["is_causal"] else "none"
        result: Value = op.graphopt.attention(m.q, m.k, m.v, args["attn_mask"], scale=scale, causal=causal)
        return result


def _require_no_widening(bias: Value | None, dims: dict[str, Size]) -> None:
    """A mask must broadcast to the scores, and not the scores to the mask."""
    shape = () if bias is None else bias.type.shape
    scores = (dims["b"], dims["h"], dims["s"], dims["t"])
    fits = len(shape) <= 4 and all(size in (1, whole) for size, whole in zip(shape[::-1], scores[::-1], strict=False))
    require(fits, "the mask is larger than the scores")


class FoldRepeatKv(Rule):
    """attention(q, repeat_kv(k), repeat_kv(v))  ->  attention(q, k, v)"""

    def pattern(
        self, op: Ops, q: TensorHole, k: TensorHole, v: TensorHole, expanded: Hole, repeated: Hole,
        v_expanded: Hole, v_repeated: Hole,
    ) -> Any:  # fmt: skip
        keys = op.reshape(op.expand(op.unsqueeze(k, 2), expanded), repeated)
        values = op.reshape(op.expand(op.unsqueeze(v, 2), v_expanded), v_repeated)
        return op.graphopt.attention(q, keys, values, ...)

    def rewrite(self, op: Build, m: Match) -> Value:
        require(not m.node.args["heads_last"], "the heads are last")
        dims = m.dims(q="b h s d", k="b n t d", v="b n t e")
        b, n, t = dims["b"], dims["n"], dims["t"]
        require(len(m.expanded) == 5, "the heads are not repeated by one new axis")
        groups = m.expanded[2]
        for name, expanded, repeated in (("d", m.expanded, m.repeated), ("e", m.v_expanded, m.v_repeated)):
            require(expanded == (b, n, groups, t, dims[name]), "the heads are not repeated by one new axis")
            require(repeated == (b, n * groups, t, dims[name]), "the repeated heads are not merged with the heads")
        return _attention(op, m, k=m.k, v=m.v)


class ProveMask(Rule):
    """attention(q, k, v, bias=mask)  ->  attention(q, k, v, key_mask, causal, window), where the mask is proven"""

    def pattern(self, op: Ops, q: TensorHole, k: TensorHole, v: TensorHole, bias: TensorHole) -> Any:
        return op.graphopt.attention(q, k, v, bias, ...)

    def rewrite(self, op: Build, m: Match) -> Value:
        args = m.node.args
        sequence = 1 if args["heads_last"] else 2
        batch, queries, keys = m.k.type.shape[0], m.q.type.shape[sequence], m.k.type.shape[sequence]
        assert m.node.graph is not None
        proof, left = _prove_parts(op, m.node.graph, m.bias, queries, keys)
        if isinstance(proof, masks.Unproven):
            require(False, f"the mask %{m.bias.name} stays a bias: {proof.reason}")
        assert isinstance(proof, masks.Mask)
        changed = _Claim(op, proof, batch, keys).joined(args, queries == keys)
        return _attention(op, m, bias=left, **changed)


def _prove_parts(
    op: Build, graph: Graph, mask: Value, queries: Size, keys: Size
) -> tuple[masks.Mask | masks.Unproven, Value | None]:
    """What is proven of a mask, and what is left of it: where the whole is not proven, its parts may be."""
    whole = masks.prove(graph, mask, queries, keys)
    if isinstance(whole, masks.Mask):
        return whole, None
    proof: masks.Mask | None = None
    proven: list[Value] = []
    added: list[Value] = []
    shown: list[Value] = []
    for part in _parts(op, mask):
        found = masks.prove(graph, [*proven, part], queries, keys)
        if isinstance(found, masks.Mask):
            proof = found
            proven.append(part)
        else:
            (shown if part.type.dtype == torch.bool else added).append(part)
    return proof or whole, combined(op, added, shown)


def _parts(op: Build, mask: Value) -> Iterator[Value]:
    """What a mask is the sum or the conjunction of."""
    node = mask.producer
    name = "" if node is None else node.op.removeprefix("aten.")
    args: Any = {} if node is None else node.args
    floating = all(operand.type.dtype.is_floating_point for operand in ([] if node is None else node.operands))
    sums = name == "add.Tensor" and args["alpha"] == 1 and floating
    if (sums or name == "bitwise_and.Tensor") and isinstance(args["other"], Value):
        yield from (part for key in ("self", "other") for part in _parts(op, args[key]))
    elif (
        name == "where.ScalarOther" and masks.hides(float(args["other"])) and args["self"].type.dtype.is_floating_point
    ):
        yield args["condition"]
        yield from _parts(op, args["self"])
    elif (
        name == "masked_fill.Scalar" and masks.hides(float(args["value"])) and args["self"].type.dtype.is_floating_point
    ):
        yield op.reuse("bitwise_not.default", args["mask"])
        yield from _parts(op, args["self"])
    else:
        yield mask


class _Claim:
    """A proven mask as arguments of ``attention``."""

    def __init__(self, op: Build, proof: masks.Mask, batch: Size, keys: Size) -> None:
        self.op, self.proof, self.shape = op, proof, (batch, keys)

    def joined(self, args: Mapping[str, Any], square: bool) -> dict[str, Any]:
        """The arguments that say what ``args`` and the proof say together. Refusal if none can."""
        proof = self.proof
        counts = proof.causal, proof.window_left, proof.window_right, proof.chunk, proof.prefix
        if counts == ("none", -1, -1, 0, None):
            changed: dict[str, Any] = {}
        else:
            require(proof.causal == "none" or args["causal"] == "none", "it is causal twice")
            require(max(args["window_left"], args["window_right"]) < 0, "it has a window already")
            require(args["prefix"] is None and not args["chunk"], "it has a prefix or chunks already")
            alone = args["causal"] == "none"
            require(proof.prefix is None or alone, "it is causal twice")
            counts_alike = args["causal"] != "lower_right" or square
            require(counts_alike, "its window counts from the upper left, its causal part from the lower right")
            changed = {
                "causal": args["causal"] if proof.causal == "none" else proof.causal, "window_left": proof.window_left,
                "window_right": proof.window_right, "chunk": proof.chunk, "prefix": self._prefix(),
            }  # fmt: skip
        if proof.segments is not None:
            require(args["segments"] is None, "it has segments already")
            numbers = proof.segments
            changed["segments"] = self._truths(numbers) if isinstance(numbers, masks.Keys) else self._row(numbers)
        rows = [args["key_mask"]] * (args["key_mask"] is not None) + [self._truths(keys) for keys in proof.keys]
        if rows:
            changed["key_mask"] = reduce(lambda a, b: self.op.reuse("bitwise_and.Tensor", a, b), rows)
        return changed

    def _prefix(self) -> Value | None:
        prefix = self.proof.prefix
        if not isinstance(prefix, int):
            return None if prefix is None else self._truths(prefix)
        places = self.op.reuse("arange.start_step", 0, self.shape[1], dtype=torch.int64)
        return self._row(self.op.reuse("lt.Scalar", places, prefix))

    def _truths(self, keys: masks.Keys) -> Value:
        """A bool ``[B, T]`` of visible keys."""
        row = self._row(keys.value)
        if keys.where_zero:
            return self.op.reuse("eq.Scalar", row, 0)
        return row if row.type.dtype == torch.bool else self.op.reuse("to.dtype", row, torch.bool)

    def _row(self, value: Value) -> Value:
        """A tensor with an axis of keys and perhaps one of batches as ``[B, T]``."""
        batch, keys = self.shape
        shape = (batch if batch in value.type.shape[:-1] and batch != 1 else 1, keys)
        row = value if value.type.shape == shape else self.op.reuse("reshape.default", value, shape)
        return row if row.type.shape == self.shape else self.op.reuse("expand.default", row, self.shape)


def _attention(op: Build, m: Match, **changed: Any) -> Value:
    """The matched attention with some arguments changed."""
    result: Value = op.graphopt.attention(**(m.node.args | changed))
    return result


class FuseAttention(RulePass):
    """Find attention in its eager and SDPA spellings, fold grouped heads and rotary, prove masks."""

    kind: Literal["fuse_attention"] = "fuse_attention"
    rotary: bool = True
    """Fold rotary embeddings into one op as well."""
    prove_masks: bool = True
    """Turn masks that are proven into attributes; without, every mask stays a bias."""

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"attention"})

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = super().run(graph, context)
        for softmax in attentions.unfused(graph):
            product = attentions.weighed(softmax)[0]
            rule = FuseSdpa() if product is softmax else FuseSpelledAttention()
            reason = near_miss(rule, product)
            if reason is not None:  # what matched and was refused is in the log already
                log.refusals.append(Refused(rule.name, product.where, reason))
        return log

    def rules(self) -> list[Rule]:
        rules: list[Rule] = [ProductOfEinsum(), FuseSdpa(), FuseSpelledAttention(), *MOVES, FoldRepeatKv()]
        return rules + [*ROTARY] * self.rotary + [ProveMask()] * self.prove_masks
