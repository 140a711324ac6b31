"""The model that an engine is built of, run by onnxruntime: what can be proven of an engine for a device that is not here."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from graphopt.backends.onnx.backend import MODEL, write_model
from graphopt.backends.onnx.emitter import Emitter
from graphopt.backends.onnxruntime.bound_cache import running
from graphopt.backends.onnxruntime.engine import caller_of, make_session
from graphopt.backends.tensorrt.engine import TensorRtEngine
from graphopt.runtime.cache import CacheLayout
from graphopt.runtime.engine import to_numpy, to_torch


class StandIn(TensorRtEngine):
    """Does all that the engine does, but for the plan itself."""

    device = torch.device("cpu")

    def __init__(self, engine: TensorRtEngine, emitter: Emitter) -> None:
        """BackendError or MissingBackendError if onnxruntime does not take the model."""
        super().__init__(engine.folder, engine.manifest, engine.flavour, engine.options)
        self.new_rows = {str(value.name): value.shape for value in emitter.model.graph.outputs}
        with tempfile.TemporaryDirectory() as inside:
            write_model(emitter, Path(inside))
            self.call_session = caller_of(make_session(Path(inside) / MODEL))

    def check_device(self) -> None:
        pass

    def gives_new_rows(self, layout: CacheLayout) -> bool:
        present = next(iter(layout.names.values()))
        shape = self.new_rows[present]
        return shape is not None and shape[2] != layout.outputs[present].shape[2]

    def enqueue(
        self, feeds: Mapping[str, Tensor], env: Mapping[str, int], results: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        self.profile_for(env)
        with running():
            found = self.call_session(list(self.outputs), {name: to_numpy(tensor) for name, tensor in feeds.items()})
        made = dict(results)
        for name, array in zip(self.outputs, found, strict=True):
            made[name] = made[name].copy_(to_torch(array)) if name in made else to_torch(array)
        return made
