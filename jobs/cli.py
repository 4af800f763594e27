"""The command line: `vitrine COMMAND --config FILE [--set section.key=value …]`.

Exit status: 0 done, 1 an expected error in one line, 2 usage.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from jobs import __version__, check_installation
from jobs.cli_demo import app as demo_commands
from jobs.cli_options import (
    ConfigOption,
    JsonOption,
    PublishOption,
    QuietOption,
    ReleaseOption,
    SetOption,
    complete_field,
    load_config,
    open_console,
    print_json,
    print_result,
)
from jobs.cli_plan import app as plan_commands
from jobs.cli_plan import print_preview
from jobs.cli_store import app as store_commands
from jobs.errors import JobError
from jobs.progress import Progress

INTERRUPTED = 130

app = typer.Typer(
    name="vitrine",
    help="Embed a product catalog, build and publish its search indexes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(store_commands)
app.add_typer(plan_commands)
app.add_typer(demo_commands)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitrine {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Embed a product catalog, build and publish its search indexes."""


@app.command(epilog="Example: vitrine refresh --config jobs/configs/grocery.yaml")
def refresh(
    config: ConfigOption,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")
    ] = False,
    publish: PublishOption = True,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Embed what changed in the catalog, update the indexes, publish if quality holds."""
    from jobs.refresh import preview_refresh
    from jobs.refresh import refresh as run

    job = load_config(config, overrides)
    if dry_run:
        with Progress(quiet=quiet) as progress:
            preview = preview_refresh(job, progress)
        print_json(asdict(preview)) if as_json else print_preview(preview)
        return
    with Progress(quiet=quiet) as progress:
        result = run(job, progress, publish=publish)
    print_json(asdict(result)) if as_json else print_result(result)


@app.command(epilog="Example: vitrine status --config jobs/configs/grocery.yaml --json")
def status(config: ConfigOption, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Show the releases of a store, newest first."""
    from jobs.store import Store

    releases = [
        asdict(release) for release in Store(load_config(config, overrides).store).releases()
    ]
    if as_json:
        print_json({"releases": releases})
        return
    if not releases:
        typer.echo("no release yet: run `vitrine refresh`")
        return
    table = Table(
        "release", "created", "by", "products", "rows in", "live", "rejected", "intersection@10"
    )
    for row in releases:
        figures = [
            f"{name} {value['intersection_at_10']:.3f}"
            for name, value in row["quality"].items()
            if "intersection_at_10" in value
        ]
        counts = [f"{row[name]:,}" for name in ("products", "rows", "vectors", "rejected")]
        made = (str(row["version"]), row["created_at"], row["command"])
        table.add_row(*made, *counts, ", ".join(figures))
    open_console().print(table)


@app.command(epilog="Example: vitrine search --config FILE --image photo.jpg --text 'in blue'")
def search(
    config: ConfigOption,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="A photo.")] = None,
    text: Annotated[str | None, typer.Option("--text", "-t", help="Words.")] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Most products.")] = 10,
    field: Annotated[
        str | None,
        typer.Option(
            "--field",
            help="image, text or multimodal; else the first.",
            autocompletion=complete_field,
        ),
    ] = None,
    image_weight: Annotated[
        float | None,
        typer.Option(
            "--image-weight",
            min=0,
            max=1,
            help="Share of the photo in a query of photo and words; else the release's.",
        ),
    ] = None,
    release: ReleaseOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find products by a photo, words, or both, in a published release."""
    from jobs.search import Searcher, result_rows
    from jobs.store import Store

    if image is None and text is None:
        raise typer.BadParameter("give --image, --text, or both")
    job = load_config(config, overrides)
    store = Store(job.store)
    found = store.release(release)
    with Progress(quiet=quiet) as progress:
        progress.wait(f"open release {found.version}")
        searcher = Searcher(store, found.indexes, images=job.images, encoder=found.encoder)
        results = searcher.search(
            image=image, text=text, k=k, field=field, image_weight=image_weight
        )
    if as_json:
        print_json({"release": found.version, "results": result_rows(results)})
        return
    table = Table("score", "product", "metadata", title=f"release {found.version}")
    for one in results:
        shown = ", ".join(f"{n}: {str(v)[:60]}" for n, v in one.metadata.items() if v is not None)
        table.add_row(f"{one.score:.4f}", one.product_id, shown)
    open_console().print(table)


@app.command(epilog="Example: vitrine evaluate --config jobs/configs/grocery.yaml --json")
def evaluate(
    config: ConfigOption,
    release: ReleaseOption = None,
    candidate: Annotated[
        str | None,
        typer.Option("--candidate", help="What `--no-publish` built; it prints the name."),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a release with labelled queries, through the index and exactly; publish nothing."""
    from jobs.evaluate import evaluate as run

    if release is not None and candidate is not None:
        raise typer.BadParameter("give --release or --candidate, not both")
    job = load_config(config, overrides)
    with Progress(quiet=quiet) as progress:
        result = run(job, progress, release, candidate=candidate)
    if as_json:
        print_json(asdict(result))
        return
    names = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr", "ndcg_at_10")
    named = f"candidate {candidate}" if candidate else f"release {result.release}"
    title = f"{named}, {result.queries:,} queries (95 % intervals)"
    table = Table("query", "field", "queries", *names, "exact recall_at_10", "intersection_at_10")
    table.title = title
    for kind, fields in result.metrics.items():
        for name, row in fields.items():
            figures = [_interval(row["index"][metric]) for metric in names]
            marked = f"{name} *" if name == result.default_field else name
            exact = f"{row['exact']['recall_at_10']['value']:.3f}"
            overlap = f"{row['intersection_at_10']:.3f}"
            table.add_row(kind, marked, f"{row['queries']:,}", *figures, exact, overlap)
    open_console().print(table)
    typer.echo("* the field that a search without --field uses")
    for reason, one in result.skipped.items():
        typer.echo(f"left out: {one['count']:,} {one['of']}: {reason}")
    for step, parts in result.latency_ms.items():
        shown = ", ".join(f"{n} {one['p50']:.2f} / {one['p99']:.2f}" for n, one in parts.items())
        typer.echo(f"{step}, ms p50 / p99: {shown}")
    typer.echo(f"report: {result.report}")


@app.command(epilog="Example: vitrine sample sample-catalog --products 1000 --seed 0")
def sample(
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A new folder.")],
    products: Annotated[int, typer.Option("--products", min=1, help="How many.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed, another catalog.")] = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Render a sample catalog with pictures, training pairs and labelled queries."""
    from jobs.sample import write_sample

    with Progress(quiet=quiet) as progress, progress.count(products, "products") as shown:
        try:
            summary = write_sample(destination, products=products, seed=seed, progress=shown.update)
        except (ValueError, OSError) as error:
            raise JobError(f"sample: {error}") from error
    if as_json:
        print_json(asdict(summary))
        return
    typer.echo("\n".join(f"{name}: {value}" for name, value in asdict(summary).items()))


@app.command(epilog="Example: vitrine train checkpoint --config train.yaml")
def train(
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The checkpoint's folder.")],
    config: ConfigOption,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the configured encoder on pairs by a preset and write the best checkpoint."""
    from jobs.train import train as run

    job = load_config(config, overrides)
    with Progress(quiet=quiet) as progress:
        result = asdict(run(job, destination, progress))
    if as_json:
        print_json(result)
        return
    validation = result.pop("validation") or {}
    typer.echo("\n".join(f"{name}: {value}" for name, value in result.items()))
    for kind, figures in validation.items():
        shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        typer.echo(f"  {kind}: {shown}")


@app.command("import-csv", epilog="Example: vitrine import-csv products.csv catalog")
def import_csv(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A CSV, plain or gzip.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A new folder.")],
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            help="What a column is: title=Name; image=A,B: several; brand=: none. Repeatable.",
        ),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option("--delimiter", help="A character or its name; else guessed.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option("--encoding", help="As in cp1252; else guessed.")
    ] = None,
    image_root: Annotated[
        str | None,
        typer.Option("--image-root", help="Where relative pictures lie; else the CSV's folder."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn a product CSV into a catalog; guess what its columns are."""
    from jobs.import_csv import ImportOptions, format_summary
    from jobs.import_csv import import_csv as run

    options = ImportOptions(
        columns=tuple(columns or ()),
        encoding=encoding,
        delimiter=delimiter,
        image_root=image_root,
    )
    with Progress(quiet=quiet) as progress:
        result = run(file, destination, options, progress)
    if as_json:
        print_json(asdict(result))
        return
    typer.echo(format_summary(result))


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3f}\n{figure['low']:.2f}-{figure['high']:.2f}"


def main() -> None:
    """Run the command line; an expected error is one line on standard error and exit 1."""
    try:
        check_installation()
        app(prog_name="vitrine")
    except (JobError, ImportError) as error:
        typer.echo(f"vitrine: error: {' '.join(str(error).split())}", err=True)
        raise SystemExit(1) from error
    except (KeyboardInterrupt, SystemExit) as stop:  # Typer makes the one of the other
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        typer.echo("vitrine: interrupted; what was committed stays, the next run goes on", err=True)
        raise SystemExit(INTERRUPTED) from None
