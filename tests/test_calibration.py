"""Calibration: ranges of a graph's values, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import graphopt
from graphopt import attentions
from graphopt.calibration import Tapped, calibrate
from graphopt.calibration.data import batches
from graphopt.errors import CalibrationError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.insert_kv_cache import InsertKvCache
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.schemas.calibration import Calibration
from graphopt.sources import Source, transformers_source
from graphopt.tensors import Weight
from tests.texts import bytes_tokenizer, ids, jsonl, written
from tests.tiny import tiny_bert

pytestmark = pytest.mark.usefixtures("kept_here")

# Ranges of a graph


class Traced:
    """A model's graph after some passes."""

    def __init__(self, source: Source, *kinds: str) -> None:
        self.source = source
        self.graph = graphopt.trace(
            source.module, source.inputs, source.axes, defaults=source.dims, truths=source.truths
        )
        run_passes(self.graph, load_passes([{"kind": kind} for kind in ("canonicalize", *kinds)]))

    def linears(self) -> dict[str, str]:
        """The values of linears by the modules that they come from."""
        nodes = [node for node in self.graph.nodes if node.op == "aten.linear.default"]
        return {node.origin[0]: node.output.name for node in nodes}

    def cached(self) -> list[str]:
        """Keys and values of attentions."""
        return [node.args[name].name for node in attentions.fused(self.graph) for name in "kv"]


TEXTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 17, 18, 19], [5, 90]]


@pytest.fixture(scope="module")
def bert() -> Traced:
    return Traced(tiny_bert(layers=1), "fuse_attention")


@pytest.fixture(scope="module")
def flat_bert() -> Traced:
    return Traced(tiny_bert(layers=1), "fuse_attention", "flatten_tokens")


def llama() -> Any:
    """A token for each byte, one layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def decoder(tokenizer_files: Path) -> Traced:
    return Traced(transformers_source(llama(), files=tokenizer_files), "fuse_attention")


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Token rows of several lengths in a file."""
    return written(tmp_path, "texts.jsonl", jsonl(*({"input_ids": row} for row in TEXTS)))


def seen_by_hooks(module: nn.Module, texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What eager's linears give for each text alone, without padding, ``[tokens, features]`` by module."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, result: found.setdefault(name, []).append(result.flatten(0, -2))

    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    handles = [part.register_forward_hook(hook(name)) for name, part in linears.items()]
    with torch.no_grad():
        for text in texts:
            module(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.int64))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("model", ["bert", "flat_bert"])
def test_ranges_are_those_of_eager_without_padding(
    model: str, batch: int, texts: str, request: pytest.FixtureRequest
) -> None:
    """Of every linear, one range and one for each feature; flattened to ``[batch*sequence, features]`` or not."""
    made: Traced = request.getfixturevalue(model)
    names = {where: name for where, name in made.linears().items() if where != "pooler.dense"}
    assert len(names) == 6
    flat = {len(made.graph.value(name).type.shape) for name in names.values()} == {2}
    assert flat == (model == "flat_bert")
    expected = seen_by_hooks(made.source.module, TEXTS)
    config = Calibration(data=texts, batch=batch)
    whole = calibrate(made.graph, made.source, config, [Tapped(name) for name in names.values()])
    axis = 1 if flat else 2
    parts = calibrate(made.graph, made.source, config, [Tapped(name, (axis,)) for name in names.values()])
    for where, name in names.items():
        close(whole[name], expected[where].abs().amax())
        close(parts[name], expected[where].abs().amax(0))


def test_values_without_the_masks_axes_are_seen_whole(bert: Traced, texts: str) -> None:
    """The pooler's, of a row each."""
    name = bert.linears()["pooler.dense"]
    found = calibrate(bert.graph, bert.source, Calibration(data=texts), [Tapped(name, (1,))])
    close(found[name], seen_by_hooks(bert.source.module, TEXTS)["pooler.dense"].abs().amax(0))


def test_padding_may_stand_in_front(bert: Traced) -> None:
    """What eager gives at the positions that the mask keeps."""
    torch.manual_seed(1)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]])
    inputs = {
        "input_ids": torch.randint(1, 99, (3, 5)),
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(mask),
    }
    where, name = "encoder.layer.0.output.dense", bert.linears()["encoder.layer.0.output.dense"]
    seen: list[Tensor] = []
    handle = bert.source.module.get_submodule(where).register_forward_hook(lambda m, a, result: seen.append(result))
    with torch.no_grad():
        bert.source.module(**inputs)
    handle.remove()
    found = calibrate(bert.graph, bert.source, Calibration(data=[inputs]), [Tapped(name, (2,))])
    close(found[name], seen[0][mask.bool()].abs().amax(0))


def keys_and_values(module: Any, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Eager's cache of each text alone: keys and values of every layer, ``[heads, tokens of all texts, features]``."""
    found: list[list[Tensor]] = []
    with torch.no_grad():
        for text in texts:
            layers = module(input_ids=torch.tensor([text]), use_cache=True).past_key_values.layers
            found.append([part[0] for layer in layers for part in (layer.keys, layer.values)])
    return [torch.cat(parts, 1) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("axes", [(), (1,), (3,), (1, 3)])
def test_ranges_of_several_axes(decoder: Traced, texts: str, axes: tuple[int, ...]) -> None:
    """Of keys after their rotation, and of values: one range, one a head, one a feature, one a feature of each head."""
    names = decoder.cached()
    found = calibrate(decoder.graph, decoder.source, Calibration(data=texts), [Tapped(name, axes) for name in names])
    whole = keys_and_values(decoder.source.module, TEXTS)
    for name, part in zip(names, whole, strict=True):
        others = [axis for axis, own in enumerate((1, 2, 3)) if own not in axes]
        close(found[name], part.abs().amax(others))


@pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile", "mse", "entropy"])
def test_every_observer_gives_a_range_within_the_values(decoder: Traced, texts: str, observer: str) -> None:
    names = decoder.cached()
    config = Calibration.model_validate({"data": texts, "observer": observer, "batch": 2})
    found = calibrate(decoder.graph, decoder.source, config, [Tapped(name) for name in names])
    for name, part in zip(names, keys_and_values(decoder.source.module, TEXTS), strict=True):
        assert 0 < float(found[name]) <= float(part.abs().max()) * 1.002


def test_a_percentile_of_a_model_is_numpys(decoder: Traced, texts: str) -> None:
    names = decoder.cached()
    config = Calibration(data=texts, observer="percentile", percentile=90, batch=2)
    found = calibrate(decoder.graph, decoder.source, config, [Tapped(name) for name in names])
    for name, part in zip(names, keys_and_values(decoder.source.module, TEXTS), strict=True):
        expected = np.percentile(part.abs().numpy(), 90, method="inverted_cdf")
        assert float(found[name]) == pytest.approx(expected, rel=0.01)


def test_an_input_is_tapped_too() -> None:
    model = nn.Linear(3, 3).eval()
    source = Source(model, {"input": torch.randn(4, 3)}, {"input": ("batch", None)})
    graph = graphopt.trace(source.module, source.inputs, source.axes)
    data = [{"input": torch.tensor([[1.0, -5.0, 0.5], [2.0, 0.0, 0.25]])}]
    found = calibrate(graph, source, Calibration(data=data), [Tapped("input", (1,))])
    assert found["input"].tolist() == [2.0, 5.0, 0.5]


def test_texts_go_through_the_models_tokenizer(decoder: Traced, tmp_path: Path) -> None:
    lines = ["first text", "a", "second"]
    found = [
        calibrate(decoder.graph, decoder.source, Calibration(data=data), map(Tapped, decoder.cached()))
        for data in (written(tmp_path, "a.txt", "\n".join(lines)), lines)
    ]
    assert found[0] == found[1]
    whole = keys_and_values(decoder.source.module, [ids(line) for line in lines])
    for name, part in zip(decoder.cached(), whole, strict=True):
        close(found[0][name], part.abs().amax())


def test_progress_is_told(decoder: Traced, texts: str) -> None:
    told: list[float] = []
    config = Calibration(data=texts, samples=5, batch=2)
    calibrate(decoder.graph, decoder.source, config, [Tapped(decoder.cached()[0])], told.append)
    assert told == [0.4, 0.8, 1.0]


# Graphs with a cache


CACHES: dict[str, dict[str, Any]] = {
    "growing": {"layout": "growing"},
    "growing, last logits": {"layout": "growing", "logits": "last"},
    "static": {"layout": "static", "max_length": 16},
    "static, last logits": {"layout": "static", "max_length": 16, "logits": "last"},
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_graph_with_a_cache_has_the_ranges_of_the_one_without(decoder: Traced, texts: str, cache: str) -> None:
    names = decoder.cached()
    with_cache = decoder.graph.clone()
    InsertKvCache(**CACHES[cache]).run(with_cache, Context())
    whole = keys_and_values(decoder.source.module, TEXTS)
    for batch in (1, 3):
        config = Calibration(data=texts, batch=batch)
        found = calibrate(with_cache, decoder.source, config, [Tapped(name, (1, 3)) for name in names])
        for name, part in zip(names, whole, strict=True):
            close(found[name], part.abs().amax(1))


@pytest.mark.parametrize("front", [False, True])
def test_values_behind_padding_in_a_static_cache(decoder: Traced, front: bool) -> None:
    """Its rows have no padding before their end: padding in front is moved behind."""
    with_cache = decoder.graph.clone()
    InsertKvCache(layout="static", max_length=16).run(with_cache, Context())
    rows = [[0] * (7 - len(row)) + row if front else row + [0] * (7 - len(row)) for row in TEXTS]
    tokens = torch.tensor(rows)
    data = [{"input_ids": tokens, "attention_mask": (tokens > 0).long()}]
    found = calibrate(
        with_cache, decoder.source, Calibration(data=data), [Tapped(name, (1, 3)) for name in decoder.cached()]
    )
    whole = keys_and_values(decoder.source.module, TEXTS)
    for name, part in zip(decoder.cached(), whole, strict=True):
        close(found[name], part.abs().amax(1))


def test_prompts_longer_than_a_window(texts: str) -> None:
    """A cache with windows takes so many tokens at once: the ranges are those of the first ones."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=4,
    )  # fmt: skip
    made = Traced(transformers_source(MistralForCausalLM(config)), "fuse_attention")
    graph = made.graph.clone()
    log = InsertKvCache(layout="static", max_length=16, window=True).run(graph, Context())
    assert log.matches == {"attention": 1, "window": 1}
    names = {where: name for where, name in made.linears().items() if where.endswith(("k_proj", "v_proj"))}
    found = calibrate(graph, made.source, Calibration(data=texts), [Tapped(name, (2,)) for name in names.values()])
    whole = seen_by_hooks(made.source.module, [text[:4] for text in TEXTS])
    for where, name in names.items():
        close(found[name], whole[where].abs().amax(0))


def test_a_decoder_behind_an_encoder() -> None:
    """The encoder is run once for each batch; its padding hides nothing of the decoder."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    made = Traced(transformers_source(T5ForConditionalGeneration(config)), "fuse_attention")
    graph = made.graph.clone()
    InsertKvCache().run(graph, Context())
    assert graph.prologue is not None
    tokens = torch.randint(1, 99, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    data = [{"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": torch.randint(1, 99, (3, 4))}]
    where = "decoder.block.0.layer.0.SelfAttention.v"
    seen: list[Tensor] = []
    handle = made.source.module.get_submodule(where).register_forward_hook(lambda m, a, result: seen.append(result))
    with torch.no_grad():
        made.source.module(**data[0])
    handle.remove()
    name = made.linears()[where]
    for each in (made.graph, graph):
        found = calibrate(each, made.source, Calibration(data=data), [Tapped(name, (2,))])
        close(found[name], seen[0].abs().amax((0, 1)))


# What is kept


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that were run."""
    found: list[Graph] = []

    def noted(graph: Graph, inputs: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
        found.append(graph)
        return run(graph, inputs, **options)

    monkeypatch.setattr("graphopt.calibration.run.run", noted)
    return found


def test_a_second_time_nothing_is_run(decoder: Traced, texts: str, runs: list[Graph], tmp_path: Path) -> None:
    taps = [Tapped(name, (1,)) for name in decoder.cached()] + [Tapped(decoder.linears()["lm_head"])]
    config = Calibration(data=texts, observer="percentile", percentile=99, batch=2)
    first = calibrate(decoder.graph, decoder.source, config, taps)
    assert len(runs) == 3
    (file,) = (tmp_path / "kept" / "graphopt" / "calibration").iterdir()
    again = calibrate(decoder.graph.clone(), decoder.source, config, taps)
    assert len(runs) == 3
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)
    file.write_text(file.read_text()[:-9])  # what is damaged is made again
    calibrate(decoder.graph, decoder.source, config, taps)
    assert len(runs) == 6
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_same_data_elsewhere_is_the_same(decoder: Traced, texts: str, runs: list[Graph], tmp_path: Path) -> None:
    taps = [Tapped(decoder.cached()[0])]
    calibrate(decoder.graph, decoder.source, Calibration(data=texts), taps)
    other = written(tmp_path, "other.jsonl", Path(texts).read_bytes())
    calibrate(decoder.graph, decoder.source, Calibration(data=other), taps)
    assert len(runs) == 1


def test_what_changes_is_run_again(decoder: Traced, texts: str, runs: list[Graph]) -> None:
    """Options, data, taps, weights, the graph."""
    graph, config, taps = decoder.graph.clone(), Calibration(data=texts), [Tapped(decoder.cached()[0])]

    def ran(graph: Graph, config: Calibration, taps: list[Tapped]) -> dict[str, Tensor]:
        before = len(runs)
        found = calibrate(graph, decoder.source, config, taps)
        assert len(runs) > before
        return found

    before = ran(graph, config, taps)
    ran(graph, Calibration(data=texts, samples=2), taps)
    ran(graph, Calibration(data=texts, observer="mse"), taps)
    ran(graph, Calibration(data=texts, max_length=3), taps)
    ran(graph, config, [Tapped(taps[0].name, (1,))])
    ran(graph, config, [*taps, Tapped(decoder.cached()[1])])
    Path(texts).write_text(jsonl({"input_ids": [50, 51]}))
    ran(graph, config, taps)
    with_cache = graph.clone()
    InsertKvCache().run(with_cache, Context())
    ran(with_cache, config, taps)
    Path(texts).write_text(jsonl(*({"input_ids": row} for row in TEXTS)))
    name = "model.embed_tokens.weight"
    graph.weights[name] = Weight.of(graph.weights[name].load() * 2 + 0.1)
    assert ran(graph, config, taps) != before


def test_what_is_read_only_once_is_not_kept(decoder: Traced, runs: list[Graph], tmp_path: Path) -> None:
    taps = [Tapped(decoder.cached()[0])]
    for _ in range(2):
        calibrate(decoder.graph, decoder.source, Calibration(data=["abc"]), taps)
    assert len(runs) == 2
    assert not (tmp_path / "kept").exists()


def test_another_tokenizer_is_other_data(decoder: Traced, runs: list[Graph], tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.add_tokens(["text"])
    tokenizer.save_pretrained(tmp_path / "other")
    config, taps = Calibration(data=written(tmp_path, "a.txt", "a text")), [Tapped(decoder.cached()[0])]
    calibrate(decoder.graph, decoder.source, config, taps)
    other = transformers_source(decoder.source.module, files=tmp_path / "other")
    calibrate(decoder.graph, other, config, taps)
    assert len(runs) == 2


# Values without a range


def altered(made: Traced, name: str, change: Callable[[Tensor], Tensor]) -> Graph:
    graph = made.graph.clone()
    graph.weights[name] = Weight.of(change(graph.weights[name].load()))
    return graph


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("observer", ["min_max", "percentile", "entropy"])
def test_a_value_that_is_always_0_is_named(decoder: Traced, texts: str, observer: str, kept: bool) -> None:
    """Also where the result was kept."""
    graph = altered(decoder, f"{UP}.weight", torch.zeros_like)
    config = Calibration.model_validate({"data": texts if kept else [read_all(decoder)], "observer": observer})
    name = decoder.linears()[UP]
    for _ in range(2):
        with pytest.raises(CalibrationError, match=f"%{name} is 0 for all of the data") as caught:
            calibrate(graph, decoder.source, config, [Tapped(decoder.linears()["lm_head"]), Tapped(name)])
        assert caught.value.where is not None
        assert UP in caught.value.where


def read_all(made: Traced) -> dict[str, Tensor]:
    (probe,) = batches(made.source, Calibration(data=["abc"]))
    return probe.inputs


def test_a_channel_that_is_always_0_is_a_channel(decoder: Traced, texts: str) -> None:
    def first(weight: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(weight[:1]), weight[1:]])

    name = decoder.linears()[UP]
    graph = altered(decoder, f"{UP}.weight", first)
    found = calibrate(graph, decoder.source, Calibration(data=texts), [Tapped(name, (2,))])[name]
    assert float(found[0]) == 0
    assert bool((found[1:] > 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_named(decoder: Traced, texts: str, bad: float) -> None:
    graph = altered(decoder, f"{UP}.weight", lambda weight: torch.full_like(weight, bad))
    name = decoder.linears()[UP]
    with pytest.raises(CalibrationError, match=f"there is NaN or infinity in %{name}") as caught:
        calibrate(graph, decoder.source, Calibration(data=texts), [Tapped(name)])
    assert caught.value.where is not None
    assert UP in caught.value.where


def test_what_no_data_reaches_has_no_range(decoder: Traced, texts: str) -> None:
    """A weight is no value that data goes through."""
    with pytest.raises(CalibrationError, match="no data reached it"):
        calibrate(decoder.graph, decoder.source, Calibration(data=texts), [Tapped("model.norm.weight")])


def test_a_context_without_a_model(decoder: Traced, texts: str) -> None:
    with pytest.raises(CalibrationError, match="there is no model whose inputs the data could be"):
        Context().calibrate(decoder.graph, Calibration(data=texts), [])
    found = Context(source=decoder.source).calibrate(
        decoder.graph, Calibration(data=texts), [Tapped(decoder.cached()[0])]
    )
    assert list(found) == decoder.cached()[:1]


@pytest.mark.parametrize("token", [300, -1])
def test_a_token_that_the_model_has_not(decoder: Traced, tmp_path: Path, token: int) -> None:
    data = written(tmp_path, "a.jsonl", jsonl({"input_ids": [1, token]}))
    with pytest.raises(CalibrationError):
        calibrate(decoder.graph, decoder.source, Calibration(data=data), [Tapped(decoder.cached()[0])])
