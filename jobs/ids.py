"""Writes and reads `ids.parquet`: what each vector id is, with that night's metadata."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jobs.catalog import Catalog, Unit
from jobs.cluster import gather
from jobs.diff import locate
from jobs.items import read_unit
from jobs.schemas import vector_id
from jobs.store import Store, scratch_folder

KEYS = ("vector_id", "product_id", "image_number", "image_uri")


def write_ids(
    catalog: Catalog, live: npt.NDArray[np.int64], most_images: int, store: Store, folder: str
) -> dict[str, Any]:
    """Write one row a live vector, sorted by `vector_id`; metadata is the struct `metadata`.

    The rows, metadata included, pass through the memory of one Ray task, not of this process.

    Args:
        catalog: Read again for its metadata: price and stock are tonight's.
        live: (N,) sorted vector ids.
        most_images: The most images of any product.
        store: Where to write.
        folder: Name below `indexes/`.

    Returns:
        The manifest's entry: file, sha256, rows.
    """
    reference, described = ray.put(live), ray.put(catalog)
    parts = [_unit_ids.remote(described, unit, reference, most_images) for unit in catalog.units]
    entry: dict[str, Any] = gather([_write.remote(store, folder, *parts)])[0]
    return entry


@ray.remote(num_cpus=1)
def _unit_ids(
    catalog: Catalog, unit: Unit, live: npt.NDArray[np.int64], most_images: int
) -> pa.Table:
    product, image = catalog.columns["product_id"], catalog.columns.get("image")
    wanted = [product, *catalog.metadata]
    if image is not None and not catalog.has_bytes:
        wanted.append(image)
    tables = [
        _select(table, product, image, live, most_images if catalog.has_bytes else 0)
        for _, table in read_unit(catalog, unit, list(dict.fromkeys(wanted)))
    ]
    return pa.concat_tables(tables, promote_options="permissive")


def _select(
    table: pa.Table,
    product: str,
    image: str | None,
    live: npt.NDArray[np.int64],
    numbers: int,
) -> pa.Table:
    """Return one row a live vector; where images are bytes, not read again, try all numbers."""
    uris = table[image].to_pylist() if image in table.column_names else [None] * len(table)
    rows: list[tuple[int, str, int, str | None]] = []
    places: list[int] = []
    for place, name in enumerate(table[product].to_pylist()):
        found = _live_images(name, uris[place], numbers, live)
        rows += found
        places += [place] * len(found)
    keys = list(zip(*rows, strict=True)) or [(), (), (), ()]
    types = (pa.int64(), pa.string(), pa.int32(), pa.string())
    arrays = [pa.array(k, t) for k, t in zip(keys, types, strict=True)]
    taken = table.select([n for n in table.column_names if n not in (image,)]).take(
        pa.array(places, pa.int64())
    )
    columns = [taken[name].combine_chunks() for name in taken.column_names]
    metadata = pa.StructArray.from_arrays(columns, names=taken.column_names)
    return pa.table(dict(zip(KEYS, arrays, strict=True)) | {"metadata": metadata})


def _live_images(
    product_id: str, uris: list[str] | str | None, least_numbers: int, live: npt.NDArray[np.int64]
) -> list[tuple[int, str, int, str | None]]:
    """Return (vector id, product id, image number, URI) of a product's live images."""
    listed: list[str | None] = list(uris) if isinstance(uris, list) else [uris]
    numbers = range(max(1, least_numbers, len(listed)))
    ids = np.array([vector_id(product_id, number) for number in numbers], np.int64)
    _, there = locate(live, ids)
    return [
        (int(ids[n]), product_id, n, listed[n] if n < len(listed) else None)
        for n in numbers
        if there[n]
    ]


@ray.remote(num_cpus=1)
def _write(store: Store, folder: str, *parts: pa.Table) -> dict[str, Any]:
    table = pa.concat_tables(parts, promote_options="permissive").sort_by("vector_id")
    path = scratch_folder("ids") / "ids.parquet"
    pq.write_table(table, path, compression="zstd", row_group_size=65_536)
    sha256 = _sha256(path)
    store.upload(path, "indexes", folder, path.name)
    path.unlink()
    path.parent.rmdir()
    return {"file": path.name, "sha256": sha256, "rows": table.num_rows}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Ids:
    """The opened table: finds rows by vector id with a binary search."""

    def __init__(self, path: Path, *, sha256: str) -> None:
        """Open a local `ids.parquet`.

        Raises:
            ValueError: The file is corrupted.
        """
        found = _sha256(path)
        if found != sha256:
            raise ValueError(f"{path.name} is corrupted: sha256 {found}, expected {sha256}")
        self.table = pq.read_table(path, memory_map=True)
        self.vector_id = self.table["vector_id"].to_numpy()

    def find(self, vector_ids: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the rows of vector ids, in their order.

        Raises:
            ValueError: An id is not in the table: index and table are not of one release.
        """
        places, known = locate(self.vector_id, vector_ids)
        if not known.all():
            raise ValueError(f"vector id {vector_ids[~known][0]} is not in ids.parquet")
        rows: list[dict[str, Any]] = self.table.take(places).to_pylist()
        return rows
