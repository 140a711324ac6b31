"""What other packages add by entry points: passes and backends."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TypeVar

from graphopt.errors import PipelineError

T = TypeVar("T")


def plugins(group: str, base: type[T]) -> dict[str, type[T]]:
    """Every installed subclass of ``base`` in an entry point group, by name. PipelineError for one that is something else."""
    found: dict[str, type[T]] = {}
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        loaded = point.load()
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            raise PipelineError(f"the entry point {point.name!r} ({point.value}) is no graphopt {base.__name__}")
        found[point.name] = loaded
    return found
