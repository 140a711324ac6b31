"""What the command line prints: tables of graphs, reports and facts."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from graphopt import artifact, attentions
from graphopt.backend import Progress as Report
from graphopt.backend import known_backends
from graphopt.errors import GraphError, MissingBackendError
from graphopt.ir import Graph
from graphopt.measures import number_text, worst_and_limit
from graphopt.pipeline import Pass, load_passes, run_passes
from graphopt.runtime.engine import Engine
from graphopt.runtime.generation import Timing
from graphopt.schemas.pipeline import HIGHER_IS_BETTER
from graphopt.schemas.report import AttentionReport, BuildReport, DecodeParity, StageParity
from graphopt.text import parse

__all__ = ["escape"]
NOTHING = Text("")


def quiet_libraries() -> None:
    """transformers' own progress bars would stand between ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def progress(console: Console, quiet: bool) -> Iterator[Report]:
    """A progress bar for long steps; on a terminal only."""
    if quiet or not console.is_terminal:
        yield lambda what, share: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("start", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def _table(title: str, *columns: str, numbers: int = 0) -> Table:
    """A table whose last ``numbers`` columns are right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index >= len(columns) - numbers else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=index == 0)  # names stay whole
    return table


def parity_table(report: BuildReport) -> Table:
    """One row for each stage: what it changed, and how far it is from eager."""
    columns = ("stage", "changes", "nodes", "contract", "worst", "limit", "max abs", "s")
    table = _table("stages against eager", *columns, numbers=4)
    trace_seconds = report.seconds.get("trace", 0.0)
    if report.trace is not None:
        table.add_row("trace", "", "", *_stage(report.trace), f"{trace_seconds:.1f}")
    for step in report.passes:
        nodes = f"{step.nodes_before}-{step.nodes_after}"
        stage = _stage(step.parity) if step.parity is not None else ("", "", "", "")
        table.add_row(step.kind, str(step.changes), nodes, *stage, f"{step.seconds:.1f}")
    name, last = report.last
    if last is not None:
        table.add_row(name, "", "", *_stage(last), f"{report.seconds.get('build', 0.0):.1f}")
    return table


def _stage(parity: StageParity) -> tuple[str, str, str, str]:
    worst, limit = worst_and_limit(parity)
    shown = f"[green]{worst}[/]" if parity.holds else f"[bold red]{worst} broken[/]"
    return parity.contract, shown, limit, number_text(parity.max_abs)


def build_parts(report: BuildReport) -> list[RenderableType]:
    """What there is to say of a build, each as a table."""
    parts = parity_table, tactics_table, layers_table, sensitivity_table, refusals_table, remarks
    return [shown for part in parts if (shown := part(report)) is not NOTHING]


def written_line(report: BuildReport, folder: Path, engine: Engine) -> RenderableType:
    """That an engine directory is there, what it is called with, and which contracts it breaks."""
    names = ", ".join(report.broken)
    lines = [f"[bold red]broken[/] contracts, written because of --force: {names}"] if names else []
    is_decoder = engine.layout is not None
    what = f"a decoder with a cache: graphopt generate {folder} ..." if is_decoder else repr(engine)
    return Text.from_markup("\n".join([*lines, f"[bold green]written[/] {escape(str(folder))} {escape(what)}"]))


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def tactics_table(report: BuildReport) -> RenderableType:
    """What was timed, and what was taken."""
    if not report.tactics:
        return NOTHING
    table = _table("tactics (ms)", "op", "form", "", numbers=1)
    for tactic in report.tactics:
        timed = sorted(tactic.milliseconds.items(), key=lambda item: (item[1] is None, item[1]))
        for index, (form, milliseconds) in enumerate(timed):
            name = f"{tactic.signature.split('(')[0]} x{tactic.uses}" if index == 0 else ""
            mark = f"[green]{form}[/]" if form == tactic.chosen else form
            note = escape(tactic.notes.get(form, "refused").removeprefix(form))
            table.add_row(name, mark, f"{milliseconds:.3f}" if milliseconds is not None else f"[dim]{note}[/]")
    return table


def refusals_table(report: BuildReport) -> RenderableType:
    """Matches that were not rewritten, by reason; and what passes noted."""
    reasons: dict[tuple[str, str, str], int] = {}
    for step in report.passes:
        for refusal in step.refusals:
            key = (step.kind, refusal.rule, refusal.reason)
            reasons[key] = reasons.get(key, 0) + 1
    notes = [(step.kind, note) for step in report.passes for note in step.notes]
    if not reasons and not notes:
        return NOTHING
    table = _table("not rewritten", "pass", "rule", "reason", "times", numbers=1)
    for (kind, rule, reason), count in reasons.items():
        table.add_row(kind, rule, escape(reason), str(count))
    for kind, note in notes:
        table.add_row(kind, "[dim]note[/]", escape(note), "")
    return table


def remarks(report: BuildReport) -> RenderableType:
    """What the engine's kernels are, where they can be seen, and what the user is told of it."""
    lines = [f"[yellow]note[/] {escape(warning)}" for warning in report.warnings]
    if report.kernels:
        lines.insert(0, "kernels: " + escape(", ".join(f"{count} {name}" for name, count in report.kernels.items())))
    return Text.from_markup("\n".join(lines)) if lines else NOTHING


def layers_table(report: BuildReport) -> RenderableType:
    """What layers compute in after passes that change that; the manifest and report.html name every one."""
    if not any(step.layers for step in report.passes):
        return NOTHING
    table = _table("precision of layers", "layers", "precision", "reason", "modules", numbers=0)
    for step in report.passes:
        for (precision, reason), modules in step.layers_by_precision.items():
            some = ", ".join(modules[:2]) + (", ..." if len(modules) > 2 else "")
            table.add_row(str(len(modules)), precision, escape(reason), escape(some))
    return table


def sensitivity_table(report: BuildReport, most: int = 12) -> RenderableType:
    """The most sensitive layers of passes that measured that; report.html has all."""
    found = [each for step in report.passes for each in step.sensitivities]
    if not found:
        return NOTHING
    table = _table("sensitivity: each layer alone in few bits", "layer", "precision", "metric", "loss", numbers=0)
    for each in found[:most]:
        bar = "█" * max(1, round(24 * each.share))
        table.add_row(
            each.module, f"[yellow]{each.precision}[/]" if each.kept else each.precision, f"{each.effect:.5g}", bar
        )
    if len(found) > most:
        table.caption = f"{len(found) - most} more in report.html"
    return table


def probes_table(parity: StageParity) -> RenderableType:
    """Each output on each probe."""
    names = "x".join(parity.probes[0].sizes) if parity.probes else ""
    columns = (names, "output", "max abs", "relative", "cosine", "compared", "left out")
    table = _table("engine against eager", *columns, numbers=5)
    for probe in parity.probes:
        sizes = "x".join(str(size) for size in probe.sizes.values())
        for name, found in probe.outputs.items():
            numbers = (f"{found.max_abs:.1e}", f"{found.relative:.1e}", f"{found.cosine:.6f}")
            table.add_row(sizes, name, *numbers, str(found.compared), str(found.left_out))
    sign = ">=" if parity.metric in HIGHER_IS_BETTER else "<="
    verdict = "[green]holds[/]" if parity.holds else "[bold red]broken[/]"
    worst, limit = worst_and_limit(parity)
    return Group(table, f"{verdict}: {parity.metric} {worst} (must be {sign} {limit})")


def decoding_table(parity: DecodeParity) -> RenderableType:
    """Each prompt's tokens against eager's, and how far the logits drift."""
    table = _table("greedy tokens against eager", "prompt tokens", "new", "equal", "first difference", numbers=3)
    for row in parity.rows:
        table.add_row(str(row.prompt_tokens), str(row.tokens), str(row.equal), str(row.first_difference or "-"))
    middle = parity.drift[len(parity.drift) // 2]
    drift = f"logits differ by {parity.drift[0]:.1e} at first, {middle:.1e} half way, {max(parity.drift):.1e} at most"
    verdict = "[green]holds[/]" if parity.holds else "[bold red]broken[/]"
    return Group(table, f"{drift} (largest logit {parity.scale:.3g})", f"{verdict}: {parity.agreement:.2%} are eager's")


def read_graph(what: str) -> Graph:
    """The graph of an engine directory, a .gir file, or a model (which is traced)."""
    path = Path(what)
    if path.suffix == ".gir":
        if not path.is_file():
            raise GraphError(f"there is no file {what}")
        return parse(path.read_text(encoding="utf-8"))
    if path.is_dir() and (path / artifact.MANIFEST).is_file():
        artifact.read_manifest(path)
        return artifact.read_graph(path)
    from graphopt.models import load_model
    from graphopt.tracing import trace

    source = load_model(what)
    return trace(source.module, source.inputs, source.axes, defaults=source.dims, truths=source.truths)


def read_attentions(what: str) -> list[AttentionReport]:
    """The attentions of an engine as its manifest has them; of a model or .gir file, after the passes that fuse them."""
    if (Path(what) / artifact.MANIFEST).is_file():
        return artifact.read_manifest(Path(what)).report.attentions
    graph = read_graph(what)
    kinds = ("decompose_complex", "canonicalize", "fuse_attention")
    reports = run_passes(graph, load_passes([{"kind": kind, "allow_no_match": True} for kind in kinds]))
    return attentions.table(graph, [refusal for report in reports for refusal in report.refusals])


def attention_table(rows: Sequence[AttentionReport]) -> RenderableType:
    """Attentions with their heads, sizes and masks; those that are alike in one line. Then what is left, and why."""
    groups: dict[tuple[str, ...], list[AttentionReport]] = {}
    for row in rows:
        facts = row.model_dump(exclude={"name", "where", "unproven", "extras"})
        groups.setdefault((*map(str, facts.values()), *row.extras), []).append(row)
    fused = sum(row.fused for row in rows)
    columns = ("first", "times", "heads", "kv", "size", "queries", "keys", "mask", "")
    table = _table(f"{fused} of {len(rows)} attentions fused", *columns)
    for group in groups.values():
        row = group[0]
        size = row.size if row.size == row.value_size else f"{row.size}, values {row.value_size}"
        mask = row.mask if row.fused else "[red]not fused[/]"
        table.add_row(
            escape(row.name), str(len(group)), row.heads, row.kv_heads, size, row.queries, row.keys, mask,
            ", ".join(row.extras),
        )  # fmt: skip
    left = _table("why", "attention", "reason", "at")
    for row in rows:
        reason = row.refusal or row.unproven
        if reason:
            left.add_row(escape(row.name), escape(reason), escape(row.where.partition(", from ")[2] or row.where))
    return Group(table, "", left) if left.row_count else table


def graph_facts(graph: Graph, *, with_text: bool, with_weights: bool, origins: bool) -> dict[str, Any]:
    """A graph as plain data."""
    facts: dict[str, Any] = {
        "inputs": {name: str(value.type) for name, value in graph.inputs.items()},
        "outputs": {name: str(value.type) for name, value in graph.outputs.items()},
        "dims": {name: [bounds.min, bounds.max] for name, bounds in graph.dims.items()},
        "nodes": len(graph),
        "weights": len(graph.weights),
        "weight_bytes": graph.weight_bytes,
        "ops": graph.op_counts(),
    }
    if with_weights:
        facts["weight_types"] = {name: str(weight.type) for name, weight in graph.weights.items()}
    if with_text:
        facts["text"] = graph.text(origins=origins)
    return facts


def graph_tables(graph: Graph, *, with_weights: bool) -> RenderableType:
    sides = _table("inputs, outputs, dims", "", "name", "type")
    for name, value in graph.inputs.items():
        sides.add_row("input", name, escape(str(value.type)))
    for name, value in graph.outputs.items():
        sides.add_row("output", name, escape(str(value.type)))
    for name, bounds in graph.dims.items():
        sides.add_row("dim", name, escape(str(bounds)))
    ops = _table(f"{len(graph)} nodes", "op", "", numbers=1)
    for op, count in graph.op_counts().items():
        ops.add_row(op, str(count))
    summary = f"{len(graph.weights)} weights, {megabytes(graph.weight_bytes)}"
    if not with_weights:
        return Group(sides, "", ops, "", summary)
    weights = _table(summary, "weight", "type", "bytes", numbers=1)
    for name, weight in graph.weights.items():
        weights.add_row(name, escape(str(weight.type)), str(weight.nbytes))
    return Group(sides, "", ops, "", weights)


def diff(difference: str) -> Text:
    """A text diff in colour."""
    text = Text()
    for line in difference.splitlines():
        style = "green" if line.startswith("+") else "red" if line.startswith("-") else ""
        text.append(line + "\n", style)
    return text if difference else Text("the graphs are equal\n")


def bench_table(timed: list[dict[str, Any]]) -> Table:
    table = _table("milliseconds", "sizes", "median", "fastest", "90 %", "runs", numbers=4)
    for row in timed:
        sizes = " ".join(f"{name}={size}" for name, size in row["sizes"].items())
        table.add_row(sizes, *(f"{row[key]:.2f}" for key in ("median_ms", "min_ms", "p90_ms")), str(row["runs"]))
    return table


def passes_table(known: Mapping[str, type[Pass]]) -> RenderableType:
    table = _table("passes", "", "")
    table.show_header = False
    for kind, step in known.items():
        facts = {"needs": step.requires, "gives": step.provides, "options": _own_options(step)}
        told = "; ".join(f"{what} {', '.join(names)}" for what, names in facts.items() if names)
        table.add_row(kind, Text((inspect.getdoc(step) or "").split("\n")[0]))
        if told:
            table.add_row("", Text(told, style="dim"))
    every = "Each has allow_no_match as well. A pass with its options and a picture: graphopt passes KIND"
    return Group(table, "", Text(every, style="dim"))


def _own_options(step: type[Pass]) -> list[str]:
    return [name for name in step.model_fields if name not in Pass.model_fields]


def _type_name(annotation: Any) -> str:
    """A type as a reader of options needs it: without modules and without what only checks it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, parts))
    if annotation is type(None):
        return "None"
    if origin is not None:
        inner = ", ".join("..." if part is Ellipsis else _type_name(part) for part in parts)
        return f"{origin.__name__}[{inner}]"
    return str(getattr(annotation, "__name__", annotation))


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else repr(field.get_default(call_default_factory=True))


def pass_page(kind: str, step: type[Pass]) -> RenderableType:
    """A pass with its module's picture of before and after, and its options."""
    module = inspect.getmodule(step)
    own = module is not None and module.__name__.startswith("graphopt.passes.")
    page = (inspect.getdoc(module) if own else inspect.cleandoc(step.__doc__ or "")) or ""
    options: list[RenderableType] = []
    for name, field in step.model_fields.items():
        if name != "kind":
            options.append(f"[bold]{name}[/]: {escape(_type_name(field.annotation))} = {escape(_default(field))}")
            if field.description:
                options.append(Padding(Text(_flowing(field.description)), (0, 0, 0, 4)))
    words = [Text(f"{_flowing(part)}\n") for part in page.split("\n\n") if part != "::"]
    return Group(f"[bold]{kind}[/]", "", *words, "[bold]options[/]", *options)


def _flowing(paragraph: str) -> str:
    """Without the line breaks of its source and marks of code; pictures, which are indented, stay as they are."""
    return paragraph if paragraph.startswith(" ") else " ".join(paragraph.replace("``", "").replace("::", ":").split())


def doctor_facts() -> dict[str, Any]:
    """Versions and what each backend says of itself; a backend that is missing says what would bring it."""
    import torch

    packages = ("graphopt", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors", "pydantic")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "torch threads": torch.get_num_threads(),
        "cuda devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {},
    }
    for name, backend in known_backends().items():
        try:
            facts["backends"][name] = backend.versions() | backend.facts()
        except MissingBackendError as error:
            facts["backends"][name] = {"missing": error.what, "to do": error.hint}
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def doctor_table(facts: Mapping[str, Any]) -> RenderableType:
    table = _table("doctor", "", "", "")
    for key, value in facts.items():
        if isinstance(value, Mapping):
            continue
        table.add_row(key, "", ", ".join(value) or "none" if isinstance(value, list) else str(value))
    for name, found in facts["packages"].items():
        table.add_row("package", name, found)
    for backend, own in facts["backends"].items():
        for key, value in own.items():
            table.add_row(backend, key, escape(str(value)))
    return table


FINISHES = {
    "end": "the model ended the text", "stop": "a stop string came", "length": "max_new_tokens reached",
    "cache": "the cache is full",
}  # fmt: skip


def timing_line(timing: Timing, finish: str | None) -> str:
    """How fast a generation was, and why it ended."""
    ended = f" · {FINISHES[finish]}" if finish else ""
    return (
        f"[dim]prompt {timing.prompt_tokens} tokens in {timing.prefill:.2f} s ({timing.prefill_rate:.0f} tokens/s) · "
        f"then {timing.decode_rate:.1f} tokens/s{ended}[/]"
    )
