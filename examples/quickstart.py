"""Compile a transformer, run the engine, look at what was proven.

    python examples/quickstart.py [MODEL_DIRECTORY]

Without a directory it takes a small BERT with random weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

import graphopt
from graphopt.sources import transformers_source


def small_bert() -> graphopt.Source:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return transformers_source(BertModel(config), name="small-bert")


def main() -> None:
    model = graphopt.load_model(sys.argv[1]) if len(sys.argv) > 1 else small_bert()
    with tempfile.TemporaryDirectory() as folder:
        compiled = graphopt.compile(model, Path(folder) / "engine", dims={"batch": (1, 8), "sequence": (1, 128)})
        for step in compiled.report.passes:
            assert step.parity is not None
            print(f"{step.kind:16} {step.changes:4} changes, largest difference from eager {step.parity.max_abs:.1e}")

        engine = graphopt.load(Path(folder) / "engine")  # as a deployment would: files are checked first
        ids = torch.randint(0, 500, (3, 17))
        outputs = engine(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
        print({name: tuple(tensor.shape) for name, tensor in outputs.items()})


if __name__ == "__main__":
    main()
