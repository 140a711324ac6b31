"""Whether an engine with a cache generates what eager does: greedy tokens, and the logits on the way.

parity = decode_parity(model, graphopt.load("engine"), [[5, 6, 7], [8]], steps=128)
assert parity.holds, parity.rows
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from graphopt import artifact
from graphopt.dims import Dim
from graphopt.eager import eager
from graphopt.errors import InputError, ParityError
from graphopt.runtime.cache import LOGITS
from graphopt.runtime.decoder import Decoder, kept, longest_text
from graphopt.runtime.encoding import batched
from graphopt.runtime.engine import Engine
from graphopt.schemas.report import DecodeDifference, DecodeParity, DecodeRow
from graphopt.sources import Source

SAMPLE_LENGTHS = 5, 17, 1, 33  # of prompts whose tokens are random


def decode_parity(
    model: nn.Module,
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    source: Mapping[str, Sequence[Tensor]] | None = None,
    steps: int = 128,
    chunk: int | None = None,
) -> DecodeParity:
    """Let ``engine`` generate ``steps`` tokens greedily for all prompts as one batch, and ask eager, each row alone, without
    padding and without a cache, which token it would have taken after the same text, and with which logits.

    If all are the same, eager's own greedy tokens are those of the engine. ``source``: what the encoder of an
    encoder-decoder reads, for each input a tensor a row, without the batch's axis; ``prompts`` are then what the decoder
    begins with. ``chunk``: prompts are read so many tokens at a time. InputError for what the cache cannot hold."""
    if steps < 1:
        raise InputError(f"steps is {steps}, must be 1 or more")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}, must be 1 or more")
    if empty := [index for index, prompt in enumerate(prompts) if not prompt]:
        raise InputError(f"prompt {empty[0]} is empty")
    texts = [list(prompt) for prompt in prompts]
    decoder = Decoder(engine, len(texts), batched(source or {}))
    found: list[Tensor] = []
    unread = [list(text) for text in texts]
    for _ in range(steps):
        found.append(kept(decoder.feed(unread, chunk)).cpu())
        unread = [[int(token)] for token in found[-1].argmax(-1)]
        for text, new in zip(texts, unread, strict=True):
            text += new
    rows, drifts, scale = [], torch.zeros(steps), 0.0
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        own = {name: tensors[index][None] for name, tensors in (source or {}).items()}
        expected = _eager_logits(model, {**own, decoder.tokens: torch.tensor([text[:-1]])}, steps)
        got = torch.stack([step[index] for step in found]).float()
        if got.shape != expected.shape:
            sizes = f"{got.shape[-1]} tokens, the model's {expected.shape[-1]}"
            raise ParityError(f"the engine's logits are of {sizes}", hint=_ANOTHER)
        rows.append(_compare(len(prompt), expected, text[len(prompt) :]))
        drifts = torch.maximum(drifts, (got - expected).abs().amax(-1))
        scale = max(scale, float(expected.abs().max()))
    return DecodeParity(rows=rows, drift=drifts.tolist(), scale=scale)


_ANOTHER = "is it the model the engine was made of?"


def _eager_logits(model: nn.Module, inputs: Mapping[str, Tensor], steps: int) -> Tensor:
    """``[steps, vocabulary]``: what eager says after the prompt and after each token but the last."""
    outputs = eager(model)(**inputs)
    if LOGITS not in outputs:
        raise ParityError(f"the model gives {', '.join(outputs)}, no {LOGITS}", hint=_ANOTHER)
    return outputs[LOGITS][0, -steps:].float()


def _compare(prompt_tokens: int, expected: Tensor, tokens: Sequence[int]) -> DecodeRow:
    wanted = expected.argmax(-1)
    chosen = torch.tensor(tokens)
    places = (wanted != chosen).nonzero().flatten().tolist()
    first = None
    if places:
        step = places[0]
        margin = float(expected[step, wanted[step]] - expected[step, chosen[step]])
        first = DecodeDifference(step=step, eager=int(wanted[step]), engine=int(chosen[step]), margin=margin)
    return DecodeRow(
        prompt_tokens=prompt_tokens, tokens=len(tokens), equal=len(tokens) - len(places), first_difference=first
    )


def sample_prompts(
    source: Source, engine: Engine, lengths: Sequence[int]
) -> tuple[list[list[int]], dict[str, list[Tensor]]]:
    """Prompts of these lengths, tokens at random, and nothing that an encoder reads; for an encoder-decoder single tokens to
    begin with, and texts of these lengths, or features, for the encoder."""
    generator = torch.Generator().manual_seed(3)
    layout = engine.cache_layout

    def tokens(name: str, counts: Iterable[int]) -> list[Tensor]:
        return [torch.randint(3, source.vocabulary[name], (count,), generator=generator) for count in counts]

    reads: dict[str, list[Tensor]] = {}
    for name in engine.prologue.inputs if engine.prologue else ():
        example = source.tensors[name]
        if name in source.vocabulary:
            reads[name] = tokens(name, lengths)
        elif name != source.mask:
            reads[name] = list(torch.randn((len(lengths), *example.shape[1:]), generator=generator))
    counts = [1 for _ in lengths] if engine.prologue else lengths
    return [text.tolist() for text in tokens(layout.tokens[0], counts)], reads


def _limits(engine: Engine, room: int | None) -> list[int]:
    """How many tokens a prompt may have: in the cache, or for an encoder."""
    ranges = engine.prologue.dims.values() if engine.prologue else []
    return [
        size for size in (max(SAMPLE_LENGTHS), room if not engine.prologue else None, *(r.max for r in ranges)) if size
    ]


def verify_decoding(
    folder: str | Path, model: str | Source | nn.Module, prompts: Sequence[str] = (), steps: int = 128
) -> DecodeParity:
    """Let an engine directory generate beside a model again: texts through the directory's tokenizer, or random tokens."""
    from graphopt.compiler import source_of
    from graphopt.runtime.generation import load_tokenizer

    engine, source = artifact.load(folder), source_of(model)
    room = longest_text(engine)
    if room is not None and room <= steps:
        raise InputError(f"{steps} tokens do not fit into the cache of {room}", hint="ask for fewer")
    lengths = [min(length, *_limits(engine, None if room is None else room - steps)) for length in SAMPLE_LENGTHS]
    rows = next(iter(engine.inputs.values())).shape[0]
    batch = engine.dims[str(rows)].max if isinstance(rows, Dim) else rows
    lengths = lengths if batch is None else (lengths * batch)[: max(1, min(batch, len(lengths)))]
    texts, reads = sample_prompts(source, engine, lengths)
    if prompts:
        if engine.prologue is not None:
            raise InputError("texts are for models without an encoder", hint="leave prompts out")
        tokenizer = load_tokenizer(Path(folder))
        texts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return decode_parity(source.module, engine, texts, source=reads, steps=steps)
