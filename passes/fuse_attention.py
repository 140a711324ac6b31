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
from typing import Any, ClassVar, Literal

from graphopt import masks
from graphopt.dims import Size
from graphopt.ir import Value
from graphopt.patterns import Hole, NumberHole, Ops, Pattern, TensorHole
from graphopt.pipeline import RulePass
from graphopt.rewrite import Build, Match, Rule, require


class FuseSdpa(Rule):
    """scaled_dot_product_attention(q, k, v, mask)  ->  attention(q, k, v, bias=mask)"""

    def pattern(self, op: Ops, q: TensorHole, k: TensorHole, v: TensorHole) -> Any:
        return op.scaled_dot_product_attention(q, k, v, ...)

    def rewrite(self, op: Build, m: Match) -> Value:
        args = m.node.args
        dims = m.dims(q="b h s d", k="b n t d", v="b n t e")
        _require_no_widening(args["attn_mask"], dims)
        require(args["dropout_p"] == 0, "it has dropout")
        require(args["enable_gqa"] or dims["h"] == dims["n"], "q and k differ in heads without enable_gqa")
        scale = args["scale"]
        if scale is None:
            require(isinstance(dims["d"], int), "the default scale of a dynamic head size")
            scale = 1 / math.sqrt(int(dims["d"]))  # type: ignore[arg-type]
        causal = "upper_left" if args["is_causal"] else "none"
        result: Value = op.graphopt.attention(m.q, m.k, m.v, args["attn_mask"], scale=scale, causal=causal)
        return result


class FuseMatmulSoftmax(Rule):
    """softmax(softcap(q @ k.T * scale) + bias) @ v  ->  attention(q, k, v, bias)"""

    def pattern(
        self,
        op: Ops,
        q: TensorHole,
        k: TensorHole,
        v: TensorHole,
        bias: TensorHole,
        q_scale: NumberHole,
        k_scale: NumberHole,
        scale: NumberHole,
        divisor: NumberHole,
        cap: NumberHole,
    ) -> Any:
        keys = op.transpose(op.mul(k, k_scale) | k, 2, 3)
        s: Pattern = op.matmul(op.mul(q, q_scale) | q, keys)
        s = op.mul(s, scale) | op.div(s, divisor) | s
        s = op.mul(op.tanh(op.div(s, cap)), cap).tag(softcap=True) | s
        s = op.add(s, bias) | s
        w = op.softmax(s, 3, ...)
        return op.matmul(op.to.dtype(w, ...) | w, v)

    def rewrite(self, op: Build, m: Match) -> Value:
        dims = m.dims(q="b h s d", k="b h t d", v="b h t e")
        require(m.q.type.dtype == m.k.type.dtype == m.v.type.dtype, "mixed dtypes")
        if m.bias is not None:
            require(m.bias.type.dtype.is_floating_point, "what is added to the scores is not floating")
        _require_no_widening(m.bias, dims)
        require(m.divisor != 0, "the scores are divided by zero")
        factors = [float(number) for number in (m.q_scale, m.k_scale, m.scale) if number is not None]
        scale = math.prod(factors) / float(m.divisor if m.divisor is not None else 1)
        softcap = float(m.cap) if m.softcap else 0.0
        result: Value = op.graphopt.attention(m.q, m.k, m.v, m.bias, scale=scale, softcap=softcap)
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
        proof = masks.prove(m.node.graph, m.bias, queries, keys)
        if isinstance(proof, masks.Unproven):
            require(False, f"the mask %{m.bias.name} stays a bias: {proof.reason}")
        assert isinstance(proof, masks.Mask)
        require(proof.causal == "none" or args["causal"] == "none", "it is causal twice")
        require(max(args["window_left"], args["window_right"]) < 0, "it has a window already")
        if max(proof.window_left, proof.window_right) >= 0:
            counts_alike = args["causal"] != "lower_right" or queries == keys
            require(counts_alike, "its window counts from the upper left, its causal part from the lower right")
        key_mask = args["key_mask"]
        if proof.key_mask is not None:
            require(key_mask is None, "it has a key mask already")
            shape = proof.key_mask.type.shape
            require(shape == (batch, keys), f"the key mask %{proof.key_mask.name} is not [{batch}, {keys}]")
            key_mask = _as_bool(op, proof.key_mask)
        return _attention(
            op, m, bias=None, key_mask=key_mask, window_left=proof.window_left, window_right=proof.window_right,
            causal=args["causal"] if proof.causal == "none" else proof.causal,
        )  # fmt: skip


def _as_bool(op: Build, value: Value) -> Value:
    from torch import bool as boolean

    return value if value.type.dtype == boolean else op.reuse("to.dtype", value, boolean)


def _attention(op: Build, m: Match, **changed: Any) -> Value:
    """The matched attention with some arguments changed."""
    result: Value = op.graphopt.attention(**(m.node.args | changed))
    return result


class FuseRotary(Rule):
    """x * cos + cat([-x2, x1]) * sin  ->  rotary_embedding(x, cos, sin)"""

    def pattern(self, op: Ops, x: TensorHole, cos: TensorHole, sin: TensorHole, half: NumberHole, end: Hole) -> Any:
        turned = op.cat([op.neg(op.slice(x, 3, half, end)), op.slice(x, 3, 0, half)], 3)
        cosine, sine = op.unsqueeze(cos, 1).shared(), op.unsqueeze(sin, 1).shared()
        return op.add(op.mul(x, cosine), op.mul(turned, sine))

    def rewrite(self, op: Build, m: Match) -> Value:
        m.dims(x="b h s d")
        require(m.x.type.dtype == m.cos.type.dtype == m.sin.type.dtype, "x, cos and sin differ in dtype")
        width = m.x.type.shape[3]
        require(m.end == width == 2 * m.half, "x is not turned by halves")
        for name, angle in (("cos", m.cos), ("sin", m.sin)):
            require(
                len(angle.type.shape) == 3 and angle.type.shape[2] == width, f"{name} is not [batch, sequence, {width}]"
            )
            require(halves_are_equal(angle), f"the two halves of {name} (%{angle.name}) are not shown to be equal")
        cos, sin = (op.reuse("slice.Tensor", angle, 2, 0, m.half) for angle in (m.cos, m.sin))
        result: Value = op.graphopt.rotary_embedding(m.x, cos, sin)
        return result


#: Ops that keep equal halves equal, where all their tensors have them.
_ELEMENTWISE = frozenset(
    {"aten.cos.default", "aten.sin.default", "aten.mul.Tensor", "aten.to.dtype", "aten.neg.default"}
)


def halves_are_equal(value: Value) -> bool:
    """Whether the two halves of the last axis are shown to be equal: ``cat([f, f])``, then element-wise ops."""
    node, last = value.producer, len(value.type.shape) - 1
    if node is None:
        return False
    if node.op == "aten.cat.default":
        tensors = node.args["tensors"]
        return node.args["dim"] == last and len(tensors) == 2 and tensors[0] is tensors[1]
    return node.op in _ELEMENTWISE and all(halves_are_equal(operand) for operand in node.operands)


class FuseAttention(RulePass):
    """Find attention in its eager and SDPA spellings, fold grouped heads and rotary, prove masks."""

    kind: Literal["fuse_attention"] = "fuse_attention"
    rotary: bool = True
    """Fold rotary embeddings into one op as well."""
    prove_masks: bool = True
    """Turn masks that are proven into attributes; without, every mask stays a bias."""

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"attention"})

    def rules(self) -> list[Rule]:
        rules: list[Rule] = [FuseSdpa(), FuseMatmulSoftmax(), FoldRepeatKv()]
        return rules + [FuseRotary()] * self.rotary + [ProveMask()] * self.prove_masks
