"""Calibration's data: files, arrays and Python's objects as batches of a model's inputs."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from graphopt.calibration.data import batches, digest
from graphopt.errors import CalibrationError, EngineError
from graphopt.parity import Probe
from graphopt.schemas.calibration import Calibration
from graphopt.sources import Source
from tests.texts import ids, jsonl, written

pytestmark = pytest.mark.usefixtures("kept_here")

FILLER = 7
TOKENS = ("batch", "sequence")


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


def read(source: Source, data: Any, **options: Any) -> list[Probe]:
    return list(batches(source, Calibration(data=data, **options)))


def listed(probe: Probe) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in probe.inputs.items()}


def arrays(folder: Path, **content: Any) -> str:
    np.savez(folder / "data.npz", **content)
    return str(folder / "data.npz")


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
