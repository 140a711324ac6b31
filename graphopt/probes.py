"""Probe inputs: what every stage is compared on. Several sizes, most of them not the traced one, with padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from graphopt.parity import Probe
from graphopt.tensors import DimRange, is_of_truths

#: Makes the inputs for given sizes, with a generator for whatever is random.
Sampler: TypeAlias = Callable[[dict[str, int], torch.Generator], dict[str, Tensor]]


def sampler_like(
    examples: Mapping[str, Tensor],
    axes: Mapping[str, tuple[str | None, ...]],
    vocabulary: Mapping[str, int] | None = None,
    mask: str | None = None,
    padding: Mapping[str, int] | None = None,
    left_padding: bool = True,
) -> Sampler:
    """Random inputs of the examples' kind: integers below ``vocabulary[name]`` or in the example's range, floats of the
    example's mean and deviation, masks (0/1 tensors with "mask" in their name) with ragged padding, on the left of every
    other row with ``left_padding``. Where ``mask`` is 0 an input has ``padding[name]``."""
    known = vocabulary or {}

    def sample(sizes: dict[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        made = {
            name: _sample(
                name, example, _shape(example, axes.get(name, ()), sizes), generator, known.get(name), left_padding
            )
            for name, example in examples.items()
        }
        if mask is not None:
            for name, filler in (padding or {}).items():
                other = (filler + 1) % known.get(name, filler + 2)
                real = made[name].masked_fill(made[name] == filler, other)  # a real token is no padding token
                made[name] = real.masked_fill(made[mask] == 0, filler)
        return made

    return sample


def _shape(example: Tensor, axes: tuple[str | None, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    names = axes or (None,) * example.ndim
    return tuple(sizes[name] if name else size for name, size in zip(names, example.shape, strict=True))


def _sample(
    name: str, example: Tensor, shape: tuple[int, ...], generator: torch.Generator, vocabulary: int | None,
    left_padding: bool,
) -> Tensor:  # fmt: skip
    if is_mask(name, example):
        return ragged_mask(shape, generator, left_padding).to(example.dtype)
    if example.is_floating_point():
        noise = torch.randn(shape, generator=generator)
        return (noise * example.float().std(correction=0) + example.float().mean()).to(example.dtype)
    if example.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    low = 0 if vocabulary else int(example.min())
    high = vocabulary or int(example.max()) + 1
    return torch.randint(low, high, shape, generator=generator).to(example.dtype)


def is_mask(name: str, example: Tensor) -> bool:
    """Whether an input is a padding mask: two axes, named a mask, nothing but zeros and ones. (Not torch's
    ``key_padding_mask``, which is True where there is padding.)"""
    return "mask" in name and "key_padding_mask" not in name and example.ndim == 2 and is_of_truths(example)


def ragged_mask(shape: tuple[int, ...], generator: torch.Generator, left: bool = True) -> Tensor:
    """``[batch, sequence]``: the first row full, every other row at least one position; even rows padded on the right,
    odd ones on the left, if ``left``."""
    batch, sequence = shape
    lengths = torch.randint(max(1, sequence // 2), sequence + 1, (batch,), generator=generator)
    lengths[0] = sequence
    positions = torch.arange(sequence)
    padded_right = positions < lengths[:, None]
    padded_left = positions >= sequence - lengths[:, None]
    return torch.where((torch.arange(batch) % 2 == left)[:, None], padded_left, padded_right) if left else padded_right


def make_probes(
    sample: Sampler, dims: Mapping[str, DimRange], traced: Mapping[str, int], mask: str | None, seed: int = 0
) -> list[Probe]:
    """Three probes: other sizes than the traced ones, the traced ones, and the smallest that ``dims`` allows."""
    generator = torch.Generator().manual_seed(seed)
    other = {name: _clamp(traced[name] + 1 + 2 * index, bounds) for index, (name, bounds) in enumerate(dims.items())}
    example = {name: _clamp(traced[name], bounds) for name, bounds in dims.items()}
    smallest = {name: bounds.min for name, bounds in dims.items()}
    probes: list[Probe] = []
    for sizes in (other, example, smallest):
        if any(probe.sizes == sizes for probe in probes):
            continue
        inputs = sample(sizes, generator)
        probes.append(Probe(sizes, inputs, inputs.get(mask) if mask else None))
    return probes


def _clamp(size: int, bounds: DimRange) -> int:
    size = max(size, bounds.min)
    return size if bounds.max is None else min(size, bounds.max)
