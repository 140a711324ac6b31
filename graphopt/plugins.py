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
        try:
            loaded = point.load()
        except Exception as error:
            package = point.dist.name if point.dist is not None else "an unknown package"
            raise PipelineError(
                f"the entry point {point.name!r} ({point.value}) of {package} does not load: {error}",
                where=f"entry points, {group}",
                hint=f"mend or uninstall {package}",
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            raise PipelineError(f"the entry point {point.name!r} ({point.value}) is no graphopt {base.__name__}")
        if found.get(point.name, loaded) is not loaded:
            raise PipelineError(
                f"two entry points are called {point.name!r}: of {found[point.name].__module__} and {loaded.__module__}",
                where=f"entry points, {group}",
                hint="give one of them another name",
            )
        found[point.name] = loaded
    return found
