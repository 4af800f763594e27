"""Tells what an import of a CSV read, how it understood the columns, and what it wrote."""

from dataclasses import dataclass
from pathlib import Path

from jobs.csv_columns import ROLE_COLUMNS
from jobs.csv_products import Layout, Profile, catalog_schema
from jobs.csv_rows import DELIMITERS, CsvSource

MAX_HOSTS = 50


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What an import read, how it understood the columns, and what it wrote.

    Attributes:
        columns: Catalog column to the CSV's columns that it comes from.
        types: Catalog column to its Arrow type.
        empty: The CSV's columns that hold nothing and were left out.
        rows: Rows in = products + merged + rejected.
        merged: Rows that gave their pictures to the product before them.
        reasons: Rejected rows by reason.
        http_hosts: Hosts of the pictures, the most frequent first; listed in the configuration.
        notes: What the user should know.
    """

    catalog: str
    rejects: str
    config: str
    encoding: str
    delimiter: str
    columns: dict[str, list[str]]
    types: dict[str, str]
    empty: list[str]
    rows: int
    products: int
    merged: int
    rejected: int
    reasons: dict[str, int]
    images: int
    http_hosts: list[str]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What the second pass counted; the hosts' most frequent first."""

    products: int
    merged: int
    images: int
    reasons: dict[str, int]
    hosts: list[str]
    first_reject: str


def summarize(dest: Path, layout: Layout, profile: Profile, written: Written) -> ImportSummary:
    """Tell what an import did.

    Args:
        dest: The folder as the user named it.
        layout: What each column became.
        profile: What the first pass found.
        written: What the second pass counted.
    """
    source, schema = layout.source, catalog_schema(layout, profile)
    roles = {ROLE_COLUMNS[role]: numbers for role, numbers in layout.roles.items()}
    numbers = roles | {name: (n,) for n, name in layout.others.items()}
    return ImportSummary(
        catalog=str(dest / "catalog.parquet"),
        rejects=str(dest / "rejects.parquet"),
        config=str(dest / "config.yaml"),
        encoding=source.encoding,
        delimiter=source.delimiter,
        columns={name: [source.header[n] for n in numbers[name]] for name in schema.names},
        types={field.name: str(field.type).replace("item: ", "") for field in schema},
        empty=[source.header[n] or f"column {n + 1}" for n in sorted(profile.empty)],
        rows=profile.rows,
        products=written.products,
        merged=written.merged,
        rejected=sum(written.reasons.values()),
        reasons=written.reasons,
        images=written.images,
        http_hosts=written.hosts[:MAX_HOSTS],
        notes=_notes(source, layout, profile, written),
    )


def _notes(source: CsvSource, layout: Layout, profile: Profile, written: Written) -> list[str]:
    notes = [
        f"{source.header[n]!r} stays text: {text!r} is no number in the column's one format"
        for n, text in profile.texts.items()
    ]
    if "image" not in layout.roles:
        notes.append("no column holds images; name one with --column image=NAME")
    if written.hosts:
        notes.append(
            f"pictures come from {', '.join(written.hosts[:5])}"
            + (f" and {len(written.hosts) - 5} more hosts" if len(written.hosts) > 5 else "")
            + ": strike out of images.http_hosts what you don't trust"
        )
    if len(written.hosts) > MAX_HOSTS:
        notes.append(f"images.http_hosts lists the {MAX_HOSTS} most frequent hosts only")
    return notes


def format_summary(summary: ImportSummary) -> str:
    """Return the summary as lines for a terminal.

    Args:
        summary: Of a finished import.
    """
    delimiter = {mark: name for name, mark in DELIMITERS.items()}.get(summary.delimiter)
    lines = [f"read as {summary.encoding}, delimiter {delimiter or repr(summary.delimiter)}"]
    width = max(map(len, summary.columns))
    for name, sources in summary.columns.items():
        mark = "=" if name in ROLE_COLUMNS.values() else " "
        shown = ", ".join(repr(source) for source in sources)
        lines.append(f"{mark} {name:<{width}}  <- {shown} ({summary.types[name]})")
    if summary.empty:
        lines.append(f"left out, empty: {', '.join(repr(name) for name in summary.empty)}")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.reasons.items())
    lines += [f"note: {note}" for note in summary.notes]
    lines += [
        f"{summary.rows:,} rows = {summary.products:,} products + {summary.merged:,} merged + "
        f"{summary.rejected:,} rejected" + (f" ({reasons})" if reasons else ""),
        f"{summary.images:,} images; rejected rows: {summary.rejects}",
        f"next: vitrine refresh --config {summary.config}",
    ]
    return "\n".join(lines)
