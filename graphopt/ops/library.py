"""How the ``graphopt::`` torch ops are registered: as composites, so that one body serves values and gradients alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "DEF")  # type: ignore[no-untyped-call]


#: By op name: (arguments by name) -> empty results of the right dtype and shape.
SHAPES: dict[str, Callable[[Mapping[str, Any]], tuple[Tensor, ...]]] = {}


def own_op(
    schema: str, shapes: Callable[[Mapping[str, Any]], tuple[Tensor, ...]]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a body under its name. ``shapes`` says only what comes out: type inference runs that instead of the body."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(f"{body.__name__}{schema}")  # type: ignore[no-untyped-call]
        _library.impl(body.__name__, body, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
        SHAPES[f"graphopt.{body.__name__}.default"] = shapes
        return body

    return register
