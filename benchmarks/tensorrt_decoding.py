"""Decoding with TensorRT on a GPU: a Llama of 1B in fp16 at a batch of 1, beside torch.compile. A part of
``python -m benchmarks.tensorrt_gpu``."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cuda_decoding import engine_steps, forced_off, torch_steps
from benchmarks.measure import Goal, Results, Table
from benchmarks.tensorrt_builds import BareEngine, engine_of, graph_of, median_ms, slowest
from benchmarks.tensorrt_models import HALF, static_cache, with_cache
from graphopt.backends.tensorrt.device_cache import DeviceCache
from graphopt.runtime import Decoder
from graphopt.sources import transformers_source

DECODE_GAIN, BANDWIDTH = 1.3, 0.6
PASTS, ROOM = (128, 2048), 2304


def decode(results: Results, kernels: bool) -> None:
    """Milliseconds of a step, and how far the logits of random tokens are from eager's, of their scale."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=500000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    source = transformers_source(model, name="llama-1b")
    graph = graph_of(
        source, [*with_cache(**static_cache(ROOM, "fp16")), HALF], {"batch": (1, 1), "sequence": (1, ROOM)}
    )
    one = {"batch": (1, 1, 1)}
    profiles = [{**one, "sequence": (1, 1, 1)}, {**one, "sequence": (1, 512, ROOM)}]
    table = Table("Llama of 1B in fp16, a batch of 1", "past")
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(graph, Path(folder) / "engine", cuda_graphs=False, profiles=profiles)
        half = model.half().cuda()
        weights = sum(parameter.nbytes for parameter in half.parameters())
        copied = copy_bandwidth()
        for past in PASTS:
            prompt = torch.randint(0, config.vocab_size, (past,)).tolist()
            _, seconds, prefill = engine_steps(engine, prompt)
            _, peer, peer_prefill = torch_steps(half, prompt, True, ROOM)
            own, other = statistics.median(seconds), statistics.median(peer[3:])
            table.add(
                str(past), torch_ms=1000 * other, graphopt_ms=1000 * own, of_it_on_the_GPU=step_ms(engine, prompt),
                tokens_a_second=1 / own, gain=other / own, of_a_copy=weights / own / copied,
                prompt_ms=1000 * prefill, torch_prompt_ms=1000 * peer_prefill, off_of_eager=forced_off(engine, half, prompt),
            )  # fmt: skip
            results.goals += [
                Goal.at_least(f"decode after {past}: over torch.compile", DECODE_GAIN, other / own),
                Goal.at_least(f"decode after {past}: of the copy bandwidth", BANDWIDTH, weights / own / copied),
            ]
        results.tables.append(table)
        if kernels:
            results.tables.append(kernels_of_a_step(engine))


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


def kernels_of_a_step(engine: BareEngine) -> Table:
    cache = after(engine, [0] * PASTS[0])
    assert cache.recorded is not None
    feeds = cache.recorded.inputs
    context = engine.context_for({"batch": 1, "sequence": 1})
    return slowest("a step", context, lambda: cache.put(feeds), rows=60)


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1000)
