"""Looks up the few rows that a report shows by example: in the catalog, the table, a release.

Tasks read them, a unit, a data file or a row group at a time; this process gets what is shown.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from jobs.buckets import Records, number_buckets
from jobs.catalog import Catalog
from jobs.diff import Plan
from jobs.ids import KEYS
from jobs.images import ImagesConfig
from jobs.items import Item, read_items
from jobs.plain import plain_rows, title_of
from jobs.report_pictures import THUMBNAIL_PX, Picture, make_picture
from jobs.state import ROW_GROUP_ROWS, read_data_file
from jobs.storage import parquet_errors
from jobs.store import Store
from jobs.tasks import gather

TEXT_CHARS = 160
TASK_GROUPS = 16  # row groups of ids.parquet that a task looks into, one at a time

Int64Array = npt.NDArray[np.int64]
Place = tuple[int, int]
"""Number of a data file, and of a row in it."""
IdsRows = dict[int, dict[str, Any]]
"""By vector id: product_id, image_number, image_uri and metadata, as `ids.parquet` has them, all of
it or what may be a title, and the title."""


@dataclass(frozen=True, kw_only=True)
class CatalogRow:
    """A row (product image) of the catalog, as a report shows it.

    Attributes:
        text: What is embedded, its beginning.
        uri: The image's URI; None where the catalog has none, or the image itself.
        picture: Of an image that lies in the catalog; None: it is to be fetched.
    """

    product_id: str
    image_number: int
    text: str
    uri: str | None
    picture: Picture | None


def read_places(store: Store, names: list[str], places: Iterable[Place]) -> dict[Place, Any]:
    """Read product_id, vector_id and reject_detail of rows of the embeddings table.

    Args:
        store: The store.
        names: All data files of the table's version.
        places: Which rows.

    Raises:
        StoreError: A data file is missing or damaged.
    """
    by_file: dict[int, list[int]] = defaultdict(list)
    for file, row in sorted(set(places)):
        by_file[file].append(row)
    found = gather([_read_file.remote(store, names[f], rows) for f, rows in by_file.items()])
    return {
        (file, row): told
        for (file, rows), tolds in zip(by_file.items(), found, strict=True)
        for row, told in zip(rows, tolds, strict=True)
    }


@ray.remote(num_cpus=1)
def _read_file(store: Store, file: str, rows: list[int]) -> list[dict[str, Any]]:
    table = read_data_file(store, file, ["product_id", "vector_id", "reject_detail"])
    return plain_rows(table.take(pa.array(rows)))


def find_units(plan: Plan, vector_ids: Collection[int]) -> dict[int, int]:
    """Return the catalog's unit of each vector id that the scanned catalog has."""
    if not vector_ids:
        return {}
    wanted = np.array(sorted(vector_ids), np.int64)
    buckets = np.unique(number_buckets(wanted, plan.buckets)).tolist()
    found = gather([_find_units.remote(wanted, *plan.parts[number]) for number in buckets])
    return {vector_id: unit for pairs in found for vector_id, unit in pairs}


@ray.remote(num_cpus=1)
def _find_units(wanted: Int64Array, *parts: Records) -> list[tuple[int, int]]:
    kept = [rows[np.isin(rows["vector_id"], wanted)] for rows in parts]
    return [(int(row["vector_id"]), int(row["unit"])) for rows in kept for row in rows]


def read_catalog_rows(
    catalog: Catalog, recipe: str, units: dict[int, int], images: ImagesConfig
) -> dict[int, CatalogRow]:
    """Read rows of the catalog; an image that lies in it is made a thumbnail where it is read.

    Args:
        catalog: The checked catalog.
        recipe: See `jobs.space.VectorSpace.recipe`.
        units: By vector id, the unit to read.
        images: Limits.

    Returns:
        By vector id; without what is in the catalog no more.

    Raises:
        CatalogError: A file is missing or damaged.
    """
    by_unit: dict[int, set[int]] = defaultdict(set)
    for vector_id, unit in units.items():
        by_unit[unit].add(vector_id)
    described = ray.put(catalog) if by_unit else None
    calls = [_read_unit.remote(described, recipe, *one, images) for one in by_unit.items()]
    return {vector_id: row for found in gather(calls) for vector_id, row in found.items()}


@ray.remote(num_cpus=1)
def _read_unit(
    catalog: Catalog, recipe: str, unit: int, wanted: set[int], images: ImagesConfig
) -> dict[int, CatalogRow]:
    found: dict[int, CatalogRow] = {}
    for items in read_items(catalog, catalog.units[unit], recipe):
        found |= {one.vector_id: _show(one, images) for one in items if one.vector_id in wanted}
        if len(found) == len(wanted):
            break
    return found


def _show(item: Item, images: ImagesConfig) -> CatalogRow:
    stored = item.image if isinstance(item.image, bytes) else None
    return CatalogRow(
        product_id=item.product_id,
        image_number=item.image_number,
        text=item.text[:TEXT_CHARS],
        uri=item.image_uri,
        picture=make_picture(stored, images, THUMBNAIL_PX) if stored else None,
    )


def read_ids(
    store: Store,
    folder: str,
    vector_ids: Collection[int],
    titles: Sequence[str],
    *,
    whole: bool = False,
) -> IdsRows:
    """Read rows of the `ids.parquet` of an index version; of ids that it lacks there is none.

    Args:
        store: The store.
        folder: Of the index version, below `indexes/`.
        vector_ids: Which rows.
        titles: See `title_columns`.
        whole: Whether to read all metadata; else the title alone.

    Raises:
        StoreError: The file or the manifest is missing or damaged.
    """
    if not vector_ids:
        return {}
    entry = store.read_json("indexes", folder, "manifest.json")["ids"]
    columns = None if whole else [*KEYS.names, *(f"metadata.{name}" for name in titles)]
    wanted, count = sorted(vector_ids), -(-entry["rows"] // ROW_GROUP_ROWS)
    parts = (range(n, min(n + TASK_GROUPS, count)) for n in range(0, count, TASK_GROUPS))
    found = gather([_read_ids.remote(store, entry, wanted, columns, part) for part in parts])
    rows: list[dict[str, Any]] = [{"metadata": None} | row for part in found for row in part]
    return {row["vector_id"]: row | {"title": title_of(row, titles)} for row in rows}


@ray.remote(num_cpus=1)
def _read_ids(
    store: Store,
    entry: dict[str, Any],
    wanted: Sequence[int],
    columns: list[str] | None,
    groups: range,
) -> list[dict[str, Any]]:
    """Read those of some row groups that hold a wanted id: the file is sorted by id."""
    address, ids = store.uri("indexes", entry["folder"], entry["file"]), np.array(wanted, np.int64)
    rows: list[dict[str, Any]] = []
    with parquet_errors(address), store.filesystem().open(address, "rb") as handle:
        parquet = pq.ParquetFile(handle)
        column = KEYS.get_field_index("vector_id")  # before any column that is nested
        for number in groups:
            bounds = parquet.metadata.row_group(number).column(column).statistics
            low, high = np.searchsorted(ids, bounds.min), np.searchsorted(ids, bounds.max, "right")
            if low < high:
                table = parquet.read_row_group(number, columns=columns)
                kept = pc.is_in(table["vector_id"], pa.array(ids[low:high]))
                rows += plain_rows(table.filter(kept))
    return rows
