"""The cache of one batch of texts, kept between an engine's steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.errors import InputError
from graphopt.runtime.cache import PAST_EVICTED, PAST_LENGTHS, CacheLayout, make_room, new_tokens

if TYPE_CHECKING:
    from graphopt.runtime.engine import Engine


class KvCache:
    """What the rows of a batch have read so far. ``tensors`` by the names of the engine's inputs; ``once`` are what the
    engine's prologue gave for the batch, the same in every step.

    This one hands every step's outputs to the next one; a backend that can write in place has its own."""

    device = torch.device("cpu")
    tensors: dict[str, Tensor]

    def __init__(self, engine: Engine, layout: CacheLayout, batch: int, once: Mapping[str, Tensor]) -> None:
        self.engine, self.layout, self.batch = engine, layout, batch
        self.hold(self._fresh())
        self.once = dict(once)
        self.evicted = torch.zeros(batch, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache as it is."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def step(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One call of the engine with everything but the cache; its results but the cache.

        InputError if the feeds do not fit the cache."""
        self.check(feeds)
        return self._step(self.with_room(feeds))

    def _step(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        results = self.engine(**feeds, **self.once, **self.tensors)
        self.tensors = {past: results[present] for past, present in self.layout.names.items()}
        return {name: results[name] for name in self.layout.results}

    def _fresh(self) -> dict[str, Tensor]:
        return self.layout.empty(self.batch, self.device)

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Let these be the cache."""
        self.tensors = dict(tensors)

    def call_once(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The engine called with a static cache that is given, and given back: engines that write in place need it bound as
        past and present. Results on the CPU."""
        self.hold({name: tensors[name].to(self.device, copy=True).contiguous() for name in self.layout.names})
        results = self._step({name: tensor for name, tensor in tensors.items() if name not in self.layout.names})
        presents = {present: self.tensors[past] for past, present in self.layout.names.items()}
        return {name: tensor.cpu() for name, tensor in {**results, **presents}.items()}

    def with_room(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The feeds, after buffers of windows have room for their tokens."""
        if self.layout.window is None:
            return feeds
        self.evicted = make_room(self.layout, self.tensors, feeds, self.evicted)
        return {**feeds, PAST_EVICTED: self.evicted}

    def check(self, feeds: Mapping[str, Tensor]) -> None:
        for name in self.layout.tokens:
            if feeds[name].shape[0] != self.batch:
                raise InputError(f"{name} has {feeds[name].shape[0]} rows, the cache {self.batch}")
        if self.layout.max_length is None:
            return
        if PAST_LENGTHS not in feeds:
            raise InputError(
                f"missing input: {PAST_LENGTHS}", hint="how many positions each row has filled, i64 [batch]"
            )
        new = new_tokens(self.layout, feeds)
        if self.layout.window is not None and new > self.layout.window:
            raise InputError(f"{new} tokens at once, the windows take {self.layout.window}", hint="give them in parts")
        filled = feeds[PAST_LENGTHS].flatten().tolist()
        longest = max(filled) + new
        if longest > self.layout.max_length or min(filled) < 0:
            raise InputError(
                f"{new} tokens after {longest - new} do not fit into a cache of {self.layout.max_length} positions",
                hint="compile with a longer max_length, or give a shorter text",
            )

    def select(self, rows: Tensor) -> None:
        """Let the batch be these rows of itself (numbers, or a mask): for beam search, or to leave texts that have ended."""
        rows = torch.arange(self.batch)[rows.cpu()]
        self.hold({name: tensor[rows.to(tensor.device)].contiguous() for name, tensor in self.tensors.items()})
        self.once = {name: tensor[rows.to(tensor.device)].contiguous() for name, tensor in self.once.items()}
        self.evicted = self.evicted[rows]
        self.batch = len(rows)
