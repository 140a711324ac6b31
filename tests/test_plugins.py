"""Passes of other packages that cannot be used are named with their package."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from graphopt import plugins
from graphopt.errors import PipelineError
from graphopt.pipeline import known_passes
from tests.test_pipeline import Invert, Nothing


class Point:
    """An entry point."""

    dist = SimpleNamespace(name="a-package")

    def __init__(self, name: str, loaded: object, value: str = "a.module:Own") -> None:
        self.name, self.loaded, self.value = name, loaded, value

    def load(self) -> object:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([Point("invert", ModuleNotFoundError("No module named 'nothere'"))], "of a-package does not load: No module"),
        ([Point("invert", int)], "is no graphopt Pass"),
        ([Point("named", Invert)], "the entry point 'named' is of the pass 'invert'"),
        ([Point("invert", Invert), Point("invert", Nothing, "b:C")], "two entry points are called 'invert'"),
    ],
)
def test_plug_ins_that_cannot_be_used(points: list[Point], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    with pytest.raises(PipelineError, match=message):
        known_passes()
