"""``python -m benchmarks [minilm] [smollm2] [decoding] [int8] [scaling]``: run the named suites, or all; print and keep what they
measured.

Each suite writes ``results/<suite>.json`` and ``.md``; ``results/core.json`` and ``.md`` hold the newest of every suite."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from benchmarks.measure import RESULTS, Results, summary_table

SUITES = ("minilm", "smollm2", "decoding", "int8", "scaling")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="graphopt's benchmarks")
    parser.add_argument("suite", nargs="*", help=f"of {', '.join(SUITES)}; all by default")
    asked = parser.parse_args(arguments).suite or list(SUITES)
    unknown = sorted(set(asked) - set(SUITES))
    if unknown:
        parser.error(f"there is no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    for name in asked:
        console.rule(name)
        run(name, console)
    write_core()
    found = [results for name in asked if (results := Results.read(name))]
    summary_table([goal for results in found for goal in results.goals]).show(console)


def run(name: str, console: Console) -> None:
    """Run one suite, print its tables, keep them."""
    results: Results = importlib.import_module(f"benchmarks.{name}").measure()
    for table in results.tables:
        table.show(console)
    results.write()


def write_core() -> None:
    """The newest results of every suite in one file, its summary first."""
    found = [results for name in SUITES if (results := Results.read(name))]
    summary = summary_table([goal for results in found for goal in results.goals])
    content = {"summary": asdict(summary), "suites": {results.name: asdict(results) for results in found}}
    (RESULTS / "core.json").write_text(json.dumps(content, indent=2) + "\n")
    parts = ["# graphopt: core benchmarks", "", summary.markdown(), *(results.markdown() for results in found)]
    (RESULTS / "core.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
