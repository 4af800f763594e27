"""Commands that keep a store: reindex, export, rejects, rollback, gc."""

import sys
from contextlib import ExitStack
from dataclasses import asdict
from shutil import copyfileobj
from tempfile import SpooledTemporaryFile
from typing import Annotated, Literal

import typer
from rich.filesize import decimal

from jobs.cli_options import (
    ConfigOption,
    JsonOption,
    PublishOption,
    QuietOption,
    ReleaseOption,
    SetOption,
    complete_field,
    complete_reason,
    load_config,
    open_console,
    print_json,
    print_result,
)
from jobs.progress import Progress

SPOOL_BYTES = 8 * 2**20

app = typer.Typer()


@app.command(
    epilog="Example: vitrine reindex --config FILE --set index.factory=IVF1024,SQ8 --no-publish"
)
def reindex(
    config: ConfigOption,
    publish: PublishOption = True,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Build the indexes anew from stored embeddings; with another encoder, embed all with it."""
    from jobs.reindex import reindex as run

    job = load_config(config, overrides)
    with Progress(quiet=quiet) as progress:
        result = run(job, progress, publish=publish)
    print_json(asdict(result)) if as_json else print_result(result)


@app.command(epilog="Example: vitrine rejects --config FILE --kind transient --limit 0 --json")
def rejects(
    config: ConfigOption,
    reasons: Annotated[
        list[str] | None,
        typer.Option(
            "--reason",
            help="Only this one, as in timeout. Repeatable.",
            autocompletion=complete_reason,
        ),
    ] = None,
    kind: Annotated[
        Literal["transient", "permanent"] | None,
        typer.Option(
            "--kind",
            help="transient: tried again by the next refresh, images.max_attempts times in all.",
        ),
    ] = None,
    masked: Annotated[
        bool,
        typer.Option("--masked", help="List what is live without its image or text instead."),
    ] = False,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=0, help="Most rows that are listed; 0: all.")
    ] = 50,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what could not be embedded, and why: the latest first."""
    from jobs.reject_rows import RejectQuery
    from jobs.rejects import json_parts, open_rejects, parse_reasons, print_rejects

    query = RejectQuery(
        reasons=parse_reasons(reasons or ()),
        kinds=("transient", "permanent") if kind is None else (kind,),
        masked=masked,
        limit=limit,
    )
    job = load_config(config, overrides)
    with ExitStack() as opened:
        with Progress(quiet=quiet) as progress:
            progress.wait("find the rejects")
            found = opened.enter_context(open_rejects(job, query))
        if not as_json:
            print_rejects(found, open_console())
            return
        # Pages come from storage: a fault on the last one must not leave half an object.
        with SpooledTemporaryFile(SPOOL_BYTES, "w+", encoding="utf-8") as spool:
            spool.writelines(json_parts(found))
            spool.seek(0)
            copyfileobj(spool, sys.stdout)
        typer.echo()


@app.command(epilog="Example: vitrine export --config FILE --to s3://bucket/vectors --column price")
def export(
    config: ConfigOption,
    to: Annotated[
        str, typer.Option("--to", metavar="DIR", help="A new folder, or s3://bucket/prefix.")
    ],
    release: ReleaseOption = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--field",
            help="image, text or multimodal; else all. Repeatable.",
            autocompletion=complete_field,
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", help="A metadata column; else all. Repeatable."),
    ] = None,
    metadata: Annotated[
        bool, typer.Option("--metadata/--no-metadata", help="Or no metadata column at all.")
    ] = True,
    dtype: Annotated[
        Literal["float16", "float32"],
        typer.Option("--dtype", help="float32 where a reader knows no float16, as Spark."),
    ] = "float16",
    rows_per_file: Annotated[
        int, typer.Option("--rows-per-file", min=1, help="Most rows of a file.")
    ] = 250_000,
    row_group_rows: Annotated[
        int, typer.Option("--row-group-rows", min=1, help="Most rows of a row group.")
    ] = 25_000,
    partition_by: Annotated[
        list[str] | None,
        typer.Option("--partition-by", help="A metadata column for Hive folders. Repeatable."),
    ] = None,
    index: Annotated[
        bool, typer.Option("--index", help="Copy index files and query encoder to DIR/_serving.")
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a release's embeddings as plain Parquet, listed in _manifest.json, written last."""
    from jobs.export import export as run
    from jobs.export_layout import ExportOptions

    if columns and not metadata:
        raise typer.BadParameter("give --column or --no-metadata, not both")
    options = ExportOptions(
        to=to,
        release=release,
        fields=tuple(fields or ()),
        columns=(tuple(columns) if columns else None) if metadata else (),
        dtype=dtype,
        rows_per_file=rows_per_file,
        row_group_rows=row_group_rows,
        partition_by=tuple(partition_by or ()),
        index=index,
    )
    job = load_config(config, overrides)
    with Progress(quiet=quiet) as progress:
        result = run(job, options, progress)
    if as_json:
        print_json(asdict(result))
        return
    typer.echo(
        f"release {result.release} exported: {result.rows:,} rows of {result.products:,} products, "
        f"{', '.join(result.fields)}; {result.files:,} files, {decimal(result.size_bytes)}\n"
        f"manifest: {result.manifest}"
    )
    if result.serving is not None:
        typer.echo(f"for serving: {result.serving}")


@app.command(epilog="Example: vitrine rollback 3 --config jobs/configs/grocery.yaml")
def rollback(
    config: ConfigOption,
    release: Annotated[
        int | None,
        typer.Argument(metavar="RELEASE", help="Else the one that the newest replaced."),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make an older release the newest again, in one commit."""
    from jobs.rollback import rollback as run

    job = load_config(config, overrides)
    with Progress(quiet=quiet) as progress:
        result = run(job, progress, release)
    if as_json:
        print_json(asdict(result))
        return
    typer.echo(
        f"release {result.release} published: what release {result.content} shows, in place of "
        f"release {result.replaced}: {result.products:,} products, {result.live:,} live rows"
    )


@app.command(epilog="Example: vitrine gc --config FILE --keep 7 --dry-run")
def gc(
    config: ConfigOption,
    keep: Annotated[int, typer.Option("--keep", min=1, help="How many releases stay.")] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would go; change nothing.")
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Keep the newest releases; remove what neither they nor running jobs need."""
    from jobs.gc import describe
    from jobs.gc import gc as run

    job = load_config(config, overrides)
    with Progress(quiet=quiet) as progress:
        result = run(job, progress, keep=keep, dry_run=dry_run)
    print_json(asdict(result)) if as_json else typer.echo(describe(result))
