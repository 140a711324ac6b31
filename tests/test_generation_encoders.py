"""Generator with encoder-decoders: eager's greedy tokens of what an encoder reads, and how a source is put together."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import graphopt
from graphopt import cli
from graphopt.errors import InputError
from graphopt.runtime import Decoder, Generator
from graphopt.runtime.encoding import batched, read_source
from graphopt.runtime.engine import Engine
from graphopt.runtime.generation import configured
from graphopt.sources import Source, transformers_source
from tests.texts import bytes_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")  # the models are too small for several

START, END, VOCABULARY = 3, 2, 300
HOLDS, ENCODER_HOLDS = 24, 16  # tokens
CACHES: dict[str, dict[str, Any]] = {
    "static": {"layout": "static", "max_length": HOLDS, "logits": "last"},
    "growing": {"layout": "growing"},
}
TARGET = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
TEXTS = ["some words", "x", "a line"]
FEATURES = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))


def t5() -> Any:
    """A head that is not the embedding: else random weights say the last token again and again."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=48, d_kv=16, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4,
        decoder_start_token_id=START, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 48))
    return model


def whisper() -> Any:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=99, d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.3, max_source_positions=20, max_target_positions=24,
        num_mel_bins=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def build(source: Source, folder: Path, cache: dict[str, Any], dims: dict[str, Any]) -> Path:
    passes = [{"kind": "canonicalize"}, {"kind": "fuse_attention"}, {"kind": "insert_kv_cache", **cache}]
    graphopt.compile(source, folder, passes=passes, target=TARGET, dims=dims)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's directory with the model's configs."""
    folder = tmp_path_factory.mktemp("files")
    bytes_tokenizer().save_pretrained(folder)
    t5().config.save_pretrained(folder)
    GenerationConfig(decoder_start_token_id=START, eos_token_id=[END], pad_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An engine directory of T5 for each layout of a cache."""
    folder, source = tmp_path_factory.mktemp("t5"), replace(transformers_source(t5()), files=files)
    dims = {"batch": (1, 4), "sequence": (1, ENCODER_HOLDS)}
    return {layout: build(source, folder / layout, cache, dims) for layout, cache in CACHES.items()}


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[str, Engine]:
    return {layout: graphopt.load(folder) for layout, folder in folders.items()}


@pytest.fixture(params=CACHES)
def engine(request: pytest.FixtureRequest, engines: dict[str, Engine]) -> Engine:
    return engines[request.param]


@pytest.fixture
def generator(engine: Engine) -> Generator:
    return Generator(engine, start=[START])


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """Whisper with a growing cache."""
    folder = tmp_path_factory.mktemp("whisper") / "engine"
    return Generator(graphopt.load(build(transformers_source(whisper()), folder, CACHES["growing"], {"batch": (1, 4)})))


def greedy(prompt: list[int], count: int, begin: list[int] | None = None, **options: Any) -> list[int]:
    """What eager's own ``generate`` takes for one text that the encoder reads."""
    begin = begin or [START]
    config = GenerationConfig(
        max_new_tokens=count, decoder_start_token_id=START, pad_token_id=0, **{"eos_token_id": None, **options}
    )
    made = t5().generate(torch.tensor([prompt]), decoder_input_ids=torch.tensor([begin]), generation_config=config)[0]
    return [int(token) for token in made[len(begin) :]]


def heard(features: Tensor, begin: list[int], count: int) -> list[int]:
    """Whisper's greedy tokens by itself, the whole text again for each."""
    model, text = whisper(), list(begin)
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_features=features[None], decoder_input_ids=torch.tensor([text])).logits
            text.append(int(logits[0, -1].argmax()))
    return text[len(begin) :]


# Encoders that read text


def test_prompts_of_several_lengths_give_eagers_tokens(generator: Generator) -> None:
    made = generator.generate(PROMPTS, max_new_tokens=12)
    assert [row.tokens for row in made] == [greedy(prompt, 12) for prompt in PROMPTS]
    assert len({tuple(row.tokens) for row in made}) == 3
    assert [(row.finish, row.prompt_tokens) for row in made] == [("length", 5), ("length", 1), ("length", 3)]


def test_each_row_is_what_it_is_alone(generator: Generator) -> None:
    for prompt in PROMPTS:
        assert generator.generate(prompt, max_new_tokens=6)[0].tokens == greedy(prompt, 6)


def test_the_timing_counts_what_the_encoder_reads(generator: Generator) -> None:
    generator.generate(PROMPTS, max_new_tokens=4)
    assert (generator.timing.prompt_tokens, generator.timing.new_tokens) == (9, 9)


def test_pieces_come_in_order(generator: Generator) -> None:
    pieces = list(generator.stream(PROMPTS[:2], max_new_tokens=3))
    assert [piece.row for piece in pieces] == [0, 1] * 3
    assert [piece.token for piece in pieces if piece.row == 0] == greedy(PROMPTS[0], 3)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_a_start_of_several_tokens(engine: Engine, chunk: int | None) -> None:
    start = [START, 4, 5]
    made = Generator(engine, start=start, prefill_chunk=chunk).generate(PROMPTS, max_new_tokens=6)
    assert [row.tokens for row in made] == [greedy(prompt, 6, start) for prompt in PROMPTS]


def test_a_repetition_is_one_of_the_decoders_text(generator: Generator) -> None:
    made = generator.generate(PROMPTS, max_new_tokens=12, repetition_penalty=1.8)
    assert [row.tokens for row in made] == [greedy(prompt, 12, repetition_penalty=1.8) for prompt in PROMPTS]
    assert made[1].tokens != greedy(PROMPTS[1], 12)


def test_a_full_cache_ends_a_text(engines: dict[str, Engine]) -> None:
    (row,) = Generator(engines["static"], start=[START]).generate(PROMPTS[:1], max_new_tokens=100)
    assert row.finish == "cache"
    assert row.tokens == greedy(PROMPTS[0], HOLDS)


def ended(engine: Engine) -> None:
    """Rows that end one after the other, each as eager ends it."""
    tokens = [greedy(prompt, 10) for prompt in PROMPTS]
    end = [next(token for token in tokens[0][2:] if token not in tokens[1]), tokens[2][6]]
    found = Generator(engine, start=[START], end=end).generate(PROMPTS, max_new_tokens=10)
    for row, prompt in zip(found, PROMPTS, strict=True):
        expected = greedy(prompt, 10, eos_token_id=end)
        assert row.finish == ("end" if expected[-1] in end else "length")
        assert row.tokens == (expected[:-1] if expected[-1] in end else expected)
    assert len({len(row.tokens) for row in found}) > 1


def test_rows_end_one_after_the_other(engines: dict[str, Engine]) -> None:
    ended(engines["static"])


def test_rows_end_one_after_the_other_in_a_growing_cache(engines: dict[str, Engine]) -> None:
    ended(engines["growing"])


def test_a_row_alone_ends_in_a_growing_cache(engines: dict[str, Engine]) -> None:
    end = greedy(PROMPTS[0], 5)[4]
    (row,) = Generator(engines["growing"], start=[START], end=[end]).generate(PROMPTS[:1], max_new_tokens=10)
    assert row.finish == "end"
    assert [*row.tokens, end] == greedy(PROMPTS[0], 10, eos_token_id=end)


def test_a_source_of_tokens_and_what_the_texts_begin_with(engine: Engine) -> None:
    begin = [[START, 4], [START, 5]]
    made = Generator(engine).generate(begin, max_new_tokens=6, source=padded(PROMPTS[:2]))
    assert [row.tokens for row in made] == [greedy(*row) for row in zip(PROMPTS[:2], (6, 6), begin, strict=True)]
    assert [row.prompt_tokens for row in made] == [2, 2]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    tokens = [row + [0] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize(
    ("prompts", "options", "reason"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [VOCABULARY]], {}, "prompt 1 has the token 300, the model has tokens 0 to 299"),
        (["text"], {}, "a text needs a tokenizer"),
        ([[1] * (ENCODER_HOLDS + 1)], {}, rf"sequence is {ENCODER_HOLDS + 1}, outside \[1, {ENCODER_HOLDS}\]"),
        ([[1]] * 5, {}, r"batch is 5, outside \[1, 4\]"),
        ([[1]], {"source": {}}, "the encoder needs attention_mask, input_ids"),
        ([[1]], {"source": {"input_ids": torch.ones(1, 2)}}, "the encoder needs attention_mask"),
        ([[1]], {"source": padded([[1], [1]])}, "the source has 2 rows, the batch 1"),
        ([[1]], {"source": {**padded([[1]]), "attention_mask": torch.ones(2, 1).long()}}, "size 2 at axis 0, needs 1"),
    ],
)
def test_bad_input_leaves_the_generator_usable(
    generator: Generator, prompts: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        generator.generate(prompts, **options)
    with pytest.raises(InputError, match=reason):
        list(generator.stream(prompts, **options))
    assert generator.generate([PROMPTS[1]], max_new_tokens=3)[0].tokens == greedy(PROMPTS[1], 3)


def test_without_a_start_there_is_no_text(engine: Engine) -> None:
    generator = Generator(engine)
    with pytest.raises(InputError, match="nothing says what the decoder begins with") as error:
        generator.generate(PROMPTS)
    assert "start=" in str(error.value)
    (row,) = generator.generate([[START]], max_new_tokens=3, source=padded(PROMPTS[:1]))
    assert row.tokens == greedy(PROMPTS[0], 3)


def test_a_start_that_the_model_has_not(engine: Engine) -> None:
    with pytest.raises(InputError, match=f"there is a token {VOCABULARY}"):
        Generator(engine, start=[VOCABULARY]).generate(PROMPTS)


def test_a_start_that_does_not_fit_the_cache(engines: dict[str, Engine]) -> None:
    with pytest.raises(InputError, match=f"{HOLDS + 1} tokens, the cache holds {HOLDS}"):
        Generator(engines["static"], start=[START] * (HOLDS + 1)).generate(PROMPTS)


# Encoders that read something else


def test_features_give_eagers_tokens(speech: Generator) -> None:
    made = speech.generate([[1]] * 3, max_new_tokens=12, source={"input_features": FEATURES})
    assert [row.tokens for row in made] == [heard(features, [1], 12) for features in FEATURES]
    assert len({tuple(row.tokens) for row in made}) == 3


def test_prompts_beside_features_are_what_the_texts_begin_with(speech: Generator) -> None:
    begin = [[1, 5, 6], [1, 7, 8]]
    made = speech.generate(begin, max_new_tokens=6, source={"input_features": FEATURES[:2]})
    assert [row.tokens for row in made] == [heard(FEATURES[row], begin[row], 6) for row in range(2)]
    assert [row.prompt_tokens for row in made] == [3, 3]


def test_features_stream(speech: Generator) -> None:
    pieces = speech.stream([[1]], max_new_tokens=4, source={"input_features": FEATURES[:1]})
    assert [piece.token for piece in pieces] == heard(FEATURES[0], [1], 4)


@pytest.mark.parametrize(
    ("prompts", "source", "reason"),
    [
        ([[1]], None, "the encoder reads input_features, no text"),
        ([[1]], {}, "the encoder needs input_features"),
        ([[1]], {"features": FEATURES[:1]}, "the encoder needs input_features"),
        ([[1]], {"input_features": FEATURES}, "the source has 3 rows, the batch 1"),
        ([[1], [1]], {"input_features": FEATURES[:1]}, "the source has 1 rows, the batch 2"),
        ([[1]], {"input_features": FEATURES[:1].double()}, "dtype f64, needs f32"),
        ([[1]], {"input_features": FEATURES[:1, :, :9]}, "size 9 at axis 2, needs 40"),
        ([[1], [1, 5]], {"input_features": FEATURES[:2]}, "rows must be of one length"),
    ],
)
def test_a_bad_source_leaves_the_generator_usable(
    speech: Generator, prompts: list[list[int]], source: dict[str, Tensor] | None, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        speech.generate(prompts, source=source)
    (row,) = speech.generate([[1]], max_new_tokens=3, source={"input_features": FEATURES[:1]})
    assert row.tokens == heard(FEATURES[0], [1], 3)


# Generator.load


def tokens_of(text: str) -> list[int]:
    return [int(token) for token in bytes_tokenizer()(text)["input_ids"]]


@pytest.mark.parametrize("layout", CACHES)
def test_load_reads_the_tokenizer_and_the_configs(folders: dict[str, Path], layout: str) -> None:
    generator = Generator.load(folders[layout])
    assert (generator.start, generator.end) == ([START], frozenset([END]))
    made = generator.generate(TEXTS, max_new_tokens=10)
    assert [row.tokens for row in made] == [greedy(tokens_of(text), 10) for text in TEXTS]
    assert [row.text for row in made] == [bytes_tokenizer().decode(row.tokens) for row in made]
    assert [row.prompt_tokens for row in made] == [len(text) for text in TEXTS]


def test_load_takes_options(folders: dict[str, Path]) -> None:
    generator = Generator.load(folders["static"], prefill_chunk=1, threads=1)
    assert generator.prefill_chunk == 1
    assert generator.generate(TEXTS[0], max_new_tokens=4)[0].tokens == greedy(tokens_of(TEXTS[0]), 4)


def test_a_stop_string_ends_what_the_decoder_says(folders: dict[str, Path]) -> None:
    generator = Generator.load(folders["static"])
    whole = generator.generate(TEXTS[0], max_new_tokens=12)[0].text
    stop = next(letter for letter in whole[3:] if letter.isprintable() and letter.isascii())
    (row,) = generator.generate(TEXTS[0], max_new_tokens=12, stop=stop)
    assert (row.text, row.finish) == (whole[: whole.index(stop)], "stop")


def test_load_of_a_directory_that_says_no_start(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["static"], tmp_path / "engine")
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink()
    generator = Generator.load(folder, check=False)
    assert generator.start == []
    with pytest.raises(InputError, match="nothing says what the decoder begins with"):
        generator.generate("text")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"decoder_start_token_id": 7}, {"decoder_start_token_id": 8}, [7]),
        (None, {"decoder_start_token_id": 8}, [8]),
        ({}, {"decoder_start_token_id": 0}, [0]),
        ({"decoder_start_token_id": None}, {"decoder_start_token_id": 8}, [8]),
        ({"decoder_start_token_id": [7, 9]}, None, [7, 9]),
        ({}, {}, None),
        (None, None, None),
    ],
)
def test_the_generation_config_comes_before_the_config(
    tmp_path: Path, generation: object, config: object, expected: list[int] | None
) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert configured(tmp_path, "decoder_start_token_id") == expected


def test_the_command_generates_for_an_encoder(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(folders["static"]), *TEXTS, "-n", "5", "--json"]
    monkeypatch.setattr(sys, "argv", ["graphopt", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)["generations"]
    assert [row["tokens"] for row in found] == [greedy(tokens_of(text), 5) for text in TEXTS]


# How a source is put together


def test_batched_pads_tokens_behind_and_says_which_are_real() -> None:
    found = batched({"input_ids": [torch.tensor(row) for row in PROMPTS]})
    expected = padded(PROMPTS)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])
        assert tensor.dtype == torch.int64


def test_batched_leaves_other_inputs_as_they_are() -> None:
    found = batched({"input_features": list(FEATURES)})
    assert list(found) == ["input_features"]
    assert torch.equal(found["input_features"], FEATURES)
    assert batched({}) == {}


def test_batched_pads_what_stands_beside_tokens() -> None:
    rows = [torch.tensor([1, 1, 1]), torch.tensor([1])]
    found = batched({"input_ids": [torch.tensor([5, 6, 7]), torch.tensor([8])], "token_type_ids": rows})
    assert found["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_read_source_gives_the_keys_and_values_of_eagers_encoder(engine: Engine) -> None:
    source, model = padded(PROMPTS), t5()
    found = read_source(engine, 3, source)
    assert found.keys() <= engine.inputs.keys()
    assert torch.equal(found["attention_mask"], source["attention_mask"])
    attention = model.decoder.block[0].layer[1].EncDecAttention
    with torch.no_grad():
        states = model.encoder(**source).last_hidden_state
    real = source["attention_mask"].bool()
    for part, projection in (("key", attention.k), ("value", attention.v)):
        with torch.no_grad():
            expected = projection(states).view(3, 5, 4, 16)
        got = found[f"cross_key_values.0.{part}"].transpose(1, 2)
        torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-5)


def test_the_encoder_runs_once_for_a_text(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    prologue = engines["static"].prologue
    assert prologue is not None
    calls: list[int] = []
    original: Callable[..., dict[str, Any]] = prologue.run

    def counted(*arguments: Any) -> dict[str, Any]:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(prologue, "run", counted)
    Generator(engines["static"], start=[START]).generate(PROMPTS, max_new_tokens=5)
    assert len(calls) == 1


@dataclass
class Plain:
    """As much of an engine as has no encoder."""

    prologue: None = None


def test_an_engine_without_an_encoder_reads_no_source() -> None:
    engine: Any = Plain()
    assert read_source(engine, 2, {}) == {}
    with pytest.raises(InputError, match="the engine has no encoder that would read input_features"):
        read_source(engine, 2, {"input_features": FEATURES})


def test_a_decoder_keeps_what_its_encoder_read(engine: Engine) -> None:
    """Two texts at the same time, step by step in turn."""
    sources = [padded(PROMPTS[:1]), padded(PROMPTS[2:])]
    decoders = [Decoder(engine, 1, source) for source in sources]
    found: list[list[int]] = [[], []]
    for _ in range(5):
        for decoder, text in zip(decoders, found, strict=True):
            text.append(int(decoder.feed([text[-1:] or [START]]).argmax()))
    assert found == [greedy(PROMPTS[0], 5), greedy(PROMPTS[2], 5)]
