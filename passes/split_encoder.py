"""What a decoder needs once for a whole text, as a graph of its own that runs before it.

::

    %h = encoder(%input_ids)                                          prologue:  %h = encoder(%input_ids)
    %k = linear(%h), %v = linear(%h)                                             output cross_key_values.0.key = %k
    %a = graphopt.attention.default(q=%q, k=%k, v=%v)      ->                    output cross_key_values.0.value = %v
                                                                      main:      input %cross_key_values.0.key, ....value
                                                                                 %a = graphopt.attention.default(q=%q, k=..., ...)
"""

from __future__ import annotations

from graphopt import attentions
from graphopt.dims import Dim
from graphopt.ir import Graph, Value, leaves
from graphopt.runtime.cache import cross_name, once_name


def split_encoder(graph: Graph, sequence: str) -> bool:
    """Move what does not depend on the tokens along ``sequence`` into the prologue of ``graph``; whether there was any.

    Values of the padding mask alone stay: they cost nothing, and the mask is an input of both."""
    once = _once(graph, sequence)
    if not once:
        return False
    results = {name: value for name, value in graph.outputs.items() if value in once}
    names = _names(graph, once)
    graph.prologue = _before(graph, {name: value for value, name in names.items()} | results)
    for name in results:
        del graph.outputs[name]
    for value, name in names.items():
        graph.replace(value, graph.add_input(name, value.type))
    _shrink(graph)
    return True


def _once(graph: Graph, sequence: str) -> set[Value]:
    """Values that follow from inputs (a padding mask does not count) without the length or the tokens of ``sequence``."""
    along = {value for value in graph.inputs.values() if sequence in value.type.names}
    follows = {value for name, value in graph.inputs.items() if value not in along and name not in graph.truths}
    found: set[Value] = set()
    for node in graph.nodes:
        sizes = {
            name for arg in node.args.values() for leaf in leaves(arg) if isinstance(leaf, Dim) for name in leaf.names
        }
        if sequence in sizes or any(operand in along for operand in node.operands):
            along.update(node.outputs)
        elif any(operand in follows for operand in node.operands):
            follows.update(node.outputs)
            found.update(node.outputs)
    return found


def _names(graph: Graph, once: set[Value]) -> dict[Value, str]:
    """Those that the rest of the graph reads, by the name they get: keys and values of cross-attention first."""
    found: dict[Value, str] = {}
    layer = 0
    for node in attentions.fused(graph):
        if node.output in once:
            continue
        for part, name in (("k", "key"), ("v", "value")):
            if node.args[part] in once and node.args[part] not in found:
                found[node.args[part]] = cross_name(layer, name)
        layer += node.args["k"] in found
    for node in graph.nodes:
        if node.outputs[0] not in once:
            read = (operand for operand in node.operands if operand in once and operand not in found)
            found.update((operand, once_name(operand.name)) for operand in read)
    return found


def _before(graph: Graph, outputs: dict[str, Value]) -> Graph:
    prologue = graph.clone()
    prologue.outputs = {name: prologue.value(value.name) for name, value in outputs.items()}
    _shrink(prologue)
    return prologue


def _shrink(graph: Graph) -> None:
    """Drop nodes, inputs and dims that nothing needs."""
    graph.prune()
    for value in [value for value in graph.inputs.values() if not value.users and not graph.is_output(value)]:
        graph.remove_input(value)
    used = {name for value in graph.inputs.values() for name in value.type.names}
    graph.dims = {name: bounds for name, bounds in graph.dims.items() if name in used}
