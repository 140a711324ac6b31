"""Compile a decoder with a cache, and generate with it.

    python examples/generate.py [MODEL_DIRECTORY PROMPT]

Without a directory it takes a small Llama with random weights, whose prompts are tokens.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt.runtime import Generator
from graphopt.sources import transformers_source

PASSES: list[dict[str, object]] = [
    {"kind": "canonicalize"},
    {"kind": "fuse_attention"},
    {"kind": "insert_kv_cache", "layout": "static", "max_length": 256, "logits": "last"},
    {"kind": "fuse_cached_attention"},
    {"kind": "merge_linears"},
    {"kind": "fuse_norm"},
    {"kind": "fuse_activation"},
]


def small_llama() -> graphopt.Source:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers_source(LlamaForCausalLM(config), name="small-llama")


def main() -> None:
    model = graphopt.load_model(sys.argv[1]) if len(sys.argv) > 2 else small_llama()
    with tempfile.TemporaryDirectory() as folder:
        compiled = graphopt.compile(model, Path(folder) / "engine", passes=PASSES)
        for step in compiled.report.passes:
            assert step.parity is not None
            print(f"{step.kind:22} {step.changes:4} changes, largest difference from eager {step.parity.max_abs:.1e}")
        if len(sys.argv) > 2:
            generator = Generator.load(Path(folder) / "engine")
            for piece in generator.stream(sys.argv[2], max_new_tokens=64):
                print(piece.text, end="", flush=True)
            print()
            return
        generator = Generator(compiled.engine)
        for made in generator.generate([[5, 6, 7], [8]], max_new_tokens=8):  # rows of any lengths together
            print(made.prompt_tokens, made.tokens, made.finish)


if __name__ == "__main__":
    main()
