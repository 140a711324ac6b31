"""The eager model as the reference: its outputs under the names that the graph gives them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def path_name(path: tuple[object, ...]) -> str:
    """The name of an output by its place in what the module returns: ``logits``, ``hidden_states.3``, ``output``."""
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    if not parts:
        return "output"
    return ".".join(["output", *parts] if parts[0].isdigit() else parts)


def eager(module: nn.Module) -> Callable[..., dict[str, Tensor]]:
    """The module as a function from named inputs to named outputs, without gradients."""

    def call(**inputs: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs = module(**inputs)
        leaves = pytree.tree_flatten_with_path(outputs)[0]
        return {path_name(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}

    return call


def kept(outputs: Mapping[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
    """The outputs that a graph has as well."""
    return {name: tensor for name, tensor in outputs.items() if name in names}
