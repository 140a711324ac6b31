"""What the encoder of an encoder-decoder reads, and what it makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphopt.errors import InputError
from graphopt.runtime.engine import Engine

TOKENS, MASK = "input_ids", "attention_mask"


def batched(rows: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """One tensor of each input's rows: tokens padded behind, with the mask that says which are real; others as they are."""
    if TOKENS not in rows or MASK in rows:
        return {name: torch.nn.utils.rnn.pad_sequence(list(own), batch_first=True) for name, own in rows.items()}
    found = {name: torch.nn.utils.rnn.pad_sequence(list(own), batch_first=True) for name, own in rows.items()}
    real = [torch.ones_like(row) for row in rows[TOKENS]]
    return found | {MASK: torch.nn.utils.rnn.pad_sequence(real, batch_first=True)}


def read_source(engine: Engine, batch: int, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the encoder makes of a source, and what the decoder reads of it itself. InputError if it does not fit."""
    if engine.prologue is None:
        if source:
            raise InputError(f"the engine has no encoder that would read {', '.join(source)}")
        return {}
    wanted = set(engine.prologue.inputs)
    if missing := wanted - source.keys():
        raise InputError(f"the encoder needs {', '.join(sorted(missing))}")
    rows = next(iter(source.values())).shape[0]
    if rows != batch:
        raise InputError(f"the source has {rows} rows, the batch {batch}")
    made = engine.prologue(**{name: source[name] for name in engine.prologue.inputs})
    return {name: tensor for name, tensor in {**source, **made}.items() if name in engine.inputs}
