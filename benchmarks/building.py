"""One build of SmolLM2 in a fresh process: ``python -m benchmarks.building WORK FOLDER`` prints its seconds and memory.

WORK is ``export`` (torch.export.export alone), ``onnx`` (torch.onnx.export to a file), ``timed`` (graphopt.compile with an
empty store of tactics), ``kept`` (with the store in FOLDER) or ``fixed`` (tactics: fixed). The clock and the peak of memory
start when the model is loaded and every weight has been read; what the work imports lazily counts as its own."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import graphopt
from benchmarks.assets import smollm2
from benchmarks.measure import THREADS, quiet, use_threads

INTERVAL = 0.01  # seconds between samples of the memory


def main(work: str, store: str) -> dict[str, Any]:
    use_threads()
    with quiet(), tempfile.TemporaryDirectory() as folder:
        source = graphopt.load_model(str(smollm2()))
        weights = weight_bytes(source.module)
        call = works(source, Path(folder), Path(store))[work]
        settle()
        memory = Memory()
        start, processor = time.perf_counter(), time.process_time()
        parts = call()
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        return {"seconds": seconds, "cpu": processor, "parts": parts or {}, "weights": weights, **memory.stop()}


def works(source: graphopt.Source, folder: Path, store: Path) -> dict[str, Callable[[], dict[str, float] | None]]:
    return {
        "export": lambda: export(source),
        "onnx": lambda: onnx_export(source, folder),
        "timed": lambda: compile_engine(source, folder, folder / "empty", "timed"),
        "kept": lambda: compile_engine(source, folder, store, "timed"),
        "fixed": lambda: compile_engine(source, folder, store, "fixed"),
    }


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of the parameters, tied ones once. Reads every one, so that all their pages are in memory."""
    parameters = {parameter.data_ptr(): parameter for parameter in module.parameters()}
    for parameter in parameters.values():
        parameter.detach().sum()
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def dynamic_shapes(source: graphopt.Source) -> dict[str, dict[int, Any]]:
    """Dynamic batch and sequence of every input."""
    return {
        name: dict.fromkeys(range(tensor.ndim), torch.export.Dim.DYNAMIC) for name, tensor in source.tensors.items()
    }


def export(source: graphopt.Source) -> None:
    with torch.no_grad():
        torch.export.export(source.module, (), source.tensors, dynamic_shapes=dynamic_shapes(source), strict=False)


def onnx_export(source: graphopt.Source, folder: Path) -> None:
    torch.onnx.export(
        source.module, (), folder / "model.onnx", kwargs=source.tensors, dynamo=True, verbose=False,
        dynamic_shapes=dynamic_shapes(source),
    )  # fmt: skip


def compile_engine(source: graphopt.Source, folder: Path, store: Path, tactics: str) -> dict[str, float]:
    """The whole compile, its proofs included; tactics are kept under ``store`` instead of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(store)
    target = {"backend": "onnxruntime", "threads": THREADS, "tactics": tactics}
    return graphopt.compile(source, folder / "engine", target=target).report.seconds


# Memory


def settle() -> None:
    """Give freed memory back to the system, so that what comes next cannot hide in it."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Memory:
    """The process's resident memory from here on, in bytes, anonymous and file pages both.

    ``peak`` is the kernel's own high-water mark (VmHWM, set back at the start), so no peak falls between two samples; a
    thread's samples every 10 ms say what the pages of the largest one were."""

    def __init__(self) -> None:
        self.exact = reset_peak()
        self.before = resident()
        self.largest = self.before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.largest = max(self.largest, resident(), key=lambda now: now["VmRSS"])

    def stop(self) -> dict[str, Any]:
        self._stop.set()
        self._thread.join()
        sampled = self.largest["VmRSS"]
        return {
            "rss_before": self.before["VmRSS"],
            "peak": max(resident()["VmHWM"], sampled) if self.exact else sampled,
            "sampled_peak": sampled,
            "anonymous": self.largest["RssAnon"] - self.before["RssAnon"],
            "file": self.largest["RssFile"] - self.before["RssFile"],
        }


def resident() -> dict[str, int]:
    """Resident bytes by kind, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split() for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon", "RssFile")))
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in pairs}


def reset_peak() -> bool:
    """Set the kernel's high-water mark back to now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:3])))
