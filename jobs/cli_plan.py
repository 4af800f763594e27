"""The command `plan`, and how plans and dry runs are printed."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import filesize

from jobs.cli_options import (
    ConfigOption,
    JsonOption,
    QuietOption,
    SetOption,
    load_config,
    print_json,
)
from jobs.progress import Progress

if TYPE_CHECKING:
    from jobs.preview import Preview

app = typer.Typer()

PREVIEW_LINES = {
    "new": ("  new", True),
    "changed": ("  changed", True),
    "changed_text": ("    in text alone", False),
    "changed_image": ("    in image alone", False),
    "retried": ("  tried again", True),
    "removed": ("  removed", True),
    "unchanged": ("  unchanged", True),
    "metadata_changed": ("    but for metadata", False),
    "formerly_rejected": ("  were rejects before", False),
}
"""Kind of row to its words, and whether it is shown when there is none."""

BYTES = {
    "image": "images to fetch",
    "table": "table to write",
    "index": "index files to write",
    "peak": "store until gc, at most",
}
UNKNOWN = "unknown"


@app.command(
    epilog="Example: vitrine plan --config FILE --cluster ray_cluster.yaml --price cpu_index=1.1"
)
def plan(
    config: ConfigOption,
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", help="A Ray cluster file to plan for; else Ray's machines."),
    ] = None,
    workers: Annotated[
        list[str] | None,
        typer.Option("--workers", help="TYPE=N of the cluster file; else max_workers. Repeatable."),
    ] = None,
    prices: Annotated[
        list[str] | None,
        typer.Option("--price", help="TYPE=PER_HOUR of a machine, as local=0.4. Repeatable."),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what the next refresh takes: rows, time, bytes, memory, cost; embed nothing."""
    from jobs.preview import plan_run

    job = load_config(config, overrides)
    with Progress(quiet=quiet) as progress:
        found = plan_run(job, progress, cluster=cluster, workers=workers or (), prices=prices or ())
    if as_json:
        print_json(asdict(found))
        return
    _print_counts(found, f"plan of a {found.plan['command']}")
    typer.echo("\n".join(_plan_lines(found.plan)))
    typer.echo(f"plan: {found.address}")


def print_preview(preview: "Preview") -> None:
    """Print what a refresh would do, and its plan in short."""
    _print_counts(preview, "dry run")
    made = preview.plan
    embed = next((one for one in made["stages"] if one["stage"] == "embed"), None)
    parts = [f"{preview.to_embed:,} rows to embed"]
    if made["seconds"] is not None:
        least = "at least " if made["unknown"] else "about "
        parts.append(f"{least}{_time(made['seconds'])} in all")
    if embed and embed["seconds"] is not None:
        parts.append(f"{_time(embed['seconds'])} of embedding (from {embed['source']})")
    for name, words in (("image", "to fetch"), ("table", "to write")):
        if made["bytes"][name]["value"] is not None:
            parts.append(f"{_size(made['bytes'][name])} {words}")
    typer.echo(", ".join(parts))
    if made["unknown"]:
        typer.echo(f"unknown: {', '.join(made['unknown'])}; `vitrine plan` says why")


def _print_counts(preview: "Preview", title: str) -> None:
    after = "no release" if preview.release is None else f"release {preview.release}"
    typer.echo(f"{title}: {preview.rows:,} rows in the catalog, against {after}; nothing changed")
    for kind, (words, always) in PREVIEW_LINES.items():
        count = preview.counts[kind]
        shown = preview.examples.get(kind.removesuffix("_changed"), [])
        examples = f"  {', '.join(shown)}{', …' if count > len(shown) else ''}" if shown else ""
        if count or always:
            typer.echo(f"{words:<26} {count:>14,}{examples}")


def _plan_lines(made: dict[str, Any]) -> Iterator[str]:
    yield from _machine_lines(made["cluster"])
    yield f"time, {made['rows']['to_embed']:,} rows to embed"
    for one in made["stages"]:
        stage, _, step = one["stage"].rpartition(": ")
        yield _line(f"  {step}" if stage else step, _time(one["seconds"]), one["source"])
    without = f"at least; unknown: {', '.join(made['unknown'])}" if made["unknown"] else ""
    yield _line("all stages", _time(made["seconds"]), without)
    yield "bytes"
    for name, words in BYTES.items():
        yield _line(words, _size(made["bytes"][name]), made["bytes"][name]["source"])
    yield "memory of the largest tasks"
    for one in made["memory"]:
        yield _line(one["task"], _size({"value": one["bytes"]}), _judge(one))
    for field, size in made["serving_bytes"].items():
        yield _line(f"serve {field}", _size({"value": size}), made["indexes"][field])
    cost = made["cost"]
    value = UNKNOWN if cost is None or cost["value"] is None else f"{cost['value']:,.4g}"
    yield _line("cost", value, "no --price was given" if cost is None else cost["source"])
    yield from (f"- {note}" for note in made["notes"])


def _machine_lines(cluster: dict[str, Any]) -> Iterator[str]:
    found = cluster["embedders"]
    where = f"{found['gpus']:g} GPU each" if found["gpus"] else f"{found['threads']} threads each"
    actors = f"{found['count']} embedding actors, {where}, precision {found['precision']}"
    yield f"on {cluster['name']}: {actors}"
    for one in cluster["machines"]:
        memory = _size({"value": one["memory_bytes"]})
        offers = f"{one['cpus']} CPUs, {one['gpus']} GPUs, memory {memory}"
        price = "" if one["price_per_hour"] is None else f"{one['price_per_hour']:g}/h"
        yield _line(f"{one['count']} {one['type']}", price, offers)


def _judge(task: dict[str, Any]) -> str:
    if task["fits"] is None:
        return f"fits: {UNKNOWN}"
    return "fits" if task["fits"] else f"DOES NOT FIT: {task['advice']}"


def _line(name: str, value: str, source: str) -> str:
    return f"  {name:<36} {value:>12}  {source}".rstrip()


def _time(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    return f"{seconds:,.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _size(figure: dict[str, Any]) -> str:
    value = figure["value"]
    return UNKNOWN if value is None else filesize.decimal(round(value))
