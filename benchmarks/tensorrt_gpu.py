"""TensorRT on a GPU: parity, latency and kernels of a BERT-large encoder in fp16 and int8, decoding of a Llama of 1B, and MiniLM
and SmolLM2 with their real weights.

    python -m benchmarks.tensorrt_gpu [encoder] [decode] [minilm] [smollm2] [--layers 24] [--kernels] [--engine NAME ...]
                                      [--shape 1x128 ...]

The encoder beside torch.compile, the plain export of torch built by the same builder, and ONNX Runtime's CUDA provider; BERT and
Llama have random weights: nothing is downloaded. Needs an NVIDIA GPU and TensorRT; each part writes
``results/tensorrt_<part>.{md,json}``. Several at once, on a GPU each, need ``OMP_NUM_THREADS`` set to a share of the cores: with
all cores each they take many times as long."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import BertConfig, BertModel

import graphopt
from benchmarks.measure import Goal, Results, Table, summary_table
from benchmarks.tensorrt_builds import (
    BareEngine,
    Call,
    engine_of,
    engine_of_file,
    graph_of,
    median_ms,
    narrowed,
    slowest,
)
from benchmarks.tensorrt_decoding import decode
from benchmarks.tensorrt_models import HALF, minilm_engines, smollm2_engines
from graphopt.backends.tensorrt.backend import TensorRtBackend
from graphopt.backends.tensorrt.engine import TensorRtEngine
from graphopt.backends.tensorrt.flavours import TENSORRT
from graphopt.backends.tensorrt.inspection import kernels_of, layers_of
from graphopt.dims import Dim
from graphopt.errors import GraphoptError
from graphopt.ir import Graph
from graphopt.runtime.engine import Engine
from graphopt.sources import transformers_source
from graphopt.tensors import TensorType

#: Batch and sequence; and the shortest text, if they are of lengths from that on, evenly: half of (32, 384, 1) is padding.
Shape = tuple[int, ...]
SHAPES: tuple[Shape, ...] = ((1, 128), (8, 128), (32, 128), (32, 384))
PADDED: Shape = (32, 384, 1)
ALL = (*SHAPES, PADDED)
BETWEEN: tuple[Shape, ...] = ((1, 16), (3, 77), (16, 200))  # sizes that nothing was built for alone
AGAINST_TORCH: dict[Shape, float] = {(1, 128): 0.55, (8, 128): 0.62, (32, 128): 0.75, (32, 384): 0.75, PADDED: 0.75}
INT8_GAIN: dict[Shape, float] = {(1, 128): 1.25, (32, 128): 1.3}
DIMS = {"batch": (1, 32), "sequence": (2, 384)}
FP16_PARITY = 5e-3
FLATTENING: tuple[dict[str, Any], ...] = ({"kind": "flatten_tokens"},)
PACKING: tuple[dict[str, Any], ...] = (
    {"kind": "heads_last"}, *FLATTENING,
    {"kind": "remove_padding", "attention": "packed", "padding": "behind"},
)  # fmt: skip
TORCH = "torch.compile"
#: What is built unless engines are named.
SIDES = (
    TORCH, "fp16", "fp16, flat", "fp16, packed", "fp16, packed, padding dropped", "fp16, flat, for 1 x 128, split sums",
    "plain export", "int8, packed", "int8, packed, for 1 x 128, split sums", "ONNX Runtime CUDA",
)  # fmt: skip


def inputs_of(batch: int, sequence: int, shortest: int | None = None) -> dict[str, Tensor]:
    ids = torch.randint(0, 30000, (batch, sequence), device="cuda")
    lengths = torch.linspace(shortest or sequence, sequence, batch, device="cuda").round()
    mask = (torch.arange(sequence, device="cuda") < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def named(shape: Shape) -> str:
    batch, sequence, *shortest = shape
    return f"{batch} x {sequence}" + "".join(f", of {length} and more tokens" for length in shortest)


class Encoder:
    """A BERT-large with random weights, its engines, and what stands beside them."""

    def __init__(self, layers: int, folder: Path) -> None:
        torch.manual_seed(0)
        config = BertConfig(hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096)
        self.model, self.folder = BertModel(config).eval(), folder
        self.half = BertModel(config).eval()
        self.half.load_state_dict(self.model.state_dict())
        self.half = self.half.half().cuda()

    @functools.cached_property
    def fp16(self) -> Graph:
        return self._graph()

    @functools.cached_property
    def int8(self) -> Graph:
        return self._graph(self._quantize())

    @functools.cached_property
    def flat(self) -> Graph:
        return self._graph(before=FLATTENING)

    @functools.cached_property
    def packed(self) -> Graph:
        return self._graph(before=PACKING)

    @functools.cached_property
    def packed_int8(self) -> Graph:
        return self._graph(self._quantize(), before=PACKING)

    def _quantize(self) -> dict[str, Any]:
        data = [{name: tensor.cpu() for name, tensor in inputs_of(4, 64).items()}]
        return {"kind": "quantize", "scheme": "int8_static", "embeddings": False, "calibration": {"data": data}}

    def _graph(self, *steps: Mapping[str, Any], before: Sequence[Mapping[str, Any]] = ()) -> Graph:
        source = transformers_source(self.model.cpu(), name="bert-large")
        return graph_of(source, [*TensorRtBackend.standard_passes, *before, HALF, *steps], DIMS)

    def for_all(self, name: str, graph: Graph, **options: Any) -> BareEngine:
        """A profile for each shape and one for all sizes."""
        shapes = [dict(zip(("batch", "sequence"), shape, strict=True)) for shape in SHAPES]
        is_fixed = options.get("packed_padding") != "dropped"
        return engine_of(graph, self.folder / name, cuda_graphs=is_fixed, shapes=shapes, **options)

    def for_one(self, name: str, graph: Graph, shape: Shape, **options: Any) -> BareEngine:
        """One profile, for a shape and whatever is smaller. Its batch stays a size (of 2 at least), as that of a served model."""
        batch, sequence = shape
        most = max(batch, 2)
        own = narrowed(graph, batch=(1, most), sequence=(2, sequence))
        profile = {"batch": (1, batch, most), "sequence": (2, sequence, sequence)}
        return engine_of(own, self.folder / name, profiles=[profile], **options)

    def on_cuda(self, name: str) -> Engine:
        """The same passes for ONNX Runtime's CUDA provider."""
        made = graphopt.compile(
            transformers_source(self.model.cpu(), name="bert-large"), self.folder / name,
            passes=[*TensorRtBackend.standard_passes, HALF], target={"provider": "cuda", "tactics": "fixed"}, dims=DIMS,
        )  # fmt: skip
        return made.engine

    def exported(self) -> BareEngine:
        """The plain export of the half model, built with the same profiles."""
        file = self.folder / "plain" / "plain.onnx"
        file.parent.mkdir()
        sizes = {"batch": torch.export.Dim("batch", min=1, max=32), "sequence": torch.export.Dim("sequence", max=384)}
        feeds = inputs_of(2, 16)
        torch.onnx.export(
            self.half, (), file, kwargs=feeds, dynamo=True, opset_version=18, verbose=False,
            dynamic_shapes={name: {0: sizes["batch"], 1: sizes["sequence"]} for name in feeds},
            output_names=["last_hidden_state", "pooler_output"],
        )  # fmt: skip

        def type_of(dtype: torch.dtype, *shape: str | int) -> TensorType:
            return TensorType(dtype, tuple(Dim.named(size) if isinstance(size, str) else size for size in shape))

        inputs = {name: type_of(tensor.dtype, "batch", "sequence") for name, tensor in feeds.items()}
        outputs = {
            "last_hidden_state": type_of(torch.float16, "batch", "sequence", 1024),
            "pooler_output": type_of(torch.float16, "batch", 1024),
        }
        profiles = [{"batch": (b, b, b), "sequence": (s, s, s)} for b, s in SHAPES]
        return engine_of_file(file, inputs, outputs, DIMS, profiles)

    def offs(self, engine: Call, shapes: Sequence[Shape] = (*ALL, *BETWEEN)) -> dict[Shape, float]:
        return {shape: self.off(engine, shape) for shape in shapes}

    def off(self, engine: Call, shape: Shape) -> float:
        """The largest difference of real tokens from fp32 eager, of the output's scale."""
        feeds = inputs_of(*shape)
        real = feeds["attention_mask"].bool()
        with torch.inference_mode():
            wanted = self.model.cuda()(**feeds).last_hidden_state
            got = engine(**feeds)
        own = got["last_hidden_state"] if isinstance(got, dict) else got.last_hidden_state
        return float((own.to(wanted) - wanted)[real].abs().max() / wanted[real].abs().max())


def encoder(results: Results, layers: int, kernels: bool, wanted: Sequence[str], shapes: Sequence[Shape]) -> None:
    """``wanted``: engines by their names, in this order; ``shapes``: those that are timed."""
    with tempfile.TemporaryDirectory() as folder:
        made = Encoder(layers, Path(folder))
        builds = engines_of(made)
        unknown = [name for name in wanted if name not in (TORCH, *builds)]
        if unknown:
            raise SystemExit(f"no engine is called {', '.join(unknown)}; there are {'; '.join((TORCH, *builds))}")
        times: dict[str, dict[Shape, float]] = {}
        if TORCH in wanted:
            times[TORCH] = latencies(torch.compile(made.half, mode="reduce-overhead", dynamic=False), shapes)
            print(TORCH, times[TORCH], flush=True)
        counts = Table("Kernels of the first profile, by the inspector", "engine")
        off = {"torch fp16": made.offs(made.half)}
        for name in wanted:
            if name == TORCH:
                continue
            side = builds[name]
            timed = [shape for shape in side.shapes if shape in shapes]
            if not timed:
                continue
            try:
                engine = side.build()
                off[name], times[name] = made.offs(engine, (*timed, *side.between)), latencies(engine, timed)
            except (GraphoptError, RuntimeError) as error:
                counts.notes.append(f"{name}: {str(error).splitlines()[0][:200]}")
                print(counts.notes[-1], flush=True)
                continue
            # An engine takes minutes: what there is by then is seen.
            print(name, times[name], off[name], flush=True)
            if isinstance(engine, TensorRtEngine):
                counts.add(name, **kernels_of(layers_of(TENSORRT.module(), engine.opened().engine)))
                results.tables += [kernels_at(name, engine, shape) for shape in timed if kernels]
        speed(results, layers, times)
        results.tables.append(counts)
        parity(results, off)


@dataclass(frozen=True)
class Side:
    """How an engine is built, the shapes that it is timed at, and those that only its parity is looked at."""

    build: Callable[[], Engine]
    shapes: tuple[Shape, ...] = ALL
    between: tuple[Shape, ...] = BETWEEN


def engines_of(made: Encoder) -> dict[str, Side]:
    """By name: each graph's engine for all shapes, its engines for a shape each, as they are and with split sums, and others."""
    behind, dropped = ({"packed_padding": where} for where in ("behind", "dropped"))
    graphs: dict[str, tuple[Callable[[], Graph], dict[str, Any]]] = {
        "fp16": (lambda: made.fp16, {}), "fp16, flat": (lambda: made.flat, {}),
        "fp16, packed": (lambda: made.packed, behind),
        "int8": (lambda: made.int8, {}), "int8, packed": (lambda: made.packed_int8, behind),
    }  # fmt: skip

    def for_all(name: str, graph: Callable[[], Graph], options: Mapping[str, Any]) -> Side:
        return Side(lambda: made.for_all(name, graph(), **options))

    def for_one(name: str, graph: Callable[[], Graph], shape: Shape, options: Mapping[str, Any]) -> Side:
        return Side(lambda: made.for_one(name, graph(), shape, **options), (shape,), ())

    sides = {name: for_all(name, *own) for name, own in graphs.items()}
    for (name, (graph, options)), shape in itertools.product(graphs.items(), SHAPES):
        for more, split in (("", {}), (", split sums", {"split_sums": True})):
            own = f"{name}, for {named(shape)}{more}"
            sides[own] = for_one(own, graph, shape, {**options, **split})
    wide, fast = ({"accumulate": sums} for sums in ("fp32", "fastest"))
    return sides | {
        "fp16, fp32 sums": for_all("wide", lambda: made.fp16, wide),
        "fp16, packed, fastest sums": for_all("fast", lambda: made.packed, behind | fast),
        "fp16, packed, padding dropped": for_all("dropped", lambda: made.packed, dropped),
        "plain export": Side(made.exported, between=()),
        "ONNX Runtime CUDA": Side(lambda: made.on_cuda("cuda")),
    }


def kernels_at(name: str, engine: TensorRtEngine, shape: Shape) -> Table:
    env, feeds = dict(zip(("batch", "sequence"), shape, strict=False)), inputs_of(*shape)
    return slowest(f"{name}, {named(shape)}", engine.context_for(env), lambda: engine.enqueue(feeds, env, {}))


def latencies(side: Call, shapes: Sequence[Shape] = ALL) -> dict[Shape, float]:
    found = {}
    for shape in shapes:
        feeds = inputs_of(*shape)
        with torch.inference_mode():
            found[shape] = median_ms(partial(side, **feeds))
    return found


def speed(results: Results, layers: int, times: Mapping[str, Mapping[Shape, float]]) -> None:
    table = Table(f"BERT of {layers} layers in half precision and int8, median ms, CUDA graphs", "batch x sequence")
    table.notes.append(
        "engines are for all shapes but where one is named; ONNX Runtime and dropped padding without CUDA graphs"
    )
    for shape in ALL:
        each = {name: own[shape] for name, own in times.items() if shape in own}
        if not each:
            continue
        table.add(named(shape), **each)
        fp16, int8 = (
            min((own for name, own in each.items() if name.startswith(kind)), default=math.nan)
            for kind in ("fp16", "int8")
        )
        row = named(shape)
        if TORCH in each and not math.isnan(fp16):
            results.goals.append(Goal.at_most(f"{row}: fp16 / {TORCH}", AGAINST_TORCH[shape], fp16 / each[TORCH]))
        if "plain export" in each and not math.isnan(fp16):
            results.goals.append(Goal.at_most(f"{row}: fp16 / the plain export", 1.0, fp16 / each["plain export"]))
        if shape in INT8_GAIN and not math.isnan(fp16 / int8):
            results.goals.append(Goal.at_least(f"{row}: int8 over our fp16", INT8_GAIN[shape], fp16 / int8))
    results.tables.append(table)


def parity(results: Results, off: Mapping[str, Mapping[Shape, float]]) -> None:
    table = Table("Largest difference from fp32 eager, of the output's scale", "batch x sequence")
    for shape in (*ALL, *BETWEEN):
        table.add(named(shape), **{name: own[shape] for name, own in off.items() if shape in own})
    results.goals += [
        Goal.at_most(f"{name}: largest difference from eager", FP16_PARITY, max(own.values()))
        for name, own in off.items()
        if name.startswith("fp16")
    ]
    results.tables.append(table)


def main() -> None:
    by_name = {"x".join(map(str, shape)): shape for shape in ALL}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensorrt_gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "part", nargs="*", choices=[[], "encoder", "decode", "minilm", "smollm2"], help="all by default"
    )
    parser.add_argument("--layers", type=int, default=24, help="of the encoder")
    parser.add_argument("--kernels", action="store_true", help="the slowest layers as well")
    parser.add_argument(
        "--engine",
        action="append",
        help="a side of the encoder, 'fp16, packed, for 1 x 128' ...; by default: " + "; ".join(SIDES),
    )
    parser.add_argument(
        "--shape", action="append", choices=[*by_name], help="a shape of the encoder that is timed; all by default"
    )
    asked = parser.parse_args()
    shapes = [by_name[name] for name in asked.shape or by_name]
    parts: dict[str, Callable[[Results], None]] = {
        "encoder": lambda results: encoder(results, asked.layers, asked.kernels, asked.engine or SIDES, shapes),
        "decode": lambda results: decode(results, asked.kernels),
        "minilm": minilm_engines, "smollm2": smollm2_engines,
    }  # fmt: skip
    console = Console(width=160)
    for name in asked.part or parts:
        results = Results(f"tensorrt_{name}")
        gpu = torch.cuda.get_device_name()
        results.environment |= {"GPU": gpu, "CUDA": torch.version.cuda, "TensorRT": TENSORRT.version()}
        parts[name](results)
        for table in results.tables:
            table.show(console)
        summary_table(results.goals).show(console)
        results.write()


if __name__ == "__main__":
    main()
