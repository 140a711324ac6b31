"""What TensorRT says: one logger for the life of the process, heard by who listens."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from graphopt.backends.tensorrt import flavours
from graphopt.backends.tensorrt.engine import Opened, TensorRtEngine, opened_plan
from graphopt.backends.tensorrt.options import Options
from graphopt.errors import BackendError
from graphopt.schemas.manifest import Manifest


class TalkingLibrary:
    """A library that takes a logger."""

    __version__ = "11.0"

    ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE"])

    class ILogger:
        Severity = Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])


SEVERITIES = TalkingLibrary.ILogger.Severity


def say(message: str, severity: object = SEVERITIES.ERROR) -> None:
    flavours.logger_of(TalkingLibrary).log(severity, message)


def test_errors_and_warnings_are_heard_while_somebody_listens() -> None:
    say("before")
    with flavours.listening(TalkingLibrary) as outer:
        with flavours.listening(TalkingLibrary):
            pass
        say("Validation failed", SEVERITIES.INTERNAL_ERROR)
        with flavours.listening(TalkingLibrary) as inner:
            for severity in SEVERITIES:
                for text in ("twice", "Int64 binding of x"):
                    say(text, severity)
                    say(text, severity)
        say("last", SEVERITIES.WARNING)
    say("after")
    both = ["twice", "twice", "Int64 binding of x", "Int64 binding of x"]
    assert inner.errors == [*both, *both]
    assert outer.errors == ["Validation failed", *both, *both]
    assert (inner.warnings, outer.warnings) == (["twice"], ["twice", "last"])
    assert inner.why == "twice; Int64 binding of x"
    assert flavours.Said(["a", "b", "a", "c", "d"]).why == "a; b; c"
    assert flavours.Said().why == "it does not say why"


def test_a_thread_hears_its_own_and_what_no_listener_said() -> None:
    """Several builds at once; the library's own threads are nobody's."""
    both_listen = threading.Barrier(2)

    def build(name: str) -> list[str]:
        with flavours.listening(TalkingLibrary) as said:
            both_listen.wait()
            say(name)
            both_listen.wait()
            if name == "first":
                worker = threading.Thread(target=say, args=("a worker",))
                worker.start()
                worker.join()
            both_listen.wait()
        return said.errors

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(build, ["first", "second"]))
    assert found == [["first", "a worker"], ["second", "a worker"]]


def test_there_is_one_logger_whoever_asks_first() -> None:
    class Library(TalkingLibrary):
        pass

    together = threading.Barrier(8)

    def ask(index: int) -> Any:
        together.wait()
        return flavours.logger_of(Library)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(map(id, pool.map(ask, range(8))))) == 1


def test_a_plan_that_does_not_open_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library(TalkingLibrary):
        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, data: bytes) -> None:
                self.logger.log(SEVERITIES.ERROR, "a stale plan")

    monkeypatch.setattr(flavours.Flavour, "module", lambda flavour: Library)
    with pytest.raises(BackendError, match=r"tensorrt 11\.0 does not open the plan: a stale plan") as error:
        opened_plan(flavours.TENSORRT, b"", Path("model.plan"), "10.6.0")
    assert "built with 10.6.0" in str(error.value.hint)


@pytest.mark.parametrize("words", ["no kernel for this", ""])
def test_a_run_that_fails_says_why(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=f"cannot run the engine: {words or 'it does not say why'}"):
        engine_that(words, False, monkeypatch).enqueue({}, {}, {})


def test_what_is_said_in_a_run_that_succeeds_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a plugin's failure for a run."""
    with pytest.warns(UserWarning, match="tensorrt ran the engine, and says: no kernel for this"):
        assert engine_that("no kernel for this", True, monkeypatch).enqueue({}, {}, {}) == {}
    assert engine_that("", True, monkeypatch).enqueue({}, {}, {}) == {}


@pytest.mark.parametrize("is_made", [False, True], ids=["no context", "no room for the profile"])
def test_a_context_that_cannot_be_made_says_what_it_needs(is_made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own profile's scratch memory."""

    class Plan:
        def create_execution_context(self, strategy: object) -> object:
            assert strategy == TalkingLibrary.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
            say("out of memory")
            return SimpleNamespace(set_optimization_profile_async=lambda index, stream: False) if is_made else None

        def get_device_memory_size_for_profile_v2(self, index: int) -> int:
            return (index + 5) << 20

    engine = engine_that("", True, monkeypatch)
    engine._opened = Opened(TalkingLibrary, Plan(), None)
    with pytest.raises(BackendError, match="makes no context, which needs 5 MiB: out of memory"):
        engine.enqueue({}, {}, {})


def engine_that(says: str, is_done: bool, monkeypatch: pytest.MonkeyPatch) -> TensorRtEngine:
    class Context:
        def execute_async_v3(self, stream: int) -> bool:
            if says:
                say(says)
            return is_done

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    report = SimpleNamespace(engine_ops={}, final_ops={})
    manifest = cast(Manifest, SimpleNamespace(inputs={}, outputs={}, dims={}, cache_lengths=[], report=report))
    engine = TensorRtEngine(Path(), manifest, flavours.TENSORRT, Options())
    engine._opened = Opened(TalkingLibrary, None, None, {(0, threading.get_ident()): Context()})
    return engine
