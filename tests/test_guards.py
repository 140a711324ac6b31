"""Branches on sizes: what a trace takes for granted holds everywhere in dims, or is refused; a traced module stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, Phi3Config, Phi3ForCausalLM

import graphopt
from graphopt.errors import GraphError, TracingError
from graphopt.execution import run
from graphopt.guards import guards_of, range_within, violated
from graphopt.pipeline import load_passes, run_passes
from graphopt.sources import transformers_source
from graphopt.tensors import DimRange
from graphopt.tracing import trace

SIZES: dict[tuple[str, int], str | int] = {("x", 0): "b", ("x", 1): "s", ("x", 2): 4}
TRACED = {"b": 2, "s": 6}


def size(axis: int) -> str:
    return f"L['x'].size()[{axis}]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{size(0)}*{size(1)} < 1000", ["b*s < 1000"]),
        (f"max(1, {size(1)} // 3) == 2", ["max(1, s // 3) == 2"]),
        (f"{size(1)} == 4", []),  # which the trace itself does not keep
        (f"{size(2)} == 4", []),  # of numbers alone
        ("L['y'].size()[0] == 2", []),
        (f"{size(1)}.evil()", []),
        (f"__import__('os') or {size(1)}", []),
        ("not python (", []),
    ],
)
def test_guards_are_conditions_on_names(text: str, expected: list[str]) -> None:
    assert [guard.text for guard in guards_of([text], SIZES, TRACED)] == expected


@pytest.mark.parametrize(
    ("text", "bounds", "expected"),
    [
        (f"{size(1)} % 100 != 0", (1, None), (1, 99)),
        (f"{size(1)} % 100 != 0", (1, 64), (1, 64)),
        (f"{size(1)} > 3", (1, None), (4, None)),
        (f"{size(1)} <= 100000", (1, None), (1, 100000)),
        (f"{size(1)} != 1", (1, 8), (1, 8)),  # torch takes 1 for another program; a run proves it
        (f"({size(1)} + ((32 - {size(1)} % 32) % 32)) // 32 == 1", (1, 512), (1, 32)),
        (f"{size(0)} > 1", (1, None), (1, None)),  # of another name
    ],
)
def test_a_range_ends_where_a_guard_does(
    text: str, bounds: tuple[int, int | None], expected: tuple[int, int | None]
) -> None:
    found = range_within(guards_of([text], SIZES, TRACED), "s", DimRange(*bounds), 6)
    assert (found.min, found.max) == expected


def test_a_guard_of_several_sizes_is_tried_at_them() -> None:
    guards = guards_of([f"{size(0)}*{size(1)} < 1000"], SIZES, TRACED)
    assert violated(guards, {"b": DimRange(1, 8), "s": DimRange(1, 124)}, TRACED) is None
    found = violated(guards, {"b": DimRange(1, 8), "s": DimRange(1, 125)}, TRACED)
    assert found is not None
    assert found[1] == {"b": 8, "s": 125}


class Branches(nn.Module):
    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        goes = {
            "area": lambda: b * s < 1000, "tenth": lambda: s % 10 != 0, "shape": lambda: b <= 4 * s, "sum": lambda: b + s < 100,
        }  # fmt: skip
        return x * 2 if goes[self.by]() else x * 3


class Shapes(nn.Module):
    """The other way gives another shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :2] if x.shape[1] % 10 != 0 else x


def traced(by: str, **dims: tuple[int, int]) -> graphopt.Graph:
    ranges = {name: DimRange(*bounds) for name, bounds in dims.items()}
    return trace(Branches(by).eval(), {"x": torch.randn(2, 6, 4)}, {"x": ("batch", "sequence", None)}, ranges)


@pytest.mark.parametrize(
    ("by", "dims", "message"),
    [
        ("area", {"batch": (1, 64), "sequence": (1, 512)}, "where batch*sequence < 1000|where sequence*batch < 1000"),
        ("area", {}, "which dims do not keep"),
        ("tenth", {"sequence": (1, 512)}, "the model branches on sequence: what was traced holds for"),
        ("shape", {"batch": (1, 64), "sequence": (1, 512)}, "the model branches on sizes"),
        ("sum", {"batch": (1, 64), "sequence": (1, 97)}, "the model branches on sizes"),
    ],
)
def test_dims_that_take_another_branch_are_refused(by: str, dims: dict[str, Any], message: str) -> None:
    with pytest.raises(TracingError, match=message.replace("*", r"\*")):
        traced(by, **dims)


@pytest.mark.parametrize("by", ["area", "tenth", "shape", "sum"])
def test_within_a_branch_results_are_the_models(by: str) -> None:
    graph = traced(by, batch=(1, 3), sequence=(1, 9))
    for sizes in ((2, 6), (3, 9), (1, 1)):
        x = torch.randn(*sizes, 4)
        assert torch.equal(run(graph, {"x": x})["output"], Branches(by)(x))


def test_ranges_that_nobody_asked_for_end_where_the_branch_does() -> None:
    assert traced("tenth").dims["sequence"] == DimRange(1, 9)
    graph = trace(Shapes().eval(), {"x": torch.randn(2, 6, 4)}, {"x": ("batch", "sequence", None)})
    assert graph.dims["sequence"] == DimRange(1, 9)
    config = Mamba2Config(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    source = transformers_source(Mamba2ForCausalLM(config).eval())
    graph = trace(source.module, source.inputs, source.axes, {}, source.dims, source.truths)
    assert graph.dims["sequence"].max in (31, 32)  # one chunk, which is padded in the trace


# Modules that change themselves


def phi() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "short_factor": [1.0] * 8,
        "long_factor": [3.0 + index for index in range(8)],
    }  # fmt: skip
    config = Phi3Config(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
        eos_token_id=2, original_max_position_embeddings=64, max_position_embeddings=512, rope_parameters=rope,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


def graph_of(model: nn.Module) -> graphopt.Graph:
    source = transformers_source(model)
    return trace(source.module, source.inputs, source.axes, {}, source.dims, source.truths)


def test_a_module_is_as_it_was_after_its_trace() -> None:
    """Frequencies for long texts are attributes that forward sets; those of the trace are fake tensors."""
    model, other = phi(), phi()
    names = [set(vars(part)) for part in model.modules()]
    graph_of(model)
    assert [set(vars(part)) for part in model.modules()] == names
    assert graph_of(model).text() == graph_of(other).text()
    ids = torch.randint(1, 100, (1, 100))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize("cache", [{}, {"layout": "static", "max_length": 128}], ids=["growing", "static"])
def test_keys_that_depend_on_the_length_of_the_text_are_not_kept(cache: dict[str, Any]) -> None:
    graph = graph_of(phi())
    passes = [{"kind": "canonicalize"}, {"kind": "fuse_attention"}, {"kind": "insert_kv_cache", **cache}]
    with pytest.raises(GraphError, match="depends on the length of the whole text") as error:
        run_passes(graph, load_passes(passes))
    assert "rotary" in str(error.value.where)
