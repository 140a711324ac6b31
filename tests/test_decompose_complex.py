"""decompose_complex: complex numbers become pairs of reals, and compute what torch computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import GraphError, GraphoptError, NoMatchError, ParseError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.decompose_complex import DecomposeComplex
from graphopt.pipeline import run_passes
from graphopt.sources import Source
from graphopt.text import parse
from graphopt.tracing import trace
from tests.onnx_helpers import ONNXRUNTIME, assert_same, check_everywhere, emit, run_onnxruntime
from tests.rules import apply_pass, assert_equal_runs, assert_idempotent, difference, program, read

Fn = Callable[..., Tensor]
pairs, numbers = torch.view_as_real, torch.view_as_complex

PRODUCT = """
    dim batch in [1, ...]
    input %x: f32[batch, 3, 2]
    input %f: f32[3, 2]
    %z: c64[batch, 3] = aten.view_as_complex.default(self=%x)
    %w: c64[3] = aten.view_as_complex.default(self=%f)
    %p: c64[batch, 3] = aten.mul.Tensor(self=%z, other=%w)
    %r: f32[batch, 3, 2] = aten.view_as_real.default(self=%p)
    output y = %r
"""
PRODUCT_OF_PAIRS = """
    dim batch in [1, ...]
    input %x: f32[batch, 3, 2]
    input %f: f32[3, 2]
    %select: f32[batch, 3] = aten.select.int(self=%x, dim=2, index=0)
    %select_1: f32[batch, 3] = aten.select.int(self=%x, dim=2, index=1)
    %select_2: f32[3] = aten.select.int(self=%f, dim=1, index=0)
    %select_3: f32[3] = aten.select.int(self=%f, dim=1, index=1)
    %mul: f32[batch, 3] = aten.mul.Tensor(self=%select, other=%select_2)
    %mul_1: f32[batch, 3] = aten.mul.Tensor(self=%select_1, other=%select_3)
    %sub: f32[batch, 3] = aten.sub.Tensor(self=%mul, other=%mul_1)
    %mul_2: f32[batch, 3] = aten.mul.Tensor(self=%select, other=%select_3)
    %mul_3: f32[batch, 3] = aten.mul.Tensor(self=%select_1, other=%select_2)
    %add: f32[batch, 3] = aten.add.Tensor(self=%mul_2, other=%mul_3)
    %r: f32[batch, 3, 2] = aten.stack.default(tensors=[%sub, %add], dim=2)
    output y = %r
"""
#: By a real tensor, and through ops that do the same to both parts.
MOVED = """
    dim batch in [1, ...]
    input %x: f32[batch, 3, 2]
    input %a: f32[batch, 1]
    %z: c64[batch, 3] = aten.view_as_complex.default(self=%x)
    %p: c64[batch, 3] = aten.mul.Tensor(self=%z, other=%a)
    %c: c64[batch, 3] = aten.conj_physical.default(self=%p)
    %t: c64[3, batch] = aten.transpose.int(self=%c, dim0=0, dim1=1)
    %r: f32[3, batch, 2] = aten.view_as_real.default(self=%t)
    output y = %r
"""
MOVED_PAIRS = """
    dim batch in [1, ...]
    input %x: f32[batch, 3, 2]
    input %a: f32[batch, 1]
    %select: f32[batch, 3] = aten.select.int(self=%x, dim=2, index=0)
    %select_1: f32[batch, 3] = aten.select.int(self=%x, dim=2, index=1)
    %mul: f32[batch, 3] = aten.mul.Tensor(self=%select, other=%a)
    %mul_1: f32[batch, 3] = aten.mul.Tensor(self=%select_1, other=%a)
    %neg: f32[batch, 3] = aten.neg.default(self=%mul_1)
    %transpose: f32[3, batch] = aten.transpose.int(self=%mul, dim0=0, dim1=1)
    %transpose_1: f32[3, batch] = aten.transpose.int(self=%neg, dim0=0, dim1=1)
    %r: f32[3, batch, 2] = aten.stack.default(tensors=[%transpose, %transpose_1], dim=2)
    output y = %r
"""
#: A Fourier transform stays: it is left as pairs.
SPECTRUM = """
    dim batch in [1, ...]
    input %x: f32[batch, 3]
    %f: c64[batch, 3] = aten.fft_fft.default(self=%x)
    %a: f32[batch, 3] = aten.abs.default(self=%f)
    %i: f32[batch, 3] = aten.imag.default(self=%f)
    output y = %a
    output z = %i
"""
SPECTRUM_OF_PAIRS = """
    dim batch in [1, ...]
    input %x: f32[batch, 3]
    %f: c64[batch, 3] = aten.fft_fft.default(self=%x)
    %view_as_real: f32[batch, 3, 2] = aten.view_as_real.default(self=%f)
    %select: f32[batch, 3] = aten.select.int(self=%view_as_real, dim=2, index=0)
    %i: f32[batch, 3] = aten.select.int(self=%view_as_real, dim=2, index=1)
    %mul: f32[batch, 3] = aten.mul.Tensor(self=%select, other=%select)
    %mul_1: f32[batch, 3] = aten.mul.Tensor(self=%i, other=%i)
    %add: f32[batch, 3] = aten.add.Tensor(self=%mul, other=%mul_1)
    %a: f32[batch, 3] = aten.sqrt.default(self=%add)
    output y = %a
    output z = %i
"""
GOLDEN = {
    "product": (PRODUCT, PRODUCT_OF_PAIRS, {"view_as_complex": 2, "mul": 1, "view_as_real": 1}),
    "moved": (
        MOVED,
        MOVED_PAIRS,
        {"view_as_complex": 1, "mul": 1, "conj_physical": 1, "transpose": 1, "view_as_real": 1},
    ),
    "spectrum": (SPECTRUM, SPECTRUM_OF_PAIRS, {"abs": 1, "imag": 1}),
}
golden = pytest.mark.parametrize(("before", "after", "matches"), GOLDEN.values(), ids=GOLDEN)


@golden
def test_what_it_makes(before: str, after: str, matches: dict[str, int]) -> None:
    applied = apply_pass(before, DecomposeComplex())
    assert applied.text == program(after), difference(program(after), applied.text)
    assert applied.matches == matches
    assert applied.reasons == []


@golden
def test_what_it_makes_is_equal(before: str, after: str, matches: dict[str, int]) -> None:
    assert_equal_runs(program(before), program(after), [{"batch": 4}, {"batch": 1}])


def test_a_second_run_changes_nothing() -> None:
    assert_idempotent(PRODUCT, DecomposeComplex())


def test_a_real_graph_has_nothing_to_decompose() -> None:
    with pytest.raises(NoMatchError, match="decompose_complex changed nothing"):
        run_passes(read("dim b in [1, ...]\ninput %x: f32[b]\noutput y = %x"), [DecomposeComplex()])


# Against torch


class Computes(nn.Module):
    """A function of ``x: f32[rows, 6, 2]`` and of complex and real buffers."""

    w: Tensor
    a: Tensor

    def __init__(self, fn: Fn) -> None:
        super().__init__()
        self.fn = fn
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("w", torch.polar(torch.rand(6, generator=generator) + 0.5, torch.arange(6.0)))
        self.register_buffer("a", torch.rand(6, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, self.w, self.a) if self.fn.__code__.co_argcount == 3 else self.fn(x)


def given(*rows: int) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(n, 6, 2)} for n in rows]


def decomposed(fn: Fn) -> Graph:
    """The function's graph after the pass, without a complex number, equal to torch at the traced size and two others."""
    module = Computes(fn).eval()
    graph = trace(module, given(3)[0], {"x": ("rows", None, None)})
    run_passes(graph, [DecomposeComplex()])
    assert not [value for value in graph.values.values() if value.type.dtype.is_complex]
    for inputs in given(3, 7, 1):
        torch.testing.assert_close(run(graph, inputs)["output"], module(**inputs))
    return graph


EQUAL: dict[str, Fn] = {
    "product": lambda x: pairs(numbers(x) * numbers(x)),
    "product with a buffer": lambda x, w, a: pairs(numbers(x) * w),
    "buffer as it is": lambda x, w, a: w.real + w.imag * x[..., 0],
    "buffer that is moved": lambda x, w, a: pairs(numbers(x) * w.reshape(2, 3).t().reshape(6)),
    "buffer that is conjugated": lambda x, w, a: pairs(numbers(x) * w.conj()),
    "product with a real buffer": lambda x, w, a: pairs(a * numbers(x)),
    "product with integers": lambda x: pairs(numbers(x) * torch.arange(6)),
    "product with double precision": lambda x: pairs(numbers(x) * torch.arange(6, dtype=torch.float64)),
    "product with a number": lambda x: pairs(numbers(x) * 2.5),
    "product with i": lambda x: pairs(numbers(x) * 1j),
    "product with a complex number": lambda x: pairs((2 - 3j) * numbers(x)),
    "product with zero": lambda x: pairs(numbers(x) * 0.0),
    "product that broadcasts": lambda x: pairs(numbers(x)[:, None] * numbers(x)[:, :, None]),
    "a real tensor times i": lambda x: pairs(1j * x[..., 0]),
    "a real tensor times i and more": lambda x: pairs((1j * x[..., 0] + 0.5) * 2.0 + 0.25),
    "sum": lambda x, w, a: pairs(numbers(x) + w - numbers(x) * 2),
    "sum with reals": lambda x, w, a: pairs(numbers(x) + a - 1),
    "sum that broadcasts": lambda x: pairs(numbers(x)[0] + x[..., 0]),
    "reals less a complex tensor": lambda x, w, a: pairs(a - numbers(x)),
    "division by a number": lambda x: pairs(numbers(x) / 3),
    "division by reals": lambda x, w, a: pairs(numbers(x) / a),
    "polar": lambda x: pairs(torch.polar(x[..., 0].abs(), x[..., 1])),
    "polar that broadcasts": lambda x: pairs(torch.polar(x[:, :1, 0].abs(), x[..., 1])),
    "complex": lambda x: pairs(torch.complex(x[..., 0], x[..., 1])),
    "exponential": lambda x: pairs(torch.exp(numbers(x))),
    "exponential of an angle": lambda x: torch.exp(1j * x).real,
    "conjugate": lambda x: (numbers(x).conj() * numbers(x)).real,
    "imaginary part of a conjugate": lambda x: numbers(x).conj().imag,
    "conjugate in memory": lambda x: pairs(torch.conj_physical(numbers(x))),
    "absolute": lambda x: numbers(x).abs(),
    "real and imaginary part": lambda x: numbers(x).real - torch.imag(numbers(x)),
    "concatenation": lambda x: pairs(torch.cat([numbers(x), numbers(x) * 2, numbers(x)[:, :1]], 1)),
    "stack": lambda x: pairs(torch.stack([numbers(x), numbers(x) * 1j], -1)),
    "reshapes": lambda x: pairs(numbers(x).reshape(-1, 2, 3).flatten(1).unsqueeze(0).squeeze(0)),
    "transposes": lambda x: pairs(numbers(x).reshape(-1, 2, 3).permute(2, 0, 1).transpose(-1, 0)),
    "slices": lambda x: pairs(numbers(x)[:, 1::2][:, -1:]),
    "rows": lambda x: pairs(numbers(x)[:, 2]),
    "expansion": lambda x: pairs(numbers(x)[:, :1].expand(-1, 4)),
    "repetition": lambda x: pairs(numbers(x).repeat(1, 2).repeat_interleave(2, 1)),
    "index": lambda x: pairs(numbers(x)[:, torch.tensor([0, -1])]),
    "gather": lambda x: pairs(numbers(x).gather(1, (x[..., 0] > 0).long())),
    "flip and roll": lambda x: pairs(numbers(x).flip(1).roll(2, 1)),
    "total": lambda x: pairs(numbers(x).sum(1) + numbers(x).mean(-1)),
    "negation": lambda x: pairs(-numbers(x)),
    "wider": lambda x: pairs(numbers(x).to(torch.complex128)),
    "from reals": lambda x: pairs(x[..., 0].to(torch.complex64) * numbers(x)),
    "to reals": lambda x: numbers(x).to(torch.float32),
    "used twice": lambda x: numbers(x).abs()[..., None] + pairs(numbers(x) * 2),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("fn", EQUAL.values(), ids=EQUAL)
def test_it_computes_what_torch_computes(fn: Fn) -> None:
    check_everywhere(decomposed(fn), given(3, 5))


def test_a_buffer_is_conjugated_when_it_is_kept() -> None:
    """torch keeps a conjugate as a mark on its tensor, which numpy cannot read."""

    class Conjugated(nn.Module):
        w: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.polar(torch.ones(6), torch.arange(6.0)).conj())

        def forward(self, x: Tensor) -> Tensor:
            return pairs(numbers(x) * self.w)

    module = Conjugated().eval()
    graph = trace(module, given(3)[0], {"x": ("rows", None, None)})
    run_passes(graph, [DecomposeComplex()])
    check_everywhere(graph, given(3, 5))
    (inputs,) = given(4)
    torch.testing.assert_close(run(graph, inputs)["output"], module(**inputs))


def test_rotary_embedding_by_complex_numbers() -> None:
    """As Llama 4 and DeepSeek write it."""

    class Rotary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            angles = torch.arange(x.shape[1])[:, None] / 100.0 ** (torch.arange(4) / 4)
            turns = torch.polar(torch.ones_like(angles), angles)
            heads = numbers(x.float().reshape(*x.shape[:-1], 4, 2))
            return pairs(heads * turns[None, :, None]).flatten(3)

    module = Rotary().eval()
    graph = trace(module, {"x": torch.randn(2, 5, 3, 8)}, {"x": ("batch", "sequence", None, None)})
    run_passes(graph, [DecomposeComplex()])
    inputs = [{"x": torch.randn(b, s, 3, 8)} for b, s in ((2, 5), (3, 9), (1, 1))]
    check_everywhere(graph, inputs)
    for each in inputs:
        torch.testing.assert_close(run(graph, each)["output"], module(**each))


# Refusals


def test_a_complex_input_is_refused() -> None:
    graph = trace(Computes(lambda x: (x * 2).abs()).eval(), {"x": torch.randn(3, 6) + 0j}, {"x": ("rows", None)})
    with pytest.raises(GraphError, match="the input %x is complex") as error:
        run_passes(graph, [DecomposeComplex()])
    assert error.value.hint == "give the model its real and imaginary part"


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: pairs(numbers(x) / numbers(x)), "a division by complex numbers"),
        (lambda x: pairs(x[..., 0] / numbers(x)), "a division by complex numbers"),
        (lambda x: pairs(torch.add(numbers(x), numbers(x), alpha=2)), "a complex sum with alpha"),
    ],
)
def test_what_is_refused(fn: Fn, message: str) -> None:
    graph = trace(Computes(fn).eval(), given(3)[0], {"x": ("rows", None, None)})
    with pytest.raises(GraphError, match=message) as error:
        run_passes(graph, [DecomposeComplex()])
    assert "test_decompose_complex.py" in str(error.value.where)


# Fourier transforms: complex, entered and left as pairs

TRANSFORMS: dict[str, Fn] = {
    "of both axes, as FNet mixes": lambda x: torch.fft.fftn(x, dim=(1, 2)).real,
    "of two axes": lambda x: torch.fft.fft2(x).imag,
    "scaled": lambda x: torch.fft.fft(x, norm="ortho").real,
    "of the sequence": lambda x: torch.fft.fft(x, dim=1).abs(),
    "of reals": lambda x: pairs(torch.fft.rfft(x)),
    "spectrum of reals": lambda x: torch.fft.rfft(x).abs() ** 2,
    "shortened": lambda x: torch.fft.fft(x, n=4).real,
    "of complex numbers": lambda x: pairs(torch.fft.fft(numbers(x.reshape(*x.shape[:2], 4, 2)))),
    "back of complex numbers": lambda x: pairs(torch.fft.ifft(numbers(x.reshape(*x.shape[:2], 4, 2)))),
    "to reals": lambda x: torch.fft.irfft(numbers(x.reshape(*x.shape[:2], 4, 2))),
    "there and back": lambda x: torch.fft.ifft(torch.fft.fft(x)).real,
}


@pytest.mark.parametrize("fn", TRANSFORMS.values(), ids=TRANSFORMS)
def test_fourier_transforms(fn: Fn) -> None:
    """The reference evaluator's transform is exact only for some sizes; onnxruntime's is held to torch's."""
    module = Computes(fn).eval()
    inputs = [{"x": torch.randn(b, s, 8)} for b, s in ((2, 5), (3, 6))]
    graph = trace(module, inputs[0], {"x": ("batch", "sequence", None)})
    run_passes(graph, [DecomposeComplex().model_copy(update={"allow_no_match": True})])
    model = emit(graph, ONNXRUNTIME)
    for each in inputs:
        assert_same(graph, each, run_onnxruntime(model, each), 1e-4)
        torch.testing.assert_close(run(graph, each)["output"], module(**each))


@pytest.mark.parametrize("backend", ["onnxruntime", "onnx"])
def test_a_model_that_mixes_by_fourier_transforms_is_compiled(tmp_path: Path, backend: str) -> None:
    module = Computes(lambda x: torch.fft.fftn(x, dim=(1, 2)).real + x).eval()
    source = Source(module, {"x": torch.randn(2, 5, 8)}, {"x": ("batch", "sequence", None)})
    target = {"backend": backend, "tactics": "fixed"}
    engine = graphopt.compile(source, tmp_path / "engine", target=target).engine
    for batch, sequence in ((1, 1), (3, 7)):
        x = torch.randn(batch, sequence, 8)
        torch.testing.assert_close(engine(x=x)["output"], module(x), atol=1e-4, rtol=1e-4)


# Known faults


def numbers_that_are_wrong(reason: str, fn: Fn) -> Any:
    return pytest.param(fn, id=reason, marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason))


def crashes(reason: str, fn: Fn) -> Any:
    return pytest.param(fn, id=reason, marks=pytest.mark.xfail(strict=True, raises=GraphError, reason=reason))


FAULTS = [
    numbers_that_are_wrong("a part of fewer rows is summed along another axis",
                           lambda x: pairs((numbers(x)[0] + x[..., 0]).sum(0))),
    numbers_that_are_wrong("complex() of parts that broadcast, then a total",
                           lambda x: pairs(torch.complex(x[:, :1, 0], x[..., 1]).sum(1))),
    numbers_that_are_wrong("exp drops a real part that is a number", lambda x: torch.exp(1j * x + 0.5).real),
    numbers_that_are_wrong("cat gives reals an imaginary part", lambda x: pairs(torch.cat([numbers(x), x[..., 0]], 1))),
    numbers_that_are_wrong("stack gives reals an imaginary part", lambda x: pairs(torch.stack([numbers(x), x[..., 0]], 1))),
    numbers_that_are_wrong("abs squares what is large", lambda x: numbers(x * 1e25).abs()),
    crashes("a part of fewer rows cannot be reshaped", lambda x: pairs((numbers(x)[0] + x[..., 0]).reshape(-1))),
    crashes("the number zero cannot be reshaped", lambda x: pairs((1j * x).reshape(-1))),
    crashes("the number zero has no rows", lambda x: pairs(x.to(torch.complex64)[..., 0])),
    crashes("the number zero cannot be negated", lambda x: pairs(-(1j * x))),
    crashes("the number zero cannot be concatenated",
            lambda x: pairs(torch.cat([numbers(x), x[..., 0].to(torch.complex64)], 1))),
    crashes("the number zero has no cosine", lambda x: x.to(torch.complex64).exp().real),
    crashes("the number zero has no root", lambda x: (numbers(x) * 0.0).abs()),
    crashes("the dtype of a total is complex", lambda x: pairs(numbers(x).sum(1, dtype=torch.complex128))),
]  # fmt: skip


@pytest.mark.parametrize("fn", FAULTS)
def test_what_is_wrong(fn: Fn) -> None:
    decomposed(fn)


#: What the pass leaves complex and a lowering for reals takes: each half by itself. It should be refused, or decomposed.
LEFT: dict[str, Fn] = {
    "reciprocal": lambda x: pairs(numbers(x).reciprocal()),
    "square": lambda x: pairs(numbers(x) ** 2),
    "root": lambda x: pairs(numbers(x).sqrt()),
    "sine": lambda x: pairs(numbers(x).sin()),
    "sigmoid": lambda x: pairs(numbers(x).sigmoid()),
    "number less a complex tensor": lambda x: pairs(1 - numbers(x)),
    "comparison": lambda x: numbers(x) == numbers(x.flip(0)),
    "choice": lambda x: pairs(torch.where(x[..., 0] > 0, numbers(x), numbers(x) * 2)),
    "full tensor": lambda x: pairs(numbers(x) + torch.ones(6, dtype=torch.complex64)),
    "matrix product": lambda x: pairs(numbers(x) @ numbers(x).transpose(0, 1)),
    "transform of a product": lambda x: pairs(torch.fft.fft(numbers(x) * numbers(x))),
    "filter of a spectrum": lambda x: (
        torch.fft.ifft(torch.fft.fft(x[..., 0]) * torch.polar(torch.ones(6), torch.arange(6.0))).real
    ),
}


@pytest.mark.xfail(strict=True, reason="complex numbers left by the pass are lowered as reals")
@pytest.mark.parametrize("fn", LEFT.values(), ids=LEFT)
def test_what_is_left_complex_is_right_or_refused(fn: Fn) -> None:
    module = Computes(fn).eval()
    graph = trace(module, given(3)[0], {"x": ("rows", None, None)})
    try:
        run_passes(graph, [DecomposeComplex().model_copy(update={"allow_no_match": True})])
        model = emit(graph, ONNXRUNTIME)
    except GraphoptError:
        return
    for inputs in given(3, 5):
        assert_same(graph, inputs, run_onnxruntime(model, inputs), 1e-4)


@pytest.mark.xfail(
    strict=True, reason="the engine gives pairs where the model gives complex numbers: refuse or make them"
)
def test_a_complex_output(tmp_path: Path) -> None:
    source = Source(Computes(lambda x: numbers(x) * 2).eval(), {"x": torch.randn(3, 6, 2)}, {"x": ("rows", None, None)})
    with pytest.raises(GraphError):
        graphopt.compile(source, tmp_path / "engine", target={"tactics": "fixed"})


@pytest.mark.xfail(strict=True, raises=ParseError, reason="1j is written as Python writes it, and read as a size")
def test_a_graph_with_complex_numbers_is_read_back() -> None:
    graph = trace(Computes(lambda x: pairs(numbers(x) * 1j)).eval(), given(3)[0], {"x": ("rows", None, None)})
    assert str(parse(str(graph))) == str(graph)


def test_complex_weights_on_the_torch_backend(tmp_path: Path) -> None:
    module = Computes(lambda x, w, a: pairs(numbers(x) * w)).eval()
    source = Source(module, {"x": torch.randn(3, 6, 2)}, {"x": ("rows", None, None)})
    graphopt.compile(source, tmp_path / "engine", target={"backend": "torch"})
