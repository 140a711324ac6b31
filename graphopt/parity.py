"""How far a candidate is from a reference, whether that keeps a contract, and where two graphs first differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import ParityError
from graphopt.execution import run
from graphopt.ir import Graph, Value
from graphopt.runtime.engine import to_torch
from graphopt.schemas.pipeline import HIGHER_IS_BETTER, Budget, Exact
from graphopt.schemas.report import OutputParity, ProbeParity, StageParity

Contract = Exact | Budget
#: At most so many times epsilon in half precision.
_ROUNDINGS = {torch.float16: 16.0, torch.bfloat16: 8.0}
Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """Inputs to compare on. ``mask`` ``[batch, sequence]``, if any, says which positions mean something; outputs that
    begin with those two axes are compared there only."""

    sizes: dict[str, int]
    inputs: dict[str, Tensor]
    mask: Tensor | None = None


def compare(reference: Mapping[str, Any], candidate: Mapping[str, Any], mask: Any = None) -> dict[str, OutputParity]:
    """Every output of ``candidate`` against ``reference``, torch or numpy alike.

    ParityError for a missing output, another shape or another dtype."""
    kept = None if mask is None else _tensor(mask).bool()
    found = {}
    for name, expected in reference.items():
        if name not in candidate:
            raise ParityError(f"output {name!r} is missing", hint=f"there are {', '.join(candidate) or 'none'}")
        found[name] = _compare_one(name, _tensor(expected), _tensor(candidate[name]), kept)
    return found


def _tensor(array: Any) -> Tensor:
    tensor: Tensor = to_torch(array) if isinstance(array, np.ndarray) else array
    return tensor.detach().cpu()


def _compare_one(name: str, expected: Tensor, got: Tensor, mask: Tensor | None) -> OutputParity:
    if expected.shape != got.shape:
        raise ParityError(f"output {name!r} has shape {list(got.shape)}, the reference {list(expected.shape)}")
    if expected.dtype != got.dtype:
        raise ParityError(f"output {name!r} is {got.dtype}, the reference {expected.dtype}")
    total = expected.numel()
    expected, got = select(expected, mask), select(got, mask)
    if not expected.numel():
        return OutputParity(max_abs=0, relative=0, cosine=1, snr=math.inf, compared=0, left_out=total)
    a, b = (_as_numbers(tensor) for tensor in (expected, got))
    if expected.is_floating_point() or expected.is_complex():
        difference = (a - b).abs()
    else:  # doubles do not hold every int64
        difference = (expected.long() - got.long()).flatten().double().abs()
    max_abs = float(difference.max())
    if not math.isfinite(max_abs):  # NaN or infinity somewhere: equal ones are no difference
        same = (a == b) | (a.isnan() & b.isnan())
        difference = difference.masked_fill(same, 0.0).nan_to_num(math.inf, math.inf)
        a, b = a.nan_to_num(0.0, 0.0, 0.0), b.nan_to_num(0.0, 0.0, 0.0)
        max_abs = float(difference.max())
    scale = float(a.abs().max())
    noise, signal, other = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (difference, a, b))
    # a.b = (|a|^2 + |b|^2 - |a - b|^2) / 2, from norms that are summed in double precision
    cosine = (signal**2 + other**2 - noise**2) / (2 * signal * other) if signal and other else float(noise == 0)
    return OutputParity(
        max_abs=max_abs,
        relative=max_abs / scale if scale else max_abs,
        cosine=max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else -1.0,
        snr=_decibels(signal, noise),
        compared=expected.numel(),
        left_out=total - expected.numel(),
    )


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 20 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def _as_numbers(tensor: Tensor) -> Tensor:
    """Floats as they are (16-bit ones widened), complex numbers as pairs of them, everything else in double precision."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    wide = tensor.dtype in (torch.float32, torch.float64)
    return (
        tensor.flatten()
        if wide
        else tensor.flatten().to(torch.float32 if tensor.is_floating_point() else torch.float64)
    )


def select(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The elements of an output at positions the mask keeps; all of them if it does not begin with the mask's axes."""
    if mask is None or tensor.ndim < 2 or tensor.shape[:2] != mask.shape:
        return tensor
    return tensor[mask]


def _logits_metric(metric: str, reference: Outputs, candidate: Outputs, mask: Tensor | None) -> float:
    """KL (mean, nats) or top-1 agreement (share) over all floating outputs."""
    kept = None if mask is None else mask.bool().cpu()
    values = []
    for name, tensor in reference.items():
        if not tensor.is_floating_point() or tensor.ndim < 1:
            continue
        expected, got = select(tensor.cpu(), kept).double(), select(_tensor(candidate[name]), kept).double()
        values.append(_agreement(expected, got) if metric == "top1" else _divergence(expected, got))
    if not values:
        raise ParityError(f"the metric {metric} needs a floating output")
    return min(values) if metric == "top1" else max(values)


def judge(
    contract: Contract, probes: Sequence[Probe], references: Sequence[Outputs], candidates: Sequence[Outputs]
) -> StageParity:
    """One stage on all probes, and whether it keeps ``contract``."""
    parts = [
        ProbeParity(sizes=probe.sizes, outputs=compare(reference, candidate, probe.mask))
        for probe, reference, candidate in zip(probes, references, candidates, strict=True)
    ]
    _refuse_nothing(parts)
    if isinstance(contract, Exact):
        return _judge_exact(contract, references, parts)
    metric, limit = contract.metric, contract.limit
    outputs = [output for part in parts for output in part.outputs.values()]
    higher = metric in HIGHER_IS_BETTER
    if metric in ("kl", "top1"):
        values = [
            _logits_metric(metric, reference, candidate, probe.mask)
            for probe, reference, candidate in zip(probes, references, candidates, strict=True)
        ]
    else:
        values = [getattr(output, metric) for output in outputs]
    worst = (min if higher else max)(values)
    return StageParity(
        contract=describe(contract), metric=metric, worst=worst, limit=limit, probes=parts,
        holds=worst >= limit if higher else worst <= limit,
    )  # fmt: skip


def _refuse_nothing(parts: list[ProbeParity]) -> None:
    """ParityError where an output is compared nowhere."""
    for name in dict.fromkeys(name for part in parts for name in part.outputs):
        own = [part.outputs[name] for part in parts if name in part.outputs]
        if sum(output.left_out for output in own) and not any(output.compared for output in own):
            raise ParityError(
                f"the mask leaves out all of output {name!r}", hint="is it 1 where there is padding? mask: 1 for tokens"
            )


def _judge_exact(contract: Exact, references: Sequence[Outputs], parts: list[ProbeParity]) -> StageParity:
    """Each output by the limit of its own dtype; told of is the one that comes nearest to its limit, or passes it most."""
    coarsest = max((limit_of(contract, dtype) for dtype in _floating(references)), default=0.0)
    found = []
    for reference, part in zip(references, parts, strict=True):
        for name, output in part.outputs.items():
            dtype = reference[name].dtype
            floating = dtype.is_floating_point or dtype.is_complex
            found.append((output.relative, limit_of(contract, dtype) if floating else coarsest))
    worst, limit = max(found, key=lambda each: each[0] / each[1] if each[1] else math.inf if each[0] else 0.0)
    return StageParity(
        contract=describe(contract), metric="relative", worst=worst, limit=limit, probes=parts, holds=worst <= limit
    )


def limit_of(contract: Exact, dtype: torch.dtype) -> float:
    """What counts as rounding, of the largest magnitude: in half precision few roundings are seen, not a thousand."""
    return min(contract.rounding, _ROUNDINGS.get(dtype, math.inf)) * torch.finfo(dtype).eps


def describe(contract: Contract) -> str:
    return "exact" if isinstance(contract, Exact) else f"{contract.metric} {contract.limit:g}"


def _floating(references: Sequence[Outputs]) -> set[torch.dtype]:
    return {tensor.dtype for outputs in references for tensor in outputs.values() if tensor.is_floating_point()}


def _agreement(expected: Tensor, got: Tensor) -> float:
    """Share of rows with the same largest element; a row with NaN agrees with none."""
    same = (expected.argmax(-1) == got.argmax(-1)) & ~got.isnan().any(-1)
    return float(same.double().mean())


def _divergence(expected: Tensor, got: Tensor) -> float:
    """Mean KL divergence of the softmax over the last axis, in nats; infinite where there is NaN."""
    p, q = expected.log_softmax(-1), got.log_softmax(-1)
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    mean = float(terms.sum(-1).mean())
    return math.inf if math.isnan(mean) else mean


@dataclass(frozen=True)
class Difference:
    """The first value, in the candidate's order, that is not the reference's."""

    name: str
    origin: tuple[str, ...]
    parity: OutputParity

    def __str__(self) -> str:
        origin = f", from {' | '.join(self.origin)}" if self.origin else ""
        return f"%{self.name} differs by {self.parity.max_abs:.3g} ({self.parity.relative:.3g} of its scale){origin}"


def bisect(
    reference: Graph,
    candidate: Graph | Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    probe: Probe,
    tolerance: float = 1e-4,
) -> Difference | None:
    """The first value that both have by one name and shape and that differs by more than ``tolerance`` of its scale.

    ``candidate``: a graph, or a function from inputs to values by name (an engine that shows its inner values)."""
    expected: dict[str, Tensor] = {}
    run(reference, probe.inputs, tap=lambda value, tensor: expected.__setitem__(value.name, tensor))
    for name in _packed(candidate) if isinstance(candidate, Graph) else ():
        expected.pop(name, None)
    for name, got in _values_of(candidate, probe):
        known = expected.get(name)
        if known is None or known.shape != got.shape or known.dtype != got.dtype:
            continue
        mask = None if probe.mask is None else probe.mask.bool()
        parity = _compare_one(name, _positions_first(known, mask), _positions_first(got.cpu(), mask), mask)
        if parity.relative > tolerance:
            origin = _origin(candidate if isinstance(candidate, Graph) else reference, name)
            return Difference(name, origin, parity)
    return None


def _packed(graph: Graph) -> Iterator[str]:
    """The values that are packed tokens, in another order than what was before by the same names."""
    found: set[Value] = set()
    for node in graph.nodes:
        is_first, is_last = (node.op == f"graphopt.{op}_tokens.default" for op in ("pack", "unpack"))
        if is_first or (not is_last and any(operand in found for operand in node.operands)):
            found.update(node.outputs)
            yield from (value.name for value in node.outputs)


def _positions_first(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """``[batch, heads, sequence, ...]`` as ``[batch, sequence, heads, ...]``, so that the mask can leave positions out."""
    if mask is None or tensor.ndim < 3 or tensor.shape[:2] == mask.shape or tensor[:, 0].shape[:2] != mask.shape:
        return tensor
    return tensor.transpose(1, 2)


def _values_of(candidate: Any, probe: Probe) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(candidate, Graph):
        yield from candidate(probe.inputs).items()
        return
    seen: list[tuple[str, Tensor]] = []

    def tap(value: Value, tensor: Tensor) -> None:
        seen.append((value.name, tensor))

    run(candidate, probe.inputs, tap=tap)
    yield from seen


def _origin(graph: Graph, name: str) -> tuple[str, ...]:
    value = graph.values.get(name)
    return value.producer.origin if value is not None and value.producer is not None else ()
