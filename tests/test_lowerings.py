"""Every lowering: standard dialect by the checker, the reference evaluator and onnxruntime, at two sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt.backends.onnx.emitter import Unsupported
from graphopt.backends.onnx.lowerings import LOWERINGS
from graphopt.dims import Dim
from graphopt.errors import LoweringError
from graphopt.ir import DimRange, Graph, TensorType, Weight
from tests.onnx_helpers import check_everywhere, emit

B, S = Dim.named("batch"), Dim.named("sequence")
SIZES = ({"batch": 2, "sequence": 5}, {"batch": 3, "sequence": 7})
F32, I64, BOOL = torch.float32, torch.int64, torch.bool


def graph_of(op: str, inputs: dict[str, TensorType], args: dict[str, Any], weights: dict[str, torch.Tensor]) -> Graph:
    graph = Graph(dims={"batch": DimRange(), "sequence": DimRange()})
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
    *[(f"aten.bitwise_{name}.Tensor", MASKS, {"self": "%m", "other": "%n"}, {}) for name in ("and", "or", "xor")],
    ("aten.bitwise_not.default", MASKS, {"self": "%m"}, {}),
    ("aten.logical_and.default", MASKS, {"self": "%m", "other": "%n"}, {}),
    ("aten.pow.Tensor_Scalar", X, {"self": "%x", "exponent": 2}, {}),
    ("aten.pow.Tensor_Scalar", X, {"self": "%x", "exponent": 3.0}, {}),
    ("aten.to.dtype", INT, {"self": "%i", "dtype": F32}, {}),
    ("aten.to.dtype", INT, {"self": "%i", "dtype": BOOL}, {}),
    ("aten.reshape.default", X, {"self": "%x", "shape": (B * S, 8)}, {}),
    ("aten.reshape.default", X, {"self": "%x", "shape": (B, 2, S, 4)}, {}),
    ("aten.unsqueeze.default", X, {"self": "%x", "dim": 1}, {}),
    ("aten.expand.default", XY, {"self": "%y", "size": (B, S, 8)}, {}),
    ("aten.transpose.int", X, {"self": "%x", "dim0": 0, "dim1": 2}, {}),
    ("aten.permute.default", X, {"self": "%x", "dims": (2, 0, 1)}, {}),
    ("aten.slice.Tensor", X, {"self": "%x", "dim": 2, "start": 1, "end": 7, "step": 2}, {}),
    ("aten.slice.Tensor", X, {"self": "%x", "dim": 1, "start": 1, "end": S, "step": 1}, {}),
    ("aten.select.int", X, {"self": "%x", "dim": 1, "index": 0}, {}),
    ("aten.select.int", X, {"self": "%x", "dim": 1, "index": S - 1}, {}),
    ("aten.cat.default", X, {"tensors": ("%x", "%x"), "dim": 1}, {}),
    ("aten.split_with_sizes.default", X, {"self": "%x", "split_sizes": (3, 5), "dim": 2}, {}),
    ("aten.full.default", X, {"size": (B, 2), "fill_value": 1.5, "dtype": F32}, {}),
    ("aten.full.default", X, {"size": (), "fill_value": True, "dtype": BOOL}, {}),
    ("aten.arange.start_step", X, {"start": 1, "end": 2 * S + 1, "step": 2, "dtype": I64}, {}),
    ("aten.where.self", MASKS | INT, {"condition": "%n", "self": "%i", "other": "%i"}, {}),
    ("aten.where.ScalarOther", MASKED, {"condition": "%m", "self": "%f", "other": -1.0}, {}),
    ("aten.masked_fill.Scalar", MASKED, {"self": "%f", "mask": "%m", "value": -1.0}, {}),
    ("aten.embedding.default", INT, {"weight": "%w", "indices": "%i"}, W),
    ("aten.gather.default", ROW, {"self": "%t", "dim": 1, "index": "%i"}, {"t": torch.arange(4)[None]}),
    ("aten.gather.default", INT, {"self": "%i", "dim": 1, "index": "%i"}, {}),
    ("aten.matmul.default", X | {"z": TensorType(F32, (B, 8, 3))}, {"self": "%x", "other": "%z"}, {}),
    ("aten.bmm.default", X | {"z": TensorType(F32, (B, 8, 3))}, {"self": "%x", "mat2": "%z"}, {}),
    ("aten.linear.default", X, {"input": "%x", "weight": "%w", "bias": "%b"}, W),
    ("aten.linear.default", X, {"input": "%x", "weight": "%w"}, W),
    ("aten.linear.default", {"r": TensorType(F32, (B * S, 8)), **X}, {"input": "%r", "weight": "%w", "bias": "%b"}, W),
    ("aten.softmax.int", X, {"self": "%x", "dim": 1}, {}),
    ("aten.mean.dim", X, {"self": "%x", "dim": (1, 2), "keepdim": True}, {}),
    ("aten.sum.dim_IntList", X, {"self": "%x", "dim": (1,), "keepdim": False}, {}),
    ("aten.amax.default", X, {"self": "%x", "dim": (2,), "keepdim": True}, {}),
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
    *[
        ("graphopt.gated_activation.default", X, {"gate": "%x", "up": "%x", "activation": name}, {})
        for name in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
    ],
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}({', '.join(map(str, case[2]))})")
def test_lowering_is_the_op(case: tuple[Any, ...]) -> None:
    graph = graph_of(*case)
    check_everywhere(graph, examples(graph))


def test_every_lowering_has_a_case() -> None:
    tested = {case[0].rpartition(".")[0] for case in CASES}
    elsewhere = {  # attention, rotary and packing have files of their own; these are synonyms that canonicalize removes
        "graphopt.rotary_embedding", "graphopt.pack_tokens", "graphopt.unpack_tokens", "aten.squeeze", "aten._softmax",
        "aten.logical_or", "aten.logical_xor", "aten.logical_not", "aten.amin",
    }  # fmt: skip
    assert LOWERINGS.keys() - tested == elsewhere


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


class TestFallback:
    """Ops without a lowering go through PyTorch's exporter, one op at a time."""

    @pytest.mark.parametrize(
        ("op", "args"),
        [
            ("aten.atan2.default", {"self": "%x", "other": "%x"}),
            ("aten.flip.default", {"self": "%x", "dims": (1,)}),
            ("aten.constant_pad_nd.default", {"self": "%x", "pad": (1, 2), "value": 0.5}),
            ("aten.repeat.default", {"self": "%x", "repeats": (1, 2, 1)}),
            ("aten.clamp.default", {"self": "%x", "min": 0.2, "max": 0.8}),
        ],
    )
    def test_equal(self, op: str, args: dict[str, Any]) -> None:
        graph = graph_of(op, X, args, {})
        check_everywhere(graph, examples(graph))

    def test_index_with_tensors(self) -> None:
        graph = graph_of("aten.index.Tensor", X | {"k": TensorType(I64, (S,))}, {"self": "%w", "indices": ("%k",)}, W)
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
