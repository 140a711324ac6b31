"""Engine directories: written whole or not at all, damaged ones refused."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

import graphopt
from graphopt.artifact import staged
from graphopt.backends.onnx.weights import ALIGNMENT, INLINE
from graphopt.errors import EngineError, GraphoptError, MissingBackendError, PipelineError
from tests.tiny import tiny_bert


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("artifact") / "engine"
    graphopt.compile(tiny_bert(layers=1), folder, target={"tactics": "fixed"})
    return folder


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    import shutil

    return Path(shutil.copytree(built, tmp_path / "engine"))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_is_inside(engine: Path) -> None:
    assert sorted(path.name for path in engine.iterdir()) == [
        "graph.gir",
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "report.html",
    ]
    content = json.loads((engine / "manifest.json").read_text())
    assert sorted(content["files"]) == ["graph.gir", "model.onnx", "model.onnx.data", "report.html"]
    assert content["inputs"]["input_ids"] == {"dtype": "i64", "shape": ["batch", "sequence"]}
    assert content["versions"].keys() >= {"torch", "transformers", "onnxruntime"}
    kinds = [step["kind"] for step in content["pipeline"]["passes"]]
    assert kinds[:3] == ["decompose_complex", "canonicalize", "fuse_attention"]


def test_large_weights_lie_aligned_in_the_data_file_and_small_ones_in_the_model(engine: Path) -> None:
    model = onnx.load(str(engine / "model.onnx"), load_external_data=False)
    size = (engine / "model.onnx.data").stat().st_size
    ends = [0]
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert len(tensor.raw_data) <= INLINE
            continue
        assert place["location"] == "model.onnx.data"
        offset, length = int(place["offset"]), int(place["length"])
        assert offset % ALIGNMENT == 0
        assert length == math.prod(tensor.dims) * 4 > INLINE
        assert ends[-1] <= offset < ends[-1] + ALIGNMENT
        ends.append(offset + length)
    assert len(ends) > 1
    assert ends[-1] == size


def damage(folder: Path) -> None:
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (folder / "model.onnx.data").write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage, "model.onnx.data is damaged"),
        (lambda f: (f / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda f: (f / "manifest.json").unlink(), "is no engine directory"),
        (lambda f: (f / "manifest.json").write_text("{"), "the manifest cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "the manifest cannot be read"),
        (
            lambda f: edit_manifest(f, lambda m: m.update(format=99)),
            "the engine has format 99, this graphopt reads up to 1",
        ),
        (lambda f: edit_manifest(f, lambda m: m.update(format="1")), "damaged at format: '1' is no whole number"),
        (lambda f: edit_manifest(f, lambda m: m.pop("inputs")), "the manifest is damaged at inputs"),
        (lambda f: edit_manifest(f, lambda m: m["dims"].pop("batch")), "damaged at dims: inputs are of batch"),
        (lambda f: edit_manifest(f, lambda m: m.update(files={})), "damaged at files: it has no graph.gir"),
        (
            lambda f: edit_manifest(f, lambda m: m.update(backend="torch")),
            "a file is missing that engines of backend: torch have",
        ),
        (lambda f: edit_manifest(f, lambda m: m["files"].update({"../x": "0"})), "outside the directory"),
    ],
)
def test_damaged(engine: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(engine)
    with pytest.raises(EngineError, match=message):
        graphopt.load(engine)


def test_the_report_may_be_left_out(engine: Path) -> None:
    (engine / "report.html").unlink()
    graphopt.load(engine)


@pytest.mark.parametrize("backend", ["torch", "onnx", "onnxruntime"])
def test_options_of_loading_that_engines_have_not(backend: str, tmp_path: Path) -> None:
    graphopt.compile(tiny_bert(layers=1), tmp_path / "e", target={"backend": backend, "tactics": "fixed"})
    with pytest.raises(PipelineError, match=f"the {backend} engine has no option thread"):
        graphopt.load(tmp_path / "e", thread=2)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is no engine directory"):
        graphopt.load(tmp_path / "nothing")


def test_missing_backend_package(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingBackendError, match="onnxruntime is not installed") as error:
        graphopt.load(engine)
    assert error.value.hint == "pip install 'graphopt[cpu]'"
    with pytest.raises(MissingBackendError):
        graphopt.compile(tiny_bert(layers=1), engine.parent / "other")
    assert not (engine.parent / "other").exists()


def test_provider_that_is_not_there(engine: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(MissingBackendError, match="no CUDAExecutionProvider"):
        graphopt.load(engine, provider="cuda")


def test_replaces_an_engine_and_nothing_else(engine: Path, tmp_path: Path) -> None:
    graphopt.compile(tiny_bert(layers=1), engine, target={"tactics": "fixed"})
    graphopt.load(engine)
    other = tmp_path / "notes"
    other.mkdir()
    (other / "keep.txt").write_text("mine")
    with pytest.raises(EngineError, match="exists and is no engine directory"):
        graphopt.compile(tiny_bert(layers=1), other)
    assert (other / "keep.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "notes"]
    (engine / "note.txt").write_text("mine")
    with pytest.raises(EngineError, match=r"has files beside its engine: note\.txt"):
        graphopt.compile(tiny_bert(layers=1), engine, target={"tactics": "fixed"})
    assert (engine / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, GraphoptError("no")])
def test_nothing_is_left_behind(tmp_path: Path, failure: Any) -> None:
    kind = failure if isinstance(failure, type) else type(failure)

    def half_write() -> None:
        with staged(tmp_path / "engine") as folder:
            (folder / "model.onnx").write_text("half")
            raise failure

    with pytest.raises(kind):
        half_write()
    assert list(tmp_path.iterdir()) == []


def test_errors_of_other_files_are_no_errors_of_writing(tmp_path: Path) -> None:
    def read() -> None:
        with staged(tmp_path / "engine"):
            Path("/nowhere/table.txt").read_text()

    with pytest.raises(FileNotFoundError, match=r"table\.txt"):
        read()


def test_an_engine_inside_of_an_engine(engine: Path) -> None:
    with pytest.raises(EngineError, match="would lie in the engine directory"):
        graphopt.compile(tiny_bert(layers=1), engine / "sub", target={"tactics": "fixed"})


def test_a_manifest_of_something_else_around_it(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    graphopt.compile(tiny_bert(layers=1), tmp_path / "engines" / "e", target={"backend": "torch"})
    graphopt.load(tmp_path / "engines" / "e")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_files_that_may_not_be_read(engine: Path) -> None:
    (engine / "model.onnx").chmod(0)
    with pytest.raises(EngineError, match=r"model\.onnx cannot be read"):
        graphopt.load(engine)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 kB, as on a full disk."""
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk(tmp_path: Path, small_files: None) -> None:
    with pytest.raises(EngineError, match="cannot write the engine: File too large"):
        graphopt.compile(tiny_bert(layers=1), tmp_path / "engine", target={"tactics": "fixed"})
    with pytest.raises(EngineError, match=r"cannot write the weights: .*File too large"):
        graphopt.compile(tiny_bert(layers=1), tmp_path / "engine", target={"backend": "torch"})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="cannot write the engine"):
        graphopt.compile(tiny_bert(layers=1), tmp_path / "file" / "engine", target={"tactics": "fixed"})
