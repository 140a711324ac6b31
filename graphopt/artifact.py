"""The engine directory: written whole or not at all, checked when it is loaded.

``manifest.json`` names every other file with its sha256; nothing in the directory is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from graphopt.backend import backend_class
from graphopt.errors import EngineError
from graphopt.html import render
from graphopt.ir import Graph
from graphopt.runtime.engine import Engine
from graphopt.schemas.manifest import FORMAT, Manifest
from graphopt.text import parse

MANIFEST, GRAPH, REPORT = "manifest.json", "graph.gir", "report.html"
PROLOGUE = "prologue"  # the directory of the engine that runs once before: an encoder


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes ``target`` if the block succeeds, and vanishes if it does not.

    EngineError if ``target`` is something other than an engine directory, or the disk refuses to take the files."""
    if target.exists() and not (target.is_dir() and ((target / MANIFEST).is_file() or not any(target.iterdir()))):
        raise EngineError(
            f"{target} exists and is no engine directory", hint="name a new directory, or remove it yourself"
        )
    parents = target.absolute().parents
    around = next((folder for folder in parents if (folder / MANIFEST).is_file() and (folder / GRAPH).is_file()), None)
    if around is not None:
        raise EngineError(f"{target} would lie in the engine directory {around}", hint="name a directory outside of it")
    others = _others(target)
    if others:
        raise EngineError(
            f"{target} has files beside its engine: {', '.join(others[:3])}",
            hint="they would be lost with it: move them, or name a new directory",
        )
    folder: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield folder
        folder.chmod(0o755)
        _swap(folder, target)
    except OSError as error:
        if not _is_of_writing(error, target):
            raise
        reason = error.strerror or str(error)
        raise EngineError(
            f"cannot write the engine: {reason}", where=str(error.filename or target), hint="nothing was left behind"
        ) from error
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


#: The disk is full, or a limit is reached, wherever.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def _is_of_writing(error: OSError, target: Path) -> bool:
    """Whether the files of an engine were not taken; anything else is an error of a pass or a library."""
    if error.errno in _FULL:
        return True
    parent = target.parent.resolve()
    return error.filename is not None and parent in (path := Path(str(error.filename)).resolve(), *path.parents)


def _others(target: Path) -> list[str]:
    """What lies in an engine directory and is not of it."""
    try:
        own = read_manifest(target).files
    except EngineError:  # nothing there, or damaged, and then it cannot be told
        return []
    return sorted({path.name for path in target.iterdir()} - {MANIFEST, REPORT} - {name.split("/")[0] for name in own})


def _swap(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / "engine")
    try:
        folder.rename(target)
    except OSError:
        (old / "engine").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(f"{path.name} cannot be read: {error.strerror}", where=str(path)) from error


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Complete the manifest with the digests of the folder's files that it does not know yet; write it, and the report."""
    files = dict(manifest.files)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in files and path.name not in (MANIFEST, REPORT):
            files[path.name] = sha256(path)
    if (folder / PROLOGUE).is_dir():  # its manifest has the digests of its files
        files[f"{PROLOGUE}/{MANIFEST}"] = sha256(folder / PROLOGUE / MANIFEST)
    manifest = manifest.model_copy(update={"files": files})
    (folder / REPORT).write_text(render(manifest), encoding="utf-8")
    manifest = manifest.model_copy(update={"files": files | {REPORT: sha256(folder / REPORT)}})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """EngineError if there is none, it cannot be read, or it is of a newer format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise EngineError(f"{folder} is no engine directory", where=str(path), hint="make one with graphopt compile")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
    except OSError as error:
        raise EngineError(f"the manifest cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"the manifest cannot be read: {error}", where=str(path), hint="compile the engine again"
        ) from error
    if not isinstance(found, int):
        raise EngineError(f"the manifest is damaged at format: {found!r} is no whole number", where=str(path))
    if found > FORMAT:
        raise EngineError(
            f"the engine has format {found}, this graphopt reads up to {FORMAT}",
            where=str(path),
            hint=f"it was made by graphopt {content.get('graphopt', '?')}: install that or a newer one",
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise EngineError(f"the manifest is damaged at {key}: {first['msg']}", where=str(path)) from error


def check_files(folder: Path, manifest: Manifest) -> None:
    """EngineError for a file that is missing or is not what was written. The report is for people, and may be left out."""
    if GRAPH not in manifest.files:
        raise EngineError(f"the manifest is damaged at files: it has no {GRAPH}", where=str(folder / MANIFEST))
    for name, digest in manifest.files.items():
        path = folder / name
        if Path(name).name != name and name != f"{PROLOGUE}/{MANIFEST}":
            raise EngineError(f"the manifest names {name!r}, which is outside the directory", where=str(folder))
        if name == REPORT and not path.exists():
            continue
        if not path.is_file():
            raise EngineError(
                f"{name} is missing", where=str(folder), hint="copy the whole directory, or compile again"
            )
        if sha256(path) != digest:
            raise EngineError(
                f"{name} is damaged: its sha256 is not the manifest's", where=str(path), hint="compile again"
            )


def load(folder: str | Path, *, check: bool = True, **options: Any) -> Engine:
    """The engine of a directory. ``check``: compare every file's sha256 first. ``options`` are the backend's (threads,
    provider ...), None for what it was built with.

    EngineError if the directory is damaged or newer; MissingBackendError if its backend is not here."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if check:
        check_files(folder, manifest)
    given = {name: option for name, option in options.items() if option is not None}
    return loaded(folder, manifest, check=check, **given)


def loaded(folder: Path, manifest: Manifest, *, check: bool = False, **options: Any) -> Engine:
    """The engine of a manifest that was read, with its prologue."""
    try:
        engine = backend_class(manifest.backend).load(folder, manifest, **options)
    except FileNotFoundError as error:
        raise EngineError(
            f"a file is missing that engines of backend: {manifest.backend} have: {error}", where=str(folder)
        ) from error
    if (folder / PROLOGUE / MANIFEST).is_file():
        engine.prologue = load(folder / PROLOGUE, check=check, **options)
    return engine


def read_graph(folder: str | Path) -> Graph:
    """The compiled graph of an engine directory, without the weights' data."""
    return parse((Path(folder) / GRAPH).read_text(encoding="utf-8"))
