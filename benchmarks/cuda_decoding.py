"""``python -m benchmarks.cuda_decoding``: decoding in fp16 on an NVIDIA GPU, onnxruntime beside torch compiled.

The passes and engines of the CPU benchmark with ``provider: cuda``: one Llama of SmolLM2-135M's shape with seeded random weights,
buffers shared between past and present. Says how far logits are from eager's, tokens/s at a batch of 1, and what onnxruntime says
to a CUDA graph. Prints a table and writes ``results/cuda_decoding.{md,json}``; needs onnxruntime-gpu and a GPU."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import graphopt
from benchmarks.measure import Goal, Results, Table
from graphopt.parity import compare
from graphopt.runtime import Decoder
from graphopt.schemas.pipeline import Budget
from graphopt.sources import Source, transformers_source

LENGTH, PROMPT, STEPS, PROMPTS = 1024, 128, 128, 5


def model() -> Source:
    """SmolLM2-135M's shape, random weights in fp16."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000.0,
    )  # fmt: skip
    return transformers_source(in_half(config))


def in_half(config: Any) -> Any:
    """As ``from_pretrained`` makes it. (``half()`` rounds the frequencies of rotary embeddings too, which alone moves the logits
    of a Llama of 1B by 4.5e-2 of their scale after 2048 tokens.)"""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


def compiled(source: Source, folder: Path, provider: str) -> graphopt.Compiled:
    free = ("fuse_cached_attention", "merge_linears", "fuse_norm", "fuse_activation", "heads_last", "flatten_tokens")
    passes: list[dict[str, Any]] = [
        {"kind": kind, "allow_no_match": True} for kind in ("canonicalize", "fuse_attention")
    ]
    passes.append({"kind": "insert_kv_cache", "layout": "static", "max_length": LENGTH, "logits": "last"})
    passes += [{"kind": kind, "allow_no_match": True} for kind in free]
    target = {"backend": "onnxruntime", "provider": provider, "tactics": "fixed"}
    return graphopt.compile(
        source,
        folder / "engine",
        passes=passes,
        target=target,
        parity=Budget(metric="relative", limit=2e-2),
        force=True,
    )


def engine_steps(engine: graphopt.Engine, prompt: list[int]) -> tuple[list[int], list[float], float]:
    """Greedy tokens, seconds of each step, seconds of the prompt, which is read once before and then some times."""
    Decoder(engine, 1).feed([prompt])
    prefills: list[float] = []
    for _ in range(PROMPTS):
        decoder = Decoder(engine, 1)
        start = time.perf_counter()
        token = int(decoder.feed([prompt]).argmax())
        prefills.append(time.perf_counter() - start)
    tokens, seconds = [token], []
    for _ in range(STEPS):
        start = time.perf_counter()
        token = int(decoder.feed([[token]]).argmax())
        seconds.append(time.perf_counter() - start)
        tokens.append(token)
    return tokens, seconds, statistics.median(prefills)


def torch_steps(
    module: Any, prompt: list[int], compile_it: bool, length: int = LENGTH
) -> tuple[list[int], list[float], float]:
    """The same with transformers' static cache, the step compiled with CUDA graphs."""
    from transformers import StaticCache

    cache = StaticCache(config=module.config, max_cache_len=length)
    step: Callable[..., Any] = torch.compile(module, mode="reduce-overhead") if compile_it else module

    def run(forward: Callable[..., Any], tokens: list[int], place: int) -> int:
        ids = torch.tensor([tokens], device="cuda")
        places = torch.arange(place, place + len(tokens), device="cuda")
        where = {"cache_position": places, "position_ids": places[None], "past_key_values": cache}
        logits = forward(input_ids=ids, **where, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    with torch.inference_mode():
        run(module, prompt, 0)
        prefills: list[float] = []
        for _ in range(PROMPTS):
            cache.reset()  # it counts what it has read by itself, whatever the places say
            start = time.perf_counter()
            token = run(module, prompt, 0)
            prefills.append(time.perf_counter() - start)
        tokens, seconds = [token], []
        for index in range(STEPS):
            start = time.perf_counter()
            token = run(step, [token], len(prompt) + index)
            seconds.append(time.perf_counter() - start)
            tokens.append(token)
    return tokens, seconds, statistics.median(prefills)


def forced_off(engine: graphopt.Engine, module: Any, prompt: list[int], count: int = 64) -> float:
    """Random tokens one by one after a prompt: the largest difference of the logits from eager's of the whole text, of their
    scale. (Greedy tokens of a random model repeat each other, whatever its cache holds.)"""
    tokens = _random_tokens(module, count)
    decoder = Decoder(engine, 1)
    got = torch.stack([decoder.feed([part])[0].float().cpu() for part in (prompt, *([token] for token in tokens))])
    return _off(got, _logits(module, prompt, tokens))


def half_off(half: Any, module: Any, prompt: list[int], count: int = 64) -> float:
    """The same of eager in half precision."""
    tokens = _random_tokens(module, count)
    return _off(*(_logits(each, prompt, tokens) for each in (half, module)))


def _off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return compare({"logits": wanted}, {"logits": got})["logits"].relative


def _random_tokens(module: Any, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(2)
    found: list[int] = torch.randint(0, module.config.vocab_size, (count,), generator=generator).tolist()
    return found


def _logits(module: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Eager's, after the prompt and after each of the tokens behind it."""
    with torch.inference_mode():
        logits: torch.Tensor = module(torch.tensor([prompt + tokens], device=module.device)).logits
    return logits[0, len(prompt) - 1 :].float().cpu()


def cuda_graph(folder: Path) -> str:
    """What onnxruntime says when a session with a CUDA graph is asked for."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        providers = [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]
        ort.InferenceSession(str(folder / "engine" / "model.onnx"), options, providers=providers)
    except Exception as error:
        return str(error).splitlines()[0][:300]
    return "the session is made"


def main() -> int:
    console = Console(width=180)
    if not torch.cuda.is_available():
        console.print("skipped: no CUDA device")
        return 0
    import onnxruntime

    results = Results("cuda_decoding")
    table = Table(f"Decoding on {torch.cuda.get_device_name(0)}", "side")
    source = model()
    prompt = torch.randint(5, 49000, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    with tempfile.TemporaryDirectory() as name:
        made = compiled(source, Path(name), "cuda")
        proven = made.report.engine
        assert proven is not None
        for probe in proven.probes:
            console.print(probe.sizes, {name: output.relative for name, output in probe.outputs.items()})
        graph = cuda_graph(Path(name))
        module: Any = source.module.cuda()
        module.config.use_cache = True
        sides: dict[str, Callable[[], tuple[list[int], list[float], float]]] = {
            "graphopt, onnxruntime CUDA": lambda: engine_steps(made.engine, prompt),
            "torch eager, static cache": lambda: torch_steps(module, prompt, False),
            "torch compiled (reduce-overhead), static cache": lambda: torch_steps(module, prompt, True),
        }
        off = {length: forced_off(made.engine, module, prompt[:length]) for length in (5, PROMPT)}
        rates: dict[str, float] = {}
        for side, run in sides.items():
            run()  # compiles, captures, warms
            _, seconds, prefill = run()
            rates[side] = 1 / statistics.median(seconds[8:])
            table.add(side, tokens_per_second=round(rates[side], 1), prefill_ms=round(1000 * prefill, 2))
    mine, _, best = rates.values()
    table.notes.append(
        f"fp16, batch 1, prompt {PROMPT}, {STEPS} steps, cache of {LENGTH}; torch {torch.__version__}, onnxruntime"
        f" {onnxruntime.__version__}"
    )
    table.notes.append(
        "64 random tokens, one by one, after a prompt: largest difference of the logits from eager's, of their scale: "
        + ", ".join(f"{each:.1e} after {length}" for length, each in off.items())
    )
    driver = Path("/proc/driver/nvidia/version")
    table.notes.append(driver.read_text().splitlines()[0] if driver.exists() else "no driver version is told")
    table.notes.append(f"the engine against eager on the CPU in fp16: {proven.worst:.1e} of the logits' scale")
    table.notes.append(f"CUDA graph: {graph}")
    results.tables.append(table)
    results.goals.append(Goal.at_least("decode over torch compiled with a static cache", 1.0, mine / best, "x"))
    table.show(console)
    results.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
