"""Parity in your own tests, and a pytest plugin that is there once graphopt is installed.

::

    from graphopt.testing import assert_parity

    def test_engine(parity):
        engine = graphopt.load("engine")
        parity(model, engine, inputs, max_abs=1e-4)            # the fixture: also writes a summary at the end
        assert_parity(model(**inputs), engine(**inputs))       # the plain function

    def test_generation():
        assert_decodes(model, graphopt.load("decoder"), [[1, 2, 3], [4]], steps=128)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.decode_parity import decode_parity
from graphopt.eager import eager, path_name
from graphopt.errors import ParityError
from graphopt.parity import compare
from graphopt.runtime.engine import Engine
from graphopt.schemas.report import DecodeParity, OutputParity


def assert_parity(
    reference: Any,
    candidate: Any,
    *,
    mask: Any = None,
    max_abs: float | None = None,
    relative: float | None = None,
    cosine: float | None = None,
) -> dict[str, OutputParity]:
    """Fail unless every output of ``candidate`` is that of ``reference``.

    Both: a mapping of outputs by name, a model's output, one tensor, or a sequence of them; torch or numpy. ``mask``
    ``[batch, sequence]`` leaves out positions that mean nothing. Limits: largest absolute difference, that over the
    reference's largest value, smallest cosine; without any, ``relative`` 1e-4. AssertionError names the worst output."""
    if max_abs is None and relative is None and cosine is None:
        relative = 1e-4
    expected, got = named_outputs(reference), named_outputs(candidate)
    try:
        found = compare(expected, got, mask)
    except ParityError as error:
        raise AssertionError(str(error)) from error
    if not any(parity.compared for parity in found.values()):
        raise AssertionError("nothing was compared: " + _why_nothing(reference, expected))
    problems = [
        problem for name, parity in found.items() for problem in _problems(name, parity, max_abs, relative, cosine)
    ]
    if problems:
        raise AssertionError("no parity:\n  " + "\n  ".join(problems))
    return found


def assert_decodes(
    model: nn.Module,
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    source: Mapping[str, Sequence[torch.Tensor]] | None = None,
    steps: int = 128,
    chunk: int | None = None,
    agreement: float = 1.0,
    drift: float | None = None,
) -> DecodeParity:
    """Fail unless an engine with a cache, all ``prompts`` in one batch, generates eager's greedy tokens.

    The arguments are those of :func:`graphopt.decode_parity.decode_parity`. ``agreement``: the share of tokens that must be
    eager's; ``drift``: how far logits may be, relative to the largest. AssertionError names the first tokens that differ."""
    found = decode_parity(model, engine, prompts, source=source, steps=steps, chunk=chunk)
    problems = []
    if found.agreement < agreement:
        problems.append(f"{found.agreement:.2%} of the tokens are eager's, must be {agreement:.2%}")
        problems += [
            f"row {index}: {row.first_difference}" for index, row in enumerate(found.rows) if row.first_difference
        ]
    if drift is not None and not found.worst_drift <= drift:
        problems.append(f"logits differ by {found.worst_drift:.3g} of their scale, limit {drift:.3g}")
    if problems:
        raise AssertionError("no parity:\n  " + "\n  ".join(problems))
    return found


def _problems(
    name: str, parity: OutputParity, max_abs: float | None, relative: float | None, cosine: float | None
) -> Iterator[str]:
    where = f"{name} ({parity.compared} values compared, {parity.left_out} left out)"
    if max_abs is not None and not parity.max_abs <= max_abs:
        yield f"{where}: largest difference {parity.max_abs:.3g}, limit {max_abs:.3g}"
    if relative is not None and not parity.relative <= relative:
        yield f"{where}: largest difference {parity.relative:.3g} of the scale, limit {relative:.3g}"
    if cosine is not None and not parity.cosine >= cosine:
        yield f"{where}: cosine {parity.cosine:.6f}, limit {cosine:.6f}"


def _why_nothing(reference: Any, expected: Mapping[str, Any]) -> str:
    if expected:
        return f"no element of {', '.join(expected)} is left by the mask"
    return f"there is no tensor or array in the reference, a {type(reference).__name__}"


def named_outputs(outputs: Any) -> dict[str, Any]:
    """Outputs by name, named as :func:`graphopt.trace` names them; tensors, arrays and numbers of numpy."""
    if is_dataclass(outputs) and not isinstance(outputs, (type, Mapping)):
        outputs = {each.name: getattr(outputs, each.name) for each in fields(outputs)}
    leaves = torch.utils._pytree.tree_flatten_with_path(outputs)[0]
    found = {path_name(path): np.asarray(leaf) if isinstance(leaf, np.generic) else leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in found.items() if isinstance(leaf, (torch.Tensor, np.ndarray))}


def _is_cache(name: str) -> bool:
    return name.startswith("past_key_values")


@dataclass
class ParityRecorder:
    """The ``parity`` fixture: compares, and keeps what it saw with the test's report."""

    test: pytest.Item

    def __call__(
        self,
        model: nn.Module | Callable[..., Any],
        candidate: Callable[..., Any],
        inputs: Mapping[str, torch.Tensor],
        *,
        mask: Any = None,
        **limits: float,
    ) -> dict[str, OutputParity]:
        """Run both on ``inputs`` and assert parity of all outputs of the model; of its cache only where the candidate gives it.
        ``mask`` is ``inputs["attention_mask"]`` where there is one."""
        if mask is None:
            mask = inputs.get("attention_mask")
        reference = eager(model)(**inputs) if isinstance(model, nn.Module) else model(**inputs)
        result = candidate(**inputs)
        given = named_outputs(result)
        expected = {
            name: tensor for name, tensor in named_outputs(reference).items() if name in given or not _is_cache(name)
        }
        found = assert_parity(expected, result, mask=mask, **limits)
        self.test.user_properties += [(_SEEN, f"{self.test.name}: {name}: {_told(own)}") for name, own in found.items()]
        return found


#: The property of a test's report that is a line of the summary: reports come from other processes too (pytest-xdist).
_SEEN = "graphopt parity"


def _told(found: OutputParity) -> str:
    return (
        f"max abs {found.max_abs:.3g}, relative {found.relative:.3g}, cosine {found.cosine:.7f} "
        f"({found.compared} values, {found.left_out} left out)"
    )


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> ParityRecorder:
    """Compare a model with an engine, graph or function: ``parity(model, engine, inputs, max_abs=1e-4)``."""
    return ParityRecorder(request.node)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each comparison that a ``parity`` fixture made."""
    reports = [
        report for kind in ("passed", "failed", "xfailed", "xpassed", "skipped")
        for report in terminalreporter.stats.get(kind, ()) if getattr(report, "when", "") == "call"
    ]  # fmt: skip
    lines = [line for report in reports for name, line in report.user_properties if name == _SEEN]
    if lines:
        terminalreporter.write_sep("-", "graphopt parity")
    for line in lines:
        terminalreporter.write_line(line)
