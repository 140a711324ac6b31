"""The ``graphopt`` command."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from graphopt import show
from graphopt.errors import GraphoptError, InputError
from graphopt.schemas.report import DecodeParity

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
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the engine; by default one for each core.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(version("graphopt"), highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=1) + "\n")


@app.command()
def compile(
    pipeline: Annotated[Path, typer.Argument(help="A pipeline file (YAML): model, dims, passes, target, parity.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The engine directory to write.")],
    force: Annotated[bool, typer.Option(help="Write down broken contracts instead of stopping; exit code 0.")] = False,
    as_json: Json = False,
) -> None:
    """Compile what a pipeline file declares into an engine directory."""
    from graphopt.compiler import compile_file

    with show.progress(err, quiet=as_json) as progress:
        compiled = compile_file(pipeline, output, force=force, progress=progress)
    if as_json:
        print_json(compiled.manifest.model_dump(mode="json"))
        return
    for part in show.build_parts(compiled.report):
        out.print(part)
    out.print(show.written_line(compiled.report, output, compiled.engine))


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
            out.print(show.diff(difference), soft_wrap=True)
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
    decode: Annotated[
        int, typer.Option(help="Generate so many tokens greedily instead, and compare each with eager's.")
    ] = 0,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt for --decode; may be repeated. Without, random tokens.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare an engine with a model again, on fresh probes. Exit code 1 if the contract is broken."""
    from graphopt.compiler import verify as check
    from graphopt.decode_parity import verify_decoding

    if prompt and not decode:
        raise InputError("--prompt is for --decode", hint="add --decode 128")
    with show.progress(err, quiet=as_json) as progress:
        progress("compare", 0.0)
        parity = verify_decoding(engine, model, prompt or (), decode) if decode else check(engine, model)
    if as_json:
        print_json(parity.model_dump(mode="json"))
    else:
        out.print(show.decoding_table(parity) if isinstance(parity, DecodeParity) else show.probes_table(parity))
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
def generate(
    engine: EngineDir,
    prompts: Annotated[list[str], typer.Argument(help="The prompt, or several; - reads one from standard input.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Tokens at most for each prompt.")
    ] = 128,
    stop: Annotated[list[str] | None, typer.Option(help="End where this string would come; may be repeated.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message in the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most likely tokens; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens that hold this much probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens at least so likely, relative to the first.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divide the logits of tokens that were there.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Draw the same again.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Generate text with an engine that has a cache; one prompt streams to the terminal."""
    from graphopt.runtime.generation import Generator, chat_prompt

    with show.progress(err, quiet=as_json) as progress:
        progress("load", 0.0)
        generator = Generator.load(engine, threads=threads)
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    given = [chat_prompt(generator.tokenizer, text) if chat else text for text in texts]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "stop": stop or [], "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    if as_json:
        made = generator.generate(given, **options)
        print_json({"generations": [asdict(each) for each in made], "timing": asdict(generator.timing)})
        return
    if len(given) == 1:
        for piece in generator.stream(given, **options):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        finish = piece.finish
    else:
        made = generator.generate(given, **options)
        for text, each in zip(texts, made, strict=True):
            out.print(f"[bold]{show.escape(text)}[/]", highlight=False)
            out.print(show.escape(each.text), highlight=False)
        finish = made[0].finish if len({each.finish for each in made}) == 1 else None
    err.print(show.timing_line(generator.timing, finish), highlight=False, soft_wrap=True)


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
    """The entry point: errors of graphopt as text with exit code 2, as those of anything else after their traceback; Ctrl-C with
    130, and SIGTERM, on which builds clean up as well, with 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
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
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # typer's own of Ctrl-C
            raise
        err.print("[bold]stopped[/]; nothing was left behind")
        raise SystemExit(130) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(2) from None
