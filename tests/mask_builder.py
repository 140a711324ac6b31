"""What the tests of masks share: graphs of masks, and a claim held against the evaluated mask by other means than graphopt's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from graphopt import operators
from graphopt.dims import Dim, Size, evaluate, names_of
from graphopt.execution import run
from graphopt.inference import rederive
from graphopt.ir import Graph, Value, leaves
from graphopt.masks import Keys, Mask, Unproven, prove
from graphopt.tensors import DimRange, TensorType, Weight

LOWEST = torch.finfo(torch.float32).min
LOWEST_HALF = torch.finfo(torch.float16).min
OLD_LOW = -10000.0  # of older models


class Builder:
    """A graph of masks for ``queries`` x ``keys`` positions: sizes by name (``past + queries``), or numbers. ``least`` is the
    minimum of those that are named, but for the batch's."""

    def __init__(
        self, queries: str | int = "queries", keys: str | int = "keys", least: int = 1, batch: str | int = "batch"
    ) -> None:
        self.graph = Graph()
        self.batch, self.queries, self.keys = (Dim.parse(str(size)) for size in (batch, queries, keys))
        names = [names_of(size) for size in (self.batch, self.queries, self.keys)]
        self.sizes = list(dict.fromkeys(name for found in names for name in sorted(found)))
        self.graph.dims = {name: DimRange(1 if name == batch else least) for name in self.sizes}
        self.least = least
        self.graph.add_input("x", TensorType(torch.float32, (self.batch, self.queries, self.keys)))
        for name in set(self.sizes) - {batch, queries, keys}:
            self.graph.add_input(name, TensorType(torch.float32, (Dim.named(name),)))
        self.mask = self.input("mask", torch.bool)
        self.other = self.input("other", torch.bool)
        self.numbers = self.input("numbers", torch.int64)

    def input(self, name: str, dtype: torch.dtype, shape: tuple[Size, ...] | None = None) -> Value:
        """An input, ``[batch, keys]`` unless given; the one of this name if there is one."""
        if name in self.graph.inputs:
            return self.graph.inputs[name]
        return self.graph.add_input(name, TensorType(dtype, (self.batch, self.keys) if shape is None else shape))

    def each(self, name: str, dtype: torch.dtype = torch.int64) -> Value:
        """An input of one number for each batch, ``[batch, 1, 1, 1]``."""
        return self.unsqueeze(self.input(name, dtype, (self.batch,)), 1, 1, 1)

    def table(self, tensor: Tensor) -> Value:
        return self.graph.add_weight(self.graph.unique("table"), Weight.of(tensor))

    def op(self, name: str, /, **args: Any) -> Value:
        node = self.graph.insert(f"aten.{name}", args, _types_of(f"aten.{name}", args))
        return node.output

    def arange(self, end: Size, start: Size = 0, dtype: torch.dtype = torch.int64) -> Value:
        return self.op("arange.start_step", start=start, end=end, dtype=dtype)

    def full(self, number: Any, dtype: torch.dtype = torch.float32, *shape: Size) -> Value:
        return self.op("full.default", size=shape, fill_value=number, dtype=dtype)

    def unsqueeze(self, value: Value, *axes: int) -> Value:
        for axis in axes:
            value = self.op("unsqueeze.default", self=value, dim=axis)
        return value

    def key(self, start: Size = 0, dtype: torch.dtype = torch.int64) -> Value:
        return self.arange(self.keys + start, start, dtype)

    def query(self, start: Size = 0, dtype: torch.dtype = torch.int64) -> Value:
        return self.unsqueeze(self.arange(self.queries + start, start, dtype), 1)

    def compare(self, relation: str, a: Value, b: Any) -> Value:
        overload = "Tensor" if isinstance(b, Value) else "Scalar"
        return self.op(f"{relation}.{overload}", self=a, other=b)

    def both(self, a: Value, b: Value) -> Value:
        return self.op("bitwise_and.Tensor", self=a, other=b)

    def either(self, a: Value, b: Value) -> Value:
        return self.op("bitwise_or.Tensor", self=a, other=b)

    def negate(self, a: Value) -> Value:
        return self.op("bitwise_not.default", self=a)

    def add(self, a: Value, b: Any) -> Value:
        return self.op("add.Tensor" if isinstance(b, Value) else "add.Scalar", self=a, other=b)

    def minus(self, a: Value, b: Any) -> Value:
        return self.op("sub.Tensor" if isinstance(b, Value) else "sub.Scalar", self=a, other=b)

    def times(self, a: Value, b: Any) -> Value:
        return self.op("mul.Tensor" if isinstance(b, Value) else "mul.Scalar", self=a, other=b)

    def cast(self, a: Value, dtype: torch.dtype) -> Value:
        return self.op("to.dtype", self=a, dtype=dtype)

    def slice(self, a: Value, dim: int, start: Size, end: Size) -> Value:
        """``end`` is taken to be within the tensor, which no shape function could know of a constant table."""
        shape = (*a.type.shape[:dim], end - start, *a.type.shape[dim + 1 :])
        args = {"self": a, "dim": dim, "start": start, "end": end}
        return self.graph.insert("aten.slice.Tensor", args, [TensorType(a.type.dtype, shape)]).output

    def turned(self, a: Value) -> Value:
        """The last two axes swapped."""
        rank = len(a.type.shape)
        return self.op("transpose.int", self=a, dim0=rank - 2, dim1=rank - 1)

    def gather(self, a: Value, *indices: Value | None) -> Value:
        return self.op("index.Tensor", self=a, indices=indices)

    # Structures

    def causal(self) -> Value:
        return self.compare("le", self.key(), self.query())

    def lower_right(self) -> Value:
        return self.compare("le", self.key(), self.add(self.query(), self.keys - self.queries))

    def distance(self) -> Value:
        """Query minus key."""
        return self.minus(self.query(), self.key())

    def window(self, reach: Size) -> Value:
        """Keys at most so far before the query."""
        return self.compare("le", self.distance(), reach)

    def near(self, reach: int) -> Value:
        return self.compare("le", self.op("abs.default", self=self.distance()), reach)

    def divided(self, a: Value, by: int = 3) -> Value:
        return self.op("floor_divide.Scalar", self=a, other=by)

    def chunked(self, length: int = 3, start: Size = 0) -> Value:
        """Keys of the query's chunk; the first chunk lacks its ``start`` first positions."""
        return self.compare("eq", self.divided(self.key(start), length), self.divided(self.query(start), length))

    def same(self, row: Value) -> Value:
        """Where a row ``[batch, keys]`` has the same number at the query and at the key (of as many of both)."""
        return self.compare("eq", self.at_query(row), self.padding(row))

    def packed(self) -> Value:
        return self.same(self.input("segments", torch.int64))

    def numbered(self, positions: Value) -> Value:
        """Numbers of packed sequences from positions that begin anew: as transformers counts them."""
        first = self.minus(self.slice(positions, 1, 0, 1), 1)
        steps = self.op("diff.default", self=positions, prepend=first, dim=1)
        return self.op("cumsum.default", self=self.compare("ne", steps, 1), dim=1)

    def shorter(self) -> Value:
        """Keys before a length for each batch."""
        return self.compare("lt", self.key(), self.each("lengths"))

    def cut(self, table: Tensor, row: Size = 0, column: Size = 0) -> Value:
        """A part of a constant table ``[..., N, M]`` for these queries and keys."""
        rank = table.dim()
        rows = self.slice(self.table(table), rank - 2, row, row + self.queries)
        return self.slice(rows, rank - 1, column, column + self.keys)

    def padding(self, mask: Value | None = None) -> Value:
        """``[batch, 1, 1, keys]``."""
        return self.unsqueeze(self.mask if mask is None else mask, 1, 1)

    def at_query(self, row: Value) -> Value:
        """``[batch, keys]`` as ``[batch, 1, keys, 1]``."""
        return self.unsqueeze(row, 1, 3)

    def ones(self, dtype: torch.dtype = torch.bool) -> Value:
        return self.full(1, dtype, self.queries, self.keys)

    def added(self, hidden: Value, low: float = -math.inf) -> Value:
        """A float mask from a bool one that says which keys are hidden."""
        zeros = self.full(0.0, torch.float32, self.queries, self.keys)
        return self.op("masked_fill.Scalar", self=zeros, mask=hidden, value=low)

    def inverted(self, condition: Value, low: float = LOWEST) -> Value:
        """``(1 - mask) * low``."""
        return self.times(self.op("rsub.Scalar", self=self.cast(condition, torch.float32), other=1.0), low)

    def prove(self, *values: Value) -> Mask | Unproven:
        return prove(self.graph, values, self.queries, self.keys)


_PROBE = {"batch": 1009, "queries": 2003, "keys": 4001, "sequence": 8009, "past": 16001}


def _types_of(op: str, args: Mapping[str, Any]) -> list[TensorType] | None:
    """Types of results from their sizes at one point, where these are sizes of the operands: random masks are made of so
    many nodes that inference would take most of the time."""
    found = list(leaves(tuple(args.values())))
    sizes = [size for leaf in found for size in (leaf.type.shape if isinstance(leaf, Value) else (leaf,))]
    known = {evaluate(size, _PROBE): size for size in sizes if isinstance(size, Dim)}
    types = []
    for concrete in rederive(op, operators.bind(op, (), args), _PROBE):
        shape = tuple(known.get(size, size) for size in concrete.shape)
        if any(isinstance(size, int) and size > 1000 for size in shape):
            return None
        types.append(TensorType(concrete.dtype, shape))
    return types


Build: TypeAlias = Callable[[Builder], Value]
SIZES = (
    {"batch": 2, "queries": 4, "keys": 6},
    {"batch": 3, "queries": 7, "keys": 5},
    {"batch": 1, "queries": 1, "keys": 1},
)


# A claim against the evaluated mask, by other means than graphopt's

#: Integers that half and single precision round to their neighbour, beside small ones.
LARGE = torch.tensor([-1, 0, 1, 2, 2048, 2049, 1 << 24, (1 << 24) + 1])


def inputs_at(builder: Builder, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Inputs of random truths and numbers: of both signs at every second seed, large integers at every fifth."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, value in builder.graph.inputs.items():
        dtype = value.type.dtype
        shape = [int(size) for size in value.type.concrete(sizes).shape]  # type: ignore[arg-type]
        if dtype == torch.bool or name in builder.graph.truths:
            made[name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
        elif dtype in (torch.int32, torch.int64) and seed % 5 == 4:
            made[name] = LARGE[torch.randint(0, len(LARGE), shape, generator=generator)].to(dtype)
        else:
            least, most = -2 * (seed % 2) * dtype.is_signed, 3 + 4 * (seed % 3 == 0)
            made[name] = torch.randint(least, most + 1, shape, generator=generator).to(dtype)
    return made


def evaluated(
    builder: Builder, values: Sequence[Value], inputs: Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The masks and every inner value, run."""
    seen = {**inputs, **{name: weight.load() for name, weight in builder.graph.weights.items()}}
    builder.graph.outputs = {f"mask {i}": value for i, value in enumerate(values)}
    out = run(builder.graph, inputs, tap=lambda inner, tensor: seen.__setitem__(inner.name, tensor))
    return list(out.values()), seen


def visible_keys(mask: Tensor) -> Tensor:
    """Which keys a mask shows; each element must either add nothing or hide its key."""
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= OLD_LOW
    assert bool(((mask == 0) | hidden).all()), f"it adds {mask}"
    return ~hidden


def claimed_keys(claim: Mask, seen: Mapping[str, Tensor], batch: int, queries: int, keys: int) -> Tensor:
    """What a claim says, ``[batch, 1, queries, keys]``: a band cut out of a table of ones, then row by row."""

    def rows(value: Value) -> list[list[Any]]:
        tensor = seen[value.name]
        assert tensor.numel() in (keys, batch * keys), f"%{value.name} is {list(tensor.shape)}, not of all keys"
        return tensor.reshape(-1, keys).expand(batch, keys).tolist()

    def truths(which: Keys) -> Tensor:
        return torch.tensor([[(n == 0) == which.where_zero for n in row] for row in rows(which.value)])

    band = torch.ones(queries, keys)
    shift = keys - queries if claim.causal == "lower_right" else 0
    assert claim.causal in ("none", "upper_left", "lower_right")
    if claim.causal != "none":
        band = band.tril(shift)
    if claim.window_left >= 0:
        band = band.triu(shift - claim.window_left)
    if claim.window_right >= 0:
        band = band.tril(shift + claim.window_right)
    found = band.bool().expand(batch, queries, keys).clone()
    if isinstance(claim.prefix, int):
        found[:, :, : claim.prefix] = True
    elif claim.prefix is not None:
        found |= truths(claim.prefix)[:, None]
    if claim.chunk:
        chunks = [torch.arange(size).div(claim.chunk).trunc() for size in (queries, keys)]
        found &= chunks[0][:, None] == chunks[1]
    if claim.segments is not None:
        assert queries == keys
        numbers = truths(claim.segments).tolist() if isinstance(claim.segments, Keys) else rows(claim.segments)
        found &= torch.tensor([[[a == b for b in row] for a in row] for row in numbers])
    for each in claim.keys:
        found &= truths(each)[:, None]
    return found[:, None]


def assert_true(
    builder: Builder, values: Value | Sequence[Value], claim: Mask, sizes: Mapping[str, int], seed: int,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """The claim about one mask or several holds elementwise at these sizes, for random inputs or those that are given."""
    given = {**inputs_at(builder, sizes, seed), **(inputs or {})}
    masks, seen = evaluated(builder, [values] if isinstance(values, Value) else values, given)
    batch, queries, keys = given["x"].shape
    heads = max(mask.shape[-3] if mask.dim() > 2 else 1 for mask in masks)
    expected = claimed_keys(claim, seen, batch, queries, keys).expand(batch, heads, queries, keys)
    got = torch.stack([visible_keys(mask).expand(batch, heads, queries, keys) for mask in masks]).all(0)
    assert torch.equal(got, expected), (
        f"claimed {claim}, but at {dict(sizes)} with {given} it is\n{got.int()}\nnot\n{expected.int()}\n{builder.graph}"
    )


def form(claim: Mask) -> tuple[Any, ...]:
    """A claim, whatever tensors it names."""
    prefix = claim.prefix.where_zero if isinstance(claim.prefix, Keys) else claim.prefix
    keys = sorted(each.where_zero for each in claim.keys)
    band = claim.causal, claim.window_left, claim.window_right, claim.chunk
    return *band, type(claim.prefix), prefix, keys, claim.segments is not None


def check(
    build: Build, expected: Mask | str, queries: str | int = "queries", keys: str | int = "keys",
    sizes: Sequence[Mapping[str, int]] = SIZES,
) -> None:  # fmt: skip
    """``prove`` says ``expected``: a mask, which must be true as well, or the reason why not."""
    builder = Builder(queries, keys)
    value = build(builder)
    found = builder.prove(value)
    if isinstance(expected, str):
        assert found == Unproven(expected), found
        return
    assert isinstance(found, Mask), found
    assert form(found) == form(expected), f"proven {found}, not {expected}"
    for seed, at in enumerate(sizes):
        for more in (0, 1):
            assert_true(
                builder, value, found, {name: at.get(name, at["keys"]) for name in builder.sizes}, 2 * seed + more
            )


def never_wrong(
    build: Build, queries: str | int = "queries", keys: str | int = "keys", sizes: Sequence[Mapping[str, int]] = SIZES,
    inputs: Callable[[Builder, Mapping[str, int]], Mapping[str, Tensor]] | None = None,
) -> None:  # fmt: skip
    """Whatever is claimed is true, if anything is."""
    builder = Builder(queries, keys)
    value = build(builder)
    found = builder.prove(value)
    for seed, at in enumerate(sizes if isinstance(found, Mask) else ()):
        named = {name: at.get(name, at["keys"]) for name in builder.sizes}
        assert isinstance(found, Mask)
        assert_true(builder, value, found, named, seed, inputs and inputs(builder, named))


SOME = Value("some", TensorType(torch.bool, ()), None)  # stands for "a tensor" in what is expected
