"""What the commands of the command line share.

What takes long to import is imported where it is used: help and tab completion are asked often.
"""

import base64
import json
import math
import sys
from collections.abc import Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from jobs.config import JobConfig
    from jobs.publish import RunResult

PIPE_COLUMNS = 160
FIELDS = ("image", "text", "multimodal")


def complete_key(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the configuration's keys that begin so, each with what it means."""
    from jobs.config import JobConfig
    from jobs.config_keys import config_keys

    for name, _, meaning in config_keys(JobConfig):
        if name.startswith(incomplete):
            yield f"{name}=", meaning


def complete_field(incomplete: str) -> list[str]:
    """Return the fields that begin so."""
    return [name for name in FIELDS if name.startswith(incomplete)]


def complete_reason(incomplete: str) -> list[str]:
    """Return the reject reasons that begin so."""
    from jobs.images import RejectReason

    return [str(reason) for reason in RejectReason if reason.startswith(incomplete)]


ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The YAML configuration.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override one key: section.key=value. Repeatable.",
        autocompletion=complete_key,
    ),
]
ReleaseOption = Annotated[
    int | None, typer.Option("--release", help="A release's version; else the newest.")
]
PublishOption = Annotated[
    bool,
    typer.Option("--publish/--no-publish", help="Or leave it for `evaluate` and `demo` to open."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def load_config(path: Path, overrides: list[str] | None) -> "JobConfig":
    """Read the configuration with the `--set` overrides.

    Raises:
        ConfigError: See `jobs.config.read_config`.
    """
    from jobs.config_file import read_config

    return read_config(path, overrides or ())


def open_console() -> Console:
    """Return what tables are printed with: as wide as the terminal, or wide enough for a pipe."""
    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    typer.echo(json.dumps(plain(value), ensure_ascii=False, allow_nan=False))


def plain(value: object) -> object:
    """Return a value in what JSON has.

    Any number is a number, but for NaN and the infinities, which are null; bytes are base64, dates
    and times ISO 8601; what is anything else is its text.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real | Decimal):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, date | time) else str(value)


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
