"""One spelling for each op: what the importer and ``canonicalize`` turn equal forms into, so that patterns see one.

- no-ops vanish: dropout in evaluation, ``to`` the same dtype, ``contiguous``, ``clone``, a slice of everything, ...
- ``view``, ``flatten``, ``squeeze`` ... of any overload become ``aten.reshape.default`` with every size explicit
- casts of any overload become ``aten.to.dtype``
- axes are counted from the front; slices have explicit ends
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.dims import Size
from graphopt.ir import Value
from graphopt.tensors import TensorType

INT_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Call:
    """An op with its bound arguments."""

    op: str
    args: Mapping[str, Any]


Form = Callable[[Mapping[str, Any], tuple[TensorType, ...]], "Call | Value | None"]


def normalize(op: str, args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call | Value:
    """The normal form of a bound call with results of these types: another call, or the value it merely repeats."""
    namespace, name, overload = op.split(".")
    args = _front_axes(name, args)
    form = _FORMS.get(f"{name}.{overload}") or _FORMS.get(name)
    if namespace == "aten" and form is not None:
        result = form(args, types)
        if result is not None:
            return result
    return Call(op, args)


def is_assertion(op: str) -> bool:
    """Ops that check and compute nothing."""
    return op.split(".")[1] in ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")


def _front_axes(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Negative axes counted from the front."""
    first = args.get("self", args.get("input", args.get("tensors")))
    if isinstance(first, tuple):
        first = max(first, key=lambda tensor: len(tensor.type.shape), default=None)
    if not isinstance(first, Value):
        return dict(args)
    rank = len(first.type.shape) + (name in ("unsqueeze", "stack"))

    def front(axis: Any) -> Any:
        if isinstance(axis, tuple):
            return tuple(map(front, axis))
        return axis + rank if type(axis) is int and axis < 0 else axis

    return {key: front(arg) if key in ("dim", "dim0", "dim1", "dims") else arg for key, arg in args.items()}


def _operand(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Value:
    found = args["self"] if "self" in args else args["input"]
    assert isinstance(found, Value)
    return found


def _dropout(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Value | None:
    return _operand(args, types) if args["train"] is False or args["p"] == 0 else None


def _cast(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call | Value:
    operand = _operand(args, types)
    if operand.type == types[0]:
        return operand
    return Call("aten.to.dtype", {"self": operand, "dtype": types[0].dtype})


def _reshape(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call | Value:
    operand = _operand(args, types)
    if operand.type == types[0]:
        return operand
    return Call("aten.reshape.default", {"self": operand, "shape": types[0].shape})


def _expand(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call | Value:
    operand = _operand(args, types)
    if operand.type == types[0]:
        return operand
    return Call("aten.expand.default", {"self": operand, "size": types[0].shape})


def _slice(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call | Value:
    operand = _operand(args, types)
    if operand.type == types[0] and args["step"] == 1:
        return operand
    size = operand.type.shape[args["dim"]]

    def bound(end: Any, otherwise: Size) -> Size:
        if end is None or (isinstance(end, int) and end >= INT_MAX):
            return otherwise
        if isinstance(end, int) and end < 0:
            from_end: Size = size + end
            return max(from_end, 0) if isinstance(from_end, int) else from_end
        known: Size = end
        return min(known, size) if isinstance(known, int) and isinstance(size, int) else known  # torch clips

    return Call("aten.slice.Tensor", {**args, "start": bound(args["start"], 0), "end": bound(args["end"], size)})


def _transpose(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call:
    rank = len(_operand(args, types).type.shape)
    pair = (args.get("dim0", rank - 2), args.get("dim1", rank - 1))
    return Call("aten.transpose.int", {"self": args["self"], "dim0": min(pair), "dim1": max(pair)})


def _permute(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call | Value:
    """A permutation that only swaps two axes is a transpose; one that moves nothing is nothing."""
    moved = [axis for axis, source in enumerate(args["dims"]) if axis != source]
    if not moved:
        return _operand(args, types)
    if len(moved) == 2:
        return Call("aten.transpose.int", {"self": args["self"], "dim0": moved[0], "dim1": moved[1]})
    return Call("aten.permute.default", args)


def _renamed(op: str) -> Form:
    def form(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call | None:
        return Call(f"aten.{op}", args)

    return form


def _size_of_like(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call | None:
    """``new_full``, ``ones_like`` ... : a full tensor needs no other tensor."""
    return Call(
        "aten.full.default", {"size": types[0].shape, "fill_value": args["fill_value"], "dtype": types[0].dtype}
    )


def _filled(number: int) -> Form:
    return lambda args, types: _size_of_like({"fill_value": number}, types)


def _arange(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call:
    return Call(
        "aten.arange.start_step",
        {"start": args.get("start", 0), "end": args["end"], "step": args.get("step", 1), "dtype": types[0].dtype},
    )


def _cat(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call | Value:
    """Empty tensors add nothing; torch lets them be of one dimension beside others of more."""
    axis = args["dim"]
    kept = tuple(t for t in args["tensors"] if t.type.shape != (0,) and t.type.shape[axis] != 0)
    if len(kept) == 1 and kept[0].type == types[0]:
        only: Value = kept[0]
        return only
    return Call("aten.cat.default", {**args, "tensors": kept or args["tensors"]})


def _layer_norm(args: Mapping[str, Any], types: tuple[TensorType, ...]) -> Call:
    return Call("aten.layer_norm.default", {**args, "cudnn_enable": True})  # says nothing about the result


_FORMS: dict[str, Form] = {
    "layer_norm": _layer_norm,
    **dict.fromkeys(("alias", "detach", "contiguous", "clone", "lift_fresh_copy", "lift_fresh"), _operand),
    "dropout": _dropout,
    "to": _cast,
    "_to_copy": _cast,
    "type_as": _cast,
    **dict.fromkeys(
        (
            "view.default",
            "_unsafe_view",
            "reshape",
            "flatten.using_ints",
            "unflatten.int",
            "squeeze",
            "view_as",
            "reshape_as",
        ),
        _reshape,
    ),
    "expand": _expand,
    "expand_as": _expand,
    "slice": _slice,
    "transpose.int": _transpose,
    "t": _transpose,
    "numpy_T": lambda args, types: _transpose(args, types) if len(_operand(args, types).type.shape) == 2 else None,
    "permute": _permute,
    "multiply.Tensor": _renamed("mul.Tensor"),
    "min.other": _renamed("minimum.default"),
    "max.other": _renamed("maximum.default"),
    "scalar_tensor": lambda args, types: _size_of_like({"fill_value": args["s"]}, types),
    "__and__.Tensor": _renamed("bitwise_and.Tensor"),
    "__or__.Tensor": _renamed("bitwise_or.Tensor"),
    "__xor__.Tensor": _renamed("bitwise_xor.Tensor"),
    **dict.fromkeys(("full", "full_like", "new_full"), _size_of_like),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(0)),
    **dict.fromkeys(("empty", "empty_like", "new_empty"), _filled(0)),  # what they hold means nothing
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    "arange": _arange,
    "cat.default": _cat,
}
