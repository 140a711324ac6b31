"""TensorRT's engines on the GPU that is here, held to eager PyTorch; skipped elsewhere, with the reason."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt
from benchmarks.tensorrt_models import HALF, with_cache
from graphopt.backends.tensorrt.backend import TensorRtBackend
from graphopt.decode_parity import decode_parity
from graphopt.eager import eager
from graphopt.errors import InputError, MissingBackendError
from graphopt.parity import compare
from graphopt.runtime import Decoder
from graphopt.runtime.engine import Engine
from tests.tiny import tiny_bert, tiny_llama


def why_not_here() -> str | None:
    """Why engines are neither built nor run on this machine."""
    reason = TensorRtBackend.unrunnable()
    if reason is not None:
        return reason
    try:
        TensorRtBackend.versions()
    except MissingBackendError as error:
        return str(error).splitlines()[0]
    return None


WHY_NOT = why_not_here()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]
SIZES = ((1, 16), (4, 32), (3, 7))  # expected, the largest, neither
LENGTH = 48
Feeds = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directories of engines, each built once: of ``"encoder"`` or ``"decoder"``."""
    made: dict[tuple[Any, ...], Path] = {}

    def compile_once(kind: str, precision: str, layout: str = "") -> Path:
        key = kind, precision, layout
        if key not in made:
            made[key] = tmp_path_factory.mktemp("engines") / "e"
            half = [HALF] if precision == "fp16" else []
            if kind == "encoder":
                passes = [*TensorRtBackend.standard_passes, *half]
                options: dict[str, Any] = {"shapes": [{"batch": 1, "sequence": 16}]}
                source, dims = tiny_bert(), {"batch": (1, 4), "sequence": (2, 32)}
            else:
                longest = {"max_length": LENGTH, "logits": "last"} if layout == "static" else {}
                passes = [*with_cache(layout=layout, dtype=precision, **longest), *half]
                options = {"cache_lengths": [8, 16]} if layout == "static" else {}
                source, dims = tiny_llama(), {"batch": (1, 4), "sequence": (1, LENGTH)}
            target = {"backend": "tensorrt", "options": options}
            report = graphopt.compile(source, made[key], passes=passes, target=target, dims=dims).report
            assert report.engine is not None
            assert report.engine.holds
        return made[key]

    return compile_once


def feeds_of(batch: int, sequence: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens; the last row has padding behind."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (batch, sequence), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, sequence // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def off(got: Feeds, feeds: Feeds) -> float:
    """How far the encoder's tokens are from eager's, of the scale."""
    name = "last_hidden_state"
    wanted = eager(tiny_bert().module)(**feeds)[name]
    return compare({name: wanted}, {name: got[name].cpu()}, feeds["attention_mask"])[name].relative


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 5e-3)])
def test_an_encoder_is_eagers(precision: str, limit: float, compiled: Callable[..., Path]) -> None:
    """Arrays of numpy, and tensors on the GPU, which stay there."""
    engine = graphopt.load(compiled("encoder", precision))
    for size in SIZES:
        feeds = feeds_of(*size)
        arrays = engine(**{name: tensor.numpy() for name, tensor in feeds.items()})
        there = engine(**{name: tensor.cuda() for name, tensor in feeds.items()})
        assert {tensor.device.type for tensor in there.values()} == {"cuda"}
        assert off(there, feeds) <= limit
        assert off({name: torch.from_numpy(array) for name, array in arrays.items()}, feeds) <= limit


def test_recorded_calls_are_eagers(compiled: Callable[..., Path]) -> None:
    """Sizes that come again with other tokens, in turn; what a call gave stays when the next one runs."""
    engine = graphopt.load(compiled("encoder", "fp32"), cuda_graphs=True)
    given = [feeds_of(*size, seed=seed) for seed, size in itertools.product(range(3), SIZES)]
    results = [engine(**{name: tensor.cuda() for name, tensor in feeds.items()}) for feeds in given]
    assert max(off(got, feeds) for got, feeds in zip(results, given, strict=True)) <= 1e-4


def test_sizes_that_fit_no_profile_are_named(compiled: Callable[..., Path]) -> None:
    engine = graphopt.load(compiled("encoder", "fp32"))
    with pytest.raises(InputError, match="sequence is 33"):
        engine(**feeds_of(1, 33))


def texts_of(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens, and eager's logits behind each of them."""
    ids = torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(6))
    return ids, eager(tiny_llama().module)(input_ids=ids)["logits"]


@pytest.mark.parametrize("layout", ["static", "growing"])
def test_tokens_are_eagers(layout: str, compiled: Callable[..., Path]) -> None:
    """Rows of different lengths; static buffers grow twice."""
    engine = graphopt.load(compiled("decoder", "fp32", layout))
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 99, (count,), generator=generator).tolist() for count in (2, 1, 5)]
    parity = decode_parity(tiny_llama().module, engine, prompts, steps=24)
    assert [row.equal for row in parity.rows] == [24, 24, 24]
    assert parity.worst_drift < 1e-4


def test_logits_in_half_precision_are_eagers(compiled: Callable[..., Path]) -> None:
    """Step by step through all lengths of buffers."""
    engine = graphopt.load(compiled("decoder", "fp16", "static"))
    ids, whole = texts_of(2, 40)
    texts = Decoder(engine, 2)
    logits = [texts.feed(part.tolist()).float().cpu() for part in (ids[:, :3], *ids[:, 3:].T[:, :, None])]
    wanted = whole[:, 2:].transpose(0, 1)
    assert float((torch.stack(logits) - wanted).abs().max() / wanted.abs().max()) <= 5e-3
    assert lengths(texts) == {LENGTH}


def test_rows_may_leave(compiled: Callable[..., Path]) -> None:
    """The steps of those that stay are recorded anew."""
    engine = graphopt.load(compiled("decoder", "fp32", "static"))
    ids, whole = texts_of(3, 9)
    texts = Decoder(engine, 3)
    texts.feed(ids[:, :5].tolist())
    texts.feed(ids[:, 5:6].tolist())
    assert lengths(texts) == {8}
    texts.select(torch.tensor([2, 0]))
    for place in range(6, 9):
        logits = texts.feed(ids[[2, 0], place : place + 1].tolist())
    torch.testing.assert_close(logits.cpu(), whole[[2, 0], 8], atol=1e-4, rtol=1e-4)
    assert lengths(texts) == {16}


def lengths(texts: Decoder) -> set[int]:
    return {tensor.shape[2] for tensor in texts.cache.tensors.values()}


def test_contexts_take_the_memory_of_their_own_profile(compiled: Callable[..., Path]) -> None:
    engine: Engine = graphopt.load(compiled("decoder", "fp32", "static"))
    Decoder(engine, 1).feed([[5, 6]])
    opened = engine.opened()  # type: ignore[attr-defined]
    assert len(opened.contexts) == 1
    needs = [opened.engine.get_device_memory_size_for_profile_v2(index) for index in range(6)]
    assert max(needs) == engine.device_bytes  # type: ignore[attr-defined]
