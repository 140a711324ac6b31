"""Convolutions, and the normalizations that go with them, in ONNX, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends.onnx.convolutions import CONVOLUTIONS
from graphopt.dims import Dim
from graphopt.errors import TracingError
from graphopt.tensors import TensorType
from graphopt.tracing import trace
from tests.onnx_helpers import ONNXRUNTIME, assert_same, check_everywhere, emit, run_onnxruntime
from tests.test_lowerings import F32, B, S, graph_of

H = Dim.named("height")
SIZES = ({"batch": 2, "sequence": 12, "height": 9}, {"batch": 3, "sequence": 15, "height": 11})
#: Inputs by the number of their axes: the batch and one or two of the others are dynamic.
INPUTS = {
    1: TensorType(F32, (B, 6, S)),
    2: TensorType(F32, (B, 6, H, S)),
    3: TensorType(F32, (B, 6, 5, H, S)),
}


def at(type: TensorType, mean: float = 0.0) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn([int(n) for n in type.concrete(sizes).shape]) + mean} for sizes in SIZES]  # type: ignore[arg-type]


def convolution(axes: int, out: int, groups: int, kernel: tuple[int, ...], bias: bool = True, **options: Any) -> None:
    """A convolution is torch's own, everywhere."""
    weights = {"w": torch.randn(out, 6 // groups, *kernel)} | ({"b": torch.randn(out)} if bias else {})
    args = {"input": "%x", "weight": "%w", "groups": groups, **({"bias": "%b"} if bias else {}), **options}
    graph = graph_of(f"aten.conv{axes}d.default", {"x": INPUTS[axes]}, args, weights, sequence=7)
    check_everywhere(graph, at(INPUTS[axes]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_with_and_without_bias(groups: int, bias: bool) -> None:
    convolution(1, 12, groups, (3,), bias)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_stride_padding_and_dilation(stride: int, padding: int, dilation: int) -> None:
    convolution(1, 4, 2, (3,), stride=(stride,), padding=(padding,), dilation=(dilation,))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2,), "padding": (1,)},  # one number for both axes
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
        {"stride": (3, 2), "padding": (1, 0)},
    ],
)
def test_images(options: dict[str, Any]) -> None:
    convolution(2, 4, 1, (3, 2), **options)
    convolution(2, 6, 6, (3, 2), bias=False, **options)


def test_patches() -> None:
    convolution(2, 8, 1, (3, 3), stride=(3, 3))


def test_films() -> None:
    convolution(3, 4, 2, (2, 3, 3), stride=(1, 2, 1), padding=(0, 1, 2))


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_a_word(padding: str, kernel: int) -> None:
    """Without a lowering of its own: through torch's exporter."""
    args = {"input": "%x", "weight": "%w", "padding": padding, "dilation": (2,)}
    graph = graph_of("aten.conv1d.padding", {"x": INPUTS[1]}, args, {"w": torch.randn(4, 6, kernel)}, sequence=7)
    check_everywhere(graph, at(INPUTS[1]))


@pytest.mark.xfail(strict=True, reason="Conv wants a batch; torch does not")
@pytest.mark.parametrize("axes", [1, 2])
def test_one_sample_without_a_batch(axes: int) -> None:
    type = TensorType(F32, INPUTS[axes].shape[1:])
    args = {"input": "%x", "weight": "%w"}
    graph = graph_of(f"aten.conv{axes}d.default", {"x": type}, args, {"w": torch.randn(4, 6, *(3,) * axes)})
    check_everywhere(graph, at(type))


# Normalizations


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("scales", ["both", "weight", "neither"])
def test_group_norm(axes: int, groups: int, scales: str) -> None:
    weights = {"w": torch.randn(6), "b": torch.randn(6)}
    args: dict[str, Any] = {"input": "%x", "num_groups": groups, "eps": 1e-3}
    used = {"both": ("w", "b"), "weight": ("w",), "neither": ()}[scales]
    args |= {key: f"%{name}" for key, name in (("weight", "w"), ("bias", "b")) if name in used}
    graph = graph_of("aten.group_norm.default", {"x": INPUTS[axes]}, args, {name: weights[name] for name in used})
    check_everywhere(graph, at(INPUTS[axes]))


@pytest.mark.xfail(strict=True, reason="the standard's function takes the variance as E[x²] - E[x]²")
@pytest.mark.parametrize("mean", [100.0, 1000.0])
def test_group_norm_far_from_zero(mean: float) -> None:
    graph = graph_of("aten.group_norm.default", {"x": INPUTS[1]}, {"input": "%x", "num_groups": 2}, {})
    check_everywhere(graph, at(INPUTS[1], mean), 1e-4)


def test_group_norm_of_dynamic_channels_goes_through_the_exporter() -> None:
    graph = graph_of("aten.group_norm.default", {"x": TensorType(F32, (B, 2 * S, 4)), "s": TensorType(F32, (S,))},
                     {"input": "%x", "num_groups": 2}, {})  # fmt: skip
    given = [{"x": torch.randn(2, 2 * n, 4), "s": torch.zeros(n)} for n in (3, 5)]
    model = emit(graph, ONNXRUNTIME)
    for inputs in given:
        assert_same(graph, inputs, run_onnxruntime(model, inputs), 1e-5)


STATISTICS = {"running_mean": torch.randn(6), "running_var": torch.rand(6) + 0.1}
SCALES = {"weight": torch.randn(6), "bias": torch.randn(6)}


@pytest.mark.parametrize("scales", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("type", [*INPUTS.values(), TensorType(F32, (B, 6))], ids=str)
def test_batch_norm(type: TensorType, scales: bool) -> None:
    weights = STATISTICS | (SCALES if scales else {})
    args: dict[str, Any] = {"input": "%x", "training": False, "momentum": 0.1, "eps": 0.01, "cudnn_enabled": True}
    args |= {key: f"%{key}" if key in weights else None for key in (*STATISTICS, *SCALES)}
    check_everywhere(graph_of("aten.batch_norm.default", {"x": type}, args, weights), at(type))


# Modules


class Stem(nn.Module):
    """The beginning of a speech model: normalized convolutions over waves of any length."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 8, 5, stride=3, bias=False)
        self.norm = nn.GroupNorm(8, 8) if norm == "group" else nn.BatchNorm1d(8)
        self.second = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 4, padding=2, groups=2), dim=2)

    def forward(self, waves: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.norm(self.first(waves[:, None])))
        result: Tensor = self.second(hidden)[:, :, :-1].transpose(1, 2)
        return result


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_stem_of_convolutions(norm: str) -> None:
    module = Stem(norm).eval()
    graph = trace(module, {"waves": torch.randn(2, 50)}, {"waves": ("batch", "samples")})
    check_everywhere(graph, [{"waves": torch.randn(b, n)} for b, n in ((2, 50), (3, 61), (1, 47))])


class Residual(nn.Module):
    """A block of a residual network; its activation works in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.activation = nn.ReLU(inplace=in_place)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.activation(self.norm(self.conv(x)) + x)
        return result


@pytest.mark.parametrize(
    "in_place",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.xfail(
                strict=True, raises=TracingError,
                reason="decomposed with the in-place op, its batch norm has other shapes on meta tensors than on CPU",
            ),
        ),
    ],
)  # fmt: skip
def test_a_block_of_a_residual_network(in_place: bool) -> None:
    graph = trace(Residual(in_place).eval(), {"x": torch.randn(2, 3, 8, 8)}, {"x": ("batch", None, None, None)})
    check_everywhere(graph, [{"x": torch.randn(n, 3, 8, 8)} for n in (2, 1, 5)])


def test_every_lowering_is_tested_here() -> None:
    convolutions = {f"aten.conv{axes}d" for axes in INPUTS}
    assert CONVOLUTIONS.keys() == convolutions | {"aten.group_norm", "aten.batch_norm"}
