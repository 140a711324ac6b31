"""Caches of another dtype than the model's: the fused op, kernels, engines, decoding."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AttentionInterface,
    MistralConfig,
    MistralForCausalLM,
)

import graphopt
from graphopt.backends.onnxruntime.bound_cache import BoundCache
from graphopt.backends.onnxruntime.engine import OnnxRuntimeEngine, make_session
from graphopt.errors import LoweringError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.ops import SHAPES
from graphopt.runtime import Generator
from graphopt.runtime.cache import as_if_uncached, layout_of
from graphopt.runtime.decoder import Decoder
from graphopt.sources import transformers_source
from graphopt.tensors import DimRange, TensorType, Weight
from tests.folders import shared_folder
from tests.onnx_helpers import ONNXRUNTIME, emit
from tests.test_cache_dtype import round_to_int8
from tests.test_cache_dtype_contracts import (
    DATA_TOKENS,
    DIMS,
    FULL,
    HALF,
    INT8,
    INT8_OPTIONS,
    model,
    passes_of,
    through,
)
from tests.test_cached_lowerings import LENGTH, MASKINGS, STEPS, B, S
from tests.test_generation import PROMPTS, eager, llama

pytestmark = pytest.mark.usefixtures("kept_here")

OPS: Any = torch.ops.graphopt


# The op


def parts_of(batch: int, count: int, dtype: torch.dtype, size: int = 16) -> dict[str, Tensor]:
    made = {name: torch.randn(batch, heads, count, size) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    for name in ("k_cache", "v_cache"):
        filled = (
            torch.randint(-127, 128, (batch, 2, LENGTH, size)) if dtype == INT8 else torch.randn(batch, 2, LENGTH, size)
        )
        made[name] = filled.to(dtype)
    return made


def scales_of(*shape: int) -> dict[str, Tensor]:
    return {name: torch.rand(shape) * 0.02 + 0.02 for name in ("k_scale", "v_scale")}


@pytest.mark.parametrize("shape", [None, (1, 2, 1, 1), (1, 2, 1, 16), (1, 1, 1, 1), ()])
def test_the_op_is_attention_over_rounded_keys_and_values(shape: tuple[int, ...] | None) -> None:
    """At ragged starts, row by row in plain torch; without scales in sixteen bits."""
    starts, count = [5, 0, 8], 3
    parts = parts_of(3, count, HALF if shape is None else INT8)
    scales = {} if shape is None else scales_of(*shape)
    got, *kept = OPS.cached_attention(**parts, **scales, starts=torch.tensor(starts), scale=0.4)
    for row, start in enumerate(starts):
        both = []
        for name, cache in zip("kv", kept, strict=True):
            assert cache.dtype == parts[f"{name}_cache"].dtype
            new = parts[name][row]
            scale = None if shape is None else scales[f"{name}_scale"].expand(1, 2, 1, 16)[0]
            stored = new.half() if scale is None else (new / scale).round().clamp(-128, 127).to(INT8)
            assert torch.equal(cache[row, :, start : start + count], stored)
            assert torch.equal(cache[row, :, :start], parts[f"{name}_cache"][row, :, :start])
            whole = torch.cat([parts[f"{name}_cache"][row, :, :start], stored], 1).float()
            both.append((whole if scale is None else whole * scale).repeat_interleave(2, 0))
        visible = torch.ones(count, start + count, dtype=torch.bool).tril(start)
        expected = functional.scaled_dot_product_attention(parts["q"][row], both[0], both[1], visible, scale=0.4)
        torch.testing.assert_close(got[row], expected, rtol=1e-5, atol=1e-5)


NOTHING: dict[str, Any] = dict.fromkeys(("bias", "sinks", "cos", "sin", "k_scale", "v_scale"))


def shapes(**args: Any) -> tuple[Tensor, ...]:
    given = NOTHING | {"starts": torch.zeros(2, dtype=torch.int64), "heads_last": False} | args
    return SHAPES["graphopt.cached_attention.default"](given)


def test_shapes_are_those_of_the_body() -> None:
    for dtype, scales in ((INT8, scales_of(1, 2, 1, 1)), (HALF, {})):
        parts = parts_of(2, 3, dtype)
        results = OPS.cached_attention(**parts, **scales, starts=torch.tensor([0, 4]), scale=1.0)
        found = [(tensor.shape, tensor.dtype) for tensor in shapes(**parts, **scales)]
        assert found == [(tensor.shape, tensor.dtype) for tensor in results]


def test_a_cache_and_its_scale_need_each_other() -> None:
    scales = scales_of(1, 2, 1, 1)
    with pytest.raises(ValueError, match=r"a cache of torch.int8 without a scale"):
        shapes(**parts_of(2, 3, INT8))
    with pytest.raises(ValueError, match=r"a cache of torch.int8 without a scale"):
        shapes(**parts_of(2, 3, INT8), k_scale=scales["k_scale"])
    for dtype in (HALF, FULL):
        with pytest.raises(ValueError, match=f"a cache of {dtype} with a scale"):
            shapes(**parts_of(2, 3, dtype), **scales)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 2, 1, 8), (2,), (1, 2, LENGTH, 1)])
def test_a_scale_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="scale"):
        shapes(**parts_of(2, 3, INT8), **scales_of(*shape))


# The kernel


class Kernel:
    """A graph of the op with caches of a dtype, in GroupQueryAttention."""

    def __init__(
        self,
        dtype: torch.dtype,
        masking: Mapping[str, Any] | None = None,
        scale: Sequence[int] = (1, 2, 1, 16),
        rotary: int = 0,
        size: int = 16,
        **args: Any,
    ) -> None:
        heads_last = args.setdefault("heads_last", True)
        self.graph = Graph(dims={"batch": DimRange(), "sequence": DimRange()})
        types: dict[str, Any] = {
            name: (FULL, (B, S, heads, size) if heads_last else (B, heads, S, size))
            for name, heads in (("q", 4), ("k", 2), ("v", 2))
        }
        types |= dict.fromkeys(("k_cache", "v_cache"), (dtype, (B, 2, LENGTH, size)))
        types["starts"] = torch.int64, (B,)
        if rotary:
            types |= dict.fromkeys(("cos", "sin"), (FULL, (LENGTH, rotary // 2)))
        given = {name: type for name, type in (masking or {}).items() if isinstance(type, tuple)}
        args |= {name: value for name, value in (masking or {}).items() if name not in given}
        operands = {name: self.graph.add_input(name, TensorType(*type)) for name, type in (types | given).items()}
        if dtype == INT8:
            weights = scales_of(*scale)
            operands |= {name: self.graph.add_weight(name, Weight.of(weights[name])) for name in weights}
        node = self.graph.insert("graphopt.cached_attention.default", {**operands, **args, "scale": 0.4})
        self.graph.outputs = dict(zip(("y", "keys", "values"), node.outputs, strict=True))
        self.graph.verify()
        model = emit(self.graph, ONNXRUNTIME)
        (self.node,) = (node for node in model.graph.node if node.op_type == "GroupQueryAttention")
        self.names = [given.name for given in model.graph.input]
        self.session = make_session(model.SerializeToString())
        self.exact = dtype == INT8

    def inputs(self, starts: list[int], count: int, magnitude: float = 1.0) -> dict[str, Tensor]:
        made = {}
        for name, value in self.graph.inputs.items():
            shape = [int(size) for size in value.type.concrete({"batch": len(starts), "sequence": count}).shape]  # type: ignore[arg-type]
            made[name] = (torch.randn(shape) * (magnitude if name in "qk" else 1)).to(value.type.dtype)
            if value.type.dtype == torch.bool:
                made[name] = torch.rand(shape) < 0.7
                made[name][..., 0] = True
            elif value.type.dtype == INT8:
                made[name] = torch.randint(-127, 128, shape).to(INT8)
        if "cos" in made:
            angles = torch.rand(made["cos"].shape) * 6
            made |= {"cos": angles.cos(), "sin": angles.sin()}
        return made | {"starts": torch.tensor(starts)}

    def run(self, inputs: Mapping[str, Tensor], starts: list[int], count: int) -> list[np.ndarray]:
        """As the engine does: several tokens for one row at a time."""
        arrays = {name: inputs[name].numpy() for name in self.names}
        if count == 1:
            found: list[np.ndarray] = self.session.run(None, arrays)
            return found
        own = {name for name, value in self.graph.inputs.items() if value.type.shape[:1] == (B,)}
        rows = [
            self.session.run(None, {name: a[row : row + 1] if name in own else a for name, a in arrays.items()})
            for row in range(len(starts))
        ]
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    def check(self, starts: list[int], count: int, magnitude: float = 1.0) -> None:
        """Every output is that of the op's body, of buffers as far as they are filled. In int8 to the last bit but for the
        products' rounding; kernels compute with halves in halves."""
        inputs = self.inputs(starts, count, magnitude)
        tolerance = 1e-5 if self.exact else 5e-3
        for got, (name, expected) in zip(self.run(inputs, starts, count), run(self.graph, inputs).items(), strict=True):
            assert torch.from_numpy(got).dtype == expected.dtype
            for row, start in enumerate(starts):
                filled = None if name == "y" else start + count
                mine = torch.from_numpy(got)[row, ..., :filled, :].float()
                other = expected[row, ..., :filled, :].float()
                bound = tolerance if name == "y" else 0 if self.exact else 1e-3
                torch.testing.assert_close(mine, other, rtol=bound, atol=bound)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize(
    ("dtype", "heads_last"), [(INT8, True), (INT8, False), (HALF, True)], ids=["int8", "int8, heads first", "fp16"]
)
def test_the_kernel_does_all_maskings(dtype: torch.dtype, masking: str, heads_last: bool) -> None:
    made = Kernel(dtype, MASKINGS[masking], heads_last=heads_last)
    for step in STEPS:
        made.check(*step)


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [INT8, HALF], ids=["int8", "fp16"])
def test_the_kernel_rotates_before_it_rounds(dtype: torch.dtype, interleaved: bool, size: int) -> None:
    made = Kernel(dtype, scale=(1, 2, 1, size), rotary=16, size=size, interleaved=interleaved)
    for step in STEPS:
        made.check(*step)


@pytest.mark.parametrize("scale", [(), (1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 16)])
def test_the_kernel_gets_a_scale_for_each_channel(scale: tuple[int, ...]) -> None:
    made = Kernel(INT8, scale=scale)
    named = {attribute.name: attribute for attribute in made.node.attribute}
    assert named["k_quant_type"].s == named["v_quant_type"].s == b"PER_CHANNEL"
    assert named["kv_cache_bit_width"].i == 8
    for step in STEPS:
        made.check(*step)


def test_halves_have_no_scales_in_the_kernel() -> None:
    made = Kernel(HALF)
    assert not {"k_quant_type", "v_quant_type", "kv_cache_bit_width"} & {a.name for a in made.node.attribute}


@pytest.mark.parametrize("magnitude", [30.0, 300.0])
def test_products_larger_than_halves_can_be(magnitude: float) -> None:
    """Of a prompt, and of single tokens."""
    made = Kernel(HALF, size=64)
    for starts, count in (([0], 6), ([5], 1), ([4], 3)):
        made.check(starts, count, magnitude)


def test_scales_that_are_computed_are_refused() -> None:
    graph = Kernel(INT8).graph
    given = graph.add_input("computed", TensorType(FULL, (1, 2, 1, 16)))
    (node,) = graph.nodes
    graph.set_args(node, {"k_scale": given})
    with pytest.raises(LoweringError, match="scales that are computed"):
        emit(graph, ONNXRUNTIME)


# Engines

STATIC_48 = {"layout": "static", "max_length": 48, "logits": "last"}
BUILDS: dict[str, tuple[dict[str, Any], bool]] = {
    "growing fp16": ({"dtype": "fp16"}, False),
    "growing int8": (INT8_OPTIONS, False),
    "static fp16": (STATIC_48 | {"dtype": "fp16"}, False),
    "static int8": (STATIC_48 | INT8_OPTIONS, False),
    "fused fp16": (STATIC_48 | {"dtype": "fp16"}, True),
    "fused int8": (STATIC_48 | INT8_OPTIONS | {"scales": "head"}, True),
}
TARGET = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}


@functools.cache
def built(build: str) -> Path:
    """One build for all tests of this file."""
    options, fused = BUILDS[build]
    folder = shared_folder() / "engine"
    graphopt.compile(model(), folder, passes=passes_of(options, fused), target=TARGET, dims=DIMS)
    return folder


def engine(build: str) -> OnnxRuntimeEngine:
    found = graphopt.load(built(build))
    assert isinstance(found, OnnxRuntimeEngine)
    return found


def dtype_of(build: str) -> torch.dtype:
    return INT8 if "int8" in build else HALF


def close(got: Tensor, expected: Tensor, build: str) -> None:
    """Equal up to float's rounding: that may bring a number to the next of 256, and a kernel of halves rounds to these. What
    int8 does to the logits of this model is a third of them."""
    tolerance = 2e-2 if "int8" in build or build == "fused fp16" else 1e-3
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("build", BUILDS)
def test_the_engine_is_the_interpreter(build: str) -> None:
    """In steps, at two sizes."""
    (graph, _), made = through(*BUILDS[build]), engine(build)
    layout = layout_of(graph)
    assert layout is not None
    for rows, length in ((1, 5), (3, 11)):
        tokens = torch.randint(1, 299, (rows, length))
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        texts = [
            as_if_uncached(call, layout, inputs, inputs["attention_mask"])
            for call in (lambda feeds: run(graph, feeds), lambda feeds: made(**feeds))
        ]
        seen = texts[0].seen
        assert seen is not None
        expected, got = (text.outputs["logits"][seen.bool()] for text in texts)
        close(got, expected, build)


class Rounded:
    """Eager with keys and values that are rounded as a cache would."""

    def __init__(self, module: Any, dtype: torch.dtype, scales: str = "channel", window: int | None = None) -> None:
        self.module, self.dtype, self.each, self.window = module, dtype, scales, window
        self.seen: list[tuple[int, dict[str, Tensor]]] = []
        self.scales: dict[int, dict[str, Tensor]] | None = None
        if dtype == INT8:
            self.scales = self._scales()

    def _scales(self) -> dict[int, dict[str, Tensor]]:
        """Of each layer, by eager's own keys and values of the data."""
        self.seen = []
        for text in DATA_TOKENS:
            self.logits(text)
        axes = (0, 2) if self.each == "channel" else (0, 2, 3)
        found: dict[int, dict[str, Tensor]] = {}
        for layer, parts in self.seen:
            for name, part in parts.items():
                largest = part.abs().amax(axes, keepdim=True) / 127
                own = found.setdefault(layer, {})
                own[name] = largest.maximum(own.get(name, largest))
        return found

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
        if self.scales is not None:
            scales = self.scales[module.layer_idx]
            k, v = round_to_int8(k, scales["k"]), round_to_int8(v, scales["v"])
        elif self.dtype == INT8:
            self.seen.append((module.layer_idx, {"k": k, "v": v}))
        else:
            k, v = k.half().float(), v.half().float()
        places = torch.arange(q.shape[2])
        far = places[:, None] - places
        visible = (far >= 0) & (far < (self.window or q.shape[2]))
        result = functional.scaled_dot_product_attention(q, k, v, visible, scale=scaling, enable_gqa=True)
        return result.transpose(1, 2), None

    def logits(self, text: Sequence[int]) -> Tensor:
        """Of every position."""
        AttentionInterface.register("rounded", self.attend)
        before = self.module.config._attn_implementation
        self.module.config._attn_implementation = "rounded"
        try:
            with torch.no_grad():
                found: Tensor = self.module(input_ids=torch.tensor([list(text)])).logits[0]
        finally:
            self.module.config._attn_implementation = before
        return found


def rounded(build: str) -> Rounded:
    return Rounded(llama(), dtype_of(build), BUILDS[build][0].get("scales", "channel"))


def assert_bound(decoder: Decoder, dtype: torch.dtype) -> dict[str, int]:
    """The engine's own buffers, of this dtype; where they lie."""
    assert isinstance(decoder.cache, BoundCache)
    assert {tensor.dtype for tensor in decoder.cache.tensors.values()} == {dtype}
    return {name: tensor.data_ptr() for name, tensor in decoder.cache.tensors.items()}


@pytest.mark.parametrize("build", BUILDS)
def test_decoding_is_eager_with_rounded_keys_and_values(build: str) -> None:
    """Rows of several lengths: prompts, a chunk, single tokens, in buffers that stay where they are."""
    expected, texts = rounded(build), [list(range(7, 7 + count)) for count in (9, 14, 5)]
    decoder = Decoder(engine(build), 3)
    places = assert_bound(decoder, dtype_of(build))
    whole = [expected.logits(text) for text in texts]
    done = [0, 0, 0]
    for widths in ((4, 9, 1), (2, 2, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)):
        logits = decoder.feed([text[n : n + width] for text, n, width in zip(texts, done, widths, strict=True)])
        done = [n + width for n, width in zip(done, widths, strict=True)]
        for row, n in enumerate(done):
            close(logits[row], whole[row][n - 1], build)
    if "growing" not in build:
        assert assert_bound(decoder, dtype_of(build)) == places


def test_a_cache_of_fewer_bits_takes_less_memory() -> None:
    """Two layers, keys and values, two heads of sixteen features, 48 positions."""
    for build, size in (("static fp16", 2), ("fused fp16", 2), ("fused int8", 1)):
        assert Decoder(engine(build), 3).cache.nbytes == 2 * 2 * 3 * 2 * 48 * 16 * size


@pytest.mark.parametrize("build", [build for build in BUILDS if "fp16" in build])
def test_halves_give_eagers_tokens(build: str) -> None:
    """Twenty of them, greedily, for prompts of several lengths."""
    made = Generator(engine(build)).generate(PROMPTS, max_new_tokens=20)
    assert [row.tokens for row in made] == [eager(prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("build", ["growing int8", "fused int8"])
def test_int8_gives_the_tokens_of_rounded_eager(build: str) -> None:
    """The best of each step, or one that is as good up to rounding."""
    expected = rounded(build)
    made = Generator(engine(build)).generate(PROMPTS, max_new_tokens=20)
    for prompt, row in zip(PROMPTS, made, strict=True):
        text = prompt + row.tokens
        logits = expected.logits(text[:-1])[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
        assert len(chosen) == 20
        assert bool((logits.amax(1) - chosen <= 0.02 * logits.abs().amax(1)).all())


@pytest.mark.parametrize("build", ["static int8", "fused int8", "fused fp16", "growing int8"])
def test_rows_may_be_chosen_anew(build: str) -> None:
    """As beam search does: buffers of int8 and halves are moved too."""
    decoder, expected = Decoder(engine(build), 2), rounded(build)
    decoder.feed([[5, 6, 7, 8], [9, 10, 11, 12]])
    decoder.select(torch.tensor([1, 1, 0]))
    logits = decoder.feed([[20], [21], [22]])
    for row, text in enumerate(([9, 10, 11, 12, 20], [9, 10, 11, 12, 21], [5, 6, 7, 8, 22])):
        close(logits[row], expected.logits(text)[-1], build)


@pytest.mark.parametrize("build", ["growing fp16", "fused int8"])
def test_an_engine_is_held_to_its_budget(build: str) -> None:
    """When it is made, and when it is compared again."""
    contract = {"growing fp16": "relative 0.01", "fused int8": "cosine 0.99"}[build]
    stage = engine(build).manifest.report.engine
    assert stage is not None
    assert (stage.contract, stage.holds) == (contract, True)
    again = graphopt.verify(built(build), model())
    assert (again.contract, again.holds) == (contract, True)


@pytest.mark.parametrize(("dtype", "fused"), [("int8", True), ("int8", False), ("fp16", True)])
def test_engines_with_windows(dtype: str, fused: bool, tmp_path: Path) -> None:
    """Texts longer than the window and its buffers."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=4, initializer_range=0.3,
    )  # fmt: skip
    module = MistralForCausalLM(config).eval()
    options: dict[str, Any] = {"layout": "static", "max_length": 24, "window": True, "dtype": dtype}
    options |= INT8_OPTIONS if dtype == "int8" else {}
    made = graphopt.compile(
        transformers_source(module), tmp_path / "engine", passes=passes_of(options, fused), target=TARGET, dims=DIMS
    )
    decoder = Decoder(made.engine, 2)
    assert decoder.layout.window == 4
    assert_bound(decoder, INT8 if dtype == "int8" else HALF)
    expected = Rounded(module, INT8 if dtype == "int8" else HALF, window=4)
    texts = [list(range(10, 28)), list(range(40, 55))]
    whole = [expected.logits(text) for text in texts]
    done = [0, 0]
    for widths in ((7, 4), (3, 3), *[(1, 1)] * 8):
        logits = decoder.feed([text[n : n + width] for text, n, width in zip(texts, done, widths, strict=True)])
        done = [n + width for n, width in zip(done, widths, strict=True)]
        for row, n in enumerate(done):
            close(logits[row], whole[row][n - 1], f"fused {dtype}")
