"""Every error that graphopt raises: what went wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphoptError(Exception):
    """Base of all errors. ``what`` is one sentence; ``where`` a node, source line, file or key; ``hint`` the way out."""

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if hint:
            lines.append(f"  to do: {hint}")
        super().__init__("\n".join(lines))


class GraphError(GraphoptError):
    """A graph that does not hold together, or an edit that would break it."""


class ParseError(GraphError):
    """Text that is not the text form of a graph."""


class TracingError(GraphoptError):
    """A module that cannot become a graph."""


class ModelError(GraphoptError):
    """A model that cannot be found or loaded."""


class RewriteError(GraphoptError):
    """A rule that is written wrongly: not a refusal, which is a normal outcome."""


class PassError(GraphoptError):
    """A pass that cannot do what it was asked to do on this graph."""


class CalibrationError(PassError):
    """Calibration data that cannot be used, or values that have no range."""


class NoMatchError(PassError):
    """A pass that changed nothing, where that was not allowed."""


class PipelineError(GraphoptError):
    """A pipeline that is wrong before anything runs: unknown pass or option, impossible order, bad value."""


class ParityError(GraphoptError):
    """A stage whose result is not the eager model's within its contract."""


class BackendError(GraphoptError):
    """A backend that cannot build or run."""


class MissingBackendError(BackendError):
    """A backend whose package is not installed."""


class LoweringError(BackendError):
    """An op that the target cannot express."""


class EngineError(GraphoptError):
    """An engine directory that is damaged, incomplete, or made by a newer graphopt."""


class InputError(GraphoptError):
    """Inputs of a call that do not fit: missing, unknown, wrong dtype, wrong shape."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest right spelling, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}known: {', '.join(known) or 'none'}"
