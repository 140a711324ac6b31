"""``backend: torch``: the graph run by the interpreter. The baseline that benchmarks and parity compare with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from graphopt.backend import Backend, Built, Progress, no_progress, refuse_options
from graphopt.errors import EngineError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.runtime.engine import Engine, to_numpy, to_torch
from graphopt.schemas.manifest import Manifest
from graphopt.tensors import Weight
from graphopt.text import parse

WEIGHTS = "weights.safetensors"


class TorchBackend(Backend):
    """The interpreter, on torch's CPU or CUDA."""

    name: ClassVar[str] = "torch"
    standard_passes: ClassVar[tuple[Mapping[str, Any], ...]] = ({"kind": "canonicalize", "allow_no_match": True},)
    takes: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"torch": torch.__version__}

    def build(self, graph: Graph, folder: Path, progress: Progress = no_progress) -> Built:
        progress("weights", 0.0)
        tensors = {name: weight.load().contiguous() for name, weight in graph.weights.items()}
        try:
            save_file(tensors, folder / WEIGHTS)
        except SafetensorError as error:  # a full disk is one of these too
            raise EngineError(f"cannot write the weights: {error}", where=str(folder / WEIGHTS)) from error
        (folder / WEIGHTS).chmod(0o644)  # as other files: safetensors writes for the owner alone
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        return Built(files={WEIGHTS: digest}, weights_digest=digest, ops=graph.op_counts())

    @classmethod
    def load(cls, folder: Path, manifest: Manifest, **options: Any) -> Engine:
        refuse_options(cls.name, options, "it has none")
        return TorchEngine(folder, manifest)


class TorchEngine(Engine):
    """``graph.gir`` and its weights, run on the inputs' device."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.graph = parse((folder / "graph.gir").read_text(encoding="utf-8"))
        for name in self.graph.weights:
            self.graph.weights[name] = Weight.from_safetensors(str(folder / WEIGHTS), name)
        self._loaded: dict[torch.device, dict[str, torch.Tensor]] = {}

    def run(self, tensors: Mapping[str, Any], as_torch: bool) -> dict[str, Any]:
        inputs = {name: to_torch(t) if isinstance(t, np.ndarray) else t for name, t in tensors.items()}
        device = next(iter(inputs.values())).device
        if device not in self._loaded:
            self._loaded[device] = {name: weight.load().to(device) for name, weight in self.graph.weights.items()}
        with torch.no_grad():
            results = run(self.graph, inputs, weights=self._loaded[device])
        return results if as_torch else {name: to_numpy(tensor) for name, tensor in results.items()}
