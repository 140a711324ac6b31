"""``backend: tensorrt_rtx``: engines are really parsed and built, which TensorRT-RTX does on machines without a GPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import graphopt
from graphopt import artifact, compiler
from graphopt.backend import no_progress
from graphopt.backends.onnx.backend import MODEL, write_model
from graphopt.backends.onnx.emitter import Emitter
from graphopt.backends.tensorrt.backend import TensorRtRtxBackend
from graphopt.backends.tensorrt.builder import build_plan
from graphopt.backends.tensorrt.dialect import tensorrt_dialect
from graphopt.backends.tensorrt.engine import PLAN, TensorRtEngine, unrunnable
from graphopt.backends.tensorrt.flavours import RTX, parsed_ops
from graphopt.backends.tensorrt.linears import Device
from graphopt.backends.tensorrt.options import Options, profiles_of
from graphopt.errors import BackendError, EngineError, InputError, LoweringError, PipelineError
from graphopt.ir import Graph, types_of
from graphopt.pipeline import Pass
from graphopt.runtime.engine import Engine
from graphopt.schemas.pipeline import TargetConfig
from graphopt.schemas.report import PassReport
from graphopt.sources import Source, transformers_source
from tests.test_tensorrt import graph_of
from tests.test_tensorrt_linears import LINEAR, graph_of_integers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed (make env does)"
)
NO_DATA: dict[str, Any] = {"scheme": "weight_only", "group": 128}
DIMS: dict[str, tuple[int, int | None]] = {"batch": (1, 4), "sequence": (4, 16)}
TARGET: dict[str, Any] = {"backend": "tensorrt_rtx", "options": {"compute_capabilities": ["8.9"]}}


def bert() -> Source:
    """Heads of 32, which its attention has kernels for."""
    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=99, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers_source(t.BertModel(config), name="bert")


def llama() -> Source:
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=99, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, max_position_embeddings=64,
    )  # fmt: skip
    return transformers_source(t.LlamaForCausalLM(config), name="llama")


def vit() -> Source:
    torch.manual_seed(0)
    config = t.ViTConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=8
    )
    return transformers_source(t.ViTModel(config), name="vit")


def texts() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 99, (4, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}]


def compiled(
    source: Source, folder: Path, *steps: dict[str, Any], options: dict[str, Any] | None = None
) -> graphopt.Compiled:
    dims = {name: sizes for name, sizes in DIMS.items() if name in source.dims or name in source.traced}
    target = {**TARGET, "options": {**TARGET["options"], **(options or {})}}
    passes = [*TensorRtRtxBackend.standard_passes, *steps]
    return graphopt.compile(source, folder, passes=passes, target=target, dims=dims)


SCHEMES: dict[str, list[dict[str, Any]]] = {
    "fp32": [],
    "fp16": [{"kind": "cast"}],
    "bf16": [{"kind": "cast", "dtype": "bf16"}],
    **{
        name: [{"kind": "cast"}, {"kind": "quantize", "embeddings": False, **options}]
        for name, options in {
            "int8_static": {"scheme": "int8_static", "calibration": {"data": texts()}},
            "int8_smooth": {"scheme": "int8_smooth", "calibration": {"data": texts()}},
            "fp8": {"scheme": "fp8", "calibration": {"data": texts()}},
            "int4": NO_DATA,
            "int4, gptq": {**NO_DATA, "algorithm": "gptq", "calibration": {"data": texts()}},
        }.items()
    },
}


@pytest.mark.parametrize("name", SCHEMES)
def test_it_builds(name: str, tmp_path: Path) -> None:
    made = compiled(bert(), tmp_path / "e", *SCHEMES[name])
    assert (tmp_path / "e" / PLAN).stat().st_size > 1000
    layers = made.manifest.report.engine_ops
    assert layers["ATTENTION_INPUT"] == 2
    assert bool(layers.get("DEQUANTIZE")) == (name not in ("fp32", "fp16", "bf16"))
    assert made.manifest.files[PLAN]
    assert "tensorrt_rtx" in made.manifest.versions
    assert not any("nor was the model" in warning for warning in made.report.warnings)


@pytest.mark.parametrize("source", [llama, vit], ids=["llama", "vit"])
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_other_models_build(source: Callable[[], Source], name: str, tmp_path: Path) -> None:
    made = compiled(source(), tmp_path / "e", *SCHEMES[name])
    assert made.manifest.report.engine_ops["ATTENTION_INPUT"] == 2


@pytest.mark.skipif(unrunnable(RTX) is None, reason="there is a GPU that runs the engine")
def test_an_engine_for_another_machine_is_built_and_said_not_to_be_run(tmp_path: Path) -> None:
    made = compiled(bert(), tmp_path / "e", options={"shapes": [{"batch": 1, "sequence": 8}]})
    assert made.manifest.report.engine is None
    assert "the engine was built and not run: " in made.manifest.report.warnings[-1]
    engine = graphopt.load(tmp_path / "e", threads=None)  # as the command line has it
    with pytest.raises(BackendError, match="the engine cannot run here: "):
        engine(**texts()[0])
    with pytest.raises(PipelineError, match="has no option threads"):
        graphopt.load(tmp_path / "e", threads=2)


@pytest.mark.parametrize("accumulate", ["fp32", "fastest"])
def test_sums_of_either_kind_build(accumulate: str, tmp_path: Path) -> None:
    step = {"kind": "cast", "norms": "half"}
    made = compiled(bert(), tmp_path / "e", step, options={"accumulate": accumulate})
    assert made.report.emitted is not None
    assert made.report.emitted.holds
    assert (made.report.engine_ops["CAST"] > 2 * 13) == (accumulate == "fp32")  # around each product


@pytest.mark.skipif(unrunnable(RTX) is None, reason="there is a GPU whose processors can be counted")
@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("split_sums", "split_sums counts the processors of the GPU"),
        ("refit", "tensorrt_rtx compiles engines with refit on the GPU"),
    ],
)
def test_options_that_need_the_gpu_at_the_build(option: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=reason) as error:
        compiled(bert(), tmp_path / "e", {"kind": "cast"}, options={option: True})
    assert error.value.where == f"target.options.{option}"
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("form", ["parts", "integers in parts"])
def test_a_linear_in_parts_builds(form: str, tmp_path: Path) -> None:
    """As for a GPU that is here and that so few tokens leave idle."""
    graph = graph_of(LINEAR.format("")) if form == "parts" else graph_of_integers()
    inputs = types_of(graph.inputs)
    profiles = profiles_of(inputs, graph.dims, Options())
    emitter = Emitter(graph, tensorrt_dialect(parsed_ops(RTX), device=Device(132, profiles)))
    assert emitter.used_forms == {form: 1}
    write_model(emitter, tmp_path)
    plan = build_plan(RTX, tmp_path / MODEL, inputs, profiles, Options(compute_capabilities=("8.9",)), {}, no_progress)
    assert plan.layers["MATRIX_MULTIPLY"] == plan.layers["REDUCE"] == 1


REMEDIES: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "packed weights": (
        [{"kind": "quantize", "scheme": "weight_only", "bits": 8, "group": 32, "embeddings": False, "min_weights": 1}],
        "no int8 in groups", "bits: 4",
    ),
    "padding": (
        [{"kind": "heads_last"}, {"kind": "flatten_tokens"}, {"kind": "remove_padding"}],
        "nothing to leave padding out with", "backend: tensorrt or onnxruntime",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REMEDIES)
def test_what_it_has_not_is_refused_with_what_to_do(case: str, tmp_path: Path) -> None:
    steps, reason, hint = REMEDIES[case]
    with pytest.raises(LoweringError, match=reason) as error:
        compiled(bert(), tmp_path / "e", *steps)
    assert error.value.hint is not None
    assert hint in error.value.hint
    assert not (tmp_path / "e").exists()


def test_a_build_that_fails_asks_about_the_options(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot build the engine") as error:
        compiled(bert(), tmp_path / "e", options={"workspace": 1})
    assert error.value.hint == "is it one of target.options: workspace?"


def test_an_engine_for_another_device_is_verified_as_it_was_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on that device, which the model that the engine was built of stands in for."""
    graphs: list[Graph] = []

    class Keep:
        def before(self, step: Pass, graph: Graph) -> None: ...

        def after(self, step: Pass, graph: Graph, report: PassReport) -> None:
            graphs.append(graph)

    passes = [*TensorRtRtxBackend.standard_passes, {"kind": "cast"}]
    made = graphopt.compile(bert(), tmp_path / "e", passes=passes, target=TARGET, dims=DIMS, instruments=[Keep()])
    assert made.report.engine is None
    backend = TensorRtRtxBackend(TargetConfig(**TARGET))

    def load(folder: Path) -> Engine:
        found = backend.stand_in(graphs[-1], artifact.loaded(folder, artifact.read_manifest(folder)))
        assert found is not None
        return found

    monkeypatch.setattr(artifact, "load", load)
    parity = compiler.verify(tmp_path / "e", bert())
    assert (parity.metric, parity.holds) == ("cosine", True)


def test_sizes_that_fit_no_profile_are_refused_before_there_is_a_device(tmp_path: Path) -> None:
    """The sizes that are compared are among them."""
    profiles = [{"batch": (1, 1, 1), "sequence": (4, 8, 16)}, {"batch": (1, 4, 4), "sequence": (4, 4, 4)}]
    with pytest.raises(InputError, match="fit no profile of the engine"):
        compiled(bert(), tmp_path / "e", options={"profiles": profiles})
    assert not (tmp_path / "e").exists()


def test_shapes_of_a_decoder_behind_an_encoder(tmp_path: Path) -> None:
    """The encoder has one size less."""
    torch.manual_seed(0)
    config = t.T5Config(
        vocab_size=99, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    passes = [{"kind": "canonicalize"}, {"kind": "fuse_attention"}]
    made = graphopt.compile(
        transformers_source(t.T5ForConditionalGeneration(config)), tmp_path / "e",
        passes=[*passes, {"kind": "insert_kv_cache", "layout": "static", "max_length": 16, "logits": "last"}],
        dims={"batch": (1, 2), "sequence": (1, 16), "decoder_sequence": (1, 16)},
        target={**TARGET, "options": {**TARGET["options"], "shapes": [{"batch": 1, "sequence": 8, "decoder_sequence": 4}]}},
    )  # fmt: skip
    engine, encoder = made.engine, made.engine.prologue
    assert isinstance(engine, TensorRtEngine)
    assert isinstance(encoder, TensorRtEngine)
    assert [profile["decoder_sequence"] for profile in engine.profiles] == [(4, 4, 4), (1, 1, 1), (1, 16, 16)]
    assert encoder.profiles[0] == {"batch": (1, 1, 1), "sequence": (8, 8, 8)}


def test_a_manifest_without_its_target(tmp_path: Path) -> None:
    compiled(bert(), tmp_path / "e")
    file = tmp_path / "e" / "manifest.json"
    content = json.loads(file.read_text())
    del content["pipeline"]["target"]
    file.write_text(json.dumps(content))
    with pytest.raises(EngineError, match="the manifest is damaged: it has no 'target'"):
        graphopt.load(tmp_path / "e")


def test_dynamic_products_are_refused_with_the_scheme_that_serves(tmp_path: Path) -> None:
    step = {"kind": "quantize", "scheme": "int8_dynamic", "embeddings": False}
    with pytest.raises(BackendError, match="quantize with scheme: int8_static"):
        compiled(bert(), tmp_path / "e", step)
    assert not (tmp_path / "e").exists()


def test_a_layer_that_the_parser_refuses_is_named(tmp_path: Path) -> None:
    """int8 tables that are looked up: its Gather takes no int8."""
    step = {"kind": "quantize", "scheme": "int8_static", "min_weights": 1, "calibration": {"data": texts()}}
    source = bert()
    source.module.get_submodule("embeddings").word_embeddings = torch.nn.Embedding(1000, 128)  # large enough
    with pytest.raises(BackendError) as error:
        compiled(source, tmp_path / "e", {"kind": "cast"}, step)
    assert "embeddings.word_embeddings" in str(error.value)


def test_a_size_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="TensorRT needs a largest size for 'batch'"):
        graphopt.compile(bert(), tmp_path / "e", target=TARGET)
