"""masks.prove on random masks: whatever it claims is so at every element."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, seed, settings

from graphopt.ir import Value
from graphopt.masks import Keys, Mask, Unproven
from tests.mask_builder import Builder, assert_true
from tests.mask_generator import MOST, random_masks


@dataclass
class Seen:
    """What the property test met, so that it cannot pass by proving nothing."""

    examples: int = 0
    proven: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def count(self, found: Mask | Unproven) -> None:
        self.examples += 1
        if isinstance(found, Mask):
            self.proven += 1
            for kind in kinds_of(found):
                self.kinds[kind] = self.kinds.get(kind, 0) + 1


def kinds_of(claim: Mask) -> set[str]:
    """The parts that a claim is made of."""
    kinds = {claim.causal} - {"none"}
    kinds |= {name for name in ("window_left", "window_right") if getattr(claim, name) >= 0}
    kinds |= {"chunk"} if claim.chunk else set()
    kinds |= {"where zero" if keys.where_zero else "keys" for keys in claim.keys}
    kinds |= {"keys and keys"} if len(claim.keys) > 1 else set()
    if claim.prefix is not None:
        kinds.add("prefix of keys" if isinstance(claim.prefix, Keys) else "prefix of a number")
    if claim.segments is not None:
        kinds.add("segments of truths" if isinstance(claim.segments, Keys) else "segments")
    return kinds or {"none"}


KINDS = {
    "none", "upper_left", "lower_right", "window_left", "window_right", "chunk", "keys", "where zero", "keys and keys",
    "prefix of keys", "prefix of a number", "segments", "segments of truths",
}  # fmt: skip
RARE = {"prefix of keys", "prefix of a number", "segments of truths", "where zero"}


def claims_are_true(examples: int, number: int = 0) -> Seen:
    """Every claim about ``examples`` random masks holds at random sizes with random inputs."""
    seen = Seen()

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )  # fmt: skip
    @given(random_masks(), st.data())
    def property_holds(made: tuple[Builder, list[Value]], data: st.DataObject) -> None:
        builder, masks = made
        found = builder.prove(*masks)
        seen.count(found)
        if isinstance(found, Mask):
            for _ in range(3):
                sizes = {name: data.draw(st.integers(builder.least, MOST), name) for name in builder.sizes}
                assert_true(builder, masks, found, sizes, data.draw(st.integers(0, 999), "seed"))

    property_holds()
    return seen


def assert_not_vacuous(seen: Seen, examples: int, kinds: set[str]) -> None:
    assert seen.examples >= examples
    assert seen.proven >= examples // 6, f"proven {seen.proven} of {seen.examples}"
    assert kinds <= seen.kinds.keys(), seen.kinds


@seed(0)
@settings(max_examples=30, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_masks())
def test_random_masks_are_graphs_as_others(made: tuple[Builder, list[Value]]) -> None:
    """Every type is what torch derives."""
    builder, masks = made
    builder.graph.outputs = {f"mask {i}": mask for i, mask in enumerate(masks)}
    builder.graph.verify()


def test_claims_about_random_masks_are_true() -> None:
    assert_not_vacuous(claims_are_true(300), 300, KINDS - RARE)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_claims_about_many_random_masks_are_true(number: int) -> None:
    """10,000 together."""
    assert_not_vacuous(claims_are_true(2_500, number), 2_500, KINDS - {"prefix of a number"})
