"""``python -m benchmarks.zoo [NAME ...]``: compile the zoo, or the classes whose names hold one of NAMEs.

Prints a table, and for the whole zoo writes ``results/zoo.json`` and ``results/zoo.md``. Exits with 1 where a target is
missed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console

from benchmarks.measure import RESULTS, Results, quiet, summary_table
from benchmarks.zoo.catalog import ANIMALS, Animal
from benchmarks.zoo.measure import Row, as_json, attempt
from benchmarks.zoo.small import implementations
from benchmarks.zoo.summary import goals, tables


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description="graphopt's zoo of architectures")
    parser.add_argument("name", nargs="*", help="parts of class names; the whole zoo by default")
    parser.add_argument("--alone", action="store_true", help="without torch.onnx.export beside")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; by default one for each core")
    parser.add_argument("--list", action="store_true", help="only list the classes")
    asked = parser.parse_args(arguments)
    animals = [animal for animal in ANIMALS if not asked.name or any(part in animal.name for part in asked.name)]
    if not animals:
        parser.error(f"no class of the zoo is named like {', '.join(asked.name)}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    if asked.list:
        for animal in animals:
            console.print(f"{animal.name} ({animal.family})", highlight=False)
        return 0
    rows = list(run(animals, beside=not asked.alone, jobs=asked.jobs, console=console))
    results = Results("zoo", tables(rows), goals(rows))
    for table in results.tables:
        table.show(console)
    summary_table(results.goals).show(console)
    if not asked.name and not asked.alone:
        results.write()
        (RESULTS / "zoo_rows.json").write_text(json.dumps([as_json(row) for row in rows], indent=1) + "\n")
    return int(any(goal.reached is False for goal in results.goals))


def run(animals: Sequence[Animal], *, beside: bool, jobs: int, console: Console) -> Iterator[Row]:
    """Measure each animal with each of its attention implementations, a line for each as it is done.

    ``torch.onnx.export`` stands beside the last of them: the class's default."""
    with quiet():
        work = [
            (animal, attention, beside and attention == known[-1])
            for animal, known in [(animal, implementations(animal)) for animal in animals]
            for attention in known
        ]
    with ProcessPoolExecutor(jobs) as pool:
        for index, row in enumerate(pool.map(attempt, work)):
            worst = row.graphopt.worst
            state = "refused" if worst is None else f"{worst:.1e}" if row.graphopt.right else f"WRONG {worst:.1e}"
            console.print(f"{index + 1}/{len(work)} {row.name} {row.attention}: {state}", style="dim", highlight=False)
            yield row


if __name__ == "__main__":
    sys.exit(main())
