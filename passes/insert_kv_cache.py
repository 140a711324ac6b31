"""A decoder that keeps its keys and values: inputs for those of the past, outputs for those of past and present.

``layout: growing`` puts the new ones behind the past ones, in tensors as long as the text so far::

    %a = graphopt.attention.default(                   %k2 = aten.cat.default(tensors=[%past_key_values.0.key, %k], dim=2)
        q=%q, k=%k, v=%v, key_mask=%mask,     ->       %v2 = aten.cat.default(tensors=[%past_key_values.0.value, %v], dim=2)
        scale=0.125, causal="upper_left")              %a = graphopt.attention.default(q=%q, k=%k2, v=%v2, key_mask=%mask,
                                                           scale=0.125, causal="lower_right")
                                                       output present.0.key = %k2

``layout: static`` writes them into buffers of ``max_length`` positions, for each row of the batch where its text ends::

    %k2 = graphopt.kv_cache_update.default(cache=%past_key_values.0.key, new=%k, starts=%past_lengths)
    %v2 = graphopt.kv_cache_update.default(cache=%past_key_values.0.value, new=%v, starts=%past_lengths)
    %a = graphopt.attention.default(q=%q, k=%k2, v=%v2, starts=%past_lengths, scale=0.125, causal="upper_left")
    output present.0.key = %k2

Nothing knows an architecture. What depends on the tokens is computed for the new ones; what depends on positions and the
padding mask alone is computed for all positions, past ones included, and where it meets tokens the new tokens' part of it is
taken. A token's position is the number of real tokens before it: of a growing cache the padding mask ``[batch, past +
sequence]`` says which are real; the rows of a static one have no padding before their end, so that it needs no mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from graphopt import attentions
from graphopt.dims import Dim, Size, names_of
from graphopt.errors import GraphError
from graphopt.execution import run
from graphopt.ir import Graph, Node, Value, map_arg
from graphopt.parity import Contract
from graphopt.passes.cache_dtype import DTYPES, Kept, calibrated
from graphopt.passes.last_token import LastToken
from graphopt.passes.position_rows import PositionRows
from graphopt.passes.split_encoder import split_encoder
from graphopt.passes.tails import ELEMENTWISE, Tails
from graphopt.passes.whole_texts import following, of_whole_texts
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import RewriteLog
from graphopt.runtime.cache import PAST_EVICTED, PAST_LENGTHS, past_name, present_name, window_length
from graphopt.schemas.calibration import Calibration
from graphopt.schemas.pipeline import Budget, Exact
from graphopt.tensors import DimRange, TensorType

_ORIGIN = ("insert_kv_cache",)
#: Ops whose result at a position depends on other positions.
_ALONG = frozenset(
    f"aten.{name}" for name in ("cumsum", "cumprod", "roll", "flip", "conv1d", "convolution", "sort", "max_pool1d")
)


class InsertKvCache(Pass):
    """Keys and values of earlier tokens come in as inputs and go out as outputs."""

    kind: Literal["insert_kv_cache"] = "insert_kv_cache"
    layout: Literal["growing", "static"] = "growing"
    """``growing``: as long as the text, the names and shapes that optimum has. ``static``: buffers written in place."""
    max_length: PositiveInt | None = None
    """How many positions a static cache has."""
    logits: Literal["all", "last"] = "all"
    """Give logits for every new token, or for the last one of each row."""
    window: bool = False
    """Let layers with a proven sliding window keep only that much, in buffers that do not grow with the text; static only."""
    past: str = "past"
    """The name of the past's length in a growing cache."""
    dtype: Literal["fp32", "fp16", "int8"] | None = None
    """What the cache holds, by default what the model computes in; int8 is scaled by what calibration finds."""
    scales: Literal["head", "channel"] = "channel"
    """A scale for each head, or for each feature of each head; int8 only."""
    calibration: Calibration | None = None
    """What int8 is scaled by."""
    budget: Budget | None = None
    """How far a cache of fewer bits may take the outputs, by default relative 0.01 for fp16 and cosine 0.99 for int8."""

    requires: ClassVar[frozenset[str]] = frozenset({"attention"})
    provides: ClassVar[frozenset[str]] = frozenset({"cache"})

    @model_validator(mode="after")
    def _needs_its_length(self) -> InsertKvCache:
        if self.layout == "static" and self.max_length is None:
            raise ValueError("layout: static needs max_length, the number of positions of the cache")
        if self.layout == "growing" and self.max_length is not None:
            raise ValueError("max_length is for layout: static; a growing cache has no length of its own")
        if self.layout == "growing" and self.window:
            raise ValueError("window is for layout: static; a growing cache keeps everything")
        if (self.dtype == "int8") != (self.calibration is not None):
            raise ValueError("dtype: int8 and calibration: {data: ...} need each other")
        if self.dtype != "int8" and "scales" in self.model_fields_set:
            raise ValueError("scales is for dtype: int8")
        return self

    def contract(self) -> Contract:
        defaults: dict[str | None, Contract] = {
            "fp16": Budget(metric="relative", limit=0.01), "int8": Budget(metric="cosine", limit=0.99),
        }  # fmt: skip
        return self.budget or defaults.get(self.dtype, Exact())

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = RewriteLog()
        dtype = DTYPES[self.dtype] if self.dtype is not None and self.dtype != "int8" else None
        kept = (
            Kept(graph, dtype)
            if self.calibration is None
            else calibrated(graph, context, self.calibration, self.scales)
        )
        insertion = (
            _Growing(graph, kept, self.past)
            if self.max_length is None
            else _Static(graph, kept, self.max_length, has_windows=self.window)
        )
        log.matches["attention"] = insertion.run()
        if self.window:
            log.matches["window"] = insertion.count_windows()
        if self.logits == "last":
            LastToken(graph, insertion.sequence, counted=self.layout == "static").run()
            insertion.order_inputs()
        graph.prune()
        return log


@dataclass
class _Insertion:
    """What both layouts share."""

    graph: Graph
    kept: Kept

    def run(self) -> int:
        graph = self.graph
        nodes = attentions.fused(graph)
        if not nodes:
            raise GraphError("there is no attention that could keep its keys", hint="run fuse_attention before")
        self.sequence = self._sequence(nodes)
        split_encoder(graph, self.sequence)
        self.masks = [graph.value(name) for name in graph.truths if self.sequence in graph.value(name).type.names]
        self.data = self._data()
        self.of_whole = of_whole_texts(self.graph, self.sequence, self.data)
        nodes = [node for node in attentions.fused(graph) if node.args["k"] in self.data or node.args["v"] in self.data]
        self.nodes = nodes
        foreign = next((n for n in attentions.fused(graph) if n.args["causal"] != "none" and n not in nodes), None)
        if foreign is not None:
            raise GraphError("its keys do not come from the tokens", where=foreign.where)
        for node in nodes:
            self._check(node)
        self.new = Dim.named(self.sequence)
        self.place = next(graph.nodes)
        total = self._begin()
        self.tails = Tails(graph, self.sequence, total, self.place, self._whole_input)
        self.rows = self._position_rows()
        for node in list(graph.nodes):
            if node.graph is graph and any(value in self.data for value in node.outputs):
                self._feed(node)
        for index, node in enumerate(nodes):
            self._keep(node, index)
        graph.prune()
        self._swap_masks()
        self.order_inputs()
        return len(nodes)

    # What the layouts differ in

    def _begin(self) -> Size:
        """How many positions there are, past ones included."""
        raise NotImplementedError

    def _whole_input(self, value: Value, type: TensorType) -> Value:
        """The padding mask for all positions."""
        raise NotImplementedError

    def _position_rows(self) -> PositionRows | None:
        """Takes values at each row's own positions; None where all rows have the same."""
        raise NotImplementedError

    def count_windows(self) -> int:
        """How many attentions keep only their window."""
        return 0

    def _attend(self, node: Node) -> None:
        """Give an attention its masks and its bias for the new queries."""
        raise NotImplementedError

    def _keep(self, node: Node, index: int) -> None:
        """Put the past before the keys and values of an attention."""
        raise NotImplementedError

    # Reading the graph

    def _sequence(self, nodes: list[Node]) -> str:
        """The name of the tokens' length: that of every causal attention's queries and keys."""
        odd = next((node for node in nodes if node.args["heads_last"]), None)
        if odd is not None:
            raise GraphError("its heads are last", where=odd.where, hint="put insert_kv_cache before heads_last")
        causal = [node for node in nodes if node.args["causal"] != "none"]
        if not causal:
            raise _not_causal(nodes[0])
        names = {node.args[part].type.shape[2] for node in causal for part in ("q", "k")}
        if len(names) != 1 or not isinstance(size := names.pop(), Dim) or size.name is None:
            raise GraphError("its causal attentions are of several lengths, or of one that is no plain name")
        return size.name

    def _data(self) -> set[Value]:
        """Everything that depends on tokens: on an input along the sequence that is not the padding mask."""
        named = Dim.named(self.sequence)
        along = {value for value in self.graph.inputs.values() if named in value.type.shape}
        return following(self.graph, along - set(self.masks))

    def _check(self, node: Node) -> None:
        args = node.args
        if not all(args[name] in self.data for name in ("q", "k", "v")):
            raise GraphError("its keys do not come from the tokens", where=node.where)
        if args["causal"] == "none":
            raise _not_causal(node)
        for name in ("bias", "key_mask", "segments", "prefix"):
            if args[name] in self.data:
                raise GraphError(
                    f"its {name} depends on the tokens, so it cannot be computed for the past", where=node.where
                )

    # Rewriting it

    def _feed(self, node: Node) -> None:
        """Give a node of the tokens what belongs to the new ones."""
        if node.op == attentions.FUSED and node.args["k"] in self.data:
            self._attend(node)
            return
        self._refuse_mixing(node)
        changed = {
            name: map_arg(arg, lambda leaf: self._of_new(leaf, node) if isinstance(leaf, Value) else leaf)
            for name, arg in node.args.items()
        }
        self.graph.set_args(node, changed)

    def _refuse_mixing(self, node: Node) -> None:
        """What goes along the sequence outside an attention would need a state of its own."""
        if node.op.rpartition(".")[0] in _ALONG:
            shape = next(operand for operand in node.operands if operand in self.data).type.shape
            dims = node.args.get("dim", node.args.get("dims", len(shape) - 1))
            dims = dims if isinstance(dims, tuple) else (dims,)
            if any(isinstance(dim, int) and shape[dim] == self.new for dim in dims):
                raise GraphError(
                    f"{node.op} goes along the tokens: what it gives for new ones depends on those before",
                    where=node.where,
                    hint="a cache holds keys and values only",
                )

    def _of_new(self, value: Value, node: Node) -> Value:
        if value in self.data or not self.tails.depends(value):
            return value
        if value in self.of_whole:
            raise GraphError(
                f"%{value.name} depends on the length of the whole text, so that what was kept of earlier tokens would change",
                where=node.where,
                hint="fix it in the model's config, as rotary frequencies of one kind for all lengths",
            )
        axes = [axis for axis, size in enumerate(value.type.shape) if size == self.new]
        if len(axes) > 1:
            what = f"%{value.name} is of positions by positions and meets tokens outside an attention"
            raise GraphError(what, where=node.where)
        if not axes and any(self.sequence in names_of(size) for size in value.type.shape):
            return value  # as many as there are tokens, in another order than theirs
        if not axes:
            return self.tails.whole(value)
        if self.rows is None:
            return self.tails.last(value, axes[0])
        spreads = node.op.rpartition(".")[0] in ELEMENTWISE
        return self.rows.at(value, axes[0], len((node.output if spreads else value).type.shape))

    def _past(self, node: Node, index: int, positions: Size) -> tuple[Value, Value]:
        """Inputs for the keys and values of an attention's past."""
        pasts = []
        for name, part in (("k", "key"), ("v", "value")):
            batch, heads, _, size = node.args[name].type.shape
            dtype = self.kept.dtype_of(node.args[name])
            type = TensorType(dtype, (batch, heads, positions, size))
            pasts.append(self.graph.add_input(past_name(index, part), type))
        return pasts[0], pasts[1]

    def _present(self, node: Node, index: int, op: str, args: tuple[dict[str, object], dict[str, object]]) -> None:
        """Let an attention see past and new keys and values, and give them out."""
        joined = {}
        for name, part, each in zip(("k", "v"), ("key", "value"), args, strict=True):
            both = self.graph.insert(op, each, before=node, origin=(*node.origin, *_ORIGIN)).output
            self.graph.outputs[present_name(index, part)] = both
            joined[name] = self.kept.read(both, node.args[name], node)
        self.graph.set_args(node, joined)

    def _swap_masks(self) -> None:
        """A padding mask for all positions in the place of the one for new tokens."""
        graph = self.graph
        for mask in self.masks:
            place = list(graph.inputs).index(mask.name)
            whole = self._replacement(mask)
            graph.remove_input(mask)
            if whole is not None:
                graph.rename_input(whole, mask.name)
                graph.truths.add(mask.name)
                names = [name for name in graph.inputs if name != mask.name]
                names.insert(place, mask.name)
                graph.inputs = {name: graph.inputs[name] for name in names}

    def order_inputs(self) -> None:
        """The cache last."""
        graph = self.graph
        last = [name for name in graph.inputs if name.startswith("past_key_values.")]
        graph.inputs = {name: graph.inputs[name] for name in (*(n for n in graph.inputs if n not in last), *last)}

    def _replacement(self, mask: Value) -> Value | None:
        """The input that a padding mask has become."""
        return None


def _not_causal(node: Node) -> GraphError:
    return GraphError(
        "it is not proven to be causal: a token that comes later would change what earlier ones saw",
        where=node.where,
        hint="a cache is for causal models; see graphopt inspect --attention",
    )


@dataclass
class _Growing(_Insertion):
    past: str
    wholes: dict[Value, Value] = field(default_factory=dict)

    def _begin(self) -> Size:
        if self.past in self.graph.dims:
            raise GraphError(f"there is a size named {self.past} already", hint="set past to another name")
        longest = self.graph.dims[self.sequence].max
        self.graph.dims[self.sequence] = DimRange(1, longest)  # a step may have a single token, whatever a text has
        self.graph.dims[self.past] = DimRange(0, None if longest is None else longest - 1)
        return Dim.named(self.past) + self.new

    def _whole_input(self, value: Value, type: TensorType) -> Value:
        self.wholes[value] = self.graph.add_input(self.graph.unique(f"{value.name}.whole"), type)
        return self.wholes[value]

    def _replacement(self, mask: Value) -> Value | None:
        return self.wholes.get(mask)

    def _position_rows(self) -> PositionRows | None:
        """Positions counted along the padding mask; without one they are those of the columns."""
        if len(self.masks) != 1 or len(self.masks[0].type.shape) != 2:
            return None

        def insert(op: str, **args: object) -> Value:
            return self.graph.insert(op, args, before=self.place, origin=_ORIGIN).output

        real = self.tails.whole(self.masks[0])
        if real.type.dtype != torch.int64:
            real = insert("aten.to.dtype", self=real, dtype=torch.int64)
        counted = insert("aten.cumsum.default", self=real, dim=1)
        own = insert("aten.slice.Tensor", self=counted, dim=1, start=self.tails.start, end=self.tails.total)
        before = insert("aten.sub.Tensor", self=own, other=1)
        return PositionRows(
            self.tails, insert("aten.clamp.default", self=before, min=0), following(self.graph, self.masks)
        )

    def _attend(self, node: Node) -> None:
        names = ("key_mask", "kv_lengths", "segments", "prefix")
        changed = {name: self.tails.whole(node.args[name]) for name in names if node.args[name] is not None}
        bias = node.args["bias"]
        if bias is not None:
            row = len(bias.type.shape) - 2
            changed["bias"] = self.tails.last(bias, row) if row >= 0 else self.tails.whole(bias)
        self.graph.set_args(node, changed)

    def _keep(self, node: Node, index: int) -> None:
        pasts = self._past(node, index, Dim.named(self.past))
        new = [self.kept.stored(node.args[name], node) for name in "kv"]
        cats = tuple({"tensors": both, "dim": 2} for both in zip(pasts, new, strict=True))
        self._present(node, index, "aten.cat.default", (cats[0], cats[1]))
        self.graph.set_args(node, {"causal": "lower_right"})


@dataclass
class _Static(_Insertion):
    max_length: int
    has_windows: bool = False
    chunks: dict[Node, int] = field(default_factory=dict)

    def _data(self) -> set[Value]:
        bounds = self.graph.dims[self.sequence]
        if bounds.max is not None and self.max_length > bounds.max:
            raise GraphError(
                f"a cache of {self.max_length} positions is longer than the model's {bounds.max}",
                hint=f"set max_length to {bounds.max} at most, or give {self.sequence} a wider range in dims",
            )
        return super()._data()

    def _begin(self) -> Size:
        self.graph.dims[self.sequence] = DimRange(1, self.max_length)  # a step may have a single token
        lengths = TensorType(torch.int64, (self._batch(),))
        self.starts = self.graph.add_input(PAST_LENGTHS, lengths)
        self.window = self._window_of(self.nodes)
        if self.window is not None:
            evicted = self.graph.add_input(PAST_EVICTED, lengths)
            args = {"self": self.starts, "other": evicted}
            self.window_starts = self.graph.insert("aten.sub.Tensor", args, before=self.place, origin=_ORIGIN).output
        return self.max_length

    def _window_of(self, nodes: list[Node]) -> int | None:
        """How many positions the widest window has that is worth a shorter buffer."""
        windows = [node.args["window_left"] + 1 for node in nodes if self._has_window(node)]
        widest = max(windows, default=0)
        return widest if widest and window_length(widest) < self.max_length else None

    def _has_window(self, node: Node) -> bool:
        """A window, and nothing that would need a key's place in the whole text."""
        args = node.args
        return bool(self.has_windows and args["window_left"] >= 0 and not args["chunk"] and args["bias"] is None)

    def _batch(self) -> Size:
        """The first size of the tokens."""
        tokens = next(value for value in self.graph.inputs.values() if value in self.data)
        return tokens.type.shape[0]

    def _whole_input(self, value: Value, type: TensorType) -> Value:
        """All ones: what a token sees ends with itself, and before the end of a row there is no padding."""
        args = {"size": type.shape, "fill_value": 1, "dtype": type.dtype}
        return self.graph.insert("aten.full.default", args, before=self.place, origin=_ORIGIN).output

    def _position_rows(self) -> PositionRows | None:
        def insert(op: str, **args: object) -> Value:
            return self.graph.insert(op, args, before=self.place, origin=_ORIGIN).output

        own = insert("aten.arange.start_step", start=0, end=self.new, step=1, dtype=torch.int64)
        column = insert("aten.unsqueeze.default", self=self.starts, dim=1)
        return PositionRows(self.tails, insert("aten.add.Tensor", self=column, other=own), set())

    def _check(self, node: Node) -> None:
        super()._check(node)
        for name in ("prefix", "kv_lengths"):
            if node.args[name] is not None:
                raise GraphError(f"its {name} belong to a whole text", where=node.where, hint="take layout: growing")
        mask = node.args["key_mask"]
        if mask is not None and not self._without_padding(mask).all():
            raise GraphError(f"%{mask.name} hides keys where there is no padding", where=node.where)
        if node.args["segments"] is not None:
            chunk = self._chunk(node)
            if chunk is None:
                raise GraphError(
                    "its segments are no chunks of one length", where=node.where, hint="take layout: growing"
                )
            self.chunks[node] = chunk

    def _chunk(self, node: Node) -> int | None:
        """The length of the chunks that segments are in a text without padding."""
        numbers = self._without_padding(node.args["segments"])[0].to(torch.int64)
        changes = (numbers.diff() != 0).nonzero()
        length = int(changes[0]) + 1 if len(changes) else self.max_length
        return length if torch.equal(numbers - numbers[0], torch.arange(self.max_length) // length) else None

    def _without_padding(self, value: Value) -> Tensor:
        """What a value that follows the padding mask is for a text of the cache's length."""
        graph = self.graph.clone()
        graph.outputs = {"value": graph.value(value.name)}
        graph.prune()
        for unused in [unused for unused in graph.inputs.values() if not unused.users]:
            graph.remove_input(unused)
        sizes = {name: self.max_length if name == self.sequence else max(1, b.min) for name, b in graph.dims.items()}
        types = {name: mask.type.concrete(sizes) for name, mask in graph.inputs.items()}
        return run(graph, {name: torch.ones(*type.shape, dtype=type.dtype) for name, type in types.items()})["value"]  # type: ignore[arg-type]  # numbers

    def _attend(self, node: Node) -> None:
        changed: dict[str, object] = {"key_mask": None, "starts": self._starts_of(node), "causal": "upper_left"}
        if node.args["segments"] is not None:
            changed |= {"segments": None, "chunk": self.chunks[node]}
        bias = node.args["bias"]
        if bias is not None:
            row = len(bias.type.shape) - 2
            queries = row >= 0 and bias.type.shape[row] == self.new
            assert self.rows is not None
            changed["bias"] = self.rows.at(bias, row, 4) if queries else self.tails.whole(bias)
        self.graph.set_args(node, changed)

    def count_windows(self) -> int:
        return 0 if self.window is None else sum(map(self._has_window, self.nodes))

    def _starts_of(self, node: Node) -> Value:
        """Where new tokens begin in the buffers of an attention."""
        return self.starts if self.window is None or not self._has_window(node) else self.window_starts

    def _keep(self, node: Node, index: int) -> None:
        length = self.max_length if self.window is None or not self._has_window(node) else window_length(self.window)
        pasts = self._past(node, index, length)
        args: list[dict[str, object]] = [
            {"cache": past, "new": self.kept.stored(node.args[name], node), "starts": self._starts_of(node)}
            for past, name in zip(pasts, "kv", strict=True)
        ]
        self._present(node, index, "graphopt.kv_cache_update.default", (args[0], args[1]))
