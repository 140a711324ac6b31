"""Names and schemas of the ops a graph is made of: every op is a torch op, written ``namespace.name.overload``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

import graphopt.ops
from graphopt.errors import GraphError, nearest

#: Arguments that say where and how a tensor lies in memory. A graph says only what is computed, so it holds none of them.
PLACEMENT = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking"})


#: Of ops that may be registered later.
_NAMESPACES = frozenset({"aten", "graphopt", "transformers", "torchvision"})


@cache
def resolve(op: str) -> torch._ops.OpOverload:
    """The torch op behind a name. GraphError for a name that is no torch op."""
    parts = op.split(".")
    if len(parts) != 3:
        raise GraphError(f"{op!r} is not an op name", hint="write namespace.name.overload, as in aten.add.Tensor")
    namespace, name, overload = parts
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        raise GraphError(f"there is no torch op {op!r}", hint="is the library that registers it imported?")
    if overload not in packet.overloads():
        raise GraphError(f"{namespace}.{name} has no overload {overload!r}", hint=nearest(overload, packet.overloads()))
    found: torch._ops.OpOverload = getattr(packet, overload)
    return found


@cache
def path_of(name: str) -> str:
    """``add`` as ``aten.add``, a namespace of ops as it is. GraphError for what is neither."""
    if name.startswith("__"):
        raise AttributeError(name)
    if hasattr(torch.ops.aten, name):
        return f"aten.{name}"
    registered = [op.split("::") for op in torch._C._dispatch_get_all_op_names()]
    if name in _NAMESPACES or any(namespace == name for namespace, _ in registered):
        return name
    known = {op.partition(".")[0] for namespace, op in registered if namespace == "aten" and not op.startswith("_")}
    raise GraphError(
        f"there is no torch op aten.{name}, and no ops are in a namespace {name}", hint=nearest(name, known)
    )


@cache
def parameters(op: str) -> tuple[torch._C.Argument, ...]:
    """The op's arguments in schema order, without those that only place the result in memory."""
    return tuple(a for a in resolve(op)._schema.arguments if a.name not in PLACEMENT)


@cache
def _order(op: str) -> tuple[str, ...]:
    return tuple(argument.name for argument in parameters(op))


@cache
def _names(op: str) -> frozenset[str]:
    return frozenset(_order(op))


@cache
def takes_device(op: str) -> bool:
    return any(a.name == "device" for a in resolve(op)._schema.arguments)


@cache
def has_default(op: str, name: str) -> bool:
    return any(a.name == name and a.has_default_value() for a in parameters(op))


@cache
def default(op: str, name: str) -> Any:
    """The schema default of an argument, lists as tuples."""
    value = next(a.default_value for a in parameters(op) if a.name == name)
    return tuple(value) if isinstance(value, list) else value


def bind(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument by its schema name, defaults filled in, placement left out. GraphError if they do not fit."""
    if not args and kwargs.keys() == _names(op):
        return {name: tuple(value) if isinstance(value := kwargs[name], list) else value for name in _order(op)}
    bound: dict[str, Any] = {}
    all_names = [a.name for a in resolve(op)._schema.arguments]
    given = dict(zip(all_names, args, strict=False))
    if len(args) > len(all_names):
        raise GraphError(f"{op} takes {len(all_names)} arguments, got {len(args)}")
    for name, value in kwargs.items():
        if name not in all_names:
            raise GraphError(f"{op} has no argument {name!r}", hint=nearest(name, all_names))
        if name in given:
            raise GraphError(f"{op} got two values for {name!r}")
        given[name] = value
    for argument in parameters(op):
        if argument.name in given:
            value = given[argument.name]
            bound[argument.name] = tuple(value) if isinstance(value, list) else value
        elif argument.has_default_value():
            bound[argument.name] = default(op, argument.name)
        else:
            raise GraphError(f"{op} needs an argument {argument.name!r}")
    return bound


def is_random(op: str, args: Mapping[str, Any]) -> bool:
    """Whether two calls with these arguments may differ."""
    return _may_draw(op) and args.get("dropout_p") != 0


@cache
def _may_draw(op: str) -> bool:
    return torch.Tag.nondeterministic_seeded in resolve(op).tags


def shapes_of(op: str, args: Mapping[str, Any], device: str) -> tuple[torch.Tensor, ...]:
    """Results of the right dtype and shape, without values: by the op's own shape function if it has one."""
    own = graphopt.ops.SHAPES.get(op)
    return own(args) if own is not None else call(op, args, device)


def call(op: str, args: Mapping[str, Any], device: torch.device | str | None = None) -> tuple[torch.Tensor, ...]:
    """Run the op on real values; the results always as a tuple. ``device`` is where factory ops make their tensor."""
    first, rest = _calling(op)
    positional = [args[name] for name in first]
    keywords = {name: args[name] for name in rest}
    if device is not None and takes_device(op):
        keywords["device"] = device
    result = resolve(op)(*positional, **keywords)
    if isinstance(result, torch.Tensor):
        return (result,)
    return tuple(result)


@cache
def _calling(op: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names to pass by position and those to pass by keyword."""
    first = tuple(a.name for a in parameters(op) if not a.kwarg_only and _positional(op, a.name))
    return first, tuple(name for name in _order(op) if name not in first)


def _positional(op: str, name: str) -> bool:
    """Whether all arguments before this one are kept as well, so that it may be passed by position."""
    for argument in resolve(op)._schema.arguments:
        if argument.name == name:
            return True
        if argument.name in PLACEMENT:
            return False
    return False
