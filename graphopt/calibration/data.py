"""Calibration data as batches of a model's inputs, read as they are needed."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import CalibrationError, nearest
from graphopt.models import TOKENIZER_FILES
from graphopt.parity import Probe
from graphopt.schemas.calibration import Calibration
from graphopt.sources import Source

Example = str | Mapping[str, Any]  # a text, or the inputs of one example without the batch's axis


def batches(source: Source, config: Calibration) -> Iterator[Probe]:
    """The data as inputs of the model, ``config.batch`` examples at a time. CalibrationError, with file and line, for data
    that is not there, is empty or does not fit."""
    if not isinstance(config.data, (str, Path)):
        yield from _of_iterable(source, config)
        return
    path = Path(config.data)
    if path.suffix not in _READERS:
        raise CalibrationError(f"calibration data is {path.suffix or 'without a suffix'}", where=str(path), hint=_KINDS)
    if not path.is_file():
        raise CalibrationError("there is no such calibration data", where=str(path), hint=_KINDS)
    yield from _batched(source, config, _READERS[path.suffix](path, config), str(path))


def digest(source: Source, config: Calibration) -> str | None:
    """What data, tokenizer and options are, for keeping results; None for what can be read only once."""
    from graphopt.artifact import sha256

    if not isinstance(config.data, (str, Path)) or not Path(config.data).is_file():
        return None
    read = [Path(config.data)]
    if source.files is not None:
        read += [source.files / name for name in TOKENIZER_FILES if (source.files / name).is_file()]
    content = " ".join(map(sha256, read))
    return f"{content} {config.model_dump_json(exclude={'data'})}"


_KINDS = "give a .txt, .jsonl or .npz file, or an iterable"


def _text_lines(path: Path, config: Calibration) -> Iterator[Example]:
    for _, line in _lines(path):
        yield line


def _json_lines(path: Path, config: Calibration) -> Iterator[Example]:
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"not JSON: {error}", where=where) from error
        if not isinstance(found, dict):
            raise CalibrationError("a line is no object", where=where, hint=f'{{"{config.field}": "..."}}')
        if isinstance(found.get(config.field), str):
            yield found[config.field]
        elif all(isinstance(value, (int, float, list)) for value in found.values()):
            yield found
        else:
            raise CalibrationError(
                f"there is no text under {config.field!r}", where=where, hint=nearest(config.field, found)
            )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, line.strip()) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise CalibrationError("not UTF-8 text", where=str(path)) from error


def _array_rows(path: Path, config: Calibration) -> Iterator[Example]:
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.lib.npyio.NpzFile):
                hint = "write it with numpy.savez"
                raise CalibrationError("not an .npz file but a single array", where=str(path), hint=hint)
            arrays = dict(found)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"not an .npz file: {error}", where=str(path)) from error
    counts = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(counts) != 1:
        raise CalibrationError("the arrays have not the same number of examples", where=str(path))
    yield from ({name: array[row] for name, array in arrays.items()} for row in range(counts.pop()))


_READERS: dict[str, Callable[[Path, Calibration], Iterator[Example]]] = {
    ".txt": _text_lines, ".jsonl": _json_lines, ".npz": _array_rows,
}  # fmt: skip


def _of_iterable(source: Source, config: Calibration) -> Iterator[Probe]:
    """Texts, or mappings that are batches already."""
    where = "calibration data"
    if not isinstance(config.data, Iterable) or isinstance(config.data, Mapping | bytes):
        raise CalibrationError(f"calibration data is a {type(config.data).__name__}", hint=_KINDS)
    items = iter(config.data)
    first = next(items, None)
    items = itertools.chain([] if first is None else [first], items)
    if not isinstance(first, Mapping):
        yield from _batched(source, config, items, where)
        return
    rows = 0
    for item in items:
        if not isinstance(item, Mapping):
            raise CalibrationError(f"a {type(item).__name__} is among mappings", where=where)
        made = _probe(source, {name: _tensor(array, name, where) for name, array in item.items()}, where)
        if (count := next(iter(made.inputs.values())).shape[0]) > config.samples - rows:
            made = _probe(
                source, {name: tensor[: config.samples - rows] for name, tensor in made.inputs.items()}, where
            )
        rows += count
        yield made
        if rows >= config.samples:
            return


def _tensor(array: Any, name: str, where: str) -> Tensor:
    """Numbers as a tensor. CalibrationError for what is no array of numbers."""
    try:
        given = np.asarray(array) if not isinstance(array, Tensor) else array
        return given if isinstance(given, Tensor) else torch.as_tensor(given.astype(given.dtype.newbyteorder("=")))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{name} is no array of numbers: {str(error).splitlines()[0]}", where=where) from error


def _batched(source: Source, config: Calibration, examples: Iterable[Any], where: str) -> Iterator[Probe]:
    encode = _encoder(source, config, where)
    taken = itertools.islice(examples, config.samples)
    some = False
    while batch := list(itertools.islice(taken, config.batch)):
        some = True
        yield _probe(source, encode(batch), where)
    if not some:
        raise CalibrationError("the calibration data is empty", where=where)


def _encoder(source: Source, config: Calibration, where: str) -> Callable[[list[Any]], dict[str, Tensor]]:
    """Makes inputs of a batch of examples; the tokenizer is read when the first text comes."""
    tokenizer: list[Any] = []

    def encode(batch: list[Any]) -> dict[str, Tensor]:
        if all(isinstance(example, str) for example in batch):
            if not tokenizer:
                tokenizer.append(_tokenizer(source, where))
            return _tokens(source, config, [tokenizer[0](text)["input_ids"][: config.max_length] for text in batch])
        if not all(isinstance(example, Mapping) and example.keys() == batch[0].keys() for example in batch):
            raise CalibrationError("the examples are not all of one kind", where=where)
        rows = {name: [_tensor(example[name], name, where) for example in batch] for name in batch[0]}
        if set(rows) == {"input_ids"} and all(row.ndim == 1 for row in rows["input_ids"]):
            return _tokens(source, config, [row.tolist()[: config.max_length] for row in rows["input_ids"]])
        if any(row.shape != own[0].shape for own in rows.values() for row in own):
            raise CalibrationError(
                "examples of several lengths are given as input_ids alone, or as batches", where=where
            )
        return {name: torch.stack(own) for name, own in rows.items()}

    return encode


def _tokenizer(source: Source, where: str) -> Any:
    from graphopt.runtime.generation import load_tokenizer

    if source.files is None:
        raise CalibrationError(
            "texts need a tokenizer, and the model has none", where=where, hint="give tokens, or a model directory"
        )
    return load_tokenizer(source.files)


def _tokens(source: Source, config: Calibration, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Token rows as one batch, padded behind, with the other inputs that a text has."""
    if any(not row for row in rows):
        raise CalibrationError("a text has no tokens")
    texts = [torch.tensor(row) for row in rows]
    filler = source.padding.get("input_ids", 0)
    found = {"input_ids": torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=filler)}
    if source.mask is not None:
        found[source.mask] = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(text) for text in texts], batch_first=True
        )
    if "token_type_ids" in source.tensors:
        found["token_type_ids"] = torch.zeros_like(found["input_ids"])
    return found


def _probe(source: Source, inputs: Mapping[str, Tensor], where: str) -> Probe:
    """The inputs with the model's dtypes, all of them and no others."""
    wanted = source.tensors
    if unknown := inputs.keys() - wanted.keys():
        raise CalibrationError(f"there is no input {min(unknown)!r}", where=where, hint=nearest(min(unknown), wanted))
    if missing := wanted.keys() - inputs.keys():
        raise CalibrationError(f"the input {min(missing)!r} is missing", where=where)
    for name, tensor in inputs.items():
        _check_kind(source, name, tensor, where)
    given = {name: inputs[name].to(wanted[name].dtype) for name in wanted}
    if len({tensor.shape[0] for tensor in given.values()}) != 1:
        raise CalibrationError("the inputs have not the same number of examples", where=where)
    sizes = {
        axis: given[name].shape[index]
        for name, names in source.axes.items()
        if name in given
        for index, axis in enumerate(names)
        if axis
    }
    return Probe(sizes, given, given.get(source.mask) if source.mask else None)


def _check_kind(source: Source, name: str, tensor: Tensor, where: str) -> None:
    """Numbers of the input's kind, rank and range."""
    wanted = source.tensors[name]
    if tensor.ndim != wanted.ndim:
        raise CalibrationError(f"{name} has {tensor.ndim} axes, needs {wanted.ndim}", where=where)
    if tensor.is_floating_point() and not wanted.is_floating_point():
        raise CalibrationError(f"{name} is {tensor.dtype}, needs whole numbers", where=where)
    vocabulary = source.vocabulary.get(name)
    if vocabulary is not None and tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < vocabulary:
        raise CalibrationError(f"{name} has tokens that are not among 0 to {vocabulary - 1}", where=where)
