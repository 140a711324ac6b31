"""Rows of a zoo, each measured alone in a process; the command around them."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console

from benchmarks.measure import Goal, Results, Table, quiet, summary_table
from benchmarks.zoo.catalog import ANIMALS, Animal


class Refusable(Protocol):
    """A row that may say why there is nothing in it."""

    name: str
    refused: str


R = TypeVar("R", bound=Refusable)
W = TypeVar("W")


def guarded(measure: Callable[[], R], otherwise: R) -> R:
    """A measured row, on one thread; a crash is a row as well."""
    torch.set_num_threads(1)
    with quiet():
        try:
            return measure()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            otherwise.refused = f"crash: {type(error).__name__}: {error} at {where.filename}:{where.lineno}"
            return otherwise


def main(
    name: str,
    description: str,
    arguments: Sequence[str] | None,
    work_of: Callable[[list[Animal]], list[W]],
    attempt: Callable[[W], R],
    state: Callable[[R], str],
    tables: Callable[[list[R]], list[Table]],
    goals: Callable[[list[R]], list[Goal]],
) -> int:
    """Measure what NAMEs ask for, a line for each as it is done; of the whole zoo the results are written. 1 where a target is
    missed."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.zoo.{name}", description=description)
    parser.add_argument("name", nargs="*", help="parts of class names; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; by default one for each core")
    asked = parser.parse_args(arguments)
    with quiet():
        work = work_of([a for a in ANIMALS if not asked.name or any(part in a.name for part in asked.name)])
    if not work:
        parser.error(f"no class is named like {', '.join(asked.name)}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows: list[R] = []
    with ProcessPoolExecutor(asked.jobs) as pool:
        for index, row in enumerate(pool.map(attempt, work)):
            console.print(f"{index + 1}/{len(work)} {row.name} {state(row)}", style="dim", highlight=False)
            rows.append(row)
    results = Results(f"zoo_{name}", tables(rows), goals(rows))
    for table in results.tables:
        table.show(console)
    summary_table(results.goals).show(console)
    if not asked.name:
        results.write()
    return int(any(goal.reached is False for goal in results.goals))


def reason_of(refused: str) -> dict[str, Any]:
    """A refusal in one line, for a table."""
    return {"reason": " ".join(refused.split())}
