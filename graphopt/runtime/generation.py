"""Text from an engine with a cache: prompts of any lengths together, token by token.

generator = Generator.load("smollm2-engine")
for piece in generator.stream("The capital of France is"):
    print(piece.text, end="", flush=True)
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from graphopt.errors import EngineError, InputError
from graphopt.runtime.decoder import Decoder, longest_text, vocabulary_of
from graphopt.runtime.detokenize import TextStream
from graphopt.runtime.encoding import TOKENS, batched
from graphopt.runtime.engine import Engine
from graphopt.runtime.sampling import Sampler, Sampling

Prompt = str | Sequence[int]
Finish = Literal["end", "stop", "length", "cache"]


@dataclass(frozen=True)
class Piece:
    """One more token of a row. ``text``: what it makes certain of the row's text; ``finish``: why it is the last."""

    row: int
    token: int
    text: str
    finish: Finish | None = None


@dataclass
class Generation:
    """What was generated for one prompt. ``finish``: ``end`` (an end token, not among ``tokens``), ``stop`` (a stop string, not
    in ``text``), ``length`` (max_new_tokens), ``cache`` (the cache is full)."""

    tokens: list[int]
    text: str
    finish: Finish
    prompt_tokens: int


@dataclass
class Timing:
    """Seconds of the last call: the prompts at once, then the tokens after the first."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill if self.prefill else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after each row's first."""
        return self.new_tokens / self.decode if self.decode else 0.0


@dataclass
class _Row:
    tokens: list[int]
    prompt_tokens: int
    stream: TextStream | None
    new: list[int] = field(default_factory=list)
    finish: Finish | None = None


class Generator:
    """Generates with an engine and a tokenizer. Without a tokenizer prompts are tokens, and there is no text.

    The prompts of an encoder-decoder are what its encoder reads, and every text begins with ``start``; if the encoder reads
    something else, it is given as ``source``, and prompts are what the texts begin with.

    ``start``: the tokens that a decoder beside an encoder begins with, by default the one that the model's config says.
    ``end``: the tokens that end a text; by default those of the model's generation config, or the tokenizer's.
    ``prefill_chunk``: prompts are read so many tokens at a time, which bounds the memory that a long one takes."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any = None,
        *,
        start: Sequence[int] = (),
        end: Sequence[int] | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.layout = engine, tokenizer, engine.cache_layout
        if prefill_chunk is not None and prefill_chunk < 1:
            raise InputError(f"prefill_chunk is {prefill_chunk}, must be 1 or more")
        self.prefill_chunk, self.start = prefill_chunk, list(start)
        self.vocabulary = vocabulary_of(engine)
        self.end = frozenset(_end_of(tokenizer) if end is None else end)
        self.timing = Timing()
        if tokenizer is not None:
            _check_tokenizer(tokenizer, self.vocabulary)

    @classmethod
    def load(cls, folder: str | Path, *, prefill_chunk: int | None = None, **options: Any) -> Generator:
        """The generator of an engine directory, with the tokenizer that lies in it. ``options`` are the backend's."""
        from graphopt import artifact

        engine = artifact.load(folder, **options)
        tokenizer = load_tokenizer(Path(folder))
        start, end = (configured(Path(folder), key) for key in ("decoder_start_token_id", "eos_token_id"))
        return cls(engine, tokenizer, start=start or (), end=end, prefill_chunk=prefill_chunk)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        source: Mapping[str, Tensor] | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """A generation for each prompt. ``sampling``: the fields of :class:`Sampling`; none is greedy. ``source``: what an
        encoder reads that reads no text, by the names of its inputs, a row for each prompt.

        InputError for a prompt that is empty or longer than the cache, a batch that the engine was not built for, or a bad
        option; the generator stays usable."""
        rows, sampler, read = self._begin(prompts, max_new_tokens, stop, source, sampling)
        for _ in self._run(rows, sampler, max_new_tokens, read):
            pass
        return [
            Generation(row.new, row.stream.text if row.stream else "", row.finish or "length", row.prompt_tokens)
            for row in rows
        ]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        source: Mapping[str, Tensor] | None = None,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """The same, token by token as they come."""
        rows, sampler, read = self._begin(prompts, max_new_tokens, stop, source, sampling)
        return self._run(rows, sampler, max_new_tokens, read)

    def _begin(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int,
        stop: str | Sequence[str],
        source: Mapping[str, Tensor] | None,
        sampling: dict[str, Any],
    ) -> tuple[list[_Row], Sampler, Mapping[str, Tensor] | None]:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, must be 1 or more")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer", hint="give the Generator one, or end=[...] with tokens")
        if "" in stops:
            raise InputError("a stop string is empty")
        try:
            sampler = Sampler(Sampling(**sampling))
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
                hint=f"options: {', '.join(Sampling.model_fields)}",
            ) from error
        texts = [self._tokens(prompt, index) for index, prompt in enumerate(_several(prompts))]
        lengths = [len(text) for text in texts]
        if self.engine.prologue is not None and source is None:
            source, texts = self._read_by_encoder(texts)
        for index, text in enumerate(texts):
            self._check_fits(text, index)
        streams = [None if self.tokenizer is None else TextStream(self.tokenizer, stops) for _ in texts]
        return [_Row(*each) for each in zip(texts, lengths, streams, strict=True)], sampler, source

    def _read_by_encoder(self, texts: list[list[int]]) -> tuple[dict[str, Tensor], list[list[int]]]:
        """The prompts for the encoder, and what the decoder's texts begin with."""
        assert self.engine.prologue is not None
        if TOKENS not in self.engine.prologue.inputs:
            wanted = ", ".join(self.engine.prologue.inputs)
            raise InputError(f"the encoder reads {wanted}, no text", hint="give that as source={...}")
        if not self.start:
            raise InputError("nothing says what the decoder begins with", hint="give the Generator start=[...]")
        return batched({TOKENS: [torch.tensor(text) for text in texts]}), [list(self.start) for _ in texts]

    def _tokens(self, prompt: Prompt, index: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("a text needs a tokenizer", hint="give tokens, or the Generator a tokenizer")
            tokens = [int(token) for token in self.tokenizer(prompt)["input_ids"]]
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            raise InputError(f"prompt {index} is empty")
        odd = next((token for token in tokens if not 0 <= token < self.vocabulary), None)
        if odd is not None:
            raise InputError(f"prompt {index} has the token {odd}, the model has tokens 0 to {self.vocabulary - 1}")
        return tokens

    def _check_fits(self, tokens: list[int], index: int) -> None:
        longest = longest_text(self.engine)
        if longest is not None and len(tokens) > longest:
            raise InputError(
                f"prompt {index} has {len(tokens)} tokens, the cache holds {longest}",
                hint="compile with a longer max_length, or give a shorter prompt",
            )

    def _run(
        self, rows: list[_Row], sampler: Sampler, max_new_tokens: int, source: Mapping[str, Tensor] | None
    ) -> Iterator[Piece]:
        self.timing = Timing(prompt_tokens=sum(row.prompt_tokens for row in rows))
        clock = time.perf_counter()
        decoder = Decoder(self.engine, len(rows), source)
        logits = decoder.feed([row.tokens for row in rows], chunk=self.prefill_chunk)
        self.timing.prefill = time.perf_counter() - clock
        while True:
            chosen = sampler.choose(logits, [row.tokens for row in rows])
            for index, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                if row.finish is None:
                    yield self._take(index, row, token, max_new_tokens)
            if all(row.finish for row in rows):
                return
            clock = time.perf_counter()
            logits = decoder.feed([[] if row.finish and self._rows_may_wait else row.tokens[-1:] for row in rows])
            self.timing.decode += time.perf_counter() - clock
            self.timing.new_tokens += sum(row.finish is None for row in rows)

    @property
    def _rows_may_wait(self) -> bool:
        """Whether rows that are through may read nothing; where neither places nor a mask tell them apart they read on."""
        return self.layout.max_length is not None or self.layout.mask is not None

    def _take(self, index: int, row: _Row, token: int, max_new_tokens: int) -> Piece:
        """Add a token to its row, and see whether it is the last."""
        text = ""
        if token in self.end:
            row.finish = "end"
        else:
            row.tokens.append(token)
            row.new.append(token)
            text = row.stream.push(token) if row.stream else ""
            longest = longest_text(self.engine)
            if row.stream and row.stream.stopped:
                row.finish = "stop"
            elif len(row.new) >= max_new_tokens:
                row.finish = "length"
            elif longest is not None and len(row.tokens) > longest:
                row.finish = "cache"
        if row.finish and row.stream and not row.stream.stopped:
            text += row.stream.finish()
        return Piece(index, token, text, row.finish)


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    several: list[Any] = list(prompts)
    if not several:
        raise InputError("there is no prompt")
    return [several] if all(isinstance(prompt, int) for prompt in several) else several


def _end_of(tokenizer: Any) -> list[int]:
    end = getattr(tokenizer, "eos_token_id", None)
    return [] if end is None else _listed(end)


def _listed(end: int | Sequence[int]) -> list[int]:
    return [end] if isinstance(end, int) else list(end)


def _check_tokenizer(tokenizer: Any, vocabulary: int) -> None:
    """A tokenizer may know fewer tokens than the model has rows for, never more."""
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}: it belongs to another model",
            hint="use the tokenizer that lies in the engine directory",
        )


def chat_prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens of one message of a user, in the model's chat template. InputError if the model has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template", hint="give the prompt as the model was trained on it")
    message = [{"role": "user", "content": text}]
    made = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
    return [int(token) for token in made]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of an engine directory. EngineError if there is none or it cannot be read."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise EngineError(
            "there is no tokenizer", where=str(folder), hint="compile from a model directory that has one"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise EngineError(f"the tokenizer cannot be read: {first[0]}", where=str(folder)) from error


def configured(folder: Path, key: str) -> list[int] | None:
    """The tokens that the model's generation config, or else its config, names so; None if neither does."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            tokens = json.loads((folder / name).read_text(encoding="utf-8")).get(key)
            if tokens is not None:
                return _listed(tokens)
    return None
