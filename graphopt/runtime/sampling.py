"""Choosing the next token from logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor

from graphopt.schemas.common import Schema

Share = Annotated[float, Field(gt=0, le=1)]


class Sampling(Schema):
    """How the next token is chosen. ``temperature`` 0 takes the most likely one.

    ``top_k``: of the k most likely only (0: all); ``top_p``: of the fewest whose probabilities sum up to p (arXiv:1904.09751);
    ``min_p``: of those at least p times as likely as the first (arXiv:2407.01082); ``repetition_penalty``: divides the logits
    of tokens that the text has (arXiv:1909.05858); ``seed``: draws the same again."""

    temperature: NonNegativeFloat = 0.0
    top_k: NonNegativeInt = 0
    top_p: Share = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: PositiveFloat = 1.0
    seed: int | None = None


class Sampler:
    """Draws tokens by one ``Sampling``, row by row, with transformers' own logits processors."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: Tensor, texts: Sequence[Sequence[int]]) -> list[int]:
        """A token for each row of ``logits`` ``[batch, vocabulary]``; ``texts`` are the rows' tokens so far."""
        if not self._processors and logits.device.type != "cpu":
            chosen: list[int] = logits.argmax(-1).tolist()
            return chosen
        if not self._processors:
            # not torch's argmax, whose threads would spin on beside the engine's: see graphopt.runtime.decoder.kept
            return [int(token) for token in logits.float().numpy().argmax(-1)]
        scores = torch.cat(
            [
                self._processed(torch.tensor([list(text)]), row[None].float())
                for text, row in zip(texts, logits.cpu(), strict=True)
            ]
        )
        if self.sampling.temperature == 0:
            return [int(token) for token in scores.argmax(-1)]
        drawn = torch.multinomial(torch.softmax(scores, -1), 1, generator=self._generator)
        return [int(token) for token in drawn[:, 0]]

    def _processed(self, text: Tensor, scores: Tensor) -> Tensor:
        for processor in self._processors:
            scores = processor(text, scores)
        return scores

    @functools.cached_property
    def _processors(self) -> list[Any]:
        wanted = self.sampling
        if wanted.temperature == 0 and wanted.repetition_penalty == 1:
            return []
        from transformers.generation import logits_process as made

        found: list[Any] = []
        if wanted.repetition_penalty != 1:
            found.append(made.RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty))
        if wanted.temperature == 0:
            return found
        found.append(made.TemperatureLogitsWarper(float(wanted.temperature)))
        if wanted.top_k:
            found.append(made.TopKLogitsWarper(wanted.top_k))
        if wanted.top_p < 1:
            found.append(made.TopPLogitsWarper(wanted.top_p))
        if wanted.min_p > 0:
            found.append(made.MinPLogitsWarper(wanted.min_p))
        return found
