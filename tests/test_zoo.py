"""The quick part of the zoo (``make zoo`` runs all of it): one class for each thing that makes architectures differ."""

from __future__ import annotations

from functools import cache

import pytest
import transformers

from benchmarks.zoo.__main__ import main
from benchmarks.zoo.catalog import ANIMALS
from benchmarks.zoo.measure import LIMIT, Outcome, Row, measure
from benchmarks.zoo.small import implementations
from benchmarks.zoo.summary import goals, tables

BY_NAME = {animal.name: animal for animal in ANIMALS}

#: (class, implementation): the masks that are proven, rotary embeddings.
QUICK: dict[tuple[str, str], tuple[set[str], int]] = {
    ("BertModel", "sdpa"): ({"key padding"}, 0),
    ("MPNetModel", "eager"): ({"key padding, bias"}, 0),
    ("DebertaV2Model", "eager"): ({"segments, key padding, bias"}, 0),
    ("ModernBertModel", "eager"): ({"key padding", "window left 3, window right 3, key padding"}, 4),
    ("GPTNeoForCausalLM", "eager"): ({"causal, key padding", "causal, window left 3, key padding"}, 0),
    ("GPTJForCausalLM", "eager"): ({"causal, key padding"}, 4),
    ("BloomForCausalLM", "eager"): ({"causal, key padding, bias"}, 0),
    ("OpenAIGPTLMHeadModel", "eager"): ({"causal, key padding"}, 0),
    ("Llama4ForCausalLM", "sdpa"): ({"causal, segments, key padding"}, 4),
    ("GptOssForCausalLM", "eager"): ({"causal, key padding", "causal, window left 4, key padding"}, 4),
    ("DeepseekV2ForCausalLM", "eager"): ({"causal, key padding"}, 4),
    ("JetMoeForCausalLM", "sdpa"): ({"causal, key padding"}, 4),
    ("T5ForConditionalGeneration", "sdpa"): ({"key padding", "key padding, bias", "causal, bias"}, 0),
    ("WhisperModel", "eager"): ({"causal", "none"}, 0),
    ("SamVisionModel", "eager"): ({"bias"}, 0),
    ("Swinv2Model", "eager"): ({"bias"}, 0),
    ("CLIPModel", "eager"): ({"causal, key padding", "none"}, 0),
    ("WavLMModel", "eager"): ({"bias"}, 0),
}


@cache
def measured(name: str, attention: str) -> Row:
    return measure(BY_NAME[name], attention, beside=False)


@pytest.mark.parametrize(("name", "attention"), QUICK)
def test_it_is_right_at_sizes_that_were_not_traced(name: str, attention: str) -> None:
    row = measured(name, attention)
    assert row.graphopt.refused == ""
    assert row.graphopt.worst is not None
    assert row.graphopt.worst <= LIMIT


@pytest.mark.parametrize(("name", "attention"), QUICK)
def test_every_attention_is_fused_and_its_mask_proven(name: str, attention: str) -> None:
    row = measured(name, attention)
    masks, rotaries = QUICK[name, attention]
    assert row.found > 0
    assert row.fused == row.found
    assert set(row.masks) == masks
    assert row.rotaries == rotaries


def test_there_are_many_classes_of_every_kind() -> None:
    assert len(ANIMALS) >= 60
    assert len(BY_NAME) == len(ANIMALS)
    families = {animal.family for animal in ANIMALS}
    assert families == {"encoder", "decoder", "experts", "encoder-decoder", "vision", "audio"}
    assert all(hasattr(transformers, animal.model) for animal in ANIMALS)


def test_implementations_are_those_the_class_has() -> None:
    assert implementations(BY_NAME["BertModel"]) == ("eager", "sdpa")
    assert implementations(BY_NAME["DebertaV2Model"]) == ("eager",)


def test_a_class_that_cannot_work_is_a_row_with_its_reason() -> None:
    row = measured("ViTMAEModel", "eager")
    assert row.graphopt.worst is None
    assert "aten.rand.default draws random numbers" in row.graphopt.refused
    assert "modeling_vit_mae.py:" in row.graphopt.refused


def test_the_summary_counts() -> None:
    rows = [
        Row("A", "encoder", "eager", 2, 2, graphopt=Outcome(worst=1e-6), export=Outcome(refused="no")),
        Row("A", "encoder", "sdpa", 2, 1, graphopt=Outcome(worst=1e-2), export=Outcome(worst=1e-6)),
        Row("B", "encoder", "eager", graphopt=Outcome(refused="data"), export=Outcome(refused="data")),
    ]
    found = {goal.row: (goal.measured, goal.reached) for goal in goals(rows)}
    assert found["classes right at untraced sizes, of 2"] == ("0 %", False)
    assert found["classes compiled and wrong"] == ("1", False)
    assert found["attentions fused, sdpa, of 2"] == ("50 %", False)
    assert found["classes where torch.onnx.export is right and graphopt is not"] == ("1", False)
    assert [table.title for table in tables(rows)] == ["Zoo", "Refused"]


def test_the_command_lists_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "Bert"]) == 0
    listed = capsys.readouterr().out
    assert "ModernBertModel (encoder)" in listed
    assert "Llama" not in listed


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["Dragon"])
    assert "no class of the zoo is named like Dragon" in capsys.readouterr().err
