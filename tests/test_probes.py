"""Probe inputs: ragged masks on either side, what stands where the mask is 0, sizes, numbers, what is taken for a mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graphopt.probes import is_mask, make_probes, ragged_mask, sampler_like
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


# Inputs


def test_ragged_masks_are_padded_on_both_sides() -> None:
    mask = ragged_mask((6, 9), random())
    assert mask.dtype == torch.bool
    assert bool(mask[0].all())
    assert bool((mask.sum(1) >= 4).all())
    assert int((mask.sum(1) < 9).sum()) >= 2
    for row, kept in enumerate(mask.int().diff(dim=1)):
        assert bool((kept <= 0).all()) if row % 2 == 0 else bool((kept >= 0).all())


def test_the_smallest_ragged_mask_keeps_its_position() -> None:
    assert ragged_mask((3, 1), random()).tolist() == [[True]] * 3


@pytest.mark.parametrize(
    ("name", "tensor", "is_one"),
    [
        ("attention_mask", torch.ones(2, 3, dtype=torch.int64), True),
        ("mask", torch.tensor([[0.0, 1.0]]), True),
        ("mask", torch.tensor([[True, False]]), True),
        ("mask", torch.tensor([[0, 2]]), False),
        ("mask", torch.ones(2, 1, 3), False),
        ("ids", torch.ones(2, 3), False),
        ("src_key_padding_mask", torch.zeros(2, 3, dtype=torch.bool), False),  # True where there is padding
    ],
)
def test_is_mask(name: str, tensor: Tensor, is_one: bool) -> None:
    assert is_mask(name, tensor) is is_one


EXAMPLES = {
    "ids": torch.tensor([[3, 9, 4]]),
    "types": torch.tensor([[0, 1, 1]]),
    "attention_mask": torch.ones(1, 3, dtype=torch.int64),
    "x": torch.tensor([[[10.0, 12.0, 14.0, 16.0]] * 3], dtype=torch.float64),
    "flag": torch.tensor([True]),
}
AXES: dict[str, tuple[str | None, ...]] = {
    "ids": ("b", "s"), "types": ("b", "s"), "attention_mask": ("b", "s"), "x": ("b", "s", None),
}  # fmt: skip


def test_samples_are_like_the_examples() -> None:
    found = sampler_like(EXAMPLES, AXES, {"ids": 50})({"b": 40, "s": 20}, random())
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in EXAMPLES.items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "ids": (40, 20), "types": (40, 20), "attention_mask": (40, 20), "x": (40, 20, 4), "flag": (1,),
    }  # fmt: skip
    assert (int(found["ids"].min()), int(found["ids"].max())) == (0, 49)
    assert set(found["types"].flatten().tolist()) == {0, 1}
    assert set(found["attention_mask"].flatten().tolist()) == {0, 1}
    assert float(found["x"].mean()) == pytest.approx(13.0, abs=0.2)
    assert float(found["x"].std()) == pytest.approx(math.sqrt(5), abs=0.1)


def test_integers_without_a_vocabulary_stay_in_the_examples_range() -> None:
    found = sampler_like(EXAMPLES, AXES)({"b": 40, "s": 20}, random())["ids"]
    assert (int(found.min()), int(found.max())) == (3, 9)


def sizes_of(dims: dict[str, DimRange], traced: dict[str, int]) -> list[dict[str, int]]:
    return [probe.sizes for probe in make_probes(sampler_like(EXAMPLES, AXES), dims, traced, "attention_mask")]


def test_probes_are_at_other_sizes_the_traced_and_the_smallest() -> None:
    sizes = sizes_of({"b": DimRange(1, None), "s": DimRange(2, None)}, {"b": 2, "s": 6})
    assert sizes == [{"b": 3, "s": 9}, {"b": 2, "s": 6}, {"b": 1, "s": 2}]


def test_probes_respect_ranges() -> None:
    assert sizes_of({"b": DimRange(1, 2), "s": DimRange(4, 6)}, {"b": 2, "s": 6}) == [
        {"b": 2, "s": 6},
        {"b": 1, "s": 4},
    ]
    assert sizes_of({"b": DimRange(2, 2), "s": DimRange(6, 7)}, {"b": 2, "s": 6}) == [
        {"b": 2, "s": 7},
        {"b": 2, "s": 6},
    ]
    assert sizes_of({"b": DimRange(2, 2), "s": DimRange(6, 6)}, {"b": 2, "s": 6}) == [{"b": 2, "s": 6}]


def test_probes_respect_ranges_that_leave_out_the_traced_size() -> None:
    ranges = {"b": DimRange(4, 8), "s": DimRange(1, 5)}
    sizes = sizes_of(ranges, {"b": 2, "s": 6})
    assert all(size in ranges[name] for probe in sizes for name, size in probe.items())
    assert len(sizes) >= 2


def test_probes_hold_their_inputs_and_mask() -> None:
    dims = {"b": DimRange(1, None), "s": DimRange(2, None)}
    sample = sampler_like(EXAMPLES, AXES)
    probe = make_probes(sample, dims, {"b": 2, "s": 6}, "attention_mask")[0]
    assert probe.mask is probe.inputs["attention_mask"]
    assert make_probes(sample, dims, {"b": 2, "s": 6}, None)[0].mask is None
    again = make_probes(sample, dims, {"b": 2, "s": 6}, "attention_mask")[0]
    assert torch.equal(probe.inputs["ids"], again.inputs["ids"])
    other = make_probes(sample, dims, {"b": 2, "s": 6}, "attention_mask", seed=1)[0]
    assert not torch.equal(probe.inputs["ids"], other.inputs["ids"])
