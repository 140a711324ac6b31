"""Numerical parity in one's own test suite: the ``parity`` fixture comes with graphopt's pytest plugin.

pytest examples/test_parity.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import graphopt
from graphopt.sources import transformers_source
from graphopt.testing import ParityRecorder, assert_parity

CONFIG = BertConfig(vocab_size=300, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)


@pytest.fixture(scope="module")
def source() -> graphopt.Source:
    torch.manual_seed(0)
    return transformers_source(BertModel(CONFIG))


@pytest.fixture(scope="module")
def engine(source: graphopt.Source, tmp_path_factory: pytest.TempPathFactory) -> graphopt.Engine:
    folder: Path = tmp_path_factory.mktemp("engine") / "bert"
    return graphopt.compile(source, folder, target={"tactics": "fixed"}).engine


@pytest.mark.parametrize(("batch", "sequence"), [(1, 4), (3, 21)])
def test_engine_is_the_model(
    parity: ParityRecorder, source: graphopt.Source, engine: graphopt.Engine, batch: int, sequence: int
) -> None:
    ids = torch.randint(0, 300, (batch, sequence))
    mask = torch.ones_like(ids)
    mask[-1, sequence // 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    parity(source.module, engine, inputs, max_abs=1e-5)


def test_a_difference_is_found() -> None:
    expected = torch.ones(2, 3)
    with pytest.raises(AssertionError, match="largest difference"):
        assert_parity(expected, expected + 0.1)
