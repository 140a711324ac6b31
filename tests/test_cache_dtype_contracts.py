"""Caches of another dtype than the model's: options and contracts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
)

import graphopt
from graphopt.compiler import make_proof
from graphopt.errors import CalibrationError, ParityError, PipelineError
from graphopt.ir import Graph
from graphopt.passes.insert_kv_cache import InsertKvCache
from graphopt.pipeline import Context, Proof, load_passes, run_passes
from graphopt.schemas.pipeline import Budget, Exact
from graphopt.schemas.report import PassReport
from graphopt.sources import Source, transformers_source
from graphopt.tensors import DimRange
from graphopt.text import parse
from tests.test_cache_dtype import BEFORE, SOURCE, WEIGHTS, inserted, options_of
from tests.test_generation import llama

pytestmark = pytest.mark.usefixtures("kept_here")

INT8, HALF, FULL = torch.int8, torch.float16, torch.float32


# Options

KINDS = ({"kind": "canonicalize"}, {"kind": "fuse_attention"})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "int8"}, "dtype: int8 and calibration: .* need each other"),
        ({"dtype": "fp16", "calibration": {"data": "a.txt"}}, "dtype: int8 and calibration: .* need each other"),
        ({"calibration": {"data": "a.txt"}}, "dtype: int8 and calibration: .* need each other"),
        ({"dtype": "fp16", "scales": "head"}, "scales is for dtype: int8"),
        ({"scales": "channel"}, "scales is for dtype: int8"),
        ({"dtype": "int4"}, "'fp32', 'fp16' or 'int8'"),
        ({"dtype": "int8", "scales": "token", "calibration": {"data": "a.txt"}}, "'head' or 'channel'"),
        ({"dtype": "int8", "calibration": {}}, "data is missing"),
        ({"dtype": "int8", "calibration": {"data": "a.txt", "sample": 3}}, "there is no option 'calibration.sample'"),
        ({"dtype": "fp16", "budget": {"metric": "relatve", "limit": 1}}, "budget.metric: Input should be"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        load_passes([*KINDS, {"kind": "insert_kv_cache", **options}])


def test_int8_needs_a_model_to_calibrate() -> None:
    with pytest.raises(CalibrationError, match="there is no model whose inputs the data could be"):
        InsertKvCache(**options_of("int8")).run(parse(BEFORE, WEIGHTS), Context())


def test_data_that_is_not_there_is_named() -> None:
    options = {"dtype": "int8", "calibration": {"data": "none.jsonl"}}
    with pytest.raises(CalibrationError, match="there is no such calibration data") as caught:
        inserted(options)
    assert caught.value.where == "none.jsonl"


def test_a_report_says_what_it_was_calibrated_on() -> None:
    graph = parse(BEFORE, WEIGHTS)
    (report,) = run_passes(graph, [InsertKvCache(**options_of("int8", "head"))], context=Context(source=SOURCE))
    assert (report.options["dtype"], report.options["scales"]) == ("int8", "head")
    assert "'data': '<list>'" in str(report.options["calibration"])


# Contracts


@pytest.mark.parametrize(
    ("options", "contract"),
    [
        ({}, Exact()),
        ({"dtype": "fp32"}, Exact()),
        ({"dtype": "fp16"}, Budget(metric="relative", limit=0.01)),
        ({"dtype": "int8", "calibration": {"data": []}}, Budget(metric="cosine", limit=0.99)),
        ({"dtype": "fp16", "budget": {"metric": "kl", "limit": 0.5}}, Budget(metric="kl", limit=0.5)),
        ({"budget": {"metric": "snr", "limit": 60}}, Budget(metric="snr", limit=60)),
    ],
)
def test_contracts(options: dict[str, Any], contract: Exact | Budget) -> None:
    assert InsertKvCache(**options).contract() == contract


DIMS = {"batch": (1, 4)}


@functools.cache
def model() -> Source:
    return transformers_source(llama())


def traced(source: Source) -> Graph:
    dims = {name: DimRange(*bounds) for name, bounds in DIMS.items()}
    return graphopt.trace(source.module, source.inputs, source.axes, dims, source.dims, source.truths)


@functools.cache
def original() -> Graph:
    return traced(model())


@functools.cache
def proof() -> Proof:
    """Probes, and what eager says."""
    return make_proof(model(), original())


def through(options: Mapping[str, Any], fused: bool, proof: Proof | None = None) -> tuple[Graph, list[PassReport]]:
    """The model's graph after its passes."""
    graph = original().clone()
    steps = load_passes(passes_of(options, fused))
    return graph, run_passes(graph, steps, context=Context(source=model()), proof=proof)


DATA_TOKENS = [list(range(5, 45)), list(range(60, 90))]
TEXTS = [{"input_ids": [row], "attention_mask": [[1] * len(row)]} for row in DATA_TOKENS]
INT8_OPTIONS: dict[str, Any] = {"dtype": "int8", "calibration": {"data": TEXTS}}


def passes_of(options: Mapping[str, Any], fused: bool) -> list[dict[str, Any]]:
    more = [{"kind": "fuse_cached_attention"}] if fused else []
    return [*KINDS, {"kind": "insert_kv_cache", **options}, *more]


def test_later_passes_are_held_to_the_budget() -> None:
    _, reports = through({"layout": "static", "max_length": 48} | INT8_OPTIONS, True, proof())
    said = [report.parity.contract for report in reports if report.parity is not None]
    assert said == ["exact", "exact", "cosine 0.99", "cosine 0.99"]
    worst = [report.parity.worst for report in reports if report.parity is not None]
    assert 0.99 < worst[2] < 1 - 1e-6  # something is rounded
    assert worst[3] == pytest.approx(worst[2], abs=1e-4)


@pytest.mark.parametrize("budget", [{"metric": "relative", "limit": 1e-7}, {"metric": "cosine", "limit": 1.0}])
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_budget_that_does_not_hold(dtype: str, budget: dict[str, Any]) -> None:
    options: dict[str, Any] = (INT8_OPTIONS if dtype == "int8" else {"dtype": dtype}) | {"budget": budget}
    with pytest.raises(ParityError, match="insert_kv_cache"):
        through(options, False, proof())


def test_keys_and_values_of_an_encoder_stay_as_they_are() -> None:
    """A decoder's own cache is int8; what it reads of the encoder is made once, in what the model computes in."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    source = transformers_source(T5ForConditionalGeneration(config))
    graph = traced(source)
    tokens = torch.randint(1, 99, (2, 7))
    data = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "decoder_input_ids": tokens}]
    options = {"dtype": "int8", "calibration": {"data": data}}
    reports = run_passes(
        graph,
        load_passes(passes_of(options, fused=False)),
        context=Context(source=source),
        proof=make_proof(source, graph),
    )
    types = {name: value.type.dtype for name, value in graph.inputs.items()}
    assert {dtype for name, dtype in types.items() if name.startswith("past_key_values")} == {INT8}
    assert {dtype for name, dtype in types.items() if name.startswith("cross_key_values")} == {FULL}
    assert reports[-1].parity is not None
    assert reports[-1].parity.holds
