"""Texts that grow: tokens in, the logits of each row's next token out, whatever the cache's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphopt.errors import EngineError, InputError
from graphopt.runtime.cache import LOGITS, NEW_LENGTHS, PAST_LENGTHS
from graphopt.runtime.encoding import read_source
from graphopt.runtime.engine import Engine


class Decoder:
    """A batch of texts on an engine with a cache. ``lengths`` i64 ``[batch]``: how many tokens each has read.

    Rows may be of different lengths: a static cache holds each from its first position on; in a growing one they end at the
    same column, and the padding mask says where each begins. ``source``: what the encoder of an encoder-decoder reads, by
    the names of its inputs (``input_ids`` and ``attention_mask``, or ``input_features``); it is run once, here."""

    def __init__(self, engine: Engine, batch: int, source: Mapping[str, Tensor] | None = None) -> None:
        self.cache = engine.new_cache(batch, read_source(engine, batch, source or {}))
        self.layout = self.cache.layout
        if len(self.layout.tokens) != 1 or LOGITS not in self.layout.results:
            raise EngineError(
                f"the engine takes {', '.join(self.layout.tokens)} and gives {', '.join(self.layout.results)}: "
                f"what decodes takes one tensor of tokens and gives {LOGITS}"
            )
        self.tokens = self.layout.tokens[0]
        self.vocabulary = vocabulary_of(engine)
        self.longest = longest_text(engine)
        # Numbers, not a tensor: a step of one token has no time for dozens of small torch ops.
        self._lengths = [0] * batch
        self._mask = torch.zeros(batch, 0, dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """A copy, i64 ``[batch]``."""
        return torch.tensor(self._lengths, dtype=torch.int64)

    @lengths.setter
    def lengths(self, lengths: Tensor) -> None:
        self._lengths = lengths.tolist()

    def feed(self, rows: Sequence[Sequence[int]], chunk: int | None = None) -> Tensor:
        """Let each row read its tokens; the logits after the last of them, ``[batch, vocabulary]``. ``chunk``: so many at a
        time, which bounds the memory that a long prompt takes.

        A row without tokens stays as it is, and its logits mean nothing. InputError if the cache cannot take them."""
        counts = [len(row) for row in rows]
        width = max(counts)
        if not width:
            raise InputError("no row has a token")
        odd = next((token for row in rows for token in row if not 0 <= token < self.vocabulary), None)
        if odd is not None:
            raise InputError(f"there is a token {odd}, the model has tokens 0 to {self.vocabulary - 1}")
        lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        if self.longest is not None and max(lengths) > self.longest:
            raise InputError(
                f"row {lengths.index(max(lengths))} would have {max(lengths)} tokens, the cache holds {self.longest}",
                hint="compile with a longer max_length, or give a shorter text",
            )
        widest = min(self._widest(counts, width), chunk or width)
        if width > widest:
            return self._in_parts(rows, widest)
        logits = self._static(rows, counts, width) if self.layout.max_length else self._growing(rows, counts, width)
        self._lengths = lengths
        return logits

    def _widest(self, counts: Sequence[int], width: int) -> int:
        """How many columns one step may have: padding behind a row's tokens must fall into the buffer and on no other token."""
        if self.layout.max_length is None:
            return width
        room = [self.layout.max_length - own for own, new in zip(self._lengths, counts, strict=True) if new < width]
        limits = [max(min(room, default=width), 1), *([self.layout.window] if self.layout.window else [])]
        return min(width, *limits)

    def _in_parts(self, rows: Sequence[Sequence[int]], width: int) -> Tensor:
        """Several steps, each row's logits from the one that reads its last token."""
        found: Tensor | None = None
        for start in range(0, max(len(row) for row in rows), width):
            parts = [row[start : start + width] for row in rows]
            logits = self.feed(parts)
            if found is None:
                found = logits.clone()
            has = torch.tensor([bool(part) for part in parts], device=logits.device)
            found[has] = logits[has]
        assert found is not None
        return found

    def _static(self, rows: Sequence[Sequence[int]], counts: Sequence[int], width: int) -> Tensor:
        room = self.layout.max_length
        assert room is not None
        tokens = [[*map(int, row), *[0] * (width - len(row))] for row in rows]
        # What a row without new tokens writes is never read; it must only fall inside the buffer.
        starts = [own if new else min(own, room - width) for own, new in zip(self._lengths, counts, strict=True)]
        feeds = {self.tokens: torch.tensor(tokens), PAST_LENGTHS: torch.tensor(starts)}
        read = torch.tensor([max(count, 1) for count in counts])
        if NEW_LENGTHS in self.layout.inputs:
            feeds[NEW_LENGTHS] = read
        logits = self.cache.step(feeds)[LOGITS]
        if self.layout.is_last(LOGITS):
            return kept(logits[:, 0])  # the next step writes into the same tensor
        return logits[torch.arange(len(rows)), (read - 1).to(logits.device)]

    def _growing(self, rows: Sequence[Sequence[int]], counts: Sequence[int], width: int) -> Tensor:
        ragged = min(counts) != width
        if self.layout.mask is None and ragged:
            raise InputError("the model has no padding mask: rows must be of one length", hint="use layout: static")
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        new = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, own in enumerate(rows):
            tokens[row, width - len(own) :] = torch.tensor(own, dtype=torch.int64)
            new[row, width - len(own) :] = 1
        mask = torch.cat([self._mask, new], 1)
        feeds = {self.tokens: tokens}
        if self.layout.mask is not None:
            feeds[self.layout.mask] = mask.to(self.layout.inputs[self.layout.mask].dtype)
        logits = self.cache.step(feeds)[LOGITS]
        self._mask = mask
        return logits[:, -1]

    def select(self, rows: Tensor) -> None:
        """Let the texts be these rows of themselves."""
        self.cache.select(rows)
        self.lengths, self._mask = self.lengths[rows], self._mask[rows]


def kept(tensor: Tensor) -> Tensor:
    """A copy. Not by torch on the CPU: its threads would spin on after it, beside those of the engine's next step, which
    cost a third of a step on two cores."""
    is_plain = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float16)
    return torch.from_numpy(tensor.numpy().copy()) if is_plain else tensor.clone()


def vocabulary_of(engine: Engine) -> int:
    """How many tokens the engine's logits are of. EngineError if it has none."""
    size = engine.outputs[LOGITS].shape[-1] if LOGITS in engine.outputs else None
    if not isinstance(size, int):
        raise EngineError(f"the engine gives {', '.join(engine.outputs)}, no {LOGITS} of a fixed vocabulary")
    return size


def longest_text(engine: Engine) -> int | None:
    """How many tokens a text may have; None where nothing bounds it."""
    layout = engine.layout
    if layout is None:
        return None
    if layout.max_length is not None:
        return layout.max_length
    return engine.dims[layout.sequence].max
