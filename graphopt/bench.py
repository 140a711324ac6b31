"""Time an engine directory at given sizes."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from graphopt import artifact
from graphopt.backend import Progress, no_progress
from graphopt.dims import Dim
from graphopt.errors import PipelineError
from graphopt.execution import bind_dims
from graphopt.probes import ragged_mask
from graphopt.runtime.cache import NEW_LENGTHS, PAST_LENGTHS
from graphopt.runtime.engine import Engine
from graphopt.tensors import DTYPE_NAMES

WARM_UPS = 3


def parse_sizes(text: str) -> dict[str, int]:
    """``"batch=8,sequence=128"`` as sizes by name."""
    parts = [part.partition("=") for part in text.split(",")]
    try:
        sizes = {name.strip(): int(size) for name, _, size in parts}
    except ValueError:
        raise PipelineError(f"not sizes: {text!r}", where="--size", hint="write batch=8,sequence=128") from None
    if len(sizes) < len(parts) or min(sizes.values()) < 1:
        raise PipelineError(f"sizes are from 1 on, each given once: {text!r}", where="--size")
    return sizes


def bench_engine(
    folder: Path,
    sizes: list[dict[str, int]],
    seconds: float = 3.0,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Milliseconds of an engine at each of ``sizes`` (by default 1 and 8 of everything counted, 128 long), on random
    inputs with a padding mask."""
    engine = artifact.load(folder, threads=threads)
    results = []
    for index, wanted in enumerate(sizes or _default_sizes(engine)):
        progress(f"time {wanted}", index / max(len(sizes), 1))
        inputs = example_inputs(engine, wanted)
        for _ in range(WARM_UPS):
            engine(**inputs)
        times: list[float] = []
        deadline = time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < deadline:
            start = time.perf_counter()
            engine(**inputs)
            times.append(1000 * (time.perf_counter() - start))
        results.append({"sizes": wanted, **_summary(times)})
    return results


def _summary(times: list[float]) -> dict[str, float]:
    return {"median_ms": median(times), "min_ms": min(times), "p90_ms": quantiles(times, n=10)[-1], "runs": len(times)}


def _default_sizes(engine: Engine) -> list[dict[str, int]]:
    found = []
    for count in (1, 8):
        sizes = {}
        for name, bounds in engine.dims.items():
            size = max(count if name == "batch" else 128, bounds.min)
            sizes[name] = size if bounds.max is None else min(size, bounds.max)
        found.append(sizes)
    return found


def example_inputs(engine: Engine, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Random inputs at ``sizes``: small positive integers, normal floats, the mask with ragged padding, the beginning of texts
    for a cache."""
    unknown = sizes.keys() ^ engine.dims.keys()
    if unknown:
        raise PipelineError(
            f"sizes must name every dim once: {', '.join(sorted(unknown))}", hint=f"dims: {', '.join(engine.dims)}"
        )
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, type in engine.inputs.items():
        shape = tuple(size.evaluate(sizes) if isinstance(size, Dim) else size for size in type.shape)
        if name in (PAST_LENGTHS, NEW_LENGTHS):
            assert engine.layout is not None
            length = 0 if name == PAST_LENGTHS else sizes[engine.layout.sequence]
            inputs[name] = torch.full(shape, length, dtype=type.dtype)
        elif name == engine.manifest.mask:
            inputs[name] = ragged_mask(shape, generator).to(type.dtype)
        elif type.dtype.is_floating_point:
            inputs[name] = torch.randn(shape, generator=generator).to(type.dtype)
        else:
            inputs[name] = torch.randint(0, 2, shape, generator=generator).to(type.dtype)
    given = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in inputs.items()}
    bind_dims(engine.inputs, engine.dims, given)
    return inputs
