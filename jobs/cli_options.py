"""What the commands of the command line share."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import filesize

from jobs.config import JobConfig, read_config

if TYPE_CHECKING:
    from jobs.preview import Preview
    from jobs.publish import RunResult

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The YAML configuration.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one key: section.key=value. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


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


def print_preview(preview: "Preview") -> None:
    """Print what a refresh would do."""
    after = "no release" if preview.release is None else f"release {preview.release}"
    typer.echo(f"dry run: {preview.rows:,} rows in the catalog, against {after}; nothing changed")
    for kind, (words, always) in PREVIEW_LINES.items():
        count = preview.counts[kind]
        shown = preview.examples.get(kind.removesuffix("_changed"), [])
        examples = f"  {', '.join(shown)}{', …' if count > len(shown) else ''}" if shown else ""
        if count or always:
            typer.echo(f"{words:<26} {count:>14,}{examples}")
    estimate = preview.estimate
    parts = [f"{preview.to_embed:,} rows to embed"]
    if estimate["embed_s"] is not None:
        parts.append(f"about {estimate['embed_s']:,.0f} s of embedding")
    if estimate["rest_s"] is not None:
        parts.append(f"{estimate['rest_s']:,.0f} s for the rest")
    for name, words in (("image_bytes", "to fetch"), ("written_bytes", "to write")):
        if estimate[name] is not None:
            parts.append(f"{filesize.decimal(estimate[name])} {words}")
    typer.echo(f"{', '.join(parts)} (from {estimate['from']})")
