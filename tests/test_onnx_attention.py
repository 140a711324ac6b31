"""Attention, rotary embedding and packed tokens in ONNX, each form against the op's reference."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from graphopt.backends import quirks
from graphopt.backends.onnx.emitter import Lowering
from graphopt.backends.onnxruntime.dialect import onnxruntime_dialect
from graphopt.backends.onnxruntime.tactics import single_op
from graphopt.dims import Dim, Size
from graphopt.errors import LoweringError
from graphopt.execution import run
from graphopt.ir import Graph, Value
from graphopt.ops import visible_keys
from graphopt.tensors import DimRange, TensorType, Weight
from tests.onnx_helpers import ONNXRUNTIME, check_everywhere, emit, run_onnxruntime, run_reference

B, S, T = (Dim.named(name) for name in ("batch", "sequence", "keys"))
FORMS = list(ONNXRUNTIME.forms["graphopt.attention"])
MASKINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"causal": "upper_left"},
    "key_mask": {"key_mask": True},
    "both": {"causal": "upper_left", "key_mask": True},
    "bias": {"bias": True},
    "bias_and_keys": {"bias": True, "key_mask": True},
    "window": {"causal": "upper_left", "window_left": 2},
    "both_windows": {"window_left": 1, "window_right": 2, "key_mask": True},
    "lengths": {"kv_lengths": True},
    "softcap": {"softcap": 3.0, "causal": "upper_left"},
    "sinks": {"sinks": True, "causal": "upper_left"},
    "segments": {"segments": torch.int64},
    "causal_segments": {"causal": "upper_left", "segments": torch.int32},
    "segments_of_truth": {"segments": torch.bool, "key_mask": True},
    "segments_and_window": {"segments": torch.int64, "causal": "lower_right", "window_left": 1, "key_mask": True},
    "prefix_without_causal": {"prefix": True},
    "prefix": {"causal": "upper_left", "prefix": True},
    "prefix_and_window": {"causal": "upper_left", "window_left": 1, "prefix": True, "key_mask": True},
    "prefix_and_both_windows": {"window_left": 0, "window_right": 1, "prefix": True},
    "chunk": {"chunk": 3},
    "causal_chunk": {"causal": "upper_left", "chunk": 2},
    "chunk_and_padding": {"causal": "lower_right", "chunk": 4, "key_mask": True},
    "one_chunk": {"chunk": 64, "kv_lengths": True},
    "everything": {
        "causal": "upper_left", "window_left": 2, "chunk": 4, "prefix": True, "segments": torch.int64, "key_mask": True,
        "bias": True, "softcap": 2.0,
    },
    "everything_with_sinks": {"causal": "lower_right", "chunk": 3, "prefix": True, "segments": torch.bool, "sinks": True},
}  # fmt: skip


def attention_graph(masking: dict[str, Any], *, heads_last: bool, kv_heads: int = 4, keys: Size = S) -> Graph:
    graph = Graph(dims={"batch": DimRange(), "sequence": DimRange()} | ({"keys": DimRange()} if keys is T else {}))

    def add(name: str, heads: int, rows: Size, size: int) -> Any:
        shape = (B, rows, heads, size) if heads_last else (B, heads, rows, size)
        return graph.add_input(name, TensorType(torch.float32, shape))

    args: dict[str, Any] = {"q": add("q", 4, S, 8), "k": add("k", kv_heads, keys, 8), "v": add("v", kv_heads, keys, 6)}
    args |= {"scale": 0.3, "heads_last": heads_last} | masking
    types = {
        "bias": TensorType(torch.float32, (B, 1, S, keys)),
        "key_mask": TensorType(torch.bool, (B, keys)),
        "kv_lengths": TensorType(torch.int64, (B,)),
        "sinks": TensorType(torch.float32, (4,)),
        "prefix": TensorType(torch.bool, (B, keys)),
        "segments": TensorType(masking.get("segments", torch.int64), (B, keys)),
    }
    for name, type in types.items():
        if name in masking:
            args[name] = graph.add_input(name, type)
    graph.outputs["y"] = graph.insert("graphopt.attention.default", args).output
    graph.verify()
    return graph


def inputs_of(graph: Graph, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    inputs = {}
    for name, value in graph.inputs.items():
        shape = [int(size) for size in value.type.concrete(sizes).shape]  # type: ignore[arg-type]
        inputs[name] = (
            torch.randn(shape) if value.type.dtype == torch.float32 else torch.ones(shape, dtype=torch.int64) * 3
        )
        if value.type.dtype == torch.bool:
            inputs[name] = torch.rand(shape) < 0.7
            inputs[name][:, 0] = True
        if name == "segments":
            inputs[name] = (torch.rand(shape) * 3).sort(-1)[0].to(torch.int64).to(value.type.dtype)
    return inputs


def seen(graph: Graph, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[B, H, S, 1]`` or as the heads lie: the queries that see a key. What the others give means nothing."""
    (node,) = graph.nodes
    args: dict[str, Any] = {
        name: inputs.get(arg.name) if isinstance(arg, Value) else arg for name, arg in node.args.items()
    }
    sequence = 1 if args["heads_last"] else 2
    names = ("key_mask", "kv_lengths", "segments", "prefix", "causal", "window_left", "window_right", "chunk")
    queries, keys = (args[name].shape[sequence] for name in ("q", "k"))
    visible = visible_keys(keys, queries, torch.device("cpu"), **{name: args[name] for name in names})
    if visible is None:
        return torch.ones(())
    some = visible.any(-1, keepdim=True).expand(args["q"].shape[0], 1, queries, 1)
    return some.transpose(1, 2) if args["heads_last"] else some


def assert_attends(
    graph: Graph, inputs: Mapping[str, torch.Tensor], results: Sequence[np.ndarray], tolerance: float = 1e-5
) -> None:
    """The reference's result at every query that sees a key, and no NaN elsewhere."""
    got, expected, means = torch.from_numpy(results[0]), run(graph, inputs)["y"], seen(graph, inputs)
    assert got.isfinite().all()
    torch.testing.assert_close(got * means, expected * means, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize(("heads_last", "kv_heads"), [*itertools.product((True, False), (4, 2))])
def test_every_form_that_takes_it_is_the_reference(masking: str, heads_last: bool, kv_heads: int) -> None:
    graph = attention_graph(MASKINGS[masking], heads_last=heads_last, kv_heads=kv_heads)
    taken = []
    for form in FORMS:
        alone = onnxruntime_dialect(onnxruntime.__version__)
        one = type(alone)(
            alone.name, alone.opsets, {}, {"graphopt.attention": {form: alone.forms["graphopt.attention"][form]}}
        )
        try:
            model = emit(graph, one)
        except LoweringError:
            continue
        taken.append(form)
        for sizes in ({"batch": 2, "sequence": 5}, {"batch": 3, "sequence": 9}):
            inputs = inputs_of(graph, sizes)
            assert_attends(graph, inputs, run_onnxruntime(model, inputs))
    assert "products" in taken
    if "sinks" not in MASKINGS[masking]:
        assert any(form.startswith("attention") for form in taken)
    told = MASKINGS[masking].keys() & {"segments", "prefix", "chunk", "bias", "kv_lengths", "window_left"}
    assert ("multi_head_key_mask" in taken) == (
        kv_heads == 4 and not told and not MASKINGS[masking].keys() & {"softcap", "sinks"}
    )


@pytest.mark.parametrize("masking", [name for name in MASKINGS if "softcap" not in MASKINGS[name]])
def test_standard_dialect_runs_in_the_reference_evaluator(masking: str) -> None:
    graph = attention_graph(MASKINGS[masking], heads_last=True, kv_heads=2)
    model = emit(graph)
    for sizes in ({"batch": 2, "sequence": 5}, {"batch": 3, "sequence": 9}):
        inputs = inputs_of(graph, sizes)
        assert_attends(graph, inputs, run_reference(model, inputs))


UNEQUAL: dict[str, dict[str, Any]] = {
    "causal alone": {},
    "window": {"window_left": 2},
    "both windows": {"window_left": 1, "window_right": 0},
    "chunk": {"chunk": 3},
    "prefix": {"prefix": True},
    "prefix, window and padding": {"prefix": True, "window_left": 1, "key_mask": True},
    "prefix and chunk": {"prefix": True, "chunk": 2},
    "lengths and bias": {"kv_lengths": True, "bias": True},
}


@pytest.mark.parametrize("masking", UNEQUAL.values(), ids=UNEQUAL)
@pytest.mark.parametrize("causal", ["none", "upper_left", "lower_right"])
def test_unequal_lengths_in_every_form(causal: str, masking: dict[str, Any]) -> None:
    """More keys than queries, as many, and fewer."""
    graph = attention_graph({"causal": causal} | masking, heads_last=False, keys=T)
    models = [emit(graph, ONNXRUNTIME, form) for form in FORMS]
    for queries, keys in ((3, 7), (4, 4), (6, 2), (1, 5)):
        inputs = inputs_of(graph, {"batch": 2, "sequence": queries, "keys": keys})
        for model in models:
            assert_attends(graph, inputs, run_onnxruntime(model, inputs))
        assert_attends(graph, inputs, run_reference(emit(graph), inputs))


@pytest.mark.xfail(strict=True, reason="segments are cast to integers, which makes 0.25 and 0.75 one")
def test_segments_that_are_fractions() -> None:
    graph = attention_graph({"segments": torch.float32}, heads_last=True)
    inputs = inputs_of(graph, {"batch": 1, "sequence": 4})
    inputs["segments"] = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    assert_attends(graph, inputs, run_onnxruntime(emit(graph), inputs))


def test_left_padding_gives_no_nan() -> None:
    """Rows that see no key mean nothing, and must not spoil others."""
    graph = attention_graph({"causal": "upper_left", "key_mask": True}, heads_last=True)
    inputs = inputs_of(graph, {"batch": 2, "sequence": 6})
    inputs["key_mask"][:] = True
    inputs["key_mask"][1, :3] = False
    for form in FORMS:
        (got,) = run_onnxruntime(emit(graph, ONNXRUNTIME, form), inputs)
        result = torch.from_numpy(got)
        assert not result.isnan().any(), form


def test_masks_are_made_once_for_all_layers() -> None:
    graph = attention_graph({"key_mask": True}, heads_last=True)
    args = dict(next(iter(graph.nodes)).args)
    graph.outputs["second"] = graph.insert("graphopt.attention.default", args).output
    model = emit(graph)
    assert sum(node.op_type == "Expand" for node in model.graph.node) == 1


@pytest.mark.parametrize(("heads_last", "interleaved"), [*itertools.product((True, False), (True, False))])
@pytest.mark.parametrize(("size", "half", "angles"), [(8, 4, "one"), (8, 4, "each"), (8, 2, "one")])
def test_rotary(heads_last: bool, interleaved: bool, size: int, half: int, angles: str) -> None:
    graph = Graph(dims={"batch": DimRange(), "sequence": DimRange()})
    x = graph.add_input("x", TensorType(torch.float32, (B, S, 3, size) if heads_last else (B, 3, S, size)))
    shape = (1 if angles == "one" else B, S, half)
    cos, sin = (graph.add_input(name, TensorType(torch.float32, shape)) for name in ("cos", "sin"))
    args = {"x": x, "cos": cos, "sin": sin, "interleaved": interleaved, "heads_last": heads_last}
    graph.outputs["y"] = graph.insert("graphopt.rotary_embedding.default", args).output
    check_everywhere(graph, [inputs_of(graph, {"batch": b, "sequence": s}) for b, s in ((2, 5), (3, 4))])


def test_packed_tokens() -> None:
    graph = Graph(dims={"batch": DimRange(), "sequence": DimRange()})
    x = graph.add_input("x", TensorType(torch.float32, (B, S, 4)))
    mask = graph.add_input("mask", TensorType(torch.bool, (B, S)))
    packed = graph.insert("graphopt.pack_tokens.default", {"x": x, "mask": mask}).output
    worked = graph.insert("aten.tanh.default", {"self": packed}).output
    graph.outputs["y"] = graph.insert("graphopt.unpack_tokens.default", {"x": worked, "mask": mask}).output
    for batch, sequence in ((2, 5), (3, 7)):
        inputs = {"x": torch.randn(batch, sequence, 4), "mask": torch.rand(batch, sequence) < 0.5}
        inputs["mask"][0] = False
        kept = inputs["mask"].clone()
        kept[:, 0] = True
        for results in (run_reference(emit(graph), inputs), run_onnxruntime(emit(graph, ONNXRUNTIME), inputs)):
            got = torch.from_numpy(results[0])
            torch.testing.assert_close(got[kept], torch.tanh(inputs["x"])[kept])
            assert got.isfinite().all()


def test_a_fault_takes_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = attention_graph({"causal": "upper_left"}, heads_last=False, keys=T)
    model = emit(graph, onnxruntime_dialect("1.26.0"))
    assert not any(node.op_type == "Attention" for node in model.graph.node)
    assert any(node.op_type == "Attention" for node in emit(graph, onnxruntime_dialect("1.32.0")).graph.node)
    refusing = quirks.Quirk("onnxruntime", ">=1", lambda node, form: True, "refuse", "it is broken", "a test")
    monkeypatch.setattr(quirks, "QUIRKS", (refusing,))
    with pytest.raises(LoweringError, match="it is broken"):
        emit(graph, onnxruntime_dialect("1.32.0"))


WITHOUT_PADDING = "attention_without_padding"


@pytest.mark.parametrize("causal", ["none", "upper_left"])
@pytest.mark.parametrize("heads_last", [True, False])
def test_a_batch_without_padding_takes_the_branch_without_a_mask(causal: str, heads_last: bool) -> None:
    """One model, and both of its branches."""
    graph = attention_graph({"causal": causal, "key_mask": True}, heads_last=heads_last)
    model = emit(graph, ONNXRUNTIME, WITHOUT_PADDING)
    (either,) = (node for node in model.graph.node if node.op_type == "If")
    branches = {attribute.name: attribute.g for attribute in either.attribute}
    operands = {
        name: [len(list(filter(None, node.input))) for node in branch.node] for name, branch in branches.items()
    }
    assert operands == {"then_branch": [3], "else_branch": [4]}
    for sizes in ({"batch": 1, "sequence": 5}, {"batch": 3, "sequence": 7}):
        padded = inputs_of(graph, sizes)
        full = {**padded, "key_mask": torch.ones_like(padded["key_mask"])}
        one = {**full, "key_mask": full["key_mask"].clone()}
        one["key_mask"][-1, -1] = False  # a single key of the last row
        for inputs in (padded, full, one):
            assert_attends(graph, inputs, run_onnxruntime(model, inputs))


@pytest.mark.parametrize(
    ("masking", "reason"),
    [
        ("causal", "no key mask, or not that alone"),
        ("bias_and_keys", "no key mask, or not that alone"),
        ("segments_of_truth", "no key mask, or not that alone"),
        ("both_windows", "a window or chunks"),
        ("chunk_and_padding", "a window or chunks"),
    ],
)
def test_only_padding_can_be_absent(masking: str, reason: str) -> None:
    (node,) = attention_graph(MASKINGS[masking], heads_last=True).nodes
    with pytest.raises(LoweringError, match=reason):
        emit(single_op(node), replace(ONNXRUNTIME, lowerings={}, forms=_only(WITHOUT_PADDING)))


def test_layers_share_what_says_that_there_is_no_padding() -> None:
    graph = attention_graph({"key_mask": True}, heads_last=True)
    (first,) = graph.nodes
    second = graph.insert(first.op, {**first.args, "q": first.args["k"]}).output
    graph.outputs["z"] = second
    ops = [node.op_type for node in emit(graph, ONNXRUNTIME, WITHOUT_PADDING).graph.node]
    assert (ops.count("If"), ops.count("ReduceMin"), ops.count("Attention")) == (2, 1, 0)


def test_a_weight_that_only_a_branch_reads_is_kept() -> None:
    graph = Graph(dims={"sequence": DimRange()})
    x = graph.add_input("x", TensorType(torch.float32, (2, S, 4, 8)))
    keys = graph.add_weight("keys", Weight.of(torch.randn(2, 3, 4, 8)))
    mask = graph.add_input("key_mask", TensorType(torch.bool, (2, 3)))
    args = {"q": x, "k": keys, "v": keys, "key_mask": mask, "scale": 0.3, "heads_last": True}
    graph.outputs["y"] = graph.insert("graphopt.attention.default", args).output
    inputs = {"x": torch.randn(2, 5, 4, 8), "key_mask": torch.tensor([[True, True, False]] * 2)}
    model = emit(graph, ONNXRUNTIME, WITHOUT_PADDING)
    torch.testing.assert_close(torch.from_numpy(run_onnxruntime(model, inputs)[0]), run(graph, inputs)["y"])


def _only(form: str) -> dict[str, dict[str, Lowering]]:
    return {"graphopt.attention": {form: ONNXRUNTIME.forms["graphopt.attention"][form]}}
