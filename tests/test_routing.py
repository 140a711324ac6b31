"""Sorting, counting, grouped products and indexing in ONNX, against torch; and a mixture of experts made of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import pytest
import torch
import transformers.integrations.moe  # registers the grouped product
from torch import Tensor, nn

from graphopt.backends.onnx.dialects import STANDARD
from graphopt.backends.onnx.routing import ROUTING
from graphopt.dims import Dim
from graphopt.errors import LoweringError, TracingError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.tensors import DimRange, TensorType, Weight
from graphopt.tracing import trace
from tests.onnx_helpers import ONNXRUNTIME, assert_same, check_everywhere, emit, run_onnxruntime, run_reference
from tests.test_lowerings import F32, I64, B, S, graph_of

assert transformers.integrations.moe

I32 = torch.int32
X = {"x": TensorType(F32, (B, S, 4))}
GROUPED = "transformers.grouped_mm_fallback.default"
PUT = "aten.index_put.default"


def at(*sizes: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Random ``x: f32[batch, sequence, 4]``, at the traced size and another unless said otherwise."""
    return [{"x": torch.randn(batch, sequence, 4)} for batch, sequence in sizes or ((2, 5), (3, 7))]


def in_onnxruntime(graph: Graph, given: Sequence[Mapping[str, Tensor]], tolerance: float = 1e-5) -> None:
    """Both dialects in onnxruntime: where the reference evaluator cannot, or orders equal elements otherwise."""
    for dialect in (STANDARD, ONNXRUNTIME):
        model = emit(graph, dialect)
        for inputs in given:
            assert_same(graph, inputs, run_onnxruntime(model, inputs), tolerance)


# Sorting


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_sort(dim: int, descending: bool) -> None:
    check_everywhere(graph_of("aten.sort.default", X, {"self": "%x", "dim": dim, "descending": descending}, {}), at())


@pytest.mark.parametrize("dtype", [F32, I64, I32, torch.float64, torch.uint8])
@pytest.mark.parametrize("descending", [False, True])
def test_equal_elements_stay_in_order_in_a_stable_sort(dtype: torch.dtype, descending: bool) -> None:
    args = {"self": "%x", "dim": 1, "stable": True, "descending": descending}
    graph = graph_of("aten.sort.stable", {"x": TensorType(dtype, (B, S))}, args, {})
    in_onnxruntime(graph, [{"x": torch.randint(0, 3, shape).to(dtype)} for shape in ((2, 40), (3, 7), (1, 1))])


def test_numbers_without_an_order_are_sorted_as_in_torch() -> None:
    graph = graph_of("aten.sort.default", {"x": TensorType(F32, (S,))}, {"self": "%x"}, {})
    x = torch.tensor([1.0, float("nan"), -float("inf"), 2.0, float("inf"), -1.0])
    for dialect in (STANDARD, ONNXRUNTIME):
        got = run_onnxruntime(emit(graph, dialect), {"x": x})[0]
        torch.testing.assert_close(torch.from_numpy(got), x.sort()[0], equal_nan=True)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("dim", "k"), [(2, 1), (2, 4), (-1, 2), (1, 3), (1, S), (0, 1)])
def test_topk(dim: int, k: Any, largest: bool) -> None:
    check_everywhere(graph_of("aten.topk.default", X, {"self": "%x", "k": k, "dim": dim, "largest": largest}, {}), at())


def test_topk_in_any_order_has_the_same_elements() -> None:
    graph = graph_of("aten.topk.default", X, {"self": "%x", "k": 3, "dim": 2, "sorted": False}, {})
    graph.outputs = {"y": graph.insert("aten.sum.dim_IntList", {"self": graph.outputs["y0"], "dim": (2,)}).output}
    check_everywhere(graph, at())


@pytest.mark.parametrize(
    ("op", "args", "type"),
    [
        ("aten.sort.default", {"dim": 0}, TensorType(torch.bool, (S,))),
        ("aten.sort.default", {}, TensorType(F32, ())),
        ("aten.topk.default", {"k": 1}, TensorType(F32, ())),
    ],
    ids=["sort of truths", "sort of one number", "topk of one number"],
)
@pytest.mark.xfail(strict=True, reason="TopK takes no booleans and no tensor without dimensions")
def test_sorts_that_topk_does_not_take(op: str, args: dict[str, Any], type: TensorType) -> None:
    graph = graph_of(op, {"s": TensorType(F32, (S,)), "x": type}, {"self": "%x", **args}, {})
    shape = (5,) if type.shape else ()
    check_everywhere(graph, [{"s": torch.ones(5), "x": (torch.rand(shape) < 0.5).to(type.dtype)}])


# Counting


def histogram(bins: int, low: float, high: float, dtype: torch.dtype = F32) -> Graph:
    args = {"self": "%x", "bins": bins, "min": low, "max": high}
    return graph_of("aten.histc.default", {"x": TensorType(dtype, (S,))}, args, {})


@pytest.mark.parametrize("dtype", [F32, torch.float64])
@pytest.mark.parametrize(("bins", "low", "high"), [(4, 0, 4), (8, 0, 8), (3, -1, 2), (1, 0, 1), (128, 0, 128)])
def test_elements_at_the_bounds_of_bins_are_counted_as_in_torch(
    bins: int, low: int, high: int, dtype: torch.dtype
) -> None:
    """Each bound, and numbers outside; the last bound belongs to the last bin."""
    edges = torch.linspace(low, high, bins + 1, dtype=dtype)
    outside = torch.tensor([low - 0.001, low - 5, high + 0.001, high + 5], dtype=dtype)
    given = [{"x": torch.cat(parts)} for parts in ((edges, outside, edges[-1:]), (edges, edges + 0.5), (outside,))]
    check_everywhere(histogram(bins, low, high, dtype), given, 0)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("dtype", [F32, I64])
def test_places_among_boundaries_are_torchs(dtype: torch.dtype, right: bool) -> None:
    """As many boundaries as there may be: torch.onnx counts the steps of its search by the example's."""
    types = {"x": TensorType(dtype, (B, S)), "b": TensorType(dtype, (Dim.named("n"),))}
    graph = graph_of("aten.bucketize.Tensor", types, {"self": "%x", "boundaries": "%b", "right": right}, {})
    given = [
        {"x": torch.arange(24).reshape(2, 12).to(dtype), "b": torch.arange(0, 3 * n, 3).to(dtype)} for n in (1, 4, 90)
    ]
    if dtype == F32:
        given += [{"x": torch.tensor([[1.5, torch.nan, torch.inf]]), "b": torch.tensor([0.0, 1.5, 1.5, 2.0])}]
    in_onnxruntime(graph, given, 0)


@pytest.mark.parametrize(
    "options", [{}, {"right": True}, {"side": "right", "out_int32": True}, {"side": "left"}], ids=str
)
def test_places_in_sorted_rows_are_torchs(options: dict[str, Any]) -> None:
    types = {"x": TensorType(F32, (B, S)), "b": TensorType(F32, (B, Dim.named("n")))}
    graph = graph_of("aten.searchsorted.Tensor", types, {"self": "%x", "sorted_sequence": "%b", **options}, {})
    given = [
        {"x": torch.randn(2, 5).round(decimals=1), "b": torch.randn(2, n).round(decimals=1).sort()[0]} for n in (1, 40)
    ]
    in_onnxruntime(graph, given, 0)


@pytest.mark.parametrize("experts", [2, 3, 7, 8, 60, 64, 128])
def test_experts_are_counted_by_their_numbers(experts: int) -> None:
    """``histc(ids, experts, 0, experts - 1)``, as transformers counts the tokens of each expert."""
    graph = histogram(experts, 0, experts - 1)
    every = torch.arange(experts).float()
    check_everywhere(graph, [{"x": every}, {"x": every.repeat(3)[2:]}, {"x": every[-1:].repeat(5)}], 0)


def test_a_histogram_of_no_elements() -> None:
    graph = histogram(3, 0, 1)
    graph.dims["sequence"] = DimRange(0, None)
    in_onnxruntime(graph, [{"x": torch.zeros(0)}])


@pytest.mark.parametrize(
    ("bins", "low", "high", "x"),
    [(8, 0, 7, [torch.tensor(7.0).nextafter(torch.tensor(0.0)).item()]), (10, 0, 3, [0.9, 1.8, 2.1])],
    ids=["just below the last bound", "at a bound that is no binary fraction"],
)
@pytest.mark.xfail(
    strict=True, reason="torch multiplies by the bins, then divides by the range; the last bin takes what is over"
)
def test_elements_where_rounding_matters(bins: int, low: int, high: int, x: list[float]) -> None:
    check_everywhere(histogram(bins, low, high), [{"x": torch.tensor(x)}], 0)


def test_bins_between_the_smallest_and_the_largest_element_are_refused() -> None:
    with pytest.raises(LoweringError, match="bins between the smallest and the largest element"):
        emit(histogram(5, 0, 0))


# Grouped products


def grouped(groups: int) -> Graph:
    """``x: f32[sequence, 4]`` by groups that end at ``ends``."""
    inputs = {"x": TensorType(F32, (S, 4)), "ends": TensorType(I32, (groups,))}
    args = {"input": "%x", "weight": "%w", "offs": "%ends"}
    return graph_of(GROUPED, inputs, args, {"w": torch.randn(groups, 4, 8)})


ENDS = [(2, 3, 6), (0, 0, 6), (6, 6, 6), (0, 6, 6), (0, 3, 6), (3, 3, 6), (3, 6, 6), (1, 5, 6)]


@pytest.mark.parametrize("ends", ENDS, ids=lambda ends: "-".join(map(str, ends)))
def test_rows_of_each_group_meet_their_own_matrix(ends: tuple[int, ...]) -> None:
    """Groups without rows first, last and between."""
    given = [{"x": torch.randn(6 * n, 4), "ends": torch.tensor(ends, dtype=I32) * n} for n in (1, 2)]
    check_everywhere(grouped(3), given)


@pytest.mark.parametrize("ends", ENDS[:3], ids=lambda ends: "-".join(map(str, ends)))
def test_torchs_own_grouped_product_is_the_same(ends: tuple[int, ...]) -> None:
    """It takes bf16 only, which onnxruntime does not multiply on CPU."""
    inputs = {"x": TensorType(F32, (S, 8)), "ends": TensorType(I32, (3,))}
    graph = graph_of("aten.to.dtype", inputs, {"self": "%x", "dtype": torch.bfloat16}, {})
    weight = graph.add_weight("w", Weight.of(torch.randn(3, 8, 8).bfloat16()))
    args = {"self": graph.outputs["y0"], "mat2": weight, "offs": graph.inputs["ends"]}
    product = graph.insert("aten._grouped_mm.default", args).output
    graph.outputs = {"y": graph.insert("aten.to.dtype", {"self": product, "dtype": F32}).output}
    model = emit(graph)
    onnx.checker.check_model(model, full_check=True)
    for rows in (6, 12):
        given = {"x": torch.randn(rows, 8), "ends": torch.tensor(ends, dtype=I32) * rows // 6}
        assert_same(graph, given, run_reference(model, given), 0.02)


def test_one_group_and_one_row() -> None:
    check_everywhere(grouped(1), [{"x": torch.randn(n, 4), "ends": torch.tensor([n], dtype=I32)} for n in (1, 5)])


@pytest.mark.xfail(strict=True, reason="rows behind the last group are left out, where torch gives zeros")
def test_rows_behind_the_last_group_are_zeros() -> None:
    check_everywhere(grouped(3), [{"x": torch.randn(6, 4), "ends": torch.tensor([1, 3, 4], dtype=I32)}])


def test_a_grouped_product_into_another_dtype_is_refused() -> None:
    bf16 = torch.bfloat16
    inputs = {"x": TensorType(bf16, (S, 8)), "ends": TensorType(I32, (3,))}
    args = {"self": "%x", "mat2": "%w", "offs": "%ends", "out_dtype": bf16}
    with pytest.raises(LoweringError, match="a bias or another dtype"):
        emit(graph_of("aten._grouped_mm.default", inputs, args, {"w": torch.randn(3, 8, 8).bfloat16()}))


# Indexing


ROWS = torch.tensor([0, 1, -1, -2, 0])
GRID = torch.tensor([[0, -1], [1, 0]])
COLUMN = torch.tensor([[0], [-1]])
INDICES: dict[str, tuple[Any, ...]] = {
    "one": ("%rows",),
    "one of two dimensions": ("%grid",),
    "two": ("%rows", "%rows"),
    "two of two dimensions": ("%grid", "%grid"),
    "two that broadcast": ("%column", "%rows"),
    "three": ("%grid", "%grid", "%grid"),
    "three that broadcast": ("%column", "%rows", "%column"),
    "a number": ("%number",),
    "a number and rows": ("%number", "%rows"),
    "behind an axis": (None, "%rows"),
    "a grid behind an axis": (None, "%grid"),
    "behind two axes": (None, None, "%rows"),
    "before an axis": ("%rows", None),
    "two behind an axis": (None, "%rows", "%rows"),
    "two around an axis": ("%rows", None, "%rows"),
    "two that broadcast around an axis": ("%column", None, "%rows"),
}


def narrow(name: str) -> Any:
    """The index with numbers of i32; the exporter's form of what has no lowering takes i64 only."""
    exported = name in ("two behind an axis", "two around an axis", "two that broadcast around an axis")
    marks = pytest.mark.xfail(exported, strict=True, reason="GatherND takes indices of i64 only")
    return pytest.param(INDICES[name], I32, id=f"{name}, i32", marks=marks)


@pytest.mark.parametrize(
    ("indices", "dtype"),
    [*(pytest.param(indices, I64, id=name) for name, indices in INDICES.items()), *map(narrow, INDICES)],
)
def test_index(indices: tuple[Any, ...], dtype: torch.dtype) -> None:
    weights = {"rows": ROWS, "grid": GRID, "column": COLUMN, "number": torch.tensor(-1)}
    used = {name: tensor.to(dtype) for name, tensor in weights.items() if f"%{name}" in indices}
    check_everywhere(graph_of("aten.index.Tensor", X, {"self": "%x", "indices": indices}, used), at())


@pytest.mark.parametrize("shape", [(S,), (B, S), (1, S)])
def test_an_index_that_is_an_input(shape: tuple[Any, ...]) -> None:
    inputs = X | {"k": TensorType(I64, shape)}
    for indices in (("%k",), (None, None, "%k"), ("%k", "%k")):
        graph = graph_of("aten.index.Tensor", inputs, {"self": "%x", "indices": indices}, {})
        given = [
            found | {"k": torch.randint(-2, 2, [n if n == 1 else found["x"].shape[(B, S).index(n)] for n in shape])}
            for found in at()
        ]
        check_everywhere(graph, given)


def test_the_row_of_each_batch() -> None:
    """``x[arange(batch), last]``, as poolers take one token of each row."""

    class Pools(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            last = (x[:, :, 0] > 0).to(torch.int32).argmax(-1)
            return x[torch.arange(x.shape[0]), last]

    graph = trace(Pools().eval(), at()[0], {"x": ("batch", "sequence", None)})
    check_everywhere(graph, at((2, 5), (3, 7), (1, 1)))


@pytest.mark.parametrize("dtype", [torch.bool, I64, torch.float64])
def test_an_index_into_other_elements_than_floats(dtype: torch.dtype) -> None:
    graph = graph_of(
        "aten.index.Tensor", {"x": TensorType(dtype, (S, 3))}, {"self": "%x", "indices": ("%g", "%g")}, {"g": GRID}
    )
    check_everywhere(graph, [{"x": torch.randint(0, 2, (n, 3)).to(dtype)} for n in (2, 5)])


# Assignment


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("rows", [(0, 1), (1, -1, 0), (-2,)], ids=str)
@pytest.mark.parametrize("values", [(), (4,), (1, 4), (S, 4)], ids=["number", "row", "one row", "all"])
def test_assignment_to_rows(rows: tuple[int, ...], values: tuple[Any, ...], accumulate: bool) -> None:
    inputs = {"x": TensorType(F32, (B, S, 4)), "v": TensorType(F32, values)}
    args = {"self": "%x", "indices": ("%r",), "values": "%v", "accumulate": accumulate}
    graph = graph_of(PUT, inputs, args, {"r": torch.tensor(rows)})
    given = [
        found | {"v": torch.randn([found["x"].shape[1] if n is S else n for n in values])}
        for found in at((3, 5), (4, 7))
    ]
    check_everywhere(graph, given)


@pytest.mark.parametrize("dtype", [F32, torch.float64, I64, I32])
def test_rows_that_come_twice_are_added(dtype: torch.dtype) -> None:
    inputs = {"x": TensorType(dtype, (S, 2)), "v": TensorType(dtype, (5, 2))}
    args = {"self": "%x", "indices": ("%r",), "values": "%v", "accumulate": True}
    graph = graph_of(PUT, inputs, args, {"r": torch.tensor([1, 0, 1, -1, 1])})
    given = [{"x": torch.randint(0, 9, (n, 2)).to(dtype), "v": torch.randint(0, 9, (5, 2)).to(dtype)} for n in (3, 6)]
    check_everywhere(graph, given, 0)


@pytest.mark.parametrize("indices", [("%g", "%g"), (None, "%g"), ("%g", None, "%g")], ids=str)
def test_assignment_to_more_than_rows(indices: tuple[Any, ...]) -> None:
    args = {"self": "%x", "indices": indices, "values": "%v"}
    graph = graph_of(PUT, X, args, {"g": torch.tensor([0, 1]), "v": torch.tensor(7.0)})
    check_everywhere(graph, at())


@pytest.mark.xfail(strict=True, reason="ScatterND takes indices of i64 only")
def test_assignment_by_narrow_indices() -> None:
    args = {"self": "%x", "indices": ("%r",), "values": "%v"}
    check_everywhere(graph_of(PUT, X, args, {"r": torch.tensor([0, 1], dtype=I32), "v": torch.tensor(7.0)}), at())


@pytest.mark.xfail(strict=True, reason="onnxruntime's ScatterND on CPU adds no f16")
def test_rows_of_half_precision_are_added() -> None:
    inputs = {"x": TensorType(torch.float16, (S, 2))}
    args = {"self": "%x", "indices": ("%r",), "values": "%v", "accumulate": True}
    graph = graph_of(PUT, inputs, args, {"r": torch.tensor([0, 0]), "v": torch.ones(2, 2, dtype=torch.float16)})
    in_onnxruntime(graph, [{"x": torch.rand(3, 2).half()}])


# All together


class Experts(nn.Module):
    """A mixture of experts, two for each token, routed by a sort."""

    def __init__(self, experts: int = 5) -> None:
        super().__init__()
        self.gate = nn.Linear(4, experts)
        self.weight = nn.Parameter(torch.randn(experts, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4)
        scores, chosen = self.gate(tokens).softmax(-1).topk(2, -1)
        order = chosen.reshape(-1).sort(stable=True)
        experts = self.weight.shape[0]
        ends = torch.histc(order[0].float(), experts, 0, experts - 1).cumsum(0).to(torch.int32)
        products = torch.ops.transformers.grouped_mm_fallback(tokens[order[1] // 2], self.weight, ends)
        weighted = products * scores.reshape(-1)[order[1]].unsqueeze(-1)
        result = torch.zeros(tokens.shape[0], 8).index_put((order[1] // 2,), weighted, accumulate=True)
        return result.reshape(*x.shape[:2], 8)

    def plain(self, x: Tensor) -> Tensor:
        """The same, token by token."""
        result = torch.zeros(*x.shape[:2], 8)
        for place in ((b, s) for b in range(x.shape[0]) for s in range(x.shape[1])):
            scores, chosen = self.gate(x[place]).softmax(-1).topk(2)
            result[place] = sum(
                score * (x[place] @ self.weight[expert]) for score, expert in zip(scores, chosen, strict=True)
            )
        return result


def test_a_mixture_of_experts() -> None:
    module = Experts().eval()
    given = at((2, 5), (3, 7), (1, 1), (1, 2))
    graph = trace(module, given[0], {"x": ("batch", "sequence", None)})
    check_everywhere(graph, given)
    with torch.no_grad():
        for inputs in given:
            got = run_onnxruntime(emit(graph, ONNXRUNTIME), inputs)[0]
            torch.testing.assert_close(torch.from_numpy(got), module.plain(inputs["x"]), atol=1e-5, rtol=1e-5)


class Splits(nn.Module):
    """Rows split by counts that depend on data, each part with a matrix of its own (``graphopt.segments``)."""

    def __init__(self, product: Callable[[Any, Any], Any] = nn.functional.linear) -> None:
        super().__init__()
        self.weight, self.product = nn.Parameter(torch.randn(3, 8, 4)), product

    def forward(self, x: Tensor) -> Tensor:
        groups = (x[:, 0] * 2).floor().clamp(0, 2)
        counts = torch.stack([(groups == index).sum() for index in range(3)])
        rows: Any = x[groups.sort(stable=True)[1]]
        parts = rows.split(counts.tolist())
        return torch.cat([self.product(part, self.weight[index]) for index, part in enumerate(parts)])


def test_rows_split_by_counts_are_a_grouped_product() -> None:
    module = Splits().eval()
    graph = trace(module, {"x": torch.randn(5, 4)}, {"x": ("rows", None)})
    assert graph.op_counts()[GROUPED] == 1
    given = [
        {"x": x} for n in (1, 2, 12) for x in (torch.randn(n, 4), torch.full((n, 4), 9.0), torch.full((n, 4), -9.0))
    ]
    for inputs in given:
        torch.testing.assert_close(run(graph, inputs)["output"], module(**inputs))
    check_everywhere(graph, given)


def test_rows_split_by_counts_and_used_otherwise_are_refused() -> None:
    module = Splits(lambda part, weight: nn.functional.linear(part, weight).relu()).eval()
    with pytest.raises(TracingError, match="has a number of rows that depends on data") as error:
        trace(module, {"x": torch.randn(5, 4)}, {"x": ("rows", None)})
    assert "test_routing.py" in str(error.value.where)


def test_a_grouped_product_needs_no_transformers() -> None:
    script = """if True:
        import torch
        from torch import nn
        from graphopt import trace
        class Splits(nn.Module):
            def forward(self, x, w):
                counts = torch.stack([(x[:, 0] > 0).sum(), (x[:, 0] <= 0).sum()])
                parts = x.split(counts.tolist())
                return torch.cat([nn.functional.linear(part, w[i]) for i, part in enumerate(parts)])
        trace(Splits().eval(), {"x": torch.randn(5, 4), "w": torch.randn(2, 8, 4)}, {"x": ("rows", None)})
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_lowering_is_tested_here() -> None:
    tested = {
        "aten.sort",
        "aten.topk",
        "aten.histc",
        "aten.bucketize",
        "aten.searchsorted",
        GROUPED.rpartition(".")[0],
        "aten._grouped_mm",
        "aten.index",
        "aten.index_put",
    }
    assert ROUTING.keys() == tested
