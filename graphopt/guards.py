"""What a trace takes for granted of sizes: where the model branches on them, only one way is in the graph.

``torch.export`` writes these guards as text, ``L['x'].size()[1]*L['x'].size()[0] < 1000``, and holds its own calls to them.
Intervals of a single size are ranges of dims already; the others are tried at sizes that dims allow."""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn

from graphopt.eager import eager, kept, untouched
from graphopt.errors import TracingError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.measures import named_sizes
from graphopt.parity import Probe, judge
from graphopt.probes import sampler_like
from graphopt.schemas.pipeline import Exact
from graphopt.tensors import DimRange

Env = Mapping[str, int]
Axes = Mapping[str, Sequence[str | None]]
_SIZE = re.compile(r"L\['([^']+)'\]\.size\(\)\[(\d+)\]")
_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.Eq, ast.NotEq, ast.Lt,
    ast.LtE, ast.Gt, ast.GtE, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Div, ast.Pow, ast.Name,
    ast.Load, ast.Constant, ast.Call,
)  # fmt: skip
_FUNCTIONS = {"max": max, "min": min, "Max": max, "Min": min}
_DENSE = 4096  # up to here every size is tried where a guard is of one
_FAR = 1 << 20
_SMALL = 4096  # elements of all named sizes, which a model may be run at to see whether a guard matters
_LEAST = 2  # torch takes 0 and 1 for constants; what happens there is proven by a run, not by guards


@dataclass(frozen=True)
class Guard:
    """A condition on sizes by the names of dims."""

    text: str
    names: tuple[str, ...]
    code: CodeType

    def holds(self, env: Env) -> bool:
        try:
            # Of the nodes above alone, without builtins.
            return bool(eval(self.code, {"__builtins__": {}, **_FUNCTIONS}, dict(env)))  # noqa: S307
        except ZeroDivisionError:
            return False


def hold_guards(
    graph: Graph,
    texts: Iterable[str],
    module: nn.Module,
    given: Mapping[str, Any],
    axes: Axes,
    asked: Mapping[str, DimRange],
) -> None:
    """Narrow the ranges of dims to where the model takes the way that was traced. TracingError where dims that were asked for,
    or several of them together, allow others. A way that is not taken may do the same (padding by nothing): where a guard is
    first broken the graph is run beside the module, and the guard let go if they agree."""
    sizes: dict[tuple[str, int], str | int] = {}
    traced: dict[str, int] = {}
    for name, tensor in given.items():
        for axis, size in enumerate(tensor.shape if isinstance(tensor, torch.Tensor) else ()):
            dim = axes[name][axis] if name in axes else None
            sizes[name, axis] = dim or size
            if dim:
                traced[dim] = size
    found = guards_of(texts, sizes, traced)
    most = max(_SMALL, 64 * math.prod(traced.values()))

    def is_harmless(env: dict[str, int]) -> bool:
        nonlocal found
        whole = {**traced, **env}
        if math.prod(whole.values()) > most or not _is_model(graph, module, given, axes, whole):
            return False
        found = [guard for guard in found if guard.holds(whole)]
        return True

    for dim, bounds in graph.dims.items():
        if dim not in traced:
            continue
        within = range_within(found, dim, bounds, traced[dim])
        while within != bounds and is_harmless({dim: _outside(within, bounds)}):
            within = range_within(found, dim, bounds, traced[dim])
        if within != bounds and dim in asked:
            raise TracingError(
                f"the model branches on {dim}: what was traced holds for {within}, dims asks for {bounds}",
                where="dims",
                hint=f"set dims: {{{dim}: [{within.min}, {within.max}]}}, or trace with an example of other sizes",
            )
        graph.dims[dim] = within
    while (wrong := violated(found, graph.dims, traced)) is not None:
        guard, env = wrong
        if not is_harmless(env):
            raise TracingError(
                f"the model branches on sizes: what was traced holds where {guard.text}, which dims do not keep"
                f" ({named_sizes(env)})",
                where="dims",
                hint="set dims that keep it, or trace with an example of other sizes",
            )


def _is_model(graph: Graph, module: nn.Module, given: Mapping[str, Any], axes: Axes, sizes: dict[str, int]) -> bool:
    """Whether the graph gives what the module gives at some sizes."""
    tensors = {name: tensor for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    inputs = sampler_like(tensors, {name: tuple(names) for name, names in axes.items()})(
        sizes, torch.Generator().manual_seed(0)
    )
    try:
        with untouched(module):
            wanted = eager(module)(**{**given, **inputs})
        got = run(graph, {name: inputs[name] for name in graph.inputs})
        return judge(Exact(), [Probe(sizes, inputs)], [kept(wanted, got)], [got]).holds
    except Exception:  # one of them does not work there, or they give other shapes
        return False


def _outside(within: DimRange, bounds: DimRange) -> int:
    """The first size that a narrower range leaves out."""
    return within.min - 1 if within.max is None or within.max == bounds.max else within.max + 1


def guards_of(texts: Iterable[str], sizes: Mapping[tuple[str, int], str | int], traced: Env) -> list[Guard]:
    """The guards that say something. ``sizes``: a dim's name, or a number, of each input's axis; ``traced``: of the trace, at
    which a guard holds."""
    found: dict[str, Guard] = {}
    for text in texts:
        known = all((name, int(axis)) in sizes for name, axis in _SIZE.findall(text))
        written = _SIZE.sub(lambda match: str(sizes[match[1], int(match[2])]), text) if known else "?"
        guard = _parsed(written)
        if guard is not None and guard.names and guard.names[0] in traced and guard.holds(traced):
            found[guard.text] = guard
    return list(found.values())


def _parsed(text: str) -> Guard | None:
    """None for what is no expression of sizes and numbers."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return None
    nodes = list(ast.walk(tree))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    functions = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) in called}
    if not all(isinstance(node, _NODES) for node in nodes) or functions - _FUNCTIONS.keys():
        return None
    names = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}
    return Guard(text, tuple(sorted(names)), compile(tree, "<guard>", "eval"))


def range_within(guards: Sequence[Guard], name: str, bounds: DimRange, traced: int) -> DimRange:
    """The sizes around the traced one at which all guards of this name alone hold."""
    own = [guard for guard in guards if guard.names == (name,)]
    if not own:
        return bounds

    def reach(sizes: Iterable[int], last: int) -> tuple[int, bool]:
        """How far all hold, and whether that is everywhere."""
        for size in sizes:
            if not all(guard.holds({name: size}) for guard in own):
                return last, False
            last = size
        return last, True

    lower, all_lower = reach(range(traced, max(bounds.min, _LEAST) - 1, -1), traced)
    upper, all_upper = reach(_upwards(traced, bounds.max), traced)
    return DimRange(bounds.min if all_lower else lower, bounds.max if all_upper else upper)


def _upwards(traced: int, most: int | None) -> Iterator[int]:
    last = _FAR if most is None else most
    yield from range(traced, min(last, _DENSE) + 1)
    yield from (size for size in _steps(_DENSE, last) if size > _DENSE)


def _steps(least: int, most: int) -> list[int]:
    """Sizes that matter between two: the ends, and what lies around powers of two and other round numbers."""
    round_ = [*(1 << power for power in range(1, 21)), *(10**power for power in range(1, 6)), 3, 5, 6, 48, 96, 384, 768]
    near = {size + step for size in round_ for step in (-1, 0, 1)} | {least, least + 1, most - 1, most}
    return sorted(size for size in near if max(least, _LEAST) <= size <= most)


def violated(guards: Sequence[Guard], dims: Mapping[str, DimRange], traced: Env) -> tuple[Guard, dict[str, int]] | None:
    """A guard of several sizes that does not hold everywhere in dims, with sizes where it does not."""
    for guard in guards:
        if len(guard.names) < 2 or any(name not in dims for name in guard.names):
            continue
        choices = []
        for name in guard.names:
            bounds = dims[name]
            found = _steps(bounds.min, _FAR if bounds.max is None else bounds.max)
            choices.append(sorted(found, key=lambda size, own=traced[name]: abs(size - own)))  # type: ignore[misc]
        for sizes in itertools.product(*choices):
            env = dict(zip(guard.names, sizes, strict=True))
            if not guard.holds(env):
                return guard, env
    return None
