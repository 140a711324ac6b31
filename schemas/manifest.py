"""``manifest.json`` of an engine directory."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from graphopt.schemas.common import Schema
from graphopt.schemas.report import BuildReport

FORMAT = 1


class TensorSpec(Schema):
    """An input or output: dtype (``f32``, ``i64``...) and shape, each size a number or an expression of named dims."""

    dtype: str
    shape: list[int | str]


class Manifest(Schema):
    """Everything about an engine but its data. ``files`` holds the sha256 of every other file of the directory."""

    format: int = FORMAT
    graphopt: str
    versions: dict[str, str]
    model: str
    weights_digest: str
    pipeline: dict[str, Any]
    backend: str
    dims: dict[str, tuple[int, int | None]]
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    mask: str | None = None
    cache_lengths: list[int] = Field(default_factory=list)
    """Of a static cache's buffers, shortest first, where they have several."""
    report: BuildReport = Field(default_factory=BuildReport)
    files: dict[str, str] = Field(default_factory=dict)
