"""Caches at run time: small decoders on onnxruntime, step by step, against eager on whole texts."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from onnxruntime import IOBinding
from torch import Tensor

import graphopt
from benchmarks.zoo.catalog import ANIMALS
from benchmarks.zoo.small import source as small_source
from graphopt.backends.onnxruntime import bound_cache
from graphopt.errors import EngineError, InputError
from graphopt.runtime.engine import Engine
from graphopt.runtime.kv_cache import KvCache
from graphopt.sources import Source
from tests.folders import shared_folder

LENGTH = 24
TARGET = {"backend": "onnxruntime", "tactics": "fixed"}
STATIC: dict[str, Any] = {"layout": "static", "max_length": LENGTH}
BUILDS: dict[str, tuple[dict[str, Any], bool]] = {
    "growing": ({"layout": "growing"}, False),
    "static": (STATIC, False),
    "fused": (STATIC, True),
}


@dataclass(frozen=True)
class Decoder:
    """An engine with a cache, and the model it was made of."""

    source: Source
    engine: Engine
    folder: Path

    @property
    def is_static(self) -> bool:
        return self.engine.layout is not None and self.engine.layout.max_length is not None

    def whole(self, tokens: Tensor) -> Tensor:
        """Eager's logits of whole texts."""
        with torch.no_grad():
            logits: Tensor = self.source.module(input_ids=tokens).logits
        return logits

    def cache(self, batch: int, bound: bool = True) -> KvCache:
        layout = self.engine.layout
        assert layout is not None
        return self.engine.new_cache(batch) if bound else KvCache(self.engine, layout, batch, {})

    def feeds(self, tokens: Tensor, past: list[int]) -> dict[str, Tensor]:
        """Tokens behind as many of each row; in a growing cache all rows have the same number."""
        if self.is_static:
            return {"input_ids": tokens, "past_lengths": torch.tensor(past)}
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones(len(tokens), past[0] + tokens.shape[1], dtype=torch.int64),
        }


@functools.cache
def decoder(build: str, name: str = "LlamaForCausalLM", logits: str = "all", longest: int = 128) -> Decoder:
    """One build for all tests of this file."""
    source = small_source(next(animal for animal in ANIMALS if animal.name == name), "eager")
    options, fused = BUILDS[build]
    passes: list[dict[str, Any]] = [
        {"kind": kind, "allow_no_match": True} for kind in ("canonicalize", "fuse_attention")
    ]
    passes.append({"kind": "insert_kv_cache", **options, "logits": logits})
    passes += [{"kind": "fuse_cached_attention"}] if fused else []
    folder = shared_folder() / "engine"
    made = graphopt.compile(source, folder, passes=passes, target=TARGET, dims={"sequence": (1, longest)})
    return Decoder(source, made.engine, folder)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def tokens_of(batch: int, count: int) -> Tensor:
    return torch.randint(1, 99, (batch, count))


# Steps are the whole text


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "plain"])
@pytest.mark.parametrize("build", BUILDS)
def test_steps_are_the_whole_text(build: str, bound: bool) -> None:
    """A prompt, a chunk of several rows, single tokens, up to the last place."""
    made, tokens = decoder(build), tokens_of(2, LENGTH)
    cache, past, found = made.cache(2, bound), 0, []
    for width in (9, 4, *[1] * 9, 2):
        found.append(cache.step(made.feeds(tokens[:, past : past + width], [past, past]))["logits"].clone())
        past += width
    close(torch.cat(found, 1), made.whole(tokens))


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "plain"])
@pytest.mark.parametrize("build", BUILDS)
def test_one_row_token_by_token(build: str, bound: bool) -> None:
    made, tokens = decoder(build), tokens_of(1, 6)
    cache = made.cache(1, bound)
    found = [cache.step(made.feeds(tokens[:, i : i + 1], [i]))["logits"].clone() for i in range(6)]
    close(torch.cat(found, 1), made.whole(tokens))


@pytest.mark.parametrize("build", BUILDS)
def test_a_prompt_of_the_whole_length(build: str) -> None:
    made, tokens = decoder(build), tokens_of(2, LENGTH)
    close(made.cache(2).step(made.feeds(tokens, [0, 0]))["logits"], made.whole(tokens))


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "plain"])
@pytest.mark.parametrize("build", ["static", "fused"])
def test_ragged_rows(build: str, bound: bool) -> None:
    """Each row its own prompt, then a chunk and single tokens on top of it; the last one fills the buffer."""
    made, tokens = decoder(build), tokens_of(3, LENGTH)
    whole, cache = made.whole(tokens), made.cache(3, bound)
    past = torch.tensor([5, 2, 8])
    logits = cache.step(made.feeds(tokens[:, :8], [0, 0, 0]))["logits"]
    for row, count in enumerate(past.tolist()):
        close(logits[row, :count], whole[row, :count])
    for width in (3, 1, 1, 11, 1):
        index = past[:, None] + torch.arange(width)
        logits = cache.step(made.feeds(tokens.gather(1, index), past.tolist()))["logits"]
        close(logits, whole[torch.arange(3)[:, None], index])
        past = past + torch.where(past + width < LENGTH, width, 0)


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "plain"])
def test_padding_in_front_of_a_growing_cache(bound: bool) -> None:
    """Rows end at one column; what is in front of the shorter one is padding, whose tokens may be any."""
    made, tokens = decoder("growing"), tokens_of(2, 7)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    expected = made.whole(tokens[1:, 3:])
    cache = made.cache(2, bound)
    found = []
    for first, last in ((0, 2), (2, 5), (5, 6), (6, 7)):  # the first step of the second row is padding alone
        feeds = {"input_ids": tokens[:, first:last], "attention_mask": mask[:, :last]}
        found.append(cache.step(feeds)["logits"].clone())
    got = torch.cat(found, 1)
    close(got[1:, 3:], expected)
    close(got[:1], made.whole(tokens[:1]))
    assert got.isfinite().all()


@pytest.mark.parametrize("build", BUILDS)
def test_logits_of_last_tokens(build: str) -> None:
    made, tokens = decoder(build, logits="last"), tokens_of(2, 6)
    whole, cache = made.whole(tokens), made.cache(2)
    feeds = made.feeds(tokens[:, :5], [0, 0])
    counts = torch.tensor([5, 5])
    if made.is_static:
        counts = torch.tensor([5, 2])
        feeds["new_lengths"] = counts
    logits = cache.step(feeds)["logits"]
    assert logits.shape == (2, 1, 99)
    close(logits[:, 0], whole[torch.arange(2), counts - 1])


# Where the cache lies


@pytest.mark.parametrize("build", ["static", "fused"])
def test_a_static_cache_stays_where_it_is(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers are never moved or copied, and the engine reads and writes at their very addresses."""
    bindings: list[tuple[str, str, int]] = []
    original = bound_cache._bind_tensor

    def noted(bind: Any, name: str, tensor: Tensor) -> None:
        bindings.append((bind.__name__, name, tensor.data_ptr()))
        original(bind, name, tensor)

    made, tokens = decoder(build), tokens_of(1, 8)  # before: its proofs bind too
    monkeypatch.setattr(bound_cache, "_bind_tensor", noted)
    cache = made.cache(1)
    assert isinstance(cache, bound_cache.BoundCache)
    places = {name: tensor.data_ptr() for name, tensor in cache.tensors.items()}
    nbytes = cache.nbytes
    past = 0
    for width in (3, 2, 1, 1, 1):
        cache.step(made.feeds(tokens[:, past : past + width], [past]))
        past += width
        assert {name: tensor.data_ptr() for name, tensor in cache.tensors.items()} == places
        assert cache.nbytes == nbytes
    for name, place in places.items():
        present = name.replace("past_key_values", "present")
        assert {where for kind, bound, where in bindings if bound in (name, present)} == {place}
        kinds = [kind for kind, bound, _ in bindings if bound in (name, present)]
        assert kinds == ["bind_input", "bind_output"] * 3  # single tokens have one binding


def test_feeds_that_onnxruntime_copies_are_bound_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU it copies an input to where the model reads it (lengths are read on the CPU) when it is bound: a binding
    that comes again would give the first step's."""
    made, tokens = decoder("static"), tokens_of(1, 8)
    names, expected, copies = set(made.feeds(tokens, [0])), made.whole(tokens), list[tuple[str, Tensor]]()
    original = bound_cache._bind_tensor

    def copied(bind: Any, name: str, tensor: Tensor) -> None:
        if name in names:
            tensor = tensor.clone()
            copies.append((name, tensor))
        original(bind, name, tensor)

    waits: list[int] = []
    monkeypatch.setattr(bound_cache, "_bind_tensor", copied)
    monkeypatch.setattr(IOBinding, "synchronize_inputs", lambda binding: waits.append(len(copies)))
    cache = made.cache(1)
    assert isinstance(cache, bound_cache.BoundCache)
    assert not cache.binds_by_copy
    cache.binds_by_copy = True
    got = [cache.step(made.feeds(tokens[:, at : at + 1], [at]))["logits"].clone() for at in range(8)]
    close(torch.cat(got, 1), expected)
    assert Counter(name for name, _ in copies) == dict.fromkeys(names, 8)
    assert waits == [len(names) * (step + 1) for step in range(8)]


def test_rows_that_run_apart_are_parts_of_the_buffers() -> None:
    made, tokens = decoder("fused"), tokens_of(2, 6)
    cache = made.cache(2)
    places = {name: tensor.data_ptr() for name, tensor in cache.tensors.items()}
    cache.step(made.feeds(tokens[:, :3], [0, 0]))
    before = {name: tensor.clone() for name, tensor in cache.tensors.items()}
    cache.step(made.feeds(tokens[:, 3:], [3, 3]))
    assert {name: tensor.data_ptr() for name, tensor in cache.tensors.items()} == places
    for name, tensor in cache.tensors.items():
        assert torch.equal(tensor[:, :, :3], before[name][:, :, :3])
        assert not torch.equal(tensor[:, :, 3:6], before[name][:, :, 3:6])
        assert torch.equal(tensor[:, :, 6:], before[name][:, :, 6:])


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "plain"])
def test_a_growing_cache_grows_by_its_tokens(bound: bool) -> None:
    """Two layers of keys and values, two heads of 16 numbers of four bytes."""
    made, tokens = decoder("growing"), tokens_of(3, 9)
    cache = made.cache(3, bound)
    each = 2 * 2 * 3 * 2 * 16 * 4
    assert cache.nbytes == 0
    past = 0
    for width in (5, 1, 3):
        cache.step(made.feeds(tokens[:, past : past + width], [past] * 3))
        past += width
        assert cache.nbytes == past * each
        assert sum(tensor.untyped_storage().nbytes() for tensor in cache.tensors.values()) == past * each


def test_results_of_single_tokens_are_overwritten_by_the_next() -> None:
    """What a prompt gives stays; whoever keeps a single token's logits copies them."""
    made, tokens = decoder("static"), tokens_of(1, 5)
    cache = made.cache(1)
    prompt = cache.step(made.feeds(tokens[:, :3], [0]))["logits"]
    kept = prompt.clone()
    first = cache.step(made.feeds(tokens[:, 3:4], [3]))["logits"]
    second = cache.step(made.feeds(tokens[:, 4:], [4]))["logits"]
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(prompt, kept)


# select


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "plain"])
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("rows", [[2, 0], [1], [0, 0, 1, 2, 1]])
def test_select(rows: list[int], build: str, bound: bool) -> None:
    """Rows in another order, one of them, one twice; single tokens before and after."""
    made, tokens = decoder(build), tokens_of(3, 7)
    cache = made.cache(3, bound)
    cache.step(made.feeds(tokens[:, :4], [0] * 3))
    cache.step(made.feeds(tokens[:, 4:5], [4] * 3))
    cache.select(torch.tensor(rows))
    assert cache.batch == len(rows)
    texts, found = tokens[rows], []
    for place in (5, 6):
        found.append(cache.step(made.feeds(texts[:, place : place + 1], [place] * len(rows)))["logits"].clone())
    close(torch.cat(found, 1), made.whole(texts)[:, 5:])


def test_select_by_truth() -> None:
    made = decoder("static")
    cache = made.cache(3)
    cache.select(torch.tensor([True, False, True]))
    assert cache.batch == 2


# Errors, after which all goes on


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "plain"])
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_another_number_of_rows(rows: int, build: str, bound: bool) -> None:
    made, tokens = decoder(build), tokens_of(2, 6)
    cache = made.cache(2, bound)
    cache.step(made.feeds(tokens[:, :5], [0, 0]))
    with pytest.raises(InputError, match=f"input_ids has {rows} rows, the cache 2"):
        cache.step(made.feeds(tokens_of(rows, 1), [5] * rows))
    close(cache.step(made.feeds(tokens[:, 5:], [5, 5]))["logits"], made.whole(tokens)[:, 5:])


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "plain"])
@pytest.mark.parametrize("build", ["static", "fused"])
@pytest.mark.parametrize(
    ("past", "width", "reason"),
    [
        ([LENGTH, 0], 1, f"1 tokens after {LENGTH} do not fit into a cache of {LENGTH} positions"),
        ([5, LENGTH - 1], 2, f"2 tokens after {LENGTH - 1} do not fit into a cache of {LENGTH} positions"),
        ([0, 0], LENGTH + 1, f"{LENGTH + 1} tokens after 0 do not fit"),
        ([5, -1], 1, "do not fit into a cache"),
    ],
)
def test_a_text_that_does_not_fit(past: list[int], width: int, reason: str, build: str, bound: bool) -> None:
    made, tokens = decoder(build), tokens_of(2, 6)
    cache = made.cache(2, bound)
    cache.step(made.feeds(tokens[:, :5], [0, 0]))
    with pytest.raises(InputError, match=reason):
        cache.step(made.feeds(tokens_of(2, width), past))
    close(cache.step(made.feeds(tokens[:, 5:], [5, 5]))["logits"], made.whole(tokens)[:, 5:])


def wrong_feeds(made: Decoder, tokens: Tensor, what: str) -> dict[str, Tensor]:
    feeds = made.feeds(tokens, [5, 5])
    other = "past_lengths" if made.is_static else "attention_mask"
    if what == "a missing input":
        del feeds[other]
    elif what == "an unknown input":
        feeds["token_type_ids"] = tokens
    elif what == "another shape":
        feeds[other] = feeds[other][:1]
    elif what == "another dtype":
        feeds["input_ids"] = tokens.float()
    return feeds


WRONG = ("a missing input", "an unknown input", "another shape", "another dtype")


def check_wrong_feeds(what: str, build: str, bound: bool, singles: int) -> None:
    made, tokens = decoder(build), tokens_of(2, 7)
    cache = made.cache(2, bound)
    cache.step(made.feeds(tokens[:, :5], [0, 0]))
    for _ in range(singles):
        cache.step(made.feeds(tokens[:, 5:6], [5, 5]))
    with pytest.raises(InputError):
        cache.step(wrong_feeds(made, tokens[:, 5:6], what))
    if not singles:
        close(cache.step(made.feeds(tokens[:, 5:6], [5, 5]))["logits"], made.whole(tokens)[:, 5:6])


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "plain"])
@pytest.mark.parametrize("build", ["growing", "static"])
@pytest.mark.parametrize("what", WRONG)
def test_feeds_that_do_not_fit(what: str, build: str, bound: bool) -> None:
    check_wrong_feeds(what, build, bound, singles=0)


@pytest.mark.parametrize("what", WRONG)
def test_feeds_that_do_not_fit_a_binding_that_was_made(what: str) -> None:
    check_wrong_feeds(what, "static", bound=True, singles=1)


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "plain"])
@pytest.mark.parametrize("build", BUILDS)
def test_a_step_that_the_engine_fails_at(build: str, bound: bool) -> None:
    """A token that the vocabulary has not: onnxruntime says so, and the text can go on."""
    made, tokens = decoder(build), tokens_of(2, 6)
    cache = made.cache(2, bound)
    cache.step(made.feeds(tokens[:, :5], [0, 0]))
    with pytest.raises(Exception, match="out of"):
        cache.step(made.feeds(torch.full((2, 1), 1000), [5, 5]))
    close(cache.step(made.feeds(tokens[:, 5:], [5, 5]))["logits"], made.whole(tokens)[:, 5:])


def test_a_growing_text_that_is_longer_than_the_model() -> None:
    made = decoder("growing", "GPT2LMHeadModel", longest=12)
    cache = made.cache(1)
    cache.step(made.feeds(tokens_of(1, 12), [0]))
    with pytest.raises(InputError, match=r"past is 12, outside \[0, 11\]"):
        cache.step(made.feeds(tokens_of(1, 1), [12]))


@pytest.mark.xfail(strict=True, reason="past and sequence are bounded each on its own, not their sum")
def test_a_chunk_that_makes_a_growing_text_too_long() -> None:
    made = decoder("growing", "GPT2LMHeadModel", longest=12)
    cache = made.cache(1)
    cache.step(made.feeds(tokens_of(1, 11), [0]))
    with pytest.raises(InputError):
        cache.step(made.feeds(tokens_of(1, 2), [11]))


def test_an_engine_without_a_cache(tmp_path: Path) -> None:
    source = small_source(next(animal for animal in ANIMALS if animal.name == "LlamaForCausalLM"), "eager")
    engine = graphopt.compile(
        source, tmp_path / "engine", passes=[], target={"backend": "onnxruntime", "tactics": "fixed"}
    ).engine
    assert engine.layout is None
    with pytest.raises(EngineError, match="the engine has no cache"):
        engine.new_cache(1)


@pytest.mark.parametrize("build", BUILDS)
def test_no_rows(build: str) -> None:
    with pytest.raises(InputError, match=r"a batch of 0 is outside \[1, "):
        decoder(build).engine.new_cache(0)


# verify


@pytest.mark.parametrize("build", BUILDS)
def test_verify(build: str) -> None:
    made = decoder(build)
    stage = graphopt.verify(made.folder, made.source)
    assert stage.holds
    assert len(stage.probes) == 3
    assert all(output.compared for probe in stage.probes for output in probe.outputs.values())


@pytest.mark.parametrize("build", BUILDS)
def test_verify_of_last_logits(build: str) -> None:
    made = decoder(build, logits="last")
    assert graphopt.verify(made.folder, made.source).holds


def test_verify_finds_another_model() -> None:
    made = decoder("static")
    other = small_source(next(animal for animal in ANIMALS if animal.name == "LlamaForCausalLM"), "eager")
    with torch.no_grad():
        other.module.get_parameter("model.layers.1.self_attn.k_proj.weight").mul_(2)
    assert not graphopt.verify(made.folder, other).holds
