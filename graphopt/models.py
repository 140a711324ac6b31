"""Where models come from: a hub id, a directory, a GGUF file, or ``package.module:factory``."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import ModelError, nearest
from graphopt.ir import DimRange
from graphopt.probes import Sampler, is_mask, sampler_like

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
    "tokenizer.model", "added_tokens.json", "chat_template.jinja", "generation_config.json", "config.json",
)  # fmt: skip


@dataclass
class Source:
    """A model ready to compile: the module in evaluation mode, example inputs, names of their dynamic axes.

    ``dims``: ranges where the model knows them; ``vocabulary``: for integer inputs, how many values there are; ``mask``:
    the padding mask among the inputs; ``files``: where the tokenizer's files lie."""

    module: nn.Module
    inputs: dict[str, Tensor | None]
    axes: dict[str, tuple[str | None, ...]]
    name: str = "model"
    dims: dict[str, DimRange] = field(default_factory=dict)
    vocabulary: dict[str, int] = field(default_factory=dict)
    mask: str | None = None
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
    def traced(self) -> dict[str, int]:
        """The example's size of each named axis."""
        return {
            axis: self.tensors[name].shape[index]
            for name, names in self.axes.items()
            for index, axis in enumerate(names)
            if axis
        }

    def sample(self) -> Sampler:
        return self.sampler or sampler_like(self.tensors, self.axes, self.vocabulary)


def load_model(spec: str, base: Path | None = None) -> Source:
    """The model that ``spec`` names; paths are relative to ``base``. ModelError says what was looked for and where."""
    if ":" in spec and not Path(spec).exists() and "/" not in spec:
        return from_factory(spec)
    path = (base or Path()) / Path(spec).expanduser()
    if path.suffix == ".gguf":
        return from_directory(from_gguf(path), name=path.stem)
    if path.is_dir():
        return from_directory(path)
    if spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise ModelError(f"there is no model {spec!r}", where=str(path.absolute()), hint=_KINDS)
    return from_directory(spec)


_KINDS = "give a directory with config.json, a .gguf file, a hub id (owner/name), or package.module:factory"


def from_factory(spec: str) -> Source:
    """``package.module:factory``: a function without arguments that returns a Source, or (module, inputs, axes)."""
    module_name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(f"cannot import {module_name!r}: {error}", where=spec) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ModelError(
            f"{module_name} has no function {attribute!r}", where=spec, hint=nearest(attribute, vars(module))
        )
    made = factory()
    if isinstance(made, tuple) and len(made) == 3:
        made = Source(*made, name=attribute)
    if not isinstance(made, Source):
        raise ModelError(
            f"{spec} returned a {type(made).__name__}", hint="return a graphopt.Source or (module, inputs, axes)"
        )
    made.module.eval()
    return made


def from_directory(where: str | Path, name: str | None = None) -> Source:
    """A transformers model: a directory with config.json and safetensors, or a hub id. Never runs the model's own code,
    never unpickles."""
    import transformers

    where = str(where)
    local = Path(where).is_dir()
    if local and not (Path(where) / "config.json").is_file():
        raise ModelError(f"{where} has no config.json", hint=_KINDS)
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        architectures = config.architectures or []
        cls = getattr(transformers, architectures[0], None) if architectures else transformers.AutoModel
        if cls is None:
            raise ModelError(
                f"transformers has no class {architectures[0]}", where=where, hint="use package.module:factory"
            )
        module = cls.from_pretrained(where, config=config, dtype=torch.float32, use_safetensors=True)
    except ModelError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot load {where}: {first[0]}", hint=_KINDS) from error
    files = Path(where) if local else None
    return text_source(module, name=name or Path(where).name, files=files)


def text_source(module: Any, *, name: str = "model", files: Path | None = None) -> Source:
    """A Source for a transformers model that reads ``input_ids``: with attention mask, token types and decoder inputs
    where its ``forward`` takes them."""
    module = module.eval()
    config = module.config
    config.use_cache = False  # a cache in the outputs cannot be traced; insert_kv_cache makes one in the graph
    if getattr(module, "main_input_name", "input_ids") != "input_ids":
        raise ModelError(
            f"{type(module).__name__} reads {module.main_input_name}, not input_ids",
            hint="write a factory that returns a graphopt.Source with example inputs",
        )
    takes = inspect.signature(module.forward).parameters
    ids = torch.arange(2 * 6).reshape(2, 6) % config.vocab_size
    inputs: dict[str, Tensor | None] = {"input_ids": ids}
    if "attention_mask" in takes:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "token_type_ids" in takes and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    axes: dict[str, tuple[str | None, ...]] = dict.fromkeys(inputs, ("batch", "sequence"))
    vocabulary = {"input_ids": config.vocab_size, "token_type_ids": getattr(config, "type_vocab_size", 1)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :5].clone()
        axes["decoder_input_ids"] = ("batch", "decoder_sequence")
        vocabulary["decoder_input_ids"] = config.vocab_size
    longest = getattr(config, "max_position_embeddings", None)
    dims = {"sequence": DimRange(1, _usable_positions(config, longest))} if longest else {}
    return Source(
        module, inputs, axes, name, dims, vocabulary, "attention_mask" if "attention_mask" in inputs else None, files
    )


def _usable_positions(config: Any, longest: int) -> int:
    """RoBERTa-like models count positions from the padding id on, so the first ones are never used."""
    offset_types = (
        "roberta",
        "xlm-roberta",
        "camembert",
        "xlm-roberta-xl",
        "mpnet",
        "longformer",
        "esm",
        "luke",
        "data2vec-text",
    )
    offset = (config.pad_token_id or 0) + 1 if config.model_type in offset_types else 0
    return longest - offset


def cache_folder() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/graphopt`` or ``~/.cache/graphopt``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt"


def from_gguf(path: Path) -> Path:
    """The directory with a GGUF file's model in fp32 safetensors; converted once (20 to 30 s for 135M parameters), kept by
    the file's digest."""
    if not path.is_file():
        raise ModelError(f"there is no file {path}", hint=_KINDS)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kept = cache_folder() / "models" / f"{path.stem}-{digest[:16]}"
    if (kept / "config.json").is_file():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{kept.name}.", dir=kept.parent))
    try:
        _convert_gguf(path, staged)
        if kept.exists():
            shutil.rmtree(kept)
        staged.rename(kept)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return kept


def _convert_gguf(path: Path, target: Path) -> None:
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise ModelError(
            "reading GGUF needs the gguf and accelerate packages", hint="pip install 'graphopt[gguf]'"
        ) from error
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot read {path}: {first[0]}") from error
    # A model loaded from GGUF refuses to be saved, so its weights move into a fresh one of the class.
    config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    config.architectures = [type(model).__name__]
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)


def copy_tokenizer(source: Source, folder: Path) -> None:
    """Copy what a tokenizer is loaded from into an engine directory."""
    if source.files is None:
        return
    for name in TOKENIZER_FILES:
        path = source.files / name
        if path.is_file():
            shutil.copyfile(path, folder / name)
