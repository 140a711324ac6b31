"""What a target heeds, and how its contracts' measures are shown."""

from __future__ import annotations

import math
from typing import Any

import pytest

from graphopt.backend import backend_class
from graphopt.errors import PipelineError
from graphopt.measures import measure_text
from graphopt.schemas.pipeline import TargetConfig
from graphopt.schemas.report import BuildReport
from tests.test_html import parity, step


@pytest.mark.parametrize("backend", ["torch", "onnx", "tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("asked", [{"provider": "cuda"}, {"threads": 3}], ids=str)
def test_a_target_heeds_what_it_is_asked_for(backend: str, asked: dict[str, Any]) -> None:
    (name,) = asked
    with pytest.raises(PipelineError, match=f"backend: {backend} has no {name}") as error:
        backend_class(backend)(TargetConfig(backend=backend, **asked))
    assert error.value.where == f"target.{name}"
    backend_class(backend)(TargetConfig(backend=backend, tactics="fixed"))
    backend_class("onnxruntime")(TargetConfig(**asked))


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_target_without_options(backend: str) -> None:
    with pytest.raises(PipelineError, match=f"backend: {backend} has no options"):
        backend_class(backend)(TargetConfig(backend=backend, options={"foo": 1}))


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("cosine", 0.99999, "0.999990"), ("top1", 1.0, "1.000000"), ("relative", 3.9e-6, "3.9e-06"),
        ("max_abs", 0.0, "0"), ("snr", 41.26, "41.3 dB"), ("snr", math.inf, "∞ dB"),
    ],
)  # fmt: skip
def test_a_measure_is_told_from_its_limit(metric: str, value: float, text: str) -> None:
    assert measure_text(metric, value) == text


def test_every_stage_that_breaks_its_contract_is_named() -> None:
    """Of a pass that ran twice the first time too."""
    passes = [step("cast", parity=parity(worst=1e-3)), step("cast")]
    report = BuildReport(trace=parity(), passes=passes, engine=parity(worst=1e-2))
    assert report.broken == ["cast", "engine"]
