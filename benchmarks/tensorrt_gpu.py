"""TensorRT on a GPU: parity, latency and kernels of a BERT-large encoder in fp16 and int8, decoding of a Llama of 1B, and MiniLM
and SmolLM2 with their real weights.

    python -m benchmarks.tensorrt_gpu [encoder] [decode] [minilm] [smollm2] [--layers 24] [--kernels] [--engine NAME ...]

The encoder beside torch.compile, the plain export of torch built by the same builder, and ONNX Runtime's CUDA provider; BERT and
Llama have random weights: nothing is downloaded. Needs an NVIDIA GPU and TensorRT; each part writes
``results/tensorrt_<part>.{md,json}``."""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import graphopt
from benchmarks.cuda_decoding import agreement, engine_steps, torch_steps
from benchmarks.measure import Goal, Results, Table, summary_table
from benchmarks.tensorrt_models import HALF, minilm_engines, smollm2_engines, with_cache
from graphopt.backend import no_progress
from graphopt.backends.tensorrt.backend import TensorRtBackend
from graphopt.backends.tensorrt.builder import build_plan
from graphopt.backends.tensorrt.engine import PLAN, Opened, TensorRtEngine, opened_plan
from graphopt.backends.tensorrt.flavours import TENSORRT
from graphopt.backends.tensorrt.inspection import kernels_of, layers_of
from graphopt.backends.tensorrt.options import Options
from graphopt.dims import Dim
from graphopt.errors import GraphoptError
from graphopt.ir import DimRange, TensorType
from graphopt.runtime.engine import Engine
from graphopt.sources import transformers_source

SHAPES = ((1, 128), (8, 128), (32, 128), (32, 384))
BETWEEN = ((1, 16), (3, 77), (16, 200))  # sizes that nothing was built for alone
AGAINST_TORCH = {(1, 128): 0.55, (8, 128): 0.62, (32, 128): 0.75, (32, 384): 0.75}
INT8_GAIN = {(1, 128): 1.25, (32, 128): 1.3}
DIMS = {"batch": (1, 32), "sequence": (2, 384)}
FP16_PARITY, DECODE_GAIN, BANDWIDTH = 5e-3, 1.3, 0.6
PASTS, ROOM = (128, 2048), 2304
RUNS = 50
Call = Callable[[], Any]


def inputs_of(batch: int, sequence: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 30000, (batch, sequence), device="cuda")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def median_ms(call: Call) -> float:
    """Of runs one by one, timed by events on the GPU."""
    for _ in range(10):
        call()
    times: list[float] = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


# An encoder


class Encoder:
    """A BERT-large with random weights, its engines, and what stands beside them."""

    def __init__(self, layers: int, folder: Path) -> None:
        torch.manual_seed(0)
        config = BertConfig(hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096)
        self.model, self.folder = BertModel(config).eval(), folder
        self.half = BertModel(config).eval()
        self.half.load_state_dict(self.model.state_dict())
        self.half = self.half.half().cuda()

    def compiled(self, name: str, *steps: Mapping[str, Any], alone: bool = False, **options: Any) -> Engine:
        """Our engine: a profile for each shape and one for all sizes; ``alone``: for the first shape only."""
        shapes = [{"batch": batch, "sequence": sequence} for batch, sequence in SHAPES]
        batch, sequence = SHAPES[0]
        made = graphopt.compile(
            transformers_source(self.model.cpu(), name="bert-large"), self.folder / name.replace(" ", "_"),
            passes=[*TensorRtBackend.standard_passes, *steps],
            target={"backend": "tensorrt", "options": options if alone else {**options, "shapes": shapes}},
            dims={"batch": (1, 2 * batch), "sequence": (2, sequence)} if alone else DIMS,
        )  # fmt: skip
        for warning in made.report.warnings:
            print(f"{name}: {warning}"[:300])
        return graphopt.load(made.folder, cuda_graphs=True)

    def on_cuda(self, name: str) -> Engine:
        """The same passes for ONNX Runtime's CUDA provider."""
        made = graphopt.compile(
            transformers_source(self.model.cpu(), name="bert-large"), self.folder / name,
            passes=[*TensorRtBackend.standard_passes, HALF], target={"provider": "cuda", "tactics": "fixed"}, dims=DIMS,
        )  # fmt: skip
        return made.engine

    def exported(self) -> PlainEngine:
        """The plain export of the half model, built with the same profiles."""
        file = self.folder / "plain.onnx"
        sizes = {"batch": torch.export.Dim("batch", min=1, max=32), "sequence": torch.export.Dim("sequence", max=384)}
        feeds = inputs_of(2, 16)
        torch.onnx.export(
            self.half, (), file, kwargs=feeds, dynamo=True, opset_version=18, verbose=False,
            dynamic_shapes={name: {0: sizes["batch"], 1: sizes["sequence"]} for name in feeds},
            output_names=["last_hidden_state", "pooler_output"],
        )  # fmt: skip
        return PlainEngine(file, {name: feeds[name].dtype for name in feeds}, {
            "last_hidden_state": ("batch", "sequence", 1024), "pooler_output": ("batch", 1024)
        })  # fmt: skip

    def offs(
        self, engine: Call, shapes: Sequence[tuple[int, int]] = (*SHAPES, *BETWEEN)
    ) -> dict[tuple[int, int], float]:
        return {shape: self.off(engine, *shape) for shape in shapes}

    def off(self, engine: Call, batch: int, sequence: int) -> float:
        """The largest difference from fp32 eager, of the output's scale."""
        feeds = inputs_of(batch, sequence)
        with torch.inference_mode():
            wanted = self.model.cuda()(**feeds).last_hidden_state
            got = engine(**feeds)
        own = got["last_hidden_state"] if isinstance(got, dict) else got.last_hidden_state
        return float((own.float() - wanted).abs().max() / wanted.abs().max())


class PlainEngine(TensorRtEngine):
    """An engine of any ONNX file, run as ours are."""

    def __init__(
        self, file: Path, inputs: Mapping[str, torch.dtype], outputs: Mapping[str, Sequence[str | int]]
    ) -> None:
        def type_of(dtype: torch.dtype, shape: Sequence[str | int]) -> TensorType:
            return TensorType(dtype, tuple(Dim.named(size) if isinstance(size, str) else size for size in shape))

        self.inputs = {name: type_of(dtype, ("batch", "sequence")) for name, dtype in inputs.items()}
        self.outputs = {name: type_of(torch.float16, shape) for name, shape in outputs.items()}
        self.dims = {name: DimRange(*bounds) for name, bounds in DIMS.items()}
        self.folder, self.flavour, self.cuda_graphs, self.options = file.parent, TENSORRT, True, Options()
        self.profiles = [{"batch": (b, b, b), "sequence": (s, s, s)} for b, s in SHAPES]
        plan = build_plan(TENSORRT, file, self.inputs, self.profiles, self.options, {}, no_progress)
        self._opened: Opened | None = opened_plan(TENSORRT, plan.data, file.parent / PLAN)


TORCH = "torch.compile"


def encoder(results: Results, layers: int, kernels: bool, wanted: Sequence[str]) -> None:
    """``wanted``: some of the engines, in this order; all unless given."""
    with tempfile.TemporaryDirectory() as folder:
        made = Encoder(layers, Path(folder))
        times: dict[str, dict[tuple[int, int], float]] = {}
        if not wanted or TORCH in wanted:
            times[TORCH] = latencies(torch.compile(made.half, mode="reduce-overhead", dynamic=False))
            print(TORCH, times[TORCH], flush=True)
        counts = Table("Kernels of the first profile, by the inspector", "engine")
        off = {"torch fp16": made.offs(made.half)}
        builds = engines_of(made)
        for name in wanted or builds:
            if name == TORCH:
                continue
            try:
                engine = builds[name]()
                times[name] = latencies(engine, SHAPES[:1] if " for " in name else SHAPES)
            except (GraphoptError, RuntimeError) as error:
                counts.notes.append(f"{name}: {str(error).splitlines()[0][:200]}")
                print(counts.notes[-1], flush=True)
                continue
            off[name] = made.offs(engine, SHAPES[:1] if " for " in name else (*SHAPES, *BETWEEN))
            # An engine takes minutes: what there is by then is seen.
            print(name, times[name], off[name], flush=True)
            if isinstance(engine, TensorRtEngine):
                counts.add(name, **kernels_of(layers_of(TENSORRT.module(), engine.opened().engine)))
                shapes = () if not kernels else SHAPES[:1] if " for " in name else (SHAPES[0], *SHAPES[2:])
                results.tables += [slowest(name, engine, *size) for size in shapes]
        speed(results, layers, times)
        results.tables.append(counts)
        parity(results, off)


def engines_of(made: Encoder) -> dict[str, Callable[[], Engine]]:
    data = [{name: tensor.cpu() for name, tensor in inputs_of(4, 64).items()}]
    int8 = HALF, {"kind": "quantize", "scheme": "int8_static", "embeddings": False, "calibration": {"data": data}}
    return {
        "fp16": lambda: made.compiled("fp16", HALF),
        "fp16, plugin": lambda: made.compiled("plugin", HALF, attention="plugin"),
        "fp16, plugin, fastest sums": lambda: made.compiled("fast", HALF, attention="plugin", accumulate="fastest"),
        "fp16, for 1 x 128": lambda: made.compiled("alone", HALF, alone=True),
        "fp16, for 1 x 128, split sums": lambda: made.compiled("split", HALF, alone=True, split_sums=True),
        "plain export": made.exported,
        "int8": lambda: made.compiled("int8", *int8),
        "int8, plugin": lambda: made.compiled("int8_plugin", *int8, attention="plugin"),
        "int8, for 1 x 128": lambda: made.compiled("alone8", *int8, alone=True),
        "ONNX Runtime CUDA": lambda: made.on_cuda("cuda"),
    }


def latencies(side: Call, shapes: Sequence[tuple[int, int]] = SHAPES) -> dict[tuple[int, int], float]:
    found = {}
    for batch, sequence in shapes:
        feeds = inputs_of(batch, sequence)
        with torch.inference_mode():
            found[batch, sequence] = median_ms(partial(side, **feeds))
    return found


def speed(results: Results, layers: int, times: Mapping[str, Mapping[tuple[int, int], float]]) -> None:
    table = Table(f"BERT of {layers} layers in half precision and int8, median ms, CUDA graphs", "batch x sequence")
    table.notes.append("engines are for all shapes but where one is named; ONNX Runtime without a CUDA graph")
    for shape in SHAPES:
        each = {name: own[shape] for name, own in times.items() if shape in own}
        table.add(f"{shape[0]} x {shape[1]}", **each)
        fp16, int8 = (
            min((own for name, own in each.items() if name.startswith(kind)), default=math.nan)
            for kind in ("fp16", "int8")
        )
        row = f"{shape[0]} x {shape[1]}"
        if TORCH in each and not math.isnan(fp16):
            results.goals.append(Goal.at_most(f"{row}: fp16 / {TORCH}", AGAINST_TORCH[shape], fp16 / each[TORCH]))
        if "plain export" in each and not math.isnan(fp16):
            results.goals.append(Goal.at_most(f"{row}: fp16 / the plain export", 1.0, fp16 / each["plain export"]))
        if shape in INT8_GAIN and not math.isnan(fp16 / int8):
            results.goals.append(Goal.at_least(f"{row}: int8 over our fp16", INT8_GAIN[shape], fp16 / int8))
    results.tables.append(table)


def parity(results: Results, off: Mapping[str, Mapping[tuple[int, int], float]]) -> None:
    table = Table("Largest difference from fp32 eager, of the output's scale", "batch x sequence")
    for shape in (*SHAPES, *BETWEEN):
        table.add(f"{shape[0]} x {shape[1]}", **{name: own[shape] for name, own in off.items() if shape in own})
    results.goals += [
        Goal.at_most(f"{name}: largest difference from eager", FP16_PARITY, max(own.values()))
        for name, own in off.items()
        if name.startswith("fp16")
    ]
    results.tables.append(table)


def slowest(name: str, engine: TensorRtEngine, batch: int, sequence: int, rows: int = 30) -> Table:
    """The layers that take longest, by TensorRT's own profiler."""
    trt = TENSORRT.module()

    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = defaultdict(float)

        def report_layer_time(self, layer: str, milliseconds: float) -> None:
            self.times[layer] += milliseconds

    env = {"batch": batch, "sequence": sequence}
    context, profiler, feeds = engine.context_for(env), Profiler(), inputs_of(batch, sequence)
    context.profiler = profiler
    for _ in range(RUNS):
        engine.enqueue(feeds, env, {})
        torch.cuda.synchronize()
    table = Table(f"{name}, {batch} x {sequence}: the longest of {len(profiler.times)} layers", "layer")
    for layer, milliseconds in sorted(profiler.times.items(), key=lambda item: -item[1])[:rows]:
        table.add(layer[:120], us=1000 * milliseconds / RUNS)
    return table


# Decoding


def decode(results: Results) -> None:
    """A Llama of 1B at a batch of 1: greedy tokens, milliseconds of a step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=500000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    one = {"batch": (1, 1, 1)}
    profiles = [{**one, "sequence": (1, 1, 1)}, {**one, "sequence": (1, 512, ROOM)}]
    table = Table("Llama of 1B in fp16, a batch of 1", "past")
    with tempfile.TemporaryDirectory() as folder:
        graphopt.compile(
            transformers_source(model, name="llama-1b"), Path(folder) / "engine",
            passes=[*with_cache(ROOM, "fp16"), {"kind": "cast"}],
            target={"backend": "tensorrt", "options": {"profiles": profiles}},
            dims={"batch": (1, 1), "sequence": (1, ROOM)}, force=True,
        )  # fmt: skip
        engine = graphopt.load(Path(folder) / "engine")
        half = model.half().cuda()
        weights = sum(parameter.nbytes for parameter in half.parameters())
        copied = copy_bandwidth()
        for past in PASTS:
            prompt = torch.randint(0, config.vocab_size, (past,)).tolist()
            tokens, seconds, _ = engine_steps(engine, prompt)
            _, peer, _ = torch_steps(half, prompt, True, ROOM)
            own, other = statistics.median(seconds), statistics.median(peer[3:])
            equal, gap = agreement(half, tokens, prompt)
            table.add(
                str(past), torch_ms=1000 * other, graphopt_ms=1000 * own, tokens_a_second=1 / own, gain=other / own,
                TB_a_second=weights / own / 1e12, of_a_copy=weights / own / copied, tokens_of_eager=equal, widest_gap=gap,
            )  # fmt: skip
            results.goals += [
                Goal.at_least(f"decode after {past}: over torch.compile", DECODE_GAIN, other / own),
                Goal.at_least(f"decode after {past}: of the copy bandwidth", BANDWIDTH, weights / own / copied),
            ]
    results.tables.append(table)


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensorrt_gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "part", nargs="*", choices=[[], "encoder", "decode", "minilm", "smollm2"], help="all by default"
    )
    parser.add_argument("--layers", type=int, default=24, help="of the encoder")
    parser.add_argument("--kernels", action="store_true", help="the slowest layers as well")
    parser.add_argument(
        "--engine", action="append", default=[], help=f"a side of the encoder: {TORCH} ...; all by default"
    )
    asked = parser.parse_args()
    parts: dict[str, Callable[[Results], None]] = {
        "encoder": lambda results: encoder(results, asked.layers, asked.kernels, asked.engine), "decode": decode,
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
