"""masks.prove: what is no mask, by the reason; and numbers that are no truths."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir import Value
from graphopt.masks import Unproven
from tests.mask_builder import Build, Builder, check, never_wrong

STRUCTURE = "it holds a condition that is no known structure: "


def gathered_by_data(m: Builder) -> Value:
    order = m.input("order", torch.int64, (m.keys,))
    return m.op("index.Tensor", self=m.causal(), indices=(m.query(), order))


def gathered_some(m: Builder) -> Value:
    return m.op("index.Tensor", self=m.causal(), indices=(None, m.key()))


def regrouped(m: Builder) -> Value:
    flat = m.op("reshape.default", self=m.causal(), shape=(m.queries * m.keys,))
    return m.op("reshape.default", self=flat, shape=(m.queries, m.keys))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (gathered_by_data, "an index that is not a position in %index = aten.index.Tensor"),
        (gathered_some, "an index that skips axes in %index = aten.index.Tensor"),
        (regrouped, "a reshape that regroups elements in %reshape_1 = aten.reshape.default"),
        (lambda m: m.compare("ge", m.query(), 3), f"{STRUCTURE}-q + 3 <= 0"),
        (lambda m: m.compare("ne", m.query(), m.key()), f"{STRUCTURE}(k - q + 1 <= 0) or (-k + q + 1 <= 0)"),
        (lambda m: m.unsqueeze(m.unsqueeze(m.causal(), 0, 0), 0), "%unsqueeze_3 has 5 dimensions"),
        (
            lambda m: m.compare("le", m.key(0, torch.float32), m.query(0, torch.float32)),
            "a range of real numbers in %arange = aten.arange.start_step",
        ),
        (
            lambda m: m.compare("eq", m.op("abs.default", self=m.distance()), 3),
            "a comparison (eq) of values that are not positions",
        ),
        (
            lambda m: m.compare("ge", m.op("abs.default", self=m.distance()), 3),
            f"{STRUCTURE}(k - q + 3 <= 0) or (-k + q + 3 <= 0)",
        ),
        (
            lambda m: m.compare("le", m.cast(m.key(), torch.float16), m.cast(m.query(), torch.float16)),
            "positions in a dtype that may not hold them in %to = aten.to.dtype",
        ),
        (
            lambda m: m.compare("le", m.key(0, torch.int8), m.query(0, torch.int8)),
            "integers of a dtype that may wrap in %le = aten.le.Tensor",
        ),
        (
            lambda m: m.compare("lt", m.distance(), m.input("scalar", torch.int64, ())),
            f"{STRUCTURE}-%scalar[] - k + q + 1 <= 0",
        ),
    ],
)
def test_what_is_no_structure_is_unproven(build: Build, reason: str) -> None:
    check(build, reason)


def test_a_mask_of_each_head_is_unproven() -> None:
    builder = Builder()
    heads = builder.unsqueeze(builder.arange(4), 1, 2)
    assert builder.prove(builder.compare("le", builder.key(), builder.add(builder.query(), heads))) == Unproven(
        f"{STRUCTURE}-h + k - q <= 0"
    )


# Numbers that are no truths: a wrong reading would be a wrong claim


def odd_distance(m: Builder) -> Value:
    return m.cast(m.op("bitwise_and.Scalar", self=m.distance(), other=1), torch.bool)


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.negate(odd_distance(m)),
        lambda m: m.padding(m.cast(m.op("bitwise_and.Scalar", self=m.numbers, other=1), torch.bool)),
        lambda m: m.cast(m.negate(m.cast(m.negate(m.causal()), torch.int64)), torch.bool),
        lambda m: m.cast(m.cast(m.full(0.5, torch.float32, m.queries, m.keys), torch.int64), torch.bool),
        lambda m: m.cast(m.cast(m.distance(), torch.uint8), torch.bool),
        lambda m: m.compare("ge", m.cast(m.distance(), torch.uint8), 0),
        lambda m: m.cast(m.op("mul.Scalar", self=m.cast(m.causal(), torch.float32), other=0.5), torch.int64),
        lambda m: m.compare("ge", m.minus(m.query(0, torch.uint8), m.key(0, torch.uint8)), 0),
        lambda m: m.compare("ge", m.minus(m.cast(m.causal(), torch.uint8), 1), 0),
    ],
    ids=[
        "parity of the distance",
        "lowest bit",
        "not of integers",
        "half",
        "distance in a byte",
        "sign in a byte",
        "halves",
        "range of bytes",
        "one less in a byte",
    ],
)
def test_integers_are_no_truths(build: Build) -> None:
    never_wrong(build)
    never_wrong(build, "sequence", "sequence")


def test_a_size_as_a_number_is_no_crash() -> None:
    never_wrong(lambda m: m.compare("lt", m.key(), m.full(m.keys, torch.int64)))
