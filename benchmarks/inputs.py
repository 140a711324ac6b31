"""Inputs with real padding: token ids, ragged masks, and the largest difference at the positions that mean something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]


def ragged_lengths(batch: int, length: int, shortest: float = 0.3) -> list[int]:
    """The first row full, the others evenly down to ``shortest`` of it; a batch of one has a tail of 30% padding."""
    if batch == 1:
        return [max(1, round(0.7 * length))]
    steps = (1 - row * (1 - shortest) / (batch - 1) for row in range(batch))
    return [max(1, round(step * length)) for step in steps]


def padded(
    tokens: Sequence[int], lengths: Sequence[int], width: int, side: Side = "right", pad: int = 0
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``[len(lengths), width]``: each row takes its own stretch of ``tokens``,
    from the start again where they end."""
    ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros_like(ids)
    start = 0
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, where] = torch.tensor([tokens[(start + offset) % len(tokens)] for offset in range(length)])
        mask[row, where] = 1
        start += length
    return {"input_ids": ids, "attention_mask": mask}


def padding_share(mask: Tensor) -> float:
    return 1 - float(mask.float().mean())


def as_numpy(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def max_difference(expected: Tensor, got: Tensor, mask: Tensor) -> float:
    """Largest absolute difference at the positions where the mask is 1."""
    kept = mask.bool()
    return float((expected[kept] - got[kept]).abs().max())


def equal_choices(expected: Tensor, got: Tensor, mask: Tensor) -> float:
    """Share of the positions where the mask is 1 whose largest logit is the same."""
    kept = mask.bool()
    return float((expected[kept].argmax(-1) == got[kept].argmax(-1)).float().mean())
