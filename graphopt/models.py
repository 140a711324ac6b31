"""Where models come from: a hub id, a directory, a GGUF file, or ``package.module:factory``."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import traceback
from pathlib import Path
from types import FunctionType, ModuleType

import torch

from graphopt.errors import GraphoptError, ModelError, nearest
from graphopt.sources import Source, transformers_source

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
    "tokenizer.model", "added_tokens.json", "chat_template.jinja", "generation_config.json", "config.json",
)  # fmt: skip


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
        raise ModelError(
            f"cannot import {module_name!r}: {error}", where=spec, hint="put its folder into PYTHONPATH"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ModelError(
            f"{module_name} has no function {attribute!r}", where=spec, hint=nearest(attribute, _functions(module))
        )
    try:
        made = factory()
    except GraphoptError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"{spec} failed: {type(error).__name__}: {error}", where=f"{last.filename}:{last.lineno}"
        ) from error
    if isinstance(made, tuple) and len(made) == 3:
        made = Source(*made, name=attribute)
    if not isinstance(made, Source):
        raise ModelError(
            f"{spec} returned a {type(made).__name__}", hint="return a graphopt.Source or (module, inputs, axes)"
        )
    made.module.eval()
    return made


def _functions(module: ModuleType) -> list[str]:
    return [name for name, own in vars(module).items() if isinstance(own, FunctionType) and not name.startswith("_")]


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
    return transformers_source(module, name=name or Path(where).name, files=files)


def cache_folder() -> Path:
    """Where what builds may use again is kept: ``$XDG_CACHE_HOME/graphopt`` or ``~/.cache/graphopt``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt"


def from_gguf(path: Path) -> Path:
    """The directory with a GGUF file's model in fp32 safetensors; converted once (20 to 30 s for 135M parameters), kept by
    the file's digest."""
    from graphopt.artifact import sha256

    if not path.is_file():
        raise ModelError(f"there is no file {path}", hint=_KINDS)
    kept = cache_folder() / "models" / f"{path.stem}-{sha256(path)[:16]}"
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
