"""quantize: options of schemes, and what is kept by a budget."""

from __future__ import annotations

import re
from typing import Any

import pytest

from graphopt.errors import PipelineError
from graphopt.ir import Graph
from graphopt.ops.quantization import unpacked
from graphopt.passes.quantize import Quantize
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.schemas.report import LayerPrecision
from tests.rules import load, program, read
from tests.test_quantize import BEFORE, GATE, TIED
from tests.test_quantize_schemes import DATA, IDS, applied, off, source_of, step_of, weights, with_a_terrible_layer

# Options

GPTQ, MEND = "algorithm: gptq", "bias_correction"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scheme": "int8_dynamic", "algorithm": "gptq", **DATA}, f"{GPTQ} is for scheme: weight_only, not for int8_dyn"),
        ({"scheme": "nf4", "algorithm": "awq", **DATA}, "algorithm: awq is for scheme: weight_only, not for nf4"),
        ({"scheme": "int8_token", "overrides": {"a": {"scheme": "fp8", "algorithm": "gptq"}}, **DATA}, f"{GPTQ} is for"),
        *(({"scheme": each}, f"scheme: {each} needs calibration") for each in ("int8_smooth", "llm_int8", "fp8")),
        *(({"scheme": "weight_only", "algorithm": e}, f"{e} needs calibration") for e in ("gptq", "awq")),
        ({"scheme": "weight_only", MEND: True}, f"{MEND} needs calibration"),
        ({"scheme": "weight_only", "fallback": "fp32"}, "fallback needs calibration"),
        ({"scheme": "int8_token", "overrides": {"a": {"scheme": "weight_only", "algorithm": "awq"}}}, "awq needs calibr"),
        ({"scheme": "nf4", **DATA}, "nothing needs calibration in scheme: nf4"),
        ({"scheme": "int8_smooth", "strength": 2, **DATA}, "strength.*: Input should be less than or equal to 1"),
        ({"scheme": "llm_int8", "outliers": 0, **DATA}, "outliers: Input should be greater than 0"),
        ({"scheme": "weight_only", "algorithm": "gtpq"}, "algorithm: Input should be 'rtn', 'gptq' or 'awq'"),
        ({"scheme": "nf4", "overrides": {"a": {"bits": 8}}}, "overrides.a"),
        ({"scheme": "weight_only", "fractions": True}, "fractions: true is for scheme: weight_only with symmetric: false"),
        ({"scheme": "nf4", "symmetric": False, "fractions": True}, "fractions: true is for scheme: weight_only"),
        ({"scheme": "int8_token", "scales": "fp16"}, "scales: fp16 is for scheme: weight_only, not for int8_token"),
        ({"scheme": "weight_only", "embeddings": "fp16"}, "embeddings"),
        pytest.param({"scheme": "nf4", "overrides": {"a": {"scheme": "nf4", "bitz": 8}}}, "no option 'overrides.a.bitz'"),
        pytest.param({"scheme": "nf4", "overrides": {"a": {"scheme": "nf4", "bits": 3}}}, "4 or 8"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        step_of(**options)


def test_overrides_have_bits_and_groups_of_their_own() -> None:
    graph = read(BEFORE)
    own = {
        "*.up": {"scheme": "weight_only", "bits": 8, "group": 16},
        "*.gate": {"scheme": "weight_only", "symmetric": False},
    }
    report = applied(graph, "weight_only", group=64, overrides=own)
    assert [layer.precision for layer in report.layers] == [
        "int8 in groups of 16",
        "int4 in groups of 64 with zero points",
    ]
    shapes = {name: weight.type.shape for name, weight in graph.weights.items() if name.endswith(("packed", "zeros"))}
    assert shapes == {"mlp.up.packed": (6, 3, 16), "mlp.gate.packed": (5, 1, 32), "mlp.gate.zeros": (5, 1)}
    packed, scales = (graph.weights[f"mlp.up.{part}"].load() for part in ("packed", "scales"))
    assert float((unpacked(packed, scales, None, None, 8)[:, :40] - weights()[0]).abs().max()) < 0.02


def test_overrides_leave_behind_what_is_not_theirs() -> None:
    """Whole zeros in the middle have no fractions, int8 by row no scales of fp16."""
    own = {"*.up": "int8_token", "*.gate": {"scheme": "weight_only", "symmetric": True}}
    report = applied(read(BEFORE), "weight_only", symmetric=False, fractions=True, scales="fp16", overrides=own)
    assert [layer.precision for layer in report.layers] == ["int8_token", "int4 in groups of 32, scales of fp16"]


def test_nf4_has_4_bits_whatever_others_have() -> None:
    applied(read(BEFORE), scheme="weight_only", bits=8, overrides={"*.gate": "nf4"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "nf4", "bits": 8}, "bits is for scheme: weight_only"),
        ({"scheme": "int8_dynamic", "group": 64}, "group is for scheme: weight_only or nf4"),
        ({"scheme": "int8_dynamic", "symmetric": False}, "symmetric is for scheme: weight_only"),
        ({"scheme": "int8_dynamic", "outliers": 3.0}, "outliers is for scheme: llm_int8"),
        ({"scheme": "int8_dynamic", "strength": 0.3}, "strength is for scheme: int8_smooth"),
    ],
)
def test_options_that_no_scheme_of_a_pass_heeds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        load_passes([{"kind": "quantize", **options}])


@pytest.mark.parametrize("options", [{"scheme": "int8_smooth"}, {"scheme": "int8_static", MEND: True}], ids=str)
def test_data_that_can_be_read_once(options: dict[str, Any]) -> None:
    applied(read(BEFORE), **options, calibration={"data": iter(DATA["calibration"]["data"])})


def kept(limit: float, scheme: str = "int8_static", **options: Any) -> tuple[Graph, list[LayerPrecision], str]:
    graph, context = with_a_terrible_layer(), Context(source=source_of("x"))
    given = {"fallback": "fp32", "budget": {"metric": "relative", "limit": limit}, "allow_no_match": True}
    run_passes(graph, [step_of(scheme, **given | options, **DATA)], context=context)
    return graph, context.layers, context.notes[-1]


@pytest.mark.parametrize("fallback", ["fp32", "llm_int8"])
def test_the_one_terrible_layer_is_kept(fallback: str) -> None:
    options: dict[str, Any] = {"outliers": 1e4} if fallback == "llm_int8" else {}
    graph, layers, note = kept(0.05, fallback=fallback, **options)
    assert [(layer.module, layer.precision, layer.reason) for layer in layers] == [
        ("a", "int8_static", None), ("b", fallback, "among the most sensitive"), ("c", "int8_static", None),
    ]  # fmt: skip
    assert off(graph) <= 0.05
    assert note.startswith(f"1 of 3 layers stay in {fallback}: relative {off(graph):.4g} meets 0.05 on 2 batches (")
    assert ("weight=%b.weight" in str(graph)) == (fallback == "fp32")


def test_effects_are_of_each_layer_alone() -> None:
    _, layers, note = kept(0.05)
    for layer in layers:
        alone = with_a_terrible_layer()
        applied(alone, "int8_static", modules=[layer.module], **DATA)
        assert layer.effect == pytest.approx(off(alone), rel=1e-4)
    assert max(layers, key=lambda layer: layer.effect or 0).module == "b"
    whole = with_a_terrible_layer()
    applied(whole, "int8_static", **DATA)
    assert note.endswith(f"({off(whole):.4g} with none)")


def test_a_budget_that_holds_at_once_keeps_none() -> None:
    graph, layers, note = kept(1e9)
    assert [layer.precision for layer in layers] == ["int8_static"] * 3
    assert all(layer.effect is not None for layer in layers)
    assert str(graph).count("static_linear") == 3
    assert re.match("0 of 3 layers stay in fp32: .* meets 1e\\+09", note)


def test_a_budget_that_none_meets_keeps_all_and_says_so() -> None:
    _, layers, note = kept(1e-9, fallback="int8_token")
    assert [layer.precision for layer in layers] == ["int8_token"] * 3
    assert re.match("3 of 3 layers stay in int8_token: .* does not meet 1e-09", note)


def test_what_is_skipped_has_no_effect() -> None:
    _, layers, note = kept(0.05, skip=["b"])
    assert [(layer.module, layer.reason) for layer in layers if layer.effect is None] == [("b", "skipped")]
    assert note.startswith("0 of 2 layers")


def test_gptq_with_gptq_to_fall_back_on() -> None:
    """Nothing falls back, so all is as without."""
    options: dict[str, Any] = {"scheme": "weight_only", "algorithm": "gptq"}
    graph, _, note = kept(1e9, **options, fallback={"scheme": "weight_only", "bits": 8})
    assert note.startswith("0 of 3")
    plain = with_a_terrible_layer()
    applied(plain, **options, **DATA)
    assert off(graph) == pytest.approx(off(plain), rel=1e-4)


def test_a_skipped_layer_needs_no_range_to_fall_back_on() -> None:
    """One whose input is always 0."""
    zero = "%zero: f32[batch, sequence, 40] = aten.mul.Scalar(self=%x, other=0.0)"
    body = BEFORE.replace(GATE, f"{zero}\n{GATE}").replace(
        "input=%x, weight=%mlp.gate", "input=%zero, weight=%mlp.gate"
    )
    report = applied(read(body), "int8_token", skip=["*.gate"], fallback="int8_static", **DATA)
    assert report.matches == {"int8_token": 1}


def listed(body: str, *steps: Quantize) -> list[list[LayerPrecision]]:
    reports = run_passes(load(program(body)), steps, context=Context(source=source_of("x")))
    return [report.layers for report in reports]


def test_other_products_are_listed_with_their_reason() -> None:
    """Large ones."""
    more = """
        weight %conv.weight: f32[4, 40, 160]
        weight %head: f32[40, 640]
        weight %little: f32[40, 2]
        %turned = aten.transpose.int(self=%x, dim0=1, dim1=2)
        %conv = aten.conv1d.default(input=%turned, weight=%conv.weight, padding=[160])
        %product = aten.matmul.default(self=%x, other=%head)
        %small = aten.matmul.default(self=%x, other=%little)
        output conv = %conv
        output product = %product
        output small = %small
        output up"""
    (layers,) = listed(BEFORE.replace("output up", more, 1), step_of("int8_token"))
    assert layers[2:] == [
        LayerPrecision(module="conv", precision="fp32", reason="aten.conv1d is not quantized"),
        LayerPrecision(module="head", precision="fp32", reason="aten.matmul is not quantized"),
    ]


def test_what_is_quantized_already_is_not_listed_as_floats() -> None:
    body = (
        BEFORE.replace("[6, 40]", "[2600, 40]")
        .replace("f32[6]", "f32[2600]")
        .replace("sequence, 6]", "sequence, 2600]")
    )
    _, layers = listed(body, step_of("int8_token", modules=["*.up"]), step_of("nf4", modules=["*.gate"]))
    assert [layer.module for layer in layers] == ["mlp.gate"]


def test_a_table_beside_a_linear_in_float8_is_said_to_be_int8_rows() -> None:
    graph = read(TIED)
    layers = applied(graph, "fp8", **IDS).layers
    tables = sorted(name for name in graph.weights if name.endswith(("int8", "fp8")))
    assert (tables, layers[-1].precision) in (
        (["embed.fp8"], "as its linear"),
        (["embed.fp8", "embed.int8"], "int8 rows"),
    )
