"""Real models through TensorRT-RTX's builder, without a GPU; the emitted model is held to eager by the compilation."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import graphopt
from benchmarks.assets import minilm, sentences, smollm2
from benchmarks.tensorrt_models import with_cache
from graphopt.backends.tensorrt.backend import TensorRtRtxBackend
from graphopt.sources import Source, transformers_source

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx_bindings") is None,
        reason="TensorRT-RTX is not installed (make env does)",
    ),
]
TARGET: dict[str, Any] = {"backend": "tensorrt_rtx", "options": {"compute_capabilities": ["8.9"]}}


def steps_for(precision: str, data: list[Any]) -> list[dict[str, Any]]:
    int8 = {"kind": "quantize", "scheme": "int8_static", "embeddings": False, "calibration": {"data": data}}
    return [{"kind": "cast"}] * (precision != "fp32") + [int8] * (precision == "int8")


def compiled(
    source: Source, folder: Path, steps: Sequence[Mapping[str, Any]], **dims: tuple[int, int]
) -> graphopt.Compiled:
    made = graphopt.compile(source, folder, passes=[dict(step) for step in steps], target=TARGET, dims=dims)
    assert made.report.emitted is not None
    assert made.report.emitted.holds
    return made


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_minilm(precision: str, tmp_path: Path) -> None:
    texts = sentences(64)
    steps = [*TensorRtRtxBackend.standard_passes, *steps_for(precision, texts)]
    made = compiled(graphopt.load_model(str(minilm())), tmp_path / "e", steps, batch=(1, 8), sequence=(2, 128))
    layers = made.report.engine_ops
    assert layers["ATTENTION_INPUT"] == 6
    linears = 6 * 6 + 1  # and the pooler
    assert layers.get("DEQUANTIZE", 0) == (2 * linears if precision == "int8" else 0)
    assert layers.get("QUANTIZE", 0) == (4 * 6 + 1 if precision == "int8" else 0)  # q, k and v read one input


@pytest.mark.parametrize("layout", ["static", "growing"])
def test_smollm2(layout: str, tmp_path: Path) -> None:
    """Prefill and decode, in half precision."""
    longest = {"max_length": 256} if layout == "static" else {}
    steps = [*with_cache(layout=layout, dtype="fp16", logits="last", **longest), {"kind": "cast"}]
    source = graphopt.load_model(str(smollm2()))
    made = compiled(source, tmp_path / "e", steps, batch=(1, 4), sequence=(1, 256))
    layers = made.report.engine_ops
    assert layers["ATTENTION_INPUT"] == 30
    assert layers.get("KV_CACHE_UPDATE", 0) == (60 if layout == "static" else 0)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_vision_model(precision: str, tmp_path: Path) -> None:
    """ViT-tiny on pictures of 224 pixels, random weights."""
    torch.manual_seed(0)
    config = t.ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    source = transformers_source(t.ViTModel(config), name="vit")
    pictures = [{"pixel_values": torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))}]
    steps = [*TensorRtRtxBackend.standard_passes, *steps_for(precision, pictures)]
    made = compiled(source, tmp_path / "e", steps, batch=(1, 8))
    assert made.report.engine_ops["ATTENTION_INPUT"] == 12
