"""Generator: eager's tokens, reasons to end, streaming, sampling, bad input; and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import graphopt
from graphopt.cli import app
from graphopt.errors import EngineError, InputError
from graphopt.runtime import Decoder, Generator
from graphopt.runtime.detokenize import TextStream
from tests.texts import bytes_tokenizer

VOCABULARY, LONGEST = 300, 48
CACHES: dict[str, dict[str, Any]] = {
    "static": {"layout": "static", "max_length": LONGEST, "logits": "last"},
    "growing": {"layout": "growing"},
}
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engines(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    for name, cache in CACHES.items():
        passes = [{"kind": "canonicalize"}, {"kind": "fuse_attention"}, {"kind": "insert_kv_cache", **cache}]
        target = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}
        fused = [{"kind": "fuse_cached_attention"}] if name == "static" else []
        graphopt.compile(str(directory), folder / name, passes=passes + fused, target=target, dims={"batch": (1, 4)})
    return {name: folder / name for name in CACHES}


@pytest.fixture(scope="module", params=CACHES)
def generator(request: pytest.FixtureRequest, engines: dict[str, Path]) -> Generator:
    return Generator.load(engines[request.param])


def eager(prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the model by itself, the whole text again for each."""
    model, text = llama(), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_a_decoder_reads_whole_numbers_of_any_kind(generator: Generator, dtype: Any) -> None:
    rows = [[5, 6, 7], [8, 9, 10]]
    for own in (rows, [rows[0], rows[1][:2]]):  # of one length, and ragged
        plain, other = (Decoder(generator.engine, 2) for _ in range(2))
        expected = plain.feed(own)
        assert torch.equal(other.feed([np.array(row, dtype) for row in own]), expected)  # type: ignore[misc]  # arrays are read too
        assert other.lengths.tolist() == [len(row) for row in own]


def test_prompts_of_several_lengths_give_eagers_tokens(generator: Generator) -> None:
    made = generator.generate(PROMPTS, max_new_tokens=20)
    assert [row.tokens for row in made] == [eager(prompt, 20) for prompt in PROMPTS]
    assert [(row.finish, row.prompt_tokens) for row in made] == [("length", 5), ("length", 1), ("length", 3)]
    assert generator.timing.prompt_tokens == 9
    assert generator.timing.new_tokens == 3 * 19


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_a_prompt_in_chunks_is_the_prompt(engines: dict[str, Path], chunk: int) -> None:
    for folder in engines.values():
        generator = Generator(graphopt.load(folder), prefill_chunk=chunk)
        assert [row.tokens for row in generator.generate(PROMPTS, max_new_tokens=6)] == [eager(p, 6) for p in PROMPTS]


def test_pieces_come_in_order_and_end_with_a_reason(generator: Generator) -> None:
    pieces = list(generator.stream(PROMPTS[:2], max_new_tokens=4))
    assert [piece.row for piece in pieces] == [0, 1] * 4
    assert [piece.token for piece in pieces if piece.row == 1] == eager(PROMPTS[1], 4)
    assert [piece.finish for piece in pieces] == [None] * 6 + ["length"] * 2


def test_an_end_token_ends_its_row_only(engines: dict[str, Path]) -> None:
    tokens = eager(PROMPTS[0], 8)
    end = next(token for token in tokens if token not in eager(PROMPTS[1], 8))
    generator = Generator(graphopt.load(engines["static"]), end=[end])
    first, second = generator.generate(PROMPTS[:2], max_new_tokens=8)
    assert (first.tokens, first.finish) == (tokens[: tokens.index(end)], "end")
    assert (second.tokens, second.finish) == (eager(PROMPTS[1], 8), "length")


def test_a_full_cache_ends_a_text(engines: dict[str, Path]) -> None:
    generator = Generator(graphopt.load(engines["static"]))
    (row,) = generator.generate([list(range(5, 5 + LONGEST - 2))], max_new_tokens=10)
    assert (len(row.tokens), row.finish) == (3, "cache")  # the last one needs no place


def test_a_stop_string_is_not_in_the_text(generator: Generator) -> None:
    whole = generator.generate("abc", max_new_tokens=16)[0].text
    stop = next(
        whole[place : place + 2] for place in range(3, len(whole) - 1) if whole[place : place + 2].isprintable()
    )
    (row,) = generator.generate("abc", max_new_tokens=16, stop=[stop, "never comes"])
    assert (row.text, row.finish) == (whole[: whole.index(stop)], "stop")
    assert "".join(piece.text for piece in generator.stream("abc", max_new_tokens=16, stop=stop)) == row.text
    assert generator.generate("abc", max_new_tokens=16, stop="never comes")[0].text == whole


def test_sampling(generator: Generator) -> None:
    def drawn(**options: Any) -> list[list[int]]:
        return [row.tokens for row in generator.generate(PROMPTS, max_new_tokens=8, **options)]

    greedy = drawn()
    assert drawn(temperature=1.5, seed=1) == drawn(temperature=1.5, seed=1)
    assert drawn(temperature=1.5, seed=1) != drawn(temperature=1.5, seed=2)
    assert drawn(temperature=1.5, top_k=1, seed=1) == greedy
    assert drawn(temperature=1.5, top_p=1e-6, seed=1) == greedy
    assert drawn(temperature=1.5, min_p=1.0, seed=1) == greedy
    assert all(len(set(tokens)) == 8 for tokens in drawn(repetition_penalty=1e9))


@pytest.mark.parametrize(
    ("prompts", "options", "reason"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [VOCABULARY]], {}, "prompt 1 has the token 300, the model has tokens 0 to 299"),
        ([], {}, "there is no prompt"),
        ([[1]] * 5, {}, r"a batch of 5 is outside \[1, 4\]"),
        ([[1] * 65], {}, "prompt 0 has 65 tokens, the cache holds"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"top_p": 2}, "top_p: Input should be less than or equal to 1"),
        ([[1]], {"heat": 1}, "heat: Extra inputs are not permitted"),
        ([[1]], {"stop": ""}, "a stop string is empty"),
    ],
)
def test_bad_input_leaves_the_generator_usable(
    generator: Generator, prompts: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        generator.generate(prompts, **options)
    assert generator.generate([PROMPTS[1]], max_new_tokens=3)[0].tokens == eager(PROMPTS[1], 3)


def test_a_tokenizer_of_another_model(engines: dict[str, Path]) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.add_tokens([f"extra {index}" for index in range(100)])
    with pytest.raises(InputError, match="the tokenizer has 356 tokens, the model 300: it belongs to another model"):
        Generator(graphopt.load(engines["static"]), tokenizer)


def test_what_needs_a_tokenizer_says_so(engines: dict[str, Path], tmp_path: Path) -> None:
    generator = Generator(graphopt.load(engines["static"]))
    with pytest.raises(InputError, match="a text needs a tokenizer"):
        generator.generate("text")
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        generator.generate([[1]], stop="x")


def test_an_engine_without_a_cache(tmp_path: Path) -> None:
    from graphopt.sources import transformers_source

    made = graphopt.compile(transformers_source(llama()), tmp_path / "e", passes=[], target={"backend": "torch"})
    with pytest.raises(EngineError, match="the engine has no cache"):
        Generator(made.engine)


# Text from tokens


@pytest.mark.parametrize("text", ["plain", "naïve café", "a € sign, 漢字, 👩‍👩‍👧 and on", "x" * 70 + "é" * 30, ""])
def test_text_comes_whole_however_its_bytes_fall(text: str) -> None:
    tokenizer = bytes_tokenizer()
    stream = TextStream(tokenizer)
    parts = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    parts.append(stream.finish())
    assert "".join(parts) == stream.text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@pytest.mark.parametrize(
    ("text", "stop", "left"), [("one two", "two", "one "), ("aab", "ab", "a"), ("abc", "cd", "abc")]
)
def test_a_stop_string_over_several_tokens(text: str, stop: str, left: str) -> None:
    tokenizer = bytes_tokenizer()
    stream = TextStream(tokenizer, [stop])
    parts = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    out = "".join(parts) + ("" if stream.stopped else stream.finish())
    assert out == stream.text == left
    assert stream.stopped == (stop in text)


# The command


def test_the_command_streams(engines: dict[str, Path]) -> None:
    expected = Generator.load(engines["static"]).generate("abc", max_new_tokens=6)[0].text
    done = CliRunner().invoke(app, ["generate", str(engines["static"]), "abc", "-n", "6", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert expected in done.stdout


def test_the_command_in_json(engines: dict[str, Path]) -> None:
    done = CliRunner().invoke(app, ["generate", str(engines["static"]), "abc", "d", "-n", "3", "--json"])
    found = json.loads(done.stdout)
    assert [row["finish"] for row in found["generations"]] == ["length", "length"]
    assert found["timing"]["prompt_tokens"] == 4
