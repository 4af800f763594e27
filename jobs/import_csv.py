"""The `import-csv` command: a product CSV with unknown columns becomes a catalog.

Owns the files of its destination: the catalog, the rejected rows, a configuration for `refresh`.
The catalog's columns are guessed by `jobs/csv_columns.py` and can be named.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import yaml

from jobs.config_file import read_config
from jobs.csv_columns import ROLE_COLUMNS, guess_roles, read_choices
from jobs.csv_images import http_host
from jobs.csv_products import (
    Layout,
    Product,
    Profile,
    build_layout,
    build_products,
    catalog_schema,
    product_values,
    profile_rows,
)
from jobs.csv_rows import CsvRow, CsvSource, RejectedRow, open_csv, read_rows
from jobs.csv_summary import MAX_HOSTS, ImportSummary, Written, format_summary, summarize
from jobs.errors import JobError
from jobs.outputs import RowWriter, check_new_folder
from jobs.progress import Progress

__all__ = ["ImportOptions", "ImportSummary", "format_summary", "import_csv"]

SAMPLE_ROWS = 5_000
SAMPLE_CHARS = 1 << 25
_MAX_COUNTED_HOSTS = 10_000
_PRETRAINED = "laion2b_s34b_b79k"
_UPDATE_ROWS = 10_000

REJECTS_SCHEMA = pa.schema(
    [("line", pa.int64()), *((name, pa.string()) for name in ("reason", "detail", "raw"))]
)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the user decides instead of the guess.

    Attributes:
        columns: `role=NAME` choices.
        encoding: A codec's name.
        delimiter: One character or its name.
        image_root: Where relative image references start; none: the CSV's folder.
    """

    columns: tuple[str, ...] = ()
    encoding: str | None = None
    delimiter: str | None = None
    image_root: str | None = None


def import_csv(
    path: Path, dest: Path, options: ImportOptions, progress: Progress | None = None
) -> ImportSummary:
    """Turn a product CSV into a catalog, its rejected rows and a configuration.

    The same file gives the same bytes. Nothing is at `dest` before all of it is. Memory grows by
    8 bytes a product, and with the number of repeated ids.

    Args:
        path: The CSV, plain or gzip.
        dest: A new or empty folder.
        options: What is not to be guessed.
        progress: Shows what is done.

    Returns:
        The columns as understood and the counts.

    Raises:
        JobError: The file is no CSV, the product_id or title can't be found, a choice names
            nothing, all rows are rejected, or `dest` is not empty or can't be written.
    """
    shown = progress or Progress(quiet=True)
    check_new_folder(dest)
    shown.stage(f"reading {path}")
    source = open_csv(path, encoding=options.encoding, delimiter=options.delimiter)
    rows = _sample(source)
    if not rows:
        raise JobError(f"{path} has a header of {len(source.header)} columns but no good row")
    roles = guess_roles(source.header, rows, read_choices(options.columns, source.header))
    layout = build_layout(source, roles, options.image_root)
    profile = profile_rows(layout)
    shown.stage("writing the catalog")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as scratch:
            folder = Path(scratch) / "catalog"
            folder.mkdir()
            written = _write_tables(folder, layout, profile, shown)
            if not written.products:
                raise JobError(
                    f"{path}: no product, all {profile.rows:,} rows were rejected; "
                    f"{written.first_reject}"
                )
            _write_config(folder, dest.resolve(), layout, written.hosts)
            folder.rename(dest)
    except OSError as error:
        raise JobError(f"{dest} can't be written: {error}") from error
    return summarize(dest, layout, profile, written)


def _sample(source: CsvSource) -> list[list[str]]:
    """Read the first rows, within bounds."""
    rows: list[list[str]] = []
    size_chars = 0
    for row in islice(read_rows(source), SAMPLE_ROWS):
        if isinstance(row, CsvRow):
            rows.append(row.cells)
            size_chars += len(row.raw)
        if size_chars > SAMPLE_CHARS:
            break
    return rows


def _write_tables(folder: Path, layout: Layout, profile: Profile, shown: Progress) -> Written:
    products = merged = images = 0
    reasons: Counter[str] = Counter()
    hosts: Counter[str] = Counter()
    first_reject = ""
    with (
        shown.count(profile.rows) as bar,
        RowWriter(folder / "catalog.parquet", catalog_schema(layout, profile)) as catalog,
        RowWriter(folder / "rejects.parquet", REJECTS_SCHEMA) as rejects,
    ):
        for one in build_products(layout, profile):
            if isinstance(one, Product):
                catalog.add(product_values(one, layout, profile))
                products += 1
                merged += one.merged
                images += len(one.images)
                _count_hosts(hosts, one.images)
            else:
                rejects.add(_reject_values(one))
                reasons[one.reason.value] += 1
                first_reject = first_reject or f"line {one.line}: {one.reason}, {one.detail}"
            done = products + merged + reasons.total()
            if (products + reasons.total()) % _UPDATE_ROWS == 0 or done == profile.rows:
                bar.update(done, reasons.total())
    return Written(
        products=products,
        merged=merged,
        images=images,
        reasons=dict(sorted(reasons.items())),
        hosts=sorted(hosts, key=lambda host: (-hosts[host], host)),
        first_reject=first_reject,
    )


def _reject_values(row: RejectedRow) -> dict[str, Any]:
    return {"line": row.line, "reason": row.reason.value, "detail": row.detail, "raw": row.raw}


def _count_hosts(hosts: Counter[str], images: Iterable[str]) -> None:
    for image in images:
        host = http_host(image)
        if host is not None and (host in hosts or len(hosts) < _MAX_COUNTED_HOSTS):
            hosts[host] += 1


def _write_config(folder: Path, dest: Path, layout: Layout, hosts: list[str]) -> None:
    """Write a configuration that `refresh` takes; its paths are those of the final folder."""
    names = [name for name in ("title", "brand", "description") if name in layout.roles]
    values: dict[str, Any] = {
        "store": str(dest / "store"),
        "catalog": {
            "path": str(dest / "catalog.parquet"),
            "columns": {
                ROLE_COLUMNS[role]: ROLE_COLUMNS[role]
                for role in ("product_id", "title", "image")
                if role in layout.roles
            },
            # The brand comes before the description: an encoder reads the first tokens only.
            "text": ". ".join(f"{{{name}}}" for name in names),
        },
        "encoder": {"architecture": "ViT-B-32", "pretrained": _PRETRAINED},
    }
    if "image" not in layout.roles:
        values["embed"] = {"fields": ["text"]}
    if hosts:
        values["images"] = {"http_hosts": hosts[:MAX_HOSTS]}
    path = folder / "config.yaml"
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    path.write_text(f"# vitrine refresh --config {dest / path.name}\n{body}", encoding="utf-8")
    read_config(path)
