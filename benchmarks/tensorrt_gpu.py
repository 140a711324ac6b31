"""TensorRT on a GPU: a BERT-large encoder with random weights in fp16, parity and latency beside torch.compile.

    python -m benchmarks.tensorrt_gpu

Needs an NVIDIA GPU and TensorRT; nothing is downloaded."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

import graphopt
from graphopt.backends.tensorrt.backend import TensorRtBackend
from graphopt.sources import transformers_source

SHAPES = ((1, 128), (8, 128), (32, 128))
BETWEEN = ((1, 16), (3, 77), (16, 200))
RUNS = 50
Call = Callable[[], Any]


def inputs_of(batch: int, sequence: int) -> dict[str, torch.Tensor]:
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


def main(layers: int = 24) -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096)
    model = BertModel(config).eval()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, TensorRT {TensorRtBackend.versions()}")
    with tempfile.TemporaryDirectory() as folder:
        shapes = [{"batch": batch, "sequence": sequence} for batch, sequence in SHAPES]
        start = time.perf_counter()
        made = graphopt.compile(
            transformers_source(model, name="bert-large"),
            Path(folder) / "engine",
            passes=[*TensorRtBackend.standard_passes, {"kind": "cast"}],
            target={"backend": "tensorrt", "options": {"shapes": shapes}},
            dims={"batch": (1, 32), "sequence": (2, 384)},
        )
        parity = made.manifest.report.engine
        assert parity is not None
        print(f"compiled in {time.perf_counter() - start:.0f} s; {parity.metric} at least {parity.worst:.6f} of eager")
        plain = graphopt.load(Path(folder) / "engine")
        recorded = graphopt.load(Path(folder) / "engine", cuda_graphs=True)
        model = model.cuda()
        for batch, sequence in (*SHAPES, *BETWEEN):
            feeds = inputs_of(batch, sequence)
            with torch.inference_mode():
                wanted = model(**feeds).last_hidden_state
            for engine in (plain, recorded):
                off = (engine(**feeds)["last_hidden_state"].float() - wanted).abs().max() / wanted.abs().max()
                print(f"{batch} x {sequence}: relative {float(off):.1e} of fp32 eager")
        half: Call = torch.compile(model.half(), mode="reduce-overhead")
        for batch, sequence in SHAPES:
            feeds = inputs_of(batch, sequence)
            with torch.inference_mode():
                peer = median_ms(partial(half, **feeds))
            one, two = (median_ms(partial(engine, **feeds)) for engine in (plain, recorded))
            print(
                f"{batch} x {sequence}: torch {peer:.3f} ms, engine {one:.3f}, in a CUDA graph {two:.3f} ({two / peer:.2f})"
            )


if __name__ == "__main__":
    main()
