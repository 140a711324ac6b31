"""Ops of quantized numbers: bodies against numpy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.ops.quantization import FP8, unpacked

OPS: Any = torch.ops.graphopt
Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
INT8, BYTE = torch.int8, torch.uint8
H, D, N = 3, 4, 5
#: Shapes of x and of its scale.
SCALED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one number": ((2, H, 6, D), ()),
    "one number of every axis": ((2, H, 6, D), (1, 1, 1, 1)),
    "heads": ((2, H, 6, D), (1, H, 1, 1)),
    "features": ((2, H, 6, D), (1, 1, 1, D)),
    "features of each head": ((2, H, 6, D), (1, H, 1, D)),
    "channels of a weight": ((N, 7), (N, 1)),
    "features of a weight": ((N, 7), (1, 7)),
    "every number": ((N, 7), (N, 7)),
    "a vector": ((N,), (N,)),
}


def scale_of(shape: Sequence[int]) -> Tensor:
    return torch.rand(list(shape)) * 0.1 + 0.01


def rounded(x: Array, scale: Array) -> Array:
    """By numpy, halves to the even number."""
    return np.clip(np.rint(x / scale), -128, 127).astype(np.int8)


# quantize and dequantize


@pytest.mark.parametrize("name", SCALED)
def test_quantize_rounds_and_saturates_as_numpy_does(name: str) -> None:
    shape, own = SCALED[name]
    x, scale = torch.randn(shape) * 5, scale_of(own)
    got = OPS.quantize(x, scale)
    assert got.dtype == torch.int8
    np.testing.assert_array_equal(got.numpy(), rounded(x.numpy(), scale.numpy()))


@pytest.mark.parametrize("name", SCALED)
def test_dequantize_is_a_product(name: str) -> None:
    shape, own = SCALED[name]
    x, scale = torch.randint(-128, 128, shape).to(torch.int8), scale_of(own)
    got = OPS.dequantize(x, scale)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), x.numpy().astype(np.float32) * scale.numpy())


EDGES = [0.0, 0.25, -0.25, 0.75, -0.75, 1.25, -1.25, 63.25, 63.5, 63.75, 64.0, -64.0, -64.25, -64.5, 1e30, -1e30]
HALVES = [0, 0, 0, 2, -2, 2, -2, 126, 127, 127, 127, -128, -128, -128, 127, -128]


def test_halves_go_to_the_even_number_and_the_rest_is_cut() -> None:
    assert OPS.quantize(torch.tensor(EDGES), torch.tensor(0.5)).tolist() == HALVES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_scale_has_the_dtype_of_the_numbers(dtype: torch.dtype) -> None:
    x, scale = torch.randn(4, 5).to(dtype), torch.tensor(0.03, dtype=dtype)
    assert OPS.quantize(x, scale).dtype == torch.int8
    back = OPS.dequantize(OPS.quantize(x, scale), scale)
    assert back.dtype == dtype
    bound = float(scale) * (0.5 + 8 * torch.finfo(dtype).eps * 128)
    assert float((back - x).abs().max()) <= bound


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=30), st.integers(-12, 12))
def test_back_and_forth_is_within_half_a_step(values: list[int], power: int) -> None:
    """Of what is not cut off, at scales by which a division is exact."""
    x, scale = torch.tensor(values) / 1024, torch.tensor(2.0**power)
    back = OPS.dequantize(OPS.quantize(x, scale), scale)
    kept = x.clamp(-128 * float(scale), 127 * float(scale))
    assert bool(((back - kept).abs() <= 0.5 * scale).all())
    again = OPS.dequantize(OPS.quantize(back, scale), scale)
    assert torch.equal(again, back)


# float8


def as_float8(x: Array, scale: Array) -> Array:
    """By numpy and ml_dtypes, saturated at 448."""
    made: Array = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return made


@pytest.mark.parametrize("name", SCALED)
def test_float8_is_what_ml_dtypes_makes_of_it(name: str) -> None:
    shape, own = SCALED[name]
    x, scale = torch.randn(shape) * 20, scale_of(own)
    got = OPS.quantize(x, scale, dtype=FP8)
    expected = as_float8(x.numpy(), scale.numpy())
    assert got.dtype == FP8
    np.testing.assert_array_equal(got.float().numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(OPS.dequantize(got, scale).numpy(), expected.astype(np.float32) * scale.numpy())


def test_float8_goes_to_the_even_number_and_saturates() -> None:
    """17 and 19 are in the middle of two numbers, 2**-10 of 0 and the smallest one; what is larger than 448 is no NaN."""
    x = torch.tensor([17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 448.0, 465.0, 1e30, -1e30, torch.inf])
    got = OPS.quantize(x, torch.tensor(1.0), dtype=FP8).float()
    assert got.tolist() == [16.0, 20.0, -16.0, 0.0, 2.0**-8, 448.0, 448.0, 448.0, -448.0, 448.0]


@pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_static_linear_is_a_scaled_product(dtype: torch.dtype, several: bool, with_bias: bool) -> None:
    x, weight = (torch.randint(-100, 101, shape).to(dtype) for shape in ((2, 3, 6), (N, 6)))
    step, scale, bias = torch.tensor(0.03), scale_of((N,) if several else ()), torch.randn(N) if with_bias else None
    product = x.double().numpy() @ weight.double().numpy().T * (0.03 * scale.double().numpy())
    got = OPS.static_linear(x, step, weight, scale, bias)
    assert (got.dtype, got.shape) == (torch.float32, (2, 3, N))
    expected = product + (0.0 if bias is None else bias.double().numpy())
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-4)


# dynamic_linear


def by_its_range(x: Array) -> Array:
    """What DynamicQuantizeLinear of the ONNX standard makes of x, as numbers again."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = (high - low) / 255 or 1.0
    zero = np.clip(np.rint(-low / step), 0, 255)
    kept: Array = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    return kept


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_dynamic_linear_is_a_linear_of_rounded_input(shape: tuple[int, ...], several: bool, with_bias: bool) -> None:
    x = torch.randn(shape) * 3 + 1
    weight = torch.randint(-128, 128, (N, 6)).to(torch.int8)
    scale = scale_of((N,) if several else ())
    bias = torch.randn(N) if with_bias else None
    expected = by_its_range(x.double().numpy()) @ (
        weight.double().numpy() * scale.double().numpy().reshape(-1, 1)
    ).T + (0.0 if bias is None else bias.double().numpy())
    got = OPS.dynamic_linear(x, weight, scale, bias)
    assert got.shape == (*shape[:-1], N)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_dynamic_linear_of_one_sign_has_a_level_for_0(sign: int) -> None:
    """Its range has 0 in it, so that 0 stays 0."""
    x = torch.tensor([[0.0, 2.0, 3.0]]) * sign
    weight = torch.eye(3).to(torch.int8)
    got = OPS.dynamic_linear(x, weight, torch.tensor(1.0))
    assert float(got[0, 0]) == 0
    torch.testing.assert_close(got, x, atol=3 / 255 / 2, rtol=0)


def test_dynamic_linear_of_zeros_is_its_bias() -> None:
    bias = torch.randn(N)
    weight = torch.ones(N, 6, dtype=torch.int8)
    assert torch.equal(OPS.dynamic_linear(torch.zeros(2, 6), weight, torch.tensor(1.0), bias), bias.expand(2, N))


# packed_linear


def packed_by_hand(numbers: Array, bits: int) -> Array:
    """Numbers ``[..., count]`` as bytes, of two nibbles the first one low; behind an odd one a 0."""
    if bits == 8:
        return numbers.astype(np.uint8)
    numbers = np.concatenate([numbers, np.zeros((*numbers.shape[:-1], numbers.shape[-1] % 2), np.int64)], -1)
    made: Array = (numbers[..., 0::2] | (numbers[..., 1::2] << 4)).astype(np.uint8)
    return made


class Packed:
    """A weight in groups: its parts, and itself as numpy has it."""

    def __init__(self, features: int, bits: int, block: int, with_zeros: bool) -> None:
        generator = np.random.default_rng(0)
        self.bits = bits
        groups = -(-features // block)
        numbers = generator.integers(0, 2**bits, (N, groups, block))
        self.scales = generator.random((N, groups)).astype(np.float32)
        self.zeros = generator.integers(0, 2**bits, (N, groups)) if with_zeros else None
        middle = np.full((N, groups), 2 ** (bits - 1)) if self.zeros is None else self.zeros
        whole = (numbers - middle[..., None]) * self.scales[..., None]
        self.weight = whole.reshape(N, groups * block)
        self.packed = packed_by_hand(numbers, bits)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        zeros = None if self.zeros is None else torch.from_numpy(packed_by_hand(self.zeros, self.bits))
        return torch.from_numpy(self.packed), torch.from_numpy(self.scales), zeros


PACKED = list(itertools.product((4, 8), (16, 32, 20, 40), (16,), (True, False)))


@pytest.mark.parametrize(("bits", "features", "block", "with_zeros"), PACKED)
def test_a_packed_weight_is_what_it_was_packed_of(bits: int, features: int, block: int, with_zeros: bool) -> None:
    made = Packed(features, bits, block, with_zeros)
    packed, scales, zeros = made.tensors()
    np.testing.assert_allclose(unpacked(packed, scales, zeros, None, bits).numpy(), made.weight, rtol=1e-6)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("bits", "features", "block", "with_zeros"), PACKED)
def test_packed_linear_is_a_linear(bits: int, features: int, block: int, with_zeros: bool, with_bias: bool) -> None:
    """The last group may hold more than there are features."""
    made = Packed(features, bits, block, with_zeros)
    x, bias = torch.randn(2, 3, features), torch.randn(N) if with_bias else None
    expected = x.double().numpy() @ made.weight[:, :features].T + (0.0 if bias is None else bias.double().numpy())
    got = OPS.packed_linear(x, *made.tensors(), bias=bias, bits=bits, block=block)
    assert got.shape == (2, 3, N)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_of_a_codebook(bits: int) -> None:
    """Each is looked up and scaled; rows of it as well."""
    codebook = np.random.default_rng(1).standard_normal(2**bits).astype(np.float32)
    numbers = np.random.default_rng(2).integers(0, 2**bits, (N, 2, 16))
    scales = np.random.default_rng(3).random((N, 2)).astype(np.float32)
    weight = (np.take(codebook, numbers) * scales[..., None]).reshape(N, 32)[:, :20]
    parts = [
        torch.from_numpy(packed_by_hand(numbers, bits)),
        torch.from_numpy(scales),
        None,
        torch.from_numpy(codebook),
    ]
    x = torch.randn(3, 20)
    got = OPS.packed_linear(x, *parts, bits=bits, block=16)
    np.testing.assert_allclose(got.numpy(), x.numpy() @ weight.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(OPS.unpack_rows(*parts, bits=bits, features=20).numpy(), weight)


def test_packed_linear_in_halves_has_the_dtype_of_its_input() -> None:
    made = Packed(32, 4, 16, True)
    packed, scales, zeros = made.tensors()
    got = OPS.packed_linear(torch.ones(1, 32, dtype=torch.float16), packed, scales.half(), zeros, bits=4, block=16)
    assert got.dtype == torch.float16
    np.testing.assert_allclose(got[0].float().numpy(), made.weight.sum(1), rtol=0.02, atol=0.2)
