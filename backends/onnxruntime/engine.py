"""The ONNX Runtime engine: a session behind the engine protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt.backend import missing
from graphopt.errors import BackendError, MissingBackendError
from graphopt.runtime.engine import Engine, to_numpy, to_torch
from graphopt.schemas.manifest import Manifest

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def onnxruntime() -> Any:
    """The package. MissingBackendError if it is not installed."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise missing("onnxruntime", "cpu") from error
    return ort


def make_session(model: bytes | Path, provider: str = "cpu", threads: int | None = None) -> Any:
    """A session on one provider. BackendError if onnxruntime refuses the model or would run part of it elsewhere."""
    ort = onnxruntime()
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise MissingBackendError(
            f"this onnxruntime has no {wanted}", hint="pip install 'graphopt[gpu]' on a machine with an NVIDIA GPU"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    if threads:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=[wanted])
    except Exception as error:
        raise BackendError(f"onnxruntime refuses the model: {str(error).splitlines()[0]}") from error
    if session.get_providers()[0] != wanted:
        raise BackendError(f"onnxruntime runs the model on {session.get_providers()[0]}, not on {wanted}")
    return session


class OnnxRuntimeEngine(Engine):
    """A model file in a session. ``threads``: as many as there are cores, unless given."""

    def __init__(self, folder: Path, manifest: Manifest, model: str, provider: str, threads: int | None) -> None:
        super().__init__(manifest)
        self.session = make_session(folder / model, provider, threads)

    def run(self, tensors: Mapping[str, Any], as_torch: bool) -> dict[str, Any]:
        feeds = {name: to_numpy(tensor) for name, tensor in tensors.items()}
        results = self.session.run(list(self.outputs), feeds)
        return {name: to_torch(array) if as_torch else array for name, array in zip(self.outputs, results, strict=True)}
