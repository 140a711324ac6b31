"""Products in half precision, with what loses by it kept in fp32.

::

    %h = aten.linear.default(input=%x, weight=%w)               %a = aten.to.dtype(self=%x, dtype=f16)
    %n = aten.layer_norm.default(input=%h, weight=%g)    ->     %h = aten.linear.default(input=%a, weight=%w.f16)
                                                                %b = aten.to.dtype(self=%h, dtype=f32)
                                                                %n = aten.layer_norm.default(input=%b, weight=%g)

Linears, products, convolutions, attention and table look-ups compute in ``dtype``; norms, softmax, exponentials, logarithms,
roots, sums and everything that depends on positions alone (rotary angles, masks) stay in fp32; other ops take the wider of what
they are given. Inputs and outputs keep their dtypes. With ``norms: half`` norms are such other ops.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch

from graphopt.errors import PassError, nearest
from graphopt.ir import Graph, Node, Value, leaves, map_arg
from graphopt.parity import Contract
from graphopt.passes.quantized_weights import matches
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import RewriteLog
from graphopt.schemas.pipeline import Budget
from graphopt.schemas.report import LayerPrecision
from graphopt.tensors import TensorType, Weight

_LOW = frozenset({
    "aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.einsum", "aten.conv1d",
    "aten.conv2d", "aten.conv3d", "aten.convolution", "aten.embedding", "aten.scaled_dot_product_attention",
    "graphopt.attention", "graphopt.cached_attention", "graphopt.packed_attention",
})  # fmt: skip
_HIGH = frozenset({
    "aten.layer_norm", "aten.rms_norm", "aten.group_norm", "aten.batch_norm", "graphopt.add_layer_norm",
    "graphopt.add_rms_norm", "aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten.logsumexp",
    "aten.exp", "aten.expm1", "aten.log", "aten.log2", "aten.log1p", "aten.pow", "aten.square", "aten.rsqrt", "aten.sqrt",
    "aten.reciprocal", "aten.sum", "aten.mean", "aten.var", "aten.std", "aten.var_mean", "aten.cumsum", "aten.prod",
    "aten.cumprod", "aten.norm", "aten.linalg_vector_norm", "aten.softplus", "aten.sin", "aten.cos", "aten.tan",
})  # fmt: skip
#: Their kernels compute in fp32 whatever they read and write.
_NORMS = frozenset({
    "aten.layer_norm", "aten.rms_norm", "aten.group_norm", "graphopt.add_layer_norm", "graphopt.add_rms_norm",
})  # fmt: skip
_CASTS = frozenset({"aten.to", "aten._to_copy"})
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Cast(Pass):
    """Half precision where products are."""

    kind: Literal["cast"] = "cast"
    dtype: Literal["fp16", "bf16"] = "fp16"
    keep: tuple[str, ...] = ()
    """The paths of modules that stay in fp32 as well, with ``*`` and ``?``."""
    norms: Literal["fp32", "half"] = "fp32"
    """What norms, and the sums before them, read and write. ``half``: ``dtype``, where they are given nothing wider, so that the
    stream of residuals takes half the memory; they compute in fp32 all the same, and sums of residuals are rounded."""
    budget: Budget = Budget(metric="cosine", limit=0.999)
    """How far the outputs may go from eager's."""

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def contract(self) -> Contract:
        return self.budget

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        paths = {node.origin[0] for node in graph.nodes if node.origin}
        context.modules |= paths
        if context.is_last:
            for pattern in self.keep:
                if not any(matches(path, [pattern]) for path in context.modules):
                    raise PassError(
                        f"no module matches {pattern!r}", where=self.kind, hint=nearest(pattern, context.modules)
                    )
        high = _HIGH - _NORMS if self.norms == "half" else _HIGH
        return _Caster(graph, _DTYPES[self.dtype], self.keep, high, context).run()


class _Caster:
    """Writes each node anew on operands of the dtype that it is to compute in."""

    def __init__(
        self, graph: Graph, dtype: torch.dtype, keep: tuple[str, ...], high: frozenset[str], context: Context
    ) -> None:
        self.graph, self.dtype, self.keep, self.high, self.context = graph, dtype, keep, high, context
        self.now: dict[Value, Value] = {}  # what stands for a value of before
        self.positional = _of_positions(graph)
        self.casts: dict[tuple[str, torch.dtype], Value] = {}
        self.log = RewriteLog()

    def run(self) -> RewriteLog:
        outputs = dict(self.graph.outputs)
        old = list(self.graph.nodes)
        replaced = [node for node in old if self._write(node)]
        for name, value in outputs.items():
            own = self.now.get(value, value)
            self.graph.outputs[name] = self._as(own, value.type.dtype, None)
        names = [(self.now[value], value.name) for node in replaced for value in node.outputs]
        for node in reversed(replaced):
            self.graph.remove(node)
        for value, name in names:
            self.graph.rename(value, name)
        self.graph.prune()
        return self.log

    def _write(self, node: Node) -> bool:
        """Whether the node had to be written anew."""
        wanted = self._dtype_for(node)
        if wanted == self.dtype and node.op.rpartition(".")[0] in _LOW:
            self.log.matches["products"] = self.log.matches.get("products", 0) + 1
        self._report(node, wanted)
        args = {name: map_arg(arg, lambda leaf: self._operand(leaf, wanted, node)) for name, arg in node.args.items()}
        if all(_same(args[name], arg) for name, arg in node.args.items()):
            return False
        made = self.graph.insert(node.op, args, before=node, origin=(*node.origin, "cast"))
        self.now |= zip(node.outputs, made.outputs, strict=True)
        return True

    def _operand(self, leaf: Any, wanted: torch.dtype | None, node: Node) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        own = self.now.get(leaf, leaf)
        if wanted is None or leaf.type.dtype != torch.float32:
            return own
        return self._as(own, wanted, node, clamp=leaf in self.positional)

    def _dtype_for(self, node: Node) -> torch.dtype | None:
        """What a node's f32 operands are to be; None for as they are."""
        packet = node.op.rpartition(".")[0]
        floats = [operand for operand in node.operands if operand.type.dtype == torch.float32]
        if not floats or packet in _CASTS:
            return None
        if (
            packet in self.high
            or packet.startswith(("graphopt.quant", "aten.fft_"))
            or self._is_kept(node)
            or self._overflows(node)
        ):
            return torch.float32
        told = [operand for operand in floats if operand not in self.positional and not self._is_weight(operand)]
        if packet in _LOW:
            return (
                self.dtype
                if told or (any(map(self._is_weight, floats)) and packet == "aten.embedding")
                else torch.float32
            )
        if not told:
            return torch.float32
        wide = any(self.now.get(operand, operand).type.dtype == torch.float32 for operand in told)
        return torch.float32 if wide else self.dtype

    def _is_kept(self, node: Node) -> bool:
        return bool(node.origin) and matches(node.origin[0], self.keep)

    def _is_weight(self, value: Value) -> bool:
        return self.graph.weight_of(value) is not None

    def _overflows(self, node: Node) -> bool:
        """Whether a number among the arguments does not fit."""
        limit = torch.finfo(self.dtype).max
        numbers = [leaf for arg in node.args.values() for leaf in leaves(arg) if isinstance(leaf, float)]
        return any(limit < abs(number) < math.inf for number in numbers)

    def _as(self, value: Value, dtype: torch.dtype, before: Node | None, *, clamp: bool = False) -> Value:
        if value.type.dtype == dtype:
            return value
        narrow = _widened(value)
        if narrow is not None and narrow.type.dtype == dtype:
            return narrow
        key = value.name, dtype
        if key not in self.casts:
            weight = self.graph.weight_of(value)
            if weight is not None:
                own = Weight(TensorType(dtype, weight.type.shape), lambda: weight.load().to(dtype))
                name = self.graph.unique(f"{value.name}.{'f16' if dtype == torch.float16 else 'bf16'}")
                self.casts[key] = self.graph.add_weight(name, own)
            else:
                self.casts[key] = self._cast(value, dtype, clamp)
        return self.casts[key]

    def _cast(self, value: Value, dtype: torch.dtype, clamp: bool) -> Value:
        """Behind the node that makes the value; masks of the lowest f32 number become half the lowest of the narrower
        dtype, so that sums with scores do not pass it."""
        maker = value.producer
        before = next(iter(self.graph.nodes), None) if maker is None else maker.following
        origin = ("cast",) if maker is None else (*maker.origin, "cast")
        if clamp and dtype.itemsize < 4:
            ends = torch.finfo(dtype)
            value = self.graph.insert(
                "aten.clamp.default",
                {"self": value, "min": ends.min / 2, "max": ends.max / 2},
                before=before,
                origin=origin,
            ).output
        return self.graph.insert("aten.to.dtype", {"self": value, "dtype": dtype}, before=before, origin=origin).output

    def _report(self, node: Node, wanted: torch.dtype | None) -> None:
        if node.op.rpartition(".")[0] not in _LOW or wanted is None:
            return
        reason = None
        if wanted == torch.float32:
            reason = "kept" if self._is_kept(node) else "of positions alone, or numbers that do not fit"
        precision = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[wanted]
        weight = next((operand for operand in node.operands if self._is_weight(operand)), None)
        module = node.outputs[0].name if weight is None else weight.name.removesuffix(".weight")
        self.context.layers.append(LayerPrecision(module=module, precision=precision, reason=reason))


def _same(a: Any, b: Any) -> bool:
    return all(x is y or (not isinstance(x, Value) and x == y) for x, y in zip(leaves(a), leaves(b), strict=True))


def _widened(value: Value) -> Value | None:
    """What a value holds in fewer bits, none of them lost."""
    node = value.producer
    if node is None or node.op != "aten.to.dtype":
        return None
    source: Value = node.args["self"]
    is_exact = value.type.dtype == torch.float32 and source.type.dtype in _DTYPES.values()
    return source if is_exact else None


def _of_positions(graph: Graph) -> set[Value]:
    """Floats that come from whole numbers, truths and constants alone, and from no table that tokens are looked up in."""
    found: set[Value] = set()
    for node in graph.nodes:
        floats = [operand for operand in node.operands if operand.type.dtype.is_floating_point]
        known = all(operand in found or graph.weight_of(operand) is not None for operand in floats)
        if known and node.op != "aten.embedding.default":
            found.update(value for value in node.outputs if value.type.dtype.is_floating_point)
    return found
