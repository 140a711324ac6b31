"""What a pass is calibrated on, and how ranges are found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PositiveInt, field_validator, model_validator

from graphopt.schemas.common import Schema


def _described(data: Any) -> str:
    """In reports and manifests: the file, or what kind of object it was."""
    own = data.source if isinstance(data, _Kept) else data
    return str(own) if isinstance(own, str | Path) else f"<{type(own).__name__}>"


class _Kept:
    """An iterator whose items are kept as they come, so that they can be had again."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source, self._items = source, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        place = 0
        while True:
            if place == len(self._items):
                try:
                    self._items.append(next(self.source))
                except StopIteration:
                    return
            yield self._items[place]
            place += 1


class Calibration(Schema):
    """``data``: a file (.txt, a text a line; .jsonl, an object a line with ``field`` or the model's inputs; .npz, arrays by
    input, an example a row), or in Python an iterable of texts or of mappings from inputs to arrays ``[batch, ...]``.

    Observers find the largest magnitude that is kept: ``min_max``, all of it; ``moving_average`` of the batches' largest;
    ``percentile`` of all magnitudes; ``mse``, the least squared error; ``entropy``, the least KL divergence (TensorRT's)."""

    data: Annotated[Any, PlainSerializer(_described)]
    samples: PositiveInt = 128
    """How many examples are used at most."""
    batch: PositiveInt = 8
    max_length: PositiveInt = 256
    """Longer texts are cut, in tokens."""
    field: str = "text"
    """The key of the text in a .jsonl file."""
    observer: Literal["min_max", "moving_average", "percentile", "mse", "entropy"] = "min_max"
    percentile: float = Field(default=99.99, gt=50, le=100)

    @field_validator("data")
    @classmethod
    def _can_be_read_again(cls, data: Any) -> Any:
        """Of what can be read once, as much as may be needed: passes read the data several times."""
        return _Kept(data) if isinstance(data, Iterator) else data

    @model_validator(mode="after")
    def _percentile_is_used(self) -> Calibration:
        if self.observer != "percentile" and "percentile" in self.model_fields_set:
            raise ValueError(f"percentile is for observer: percentile, not for {self.observer}")
        return self
