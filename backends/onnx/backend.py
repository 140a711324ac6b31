"""``backend: onnx``: a portable model in the standard dialect, run by ONNX's reference evaluator.

For hand-over to other tools, and as the executable meaning of the standard dialect; not for speed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from graphopt.backend import Backend, Built, Progress, no_progress, refuse_options
from graphopt.backends.onnx.dialects import STANDARD
from graphopt.backends.onnx.emitter import Dialect, Emitter
from graphopt.backends.onnx.weights import write_external
from graphopt.errors import BackendError
from graphopt.ir import Graph
from graphopt.runtime.engine import Engine, to_numpy, to_torch
from graphopt.schemas.manifest import Manifest

MODEL, DATA = "model.onnx", "model.onnx.data"
STANDARD_KINDS = (
    "decompose_complex",
    "canonicalize",
    "fuse_attention",
    "fuse_norm",
    "fuse_activation",
    "heads_last",
    "flatten_tokens",
)
STANDARD_PASSES: tuple[Mapping[str, Any], ...] = tuple(
    {"kind": kind, "allow_no_match": True} for kind in STANDARD_KINDS
)


def write_model(emitter: Emitter, folder: Path, progress: Progress = no_progress) -> Built:
    """Write an emission as model and data file; their digests and the op counts."""
    files = {}
    if emitter.weights:
        files[DATA] = write_external(
            emitter, folder, DATA, lambda done, total: progress("weights", done / max(total, 1))
        )
    ir.save(emitter.model, folder / MODEL)
    files[MODEL] = hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()
    return Built(files=files, weights_digest=files.get(DATA, ""), ops=op_counts(emitter.model))


def op_counts(model: ir.Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph.all_nodes()).most_common())


class OnnxBackend(Backend):
    """The standard dialect, checked by ``onnx.checker``."""

    name: ClassVar[str] = "onnx"
    standard_passes = STANDARD_PASSES
    takes: ClassVar[frozenset[str]] = frozenset()
    dialect: ClassVar[Dialect] = STANDARD

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"onnx": version("onnx"), "onnx-ir": version("onnx-ir")}

    def build(self, graph: Graph, folder: Path, progress: Progress = no_progress) -> Built:
        emitter = Emitter(graph, self.dialect)
        built = write_model(emitter, folder, progress)
        try:
            onnx.checker.check_model(str(folder / MODEL), full_check=True)
        except Exception as error:
            raise BackendError(f"onnx.checker refuses the model: {str(error).splitlines()[0]}") from error
        return built

    @classmethod
    def load(cls, folder: Path, manifest: Manifest, **options: Any) -> Engine:
        refuse_options(cls.name, options, "it has none")
        return ReferenceEngine(folder, manifest)


class ReferenceEngine(Engine):
    """ONNX's reference evaluator."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(manifest)
        from onnx.reference import ReferenceEvaluator

        self._evaluator = ReferenceEvaluator(str(folder / MODEL))

    def run(self, tensors: Mapping[str, Any], as_torch: bool) -> dict[str, Any]:
        results = self._evaluator.run(None, {name: to_numpy(tensor) for name, tensor in tensors.items()})
        named = dict(zip(self._evaluator.output_names, results, strict=True))
        return {name: to_torch(to_numpy(array)) for name, array in named.items()} if as_torch else named
