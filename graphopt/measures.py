"""How differences and the metrics of contracts are written."""

from __future__ import annotations

import math
from collections.abc import Mapping

from graphopt.schemas.pipeline import HIGHER_IS_BETTER
from graphopt.schemas.report import StageParity


def number_text(number: float) -> str:
    """A difference: two digits, and a plain 0 where there is none."""
    if math.isinf(number):
        return "∞" if number > 0 else "\N{MINUS SIGN}∞"
    return f"{number:.1e}" if number else "0"


def decibels_text(snr: float) -> str:
    return number_text(snr) if math.isinf(snr) else f"{snr:.1f}"


def named_sizes(sizes: Mapping[str, int]) -> str:
    """Sizes by the names of dims."""
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def measure_text(metric: str, value: float) -> str:
    """A value in its metric's own form: what is near 1 with enough digits to be told from it."""
    if metric == "snr":
        return f"{decibels_text(value)} dB"
    return f"{value:.6f}" if metric in HIGHER_IS_BETTER else number_text(value)


def worst_and_limit(parity: StageParity) -> tuple[str, str]:
    """How far a stage is from eager, and how far it may be."""
    return measure_text(parity.metric, parity.worst), measure_text(parity.metric, parity.limit)
