"""Small models of transformers classes: their configs filled with small sizes, random weights that matter."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from benchmarks.zoo.catalog import SMALL, Animal
from graphopt.sources import Source, transformers_source


def source(animal: Animal, attention: str) -> Source:
    """The animal with random weights (seeded), traced with this attention implementation, and inputs for it."""
    torch.manual_seed(0)
    cls = getattr(transformers, animal.model)
    config = small_config(cls.config_class, animal.changes)
    config._attn_implementation = attention
    return transformers_source(cls(config), name=animal.name)


def implementations(animal: Animal) -> tuple[str, ...]:
    """The attention implementations that the class has."""
    return tuple(attention for attention in ("eager", "sdpa") if attention == "eager" or _has_sdpa(animal))


def _has_sdpa(animal: Animal) -> bool:
    try:
        source(animal, "sdpa")
    except ValueError as error:
        if "does not support" in str(error):
            return False
        raise
    return True


def small_config(cls: Any, changes: dict[str, Any]) -> Any:
    """A config whose fields have the sizes of ``SMALL``, then those of ``changes``; configs inside it too."""
    sizes = {key: size for key, size in SMALL.items() if key in _fields(cls)}
    inner = {name: small_config(part, changes.get(name, {})).to_dict() for name, part in _parts(cls).items()}
    flat = {key: copy.deepcopy(change) for key, change in changes.items() if key not in inner}
    return cls(**{**sizes, **inner, **flat})


def _fields(cls: Any) -> set[str]:
    """What a config class can be given, under its own names and those it maps to them."""
    own = set(cls.__dataclass_fields__)
    return own - set(cls.attribute_map)


def _parts(cls: Any) -> dict[str, Any]:
    """The classes of the configs inside a config."""
    return {name: part for name, part in cls.sub_configs.items() if hasattr(part, "__dataclass_fields__")}
