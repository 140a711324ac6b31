"""quantize: what is computed on integers, and what engines make of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import graphopt
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.quantized_weights import Packing, nearest_groups
from graphopt.schemas.report import PassReport
from graphopt.sources import Source, transformers_source
from graphopt.tensors import TensorType, Weight
from tests.onnx_helpers import ONNXRUNTIME, emit, run_onnxruntime, run_reference
from tests.rules import inputs_of, load, program
from tests.test_generation import llama
from tests.test_quantize import (
    BEFORE,
    FEATURES,
    SCHEMES,
    TABLE,
    TIED,
    by_groups,
    by_rows,
    loaded,
    quantize,
    quantized,
    step_of,
)
from tests.tiny import tiny_bert

pytestmark = pytest.mark.usefixtures("one_thread")  # the models are too small for several

SIZES: tuple[dict[str, int], ...] = ({"batch": 2, "sequence": 6}, {"batch": 3, "sequence": 1})


# What is computed


def rounded(x: Tensor, scheme: str) -> Tensor:
    """Inputs as the scheme has them, by numpy."""
    numbers = x.numpy()
    if scheme == "int8_static":
        step = np.float32(3) / np.float32(127)
        return torch.from_numpy(np.clip(np.rint(numbers / step), -128, 127) * step)
    if scheme == "int8_token":
        steps = np.abs(numbers).max(-1, keepdims=True) / np.float32(127)
        return torch.from_numpy(np.rint(numbers / steps) * steps)
    if scheme == "int8_dynamic":
        low, high = min(numbers.min(), np.float32(0)), max(numbers.max(), np.float32(0))
        step = (high - low) / np.float32(255)
        zero = np.rint(-low / step)
        return torch.from_numpy((np.clip(np.rint(numbers / step) + zero, 0, 255) - zero) * step)
    return x


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_are_of_rounded_numbers(scheme: str, sizes: dict[str, int]) -> None:
    graph = quantized(BEFORE, step_of(scheme))
    before = load(program(BEFORE))
    inputs = inputs_of(before, sizes)
    inputs["x"][0, 0, 0] = 9  # more than in the data
    got = run(graph, inputs)
    for name, bias in (("up", before.weights["mlp.up.bias"].load()), ("gate", 0)):
        weight = before.weights[f"mlp.{name}.weight"].load().numpy()
        numbers, scales = by_groups(weight, 4, 32) if scheme == "weight_only" else by_rows(weight)
        own = torch.from_numpy((numbers * scales[..., None]).reshape(len(weight), -1)[:, :FEATURES].astype(np.float32))
        expected = rounded(inputs["x"], scheme) @ own.T + bias
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-4)


def assert_relative(got: NDArray[Any], expected: Tensor, tolerance: float = 1e-3) -> None:
    assert got.shape == tuple(expected.shape)
    off = float((torch.from_numpy(np.array(got)) - expected).abs().max())
    assert off <= tolerance * float(expected.abs().max()), off


def feeds() -> list[dict[str, Tensor]]:
    return [inputs_of(load(program(BEFORE)), sizes) for sizes in SIZES]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_onnxruntime_computes_what_the_interpreter_does(scheme: str) -> None:
    """Both linears of one input, and one of them alone."""
    for options in ({}, {"skip": ("*.gate",)}):
        graph = quantized(BEFORE, step_of(scheme, **options))
        model = emit(graph, ONNXRUNTIME)
        kinds = {node.op_type for node in model.graph.node}
        assert kinds & {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"}, kinds
        for inputs in feeds():
            for got, expected in zip(run_onnxruntime(model, inputs), run(graph, inputs).values(), strict=True):
                assert_relative(got, expected, 2e-2 if scheme == "weight_only" else 1e-3)  # inputs in integers too


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 128), (8, 32)])
def test_groups_in_onnxruntime(bits: int, group: int) -> None:
    graph = quantized(BEFORE, quantize("weight_only", bits=bits, group=group))
    model = emit(graph, ONNXRUNTIME)
    for inputs in feeds():
        for got, expected in zip(run_onnxruntime(model, inputs), run(graph, inputs).values(), strict=True):
            assert_relative(got, expected, 2e-2)


INTEGERS = ("int8_static", "int8_dynamic", "int8_token")


@pytest.mark.parametrize("scheme", INTEGERS)
def test_the_standard_dialect_in_the_reference_evaluator(scheme: str) -> None:
    graph = quantized(BEFORE, step_of(scheme))
    model = emit(graph)
    onnx.checker.check_model(model, full_check=True)
    for inputs in feeds():
        for got, expected in zip(run_reference(model, inputs), run(graph, inputs).values(), strict=True):
            assert_relative(got, expected)


@pytest.mark.parametrize("scheme", INTEGERS)
def test_the_standard_dialect_in_onnxruntime(scheme: str) -> None:
    graph = quantized(BEFORE, step_of(scheme))
    model = emit(graph)
    for inputs in feeds():
        for got, expected in zip(run_onnxruntime(model, inputs), run(graph, inputs).values(), strict=True):
            assert_relative(got, expected)


@pytest.mark.parametrize("scheme", INTEGERS)
def test_the_standard_dialect_in_onnxruntime_without_a_bias(scheme: str) -> None:
    body = BEFORE.replace(", bias=%mlp.up.bias", "").replace("    weight %mlp.up.bias: f32[6]\n", "")
    graph = quantized(body, step_of(scheme))
    model = emit(graph)
    for inputs in feeds():
        for got, expected in zip(run_onnxruntime(model, inputs), run(graph, inputs).values(), strict=True):
            assert_relative(got, expected)


def test_packed_weights_are_int4_in_blocks_in_the_standard_dialect() -> None:
    graph = quantized(BEFORE, quantize("weight_only"))
    model = emit(graph)
    assert {tensor.data_type for tensor in model.graph.initializer if "signed" in tensor.name} == {
        onnx.TensorProto.INT4
    }
    for inputs in feeds():
        for got, expected in zip(run_onnxruntime(model, inputs), run(graph, inputs).values(), strict=True):
            assert_relative(got, expected)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_token"])
def test_inputs_of_zeros_in_onnxruntime(scheme: str) -> None:
    """No range at all: the bias is left."""
    graph = quantized(BEFORE, quantize(scheme))
    inputs = {"x": torch.zeros(1, 2, FEATURES)}
    for got, expected in zip(
        run_onnxruntime(emit(graph, ONNXRUNTIME), inputs), run(graph, inputs).values(), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group": 16}, {"bits": 8, "group": 16}], ids=str)
def test_a_tied_table_in_onnxruntime(options: dict[str, int]) -> None:
    graph = quantized(TIED, quantize("weight_only" if options else "int8_dynamic", **options))
    inputs = {"ids": torch.tensor([[0, 7, TABLE - 1], [1, 1, 2]])}
    limit = 2e-2 if options else 1e-3  # packed products round their inputs as well
    got, expected = run_onnxruntime(emit(graph, ONNXRUNTIME), inputs)[0], run(graph, inputs)["y"].numpy()
    assert np.abs(got - expected).max() <= limit * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (8, 16), (8, 32)])
def test_rows_of_a_packed_table_are_those_of_its_weight(bits: int, group: int) -> None:
    weight = torch.randn(TABLE, 20)
    parts = loaded(nearest_groups(Weight.of(weight), Packing(bits, group, symmetric=True)))
    packed, scales = parts["packed"], parts["scales"]
    places = torch.tensor([[0, 3], [TABLE - 1, 5]])
    rows = torch.ops.graphopt.unpack_rows(packed[places], scales[places], bits=bits, features=20)
    torch.testing.assert_close(rows, weight[places], atol=float(scales.abs().max()), rtol=0)
    graph = Graph()
    graph.outputs["rows"] = graph.insert(
        "graphopt.unpack_rows.default",
        {
            "packed": graph.add_input("packed", TensorType(torch.uint8, tuple(packed[places].shape))),
            "scales": graph.add_input("scales", TensorType(torch.float32, tuple(scales[places].shape))),
            "bits": bits, "features": 20,
        },
    ).output  # fmt: skip
    inputs = {"packed": packed[places], "scales": scales[places]}
    np.testing.assert_array_equal(run_onnxruntime(emit(graph), inputs)[0], rows.numpy())
    np.testing.assert_array_equal(run_reference(emit(graph), inputs)[0], rows.numpy())


# Engines

TARGET = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}
KINDS = ("canonicalize", "fuse_attention", "fuse_norm", "fuse_activation")
FUSED: list[dict[str, Any]] = [{"kind": kind, "allow_no_match": True} for kind in KINDS]
CACHED: list[dict[str, Any]] = [
    *FUSED,
    {"kind": "insert_kv_cache", "layout": "static", "max_length": 48, "logits": "last"},
    {"kind": "fuse_cached_attention"},
    {"kind": "merge_linears", "decide": "always"},
]


def texts(source: Source) -> Iterator[dict[str, Tensor]]:
    """Batches of tokens with their mask, the second row shorter."""
    generator = torch.Generator().manual_seed(3)
    for length in (6, 3):
        ids = torch.randint(0, 99, (2, length), generator=generator)
        made = {name: torch.zeros_like(ids) for name in source.tensors} | {"input_ids": ids}
        made["attention_mask"] = torch.ones_like(ids)
        made["attention_mask"][1, length - 1 :] = 0
        yield made


def report_of(compiled: Any, kind: str = "quantize") -> PassReport:
    found: PassReport = next(each for each in compiled.manifest.report.passes if each.kind == kind)
    return found


def holds(compiled: Any) -> bool:
    """What the pass leaves and the engine keep the pass's own budget."""
    checked = [report_of(compiled).parity, compiled.manifest.report.engine]
    return all(parity.holds and (parity.metric, parity.limit) == ("cosine", 0.8) for parity in checked)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_a_bert_compiles_and_keeps_its_budget(scheme: str, tmp_path: Path) -> None:
    """Static of batches with padding, that are read once."""
    source = tiny_bert()
    options: dict[str, Any] = {"calibration": {"data": texts(source)}} if scheme == "int8_static" else {}
    passes = [*FUSED, {"kind": "quantize", "scheme": scheme, "skip": ["*pooler*"], **options}]
    made = graphopt.compile(source, tmp_path / "e", passes=passes, target=TARGET)
    report = report_of(made)
    assert report.matches == {scheme: 12}
    assert [layer.reason for layer in report.layers] == [None] * 12 + ["skipped"]
    assert holds(made)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_token", "weight_only"])
def test_a_llama_with_a_cache_compiles_and_keeps_its_budget(scheme: str, tmp_path: Path) -> None:
    """With padding in the prompts that static is calibrated on."""
    source = transformers_source(llama())
    own: dict[str, dict[str, Any]] = {
        "int8_static": {"calibration": {"data": texts(source)}},
        "weight_only": {"bits": 8},
    }
    step = {"kind": "quantize", "scheme": scheme, "overrides": {"lm_head": "int8_dynamic"}, **own.get(scheme, {})}
    made = graphopt.compile(source, tmp_path / "e", passes=[*CACHED, step], target=TARGET, dims={"batch": (1, 2)})
    report = report_of(made)
    assert report.matches == {scheme: 8, "int8_dynamic": 1}
    assert [layer.module for layer in report.layers][-1] == "lm_head"
    assert sum("+" in layer.module for layer in report.layers) == 4  # the merged ones
    assert holds(made)
