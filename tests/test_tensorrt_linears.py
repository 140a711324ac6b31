"""TensorRT's linears: sums in fp32 or half precision, and long sums in parts where there are few tiles."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from graphopt.backends.onnx.emitter import Dialect, Emitter, Unsupported
from graphopt.backends.quirks import quirks_in_force
from graphopt.backends.tensorrt.dialect import tensorrt_dialect
from graphopt.backends.tensorrt.linears import Device
from graphopt.backends.tensorrt.options import Accumulate, Profile
from graphopt.dims import Dim
from graphopt.errors import LoweringError
from graphopt.ir import Graph
from graphopt.tensors import Weight
from tests.onnx_helpers import assert_same, emit, run_onnxruntime, run_reference
from tests.rules import inputs_of
from tests.test_tensorrt import SIZES, graph_of

LINEAR = """
    input %x: f16[batch, sequence, 4096]
    weight %w: f16[64, 4096]
    weight %b: f16[64]
    %y: f16[batch, sequence, 64] = aten.linear.default(input=%x, weight=%w{0})
    output y = %y
"""
FEW: list[Profile] = [{"batch": (1, 1, 4), "sequence": (1, 32, 64)}]
MANY: list[Profile] = [*FEW, {"batch": (1, 4, 4), "sequence": (1, 1280, 1280)}]


@pytest.mark.parametrize(
    ("rows", "channels", "features", "processors", "parts"),
    [
        (1, 2048, 8192, 132, 4), (1, 2048, 4096, 132, 2), (1, 2048, 2048, 132, 1), (1, 4096, 16384, 132, 2),
        (65, 2048, 8192, 132, 2), (128, 1024, 4096, 132, 2), (1024, 1024, 4096, 132, 1), (1, 2048, 8192, 63, 1),
        (1, 2048, 12290, 132, 2), (1, 2048, 8193, 132, 1),
    ],
)  # fmt: skip
def test_parts_are_long_and_fit_on_the_processors(
    rows: int, channels: int, features: int, processors: int, parts: int
) -> None:
    few = Device(processors, [{"batch": (1, 1, 4), "sequence": (1, rows, 1024)}])
    assert few.parts((Dim.named("batch"), Dim.named("sequence")), channels, features) == parts
    many = Device(processors, [*few.profiles, {"batch": (1, 4, 4), "sequence": (1, 1024, 1024)}])
    assert many.parts((Dim.named("batch"), Dim.named("sequence")), channels, features) == 1


def dialect_for(processors: int, profiles: list[Profile]) -> Dialect:
    return tensorrt_dialect(lambda op: True, device=Device(processors, profiles))


@pytest.mark.parametrize("bias", ["", ", bias=%b"], ids=["alone", "bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_long_sum_with_few_tiles_is_taken_in_parts(bias: str, sizes: Mapping[str, int]) -> None:
    graph = graph_of(LINEAR.format(bias))
    for name in "wb":
        own = graph.weights[name].load()
        graph.weights[name] = Weight.of(own / 32)
    model = emit(graph, dialect_for(132, FEW))
    ops = [node.op_type for node in model.graph.node]
    assert (ops.count("MatMul"), ops.count("ReduceSum")) == (1, 1)
    inputs = inputs_of(graph, dict(sizes))
    assert_same(graph, inputs, run_onnxruntime(model, inputs), 2e-2)


@pytest.mark.parametrize(("parts", "fits"), [(True, False), (False, True)])
def test_parts_that_half_precision_does_not_hold(parts: bool, fits: bool) -> None:
    """2048 times 100 is more than 65,504: what split_sums says of itself. By the reference, which rounds where the model does."""
    graph = graph_of(LINEAR.format(""))
    row = torch.cat([torch.full((2048,), 1.0), torch.full((2048,), -1.0)])
    graph.weights["w"] = Weight.of(row.expand(64, 4096).half().contiguous())
    device = Device(132, FEW if parts else MANY)
    dialect = tensorrt_dialect(lambda op: True, device=device, accumulate="long")
    with np.errstate(over="ignore", invalid="ignore"):
        (got,) = run_reference(emit(graph, dialect), {"x": torch.full((1, 1, 4096), 100.0).half()})
    assert bool((got == 0).all()) == fits


@pytest.mark.parametrize("profiles", [FEW, MANY], ids=["parts", "whole"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_in_fp32_are_products_between_casts(profiles: list[Profile], sizes: Mapping[str, int]) -> None:
    dialect = tensorrt_dialect(lambda op: True, device=Device(132, profiles), accumulate="long")
    graph = graph_of(LINEAR.format(", bias=%b"))
    inputs = inputs_of(graph, dict(sizes))
    model = emit(graph, dialect)
    ops = [node.op_type for node in model.graph.node]
    assert (ops.count("MatMul"), ops.count("Cast"), ops.count("ReduceSum")) == (
        1,
        0 if profiles is FEW else 3,
        int(profiles is FEW),
    )
    assert_same(graph, inputs, run_onnxruntime(model, inputs), 2e-1)  # of sums of 4096 products
    body = LINEAR.format("").replace("f16", "f32")
    assert Emitter(graph_of(body), dialect).used_forms == {"whole": 1}


@pytest.mark.parametrize(
    ("changes", "processors", "profiles", "reason"),
    [
        ({}, 132, MANY, "enough tiles"),
        ({}, 1, FEW, "enough tiles"),
        ({"4096": "4097"}, 132, FEW, "no parts divide"),
        ({"4096": "2048"}, 132, FEW, "a short sum"),
        ({"f16": "f32"}, 132, FEW, "fp32"),
    ],
)
def test_other_linears_stay_whole(
    changes: dict[str, str], processors: int, profiles: list[Profile], reason: str
) -> None:
    body = LINEAR.format("")
    for old, new in changes.items():
        body = body.replace(old, new)
    graph = graph_of(body)
    dialect = dialect_for(processors, profiles)
    assert Emitter(graph, dialect).used_forms == {"whole": 1}
    (node,) = graph.nodes
    with pytest.raises(Unsupported, match=reason):
        dialect.forms["aten.linear"]["parts"](Emitter(graph, dialect), node)


# In few bits

INTEGERS = """
    input %x: f16[batch, sequence, 4096]
    weight %s: f16[]
    weight %w: i8[64, 4096]
    weight %z: f16[64]
    weight %b: f16[64]
    %q: i8[batch, sequence, 4096] = graphopt.quantize.default(x=%x, scale=%s, dtype=i8)
    %y: f16[batch, sequence, 64] = graphopt.static_linear.default(x=%q, x_scale=%s, weight=%w, scale=%z{0})
    output y = %y
"""


def graph_of_integers(bias: str = "", changes: Mapping[str, str] | None = None) -> Graph:
    body = INTEGERS.format(bias)
    for old, new in (changes or {}).items():
        body = body.replace(old, new)
    graph = graph_of(body)
    whole = graph.weights["w"].load()
    weights = {
        "s": torch.tensor(1 / 32).half(), "z": (torch.rand(64) / 1024).half(),
        "w": torch.randint(-127, 128, whole.shape).to(whole.dtype),
    }  # fmt: skip
    graph.weights.update({name: Weight.of(tensor) for name, tensor in weights.items()})
    return graph


@pytest.mark.parametrize("bias", ["", ", bias=%b"], ids=["alone", "bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_long_sum_of_integers_with_few_tiles_is_taken_in_parts(bias: str, sizes: Mapping[str, int]) -> None:
    graph = graph_of_integers(bias)
    model = emit(graph, dialect_for(132, FEW))
    ops = [node.op_type for node in model.graph.node]
    assert (ops.count("MatMul"), ops.count("ReduceSum"), ops.count("DequantizeLinear")) == (1, 1, 2)
    inputs = inputs_of(graph, dict(sizes))
    assert_same(graph, inputs, run_onnxruntime(model, inputs), 2e-2)


@pytest.mark.parametrize(
    ("changes", "processors", "profiles", "reason"),
    [
        ({}, 132, MANY, "enough tiles"),
        ({"4096": "2048"}, 132, FEW, "a short sum"),
        ({"i8": "f8e4m3"}, 132, FEW, "fp8"),
    ],
)
def test_other_linears_of_integers_stay_whole(
    changes: dict[str, str], processors: int, profiles: list[Profile], reason: str
) -> None:
    graph = graph_of_integers(changes=changes)
    dialect = dialect_for(processors, profiles)
    assert Emitter(graph, dialect).used_forms == {"integers": 1}
    with pytest.raises(Unsupported, match=reason):
        dialect.forms["graphopt.static_linear"]["integers in parts"](Emitter(graph, dialect), list(graph.nodes)[-1])


ATTENDED = """
    input %q: f16[batch, sequence, 64, 64]
    weight %s: f16[]
    weight %w: i8[64, 4096]
    weight %z: f16[64]
    %a: f16[batch, sequence, 64, 64] = graphopt.attention.default(q=%q, k=%q, v=%q, scale=0.125, heads_last=True)
    %x: f16[batch, sequence, 4096] = aten.reshape.default(self=%a, shape=[batch, sequence, 4096])
    %i: i8[batch, sequence, 4096] = graphopt.quantize.default(x=%x, scale=%s, dtype=i8)
    %y: f16[batch, sequence, 64] = graphopt.static_linear.default(x=%i, x_scale=%s, weight=%w, scale=%z)
    output y = %y
"""


@pytest.mark.parametrize(("version", "form"), [("10.6.0", "floats"), ("10.9.0", "integers in parts")])
@pytest.mark.parametrize(("accumulate", "casts"), [("long", 2), ("fastest", 0)])
def test_a_fault_of_integers_is_one_of_their_parts_too(
    version: str, form: str, accumulate: Accumulate, casts: int
) -> None:
    """10.6 builds no int8 product of attention's result; the product in half precision is summed as any."""
    graph = graph_of(ATTENDED)
    quirks = quirks_in_force("tensorrt", version)
    dialect = tensorrt_dialect(lambda op: True, "tensorrt", quirks, Device(132, FEW), accumulate)
    emitter = Emitter(graph, dialect)
    assert form in emitter.used_forms
    assert [len(places) for places in emitter.avoided.values()] == ([1] if form == "floats" else [])
    if form == "floats":
        ops = [node.op_type for node in emitter.model.graph]
        assert ops.count("Cast") == (casts + 1 if casts else 0)  # of the weight as well


PACKED = """
    input %x: f16[batch, sequence, 64]
    weight %p: u8[8, 2, {bytes}]
    weight %s: f16[8, 2]
    weight %z: u8[8, 1]
    %y: f16[batch, sequence, 8] = graphopt.packed_linear.default(x=%x, packed=%p, scales=%s{more}, bits={bits}, block=32)
    output y = %y
"""


@pytest.mark.parametrize(
    ("bits", "more", "reason", "hint"),
    [
        (4, "", None, None),
        (8, "", "no int8 in groups whose scales may be negative", "bits: 4"),
        (4, ", zeros=%z", "no weights with zero points or a codebook", "symmetric: true"),
    ],
)
def test_packed_weights_that_the_importer_takes(bits: int, more: str, reason: str | None, hint: str | None) -> None:
    graph = graph_of(PACKED.format(bytes=4 * bits, more=more, bits=bits))
    dialect = tensorrt_dialect(lambda op: True)
    if reason is None:
        ops = [node.op_type for node in Emitter(graph, dialect).model.graph]
        assert ops.count("DequantizeLinear") == 1
        return
    with pytest.raises(LoweringError, match=reason) as error:
        Emitter(graph, dialect)
    assert error.value.hint is not None
    assert str(hint) in error.value.hint
