"""The text form of a graph: what golden tests compare, reports diff, and reviewers read. ``parse(str(graph)) == graph``.

::

    graph {
      dim batch in [1, 64]
      input %x: f32[batch, 384]
      weight %dense.weight: f32[1536, 384]
      %linear: f32[batch, 1536] = aten.linear.default(input=%x, weight=%dense.weight)
      output y = %linear
    }

A prologue stands behind it, as
``prologue graph { ... }``. Arguments that have their schema default are not written. A comment after a node is its origin,
parts joined by ``|``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from graphopt import operators
from graphopt.dims import Dim
from graphopt.errors import GraphError, ParseError
from graphopt.ir import Graph, Node, Value
from graphopt.tensors import DTYPE_NAMES, DTYPES, DimRange, TensorType, Weight


def arg_text(arg: Any) -> str:
    if isinstance(arg, Value):
        return f"%{arg.name}"
    if isinstance(arg, tuple):
        return f"[{', '.join(map(arg_text, arg))}]"
    if isinstance(arg, torch.dtype):
        return DTYPE_NAMES[arg]
    if isinstance(arg, str):
        return json.dumps(arg)
    return repr(arg)


def node_text(node: Node) -> str:
    outputs = ", ".join(map(repr, node.outputs))
    args = ", ".join(
        f"{name}={arg_text(arg)}"
        for name, arg in node.args.items()
        if not (operators.has_default(node.op, name) and _same(arg, operators.default(node.op, name)))
    )
    return f"{outputs} = {node.op}({args})"


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def graph_text(graph: Graph, *, origins: bool = False) -> str:
    lines = [f"dim {name} in {bounds}" for name, bounds in graph.dims.items()]
    lines += [f"input {value!r}" + _TRUTH * (name in graph.truths) for name, value in graph.inputs.items()]
    lines += [f"weight {graph.value(name)!r}" for name in graph.weights]
    for node in graph.nodes:
        comment = f"  # {' | '.join(node.origin)}" if origins and node.origin else ""
        lines.append(node_text(node) + comment)
    lines += [f"output {name} = %{value.name}" for name, value in graph.outputs.items()]
    before = "" if graph.prologue is None else "prologue " + graph_text(graph.prologue, origins=origins)
    return "graph {\n" + "".join(f"  {line}\n" for line in lines) + "}\n" + before


_PROLOGUE = "\nprologue graph {"
_NAME = r"[\w.\-]+"
_DIM = re.compile(r"dim (\w+) in \[(\d+), (\d+|\.\.\.)\]$")
_TRUTH = " in {0, 1}"
_DECLARED = re.compile(rf"(input|weight) %({_NAME}): (.+)$")
_OUTPUT = re.compile(rf"output ({_NAME}) = %({_NAME})$")
_NODE = re.compile(rf"(%{_NAME}: .*?) = (\w+\.\w+\.\w+)\((.*)\)$")
_VALUE = re.compile(rf"%({_NAME}): (\w+)\[(.*)\]$")


def parse(text: str, weights: Mapping[str, torch.Tensor] | None = None) -> Graph:
    """The graph written in ``text``. Its weights' data come from ``weights``; without, reading them is an error.

    ParseError names the line that cannot be read."""
    text, prologue, before = text.partition(_PROLOGUE)
    graph = Graph()
    if prologue:
        graph.prologue = parse("graph {" + before, weights)
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines or lines[0][1] != "graph {" or lines[-1][1] != "}":
        raise ParseError("the text of a graph starts with 'graph {' and ends with '}'")
    for number, line in lines[1:-1]:
        try:
            _parse_line(graph, line, weights)
        except GraphError as error:
            raise ParseError(error.what, where=f"line {number}: {line[:120]}", hint=error.hint) from error
    return graph


def _parse_line(graph: Graph, line: str, weights: Mapping[str, torch.Tensor] | None) -> None:
    line, origin = _split_comment(line)
    if found := _DIM.match(line):
        name, low, high = found.groups()
        graph.dims[name] = DimRange(int(low), None if high == "..." else int(high))
    elif found := _DECLARED.match(line):
        kind, name, type_ = found.groups()
        if kind == "input":
            graph.add_input(name, parse_type(type_.removesuffix(_TRUTH)))
            if type_.endswith(_TRUTH):
                graph.truths.add(name)
        else:
            graph.add_weight(name, _weight(name, parse_type(type_), weights))
    elif found := _OUTPUT.match(line):
        graph.outputs[found[1]] = graph.value(found[2])
    elif found := _NODE.match(line):
        outputs = [_parse_value(part) for part in _split(found[1])]
        args = dict(_parse_arg(graph, part) for part in _split(found[3]))
        names = [name for name, _ in outputs]
        if clash := [name for name in names if name in graph.values]:
            raise ParseError(f"%{clash[0]} exists already")
        graph.insert(found[2], args, [type for _, type in outputs], names=names, origin=origin)
    else:
        raise ParseError("cannot read this line", hint="dim, input, weight, node or output; see graphopt.text")


def _weight(name: str, type: TensorType, weights: Mapping[str, torch.Tensor] | None) -> Weight:
    if weights is not None and name in weights:
        weight = Weight.of(weights[name])
        if weight.type != type:
            raise ParseError(f"weight %{name} is {weight.type}, the text says {type}")
        return weight

    def load() -> torch.Tensor:
        raise GraphError(f"the data of weight %{name} is not in the text", hint="pass weights= to parse")

    return Weight(type, load)


def parse_type(text: str) -> TensorType:
    """``f32[batch, 384]`` as a type."""
    _, type = _parse_value(f"%_: {text}")
    return type


def _parse_value(text: str) -> tuple[str, TensorType]:
    found = _VALUE.match(text)
    if not found or found[2] not in DTYPES:
        raise ParseError(f"not a typed value: {text!r}", hint=f"%name: dtype[sizes], dtypes {', '.join(DTYPES)}")
    return found[1], TensorType(DTYPES[found[2]], tuple(Dim.parse(size) for size in _split(found[3])))


def _parse_arg(graph: Graph, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ParseError(f"not an argument: {text!r}", hint="name=value")
    return name, _parse_leaf(graph, value)


_WORDS: dict[str, Any] = {
    "None": None, "True": True, "False": False, "inf": float("inf"), "-inf": float("-inf"), "nan": float("nan"), **DTYPES
}  # fmt: skip


RESERVED = frozenset(_WORDS)  # words that stand for themselves in an argument, and so name no size


def _parse_leaf(graph: Graph, text: str) -> Any:
    if text.startswith("%"):
        return graph.value(text[1:])
    if text.startswith("["):
        return tuple(_parse_leaf(graph, part) for part in _split(text[1:-1]))
    if text.startswith('"'):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ParseError(f"not a string: {text}", hint=str(error)) from None
    if text in _WORDS:
        return _WORDS[text]
    if re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", text) and not text.lstrip("-").isdigit():
        return float(text)
    return Dim.parse(text)


def _split(text: str) -> Iterator[str]:
    """Parts between the commas that stand outside brackets and strings."""
    depth, start = 0, 0
    for index, char in _outside_strings(text):
        if char in "([":
            depth += 1
        elif char in ")]":
            depth -= 1
        elif char == "," and not depth:
            yield text[start:index].strip()
            start = index + 1
    if text[start:].strip():
        yield text[start:].strip()


def _split_comment(line: str) -> tuple[str, tuple[str, ...]]:
    for index, char in _outside_strings(line):
        if char == "#" and line[max(index - 2, 0) : index + 2] == "  # ":
            return line[:index].rstrip(), tuple(line[index + 2 :].split(" | "))
    return line, ()


def _outside_strings(text: str) -> Iterator[tuple[int, str]]:
    """The characters that stand in no string, with their places."""
    quoted = escaped = False
    for index, char in enumerate(text):
        if not quoted and char != '"':
            yield index, char
        elif char == '"' and not escaped:
            quoted = not quoted
        escaped = quoted and char == "\\" and not escaped
