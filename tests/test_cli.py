"""The command line, as a user types it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import pytest
import yaml

import graphopt
from graphopt import cli, show

FACTORY = """
import torch
from tests.tiny import tiny_bert, tiny_llama

def fails():
    raise RuntimeError("no data")

def broken():
    class Branches(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Branches(), {"x": torch.rand(2, 3)}, {"x": ("batch", None)}
"""
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of factories and an engine made from one."""
    folder: Path = tmp_path_factory.mktemp("cli")
    (folder / "factories.py").write_text(FACTORY)
    done = run(folder, "compile", write(folder, "bert.yaml", {}), "-o", "engine")
    assert done.returncode == 0, done.stderr
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "COLUMNS": "100", "XDG_CACHE_HOME": str(folder / "cache")}


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The command in this process, which saves importing torch each time."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        unittest.mock.patch.dict(os.environ, environment(folder)),
        unittest.mock.patch.object(sys, "argv", ["graphopt", *args]),
        unittest.mock.patch.object(sys, "path", [str(folder), *sys.path]),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def run_installed(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    command = [str(Path(sys.executable).parent / "graphopt"), *args]
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)


def write(folder: Path, name: str, changes: dict[str, object]) -> str:
    content = {"model": "factories:tiny_bert", "dims": {"batch": [1, 8]}, "target": {"tactics": "fixed"}} | changes
    (folder / name).write_text(yaml.safe_dump(content))
    return name


def test_compile_shows_parity_and_writes(place: Path) -> None:
    done = run_installed(place, "compile", write(place, "again.yaml", {}), "-o", "again")
    assert done.returncode == 0
    assert "fuse_attention" in done.stdout
    assert "exact" in done.stdout
    assert "written again" in done.stdout
    assert (place / "again" / "manifest.json").is_file()


def test_version(place: Path) -> None:
    assert run(place, "--version").stdout == "0.1.0\n"


def test_compile_json(place: Path) -> None:
    done = run(place, "compile", write(place, "json.yaml", {}), "-o", "json", "--json")
    content = json.loads(done.stdout)
    assert content["report"]["engine"]["holds"] is True


def test_inspect(place: Path) -> None:
    shown = run(place, "inspect", "engine").stdout
    assert "i64[batch, sequence]" in shown
    assert "graphopt.attention.default" in shown
    text = run(place, "inspect", "engine", "--text").stdout
    assert text.startswith("graph {\n  dim batch in [1, 8]\n")
    facts = json.loads(run(place, "inspect", "engine", "--json", "--weights").stdout)
    assert facts["dims"]["batch"] == [1, 8]
    assert facts["ops"]["graphopt.attention.default"] == 2
    assert facts["weight_types"]["pooler.dense.bias"] == "f32[48]"


def test_inspect_difference(place: Path) -> None:
    done = run(place, "inspect", "factories:tiny_bert", "engine")
    assert "-  %scaled_dot_product_attention" in done.stdout
    assert run(place, "inspect", "engine", "engine").stdout.strip() == "the graphs are equal"


def test_verify(place: Path) -> None:
    done = run(place, "verify", "engine", "factories:tiny_bert")
    assert (done.returncode, "holds" in done.stdout) == (0, True)
    (place / "other.py").write_text("import torch\nfrom tests.tiny import tiny_bert\ndef other():\n  s = tiny_bert()\n"
                                    "  torch.nn.init.ones_(s.module.pooler.dense.bias)\n  return s\n")  # fmt: skip
    wrong = run(place, "verify", "engine", "other:other")
    assert (wrong.returncode, "broken" in wrong.stdout) == (1, True)


def test_bench(place: Path) -> None:
    done = run(place, "bench", "engine", "--size", "batch=2,sequence=8", "--seconds", "0.05", "--json")
    (row,) = json.loads(done.stdout)
    assert row["sizes"] == {"batch": 2, "sequence": 8}
    assert row["median_ms"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--size", "batch=0,sequence=8"), "sizes are from 1 on, each given once"),
        (("--size", "batch=1,batch=2"), "sizes are from 1 on, each given once"),
        (("--size", "batch"), "not sizes: 'batch'"),
    ],
)
def test_bad_sizes(place: Path, args: tuple[str, ...], message: str) -> None:
    done = run(place, "bench", "engine", *args)
    assert (done.returncode, message in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model: a:b\ndims: {a: 1}\ndims: {}\n", "the key 'dims' is there twice"),
        (b"model: a:b # \xff\n", "is in UTF-8"),
    ],
)
def test_files_that_are_no_pipeline(place: Path, text: bytes, message: str) -> None:
    (place / "odd.yaml").write_bytes(text)
    done = run(place, "compile", "odd.yaml", "-o", "bad")
    assert (done.returncode, message in done.stderr) == (2, True)


def test_errors_that_are_not_graphopts_exit_with_2_as_well(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise KeyError("nothing")

    monkeypatch.setattr(show, "doctor_facts", fails)
    done = run(place, "doctor")
    assert (done.returncode, "KeyError" in done.stderr) == (2, True)


def test_passes_and_doctor(place: Path) -> None:
    assert "fuse_attention" in run(place, "passes").stdout
    assert "decide" in run(place, "passes", "merge_linears").stdout
    assert "properties" in json.loads(run(place, "passes", "canonicalize", "--json").stdout)["canonicalize"]
    facts = json.loads(run(place, "doctor", "--json").stdout)
    assert "faults in force" in facts["backends"]["onnxruntime"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": [{"kind": "fuse_atention"}]}, "did you mean 'fuse_attention'?"),
        (
            {"passes": [{"kind": "canonicalize", "fold_byte": 1}]},
            "there is no option 'fold_byte'; did you mean 'fold_bytes'?",
        ),
        ({"passes": [{"kind": "canonicalize", "fold_bytes": "many"}]}, "fold_bytes: Input should be a valid integer"),
        (
            {"passes": [{"kind": "fuse_attention"}, {"kind": "canonicalize"}]},
            "this order works: canonicalize, fuse_attention",
        ),
        ({"passes": [{"kind": "fuse_norm"}]}, "add canonicalize before it"),
        ({"modle": "x"}, "there is no option 'modle'"),
        ({"dims": {"batch": [8, 1]}}, "[8, 1] is no range of sizes"),
        ({"dims": {"batch": [1, 4], "tokens": [1, 4]}}, "dims names tokens"),
        ({"dims": {"sequence": [1, 4096]}}, "dims asks for sequence in [1, 4096], the model allows"),
        ({"model": "factories:tiny_brt"}, "did you mean 'tiny_bert'?"),
        ({"model": "factories:broken"}, "a size or branch depends on tensor values"),
        ({"model": "./nowhere"}, "there is no model './nowhere'"),
        ({"target": {"backend": "tensorrtx"}}, "there is no backend 'tensorrtx'"),
        ({"target": {"provider": "tpu"}}, "target.provider"),
        ({"target": "onnxruntime"}, "target: must be a mapping (got 'onnxruntime')"),
        ({"dims": {"sequence": 64}}, "dims.sequence: must be a list (got 64)"),
        ({"parity": {"metric": "cosin", "limit": 0.9}}, "did you mean 'cosine'?"),
        ({"model": "factorees:tiny_bert"}, "put its folder into PYTHONPATH"),
        ({"target": {"backend": "torch", "threads": 3}}, "backend: torch has no threads"),
        ({"parity": {"metric": "cosine", "limit": 2}}, "a limit of cosine is from -1 to 1, not 2"),
        ({"model": "factories:fails"}, "factories:fails failed: RuntimeError: no data"),
    ],
)
def test_bad_pipelines(place: Path, changes: dict[str, object], message: str) -> None:
    done = run(place, "compile", write(place, "bad.yaml", changes), "-o", "bad")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "bad").exists()
    assert not list(place.glob(".bad*"))


def test_bad_files(place: Path) -> None:
    (place / "list.yaml").write_text("- a\n")
    (place / "no.yaml").write_text("a: [\n")
    for file, message in (
        ("list.yaml", "a pipeline file is a mapping"),
        ("no.yaml", "not YAML"),
        ("gone.yaml", "there is no"),
    ):
        done = run(place, "compile", file, "-o", "bad")
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert "is no engine directory" in run(place, "verify", "cache", "factories:tiny_bert").stderr
    assert run(place, "bench", "engine", "--size", "batch=x").returncode == 2


def test_a_directory_is_no_pipeline(place: Path) -> None:
    (place / "model").mkdir(exist_ok=True)
    assert "model is a directory, not a pipeline file" in run(place, "compile", "model", "-o", "out").stderr


def test_what_is_no_yaml_is_told_by_its_line(place: Path) -> None:
    (place / "broken.yaml").write_text("model: a\npasses: [{kind: x\n")
    assert "where: broken.yaml:3" in run(place, "compile", "broken.yaml", "-o", "out").stderr


def test_broken_contracts_that_are_forced_are_named(place: Path) -> None:
    tight: dict[str, object] = {"parity": {"metric": "max_abs", "limit": 1e-12}}
    done = run(place, "compile", write(place, "tight.yaml", tight), "-o", "tight", "--force")
    assert done.returncode == 0
    assert "broken contracts, written because of --force: " in done.stdout
    assert ", engine" in done.stdout
    assert run(place, "verify", "tight", "factories:tiny_bert").returncode == 1


def test_a_decoder_is_timed_at_the_sizes_by_default(place: Path) -> None:
    """A static cache, whose lengths are those of the tokens that are read."""
    passes = [
        {"kind": "canonicalize"}, {"kind": "fuse_attention"},
        {"kind": "insert_kv_cache", "layout": "static", "max_length": 64},
    ]  # fmt: skip
    changes: dict[str, object] = {
        "model": "factories:tiny_llama",
        "passes": passes,
        "dims": {"batch": [1, 8], "sequence": [1, 64]},
    }
    done = run(place, "compile", write(place, "decoder.yaml", changes), "-o", "decoder")
    assert "written decoder a decoder with a cache: graphopt generate decoder" in done.stdout.replace("\n", " ")
    timed = run(place, "bench", "decoder", "--seconds", "0.1")
    assert "batch=8 sequence=64" in timed.stdout, timed.stderr


@pytest.mark.slow
def test_interrupt_leaves_nothing(place: Path) -> None:
    command = [str(Path(sys.executable).parent / "graphopt"), "compile", write(place, "stop.yaml", {}), "-o"]
    for seconds in (0.0, 1.0):  # after the build has begun
        out = f"stopped-{seconds}"
        process = subprocess.Popen(
            [*command, out], cwd=place, env=environment(place), stderr=subprocess.PIPE, text=True
        )
        while not list(place.glob(f".{out}*")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0 or "Traceback" not in stderr
        if (place / out).exists():
            graphopt.load(place / out)  # it was done before the signal came
        assert not list(place.glob(f".{out}*"))
