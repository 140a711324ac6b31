"""What every benchmark shares: fair timing, a description of the machine, tables that are printed and kept."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.table import Table as RichTable

from graphopt.backends.onnxruntime.tactics import cpu_features

THREADS = 2
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "graphopt",
    "torch",
    "transformers",
    "onnxruntime",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime-genai",
    "openvino",
    "numpy",
)

PAUSE = 0.05  # seconds; onnxruntime's threads were seen to spin for some 15 ms after a run

Cell: TypeAlias = str | float | int | bool | None


# Timing


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, the 20th percentile and the least of the timed runs."""

    median: float
    p20: float
    least: float


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 12, runs: int = 3, warmup: int = 2
) -> dict[str, Timing]:
    """Time the candidates in turns, so that a slow moment of the machine hits all alike.

    In each round every candidate has one turn, in an order shuffled anew: a pause that outlasts the spinning threads of the
    one before (they double the time of a call of 8 ms), one run that is not timed, which brings its weights back into the
    caches, then ``runs`` timed ones."""
    for call in candidates.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffler = list(candidates), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            time.sleep(PAUSE)
            candidates[name]()
            times[name] += [milliseconds(candidates[name]) for _ in range(runs)]
    return {name: summary(own) for name, own in times.items()}


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def summary(times: Sequence[float]) -> Timing:
    ordered = sorted(times)
    return Timing(statistics.median(ordered), ordered[len(ordered) // 5], ordered[0])


def in_fresh_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m module arguments`` and read the JSON of its last line of output."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[3:])} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' progress bars, warnings and prints."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            Path(os.devnull).open("w") as sink,
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# The machine


def environment() -> dict[str, Cell]:
    """Date, CPU, threads and versions: what a number means nothing without."""
    cores = os.cpu_count() or 1
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "CPU": cpu_name(),
        "CPU features": cpu_features(),
        "cores": cores,
        "threads": THREADS,
        "load before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# Results


@dataclass
class Row:
    """One line of a table: its name, and a value for each column it has one for."""

    name: str
    values: dict[str, Cell] = field(default_factory=dict)


@dataclass
class Table:
    """A titled table; ``head`` is what its rows' names are, ``notes`` say how it was measured."""

    title: str
    head: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, **values: Cell) -> None:
        """A row; underscores in the columns' names stand for spaces."""
        self.rows.append(Row(name, {column.replace("_", " "): value for column, value in values.items()}))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for row in self.rows for column in row.values))

    def lines(self) -> list[list[str]]:
        return [[row.name, *(text_of(row.values.get(column)) for column in self.columns)] for row in self.rows]

    def show(self, console: Console) -> None:
        table = RichTable(self.head, title=self.title, title_justify="left")
        for column in self.columns:
            table.add_column(column, justify="right")
        for line in self.lines():
            table.add_row(*line)
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", style="dim", highlight=False)

    def markdown(self) -> str:
        head = [self.head, *self.columns]
        marks = ["---", *("---:" for _ in self.columns)]
        lines = ["| " + " | ".join(cells).replace("\n", " ") + " |" for cells in (head, marks, *self.lines())]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"## {self.title}", "", *lines, "", *notes, ""])


@dataclass
class Goal:
    """A row of the summary: what was wanted, what was measured. ``reached`` None: it could not be measured."""

    row: str
    target: str
    measured: str
    reached: bool | None

    @classmethod
    def at_most(cls, row: str, limit: float, value: float, unit: str = "") -> Goal:
        return cls(row, f"<= {text_of(limit)}{unit}", f"{text_of(value)}{unit}", value <= limit)

    @classmethod
    def at_least(cls, row: str, limit: float, value: float, unit: str = "") -> Goal:
        return cls(row, f">= {text_of(limit)}{unit}", f"{text_of(value)}{unit}", value >= limit)


@dataclass
class Results:
    """All that one suite measured, where and when."""

    name: str
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    environment: dict[str, Cell] = field(default_factory=environment)

    def write(self) -> None:
        """``results/<name>.json`` and ``results/<name>.md``."""
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        (RESULTS / f"{self.name}.md").write_text(self.markdown())

    @classmethod
    def read(cls, name: str) -> Results | None:
        """What an earlier run wrote; None if there is nothing."""
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            return None
        kept = json.loads(file.read_text())
        tables = [Table(**{**table, "rows": [Row(**row) for row in table["rows"]]}) for table in kept["tables"]]
        return cls(kept["name"], tables, [Goal(**goal) for goal in kept["goals"]], kept["environment"])

    def markdown(self) -> str:
        where = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        return "\n".join([f"# {self.name}", "", where, "", *(table.markdown() for table in self.tables)])


def summary_table(goals: Sequence[Goal], title: str = "Summary") -> Table:
    """row | target | measured | reached"""
    words = {True: "yes", False: "NO", None: "not measured"}
    table = Table(title, "row")
    for goal in goals:
        table.add(goal.row, target=goal.target, measured=goal.measured, reached=words[goal.reached])
    return table


def text_of(value: Cell) -> str:
    """Four digits of a number, a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def use_threads() -> None:
    """As many torch threads as every candidate has."""
    torch.set_num_threads(THREADS)
