"""Decoding with TensorRT on a GPU: a Llama of 1B in fp16 at a batch of 1, beside torch.compile. A part of
``python -m benchmarks.tensorrt_gpu``."""

from __future__ import annotations

import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cuda_decoding import engine_steps, forced_off, half_off, in_half, torch_steps
from benchmarks.measure import Goal, Results, Table
from benchmarks.tensorrt_builds import BareEngine, engine_of, graph_of, median_ms, slowest
from benchmarks.tensorrt_models import HALF, static_cache, with_cache
from graphopt.backends.tensorrt.device_cache import DeviceCache
from graphopt.backends.tensorrt.options import CACHE_LENGTH
from graphopt.runtime import Decoder
from graphopt.sources import transformers_source

DECODE_GAIN, BANDWIDTH = 1.3, 0.6
PASTS, ROOM = (128, 2048), 2304
SPLIT = {"split_sums": True}
#: Engines by their ``target.options``.
FORMS: dict[str, dict[str, Any]] = {"as it is": {}, "split sums": SPLIT, "whole buffers": {"cache_lengths": []}}


def decode(results: Results, kernels: bool) -> None:
    """Milliseconds of a step, and how far the logits of random tokens are from fp32 eager's, of their scale."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=500000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    source = transformers_source(model, name="llama-1b")
    passes = [*with_cache(**static_cache(ROOM, "fp16")), HALF]
    graph = graph_of(source, passes, {"batch": (1, 1), "sequence": (1, ROOM)})
    one = {"batch": (1, 1, 1)}
    profiles = [{**one, "sequence": (1, 1, 1)}, {**one, "sequence": (1, 512, ROOM)}]
    table = Table("Llama of 1B in fp16, a batch of 1", "past")
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            name: engine_of(graph, Path(folder) / name, cuda_graphs=False, profiles=profiles, **options)
            for name, options in FORMS.items()
        }
        half = in_half(config)
        half.load_state_dict(model.state_dict())
        half, whole = half.cuda(), model.cuda()
        weights = sum(parameter.nbytes for parameter in half.parameters())
        copied = copy_bandwidth()
        for past in PASTS:
            prompt = torch.randint(0, config.vocab_size, (past,)).tolist()
            torch_steps(half, prompt, True, ROOM)  # compiles, captures, warms
            _, seconds, prefill = torch_steps(half, prompt, True, ROOM)
            peer = statistics.median(seconds)
            table.add(
                f"{past}, torch.compile", ms=1000 * peer, prompt_ms=1000 * prefill,
                off_of_eager=half_off(half, whole, prompt),
            )  # fmt: skip
            fastest = math.inf
            for name, engine in engines.items():
                _, seconds, prefill = engine_steps(engine, prompt)
                own = statistics.median(seconds)
                fastest = min(fastest, own)
                table.add(
                    f"{past}, {name}", ms=1000 * own, of_it_on_the_GPU=step_ms(engine, prompt), tokens_a_second=1 / own,
                    gain=peer / own, of_a_copy=weights / own / copied, prompt_ms=1000 * prefill,
                    off_of_eager=forced_off(engine, whole, prompt),
                )  # fmt: skip
            results.goals += [
                Goal.at_least(f"decode after {past}: over torch.compile", DECODE_GAIN, peer / fastest),
                Goal.at_least(f"decode after {past}: of the copy bandwidth", BANDWIDTH, weights / fastest / copied),
            ]
        results.tables.append(table)
        for name, engine in engines.items() if kernels else ():
            results.tables += [kernels_of_a_step(name, engine), kernels_of_a_prompt(name, engine)]


def after(engine: BareEngine, prompt: list[int]) -> DeviceCache:
    """A cache that has read a prompt and one token more, whose step is recorded."""
    decoder = Decoder(engine, 1)
    for tokens in (prompt, [0]):
        decoder.feed([tokens])
    assert isinstance(decoder.cache, DeviceCache)
    return decoder.cache


def step_ms(engine: BareEngine, prompt: list[int]) -> float:
    """A step's CUDA graph alone."""
    recorded = after(engine, prompt).recorded
    assert recorded is not None
    return median_ms(recorded.graph.replay)


def kernels_of_a_step(name: str, engine: BareEngine) -> Table:
    cache = after(engine, [0] * PASTS[0])
    assert cache.recorded is not None
    feeds = cache.recorded.inputs
    return slowest(f"a step, {name}", context_of(engine, 1, PASTS[0] + 2), lambda: cache.put(feeds), rows=60)


def kernels_of_a_prompt(name: str, engine: BareEngine) -> Table:
    context = context_of(engine, PASTS[-1], PASTS[-1])
    return slowest(
        f"a prompt of {PASTS[-1]}, {name}", context, lambda: Decoder(engine, 1).feed([[0] * PASTS[-1]]), rows=40
    )


def context_of(engine: BareEngine, sequence: int, needed: int) -> Any:
    """The context of ``sequence`` tokens in buffers that hold ``needed`` positions."""
    lengths = [length for length in engine.cache_lengths if length >= needed]
    return engine.context_for({"batch": 1, "sequence": sequence} | ({CACHE_LENGTH: lengths[0]} if lengths else {}))


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1000)
