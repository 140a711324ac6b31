"""The zoo's rows as tables and goals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.measure import Goal, Table
from benchmarks.zoo.measure import LIMIT, SIZES, Outcome, Row


def tables(rows: Sequence[Row]) -> list[Table]:
    """One line for each class and attention implementation; then what was refused, and what is left unproven."""
    return [table for table in (_outcomes(rows), _refusals(rows), _unproven(rows)) if table.rows]


def _outcomes(rows: Sequence[Row]) -> Table:
    table = Table("Zoo", "class")
    for row in rows:
        table.add(
            row.name, attention=row.attention, family=row.family, fused=f"{row.fused} of {row.found}",
            masks="; ".join(row.masks) or None, rotaries=row.rotaries, norms=row.norms, graphopt=_word(row.graphopt),
            seconds=round(row.graphopt.seconds, 1), torch_onnx_export=_word(row.export) if row.export else None,
            its_seconds=round(row.export.seconds, 1) if row.export else None,
        )  # fmt: skip
    sizes = ", ".join("x".join(map(str, size)) for size in SIZES)
    table.notes.append(
        f"Largest difference from eager PyTorch relative to the output's scale, over the sizes {sizes} (batch, sequence,"
        f" decoder sequence; none was traced), padding positions left out; above {LIMIT:g} it is wrong."
    )
    table.notes.append(
        "fused: attentions that are one op, of those in the trace. seconds: trace, passes with proofs, engine."
    )
    return table


def _word(outcome: Outcome) -> str:
    if outcome.worst is None:
        return "refused"
    return f"{outcome.worst:.0e}" if outcome.right else f"WRONG {outcome.worst:.0e}"


def _refusals(rows: Sequence[Row]) -> Table:
    table = Table("Refused", "class")
    for row in rows:
        if row.graphopt.refused:
            table.add(row.name, attention=row.attention, reason=" ".join(row.graphopt.refused.split()))
        for reason in row.refusals:
            table.add(row.name, attention=row.attention, reason=f"attention not fused: {reason}")
    return table


def _unproven(rows: Sequence[Row]) -> Table:
    table = Table("Masks that keep a bias", "class")
    for row in rows:
        for reason in dict.fromkeys(reason.partition(" [")[0] for reason in row.unproven):
            table.add(row.name, attention=row.attention, reason=reason)
    return table


def goals(rows: Sequence[Row]) -> list[Goal]:
    classes = list(dict.fromkeys(row.name for row in rows))

    def whole(name: str, holds: Callable[[Row], bool]) -> bool:
        return all(holds(row) for row in rows if row.name == name)

    right = [name for name in classes if whole(name, lambda row: row.graphopt.right)]
    found = [
        Goal.at_least(
            f"classes right at untraced sizes, of {len(classes)}", 95.0, 100 * len(right) / len(classes), " %"
        ),
        Goal.at_most("classes compiled and wrong", 0, len({row.name for row in rows if _wrong(row.graphopt)})),
    ]
    for attention in ("eager", "sdpa"):
        own = [row for row in rows if row.attention == attention and row.found]
        total = sum(row.found for row in own)
        if total:
            share = 100 * sum(row.fused for row in own) / total
            found.append(Goal.at_least(f"attentions fused, {attention}, of {total}", 98.0, share, " %"))
    beside = [row for row in rows if row.export is not None]
    if beside:
        lost = {row.name for row in beside if row.export and row.export.right and row.name not in right}
        won = {row.name for row in beside if row.export and not row.export.right and row.name in right}
        found.append(Goal.at_most("classes where torch.onnx.export is right and graphopt is not", 0, len(lost)))
        found.append(Goal.at_least("classes where graphopt is right and torch.onnx.export is not", 1, len(won)))
    return found


def _wrong(outcome: Outcome) -> bool:
    return outcome.worst is not None and not outcome.right
