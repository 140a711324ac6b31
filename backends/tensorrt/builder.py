"""From an ONNX file to a plan: parsing, configuration, progress, and errors that name our nodes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from graphopt.backend import Progress
from graphopt.backends.tensorrt.flavours import Flavour, Said, listening, logger_of
from graphopt.backends.tensorrt.options import Options, Profile, shapes_in
from graphopt.errors import BackendError
from graphopt.models import cache_folder
from graphopt.tensors import TensorType


@dataclass
class Plan:
    """A serialized engine, the layers that were parsed (by kind), and what the library warned of."""

    data: bytes
    layers: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def build_plan(
    flavour: Flavour,
    model: Path,
    inputs: Mapping[str, TensorType],
    profiles: list[Profile],
    options: Options,
    origins: Mapping[str, str],
    progress: Progress,
) -> Plan:
    """``origins``: where each node of the model comes from, by its name.

    BackendError says which node the importer or the builder refuses, and where that comes from."""
    trt = flavour.module()
    with listening(trt) as said:
        builder = trt.Builder(logger_of(trt))
        if builder is None or (not flavour.builds_without_gpu and not torch.cuda.is_available()):
            raise BackendError(
                f"{flavour.name} builds on a machine with an NVIDIA GPU, and there is none",
                hint="build there, or for backend: tensorrt_rtx here",
            )
        builder.max_threads = os.cpu_count() or 1
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger_of(trt))
        if not parser.parse_from_file(str(model)):
            raise BackendError(*_refusal(parser, said, flavour, origins))
        _make_decomposable(trt, network)
        config = _config(trt, builder, options)
        for profile in profiles:
            config.add_optimization_profile(_profile(builder, inputs, profile))
        cache = None if flavour.builds_without_gpu else _timing_cache_file(flavour, options)
        timings = None if cache is None else _load_timings(config, cache)
        with _stoppable() as stop:
            config.progress_monitor = _monitor(trt, progress, stop)
            plan = builder.build_serialized_network(network, config)
    if stop.is_set():
        raise KeyboardInterrupt
    if plan is None:
        given = sorted(options.model_fields_set - {"shapes", "profiles", "compute_capabilities"})
        raise BackendError(
            f"{flavour.name} cannot build the engine: {said.why}",
            where=_origin_in(said.errors, origins),
            hint=f"is it one of target.options: {', '.join(given)}?" if given else None,
        )
    _save_timings(config, timings, cache)
    return Plan(bytes(plan), _kinds(network), said.warnings)


# Errors


def _refusal(parser: Any, said: Said, flavour: Flavour, origins: Mapping[str, str]) -> tuple[str]:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        return (f"{flavour.name} cannot read the model: {said.why}",)
    first = errors[0]
    name, origin = first.node_name(), origins.get(first.node_name(), "")
    comes = f" (from {origin})" if origin else ""
    return (f"{flavour.name} does not take {first.node_operator()} {name}{comes}: {first.desc()}",)


def _origin_in(messages: list[str], origins: Mapping[str, str]) -> str | None:
    """Where the first of our nodes that any message mentions comes from."""
    longest_first = sorted(origins, key=len, reverse=True)
    return next((origins[name] for message in messages for name in longest_first if name in message), None)


# Configuration


def _config(trt: Any, builder: Any, options: Options) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    wanted = {
        "TF32": options.tf32,
        "SPARSE_WEIGHTS": options.sparse_weights,
        "REFIT": options.refit,
        "VERSION_COMPATIBLE": options.version_compatible,
    }
    for name, on in wanted.items():
        flag = getattr(trt.BuilderFlag, name)
        if on:
            config.set_flag(flag)
        elif config.get_flag(flag):
            config.clear_flag(flag)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), index)
    return config


def _profile(builder: Any, inputs: Mapping[str, TensorType], profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for name, type in inputs.items():
        made.set_shape(name, *shapes_in(type, profile))
    return made


def _make_decomposable(trt: Any, network: Any) -> None:
    """An attention for which no kernel fits is built of products rather than refused."""
    if not hasattr(trt, "IAttentionInputLayer"):
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _kinds(network: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for index in range(network.num_layers):
        kind = network.get_layer(index).type.name
        found[kind] = found.get(kind, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# Timings


def _timing_cache_file(flavour: Flavour, options: Options) -> Path:
    if options.timing_cache is not None:
        return Path(options.timing_cache)
    return cache_folder() / f"{flavour.name}-{flavour.version()}.timings"


def _load_timings(config: Any, file: Path) -> Any:
    """The timings of earlier builds; the library itself leaves out those of other versions and devices."""
    timings = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if timings is None:
        timings = config.create_timing_cache(b"")
    if timings is not None:
        config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def _save_timings(config: Any, timings: Any, file: Path | None) -> None:
    if timings is None or file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_bytes(bytes(config.get_timing_cache().serialize()))
    fresh.replace(file)


# Progress


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """While a build runs, Ctrl-C asks it to stop; it does so after the step it is at."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _monitor(trt: Any, progress: Progress, stop: threading.Event) -> Any:
    """The builder's phases as one share: each phase counts within the step of the phase around it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[int, int, str | None]] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.phases[phase] = 0, max(steps, 1), parent
            progress("build", self.share())

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.phases:
                _, steps, parent = self.phases[phase]
                self.phases[phase] = min(step + 1, steps), steps, parent
                progress("build", self.share())
            return not stop.is_set()

        def phase_finish(self, phase: str) -> None:
            self.phases.pop(phase, None)

        def share(self) -> float:
            outer = [name for name, (_, _, parent) in self.phases.items() if parent not in self.phases]
            return sum(self.within(name) for name in outer[:1])

        def within(self, phase: str) -> float:
            done, steps, _ = self.phases[phase]
            inner = [name for name, (_, _, parent) in self.phases.items() if parent == phase]
            return min((done + sum(self.within(name) for name in inner[:1])) / steps, 1.0)

    return Monitor()
