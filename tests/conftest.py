"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graphopt import pipeline
from graphopt.ir import Graph
from graphopt.pipeline import Context, Pass
from graphopt.schemas.report import PassReport
from graphopt.text import parse
from tests.texts import bytes_tokenizer


@pytest.fixture(autouse=True)
def _verified_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass that runs in any test gets a graph that verifies and leaves one that verifies and still parses."""
    original = pipeline._run_one

    def checked(graph: Graph, step: Pass, context: Context) -> PassReport:
        graph.verify()
        report = original(graph, step, context)
        graph.verify()
        assert str(parse(str(graph))) == str(graph)
        return report

    monkeypatch.setattr(pipeline, "_run_one", checked)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed tactics of tests stay in the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test keeps in the user's cache, no other finds there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a token for each byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    bytes_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch runs on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
