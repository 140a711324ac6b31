"""Decode parity of models with an encoder, which reads a text or features once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

from graphopt import artifact
from graphopt.decode_parity import decode_parity, sample_prompts, verify_decoding
from graphopt.errors import InputError
from graphopt.runtime.engine import Engine
from graphopt.sources import Source, transformers_source
from tests.test_decode_parity import STEPS, Watched, build

pytestmark = pytest.mark.usefixtures("one_thread")  # the models are too small for several

ENCODER_HOLDS = 16


@dataclass
class Pair:
    """An encoder-decoder in eager and in an engine directory."""

    source: Source
    folder: Path

    @property
    def engine(self) -> Engine:
        return artifact.load(self.folder)

    def greedy(self, prompt: list[int], count: int, **reads: Tensor) -> list[int]:
        """Greedy tokens of the model by itself, the whole text again for each."""
        text = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                logits = self.source.module(**reads, decoder_input_ids=torch.tensor([text])).logits
                text.append(int(logits[0, -1].argmax()))
        return text[len(prompt) :]


SIZES: dict[str, Any] = {
    "vocab_size": 99, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
FEATURES = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(0))
READ = [torch.tensor(row) for row in ([5, 6, 7, 8, 9, 2], [10, 2], [11, 12, 2])]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Whisper with a static cache."""
    torch.manual_seed(0)
    config = WhisperConfig(**SIZES, max_source_positions=20, max_target_positions=24, num_mel_bins=16)
    source = transformers_source(WhisperForConditionalGeneration(config).eval())
    folder = tmp_path_factory.mktemp("speech") / "engine"
    build(source, folder, {"layout": "static", "max_length": 20, "logits": "last"}, {"batch": (1, 8)})
    return Pair(source, folder)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Bart with a growing cache, whose encoder reads short texts only."""
    torch.manual_seed(0)
    source = transformers_source(BartForConditionalGeneration(BartConfig(**SIZES, max_position_embeddings=64)).eval())
    folder = tmp_path_factory.mktemp("reader") / "engine"
    build(source, folder, {"layout": "growing"}, {"batch": (1, 8), "sequence": (1, ENCODER_HOLDS)})
    return Pair(source, folder)


def test_texts_of_several_lengths_for_the_encoder(reader: Pair) -> None:
    model = Watched(reader.source.module)
    parity = decode_parity(model, reader.engine, [[1]] * 3, source={"input_ids": READ}, steps=STEPS)
    assert parity.holds
    assert parity.worst_drift <= 1e-5
    assert model.texts == [[1, *reader.greedy([1], STEPS - 1, input_ids=row[None])] for row in READ]
    assert len({tuple(text) for text in model.texts}) == 3


def test_features_for_the_encoder(speech: Pair) -> None:
    model = Watched(speech.source.module)
    source = {"input_features": list(FEATURES)}
    parity = decode_parity(model, speech.engine, [[1], [1, 5, 6]], source=source, steps=STEPS, chunk=2)
    assert parity.holds
    own = [([1], FEATURES[:1]), ([1, 5, 6], FEATURES[1:])]
    assert model.texts == [text + speech.greedy(text, STEPS - 1, input_features=reads) for text, reads in own]


def test_another_source_is_another_text(speech: Pair) -> None:
    source = {"input_features": list(FEATURES.flip(0))}
    engine, model = speech.engine, Watched(speech.source.module)
    assert decode_parity(model, engine, [[1], [1]], source=source, steps=STEPS).holds
    assert model.texts[0] == [1, *speech.greedy([1], STEPS - 1, input_features=FEATURES[1:])]
    assert model.texts[0] != model.texts[1]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"input_features": [FEATURES[0]]}, "the source has 1 rows, the batch 2"),
        (None, "the encoder needs input_features"),
        ({"features": list(FEATURES)}, "the encoder needs input_features"),
    ],
)
def test_a_source_that_does_not_fit(speech: Pair, source: dict[str, list[Tensor]] | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        decode_parity(speech.source.module, speech.engine, [[1], [1]], source=source, steps=2)


def test_beginnings_of_several_lengths_need_a_static_cache(reader: Pair) -> None:
    with pytest.raises(InputError, match="the model has no padding mask: rows must be of one length"):
        decode_parity(reader.source.module, reader.engine, [[1], [1, 5]], source={"input_ids": READ[:2]}, steps=2)


def test_a_source_with_its_own_mask(reader: Pair) -> None:
    masks = [torch.ones_like(row) for row in READ]
    masks[0][2:] = 0
    source = {"input_ids": READ, "attention_mask": masks}
    assert decode_parity(reader.source.module, reader.engine, [[1]] * 3, source=source, steps=4).worst_drift < 1e-4


# Prompts at random, and verify_decoding


def test_sample_prompts_of_encoders_are_what_they_read(reader: Pair, speech: Pair) -> None:
    prompts, reads = sample_prompts(reader.source, reader.engine, [4, 1, 9])
    assert [len(prompt) for prompt in prompts] == [1, 1, 1]
    assert {name: [len(row) for row in rows] for name, rows in reads.items()} == {"input_ids": [4, 1, 9]}
    prompts, reads = sample_prompts(speech.source, speech.engine, [4, 1])
    assert [len(prompt) for prompt in prompts] == [1, 1]
    assert {name: [tuple(row.shape) for row in rows] for name, rows in reads.items()} == {
        "input_features": [(16, 40), (16, 40)]
    }


def test_verify_decoding_of_an_encoder_that_reads_features(speech: Pair) -> None:
    parity = verify_decoding(speech.folder, speech.source, steps=6)
    assert parity.holds
    assert [(row.prompt_tokens, row.tokens) for row in parity.rows] == [(1, 6)] * 4


def test_verify_decoding_of_an_encoder_that_reads_short_texts(reader: Pair) -> None:
    assert verify_decoding(reader.folder, reader.source, steps=6).holds


def test_verify_decoding_reads_no_texts_for_an_encoder(speech: Pair) -> None:
    with pytest.raises(InputError, match="texts are for models without an encoder"):
        verify_decoding(speech.folder, speech.source, ["text"], steps=6)
