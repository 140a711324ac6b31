"""``make demo``: MiniLM to an ONNX Runtime engine, parity per pass, STS-B with the eager model and with the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor

import graphopt
from benchmarks.assets import minilm, sts_b
from graphopt import show
from graphopt.backends.onnxruntime.backend import OnnxRuntimeBackend
from graphopt.eager import eager

OUT = Path("demo/minilm")
BATCH = 64
#: The target's standard list, and real tokens only: what stands at padding positions means nothing to an embedding.
PASSES = [*OnnxRuntimeBackend.standard_passes, {"kind": "remove_padding"}]

Model = Callable[..., Mapping[str, Tensor]]


def embed(model: Model, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Unit embeddings ``[sentences, features]``: the mean of the last hidden state over real tokens, at most 128."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        texts = [sentences[index] for index in chosen]
        inputs = dict(tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))
        hidden = model(**inputs)["last_hidden_state"]
        mask = inputs["attention_mask"].unsqueeze(-1)
        means = (hidden * mask).sum(1) / mask.sum(1)
        found.update(zip(chosen, torch.nn.functional.normalize(means), strict=True))
    return torch.stack([found[index] for index in range(len(sentences))])


def sts_b_spearman(model: Model, tokenizer: Any) -> float:
    """Spearman correlation of the model's cosine similarities with the scores of STS-B's test rows."""
    rows = sts_b("test")
    scores, first, second = zip(*rows, strict=True)
    cosines = (embed(model, tokenizer, list(first)) * embed(model, tokenizer, list(second))).sum(1)
    return float(spearmanr(scores, cosines.numpy()).statistic)


def main() -> None:
    from transformers import AutoTokenizer

    show.quiet_libraries()
    console = Console()
    source = graphopt.load_model(str(minilm()))
    with show.progress(Console(stderr=True), quiet=False) as progress:
        dims = {"batch": (1, 64), "sequence": (2, 512)}
        compiled = graphopt.compile(source, OUT, passes=PASSES, dims=dims, progress=progress)
    console.print(show.parity_table(compiled.report))
    console.print(show.tactics_table(compiled.report))
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    scores = {
        "eager": sts_b_spearman(eager(source.module), tokenizer),
        "engine": sts_b_spearman(compiled.engine, tokenizer),
    }
    for name, score in scores.items():
        console.print(f"STS-B test, Spearman, {name:6} {score:.4f}", highlight=False)
    console.print(f"engine written to {OUT}; try: .venv/bin/graphopt inspect {OUT}", highlight=False)


if __name__ == "__main__":
    main()
