"""Texts that grow: tokens in, the logits of each row's next token out, whatever the cache's layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.dims import Size
from graphopt.errors import EngineError, InputError
from graphopt.runtime.cache import NEW_LENGTHS, PAST_LENGTHS
from graphopt.runtime.engine import Engine

TOKENS, LOGITS = "input_ids", "logits"


class Decoder:
    """A batch of texts on an engine with a cache. ``lengths`` i64 ``[batch]``: how many tokens each has read.

    Rows may be of different lengths: a static cache holds each from its first position on; in a growing one they end at the
    same column, and the padding mask says where each begins."""

    def __init__(self, engine: Engine, batch: int) -> None:
        self.cache = engine.new_cache(batch)
        self.layout = self.cache.layout
        others = [name for name in self.layout.tokens if name != TOKENS]
        if TOKENS not in self.layout.tokens or others or LOGITS not in self.layout.results:
            raise EngineError(
                f"the engine has {', '.join([*self.layout.tokens, *self.layout.results])}: "
                f"what decodes takes {TOKENS} and gives {LOGITS}"
            )
        self.vocabulary = _number(engine.outputs[LOGITS].shape[-1])
        self.longest = longest_text(engine)
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self._mask = torch.zeros(batch, 0, dtype=torch.int64)

    def feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Let each row read its tokens; the logits after the last of them, ``[batch, vocabulary]``.

        A row without tokens stays as it is, and its logits mean nothing. InputError if the cache cannot take them."""
        counts = torch.tensor([len(row) for row in rows])
        width = int(counts.max())
        if self.longest is not None and int((self.lengths + counts).max()) > self.longest:
            row = int((self.lengths + counts).argmax())
            raise InputError(
                f"row {row} would have {int(self.lengths[row] + counts[row])} tokens, the cache holds {self.longest}",
                hint="compile with a longer max_length, or give a shorter text",
            )
        logits = self._static(rows, counts, width) if self.layout.max_length else self._growing(rows, counts, width)
        self.lengths = self.lengths + counts
        return logits

    def _static(self, rows: Sequence[Sequence[int]], counts: Tensor, width: int) -> Tensor:
        assert self.layout.max_length is not None
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, own in enumerate(rows):
            tokens[row, : len(own)] = torch.tensor(own, dtype=torch.int64)
        # What a row without new tokens writes is never read; it must only fall inside the buffer.
        starts = torch.where(counts > 0, self.lengths, self.lengths.clamp(max=self.layout.max_length - width))
        feeds = {TOKENS: tokens, PAST_LENGTHS: starts}
        last = (counts - 1).clamp(min=0)
        if NEW_LENGTHS in self.layout.inputs:
            feeds[NEW_LENGTHS] = last + 1
        logits = self.cache.step(feeds)[LOGITS]
        return logits[:, 0] if self.layout.is_last(LOGITS) else logits[torch.arange(len(rows)), last.to(logits.device)]

    def _growing(self, rows: Sequence[Sequence[int]], counts: Tensor, width: int) -> Tensor:
        ragged = bool((counts != width).any())
        if self.layout.mask is None and ragged:
            raise InputError("the model has no padding mask: rows must be of one length", hint="use layout: static")
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        new = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, own in enumerate(rows):
            tokens[row, width - len(own) :] = torch.tensor(own, dtype=torch.int64)
            new[row, width - len(own) :] = 1
        mask = torch.cat([self._mask, new], 1)
        feeds = {TOKENS: tokens}
        if self.layout.mask is not None:
            feeds[self.layout.mask] = mask.to(self.layout.inputs[self.layout.mask].dtype)
        logits = self.cache.step(feeds)[LOGITS]
        self._mask = mask
        return logits[:, -1]

    def select(self, rows: Tensor) -> None:
        """Let the texts be these rows of themselves."""
        self.cache.select(rows)
        self.lengths, self._mask = self.lengths[rows], self._mask[rows]


def _number(size: Size) -> int:
    assert isinstance(size, int)
    return size


def longest_text(engine: Engine) -> int | None:
    """How many tokens a text may have; None where nothing bounds it."""
    layout = engine.layout
    if layout is None:
        return None
    if layout.max_length is not None:
        return layout.max_length
    return engine.dims[layout.sequence].max
