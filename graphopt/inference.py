"""Types of results, derived from torch's own shape functions: symbolically for new nodes, at given sizes to check them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy import functions as sympy_functions

from graphopt import operators
from graphopt.dims import Dim, Size, floordiv, maximum, minimum, mod, names_of
from graphopt.errors import GraphError
from graphopt.ir import Value, leaves, map_arg
from graphopt.tensors import TensorType

#: Sizes for the hints of symbolic inference: distinct, and larger than constants that occur as sizes in small graphs.
_HINTS = (1009, 2003, 4001, 8009, 16001, 32003, 64007)
_inferred: dict[Any, tuple[TensorType, ...]] = {}
_derived: dict[Any, tuple[TensorType, ...]] = {}


def _signature(op: str, args: Mapping[str, Any]) -> Any:
    """What the types of the results depend on: op, operands' types, other arguments."""

    def key(leaf: Any) -> Any:
        return leaf.type if isinstance(leaf, Value) else (type(leaf), leaf)

    return op, tuple((name, map_arg(arg, key)) for name, arg in args.items())


def infer(op: str, args: Mapping[str, Any]) -> tuple[TensorType, ...]:
    """Types of the results of a bound call, sizes as expressions. GraphError if the op does not take these operands."""
    signature = _signature(op, args)
    if signature not in _inferred:
        _inferred[signature] = _infer(op, args)
    return _inferred[signature]


def _infer(op: str, args: Mapping[str, Any]) -> tuple[TensorType, ...]:
    names = sorted(set().union(*(_names(leaf) for arg in args.values() for leaf in leaves(arg))))
    shapes = ShapeEnv()
    symbols: dict[str, Any] = {}
    for name, hint in zip(names, _HINTS * (1 + len(names) // len(_HINTS)), strict=False):
        source = ConstantSource(name)
        symbol = shapes.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        symbols[name] = shapes.create_symintnode(symbol, hint=hint, source=source)
    meaning = {str(symint.node.expr): Dim.named(name) for name, symint in symbols.items()}

    def fake(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return torch.empty([_evaluate(size, symbols) for size in leaf.type.shape], dtype=leaf.type.dtype)
        return _evaluate(leaf, symbols)

    modes = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=False), enable_python_dispatcher()
    with modes[0], modes[1], silent_logging(), torch.no_grad():
        try:
            results = operators.shapes_of(op, {name: map_arg(arg, fake) for name, arg in args.items()}, "cpu")
        except Exception as error:
            operands = ", ".join(f"{n}={map_arg(a, _show)}" for n, a in args.items())
            raise GraphError(f"{op}({operands}) has no type: {str(error).splitlines()[0]}") from error
    if shapes.replacements:
        equal = "; ".join(f"{meaning.get(str(a), a)} == {b}" for a, b in shapes.replacements.items())
        raise GraphError(f"{op} works only at sizes where {equal}", hint="the operands' shapes do not fit in general")
    found = tuple(
        TensorType(result.dtype, tuple(size_from_torch(size, meaning) for size in result.shape)) for result in results
    )
    return (_cut(args, found[0]),) if op == "aten.slice.Tensor" else found


def _cut(args: Mapping[str, Any], found: TensorType) -> TensorType:
    """A slice of a table up to a named size, which the table holds: the hint of that size is larger than tables are."""
    source, axis, end = args["self"], args["dim"], args["end"]
    is_table = isinstance(source, Value) and isinstance(source.type.shape[axis], int)
    if not (is_table and isinstance(end, Dim) and args["start"] in (0, None)):
        return found
    if args["step"] != 1 or not isinstance(found.shape[axis], int):
        return found
    shape = list(found.shape)
    shape[axis] = end
    return TensorType(found.dtype, tuple(shape))


def rederive(op: str, args: Mapping[str, Any], env: Mapping[str, int]) -> tuple[TensorType, ...]:
    """Types of the results at concrete sizes, computed on meta tensors."""

    def concrete(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return leaf.type.concrete(env)
        return leaf.evaluate(env) if isinstance(leaf, Dim) else leaf

    bound = {name: map_arg(arg, concrete) for name, arg in args.items()}
    signature = op, tuple((name, map_arg(arg, lambda leaf: (type(leaf), leaf))) for name, arg in bound.items())
    if signature not in _derived:

        def meta(leaf: Any) -> Any:
            if not isinstance(leaf, TensorType):
                return leaf
            return torch.empty(cast("tuple[int, ...]", leaf.shape), dtype=leaf.dtype, device="meta")

        with torch.no_grad():
            results = operators.shapes_of(op, {name: map_arg(arg, meta) for name, arg in bound.items()}, "meta")
        _derived[signature] = tuple(TensorType(r.dtype, tuple(r.shape)) for r in results)
    return _derived[signature]


def size_from_torch(size: Any, meaning: Mapping[str, Size]) -> Size:
    """An int or SymInt of a trace as a Size; ``meaning`` gives each torch symbol's size. GraphError if it has no form."""
    if isinstance(size, int):
        return size
    return from_sympy(size.node.expr, meaning)


def from_sympy(expr: sympy.Expr, meaning: Mapping[str, Size]) -> Size:
    """torch's sympy expression of a size as a Size."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        if str(expr) not in meaning:
            raise GraphError(f"the size {expr} depends on data, not on the inputs' shapes")
        return meaning[str(expr)]
    parts = [from_sympy(arg, meaning) if not arg.is_Rational or arg.is_Integer else arg for arg in expr.args]
    fold: Any = _FOLDS.get(expr.func.__name__)
    if isinstance(expr, sympy.Mul) and any(isinstance(part, sympy.Rational) for part in parts):
        ratio = next(part for part in parts if isinstance(part, sympy.Rational))
        rest: Size = int(ratio.p)
        for part in parts:
            rest = rest if part is ratio else rest * part
        result: Size = floordiv(rest, int(ratio.q))
        return result
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and int(expr.exp) > 0:
        result = 1
        for _ in range(int(expr.exp)):
            result = result * parts[0]
        return result
    if fold is None or any(isinstance(part, sympy.Expr) for part in parts):
        raise GraphError(f"the size {expr} has no form in a graph")
    total = parts[0]
    for part in parts[1:]:
        total = fold(total, part)
    return total


_FOLDS = {
    "Add": lambda a, b: a + b,
    "Mul": lambda a, b: a * b,
    "Mod": mod,
    "Max": maximum,
    "Min": minimum,
    **{f.__name__: floordiv for f in (sympy_functions.FloorDiv, sympy_functions.CleanDiv, sympy_functions.IntTrueDiv)},
    sympy_functions.PythonMod.__name__: mod,
}


def _names(leaf: Any) -> frozenset[str]:
    return leaf.type.names if isinstance(leaf, Value) else names_of(leaf)


def _evaluate(leaf: Any, env: Mapping[str, Any]) -> Any:
    return leaf.evaluate(env) if isinstance(leaf, Dim) else leaf


def _show(leaf: Any) -> Any:
    return str(leaf.type) if isinstance(leaf, Value) else leaf


@contextlib.contextmanager
def silent_logging() -> Iterator[None]:
    """torch logs what fails before it raises; the error we raise says it once."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
