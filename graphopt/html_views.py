"""What the template of ``report.html`` sees: plain text in dataclasses, and how numbers become text."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from graphopt.schemas.report import Sensitivity

#: The bar of a stage begins this many powers of ten below its limit, and ends one above.
BAR_DECADES = 6

Item = TypeVar("Item")
MINUS, TIMES, NO_BREAK = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Verdict:
    """The first thing to read: a sign and a sentence, so that colour is never needed."""

    state: Literal["good", "bad", "open"]
    text: str

    @property
    def sign(self) -> str:
        return {"good": "✓", "bad": "✗", "open": "?"}[self.state]


@dataclass(frozen=True)
class Figure:
    """One number of the headline."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Port:
    """An input, output or dim."""

    role: str
    name: str
    type: str
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """Part of a line that is filled, and where the limit is marked on it; both in percent."""

    fill: float
    tick: float | None = None


@dataclass(frozen=True)
class ProbeRow:
    """One output on one probe."""

    sizes: str
    output: str
    max_abs: str
    relative: str
    cosine: str
    snr: str
    compared: str
    left_out: str


@dataclass(frozen=True)
class Parity:
    """A stage against eager."""

    contract: str
    metric: str
    sign: str
    worst: str
    limit: str
    share: str
    bar: Bar
    max_abs: str
    holds: bool
    axes: str
    probes: list[ProbeRow]


@dataclass(frozen=True)
class Place:
    """Where a node is and where it came from. ``values``: the names that stand for the ``%…`` of its group's reason."""

    node: str
    op: str = ""
    module: str = ""
    source: str = ""
    made_by: str = ""
    values: str = ""


@dataclass(frozen=True)
class Places:
    """Places as a table, without the columns that would say the same in every row: those are told once."""

    shared: list[tuple[str, str]]
    columns: list[str]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Refusals:
    """Equal refusals of one rule."""

    rule: str
    reason: str
    count: str
    few: bool
    places: Places


@dataclass(frozen=True)
class Change:
    """A number before and after; ``before_bar`` and ``after_bar`` where a table draws them."""

    name: str
    before: str
    after: str
    difference: str
    before_bar: Bar | None = None
    after_bar: Bar | None = None


@dataclass(frozen=True)
class Run:
    """Lines of a diff that follow each other and have the same sign."""

    sign: Literal["+", "-", ""]
    text: str


@dataclass(frozen=True)
class Diff:
    """``left_out`` counts the lines that are not on the page."""

    added: str
    removed: str
    size: str
    runs: list[Run]
    left_out: str = ""


@dataclass(frozen=True)
class Work:
    """What a pass did to the graph."""

    options: list[tuple[str, str]]
    matches: list[tuple[str, str]]
    refusals: list[Refusals]
    changed: str
    refused: str
    notes: list[str]
    layers: list[tuple[str, str, list[str]]]  # precision, reason, modules
    sensitivities: list[Sensitivity]
    changes: list[Change]
    diff: Diff | None


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages, and the part of the page it leads to. ``same_as``: the stage whose comparison this
    one repeats, because nothing changed in between."""

    anchor: str
    number: str
    name: str
    changes: str = ""
    nodes: str = ""
    seconds: str = ""
    parity: Parity | None = None
    work: Work | None = None
    same_as: tuple[str, str] | None = None


@dataclass(frozen=True)
class AttentionRow:
    """Equal attentions."""

    label: str
    count: str
    heads: str
    size: str
    reach: str
    mask: str
    extras: str
    source: str
    fused: bool
    reasons: list[tuple[str, str]]
    places: Places


@dataclass(frozen=True)
class Candidate:
    """A form that was timed, or why it was not."""

    form: str
    chosen: bool
    milliseconds: str
    bar: Bar | None
    note: str


@dataclass(frozen=True)
class Tactic:
    """The candidates for one op, fastest first."""

    op: str
    arguments: str
    uses: str
    how: str
    candidates: list[Candidate]


@dataclass(frozen=True)
class Part:
    """A part of the build's time."""

    name: str
    seconds: str
    share: str
    bar: Bar


@dataclass(frozen=True)
class Page:
    """Everything on the page, in its order."""

    model: str
    graphopt: str
    backend: str
    weights_digest: str
    verdict: Verdict
    figures: list[Figure]
    versions: list[tuple[str, str]]
    ports: list[Port]
    stages: list[Stage]
    attentions: list[AttentionRow]
    ops: list[Change]
    ops_total: Change
    weights: list[Change]
    engine_ops: list[tuple[str, str]]
    engine_total: str
    kernels: list[tuple[str, str]]
    tactics: list[Tactic]
    warnings: list[str]
    parts: list[Part]
    total_seconds: str
    files: list[tuple[str, str]]
    pipeline: str
    bar_decades: int = field(default=BAR_DECADES)


# Numbers as text


def count_text(number: int) -> str:
    return f"{number:,}"


def some_text(number: int, what: str, ending: str = "s") -> str:
    return f"{count_text(number)} {what}{ending if number != 1 else ''}"


def signed_text(number: int, show: Callable[[int], str] = count_text) -> str:
    return "0" if not number else ("+" if number > 0 else MINUS) + show(abs(number))


def bytes_text(size: int) -> str:
    """Bytes in the unit that keeps one to three digits before the point."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f}"


def change_of(name: str, before: int, after: int, show: Callable[[int], str] = count_text) -> Change:
    return Change(name, show(before), show(after), signed_text(after - before, show))


def grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items with the same key together, groups in the order in which they begin."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def sizes_text(sizes: Mapping[str, int]) -> str:
    return f"{NO_BREAK}{TIMES}{NO_BREAK}".join(str(size) for size in sizes.values())
