"""The standard dialect's few-bit graphs in TensorRT-RTX, which parses and builds on machines without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import graphopt
from graphopt.backends.onnx.backend import STANDARD_PASSES
from graphopt.sources import Source, transformers_source

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed (make env does)"
)
SIZES = {"batch": (1, 2, 4), "sequence": (4, 8, 16)}  # smallest, expected, largest
NO_DATA: dict[str, Any] = {"scheme": "weight_only", "group": 128}


def bert() -> Source:
    """Heads of 32, which its attention has kernels for."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers_source(BertModel(config), name="bert")


def texts() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 99, (4, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}]


def built(model: Path, source: Source) -> tuple[Any, str]:
    """The plan of a model for compute capability 8.9, or None, and what the parser said."""
    trt: Any = importlib.import_module("tensorrt_rtx_bindings")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        return None, "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        axes = [SIZES[str(axis)] for axis in source.axes[name]]
        profile.set_shape(name, *(tuple(axis[which] for axis in axes) for which in range(3)))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config), ""


SCHEMES: dict[str, list[dict[str, Any]]] = {
    "fp16": [],
    "int8_static": [{"scheme": "int8_static", "calibration": {"data": texts()}}],
    "int8_smooth": [{"scheme": "int8_smooth", "calibration": {"data": texts()}}],
    "fp8": [{"scheme": "fp8", "calibration": {"data": texts()}}],
    "int4": [NO_DATA],
    "int4, gptq": [{**NO_DATA, "algorithm": "gptq", "calibration": {"data": texts()}}],
}


@pytest.mark.parametrize("name", SCHEMES)
def test_it_builds_in_half_precision(name: str, tmp_path: Path) -> None:
    source = bert()
    steps = [{"kind": "quantize", "embeddings": False, **options} for options in SCHEMES[name]]
    passes = [*STANDARD_PASSES, {"kind": "cast"}, *steps]
    graphopt.compile(source, tmp_path / "e", passes=passes, target={"backend": "onnx"})
    plan, words = built(tmp_path / "e" / "model.onnx", source)
    assert plan is not None, words
