"""What is compiled: a module with example inputs; made for any transformers model from its ``forward`` and config."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import ModelError
from graphopt.probes import Sampler, is_mask, sampler_like
from graphopt.tensors import DimRange


@dataclass
class Source:
    """A model ready to compile: the module in evaluation mode, example inputs, names of their dynamic axes.

    ``dims``: ranges where the model knows them; ``vocabulary``: for integer inputs, how many values there are; ``mask``: the
    padding mask among the inputs, ones for tokens and zeros: an input of that name and kind unless given, ``""`` for none; what
    is proven of attention is proven for such a mask; ``padding``: for inputs beside it, what stands where it is 0;
    ``left_padding``: whether the model takes padding on the left as well; ``files``: where the tokenizer's files lie."""

    module: nn.Module
    inputs: dict[str, Tensor | None]
    axes: dict[str, tuple[str | None, ...]]
    name: str = "model"
    dims: dict[str, DimRange] = field(default_factory=dict)
    vocabulary: dict[str, int] = field(default_factory=dict)
    mask: str | None = None
    padding: dict[str, int] = field(default_factory=dict)
    left_padding: bool = True
    files: Path | None = None
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        if self.mask is None:
            given = ((name, tensor) for name, tensor in self.inputs.items() if isinstance(tensor, Tensor))
            self.mask = next((name for name, tensor in given if is_mask(name, tensor)), None)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The example inputs that are given."""
        return {name: tensor for name, tensor in self.inputs.items() if tensor is not None}

    @property
    def truths(self) -> tuple[str, ...]:
        """The inputs that hold zeros and ones only."""
        return (self.mask,) if self.mask is not None and self.mask in self.tensors else ()

    @property
    def traced(self) -> dict[str, int]:
        """The example's size of each named axis."""
        return {
            axis: self.tensors[name].shape[index]
            for name, names in self.axes.items()
            for index, axis in enumerate(names)
            if axis
        }

    def sample(self) -> Sampler:
        return self.sampler or sampler_like(
            self.tensors, self.axes, self.vocabulary, self.mask, self.padding, self.left_padding
        )


def transformers_source(module: Any, *, name: str = "model", files: Path | None = None) -> Source:
    """A Source for a transformers model: inputs for what its ``forward`` takes, with their dynamic axes.

    Tokens ``[batch, sequence]`` with attention mask and token types; pixels ``[batch, channels, height, width]`` at the
    config's image size (``[images, ...]`` beside tokens); waves ``[batch, samples]``; spectra of the config's length; for
    encoder-decoders decoder tokens ``[batch, decoder_sequence]``. ModelError if it needs anything else."""
    module = module.eval()
    for part in module.modules():  # a decoder may have a copy of the config
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = (
                False  # a cache in the outputs cannot be traced; insert_kv_cache makes one in the graph
            )
    takes = inspect.signature(module.forward).parameters
    source = Source(module, {}, {}, name, files=files, left_padding=module.config.model_type not in _PADDED_RIGHT)
    main = getattr(module, "main_input_name", "input_ids")
    for reads, add in _INPUTS.items():
        if reads in takes and (reads == main or reads in ("input_ids", "pixel_values")):
            add(source, module.config, takes)
    if main not in source.inputs:
        raise ModelError(
            f"{type(module).__name__} reads {main}, and example inputs are made for {', '.join(_INPUTS)} only",
            hint="write a factory that returns a graphopt.Source with example inputs",
        )
    if module.config.is_encoder_decoder and "decoder_input_ids" in takes:
        _add_tokens(source, "decoder_input_ids", module.config, "decoder_sequence", length=5)
    source.mask = "attention_mask" if "attention_mask" in source.inputs else None
    return source


def _sub_config(config: Any, name: str, key: str) -> Any:
    """The part of a config that knows ``key``: itself or its ``name``."""
    return config if hasattr(config, key) else getattr(config, name, config)


def _add_tokens(source: Source, name: str, config: Any, axis: str, length: int) -> None:
    vocabulary = getattr(_sub_config(config, "text_config", "vocab_size"), "vocab_size", CHARACTERS)
    source.inputs[name] = torch.arange(2 * length).reshape(2, length) % vocabulary
    source.axes[name] = ("batch", axis)
    source.vocabulary[name] = vocabulary
    longest = _longest_sequence(_sub_config(config, "text_config", "max_position_embeddings"))
    if longest is not None:
        source.dims[axis] = DimRange(1, longest)


def _add_text(source: Source, config: Any, takes: Any) -> None:
    _add_tokens(source, "input_ids", config, "sequence", length=6)
    ids = source.tensors["input_ids"]
    if "attention_mask" in takes:
        source.inputs["attention_mask"] = torch.ones_like(ids)
        padding = getattr(_sub_config(config, "text_config", "vocab_size"), "pad_token_id", None)
        if padding is not None and padding < source.vocabulary["input_ids"]:
            source.padding["input_ids"] = padding
    types = getattr(config, "type_vocab_size", 0)
    if "token_type_ids" in takes and types > 1:
        source.inputs["token_type_ids"] = torch.zeros_like(ids)
        source.vocabulary["token_type_ids"] = types
    source.axes = dict.fromkeys(source.inputs, ("batch", "sequence"))


def _add_pixels(source: Source, config: Any, takes: Any) -> None:
    vision = _sub_config(config, "vision_config", "image_size")
    size = getattr(vision, "image_size", 64)  # 64 for those that take any
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    source.inputs["pixel_values"] = _noise(2, channels, height, width)
    source.axes["pixel_values"] = ("images" if source.axes else "batch", None, None, None)


def _add_waves(source: Source, config: Any, takes: Any) -> None:
    """Sound: a spectrum where the config has mel bins, else samples, at least as many as the convolutions eat."""
    if hasattr(config, "num_mel_bins"):
        source.inputs["input_values"] = _noise(2, config.max_length, config.num_mel_bins)
        source.axes["input_values"] = ("batch", None, None)
        return
    needed, step = 1, 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        needed, step = (needed - 1) * stride + kernel, step * stride
    source.inputs["input_values"] = _noise(2, needed + 12 * step + 1)
    source.axes["input_values"] = ("batch", "samples")
    source.dims["samples"] = DimRange(needed + step, None)


def _add_spectra(source: Source, config: Any, takes: Any) -> None:
    source.inputs["input_features"] = _noise(2, config.num_mel_bins, 2 * config.max_source_positions)
    source.axes["input_features"] = ("batch", None, None)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


CHARACTERS = 128  # ids that every model without a vocabulary, which reads characters, takes

#: What a forward may read, and who makes it.
_INPUTS = {
    "input_ids": _add_text,
    "pixel_values": _add_pixels,
    "input_values": _add_waves,
    "input_features": _add_spectra,
}

#: Causal models whose result is that of one position, which left padding would hide from itself.
_PADDED_RIGHT = frozenset({"clip", "clip_text_model", "clipseg", "metaclip_2", "groupvit", "owlvit", "owlv2", "xclip"})

#: Models that count positions from the padding id on, so that the first ones are never used.
_OFFSET_POSITIONS = frozenset(
    {
        "roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet", "longformer", "esm", "luke", "data2vec-text",
        "ibert", "roberta-prelayernorm", "xmod", "mra",
    }
)  # fmt: skip


def _longest_sequence(config: Any) -> int | None:
    """How many tokens the config has positions for, where it says so."""
    longest: int | None = getattr(config, "max_position_embeddings", None)
    if longest is None or longest < 1:
        return None
    return longest - (config.pad_token_id or 0) - 1 if config.model_type in _OFFSET_POSITIONS else longest
