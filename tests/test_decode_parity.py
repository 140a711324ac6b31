"""Decode parity: an engine's greedy tokens and logits beside eager's; assert_decodes, and graphopt verify --decode."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaModel

import graphopt
from graphopt import cli
from graphopt.backends.onnxruntime.bound_cache import BoundCache
from graphopt.decode_parity import decode_parity, sample_prompts, verify_decoding
from graphopt.errors import EngineError, GraphoptError, InputError
from graphopt.models import load_model
from graphopt.runtime.engine import Engine
from graphopt.schemas.report import DecodeDifference, DecodeParity
from graphopt.sources import Source, transformers_source
from graphopt.testing import assert_decodes
from tests.test_generation import CACHES, LONGEST, PROMPTS, VOCABULARY, llama
from tests.texts import bytes_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")  # the models are too small for several

STEPS = 8
HOLDS = {"static": LONGEST, "growing": 64}  # tokens
BATCHES = {"static": 4, "growing": 3}  # rows at most
TARGET = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model that is nearly the same."""
    folder = tmp_path_factory.mktemp("other")
    blurred().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An engine directory for each layout of a cache."""
    folder = tmp_path_factory.mktemp("engines")
    for layout, cache in CACHES.items():
        build(load_model(str(directory)), folder / layout, cache, {"batch": (1, BATCHES[layout])})
    return {layout: folder / layout for layout in CACHES}


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[str, Engine]:
    return {layout: graphopt.load(folder) for layout, folder in folders.items()}


@pytest.fixture(params=CACHES)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(engines: dict[str, Engine], layout: str) -> Engine:
    return engines[layout]


def build(source: Source, folder: Path, cache: dict[str, Any], dims: dict[str, Any]) -> None:
    passes = [{"kind": "canonicalize"}, {"kind": "fuse_attention"}, {"kind": "insert_kv_cache", **cache}]
    graphopt.compile(source, folder, passes=passes, target=TARGET, dims=dims)


def blurred() -> Any:
    """The model with noise on its last weights."""
    model = llama()
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight += 0.1 * torch.randn_like(model.lm_head.weight)
    return model


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What eager's own ``generate`` takes."""
    config = GenerationConfig(max_new_tokens=count, eos_token_id=None, pad_token_id=0)
    made = model.generate(torch.tensor([prompt]), generation_config=config)
    return [int(token) for token in made[0, len(prompt) :]]


def step_logits(model: Any, prompt: list[int], steps: int = STEPS) -> Tensor:
    """Eager's logits at each of the steps that follow a prompt, if it takes the original's greedy tokens."""
    text = prompt + greedy(llama(), prompt, steps - 1)
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([text])).logits[0, -steps:]
    return logits


class Watched(nn.Module):
    """A model that keeps the texts it is asked about, and whose logits may be changed."""

    def __init__(self, model: Any, change: Callable[[list[int], Tensor], None] | None = None) -> None:
        super().__init__()
        self.model, self.change = model, change
        self.tokens = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        self.texts: list[list[int]] = []

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.texts.append([int(token) for token in inputs[self.tokens][0]])
        logits = self.model(**inputs).logits.clone()
        if self.change is not None:
            self.change(self.texts[-1], logits[0])
        return {"logits": logits}


def raised(row: int, step: int, token: int, margin: float) -> Watched:
    """The model, but at one step of one row a token is likelier than the best one."""
    prompt = PROMPTS[row]

    def change(text: list[int], logits: Tensor) -> None:
        if text[: len(prompt)] == prompt:
            place = len(prompt) - 1 + step
            logits[place, token] = logits[place].max() + margin

    return Watched(llama(), change)


def lifted(by: float) -> Watched:
    """The model with all logits higher: other numbers, the same tokens."""

    def change(text: list[int], logits: Tensor) -> None:
        logits += by

    return Watched(llama(), change)


# Agreement


def test_the_engine_takes_the_tokens_of_eagers_generate(engine: Engine) -> None:
    model = Watched(llama())
    parity = decode_parity(model, engine, PROMPTS, steps=STEPS)
    assert model.texts == [prompt + greedy(llama(), prompt, STEPS - 1) for prompt in PROMPTS]
    assert parity.holds
    assert parity.agreement == 1.0
    assert [(row.prompt_tokens, row.tokens, row.equal) for row in parity.rows] == [(n, STEPS, STEPS) for n in (5, 1, 3)]
    assert not any(row.first_difference for row in parity.rows)


def test_drift_is_small_and_the_scale_is_eagers(engine: Engine) -> None:
    parity = decode_parity(llama(), engine, PROMPTS, steps=STEPS)
    largest = max(float(step_logits(llama(), prompt).abs().max()) for prompt in PROMPTS)
    assert parity.scale == pytest.approx(largest, rel=1e-5)
    assert len(parity.drift) == STEPS
    assert parity.worst_drift == max(parity.drift) / parity.scale <= 1e-5


def test_drift_is_told_for_each_step(engine: Engine) -> None:
    def change(text: list[int], logits: Tensor) -> None:
        if text[0] == 10:  # the prompt of one token
            logits[2] += 0.5

    parity = decode_parity(Watched(llama(), change), engine, PROMPTS, steps=4)
    assert parity.holds
    assert parity.drift == pytest.approx([0, 0, 0.5, 0], abs=1e-4)


def test_one_row_and_one_step(engine: Engine) -> None:
    parity = decode_parity(llama(), engine, PROMPTS[:1], steps=1)
    assert [(row.tokens, row.equal) for row in parity.rows] == [(1, 1)]
    assert len(parity.drift) == 1


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_prompts_are_read_in_chunks(engine: Engine, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    original = BoundCache.step

    def noted(self: BoundCache, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        widths.append(feeds["input_ids"].shape[1])
        return original(self, feeds)

    monkeypatch.setattr(BoundCache, "step", noted)
    assert decode_parity(llama(), engine, PROMPTS, steps=4, chunk=chunk).holds
    assert max(widths) == min(chunk, 5)
    assert sum(widths) == 5 + 3


# Differences


def test_a_token_that_eager_does_not_take_is_found(engine: Engine) -> None:
    parity = decode_parity(raised(row=1, step=3, token=7, margin=1.5), engine, PROMPTS, steps=STEPS)
    first = parity.rows[1].first_difference
    assert first is not None
    assert (first.step, first.eager, first.engine) == (3, 7, greedy(llama(), PROMPTS[1], 4)[3])
    assert [row.equal for row in parity.rows] == [STEPS, STEPS - 1, STEPS]
    assert parity.agreement == (3 * STEPS - 1) / (3 * STEPS)
    assert not parity.holds


def test_the_margin_is_what_eager_prefers_its_token_by(engine: Engine) -> None:
    first = decode_parity(raised(row=0, step=2, token=7, margin=1.5), engine, PROMPTS, steps=4).rows[0].first_difference
    assert first is not None
    assert first.margin == pytest.approx(1.5, abs=1e-5)
    assert str(first) == f"step 2: token {first.engine}, eager prefers 7 by 1.5"


def test_other_weights_give_the_differences_that_eager_gives(engine: Engine) -> None:
    found = decode_parity(blurred(), engine, PROMPTS, steps=STEPS).rows
    for row, prompt in zip(found, PROMPTS, strict=True):
        logits, taken = step_logits(blurred(), prompt), greedy(llama(), prompt, STEPS)
        own = logits.argmax(-1).tolist()
        assert row.equal == sum(map(int.__eq__, own, taken))
        step = next((step for step in range(STEPS) if own[step] != taken[step]), None)
        if step is None:
            assert row.first_difference is None
            continue
        margin = float(logits[step, own[step]] - logits[step, taken[step]])
        expected = DecodeDifference(step=step, eager=own[step], engine=taken[step], margin=margin)
        assert row.first_difference is not None
        assert row.first_difference.model_dump() == pytest.approx(expected.model_dump(), abs=1e-5)
    assert any(row.first_difference and row.first_difference.step for row in found)


def test_up_to_the_first_difference_the_tokens_are_eagers_own(engine: Engine) -> None:
    for row, prompt in zip(decode_parity(blurred(), engine, PROMPTS, steps=STEPS).rows, PROMPTS, strict=True):
        if (first := row.first_difference) is not None:
            own, taken = greedy(blurred(), prompt, STEPS), greedy(llama(), prompt, STEPS)
            assert own[: first.step] == taken[: first.step]
            assert (own[first.step], taken[first.step]) == (first.eager, first.engine)


# assert_decodes


def test_assert_decodes_gives_what_it_found(engine: Engine) -> None:
    found = assert_decodes(llama(), engine, PROMPTS, steps=4, chunk=2, drift=1e-4)
    assert isinstance(found, DecodeParity)
    assert found.holds


def test_assert_decodes_names_the_first_difference_of_each_row(engine: Engine) -> None:
    token = greedy(llama(), PROMPTS[1], 4)[3]
    with pytest.raises(AssertionError) as error:
        assert_decodes(raised(row=1, step=3, token=7, margin=1.5), engine, PROMPTS, steps=STEPS)
    assert str(error.value) == (
        "no parity:\n  95.83% of the tokens are eager's, must be 100.00%\n"
        f"  row 1: step 3: token {token}, eager prefers 7 by 1.5"
    )


def test_a_smaller_agreement_may_be_asked_for(engine: Engine) -> None:
    model = raised(row=1, step=3, token=7, margin=1.5)
    assert assert_decodes(model, engine, PROMPTS, steps=STEPS, agreement=0.95).agreement < 1
    with pytest.raises(AssertionError, match="must be 96"):
        assert_decodes(model, engine, PROMPTS, steps=STEPS, agreement=0.96)


def test_drift_may_be_limited(engine: Engine) -> None:
    found = assert_decodes(lifted(0.25), engine, PROMPTS, steps=4)
    assert found.drift == pytest.approx([0.25] * 4, abs=1e-4)
    assert_decodes(lifted(0.25), engine, PROMPTS, steps=4, drift=1.01 * 0.25 / found.scale)
    with pytest.raises(AssertionError, match=rf"logits differ by {0.25 / found.scale:.3g} of their scale, limit 0\.01"):
        assert_decodes(lifted(0.25), engine, PROMPTS, steps=4, drift=0.01)


def test_logits_that_are_no_number_are_over_any_limit(engines: dict[str, Engine]) -> None:
    def change(text: list[int], logits: Tensor) -> None:
        logits[-1] = torch.nan

    with pytest.raises(AssertionError, match="logits differ by"):
        assert_decodes(Watched(llama(), change), engines["static"], [[5]], steps=4, agreement=0.5, drift=1e-3)


# What does not fit


@pytest.mark.parametrize("steps", [0, -1])
def test_there_is_one_step_at_least(engine: Engine, steps: int) -> None:
    with pytest.raises(InputError, match=f"steps is {steps}, must be 1 or more"):
        decode_parity(llama(), engine, PROMPTS, steps=steps)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_has_one_token_at_least(engines: dict[str, Engine], chunk: int) -> None:
    with pytest.raises(InputError, match="chunk"):
        decode_parity(llama(), engines["static"], PROMPTS, steps=2, chunk=chunk)


def test_the_last_place_of_a_cache_may_be_filled(engine: Engine, layout: str) -> None:
    assert decode_parity(llama(), engine, [[5] * (HOLDS[layout] - 3), [6]], steps=4).holds


def test_a_text_that_does_not_fit_the_cache(engine: Engine, layout: str) -> None:
    room = HOLDS[layout]
    with pytest.raises(InputError, match=f"row 1 would have {room + 1} tokens, the cache holds {room}"):
        decode_parity(llama(), engine, [[6], [5] * (room - 3)], steps=5)
    assert decode_parity(llama(), engine, PROMPTS, steps=2).holds


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ([], "a batch of 0 is outside"),
        ([[]], "prompt 0 is empty"),
        ([[5], [VOCABULARY]], f"there is a token {VOCABULARY}, the model has tokens 0 to {VOCABULARY - 1}"),
        ([[5]] * 5, "a batch of 5 is outside"),
    ],
)
def test_prompts_that_cannot_be_read(engine: Engine, prompts: list[list[int]], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        decode_parity(llama(), engine, prompts, steps=2)


@pytest.mark.parametrize("steps", [2, 4])
def test_an_empty_prompt_beside_others(engines: dict[str, Engine], steps: int) -> None:
    with pytest.raises(InputError):
        decode_parity(llama(), engines["static"], [[5], []], steps=steps)


def test_a_source_for_an_engine_without_an_encoder(engine: Engine) -> None:
    with pytest.raises(InputError, match="the engine has no encoder that would read input_ids"):
        decode_parity(llama(), engine, [[5]], source={"input_ids": [torch.tensor([6])]}, steps=2)


@pytest.mark.parametrize(("model", "vocabulary"), [(LlamaModel, VOCABULARY), (LlamaForCausalLM, VOCABULARY + 100)])
def test_a_model_that_cannot_be_compared(engines: dict[str, Engine], model: Any, vocabulary: int) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(GraphoptError):
        decode_parity(model(LlamaConfig(vocab_size=vocabulary, **small)), engines["static"], [[5, 6]], steps=2)


def test_an_engine_without_a_cache(tmp_path: Path) -> None:
    source = transformers_source(llama())
    made = graphopt.compile(source, tmp_path / "plain", passes=[], target={"backend": "torch"})
    with pytest.raises(EngineError, match="the engine has no cache"):
        decode_parity(llama(), made.engine, PROMPTS, steps=2)
    with pytest.raises(EngineError, match="the engine has no cache"):
        verify_decoding(tmp_path / "plain", llama(), steps=2)


# Prompts at random, and verify_decoding


def test_sample_prompts_are_tokens_of_these_lengths(engine: Engine) -> None:
    prompts, reads = sample_prompts(transformers_source(llama()), engine, [4, 1, 9])
    assert [len(prompt) for prompt in prompts] == [4, 1, 9]
    assert all(0 <= token < VOCABULARY for prompt in prompts for token in prompt)
    assert not reads
    assert sample_prompts(transformers_source(llama()), engine, [4, 1, 9]) == (prompts, reads)


def test_verify_decoding_leaves_room_for_the_new_tokens(folders: dict[str, Path]) -> None:
    parity = verify_decoding(folders["static"], llama(), steps=40)
    assert parity.holds
    assert [row.prompt_tokens for row in parity.rows] == [5, 8, 1, 8]
    assert {row.tokens for row in parity.rows} == {40}


def test_verify_decoding_of_an_engine_for_small_batches(folders: dict[str, Path]) -> None:
    assert verify_decoding(folders["growing"], llama(), steps=6).holds


def test_verify_decoding_needs_a_tokenizer_for_texts(folders: dict[str, Path], tmp_path: Path) -> None:
    source = replace(transformers_source(llama()), files=None)
    build(source, tmp_path / "engine", CACHES["static"], {})
    with pytest.raises(EngineError, match="there is no tokenizer"):
        verify_decoding(tmp_path / "engine", llama(), ["text"], steps=6)


# The command


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """``graphopt verify`` as a user types it."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["graphopt", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Done(int(stop.value.code or 0), *capsys.readouterr())

    return run


def test_the_command_holds(command: Callable[..., Done], folders: dict[str, Path], directory: Path) -> None:
    done = command(folders["static"], directory, "--decode", 6)
    assert done.code == 0, done.err
    assert "greedy tokens against eager" in done.out
    assert "holds: 100.00% are eager's" in done.out


def test_the_command_finds_another_model(command: Callable[..., Done], folders: dict[str, Path], other: Path) -> None:
    done = command(folders["static"], other, "--decode", 12)
    assert done.code == 1
    assert "broken: " in done.out
    assert "eager prefers" in " ".join(done.out.split())
    assert not done.err


def test_the_command_takes_prompts(
    command: Callable[..., Done], folders: dict[str, Path], directory: Path, layout: str
) -> None:
    done = command(folders[layout], directory, "--decode", 6, "--prompt", "abc", "--prompt", "d", "--json")
    assert done.code == 0, done.err
    parity = DecodeParity.model_validate(json.loads(done.out))
    assert parity.holds
    assert [(row.prompt_tokens, row.tokens) for row in parity.rows] == [(3, 6), (1, 6)]


def test_the_command_in_json_says_what_differs(
    command: Callable[..., Done], folders: dict[str, Path], other: Path, layout: str
) -> None:
    done = command(folders[layout], other, "--decode", 12, "--prompt", "abc", "--json")
    assert done.code == 1
    prompt = bytes_tokenizer()("abc")["input_ids"]
    own, taken = step_logits(blurred(), prompt, 12).argmax(-1).tolist(), greedy(llama(), prompt, 12)
    step = next(step for step in range(12) if own[step] != taken[step])
    (row,) = json.loads(done.out)["rows"]
    assert {key: row["first_difference"][key] for key in ("step", "eager", "engine")} == {
        "step": step, "eager": own[step], "engine": taken[step],
    }  # fmt: skip
    assert row["equal"] == sum(map(int.__eq__, own, taken))


@pytest.mark.parametrize(
    ("options", "reason", "hint"),
    [
        (("--prompt", "abc"), "--prompt is for --decode", "add --decode 128"),
        (("--decode", LONGEST), f"{LONGEST} tokens do not fit into the cache of {LONGEST}", "ask for fewer"),
        (("--decode", -3), "steps is -3, must be 1 or more", ""),
        (("--decode", 8, "--prompt", "x" * LONGEST), "row 0 would have 49 tokens, the cache holds 48", "shorter text"),
        (("--decode", 8, "--prompt", ""), "prompt 0 is empty", ""),
    ],
)
def test_the_command_says_what_is_wrong(
    command: Callable[..., Done],
    folders: dict[str, Path],
    directory: Path,
    options: tuple[object, ...],
    reason: str,
    hint: str,
) -> None:
    done = command(folders["static"], directory, *options)
    assert done.code == 2
    assert f"error: {reason}" in done.err
    assert hint in done.err
    assert not done.out
