"""Calibration: data as batches of a model's inputs, ranges of a graph's values, and what is kept of them."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
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
from graphopt.calibration.data import batches, digest
from graphopt.errors import CalibrationError, EngineError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.parity import Probe
from graphopt.passes.insert_kv_cache import InsertKvCache
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.schemas.calibration import Calibration
from graphopt.sources import Source, transformers_source
from graphopt.tensors import Weight
from tests.test_generation import bytes_tokenizer
from tests.tiny import tiny_bert

pytestmark = pytest.mark.usefixtures("kept_here")

FILLER = 7
TOKENS = ("batch", "sequence")


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    bytes_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def source(tokenizer_files: Path) -> Source:
    """Tokens and their mask, and a tokenizer."""
    return source_of("input_ids", "attention_mask", files=tokenizer_files)


def source_of(*names: str, files: Path | None = None) -> Source:
    inputs: dict[str, Tensor | None] = {name: torch.ones(2, 6, dtype=torch.int64) for name in names}
    mask = "attention_mask" if "attention_mask" in names else None
    return Source(
        nn.Identity(), inputs, dict.fromkeys(names, TOKENS), mask=mask, padding={"input_ids": FILLER}, files=files
    )


def ids(text: str) -> list[int]:
    found: list[int] = bytes_tokenizer()(text)["input_ids"]
    return found


def read(source: Source, data: Any, **options: Any) -> list[Probe]:
    return list(batches(source, Calibration(data=data, **options)))


def listed(probe: Probe) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in probe.inputs.items()}


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def arrays(folder: Path, **content: Any) -> str:
    np.savez(folder / "data.npz", **content)
    return str(folder / "data.npz")


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


AB_C = [{"input_ids": [ids("ab"), [*ids("c"), FILLER]], "attention_mask": [[1, 1], [1, 0]]}]


# What data is read


def test_a_text_file_has_a_text_a_line(source: Source, tmp_path: Path) -> None:
    """Padded behind to the longest of the batch; lines that are empty do not count."""
    assert list(map(listed, read(source, written(tmp_path, "a.txt", "ab\n\n  c \n\n")))) == AB_C


@pytest.mark.parametrize("field", ["text", "words"])
def test_a_jsonl_file_has_the_text_in_a_field(source: Source, tmp_path: Path, field: str) -> None:
    rows = jsonl({field: "ab", "label": 3}, {field: "c", "title": "other"})
    options = {} if field == "text" else {"field": field}
    assert list(map(listed, read(source, written(tmp_path, "a.jsonl", rows), **options))) == AB_C


def test_a_jsonl_file_has_tokens(source: Source, tmp_path: Path) -> None:
    rows = jsonl({"input_ids": ids("ab")}, {"input_ids": ids("c")})
    assert list(map(listed, read(source, written(tmp_path, "a.jsonl", rows)))) == AB_C


def test_a_jsonl_file_has_all_inputs(source: Source, tmp_path: Path) -> None:
    rows = jsonl(
        {"input_ids": ids("ab"), "attention_mask": [1, 1]}, {"attention_mask": [1, 0], "input_ids": [*ids("c"), FILLER]}
    )
    assert list(map(listed, read(source, written(tmp_path, "a.jsonl", rows)))) == AB_C


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_an_npz_file_has_an_example_a_row(source: Source, tmp_path: Path, dtype: str) -> None:
    (whole,) = AB_C
    tokens, mask = (np.array(whole[name], dtype) for name in ("input_ids", "attention_mask"))
    assert list(map(listed, read(source, arrays(tmp_path, input_ids=tokens, attention_mask=mask)))) == AB_C
    (alone,) = read(source, arrays(tmp_path, input_ids=tokens))
    assert listed(alone) == {"input_ids": whole["input_ids"], "attention_mask": [[1, 1], [1, 1]]}


@pytest.mark.parametrize("make", [list, tuple, iter, lambda texts: (text for text in texts), np.array])
def test_texts_of_python(source: Source, make: Callable[[list[str]], Iterable[str]]) -> None:
    assert list(map(listed, read(source, make(["ab", "c"])))) == AB_C


@pytest.mark.parametrize("make", [torch.tensor, np.array, list])
def test_mappings_of_python_are_batches(source: Source, make: Callable[[Any], Any]) -> None:
    given = [{name: make(rows) for name, rows in AB_C[0].items()}]
    assert list(map(listed, read(source, given))) == AB_C
    assert list(map(listed, read(source, iter(given * 3)))) == AB_C * 3


def test_a_path_is_a_file(source: Source, tmp_path: Path) -> None:
    written(tmp_path, "a.txt", "ab\nc\n")
    assert list(map(listed, read(source, tmp_path / "a.txt"))) == AB_C


def test_every_input_has_the_models_dtype(tmp_path: Path) -> None:
    model = source_of("input_ids", "attention_mask")
    model.inputs = {"input_ids": torch.ones(2, 6, dtype=torch.int32), "attention_mask": torch.ones(2, 6)}
    (probe,) = read(model, written(tmp_path, "a.jsonl", jsonl({"input_ids": [1, 2]})))
    assert {name: tensor.dtype for name, tensor in probe.inputs.items()} == {
        "input_ids": torch.int32,
        "attention_mask": torch.float32,
    }


def test_a_batch_says_its_sizes_and_its_mask(source: Source) -> None:
    (probe,) = read(source, ["ab", "c", "def"])
    assert probe.sizes == {"batch": 3, "sequence": 3}
    assert probe.mask is not None
    assert torch.equal(probe.mask, probe.inputs["attention_mask"])


def test_a_model_without_a_mask(tokenizer_files: Path) -> None:
    (probe,) = read(source_of("input_ids", files=tokenizer_files), ["ab", "c"])
    assert listed(probe) == {"input_ids": [ids("ab"), [*ids("c"), FILLER]]}
    assert probe.mask is None


def test_token_types_are_those_of_a_single_text(tokenizer_files: Path) -> None:
    (probe,) = read(source_of("input_ids", "token_type_ids", files=tokenizer_files), ["ab", "c"])
    assert listed(probe)["token_type_ids"] == [[0, 0], [0, 0]]


# How much of it


@pytest.mark.parametrize(
    ("samples", "batch", "sizes"), [(5, 2, [2, 2, 1]), (4, 8, [4]), (128, 3, [3, 3, 1]), (1, 1, [1])]
)
def test_samples_and_batch(source: Source, samples: int, batch: int, sizes: list[int]) -> None:
    found = read(source, list("abcdefg"), samples=samples, batch=batch)
    assert [probe.sizes["batch"] for probe in found] == sizes
    got = [row[0] for probe in found for row in listed(probe)["input_ids"]]
    assert got == [ids(letter)[0] for letter in "abcdefg"[:samples]]


def test_no_more_is_read_than_samples(source: Source) -> None:
    """Of what may have no end."""
    endless = iter(lambda: "ab", None)
    assert sum(probe.sizes["batch"] for probe in read(source, endless, samples=10, batch=4)) == 10
    batch = AB_C[0]
    assert len(read(source, iter(lambda: batch, None), samples=6)) == 3


def test_no_more_samples_of_mappings_than_asked_for(source: Source) -> None:
    assert sum(probe.sizes["batch"] for probe in read(source, AB_C * 3, samples=3)) == 3


def test_longer_texts_are_cut(source: Source, tmp_path: Path) -> None:
    expected = [ids("ab"), ids("de")]
    rows = jsonl({"input_ids": ids("abc")}, {"input_ids": ids("def")})
    for data in (["abc", "def"], written(tmp_path, "a.txt", "abc\ndef"), written(tmp_path, "a.jsonl", rows)):
        (probe,) = read(source, data, max_length=2)
        assert listed(probe)["input_ids"] == expected


# Data that cannot be used


def assert_refused(source: Source, data: Any, reason: str, where: str | None = None) -> None:
    with pytest.raises(CalibrationError, match=reason) as caught:
        read(source, data)
    if where is not None:
        assert caught.value.where is not None
        assert caught.value.where.endswith(where), caught.value.where


@pytest.mark.parametrize("name", ["a.csv", "a", "a.json", "a.npy", "a.TXT"])
def test_other_kinds_of_files_are_refused(source: Source, tmp_path: Path, name: str) -> None:
    assert_refused(source, written(tmp_path, name, "ab"), "calibration data is", name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.npz"])
def test_a_file_that_is_not_there(source: Source, tmp_path: Path, name: str) -> None:
    assert_refused(source, str(tmp_path / name), "there is no such calibration data", name)
    (tmp_path / name).mkdir()
    assert_refused(source, str(tmp_path / name), "there is no such calibration data", name)


@pytest.mark.parametrize(
    ("name", "content", "reason", "where"),
    [
        ("a.txt", "", "the calibration data is empty", "a.txt"),
        ("a.txt", "\n  \n", "the calibration data is empty", "a.txt"),
        ("a.txt", b"ab\n\xff\n", "not UTF-8 text", "a.txt"),
        ("a.jsonl", "", "the calibration data is empty", "a.jsonl"),
        ("a.jsonl", b'{"text": "\xe4"}', "not UTF-8 text", "a.jsonl"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "not JSON: Expecting value", "a.jsonl:3"),
        ("a.jsonl", "plain\n", "not JSON", "a.jsonl:1"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "a line is no object", "a.jsonl:2"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "there is no text under 'text'", "a.jsonl:2"),
        ("a.jsonl", '{"text": null}\n', "there is no text under 'text'", "a.jsonl:1"),
        ("a.jsonl", '{"input_ids": [1]}\n{"text": "b"}\n', "the examples are not all of one kind", "a.jsonl"),
        ("a.jsonl", '{"input_idx": [1]}\n', "there is no input 'input_idx'", "a.jsonl"),
        ("a.jsonl", '{"attention_mask": [1]}\n', "the input 'input_ids' is missing", "a.jsonl"),
        ("a.jsonl", "{}\n", "the input 'attention_mask' is missing", "a.jsonl"),
        ("a.jsonl", '{"input_ids": []}\n', "a text has no tokens", None),
        ("a.jsonl", '{"text": ""}\n', "a text has no tokens", None),
        ("a.npz", "no archive at all", "not an .npz file", "a.npz"),
        ("a.npz", pickle.dumps([[1, 2], [3, 4]]), "not an .npz file: .*pickled", "a.npz"),
    ],
)
def test_files_that_cannot_be_used(
    source: Source, tmp_path: Path, name: str, content: str | bytes, reason: str, where: str | None
) -> None:
    assert_refused(source, written(tmp_path, name, content), reason, where)


def test_a_near_miss_of_a_field_is_named(source: Source, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        read(source, written(tmp_path, "a.jsonl", jsonl({"txt": "b"})))
    assert caught.value.hint == "did you mean 'txt'? known: txt"
    with pytest.raises(CalibrationError) as caught:
        read(source, [{"input_idx": [[1]], "attention_mask": [[1]]}])
    assert caught.value.hint == "did you mean 'input_ids'? known: attention_mask, input_ids"


def test_examples_of_several_lengths_with_a_mask(source: Source, tmp_path: Path) -> None:
    rows = [{"input_ids": [1] * count, "attention_mask": [1] * count} for count in (2, 3)]
    assert_refused(source, written(tmp_path, "a.jsonl", jsonl(*rows)), "examples of several lengths", "a.jsonl")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"input_ids": np.ones((2, 3)), "attention_mask": np.ones((3, 3))}, "not the same number of examples"),
        ({}, "not the same number of examples"),
        ({"input_ids": np.ones((0, 3))}, "the calibration data is empty"),
        ({"input_ids": np.array(3)}, "the calibration data is empty"),
        ({"input_ids": np.array([[1], [1, 2]], dtype=object)}, "not an .npz file: Object arrays cannot be loaded"),
        ({"tokens": np.ones((2, 3), int)}, "there is no input 'tokens'"),
        ({"attention_mask": np.ones((2, 3), int)}, "the input 'input_ids' is missing"),
    ],
)
def test_arrays_that_cannot_be_used(source: Source, tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    assert_refused(source, arrays(tmp_path, **content), reason, "data.npz")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (5, "calibration data is a int"),
        (None, "calibration data is a NoneType"),
        ([], "the calibration data is empty"),
        (iter([]), "the calibration data is empty"),
        ([1, 2], "the examples are not all of one kind"),
        (b"ab", "calibration data is a bytes"),
        (["a", None], "the examples are not all of one kind"),
        (["a", AB_C[0]], "the examples are not all of one kind"),
        ([{"input_idx": [[1]]}], "there is no input 'input_idx'"),
        ([{"input_ids": [[1]]}], "the input 'attention_mask' is missing"),
        ([{}], "the input 'attention_mask' is missing"),
    ],
)
def test_objects_that_cannot_be_used(source: Source, data: Any, reason: str) -> None:
    assert_refused(source, data, reason)


def test_texts_need_a_tokenizer(tmp_path: Path) -> None:
    without = source_of("input_ids", "attention_mask")
    assert_refused(without, ["ab"], "texts need a tokenizer, and the model has none")
    assert_refused(without, written(tmp_path, "a.txt", "ab"), "texts need a tokenizer", "a.txt")
    without.files = tmp_path
    with pytest.raises(EngineError, match="there is no tokenizer"):
        read(without, ["ab"])


def a_plain_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((2, 3)))
    return buffer.getvalue()


def damaged(part: slice) -> bytes:
    """An archive without some of its bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, input_ids=np.ones((2, 3), int))
    return buffer.getvalue()[part]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.npz", b"", "not an .npz file"),
        ("a.npz", damaged(slice(0, 200)), "not an .npz file"),
        ("a.npz", a_plain_array(), "a single array"),
        ("a.jsonl", '{"input_ids": ["a", "b"]}', "input_ids is no array of numbers"),
        ("a.jsonl", '{"input_ids": [[1, 2], [3]]}', "input_ids is no array of numbers"),
        ("a.jsonl", '{"input_ids": 5}', "is missing"),
    ],
)
def test_files_that_hold_something_else(
    source: Source, tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    assert_refused(source, written(tmp_path, name, content), reason, name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.array(["ab", "c"]), "input_ids is no array of numbers"),
        (np.array([1, 2]), "is missing"),
    ],
)
def test_arrays_of_something_else(source: Source, tmp_path: Path, content: Any, reason: str) -> None:
    assert_refused(source, arrays(tmp_path, input_ids=content), reason, "data.npz")


def test_numbers_of_another_byte_order(source: Source, tmp_path: Path) -> None:
    (probe,) = read(source, arrays(tmp_path, input_ids=np.ones((2, 3), ">i8")))
    assert listed(probe)["input_ids"] == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([*AB_C, "ab"], "a str is among mappings"),
        ([{"text": "ab"}], "text is no array of numbers"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 1]}], "has 1 axes, needs 2"),
        ([{"input_ids": [[1, 2], [1]], "attention_mask": [[1, 1]]}], "input_ids is no array of numbers"),
        (AB_C[0], "calibration data is a dict"),
    ],
)
def test_objects_that_hold_something_else(source: Source, data: Any, reason: str) -> None:
    assert_refused(source, data, reason)


# Options


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"percentile": 99}, "percentile is for observer: percentile, not for min_max"),
        ({"observer": "mse", "percentile": 99}, "not for mse"),
        ({"observer": "percentile", "percentile": 50}, "greater than 50"),
        ({"observer": "percentile", "percentile": 100.1}, "less than or equal to 100"),
        ({"observer": "median"}, "min_max"),
        ({"samples": 0}, "greater than 0"),
        ({"batch": 0}, "greater than 0"),
        ({"max_length": -1}, "greater than 0"),
        ({"sample": 3}, "Extra inputs are not permitted"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Calibration(data="a.txt", **options)


def test_data_is_needed() -> None:
    with pytest.raises(ValidationError, match="data"):
        Calibration.model_validate({})


def test_a_report_has_the_file_or_the_kind_of_data() -> None:
    for data, said in (("a.txt", "a.txt"), ([1, 2], "<list>"), (iter([]), "<list_iterator>")):
        assert Calibration(data=data).model_dump(mode="json")["data"] == said


def test_a_report_has_the_file_of_a_path() -> None:
    assert Calibration(data=Path("a.txt")).model_dump(mode="json")["data"] == "a.txt"


def test_only_files_have_a_digest(source: Source, tmp_path: Path) -> None:
    file = written(tmp_path, "a.txt", "ab")
    same = written(tmp_path, "b.txt", "ab")
    assert (
        digest(source, Calibration(data=file))
        == digest(source, Calibration(data=same))
        == digest(source, Calibration(data=Path(same)))
    )
    assert digest(source, Calibration(data=file)) != digest(source, Calibration(data=file, samples=3))
    assert digest(source, Calibration(data=file)) != digest(source, Calibration(data=written(tmp_path, "c.txt", "abc")))
    assert digest(source, Calibration(data=["ab"])) is None
    assert digest(source, Calibration(data=str(tmp_path / "none.txt"))) is None


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
