"""What the commands of the command line share."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.config import JobConfig, read_config

if TYPE_CHECKING:
    from jobs.publish import RunResult

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The YAML configuration.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one key: section.key=value. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def load_config(path: Path, overrides: list[str] | None) -> JobConfig:
    """Read the configuration with the `--set` overrides.

    Raises:
        ConfigError: See `jobs.config.read_config`.
    """
    return read_config(path, overrides or ())


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=str))


def print_result(result: "RunResult") -> None:
    """Print what a refresh or a reindex did."""
    rows = f"{result.rows:,} rows in = {result.live:,} live + {result.rejected:,} rejected"
    if result.candidate:
        first = f"candidate {result.candidate} built, not published; see `vitrine evaluate`"
    elif result.published:
        first = f"release {result.release} published"
    else:
        first = f"nothing to do: release {result.release} shows the catalog as it is"
    typer.echo(
        f"{first}: {result.products:,} products, {rows}\n"
        f"new {result.new:,}, changed {result.changed:,}, removed {result.removed:,}, "
        f"unchanged {result.unchanged:,} (metadata alone {result.metadata_changed:,}); "
        f"embedded {result.embedded:,}\n"
        f"report: {result.report}"
    )
