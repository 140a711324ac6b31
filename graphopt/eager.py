"""The eager model as the reference: its outputs under the names that the graph gives them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def path_name(path: tuple[object, ...]) -> str:
    """The name of an output by its place in what the module returns: ``logits``, ``hidden_states.3``, ``output``."""
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    if not parts:
        return "output"
    return ".".join(["output", *parts] if parts[0].isdigit() else parts)


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Take back what a module sets on itself meanwhile: rotary frequencies for long texts, a kind of attention. (Of a trace they
    would be fake tensors.)"""
    tables = ("_parameters", "_buffers", "_modules")
    kept = [(part, {**vars(part), **{name: dict(vars(part)[name]) for name in tables}}) for part in module.modules()]
    try:
        yield
    finally:
        for part, own in kept:
            vars(part).clear()
            vars(part).update(own)


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
