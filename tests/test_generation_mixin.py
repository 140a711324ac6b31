"""EngineForCausalLM: transformers' ``generate`` on an engine gives what it gives on the eager model, or says why not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

import graphopt
from benchmarks.zoo.catalog import ANIMALS
from benchmarks.zoo.small import source as small_source
from graphopt.backends.onnxruntime.backend import OnnxRuntimeBackend
from graphopt.errors import EngineError, InputError
from graphopt.runtime.transformers import CACHE, EngineForCausalLM, EngineTexts
from tests.tiny import tiny_llama

TARGET = {"tactics": "fixed", "threads": 1}
HOLDS = 64  # tokens
STATIC, GROWING = {"layout": "static", "max_length": HOLDS}, {"layout": "growing"}
#: Rotary, learned positions, ALiBi; both layouts; logits of all tokens and of the last one.
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-static": ("LlamaForCausalLM", STATIC),
    "llama-static-last": ("LlamaForCausalLM", {**STATIC, "logits": "last"}),
    "llama-growing": ("LlamaForCausalLM", GROWING),
    "llama-growing-last": ("LlamaForCausalLM", {**GROWING, "logits": "last"}),
    "gpt2-static": ("GPT2LMHeadModel", {**STATIC, "logits": "last"}),
    "gpt2-growing": ("GPT2LMHeadModel", GROWING),
    "bloom-static": ("BloomForCausalLM", {**STATIC, "logits": "last"}),
    "bloom-growing": ("BloomForCausalLM", GROWING),
}
LAYOUTS = ("llama-static-last", "llama-growing")  # where the architecture does not matter


@dataclass
class Pair:
    """The same model twice: in eager, and as an engine in a folder."""

    eager: Any
    engine: EngineForCausalLM
    folder: Path

    def both(self, **options: Any) -> tuple[Any, Any]:
        """What each generates, from the same seed."""
        results = []
        for model in (self.eager, self.engine):
            torch.manual_seed(1)
            results.append(model.generate(**{"max_new_tokens": 12, **options}))
        return results[0], results[1]


@pytest.fixture(scope="module")
def pairs(one_thread: None) -> dict[str, Pair]:
    """Filled by :func:`pair`, each once. The models are too small for several threads."""
    return {}


@pytest.fixture
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param
    if name not in pairs:
        pairs[name] = make_pair(name, tmp_path_factory.mktemp(name))
    return pairs[name]


def make_pair(name: str, folder: Path) -> Pair:
    architecture, options = ENGINES[name]
    animal = next(animal for animal in ANIMALS if animal.name == architecture)
    # A head that is not the embedding: else random weights say the last token again and again.
    changes = {**animal.changes, "tie_word_embeddings": False}
    source = small_source(replace(animal, changes=changes), "eager")
    module: Any = source.module
    module.generation_config = GenerationConfig(pad_token_id=0, use_cache=True)
    module.config.save_pretrained(folder / "files")
    GenerationConfig(pad_token_id=0, eos_token_id=7, max_new_tokens=5).save_pretrained(folder / "files")
    compiled = graphopt.compile(
        replace(source, files=folder / "files"),
        folder / "engine",
        passes=with_cache(options),
        target=TARGET,
        dims={"batch": (1, 16), "sequence": (1, HOLDS)},
    )
    model = EngineForCausalLM(compiled.engine, config=module.config, generation_config=GenerationConfig(pad_token_id=0))
    return Pair(module, model, folder / "engine")


def with_cache(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The standard passes, with insert_kv_cache behind fuse_attention."""
    passes = [dict(step) for step in OnnxRuntimeBackend.standard_passes]
    place = [step["kind"] for step in passes].index("fuse_attention") + 1
    return [*passes[:place], {"kind": "insert_kv_cache", **options}, *passes[place:]]


def ragged(lengths: tuple[int, ...] = (5, 9, 2)) -> dict[str, Any]:
    """Texts padded on the left."""
    ids = torch.randint(1, 99, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character."""
    words = {"<pad>": 0, "<unk>": 1} | {chr(33 + index): index + 2 for index in range(97)}
    characters = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", unk_token="<unk>", padding_side="left", model_input_names=names
    )


# It generates what eager does

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 40},
    "beams": {"num_beams": 4},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
    "beams sampled": {"num_beams": 3, "do_sample": True, "top_k": 20},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_p": 0.9},
    "samples returned": {"do_sample": True, "num_return_sequences": 3},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [6, 7]]},
    "guidance": {"guidance_scale": 1.5},
    "no cache": {"use_cache": False, "max_new_tokens": 4},
}


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("pair", ENGINES, indirect=True)
def test_a_ragged_batch_goes_on_as_in_eager(pair: Pair, options: dict[str, Any]) -> None:
    expected, got = pair.both(**ragged(), **options)
    assert torch.equal(expected, got)
    assert len(got[0, 9:].unique()) > 2


@pytest.mark.parametrize("pair", LAYOUTS, indirect=True)
def test_every_call_starts_anew(pair: Pair) -> None:
    first = pair.engine.generate(**ragged(), max_new_tokens=8)
    for lengths in ((1,), (3, 3), (5, 9, 2)):
        expected, got = pair.both(**ragged(lengths))
        assert torch.equal(expected, got)
    assert torch.equal(pair.engine.generate(**ragged(), max_new_tokens=8), first)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("pair", LAYOUTS, indirect=True)
def test_texts_end(pair: Pair, beams: int) -> None:
    """Rows that have ended wait for the others."""
    plain = pair.eager.generate(**ragged(), max_new_tokens=30, num_beams=beams)[:, 9:]
    ends = [int(plain[0, 3]), int(plain[1, 6]), int(plain[2, 1])]
    expected, got = pair.both(**ragged(), max_new_tokens=30, eos_token_id=ends, num_beams=beams)
    assert torch.equal(expected, got)
    assert torch.isin(got[:, 9:-1], torch.tensor(ends)).any()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("pair", LAYOUTS, indirect=True)
def test_scores(pair: Pair, beams: int) -> None:
    expected, got = pair.both(
        **ragged(), num_beams=beams, output_scores=True, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(expected.sequences, got.sequences)
    assert len(got.scores) == len(got.logits) == 12
    for name in ("scores", "logits"):
        torch.testing.assert_close(expected[name], got[name], atol=1e-4, rtol=1e-4)
    if beams > 1:
        torch.testing.assert_close(expected.sequences_scores, got.sequences_scores, atol=1e-4, rtol=1e-4)
    transitions = pair.engine.compute_transition_scores(got.sequences, got.scores, got.get("beam_indices"))
    assert transitions.shape == (3, 12)


class Kept(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("pair", LAYOUTS, indirect=True)
def test_a_streamer_gets_every_token(pair: Pair) -> None:
    streamer = Kept()
    got = pair.engine.generate(**ragged((4,)), max_new_tokens=6, streamer=streamer)
    assert streamer.tokens == got[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("pair", LAYOUTS, indirect=True)
def test_stop_strings(pair: Pair) -> None:
    words = tokenizer()
    tokens = words(["ab"], return_tensors="pt")
    plain = pair.eager.generate(**tokens, max_new_tokens=20)
    expected, got = pair.both(**tokens, max_new_tokens=20, stop_strings=words.decode(plain[0, 5:7]), tokenizer=words)
    assert torch.equal(expected, got)
    assert torch.equal(got, plain[:, :7])


@pytest.mark.parametrize("pair", LAYOUTS, indirect=True)
def test_a_stopping_criterion_of_ones_own(pair: Pair) -> None:
    def long_enough(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 12)

    assert pair.engine.generate(**ragged(), max_new_tokens=20, stopping_criteria=[long_enough]).shape == (3, 12)


@pytest.mark.parametrize("pair", LAYOUTS, indirect=True)
def test_a_text_goes_on_from_what_was_read(pair: Pair) -> None:
    given = ragged()
    first = pair.engine.generate(**given, max_new_tokens=6, return_dict_in_generate=True)
    assert first[CACHE].get_seq_length() == 9 + 6 - 1
    ids = torch.cat([first.sequences, torch.tensor([[8, 9], [10, 11], [12, 13]])], 1)
    more = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(given["attention_mask"], (0, 8), value=1)}
    expected = pair.eager.generate(**more, max_new_tokens=6)
    assert torch.equal(pair.engine.generate(**more, max_new_tokens=6, **{CACHE: first[CACHE]}), expected)
    with pytest.raises(InputError):  # which read on
        pair.engine.generate(**more, max_new_tokens=6, **{CACHE: first[CACHE]})


@pytest.mark.parametrize("pair", LAYOUTS, indirect=True)
def test_forward(pair: Pair) -> None:
    given = ragged()
    expected = pair.eager(**given).logits[:, -1:]
    first = pair.engine(**given)
    torch.testing.assert_close(first.logits, expected, atol=1e-4, rtol=1e-4)
    ids, mask, steps = given["input_ids"], given["attention_mask"], []
    for token in (5, 6):
        ids, mask = (torch.nn.functional.pad(tensor, (0, 1), value=v) for tensor, v in ((ids, token), (mask, 1)))
        steps.append(pair.engine(ids[:, -1:], mask, first[CACHE]).logits)
    whole = pair.eager(ids, attention_mask=mask).logits[:, -2:]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)  # neither overwrote the other


# Where it comes from


@pytest.mark.parametrize("pair", LAYOUTS, indirect=True)
def test_the_folder_has_the_configs(pair: Pair) -> None:
    model = EngineForCausalLM.from_pretrained(pair.folder, threads=1)
    assert type(model.config).__name__ == "LlamaConfig"
    assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == (7, 5)
    expected = pair.eager.generate(**ragged(), max_new_tokens=5, eos_token_id=7)
    assert torch.equal(model.generate(**ragged()), expected)


@pytest.mark.parametrize("pair", LAYOUTS, indirect=True)
def test_without_configs(pair: Pair) -> None:
    model = EngineForCausalLM(pair.engine.engine)
    assert model.config.vocab_size == 99
    assert model.generation_config.use_cache
    expected = pair.eager.generate(**ragged(), max_new_tokens=5)
    assert torch.equal(model.generate(**ragged(), max_new_tokens=5), expected)


def test_an_engine_without_a_cache(tmp_path: Path) -> None:
    engine = graphopt.compile(tiny_llama(), tmp_path / "engine", target=TARGET).engine
    with pytest.raises(EngineError, match="no decoder with a cache"):
        EngineForCausalLM(engine)


# What it refuses

NOT_DONE: dict[str, tuple[dict[str, Any], str]] = {
    "prompt lookup": (
        {"prompt_lookup_num_tokens": 2, **ragged((4,))},
        r"cannot do assisted generation \(assistant_model",
    ),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "cannot do output_attentions"),
    "hidden states": ({"output_hidden_states": True}, "cannot do output_hidden_states"),
    "embeddings": ({"inputs_embeds": torch.zeros(3, 9, 48)}, "cannot do inputs_embeds"),
    "their cache": ({"cache_implementation": "static"}, "cannot do cache_implementation"),
    "paged cache": ({"cache_implementation": "paged"}, "no paged cache"),
    "a cache of theirs": (
        {CACHE: DynamicCache()},
        "the cache is a DynamicCache that is not this engine's",
    ),
    "chunks": ({"prefill_chunk_size": 2}, "cannot do prefill_chunk_size"),
    "positions": ({"position_ids": torch.arange(9).expand(3, 9)}, "position_ids do not count"),
    "right padding": ({"attention_mask": ragged()["attention_mask"].flip(1)}, "row 0 ends in padding"),
    "unknown ids": ({"input_ids": torch.full((3, 9), 99)}, "ids from 99 to 99, the engine knows those from 0 to 98"),
    "batch": ({"num_return_sequences": 6, "do_sample": True}, r"a batch of 18 is outside \[1, 16\]"),
}


@pytest.mark.parametrize(("options", "message"), NOT_DONE.values(), ids=NOT_DONE)
@pytest.mark.parametrize("pair", LAYOUTS, indirect=True)
def test_refusals_of_generate(pair: Pair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pair.engine.generate(**{**ragged(), "max_new_tokens": 3, **options})
    expected, got = pair.both(**ragged())
    assert torch.equal(expected, got)


NOT_READ: dict[str, tuple[dict[str, Any], str]] = {
    "labels": ({"labels": torch.zeros(3, 9)}, "cannot do labels"),
    "all logits": ({"logits_to_keep": 0}, "cannot do logits_to_keep"),
    "tuples": ({"return_dict": False}, "cannot do return_dict=False"),
    "nothing": ({"input_ids": None}, r"reads input_ids \[batch, sequence\]"),
    "short mask": (
        {"attention_mask": torch.ones(3, 8)},
        r"zeros and ones \[3, 9\], past columns included; it is \[3, 8\]",
    ),
    "additive mask": ({"attention_mask": torch.full((3, 9), -1e9)}, "must be zeros and ones"),
}


@pytest.mark.parametrize(("options", "message"), NOT_READ.values(), ids=NOT_READ)
@pytest.mark.parametrize("pair", LAYOUTS[:1], indirect=True)
def test_refusals_of_forward(pair: Pair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pair.engine(**{**ragged(), **options})


@pytest.mark.parametrize("pair", LAYOUTS[:1], indirect=True)
def test_refusals_of_what_was_read(pair: Pair) -> None:
    texts = pair.engine(**ragged())[CACHE]
    assert isinstance(texts, EngineTexts)
    with pytest.raises(InputError, match="says otherwise of columns that have been read"):
        pair.engine(torch.ones(3, 1, dtype=torch.int64), cache=texts)
    with pytest.raises(InputError, match="input_ids has 2 rows, the cache 3"):
        pair.engine(torch.ones(2, 1, dtype=torch.int64), past_key_values=texts)
    with pytest.raises(InputError, match="the cache is a EngineTexts that is not this engine's"):
        EngineForCausalLM.from_pretrained(pair.folder)(torch.ones(3, 1, dtype=torch.int64), past_key_values=texts)
    assert texts.get_seq_length() == 9


@pytest.mark.parametrize("pair", ["gpt2-static", "gpt2-growing"], indirect=True)
def test_a_text_as_long_as_the_cache(pair: Pair) -> None:
    """The last token is not read, so that there is room for one more; padding takes none."""
    longest = HOLDS - 9 + 1
    expected, got = pair.both(**ragged(), max_new_tokens=longest)
    assert torch.equal(expected, got)
    padded = {name: torch.nn.functional.pad(tensor, (7, 0)) for name, tensor in ragged().items()}
    assert torch.equal(pair.engine.generate(**padded, max_new_tokens=longest)[:, 7:], got)
    with pytest.raises(
        InputError, match=r"come to 65 tokens in the cache, which holds 64(.|\n)*generate 1 tokens less"
    ):
        pair.engine.generate(**ragged(), max_new_tokens=longest + 1)
    with pytest.raises(InputError, match="row 0 would have 65 tokens, the cache holds 64"):
        pair.engine(torch.ones(1, 65, dtype=torch.int64))
    expected, got = pair.both(**ragged())
    assert torch.equal(expected, got)
