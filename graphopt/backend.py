"""What a backend is: builds an engine directory's model from a graph, loads it again, tells what it can do here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError
from torch import Tensor

from graphopt.errors import MissingBackendError, PipelineError, nearest
from graphopt.ir import Graph
from graphopt.pipeline import Stopwatch, validation_message
from graphopt.plugins import plugins
from graphopt.runtime.engine import Engine
from graphopt.schemas.common import Schema
from graphopt.schemas.manifest import Manifest
from graphopt.schemas.pipeline import TargetConfig
from graphopt.schemas.report import TacticReport

BACKENDS = "graphopt.backends"  # the entry point group

S = TypeVar("S", bound=Schema)

Progress = Callable[[str, float], None]  # (what is done, share between 0 and 1)


def no_progress(what: str, share: float) -> None:
    """Progress that nobody watches."""


@dataclass
class Built:
    """What a build left in the folder: sha256 by file name, ops of the engine, tactics taken, things to tell the user,
    what kernels the engine has where that can be seen, and the lengths of a static cache's buffers if they have several."""

    files: dict[str, str] = field(default_factory=dict)
    weights_digest: str = ""
    ops: dict[str, int] = field(default_factory=dict)
    tactics: list[TacticReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)
    cache_lengths: list[int] = field(default_factory=list)


class Backend(ABC):
    """One target, configured. Registered by the entry point group ``graphopt.backends``."""

    name: ClassVar[str]
    #: Passes that suit the target, in order, where the pipeline names none.
    standard_passes: ClassVar[Sequence[Mapping[str, Any]]] = ()
    #: What of the target it heeds, beside its name and ``tactics``, which are fixed where nothing is timed.
    takes: ClassVar[frozenset[str]] = frozenset({"options"})

    def __init__(self, target: TargetConfig) -> None:
        """PipelineError if something is asked for that it does not heed."""
        self.target = target
        for name, known in TargetConfig.model_fields.items():
            default = known.get_default(call_default_factory=True)
            if name not in ("backend", "tactics", *self.takes) and getattr(target, name) != default:
                raise PipelineError(
                    f"backend: {target.backend} has no {name}",
                    where=f"target.{name}",
                    hint=f"leave it out; there is {' and '.join(sorted(self.takes)) or 'nothing to set'}",
                )

    def check_graph(self, graph: Graph) -> None:  # noqa: B027  # most have no such options
        """PipelineError if options are about what the graph, as passes left it, has not: a size, a cache."""

    def options_as(self, schema: type[S]) -> S:
        """``target.options``, read. PipelineError names the one that is wrong."""
        return self.options_of(self.target.options, schema)

    @staticmethod
    def options_of(options: Mapping[str, Any], schema: type[S]) -> S:
        """Options of a target, read. PipelineError names the one that is wrong."""
        try:
            return schema(**options)
        except ValidationError as error:
            raise PipelineError(validation_message(error, schema.model_fields), where="target.options") from error

    @classmethod
    @abstractmethod
    def versions(cls) -> dict[str, str]:
        """The versions of the packages it runs on. MissingBackendError if one is not installed."""

    @abstractmethod
    def build(self, graph: Graph, folder: Path, progress: Progress = no_progress) -> Built:
        """Write the model into ``folder``. LoweringError or BackendError if the target cannot take the graph."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, manifest: Manifest, **options: Any) -> Engine:
        """The engine of a folder that ``build`` wrote."""

    @classmethod
    def unrunnable(cls) -> str | None:
        """Why engines cannot run on this machine, where they were built for another; None if they can."""
        return None

    def stand_in(self, graph: Graph, engine: Engine) -> Engine | None:
        """What runs an engine's model where the engine itself cannot run; None if nothing does.

        BackendError or MissingBackendError says why it does not take this one."""
        return None

    def stopwatch(self, graph: Graph) -> Stopwatch | None:
        """Times graphs on the target at the sizes of ``graph.dims``; None where nothing is to be timed."""
        return None

    def inner_values(
        self, graph: Graph, names: Sequence[str]
    ) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
        """Runs the graph on the target and shows inner values, to find where an engine first differs."""
        raise NotImplementedError

    @classmethod
    def facts(cls) -> dict[str, str]:
        """What ``graphopt doctor`` prints: providers, devices, faults in force."""
        return {}


def known_backends() -> dict[str, type[Backend]]:
    """Every installed backend by name, third parties' included."""
    return plugins(BACKENDS, Backend)  # type: ignore[type-abstract]


def backend_class(name: str) -> type[Backend]:
    known = known_backends()
    if name not in known:
        raise PipelineError(f"there is no backend {name!r}", where="target.backend", hint=nearest(name, known))
    return known[name]


def refuse_options(name: str, options: Mapping[str, Any], known: str) -> None:
    """PipelineError for options of loading that engines of a backend have not; ``known``: those that they have."""
    if options:
        raise PipelineError(f"the {name} engine has no option {', '.join(options)}", hint=known)


def missing(package: str, extra: str) -> MissingBackendError:
    """The error of a backend whose package is not installed."""
    return MissingBackendError(f"{package} is not installed", hint=f"pip install 'graphopt[{extra}]'")
