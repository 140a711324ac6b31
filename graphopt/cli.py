"""The ``graphopt`` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from graphopt import show
from graphopt.errors import GraphoptError

app = typer.Typer(
    help="A declared list of passes takes a PyTorch transformer to a deployable engine, every step proven against eager.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
EngineDir = Annotated[Path, typer.Argument(help="An engine directory.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine; by default one for each core.")]


def print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=1) + "\n")


@app.command()
def compile(
    pipeline: Annotated[Path, typer.Argument(help="A pipeline file (YAML): model, dims, passes, target, parity.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The engine directory to write.")],
    force: Annotated[bool, typer.Option(help="Write down broken parity contracts instead of stopping.")] = False,
    as_json: Json = False,
) -> None:
    """Compile what a pipeline file declares into an engine directory."""
    from graphopt.compiler import compile_file

    with show.progress(err, quiet=as_json) as progress:
        compiled = compile_file(pipeline, output, force=force, progress=progress)
    if as_json:
        print_json(compiled.manifest.model_dump(mode="json"))
        return
    out.print(show.parity_table(compiled.report))
    out.print(show.tactics_table(compiled.report))
    out.print(show.refusals_table(compiled.report))
    out.print(f"[bold green]written[/] {show.escape(str(output))}", show.escape(repr(compiled.engine)), highlight=False)


@app.command()
def inspect(
    what: Annotated[str, typer.Argument(help="An engine directory, a .gir file, or a model.")],
    other: Annotated[str | None, typer.Argument(help="A second one: show how the graphs differ.")] = None,
    text: Annotated[bool, typer.Option("--text", help="The graph in its text form.")] = False,
    origins: Annotated[bool, typer.Option(help="With --text: where each node came from.")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Every weight with its type and bytes.")] = False,
    attention: Annotated[
        bool, typer.Option("--attention", help="Every attention: heads, sizes, mask as proven, or why it is not fused.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a graph: inputs, outputs, dims, op counts; its text, weights, attentions, or its difference from another."""
    from graphopt.pipeline import diff_text

    if attention:
        rows = show.read_attentions(what)
        if as_json:
            print_json([row.model_dump(mode="json") for row in rows])
        else:
            out.print(show.attention_table(rows))
        return
    graph = show.read_graph(what)
    if other is not None:
        difference = diff_text(graph.text(), show.read_graph(other).text())
        if as_json:
            print_json({"diff": difference.splitlines()})
        else:
            out.print(show.diff(difference))
        return
    if as_json:
        print_json(show.graph_facts(graph, with_text=text, with_weights=weights, origins=origins))
    elif text:
        out.print(graph.text(origins=origins), markup=False, highlight=False, soft_wrap=True, end="")
    else:
        out.print(show.graph_tables(graph, with_weights=weights))


@app.command()
def verify(
    engine: EngineDir,
    model: Annotated[
        str, typer.Argument(help="The model to compare with: directory, GGUF, hub id, package.module:factory.")
    ],
    as_json: Json = False,
) -> None:
    """Compare an engine with a model again, on fresh probes. Exit code 1 if the contract is broken."""
    from graphopt.compiler import verify as check

    with show.progress(err, quiet=as_json) as progress:
        progress("compare", 0.0)
        parity = check(engine, model)
    if as_json:
        print_json(parity.model_dump(mode="json"))
    else:
        out.print(show.probes_table(parity))
    if not parity.holds:
        raise typer.Exit(1)


@app.command()
def bench(
    engine: EngineDir,
    sizes: Annotated[
        list[str] | None, typer.Option("--size", help="Sizes to time at, as batch=8,sequence=128; may be repeated.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time spent at each size.")] = 3.0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time an engine at some sizes: median, fastest, 90th percentile."""
    from graphopt.bench import bench_engine, parse_sizes

    with show.progress(err, quiet=as_json) as progress:
        timed = bench_engine(engine, [parse_sizes(text) for text in sizes or []], seconds, threads, progress)
    if as_json:
        print_json(timed)
    else:
        out.print(show.bench_table(timed))


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="One pass, with its before and after.")] = None,
    as_json: Json = False,
) -> None:
    """Every pass with its options."""
    from graphopt.errors import PipelineError, nearest
    from graphopt.pipeline import known_passes

    known = known_passes()
    if name is not None and name not in known:
        raise PipelineError(f"there is no pass {name!r}", hint=nearest(name, known))
    if as_json:
        print_json({kind: step.model_json_schema() for kind, step in known.items() if name in (None, kind)})
    elif name is not None:
        out.print(show.pass_page(name, known[name]))
    else:
        out.print(show.passes_table(known))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, backends with their providers and devices, and the known faults in force."""
    facts = show.doctor_facts()
    if as_json:
        print_json(facts)
    else:
        out.print(show.doctor_table(facts))


def main() -> None:
    """The entry point: errors of graphopt as text with exit code 2, Ctrl-C with 130."""
    show.quiet_libraries()
    _guarded(app)


def _guarded(run: Callable[[], Any]) -> None:
    try:
        run()
    except GraphoptError as error:
        err.print(f"[bold red]error:[/] {show.escape(error.what)}", highlight=False, soft_wrap=True)
        if error.where:
            err.print(f"  [dim]where:[/] {show.escape(error.where)}", highlight=False, soft_wrap=True)
        if error.hint:
            err.print(f"  [dim]to do:[/] {show.escape(error.hint)}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        err.print("[bold]stopped[/]; nothing was left behind")
        raise SystemExit(130) from None
