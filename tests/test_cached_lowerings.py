"""A cache's ops in ONNX: TensorScatter, attention from each row's start, GroupQueryAttention over buffers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from graphopt.backends.onnxruntime.engine import make_session
from graphopt.dims import Dim, Size
from graphopt.errors import LoweringError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.tensors import DimRange, TensorType
from tests.onnx_helpers import ONNXRUNTIME, emit, run_onnxruntime, run_reference

B, S = (Dim.named(name) for name in ("batch", "sequence"))
LENGTH = 12
FORMS = list(ONNXRUNTIME.forms["graphopt.attention"])
#: Where rows begin and how many tokens they get: prompts, single tokens, chunks of one row, the last place.
STEPS: tuple[tuple[list[int], int], ...] = (
    ([0, 0], 5), ([0], LENGTH), ([0], 1), ([0, 0, 0], 1), ([3, 0, 7], 1),
    ([11, 2], 1), ([11, 11], 1), ([4], 3), ([9], 3), ([1], 11),
)  # fmt: skip
RAGGED: tuple[tuple[list[int], int], ...] = (([4, 0, 8], 3), ([10, 9], 2))
Shape = tuple[Size, ...]
NUMBERS, TRUTHS = torch.float32, torch.bool


class Made:
    """A graph of one op, with an input for each of its tensors."""

    def __init__(
        self, op: str, types: Mapping[str, tuple[torch.dtype, Shape]], args: Mapping[str, Any], outputs: str
    ) -> None:
        self.graph = Graph(dims={"batch": DimRange(), "sequence": DimRange()})
        values = {name: self.graph.add_input(name, TensorType(*type)) for name, type in types.items()}
        node = self.graph.insert(op, {**values, **args})
        self.graph.outputs = dict(zip(outputs.split(), node.outputs, strict=True))
        self.graph.verify()
        self.sessions: dict[int, Any] = {}

    def inputs(self, starts: list[int], count: int) -> dict[str, torch.Tensor]:
        sizes = {"batch": len(starts), "sequence": count}
        made = {}
        for name, value in self.graph.inputs.items():
            shape = [int(size) for size in value.type.concrete(sizes).shape]  # type: ignore[arg-type]
            made[name] = torch.randn(shape)
            if value.type.dtype == torch.bool:
                made[name] = torch.rand(shape) < 0.7
                made[name][..., 0] = True
        return made | {"starts": torch.tensor(starts).to(self.graph.inputs["starts"].type.dtype)}

    def _session(self, model: onnx.ModelProto) -> Any:
        key = id(model)
        if key not in self.sessions:
            self.sessions[key] = model, make_session(model.SerializeToString())
        return self.sessions[key][1]

    def _run(self, model: onnx.ModelProto, inputs: dict[str, torch.Tensor], starts: list[int], count: int) -> Any:
        """As the engine does: GroupQueryAttention takes several tokens for one row at a time."""
        arrays = _arrays(model, inputs)
        if count == 1 or "GroupQueryAttention" not in {node.op_type for node in model.graph.node}:
            return self._session(model).run(None, arrays)
        per_row = {name for name, value in self.graph.inputs.items() if value.type.shape[:1] == (B,)}
        rows = [
            self._session(model).run(None, {n: a[row : row + 1] if n in per_row else a for n, a in arrays.items()})
            for row in range(len(starts))
        ]
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    def check(self, model: onnx.ModelProto, starts: list[int], count: int, reference: bool = False) -> None:
        """Every output is that of the op's own body; of buffers, as far as they are filled."""
        inputs = self.inputs(starts, count)
        results = run_reference(model, inputs) if reference else self._run(model, inputs, starts, count)
        for got, (name, expected) in zip(results, run(self.graph, inputs).items(), strict=True):
            for row, start in enumerate(starts):
                filled = start + count if name in ("keys", "values") else None
                mine, other = torch.from_numpy(np.array(got))[row, ..., :filled, :], expected[row, ..., :filled, :]
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name} of {starts}: {m}")  # noqa: B023


def _arrays(model: onnx.ModelProto, inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {given.name: inputs[given.name].numpy() for given in model.graph.input}


# kv_cache_update


def update(dtype: torch.dtype = torch.int64) -> Made:
    types: dict[str, tuple[torch.dtype, Shape]] = {
        "cache": (NUMBERS, (B, 2, LENGTH, 3)),
        "new": (NUMBERS, (B, 2, S, 3)),
    }
    types["starts"] = dtype, (B,)
    return Made("graphopt.kv_cache_update.default", types, {}, "y")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_update_is_a_scatter_of_opset_24(dtype: torch.dtype) -> None:
    made = update(dtype)
    model = emit(made.graph)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert "TensorScatter" in [node.op_type for node in model.graph.node]
    for step in STEPS + RAGGED:
        made.check(model, *step)
        made.check(model, *step, reference=True)


def test_no_newer_opset_than_needed() -> None:
    graph = Graph(dims={"batch": DimRange()})
    graph.outputs["y"] = graph.insert(
        "aten.neg.default", {"self": graph.add_input("x", TensorType(torch.float32, (B,)))}
    ).output
    assert [opset.version for opset in emit(graph).opset_import] == [23]


@pytest.mark.xfail(strict=True, reason="TensorScatter refuses what falls behind the end; the op leaves it out")
def test_what_falls_behind_the_end_is_left_out() -> None:
    made = update()
    made.check(emit(made.graph), [11, 0], 2)


# attention


def attention(masking: Mapping[str, Any], heads_last: bool, dtype: torch.dtype = torch.int64) -> Made:
    def vectors(heads: int, rows: Size, size: int) -> tuple[torch.dtype, Shape]:
        return torch.float32, (B, rows, heads, size) if heads_last else (B, heads, rows, size)

    types = {"q": vectors(4, S, 8), "k": vectors(2, LENGTH, 8), "v": vectors(2, LENGTH, 6), "starts": (dtype, (B,))}
    given = {name: type for name, type in masking.items() if isinstance(type, tuple)}
    args = {name: value for name, value in masking.items() if name not in given}
    return Made(
        "graphopt.attention.default",
        {**types, **given},
        {**args, "scale": 0.4, "causal": "upper_left", "heads_last": heads_last},
        "y",
    )


MASKINGS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window_left": 2},
    "chunk": {"chunk": 4},
    "chunk and window": {"chunk": 5, "window_left": 1},
    "softcap": {"softcap": 2.0},
    "bias": {"bias": (NUMBERS, (B, 4, S, LENGTH))},
    "bias of all rows": {"bias": (NUMBERS, (1, 4, S, LENGTH))},
    "bias of all heads": {"bias": (NUMBERS, (B, 1, S, LENGTH))},
    "bias of both": {"bias": (NUMBERS, (1, 1, S, LENGTH))},
    "boolean bias": {"bias": (TRUTHS, (B, 1, S, LENGTH))},
    "boolean bias of heads": {"bias": (TRUTHS, (1, 4, S, LENGTH)), "softcap": 2.0},
    "sinks": {"sinks": (NUMBERS, (4,))},
    "everything": {"bias": (NUMBERS, (B, 4, S, LENGTH)), "window_left": 3, "chunk": 4, "softcap": 3.0, "sinks": (NUMBERS, (4,))},
}  # fmt: skip
BROADCAST: dict[str, dict[str, Any]] = {
    "bias of keys": {"bias": (NUMBERS, (1, 4, 1, LENGTH))},
    "bias of each row's keys": {"bias": (NUMBERS, (B, 1, 1, LENGTH))},
    "boolean bias of keys": {"bias": (TRUTHS, (B, 1, 1, LENGTH))},
    "bias of queries": {"bias": (NUMBERS, (B, 4, S, 1))},
    "bias without a batch": {"bias": (NUMBERS, (4, S, LENGTH))},
    "bias of places": {"bias": (NUMBERS, (S, LENGTH))},
    "bias of the buffer": {"bias": (NUMBERS, (LENGTH,))},
}


def taken(made: Made, form: str) -> onnx.ModelProto | None:
    """The model in this form, if the form takes it."""
    try:
        return emit(made.graph, ONNXRUNTIME, form)
    except LoweringError:
        return None


@pytest.mark.parametrize("masking", MASKINGS | BROADCAST)
def test_attention_from_starts_in_every_form(masking: str) -> None:
    made = attention((MASKINGS | BROADCAST)[masking], heads_last=len(masking) % 2 == 0)
    models = {form: model for form in FORMS if (model := taken(made, form)) is not None}
    assert "products" in models
    for model, step in itertools.product(models.values(), (STEPS[0], STEPS[4], RAGGED[0])):
        made.check(model, *step)


@pytest.mark.parametrize(
    "masking", [name for name in MASKINGS | BROADCAST if "softcap" not in (MASKINGS | BROADCAST)[name]]
)
def test_attention_from_starts_in_the_reference_evaluator(masking: str) -> None:
    made = attention((MASKINGS | BROADCAST)[masking], heads_last=False)
    model = emit(made.graph)
    onnx.checker.check_model(model, full_check=True)
    for step in (STEPS[0], STEPS[4], RAGGED[0]):
        made.check(model, *step, reference=True)


def test_starts_of_32_bits() -> None:
    made = attention({"chunk": 4}, heads_last=True, dtype=torch.int32)
    made.check(emit(made.graph), *RAGGED[0])


# cached_attention


def cached(
    masking: Mapping[str, Any] | None = None,
    heads_last: bool = True,
    rotary: int = 0,
    size: int = 8,
    dtype: torch.dtype = torch.int64,
    **more: Any,
) -> Made:
    """``rotary``: how many features are rotated."""
    masking = masking or {}

    def vectors(heads: int) -> tuple[torch.dtype, Shape]:
        return NUMBERS, (B, S, heads, size) if heads_last else (B, heads, S, size)

    types = {"q": vectors(4), "k": vectors(2), "v": vectors(2)}
    types |= dict.fromkeys(("k_cache", "v_cache"), (NUMBERS, (B, 2, LENGTH, size)))
    types["starts"] = dtype, (B,)
    if rotary:
        types |= dict.fromkeys(("cos", "sin"), (NUMBERS, (LENGTH, rotary // 2)))
    given = {name: type for name, type in masking.items() if isinstance(type, tuple)}
    args = {name: value for name, value in masking.items() if name not in given} | more
    args |= {"scale": 0.4, "heads_last": heads_last}
    return Made("graphopt.cached_attention.default", types | given, args, "y keys values")


def kernel(made: Made) -> onnx.ModelProto:
    """The model, in which the kernel does it."""
    model = emit(made.graph, ONNXRUNTIME)
    assert [node.op_type for node in model.graph.node].count("GroupQueryAttention") == 1
    return model


@pytest.mark.parametrize("heads_last", [True, False])
@pytest.mark.parametrize("masking", MASKINGS)
def test_cached_attention_in_one_kernel(masking: str, heads_last: bool) -> None:
    made = cached(MASKINGS[masking], heads_last)
    model = kernel(made)
    for step in STEPS:
        made.check(model, *step)


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("heads_last", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_in_the_kernel(interleaved: bool, heads_last: bool, size: int) -> None:
    """Of all features, and of a third of them."""
    made = cached(heads_last=heads_last, rotary=16, size=size, interleaved=interleaved)
    model = kernel(made)
    for step in STEPS:
        made.check(model, *step)


def test_everything_in_the_kernel() -> None:
    made = cached(MASKINGS["everything"], rotary=16, size=32)
    model = kernel(made)
    for step in STEPS:
        made.check(model, *step)


def test_a_window_of_the_token_itself() -> None:
    made = cached({"window_left": 0})
    model = kernel(made)
    for step in STEPS:
        made.check(model, *step)


@pytest.mark.parametrize(("q", "v"), [(12, 12), (4, 4), (8, 16)])
def test_sizes_that_the_kernel_has_not(q: int, v: int) -> None:
    graph = Graph(dims={"batch": DimRange(), "sequence": DimRange()})
    shapes: dict[str, Shape] = {
        "q": (B, 4, S, q), "k": (B, 2, S, q), "v": (B, 2, S, v), "k_cache": (B, 2, LENGTH, q), "v_cache": (B, 2, LENGTH, v),
    }  # fmt: skip
    values = {name: graph.add_input(name, TensorType(NUMBERS, shape)) for name, shape in shapes.items()}
    starts = graph.add_input("starts", TensorType(torch.int64, (B,)))
    node = graph.insert("graphopt.cached_attention.default", {**values, "starts": starts, "scale": 1.0})
    graph.outputs["y"] = node.outputs[0]
    with pytest.raises(LoweringError, match="heads whose size is no multiple of 8, or is another one for values"):
        emit(graph, ONNXRUNTIME)


def test_the_standard_dialect_has_no_such_op() -> None:
    with pytest.raises(LoweringError, match="cached_attention"):
        emit(cached().graph)


def test_a_prompt_and_a_chunk_with_the_buffers_handed_on() -> None:
    """The kernel's own buffers are what its next call reads: a prompt of unequal rows, then single tokens."""
    made = cached(rotary=16, size=16)
    model = kernel(made)
    feeds = made.inputs([0, 0], 5)
    cos, sin = feeds["cos"], feeds["sin"]
    _, keys, values = made._run(model, feeds, [0, 0], 5)
    expected = run(made.graph, feeds)
    starts = [5, 3]  # the second row's last two were padding
    for _ in range(3):
        feeds = made.inputs(starts, 1) | {"cos": cos, "sin": sin}
        ours = feeds | {"k_cache": torch.from_numpy(keys), "v_cache": torch.from_numpy(values)}
        theirs = feeds | {"k_cache": expected["keys"], "v_cache": expected["values"]}
        result, keys, values = run_onnxruntime(model, ours)
        expected = run(made.graph, theirs)
        torch.testing.assert_close(torch.from_numpy(result), expected["y"], rtol=1e-5, atol=1e-5)
        starts = [start + 1 for start in starts]


# What the kernel cannot do, and nobody says so


@pytest.mark.parametrize("masking", BROADCAST)
def test_a_bias_that_broadcasts(masking: str) -> None:
    made = cached(BROADCAST[masking])
    made.check(kernel(made), *STEPS[0])


@pytest.mark.xfail(
    strict=True, reason="the kernel wants 16 features in a head that it rotates, and rotates 16 at a time"
)
@pytest.mark.parametrize(("rotary", "size"), [(8, 8), (24, 24), (16, 24), (8, 16), (4, 16), (24, 32)])
def test_a_rotation_that_the_kernel_has_not(rotary: int, size: int) -> None:
    """To be refused when the model is made, or rotated before the kernel."""
    made = cached(rotary=rotary, size=size)
    made.check(emit(made.graph, ONNXRUNTIME), *STEPS[0])


def test_cached_attention_from_starts_of_32_bits() -> None:
    made = cached(dtype=torch.int32)
    made.check(kernel(made), *STEPS[4])


@pytest.mark.parametrize("step", RAGGED)
def test_the_kernel_takes_no_chunks_of_several_rows(step: tuple[list[int], int]) -> None:
    """What the engine runs row by row; were it taken one day, ``must_be_apart`` could go."""
    made = cached()
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        made._session(kernel(made)).run(None, _arrays(kernel(made), made.inputs(*step)))
