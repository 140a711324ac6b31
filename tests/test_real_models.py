"""Real weights, real data: what the whole thing is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import graphopt
from benchmarks.assets import minilm, smollm2
from benchmarks.demo import sts_b_spearman
from graphopt.eager import eager
from graphopt.sources import Source
from graphopt.testing import assert_parity


@pytest.fixture(scope="module")
def encoder() -> Source:
    return graphopt.load_model(str(minilm()))


@pytest.fixture(scope="module")
def encoder_engine(encoder: Source, tmp_path_factory: pytest.TempPathFactory) -> graphopt.Engine:
    folder: Path = tmp_path_factory.mktemp("minilm") / "engine"
    kinds = ["canonicalize", "fuse_attention", "fuse_norm", "heads_last", "flatten_tokens", "remove_padding"]
    passes = [{"kind": kind} for kind in kinds]
    return graphopt.compile(encoder, folder, passes=passes, target={"tactics": "fixed"}).engine


@pytest.mark.parametrize(("batch", "sequence"), [(1, 7), (3, 33), (8, 128), (2, 300)])
def test_minilm_at_untraced_sizes(encoder: Source, encoder_engine: graphopt.Engine, batch: int, sequence: int) -> None:
    inputs = encoder.sample()({"batch": batch, "sequence": sequence}, torch.Generator().manual_seed(sequence))
    assert_parity(
        eager(encoder.module)(**inputs), encoder_engine(**inputs), mask=inputs["attention_mask"], max_abs=1e-4
    )


@pytest.mark.slow
def test_minilm_scores_sts_b_as_eager(encoder: Source, encoder_engine: graphopt.Engine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    reference = sts_b_spearman(eager(encoder.module), tokenizer)
    assert round(reference, 4) == 0.8203
    assert abs(sts_b_spearman(encoder_engine, tokenizer) - reference) <= 1e-4


@pytest.mark.slow
def test_smollm2_logits(tmp_path: Path) -> None:
    source = graphopt.load_model(str(smollm2()))
    engine = graphopt.compile(source, tmp_path / "engine", target={"tactics": "fixed"}).engine
    generator = torch.Generator().manual_seed(0)
    for length in (1, 7, 128, 300):
        inputs = source.sample()({"batch": 2, "sequence": length}, generator)  # the second row is padded on the left
        expected, got = eager(source.module)(**inputs), engine(**inputs)
        assert_parity(expected, got, mask=inputs["attention_mask"], max_abs=2e-3)
        real = inputs["attention_mask"].bool()
        assert torch.equal(expected["logits"][real].argmax(-1), got["logits"][real].argmax(-1))


@pytest.mark.slow
def test_smollm2_says_paris() -> None:
    from graphopt.models import from_gguf

    tokenizer = AutoTokenizer.from_pretrained(from_gguf(smollm2()))
    source = graphopt.load_model(str(smollm2()))
    graph = graphopt.trace(source.module, source.inputs, source.axes, defaults=source.dims)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    from graphopt.execution import run

    logits = run(graph, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})["logits"]
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
