"""BERT in ONNX Runtime by the ways that others offer: torch's exporters, onnxruntime's optimizer, optimum.

Every peer gets the same thread counts as graphopt's engine and ONNX Runtime's full graph optimization (its default)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime
import torch
from torch import Tensor, nn

from benchmarks.measure import THREADS, quiet

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Export:
    """One way to an ONNX file. ``opset`` None: the exporter's default."""

    name: str
    attention: Literal["sdpa", "eager"]
    exporter: Literal["dynamo", "torchscript"] = "dynamo"
    opset: int | None = None

    @property
    def default(self) -> bool:
        return self.exporter == "dynamo" and self.opset is None


EXPORTS = (
    Export("export, sdpa", "sdpa"),
    Export("export, sdpa, opset 23", "sdpa", opset=23),  # has an Attention op, which the default opset has not
    Export("export, eager", "eager"),
    Export("TorchScript export, eager", "eager", "torchscript", 17),  # the form that onnxruntime's fusions know
)


@dataclass
class Peer:
    """A model in a session. ``default``: from torch.onnx.export with its default exporter and opset; ``fused``: what
    onnxruntime's optimizer fused, for those that went through it."""

    name: str
    sdpa: bool
    default: bool
    session: Any
    fused: str = ""

    def run(self, feeds: Mapping[str, Any], count: int) -> Callable[[], list[Any]]:
        """A call that computes the first ``count`` outputs."""
        known = {given.name for given in self.session.get_inputs()}
        names = [output.name for output in self.session.get_outputs()][:count]
        given = {name: array for name, array in feeds.items() if name in known}
        return lambda: list(self.session.run(names, given))


def make_peers(model: Path, inputs: Mapping[str, Tensor], folder: Path) -> tuple[list[Peer], list[str]]:
    """The peers that can be built, and a note for each that cannot."""
    peers: list[Peer] = []
    notes: list[str] = []
    for export in EXPORTS:
        file = folder / f"{export.name.replace(', ', '-').replace(' ', '-')}.onnx"
        try:
            with quiet():
                write(export, load(model, export.attention), inputs, file)
                peers.append(Peer(export.name, export.attention == "sdpa", export.default, session(file)))
                peers.append(optimized(export, file))
        except Exception as error:
            notes.append(f"{export.name}: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}")
    return add_optimum(model, folder, peers, notes)


def load(folder: Path, attention: str) -> nn.Module:
    import transformers

    model: Any = transformers.AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    model.config.use_cache = False
    module: nn.Module = model.eval()
    return module


def write(export: Export, module: nn.Module, inputs: Mapping[str, Tensor], file: Path) -> None:
    """Export with dynamic batch and sequence."""
    given = {name: inputs[name] for name in INPUTS}
    if export.exporter == "torchscript":
        axes = {name: {0: "batch", 1: "sequence"} for name in INPUTS}
        torch.onnx.export(
            Positional(module), tuple(given.values()), file, dynamo=False, opset_version=export.opset,
            input_names=list(INPUTS), output_names=["last_hidden_state", "pooler_output"], dynamic_axes=axes,
        )  # fmt: skip
        return
    dynamic = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        module, (), file, kwargs=given, dynamo=True, external_data=False, verbose=False, opset_version=export.opset,
        dynamic_shapes={name: {0: dynamic, 1: dynamic} for name in INPUTS},
    )  # fmt: skip


class Positional(nn.Module):
    """The TorchScript exporter passes inputs by position and wants a tuple back."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.module(**dict(zip(INPUTS, tensors, strict=True)))
        return outputs.last_hidden_state, outputs.pooler_output


def optimized(export: Export, file: Path) -> Peer:
    """The file through onnxruntime.transformers.optimizer."""
    from onnxruntime.transformers import optimizer

    model = optimizer.optimize_model(str(file), model_type="bert", num_heads=12, hidden_size=384)
    target = file.with_suffix(".optimized.onnx")
    model.save_model_to_file(str(target))
    fused = ", ".join(f"{count} {name}" for name, count in model.get_fused_operator_statistics().items() if count)
    return Peer(f"{export.name} + optimizer", export.attention == "sdpa", export.default, session(target), fused)


def session(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def add_optimum(model: Path, folder: Path, peers: list[Peer], notes: list[str]) -> tuple[list[Peer], list[str]]:
    """optimum's own export, where it is installed."""
    if importlib.util.find_spec("optimum") is None:
        return peers, [*notes, "optimum is not installed: left out (optimum-onnx 0.1.0 needs transformers below 4.58)"]
    try:
        from optimum.exporters.onnx import main_export

        with quiet():
            main_export(str(model), folder / "optimum", task="feature-extraction", do_validation=False)
            peers.append(Peer("optimum export", True, False, session(folder / "optimum" / "model.onnx")))
    except Exception as error:
        notes.append(f"optimum: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}")
    return peers, notes
