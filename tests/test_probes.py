"""Padding in probe inputs: ragged masks on either side, and what stands where the mask is 0. Sizes: ``test_parity.py``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.probes import make_probes, ragged_mask, sampler_like
from graphopt.tensors import DimRange

SIZES = {"batch": 16, "sequence": 9}
TOKENS = ("batch", "sequence")
IDS = torch.arange(12).reshape(2, 6)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Masks


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("shape", [(16, 9), (1, 1), (5, 1), (3, 2), (1, 7)])
def test_every_row_of_a_mask_keeps_one_run_of_at_least_half(shape: tuple[int, int], left: bool) -> None:
    for seed in range(10):
        mask = ragged_mask(shape, random(seed), left)
        assert (tuple(mask.shape), mask.dtype) == (shape, torch.bool)
        assert bool((mask.sum(1) >= max(1, shape[1] // 2)).all())
        assert bool((mask.int().diff(dim=1).abs().sum(1) <= 1).all())
        assert bool(mask[0].all())


def test_odd_rows_are_padded_on_the_left() -> None:
    masks = torch.cat([ragged_mask((16, 9), random(seed)) for seed in range(4)])
    even, odd = masks[0::2], masks[1::2]
    assert bool(even[:, 0].all())
    assert bool(odd[:, -1].all())
    assert not bool(even[:, -1].all())
    assert not bool(odd[:, 0].all())


def test_no_row_is_padded_on_the_left_where_a_model_does_not_take_it() -> None:
    masks = torch.cat([ragged_mask((16, 9), random(seed), left=False) for seed in range(4)])
    assert bool(masks[:, 0].all())
    assert not bool(masks[1::2, -1].all())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_a_mask_keeps_its_dtype(dtype: torch.dtype) -> None:
    sample = sampler_like({"mask": torch.ones(2, 6, dtype=dtype)}, {"mask": TOKENS})
    mask = sample(SIZES, random())["mask"]
    assert mask.dtype == dtype
    assert set(mask.int().flatten().tolist()) == {0, 1}


# Padding


def padded(filler: int, vocabulary: int | None = 12, left: bool = True) -> dict[str, Tensor]:
    sample = sampler_like(
        {"ids": IDS, "types": IDS % 2, "mask": torch.ones_like(IDS)}, dict.fromkeys(("ids", "types", "mask"), TOKENS),
        {"ids": vocabulary} if vocabulary else {}, "mask", {"ids": filler}, left,
    )  # fmt: skip
    return sample(SIZES, random())


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("filler", [0, 5, 11])
def test_the_filler_stands_at_padding_and_nowhere_else(filler: int, left: bool) -> None:
    inputs = padded(filler, left=left)
    assert torch.equal(inputs["ids"] == filler, inputs["mask"] == 0)
    assert bool((inputs["mask"] == 0).any())
    assert 0 <= int(inputs["ids"].min()) <= int(inputs["ids"].max()) < 12


def test_a_filler_of_an_input_without_a_vocabulary() -> None:
    inputs = padded(3, vocabulary=None)
    assert torch.equal(inputs["ids"] == 3, inputs["mask"] == 0)


def test_other_inputs_are_not_padded() -> None:
    inputs = padded(5)
    assert set(inputs["types"][inputs["mask"] == 0].tolist()) == {0, 1}


def test_without_a_filler_padding_is_random() -> None:
    sample = sampler_like(
        {"ids": IDS, "mask": torch.ones_like(IDS)}, {"ids": TOKENS, "mask": TOKENS}, {"ids": 12}, "mask"
    )
    inputs = sample(SIZES, random())
    assert len(set(inputs["ids"][inputs["mask"] == 0].tolist())) > 1


def test_every_probe_is_padded() -> None:
    examples = {"ids": IDS, "mask": torch.ones_like(IDS)}
    sample = sampler_like(examples, dict.fromkeys(examples, TOKENS), {"ids": 12}, "mask", {"ids": 0})
    probes = make_probes(sample, {"batch": DimRange(), "sequence": DimRange()}, {"batch": 2, "sequence": 6}, "mask")
    assert len(probes) == 3
    for probe in probes:
        assert torch.equal(probe.inputs["ids"] == 0, probe.inputs["mask"] == 0)
