"""Decoders with a cache for TensorRT: built by TensorRT-RTX without a GPU, the emitted model run step by step beside eager."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt
from benchmarks.tensorrt_models import with_cache
from benchmarks.zoo.catalog import ANIMALS
from benchmarks.zoo.small import source as small_source
from graphopt.artifact import read_graph
from graphopt.backends.tensorrt import backend as backends
from graphopt.backends.tensorrt import flavours
from graphopt.backends.tensorrt.backend import TensorRtRtxBackend
from graphopt.backends.tensorrt.device_cache import DeviceCache
from graphopt.decode_parity import decode_parity
from graphopt.errors import ParityError, PipelineError
from graphopt.ir import Graph
from graphopt.pipeline import Pass
from graphopt.runtime import Decoder
from graphopt.runtime.engine import Engine
from graphopt.schemas.pipeline import TargetConfig
from graphopt.schemas.report import PassReport
from graphopt.sources import Source

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed (make env does)"
)
LENGTH = 24
LAYOUTS: dict[str, dict[str, Any]] = {
    "growing": {"layout": "growing"},
    "static": {"layout": "static", "max_length": LENGTH, "logits": "last"},
    "windows": {"layout": "static", "max_length": LENGTH, "window": True},
}


@pytest.fixture
def old_importer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "parsed_ops", lambda flavour: lambda op: op not in flavours._SINCE)


@pytest.fixture(params=["importer of now", "importer of 10.6"])
def importer(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name == "importer of 10.6":
        request.getfixturevalue("old_importer")
    return name


def model(name: str) -> Source:
    return small_source(next(animal for animal in ANIMALS if animal.name == name), "eager")


class Last:
    """Keeps the graph that passes made."""

    graph: Graph

    def before(self, step: Pass, graph: Graph) -> None: ...

    def after(self, step: Pass, graph: Graph, report: PassReport) -> None:
        self.graph = graph


def decoder(
    name: str, layout: str, folder: Path, *steps: dict[str, Any], watch: Last | None = None,
    cache_lengths: tuple[int, ...] | None = None, **options: Any,
) -> graphopt.Compiled:  # fmt: skip
    """``options`` are insert_kv_cache's."""
    own = {"compute_capabilities": ["8.9"], "optimization_level": 0, "cache_lengths": cache_lengths}
    cache = LAYOUTS[layout] | options
    return graphopt.compile(
        model(name), folder, passes=[*with_cache(**cache), *steps],
        target={"backend": "tensorrt_rtx", "options": own},
        dims={"batch": (1, 4), "sequence": (1, cache.get("max_length", LENGTH))},
        instruments=[watch] if watch else [],
    )  # fmt: skip


MODELS = {
    "LlamaForCausalLM": ("static", "growing"),
    "MistralForCausalLM": ("static", "windows"),
    "GptOssForCausalLM": ("static", "growing"),
    "Llama4ForCausalLM": ("static",),
}


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name, layouts in MODELS.items() for layout in layouts])
def test_steps_are_eagers_whole_text(name: str, layout: str, importer: str, tmp_path: Path) -> None:
    """The proof runs ragged rows through a prompt, a chunk on top of it and single tokens."""
    made = decoder(name, layout, tmp_path / "e")
    assert made.report.emitted is not None
    assert made.report.emitted.worst < 1e-4
    updates = made.report.engine_ops.get("KV_CACHE_UPDATE", 0)
    caches = sum(name.startswith("past_key_values.") for name in made.manifest.inputs)
    assert updates == (caches if layout != "growing" and importer == "importer of now" else 0)


@pytest.mark.parametrize("layout", ["static", "growing"])
def test_a_cache_in_half_precision(layout: str, importer: str, tmp_path: Path) -> None:
    """Attention reads the buffers as they are: no cache is cast."""
    made = decoder("LlamaForCausalLM", layout, tmp_path / "e", {"kind": "cast"}, dtype="fp16")
    assert made.report.emitted is not None
    assert made.report.emitted.holds
    caches = [spec for name, spec in made.manifest.inputs.items() if name.startswith("past_key_values.")]
    assert {spec.dtype for spec in caches} == {"f16"}
    graph = read_graph(tmp_path / "e")
    for node in graph.nodes:
        if node.op == "graphopt.attention.default":
            kinds = {node.args[part].producer.op for part in ("k", "v")}
            assert kinds == {"graphopt.kv_cache_update.default" if layout == "static" else "aten.cat.default"}


def test_a_bias_over_a_buffer(importer: str, tmp_path: Path) -> None:
    """ALiBi: a bias of each position."""
    made = decoder("BloomForCausalLM", "static", tmp_path / "e")
    assert made.report.emitted is not None
    assert made.report.emitted.holds


def test_int8_caches_are_refused_by_old_importers(importer: str, tmp_path: Path) -> None:
    ids = torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    with pytest.raises(Exception, match="cache") as error:
        decoder("LlamaForCausalLM", "static", tmp_path / "e", dtype="int8", calibration={"data": data})
    assert isinstance(error.value, graphopt.errors.GraphoptError)


# The runtime, with onnxruntime in the engine's place


def stood_in(watch: Last, made: graphopt.Compiled, **options: Any) -> Engine:
    """``options`` are the target's that the emission depends on."""
    backend = TensorRtRtxBackend(TargetConfig(backend="tensorrt_rtx", options=options))
    found = backend.stand_in(watch.graph, made.engine)
    assert found is not None
    return found


@pytest.fixture
def stand_in(importer: str, layout: str, tmp_path: Path) -> Engine:
    watch = Last()
    made = decoder("MistralForCausalLM", layout, tmp_path / "e", watch=watch)
    return stood_in(watch, made)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_tokens_are_eagers(stand_in: Engine) -> None:
    """Rows of different lengths in one batch."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 99, (count,), generator=generator).tolist() for count in (5, 2, 7)]
    parity = decode_parity(model("MistralForCausalLM").module, stand_in, prompts, steps=10)
    assert [row.equal for row in parity.rows] == [10, 10, 10]
    assert parity.worst_drift < 1e-4


@pytest.mark.parametrize("layout", ["static", "growing"])
def test_rows_may_leave(stand_in: Engine) -> None:
    ids = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        whole = model("MistralForCausalLM").module(input_ids=ids).logits
    texts = Decoder(stand_in, 3)
    texts.feed(ids[:, :6].tolist())
    texts.select(torch.tensor([2, 0]))
    logits = texts.feed(ids[[2, 0], 6:9].tolist())
    torch.testing.assert_close(logits, whole[[2, 0], 8], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["static"])
def test_buffers_stay_where_they_are(stand_in: Engine) -> None:
    cache = stand_in.new_cache(2)
    before = {name: tensor.data_ptr() for name, tensor in cache.tensors.items()}
    for past in (0, 3, 4):
        width = 3 if past == 0 else 1
        feeds = {"input_ids": torch.full((2, width), 7), "past_lengths": torch.tensor([past, past])}
        cache.step(feeds | ({"new_lengths": torch.tensor([width, width])} if "new_lengths" in stand_in.inputs else {}))
    assert {name: tensor.data_ptr() for name, tensor in cache.tensors.items()} == before
    filled = next(iter(cache.tensors.values())).abs().sum((1, 3)) > 0
    assert filled.tolist() == [[place < 5 for place in range(LENGTH)]] * 2


@pytest.mark.parametrize("layout", ["static"])
def test_a_whole_cache_goes_in_and_comes_out(stand_in: Engine) -> None:
    """The engine called as a function."""
    given = stand_in.cache_layout.empty(1)
    feeds = {"input_ids": torch.tensor([[5, 6, 7]]), "past_lengths": torch.tensor([0])}
    feeds |= {"new_lengths": torch.tensor([3])} if "new_lengths" in stand_in.inputs else {}
    results = stand_in(**feeds, **given)
    for past, present in stand_in.cache_layout.names.items():
        assert results[present].shape == given[past].shape
        assert not given[past].any()  # what was given stays as it was
        assert results[present][:, :, :3].any()
        assert not results[present][:, :, 3:].any()


# Buffers of several lengths


def with_lengths(name: str, layout: str, folder: Path, lengths: tuple[int, ...] = (9, 4), **options: Any) -> Engine:
    """The stand-in of an engine whose buffers have 4, 9 or all 24 positions."""
    watch = Last()
    made = decoder(name, layout, folder, watch=watch, cache_lengths=lengths, **options)
    assert made.report.emitted is not None
    assert made.report.emitted.holds
    return stood_in(watch, made, cache_lengths=lengths)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("LlamaForCausalLM", "static"), ("GptOssForCausalLM", "windows"), ("BloomForCausalLM", "static")],
)
@pytest.mark.usefixtures("old_importer")
def test_buffers_grow_with_the_texts(name: str, layout: str, tmp_path: Path) -> None:
    """Rows of different lengths, prompts that begin in the shortest buffers and in longer ones; tokens are eager's."""
    engine = with_lengths(name, layout, tmp_path / "e")
    generator = torch.Generator().manual_seed(5)
    for counts in ((2, 1, 3), (5, 2, 7), (12, 3, 1)):
        prompts = [torch.randint(3, 99, (count,), generator=generator).tolist() for count in counts]
        parity = decode_parity(model(name).module, engine, prompts, steps=10)
        assert [row.equal for row in parity.rows] == [10, 10, 10]
        assert parity.worst_drift < 1e-4


@pytest.mark.usefixtures("old_importer")
def test_buffers_are_the_shortest_that_hold_the_texts(tmp_path: Path) -> None:
    """In growing they keep what they hold, and windows' own buffers stay as they are; so do those that are selected."""
    engine = with_lengths("GptOssForCausalLM", "windows", tmp_path / "e")
    texts = Decoder(engine, 2)
    windows = {name: tensor.shape[2] for name, tensor in texts.cache.tensors.items()}
    whole = [name for name in windows if name in texts.layout.whole]
    seen = []
    for tokens in ([[5, 6], [7]], [[8], [9]], [[8], [9]], [[3] * 5, [4]], [[3], [4]], [[3], [4]]):
        texts.feed(tokens)
        seen.append({texts.cache.tensors[name].shape[2] for name in whole})
        assert all(texts.cache.tensors[name].shape[2] == size for name, size in windows.items() if name not in whole)
    assert 0 < len(whole) < len(windows)
    assert seen == [{4}, {4}, {4}, {9}, {24}, {24}]
    texts.select(torch.tensor([1]))
    assert {texts.cache.tensors[name].shape[2] for name in whole} <= {24}


@pytest.mark.usefixtures("old_importer")
def test_a_whole_cache_may_be_any_of_the_lengths(tmp_path: Path) -> None:
    """The engine called as a function, with buffers as its contract has them."""
    engine = with_lengths("LlamaForCausalLM", "static", tmp_path / "e")
    feeds = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "past_lengths": torch.tensor([0]),
        "new_lengths": torch.tensor([3]),
    }
    results = engine(**feeds, **engine.cache_layout.empty(1))
    texts = Decoder(engine, 1)
    torch.testing.assert_close(texts.feed([[5, 6, 7]]), results["logits"][:, 0], atol=1e-5, rtol=1e-5)
    assert {tensor.shape[2] for tensor in texts.cache.tensors.values()} == {4}


@pytest.mark.usefixtures("old_importer")
def test_the_proof_runs_in_buffers_of_all_lengths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fault in the shortest ones alone is found."""
    put = DeviceCache.put

    def wrong(cache: DeviceCache, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        results = put(cache, feeds)
        is_short = cache.tensors[cache.layout.whole[0]].shape[2] == 4
        return {name: tensor * 1.01 if is_short else tensor for name, tensor in results.items()}

    made = decoder("LlamaForCausalLM", "static", tmp_path / "right", cache_lengths=(9, 4))
    assert made.manifest.cache_lengths == made.engine.manifest.cache_lengths == [4, 9, LENGTH]
    monkeypatch.setattr(DeviceCache, "put", wrong)
    with pytest.raises(ParityError, match="the emitted model"):
        decoder("LlamaForCausalLM", "static", tmp_path / "e", cache_lengths=(9, 4))


@pytest.mark.usefixtures("old_importer")
def test_only_positions_are_cut(tmp_path: Path) -> None:
    """Sinks are as many as heads, here as many as positions."""
    engine = with_lengths("GptOssForCausalLM", "static", tmp_path / "e", lengths=(2,), max_length=4)
    texts = Decoder(engine, 1)
    logits = [texts.feed([[token]]) for token in (5, 6, 7)]
    with torch.no_grad():
        whole = model("GptOssForCausalLM").module(input_ids=torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(torch.stack(logits, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_size_may_have_a_name_like_theirs(tmp_path: Path) -> None:
    made = decoder("LlamaForCausalLM", "growing", tmp_path / "e", past="cache_length")
    assert made.report.emitted is not None
    assert made.report.emitted.holds
    assert made.manifest.cache_lengths == []


@pytest.mark.parametrize(
    ("name", "steps", "lengths", "reason"),
    [
        ("BertModel", TensorRtRtxBackend.standard_passes, (4,), "the model has no static cache"),
        ("LlamaForCausalLM", with_cache(layout="growing"), (4,), "the model has no static cache"),
        (
            "LlamaForCausalLM",
            with_cache(**LAYOUTS["static"]),
            (4, LENGTH),
            "24 is not below the cache's max_length, 24",
        ),
        ("LlamaForCausalLM", with_cache(**LAYOUTS["static"]), (0,), "greater than or equal to 1"),
        ("MistralForCausalLM", with_cache(**LAYOUTS["windows"]), (4,), "all buffers of the cache are of windows"),
    ],
    ids=["encoder", "growing", "too long", "none", "windows"],
)
@pytest.mark.usefixtures("old_importer")
def test_lengths_that_are_refused(
    name: str, steps: list[dict[str, Any]], lengths: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    target = {"backend": "tensorrt_rtx", "options": {"cache_lengths": lengths}}
    dims = {"batch": (1, 4), "sequence": (1, LENGTH)}
    with pytest.raises(PipelineError, match=reason) as error:
        graphopt.compile(model(name), tmp_path / "e", passes=steps, target=target, dims=dims)
    assert "target.options" in (error.value.where or "")
    assert not (tmp_path / "e").exists()


def test_importers_that_write_buffers_in_place_have_one_length(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="reads buffers where they lie, and their length is fixed"):
        decoder("LlamaForCausalLM", "static", tmp_path / "e", cache_lengths=(4,))
