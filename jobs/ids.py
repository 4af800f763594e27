"""Writes what each vector id of a release is.

`ids.parquet` is for serving: the product, the image, that night's metadata. `rows.parquet` is for
the next refresh, for exact search and export: which row of the embeddings table is live. Both are
sorted by `vector_id`, and row N of one is row N of the other.
"""

import json
import shutil
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jobs.buckets import number_buckets, scatter, turn
from jobs.catalog import Catalog
from jobs.diff import Plan
from jobs.errors import CatalogError
from jobs.items import read_unit
from jobs.live import Live
from jobs.outputs import regroup
from jobs.schemas import vector_id
from jobs.state import ROW_GROUP_ROWS, locate
from jobs.storage import file_sha256
from jobs.store import Store, scratch_folder
from jobs.tasks import gather

KEYS = pa.schema(
    [
        pa.field("vector_id", pa.int64()),
        pa.field("product_id", pa.string()),
        pa.field("image_number", pa.int32()),
        pa.field("image_uri", pa.string()),
    ]
)
ROWS = pa.schema(
    [
        pa.field("vector_id", pa.int64()),
        pa.field("generation", pa.int64()),
        pa.field("metadata_hash", pa.int64()),
        pa.field("file", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("first", pa.bool_()),
    ]
)
"""`file` counts in the list of data files that the schema's metadata holds under `files`."""


def write_ids(
    catalog: Catalog, plan: Plan, live: Live, store: Store, folder: str
) -> dict[str, dict[str, Any]]:
    """Write `ids.parquet` and `rows.parquet`, one row a live vector, sorted by `vector_id`.

    The rows pass through Ray's object store and, a bucket at a time, through the memory of one
    task.

    Args:
        catalog: Read again for its metadata: price and stock are tonight's.
        plan: The scanned catalog.
        live: The live rows.
        store: Where to write.
        folder: Name below `indexes/`.

    Returns:
        The manifest's entries `ids` and `rows`: folder, file, sha256, rows.

    Raises:
        CatalogError: Live rows are in the catalog no more.
    """
    most_images = live.rows.most_images
    described = ray.put(catalog)
    heads, parts = scatter(_read_group, plan.groups, plan.buckets, described, most_images)
    schemas = gather(heads)
    metadata = pa.unify_schemas(schemas, promote_options="permissive")
    tables = turn(parts, plan.buckets)
    written = _write.remote(store, folder, metadata, live.buckets, live.names, tables)
    entries: dict[str, dict[str, Any]] = gather([written])[0]
    return entries


@ray.remote(num_cpus=1)
def _read_group(catalog: Catalog, most_images: int, units: range, buckets: int) -> tuple[Any, ...]:
    """Return the schema of a group's metadata, and its rows by bucket."""
    product, image = catalog.columns["product_id"], catalog.columns.get("image")
    wanted = [product, *catalog.metadata]
    if image is not None and not catalog.has_bytes:
        wanted.append(image)
    numbers = most_images if catalog.has_bytes else 1
    names = list(dict.fromkeys(wanted))
    tables = (
        _expand(table, product, image, numbers)
        for number in units
        for _, table in read_unit(catalog, catalog.units[number], names)
    )
    parts: list[list[pa.Table]] = [[] for _ in range(buckets)]
    for table in _gather_rows(tables):
        for number, part in _split(table, buckets):
            parts[number].append(part)
    schema = pa.unify_schemas([p.schema for ps in parts for p in ps], promote_options="permissive")
    empty = schema.empty_table()
    joined = [pa.concat_tables([empty, *ps], promote_options="permissive") for ps in parts]
    return schema, *joined


def _gather_rows(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of some `ROW_GROUP_ROWS`.

    Each is taken from by itself: a column of strings that is taken from as a whole ends at 2 GiB.
    """
    waiting: list[pa.Table] = []
    for table in chain(tables, [None]):
        waiting += [] if table is None else [table]
        if waiting and (table is None or sum(map(len, waiting)) >= ROW_GROUP_ROWS):
            yield pa.concat_tables(waiting, promote_options="permissive")
            waiting = []


def _split(table: pa.Table, buckets: int) -> Iterator[tuple[int, pa.Table]]:
    keys = number_buckets(table["vector_id"].to_numpy(), buckets)
    order = np.argsort(keys, kind="stable")
    ends = np.searchsorted(keys[order], np.arange(buckets + 1)).tolist()
    ordered = table.take(pa.array(order))
    for number, (low, high) in enumerate(pairwise(ends)):
        if high > low:
            yield number, ordered.slice(low, high - low)


def _expand(table: pa.Table, product: str, image: str | None, numbers: int) -> pa.Table:
    """Return one row an image; where images are bytes, not read again, as many as any has."""
    uris = table[image].to_pylist() if image in table.column_names else [None] * len(table)
    rows: list[tuple[int, str, int, str | None]] = []
    places: list[int] = []
    for place, name in enumerate(table[product].to_pylist()):
        uri = uris[place]
        listed: list[str | None] = list(uri) if isinstance(uri, list) else [uri]
        for number in range(max(numbers, len(listed))):
            address = listed[number] if number < len(listed) else None
            rows.append((vector_id(name, number), name, number, address))
            places.append(place)
    keys = list(zip(*rows, strict=True)) or [(), (), (), ()]
    arrays = [pa.array(k, field.type) for k, field in zip(keys, KEYS, strict=True)]
    taken = table.select([n for n in table.column_names if n != image]).take(
        pa.array(places, pa.int64())
    )
    columns = [taken[name].combine_chunks() for name in taken.column_names]
    metadata = pa.StructArray.from_arrays(columns, names=taken.column_names)
    return pa.table(dict(zip(KEYS.names, arrays, strict=True)) | {"metadata": metadata})


@ray.remote(num_cpus=1)
def _write(
    store: Store,
    folder: str,
    schema: pa.Schema,
    live: list[Any],
    files: list[str],
    tables: list[list[Any]],
) -> dict[str, dict[str, Any]]:
    scratch = scratch_folder("ids")
    try:
        ids = _write_file(scratch / "ids.parquet", schema, _live_ids(schema, live, tables))
        described = ROWS.with_metadata({"files": json.dumps(files)})
        rows = _write_file(scratch / "rows.parquet", described, _live_rows(live))
        for name in ("ids.parquet", "rows.parquet"):
            store.upload(scratch / name, "indexes", folder, name)
        return {"ids": {"folder": folder} | ids, "rows": {"folder": folder} | rows}
    finally:
        shutil.rmtree(scratch)


def _live_ids(schema: pa.Schema, live: list[Any], tables: list[list[Any]]) -> Iterator[pa.Table]:
    """Yield the catalog's rows that are live, a bucket at a time, sorted.

    Raises:
        CatalogError: A live row isn't among them.
    """
    for references, parts in zip(live, tables, strict=True):
        wanted = ray.get(references)["vector_id"]
        found = pa.concat_tables(
            [schema.empty_table(), *ray.get(parts)], promote_options="permissive"
        )
        ids = found["vector_id"].to_numpy()
        kept = np.flatnonzero(locate(wanted, ids)[1])
        kept = kept[np.argsort(ids[kept], kind="stable")]
        if not np.array_equal(ids[kept], wanted):
            raise CatalogError(
                f"the catalog changed while it was read: of {len(wanted)} live rows "
                f"{len(kept)} were found again; run the refresh again"
            )
        for start in range(0, len(kept), ROW_GROUP_ROWS):
            yield found.take(pa.array(kept[start : start + ROW_GROUP_ROWS])).cast(schema)


def _live_rows(live: list[Any]) -> Iterator[pa.Table]:
    for reference in live:
        rows = ray.get(reference)
        columns = {name: pa.array(rows[name]) for name in ROWS.names}
        yield pa.table(columns, ROWS)


def _write_file(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> dict[str, Any]:
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in regroup(tables, schema, ROW_GROUP_ROWS):  # readers count row groups by it
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            count += table.num_rows
    return {"file": path.name, "sha256": file_sha256(path), "rows": count}
