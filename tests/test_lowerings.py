"""Every lowering: standard dialect by the checker, the reference evaluator and onnxruntime, at two sizes.

Those of ``routing.py`` and ``convolutions.py``, attention and rotary embeddings have files of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from graphopt.backends.onnx.dialects import STANDARD
from graphopt.backends.onnx.emitter import Unsupported
from graphopt.backends.onnx.lowerings import LOWERINGS
from graphopt.backends.onnx.moves import MOVES
from graphopt.dims import Dim
from graphopt.errors import LoweringError
from graphopt.ir import Graph
from graphopt.tensors import DimRange, TensorType, Weight
from tests.onnx_helpers import ONNXRUNTIME, assert_same, check_everywhere, emit, run_onnxruntime

B, S = Dim.named("batch"), Dim.named("sequence")
SIZES = ({"batch": 2, "sequence": 5}, {"batch": 3, "sequence": 7})
F32, I64, BOOL = torch.float32, torch.int64, torch.bool


def graph_of(
    op: str,
    inputs: Mapping[str, TensorType],
    args: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    **smallest: int,
) -> Graph:
    """The graph of one op; an operand is written ``%name``. ``sequence=9``: that size is at least 9."""
    names = sorted({name for type in inputs.values() for name in type.names})
    graph = Graph(dims={name: DimRange(smallest.get(name, 1), None) for name in names})
    values: dict[str, Any] = {name: graph.add_input(name, type) for name, type in inputs.items()}
    values |= {name: graph.add_weight(name, Weight.of(tensor)) for name, tensor in weights.items()}

    def leaf(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(map(leaf, arg))
        return values[arg[1:]] if isinstance(arg, str) and arg.startswith("%") else arg

    node = graph.insert(op, {name: leaf(arg) for name, arg in args.items()})
    for index, value in enumerate(node.outputs):
        graph.outputs[f"y{index}"] = value
    graph.verify()
    return graph


def examples(graph: Graph) -> list[dict[str, torch.Tensor]]:
    found = []
    for sizes in SIZES:
        inputs = {}
        for name, value in graph.inputs.items():
            shape = [int(size) for size in value.type.concrete(sizes).shape]  # type: ignore[arg-type]
            if value.type.dtype == F32:
                inputs[name] = torch.rand(shape) + 0.1
            elif value.type.dtype == BOOL:
                inputs[name] = torch.rand(shape) < 0.6
            else:
                inputs[name] = torch.randint(0, 4, shape)
        found.append(inputs)
    return found


X = {"x": TensorType(F32, (B, S, 8))}
XY = X | {"y": TensorType(F32, (B, 1, 8))}
ROW = X | {"i": TensorType(I64, (1, S))}
INT = {"i": TensorType(I64, (B, S))}
PART = X | {"p": TensorType(F32, (B, S, 3))}
ROWS = X | {"p": TensorType(F32, (B, S - 1, 8))}
XZ = X | {"z": TensorType(F32, (B, 8, 3))}
MASKS = {"m": TensorType(BOOL, (B, S)), "n": TensorType(BOOL, (B, 1))}
MASKED = MASKS | {"f": TensorType(F32, (B, S))}
W = {"w": torch.randn(6, 8), "b": torch.randn(6)}
SCALES = {"g": torch.randn(8), "c": torch.randn(8)}

UNARY = (
    "neg", "abs", "exp", "log", "sqrt", "rsqrt", "cos", "sin", "tanh", "sigmoid", "relu", "erf", "reciprocal", "floor", "ceil",
    "sign", "silu", "gelu", "softplus",
)  # fmt: skip
CASES: list[tuple[str, dict[str, TensorType], dict[str, Any], dict[str, torch.Tensor]]] = [
    *[
        (f"aten.{name}.default", X, {"self": "%x"}, {})
        for name in UNARY
    ],
    ("aten.gelu.default", X, {"self": "%x", "approximate": "tanh"}, {}),
    *[(f"aten.{name}.Tensor", XY, {"self": "%x", "other": "%y"}, {}) for name in ("add", "sub", "mul", "div")],
    *[(f"aten.{name}.default", XY, {"self": "%x", "other": "%y"}, {}) for name in ("maximum", "minimum")],
    ("aten.add.Tensor", XY, {"self": "%x", "other": "%y", "alpha": 2}, {}),
    ("aten.mul.Tensor", X, {"self": "%x", "other": 0.5}, {}),
    ("aten.add.Tensor", INT | X, {"self": "%i", "other": 1.5}, {}),
    ("aten.div.Tensor", INT, {"self": "%i", "other": 2}, {}),
    *[(f"aten.{name}.Tensor", XY, {"self": "%x", "other": "%y"}, {}) for name in ("le", "lt", "ge", "gt", "eq", "ne")],
    ("aten.ge.Scalar", INT, {"self": "%i", "other": 1.5}, {}),
    ("aten.eq.Scalar", MASKS, {"self": "%m", "other": 1}, {}),
    ("aten.rsub.Scalar", X, {"self": "%x", "other": 1}, {}),
    ("aten.rsub.Scalar", INT, {"self": "%i", "other": 1.5}, {}),
    ("aten.rsub.Tensor", XY, {"self": "%x", "other": "%y"}, {}),
    ("aten.rsub.Scalar", X, {"self": "%x", "other": 2, "alpha": 3}, {}),
    ("aten.floor_divide.default", XY, {"self": "%x", "other": "%y"}, {}),
    ("aten.clamp.default", X, {"self": "%x", "min": 0.2, "max": 0.8}, {}),
    ("aten.clamp.default", X, {"self": "%x", "min": 0.8, "max": 0.2}, {}),
    ("aten.clamp.default", INT, {"self": "%i", "min": 0.5}, {}),
    ("aten.clamp.default", INT, {"self": "%i", "max": 2}, {}),
    ("aten.clamp.Tensor", XY, {"self": "%y", "min": "%x"}, {}),
    *[(f"aten.bitwise_{name}.Tensor", MASKS, {"self": "%m", "other": "%n"}, {}) for name in ("and", "or", "xor")],
    ("aten.bitwise_not.default", MASKS, {"self": "%m"}, {}),
    *[(f"aten.logical_{name}.default", MASKS, {"self": "%m", "other": "%n"}, {}) for name in ("and", "or", "xor")],
    ("aten.logical_not.default", MASKS, {"self": "%m"}, {}),
    ("aten.pow.Tensor_Scalar", X, {"self": "%x", "exponent": 2}, {}),
    ("aten.pow.Tensor_Scalar", X, {"self": "%x", "exponent": 3.0}, {}),
    ("aten.to.dtype", INT, {"self": "%i", "dtype": F32}, {}),
    ("aten.to.dtype", INT, {"self": "%i", "dtype": BOOL}, {}),
    ("aten.reshape.default", X, {"self": "%x", "shape": (B * S, 8)}, {}),
    ("aten.reshape.default", X, {"self": "%x", "shape": (B, 2, S, 4)}, {}),
    ("aten.unsqueeze.default", X, {"self": "%x", "dim": 1}, {}),
    ("aten.squeeze.dim", XY, {"self": "%y", "dim": 1}, {}),
    ("aten.expand.default", XY, {"self": "%y", "size": (B, S, 8)}, {}),
    ("aten.transpose.int", X, {"self": "%x", "dim0": 0, "dim1": 2}, {}),
    ("aten.permute.default", X, {"self": "%x", "dims": (2, 0, 1)}, {}),
    ("aten.slice.Tensor", X, {"self": "%x", "dim": 2, "start": 1, "end": 7, "step": 2}, {}),
    ("aten.slice.Tensor", X, {"self": "%x", "dim": 1, "start": 1, "end": S, "step": 1}, {}),
    ("aten.select.int", X, {"self": "%x", "dim": 1, "index": 0}, {}),
    ("aten.select.int", X, {"self": "%x", "dim": 1, "index": S - 1}, {}),
    ("aten.cat.default", X, {"tensors": ("%x", "%x"), "dim": 1}, {}),
    ("aten.cat.default", MASKED | INT, {"tensors": ("%i", "%f", "%m"), "dim": 1}, {}),
    ("aten.stack.default", X, {"tensors": ("%x", "%x"), "dim": 3}, {}),
    ("aten.stack.default", INT | MASKED, {"tensors": ("%i", "%f", "%m"), "dim": 1}, {}),
    ("aten.split_with_sizes.default", X, {"self": "%x", "split_sizes": (3, 5), "dim": 2}, {}),
    ("aten.split_with_sizes.default", X, {"self": "%x", "split_sizes": (0, 8), "dim": 2}, {}),
    ("aten.split_with_sizes.default", X, {"self": "%x", "split_sizes": (1, S - 1), "dim": 1}, {}),
    ("aten.split.Tensor", X, {"self": "%x", "split_size": 3, "dim": 2}, {}),
    ("aten.split.Tensor", X, {"self": "%x", "split_size": 9, "dim": 2}, {}),
    ("aten.chunk.default", X, {"self": "%x", "chunks": 4, "dim": 2}, {}),
    ("aten.chunk.default", X, {"self": "%x", "chunks": 5, "dim": 2}, {}),
    ("aten.unbind.int", X, {"self": "%x", "dim": 2}, {}),
    ("aten.repeat.default", X, {"self": "%x", "repeats": (1, 2, 1)}, {}),
    ("aten.repeat.default", X, {"self": "%x", "repeats": (2, 1, 1, 3)}, {}),
    ("aten.repeat.default", X, {"self": "%x", "repeats": (1, S, 1)}, {}),
    ("aten.repeat.default", X, {"self": "%x", "repeats": (1, 1, 0)}, {}),
    ("aten.tile.default", X, {"self": "%x", "dims": (2,)}, {}),
    ("aten.tile.default", X, {"self": "%x", "dims": (2, 1, 1, 1)}, {}),
    ("aten.constant_pad_nd.default", X, {"self": "%x", "pad": (1, 2), "value": 0.5}, {}),
    ("aten.pad.default", X, {"self": "%x", "pad": (0, 1, 2, S)}, {}),
    ("aten.pad.default", MASKS, {"self": "%m", "pad": (1, 0), "value": True}, {}),
    ("aten.pad.default", INT, {"self": "%i", "pad": (0, 1, 0, 0), "value": -1.0}, {}),
    ("aten.roll.default", X, {"self": "%x", "shifts": (3,), "dims": (2,)}, {}),
    ("aten.roll.default", X, {"self": "%x", "shifts": (-3, 9), "dims": (2, 2)}, {}),
    ("aten.roll.default", X, {"self": "%x", "shifts": (1,), "dims": (1,)}, {}),
    ("aten.copy.default", X | {"h": TensorType(torch.int64, (B, 1, 8))}, {"self": "%x", "src": "%h"}, {}),
    *[
        ("aten.slice_scatter.default", PART, {"self": "%x", "src": "%p", "dim": 2} | bounds, {})
        for bounds in ({"start": 5}, {"end": 3}, {"start": 2, "end": 5}, {"start": -4, "end": -1}, {"end": 6, "step": 2})
    ],
    ("aten.slice_scatter.default", ROWS, {"self": "%x", "src": "%p", "dim": 1, "start": 1}, {}),
    ("aten.full.default", X, {"size": (B, 2), "fill_value": 1.5, "dtype": F32}, {}),
    ("aten.full.default", X, {"size": (), "fill_value": True, "dtype": BOOL}, {}),
    ("aten.arange.start_step", X, {"start": 1, "end": 2 * S + 1, "step": 2, "dtype": I64}, {}),
    ("aten.arange.start_step", X, {"start": S, "end": 0, "step": -2, "dtype": F32}, {}),
    ("aten.arange.start_step", X, {"start": 0.5, "end": 3, "step": 0.75, "dtype": F32}, {}),
    ("aten.arange.start_step", X, {"start": 1.0, "end": -1.0, "step": -0.25, "dtype": torch.float64}, {}),
    ("aten.where.self", MASKS | INT, {"condition": "%n", "self": "%i", "other": "%i"}, {}),
    ("aten.where.ScalarOther", MASKED, {"condition": "%m", "self": "%f", "other": -1.0}, {}),
    ("aten.masked_fill.Scalar", MASKED, {"self": "%f", "mask": "%m", "value": -1.0}, {}),
    ("aten.embedding.default", INT, {"weight": "%w", "indices": "%i"}, W),
    ("aten.gather.default", ROW, {"self": "%t", "dim": 1, "index": "%i"}, {"t": torch.arange(4)[None]}),
    ("aten.gather.default", INT, {"self": "%i", "dim": 1, "index": "%i"}, {}),
    ("aten.gather.default", X | {"k": TensorType(I64, (B, S, 2))}, {"self": "%x", "dim": 2, "index": "%k"}, {}),
    ("aten.einsum.default", XZ, {"equation": "bsd,bde->bse", "tensors": ("%x", "%z")}, {}),
    ("aten.einsum.default", X, {"equation": "...d, dT -> ...T", "tensors": ("%x", "%w")}, {"w": torch.randn(8, 3)}),
    ("aten.einsum.default", X, {"equation": "sij,skj", "tensors": ("%x", "%x")}, {}),
    ("aten.einsum.default", X, {"equation": "bsd,btd->bst", "tensors": ("%x", "%x")}, {}),
    ("aten.einsum.default", X, {"equation": "bsd->d", "tensors": ("%x",)}, {}),
    ("aten.matmul.default", XZ, {"self": "%x", "other": "%z"}, {}),
    ("aten.bmm.default", XZ, {"self": "%x", "mat2": "%z"}, {}),
    ("aten.linear.default", X, {"input": "%x", "weight": "%w", "bias": "%b"}, W),
    ("aten.linear.default", X, {"input": "%x", "weight": "%w"}, W),
    ("aten.linear.default", {"r": TensorType(F32, (B * S, 8)), **X}, {"input": "%r", "weight": "%w", "bias": "%b"}, W),
    ("aten.softmax.int", X, {"self": "%x", "dim": 1}, {}),
    ("aten._softmax.default", X, {"self": "%x", "dim": 2, "half_to_float": False}, {}),
    ("aten.mean.dim", X, {"self": "%x", "dim": (1, 2), "keepdim": True}, {}),
    ("aten.sum.dim_IntList", X, {"self": "%x", "dim": (1,), "keepdim": False}, {}),
    ("aten.amax.default", X, {"self": "%x", "dim": (2,), "keepdim": True}, {}),
    ("aten.amin.default", X, {"self": "%x", "dim": (0, 2), "keepdim": False}, {}),
    ("aten.sum.default", MASKS, {"self": "%m"}, {}),
    ("aten.mean.default", X, {"self": "%x"}, {}),
    ("aten.cumsum.default", MASKS, {"self": "%m", "dim": 1}, {}),
    ("aten.cumsum.default", INT, {"self": "%i", "dim": 1}, {}),
    ("aten.argmax.default", X, {"self": "%x", "dim": 2}, {}),
    ("aten.layer_norm.default", X, {"input": "%x", "normalized_shape": (8,), "weight": "%g", "bias": "%c"}, SCALES),
    ("aten.layer_norm.default", X, {"input": "%x", "normalized_shape": (8,)}, {}),
    ("aten.rms_norm.default", X, {"input": "%x", "normalized_shape": (8,), "weight": "%g", "eps": 1e-6}, SCALES),
    (
        "graphopt.add_layer_norm.default", X | {"z": TensorType(F32, (B, S, 8))},
        {"x": "%x", "residual": "%z", "normalized_shape": (8,), "weight": "%g", "bias": "%c"}, SCALES,
    ),
    (
        "graphopt.add_rms_norm.default", X | {"z": TensorType(F32, (B, S, 8))},
        {"x": "%x", "residual": "%z", "normalized_shape": (8,), "weight": "%g"}, SCALES,
    ),
    ("graphopt.quick_gelu.default", X, {"x": "%x"}, {}),
    ("aten.log_sigmoid.default", X, {"self": "%x"}, {}),
    *[
        ("graphopt.gated_activation.default", X, {"gate": "%x", "up": "%x", "activation": name}, {})
        for name in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
    ],
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}({', '.join(map(str, case[2]))})")
def test_lowering_is_the_op(case: tuple[Any, ...]) -> None:
    graph = graph_of(*case)
    check_everywhere(graph, examples(graph))


def test_the_logarithm_of_a_sigmoid_that_rounds_to_0() -> None:
    graph = graph_of("aten.log_sigmoid.default", {"x": TensorType(F32, (B,))}, {"self": "%x"}, {})
    check_everywhere(graph, [{"x": torch.tensor([-100.0, -50.0, -25.0, -15.0, 0.0, 15.0, 50.0])}])


def test_every_lowering_has_a_case() -> None:
    tested = {case[0].rpartition(".")[0] for case in CASES}
    elsewhere = {  # the first four with attention, the others below
        "graphopt.rotary_embedding", "graphopt.pack_tokens", "graphopt.unpack_tokens", "graphopt.packed_attention",
        "aten.view_as_real", "aten.view_as_complex",
    }  # fmt: skip
    assert (LOWERINGS | MOVES).keys() - tested == elsewhere


def test_complex_numbers_are_pairs() -> None:
    """Neither end of the way through complex numbers costs anything."""
    graph = graph_of("aten.view_as_complex.default", {"p": TensorType(F32, (B, S, 2))}, {"self": "%p"}, {})
    back = graph.insert("aten.view_as_real.default", {"self": graph.outputs["y0"]})
    graph.outputs = {"y": back.output}
    check_everywhere(graph, examples(graph))
    assert [node.op_type for node in emit(graph).graph.node] == ["Identity"]


@pytest.mark.parametrize("divisor", [3, -3, 1, -7])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("op", ["floor_divide", "floor_divide.Scalar", "div.Scalar_mode", "div.Tensor_mode"])
def test_integers_are_divided_towards_minus_infinity(op: str, dtype: torch.dtype, divisor: int) -> None:
    tensor = "Scalar" not in op
    packet, _, overload = op.partition(".")
    mode = {"rounding_mode": "floor"} if packet == "div" else {}
    weights = {"d": torch.tensor([divisor, -divisor], dtype=dtype)} if tensor else {}
    args = {"self": "%i", "other": "%d" if tensor else divisor} | mode
    inputs = {"i": TensorType(dtype, (S, 2))}
    graph = graph_of(f"aten.{packet}.{overload or 'default'}", inputs, args, weights)
    numbers = torch.arange(-9, 9, dtype=dtype).reshape(9, 2)
    check_everywhere(graph, [{"i": numbers}, {"i": numbers[:4]}])


@pytest.mark.parametrize("mode", ["floor", "trunc"])
@pytest.mark.parametrize("dtype", [F32, torch.int64])
def test_a_division_that_rounds(mode: str, dtype: torch.dtype) -> None:
    args = {"self": "%x", "other": 2, "rounding_mode": mode}
    graph = graph_of("aten.div.Scalar_mode", {"x": TensorType(dtype, (S,))}, args, {})
    check_everywhere(graph, [{"x": torch.arange(-5, 6).to(dtype)}, {"x": torch.tensor([-7, 7]).to(dtype)}])


@pytest.mark.parametrize("pad", [(-1, 2), (-2, -3), (0, 0, -1, 1)])
def test_negative_padding_cuts_off(pad: tuple[int, ...]) -> None:
    """The reference evaluator pads with numpy, which cannot."""
    graph = graph_of("aten.pad.default", X, {"self": "%x", "pad": pad}, {})
    for dialect in (STANDARD, ONNXRUNTIME):
        model = emit(graph, dialect)
        for inputs in examples(graph):
            assert_same(graph, inputs, run_onnxruntime(model, inputs), 0)


def test_a_gather_of_a_part_of_the_other_axes() -> None:
    """The reference evaluator holds that the other axes are equal; torch and onnxruntime do not."""
    inputs = X | {"k": TensorType(I64, (B, 1, 3))}
    graph = graph_of("aten.gather.default", inputs, {"self": "%x", "dim": 2, "index": "%k"}, {})
    model = emit(graph)
    for given in examples(graph):
        assert_same(graph, given, run_onnxruntime(model, given), 0)


def test_sizes_are_computed_once() -> None:
    graph = graph_of("aten.reshape.default", X, {"self": "%x", "shape": (B, 2, S, 4)}, {})
    again = graph.insert("aten.expand.default", {"self": graph.value("reshape"), "size": (B, 2, S, 4)})
    graph.outputs["z"] = again.output
    model = emit(graph)
    assert sum(node.op_type == "Shape" for node in model.graph.node) <= 2


def test_names_and_origin_are_kept() -> None:
    graph = Graph(dims={"batch": DimRange()})
    x = graph.add_input("pixel_values", TensorType(F32, (B, 3)))
    node = graph.insert("aten.relu.default", {"self": x}, origin=("encoder.layer.0", "model.py:7"))
    graph.outputs["logits"] = node.output
    model = emit(graph)
    assert [value.name for value in model.graph.input] == ["pixel_values"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    props = {prop.key: prop.value for prop in model.graph.node[0].metadata_props}
    assert props["graphopt.origin"] == "encoder.layer.0 | model.py:7"


def test_an_input_and_a_weight_as_outputs() -> None:
    graph = Graph(dims={"batch": DimRange()})
    x = graph.add_input("x", TensorType(F32, (B, 3)))
    w = graph.add_weight("w", Weight.of(torch.ones(3)))
    y = graph.insert("aten.add.Tensor", {"self": x, "other": w}).output
    graph.outputs = {"same": x, "weight": w, "sum": y, "sum_again": y}
    check_everywhere(graph, [{"x": torch.rand(2, 3)}])


def fault(reason: str, op: str, inputs: Mapping[str, TensorType], args: dict[str, Any], **weights: torch.Tensor) -> Any:
    """A lowering that is known to be wrong."""
    return pytest.param(
        (op, inputs, args, weights), id=reason, marks=pytest.mark.xfail(strict=True, reason=f"{op}: {reason}")
    )


def steps(start: float, end: float, step: float, dtype: torch.dtype) -> dict[str, Any]:
    return {"start": start, "end": end, "step": step, "dtype": dtype}


def filled(shape: tuple[Any, ...], number: Any) -> dict[str, Any]:
    return {"size": shape, "fill_value": number, "dtype": I64}


FLAGS = {"m": TensorType(BOOL, (B, S)), "n": TensorType(BOOL, (B, S))}
FAULTS = [
    pytest.param(("aten.softplus.default", X, {"self": "%x", "beta": 2}, {}), id="softplus with a beta"),
    fault("ONNX orders no booleans", "aten.le.Tensor", FLAGS, {"self": "%m", "other": "%n"}),
    fault("ONNX orders no booleans", "aten.gt.Scalar", FLAGS, {"self": "%m", "other": False}),
    fault("ONNX adds no booleans", "aten.add.Tensor", FLAGS, {"self": "%m", "other": "%n"}),
    fault("a number of another width is compared in its own", "aten.eq.Tensor", X, {"self": "%c", "other": "%d"},
          c=torch.full((3,), 0.1), d=torch.tensor(0.1, dtype=torch.float64)),
    fault("onnxruntime chooses no booleans", "aten.where.self", FLAGS, {"condition": "%m", "self": "%n", "other": "%m"}),
    fault("onnxruntime chooses no booleans", "aten.masked_fill.Scalar", FLAGS, {"self": "%n", "mask": "%m", "value": True}),
    *[fault("ONNX rounds no integers", f"aten.{name}.default", INT, {"self": "%i"}) for name in ("floor", "ceil")],
    fault("onnxruntime has no Relu of int64", "aten.relu.default", INT, {"self": "%i"}),
    fault("integers are not promoted", "aten.rsqrt.default", INT, {"self": "%k"}, k=torch.arange(1, 5)),
    fault("the quotient is rounded before floor", "aten.floor_divide.default", INT, {"self": "%k", "other": 0.1},
          k=torch.ones(3)),
    fault("torch counts in double precision", "aten.arange.start_step", X, steps(0, 0.3, 0.1, F32)),
    fault("ONNX has no range of f16", "aten.arange.start_step", X, steps(0.0, 5.5, 1.0, torch.float16)),
    fault("torch counts before it cuts", "aten.arange.start_step", X, steps(0.0, 5.5, 1.0, torch.int32)),
    fault("a weight of one dimension", "aten.linear.default", X, {"input": "%r", "weight": "%v"},
          r=torch.rand(3, 8), v=torch.rand(8)),
    fault("a tensor without dimensions", "aten.gather.default", X, {"self": "%a", "dim": 0, "index": "%k"},
          a=torch.tensor(1.5), k=torch.tensor(0)),
    fault("capitals without an arrow", "aten.einsum.default", X, {"equation": "bsd,dT", "tensors": ("%x", "%w")},
          w=torch.randn(8, 3)),
    fault("the exporter has none", "aten.argsort.stable", X, {"self": "%x", "stable": True, "dim": 1}),
    pytest.param(("aten.full.default", X, filled((-(-S // 4), 2), 1), {}), id="a ceiling rounds down below zero"),
    pytest.param(("aten.full.default", X, filled((2,), (S - 20) // 3), {}), id="a negative number rounds down"),
]  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_lowering_that_is_wrong(case: tuple[Any, ...]) -> None:
    """Each stands for a model that does not compile, or that compiles and is found wrong on its probes."""
    graph = graph_of(*case)
    check_everywhere(graph, examples(graph))


class TestFallback:
    """Ops without a lowering go through PyTorch's exporter, one op at a time."""

    @pytest.mark.parametrize(
        ("op", "args"),
        [
            ("aten.atan2.default", {"self": "%x", "other": "%x"}),
            ("aten.flip.default", {"self": "%x", "dims": (1,)}),
            ("aten.log_softmax.int", {"self": "%x", "dim": 1}),
            ("aten.avg_pool1d.default", {"self": "%x", "kernel_size": (2,)}),
            ("aten.repeat_interleave.self_int", {"self": "%x", "repeats": 2, "dim": 1}),
        ],
    )
    def test_equal(self, op: str, args: dict[str, Any]) -> None:
        graph = graph_of(op, X, args, {})
        check_everywhere(graph, examples(graph))

    def test_example_sizes_are_those_that_dims_allow(self) -> None:
        """The op works from 9 on only."""
        shape = {"x": TensorType(F32, (B, 2, S))}
        graph = graph_of(
            "aten.avg_pool1d.default", shape, {"self": "%x", "kernel_size": (9,), "stride": (1,)}, {}, sequence=9
        )
        check_everywhere(graph, [{"x": torch.rand(2, 2, 9)}, {"x": torch.rand(3, 2, 14)}])

    @pytest.mark.xfail(strict=True, reason="the examples are of size 5 and more, whatever dims end at")
    def test_example_sizes_end_where_dims_end(self) -> None:
        graph = Graph(dims={"sequence": DimRange(1, 4)})
        x = graph.add_input("x", TensorType(F32, (S,)))
        table = graph.add_weight("w", Weight.of(torch.randn(4)))
        rows = graph.insert("aten.narrow.default", {"self": table, "dim": 0, "start": 0, "length": S}).output
        graph.outputs["y"] = graph.insert("aten.add.Tensor", {"self": x, "other": rows}).output
        check_everywhere(graph, [{"x": torch.rand(4)}, {"x": torch.rand(2)}])

    def test_sizes_that_are_expressions(self) -> None:
        graph = graph_of(
            "aten.flip.default", X | {"y": TensorType(F32, (2 * S + 1, B))}, {"self": "%y", "dims": (0,)}, {}
        )
        check_everywhere(graph, examples(graph))

    def test_sizes_among_the_arguments(self) -> None:
        args = {"self": "%x", "output_size": (2 * S,), "align_corners": False, "scales": None}
        graph = graph_of("aten.upsample_linear1d.default", {"x": TensorType(F32, (B, 2, S))}, args, {})
        check_everywhere(graph, examples(graph))

    def test_refusal_names_the_node(self) -> None:
        graph = graph_of("aten.special_bessel_j0.default", X, {"self": "%x"}, {})
        with pytest.raises(
            LoweringError, match=r"aten.special_bessel_j0 cannot be expressed in the standard dialect"
        ) as error:
            emit(graph)
        assert error.value.where is not None
        assert "%special_bessel_j0" in error.value.where


def test_unsupported_is_no_public_error() -> None:
    assert not issubclass(Unsupported, LoweringError)
