"""TensorRT and TensorRT-RTX: two libraries with nearly one API."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from packaging.version import Version

from graphopt.errors import BackendError, MissingBackendError


@dataclass(frozen=True)
class Flavour:
    """A library: ``name`` is the backend's, ``modules`` those that its Python API may be found in, ``packages`` what to install.

    ``builds_without_gpu``: whether engines are built for devices that are not there, by rules instead of timings;
    ``has_plugins``: whether it brings some."""

    name: str
    modules: tuple[str, ...]
    packages: str
    builds_without_gpu: bool
    has_plugins: bool

    def module(self) -> Any:
        """Its Python API. MissingBackendError if it is not installed."""
        for name in self.modules:
            try:
                return importlib.import_module(name)
            except ImportError:
                continue
        raise MissingBackendError(f"{self.modules[0]} is not installed", hint=f"pip install {self.packages}")

    def version(self) -> str:
        version: str = self.module().__version__
        return version


TENSORRT = Flavour("tensorrt", ("tensorrt",), "'graphopt[tensorrt]' on a machine with an NVIDIA GPU", False, True)
RTX = Flavour(
    "tensorrt_rtx",
    ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
    True,
    False,
)

#: What the parser of TensorRT 10.6 has not, of the ops that the standard dialect uses.
_SINCE = {"Attention": "10.14", "RMSNormalization": "10.14", "RotaryEmbedding": "10.14", "TensorScatter": "10.15"}
_NOT_IN_RTX = {"NonZero"}


def parsed_ops(flavour: Flavour) -> Callable[[str], bool]:
    """Whether the flavour's parser knows an op; where it is not installed, whether the oldest one that is supported does."""
    try:
        trt = flavour.module()
    except MissingBackendError:
        return lambda op: op not in (_NOT_IN_RTX if flavour.builds_without_gpu else _SINCE)
    if flavour.builds_without_gpu:
        return lambda op: op not in _NOT_IN_RTX
    version = Version(trt.__version__)
    return lambda op: op not in _SINCE or version >= Version(_SINCE[op])


def load_plugins(trt: Any, creators: Iterable[tuple[str, str]] = ()) -> None:
    """The plugins that the library brings, for parsing and opening engines that have some.

    BackendError if it has one of the ``creators`` (name and version) not."""
    trt.init_libnvinfer_plugins(logger_of(trt), "")
    for name, version in creators:
        if trt.get_plugin_registry().get_creator(name, version, "") is None:
            raise BackendError(f"TensorRT {trt.__version__} has no plugin {name}, version {version}")


@dataclass(eq=False)
class Said:
    """What a library said to one listener, by severity."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)

    @property
    def why(self) -> str:
        """The first errors: the very first may be a plugin's, which misses a library that it does not need."""
        return "; ".join(list(dict.fromkeys(self.errors))[:3]) or "it does not say why"


@contextmanager
def listening(trt: Any) -> Iterator[Said]:
    """What the library and its plugins say meanwhile to this thread; what threads of the library's own say, every listener
    hears."""
    heard, logger = Said(), logger_of(trt)
    logger.listeners.append(heard)
    try:
        yield heard
    finally:
        logger.listeners.remove(heard)


def logger_of(trt: Any) -> Any:
    """The library's only logger, which is never let go: the library and its plugins keep the first that they are given,
    without owning it."""
    with _LOCK:
        return _logger_of(trt)


_LOCK = threading.Lock()


@functools.cache
def _logger_of(trt: Any) -> Any:
    severities = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.listeners: list[Said] = []

        def log(self, severity: Any, message: str) -> None:
            listeners, thread = tuple(self.listeners), threading.get_ident()
            for heard in [each for each in listeners if each.thread == thread] or listeners:
                if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                    heard.errors.append(message)
                elif (
                    severity == severities.WARNING and message not in heard.warnings and "Int64 binding" not in message
                ):
                    heard.warnings.append(message)

    return Logger()
