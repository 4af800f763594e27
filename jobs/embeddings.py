"""Loads a release's embeddings as Arrow, for notebooks and for other databases.

No Ray is started. A release's own tables say which rows it has; vectors are read a data file at a
time, and ids and metadata are mapped from the file on this machine that searching maps too.

Letters: N rows, D dimension.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import ipc

from jobs.contract import read_contract
from jobs.errors import StoreError
from jobs.export_layout import (
    KEY_COLUMNS,
    ExportOptions,
    Layout,
    product_column,
    resolve_layout,
    vector_column,
)
from jobs.ids_cache import cache_ids
from jobs.live import LIVE_DTYPE
from jobs.release_files import read_file_names
from jobs.search import FIELD_ORDER
from jobs.state import ROW_GROUP_ROWS, read_row_groups, rows_address
from jobs.storage import machine_cache
from jobs.store import Release, Store
from jobs.vectors import read_blocks

Int64Array = npt.NDArray[np.int64]


def load_embeddings(
    store: Store | str | PathLike[str],
    release: int | None = None,
    *,
    field: str | None = None,
    columns: Sequence[str] | None = (),
) -> pa.Table:
    """Load the vectors of one field of a release, with what they belong to.

    Memory: N * (4 * D + 60) bytes and the metadata columns: 2.1 GB of a million products with 512
    dimensions (text ids and addresses of usual length). `iter_embeddings` holds a part at a time.

    Args:
        store: The store, or its address: a folder or `s3://bucket/prefix`.
        release: A release's version; the newest if None.
        field: Whose vectors: image, text or multimodal; the one that is searched by default if
            None.
        columns: Metadata columns to take along, as they were in the catalog when the release was
            made; all if None.

    Returns:
        A row for each vector that the field's index has: one an image of a product, for `text` one
        a product. Columns: `product_id`, `image_number`, `vector_id` int64, `image_uri`, the
        metadata columns, and `<field>_embedding`, a list of D float32, of unit length. The rows
        have no order.

    Raises:
        StoreError: There is no such release, or it is damaged.
        ConfigError: It has no such field or column.
    """
    return iter_embeddings(store, release, field=field, columns=columns).read_all()


def iter_embeddings(
    store: Store | str | PathLike[str],
    release: int | None = None,
    *,
    field: str | None = None,
    columns: Sequence[str] | None = (),
) -> pa.RecordBatchReader:
    """Iterate over what `load_embeddings` loads, for what doesn't fit in memory.

    Memory: 40 bytes a row of the release, and the vectors of one data file of the store.

    Args:
        store: As of `load_embeddings`, like the others.
        release: A release's version.
        field: Whose vectors.
        columns: Metadata columns.

    Returns:
        An iterator over record batches, none of them empty; its `schema` is that of the table.
        DuckDB, Polars, LanceDB and others read it as it is, once.

    Raises:
        StoreError: As `load_embeddings`; while iterating, too.
        ConfigError: As `load_embeddings`.
    """
    opened = store if isinstance(store, Store) else Store(fspath(store))
    found = opened.release(release)
    source = _open_source(opened, found, field, columns)
    return pa.RecordBatchReader.from_batches(source.layout.schema, _read_batches(source))


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A release, opened to be read.

    Attributes:
        layout: Which columns, and the one field.
        ids: The mapped file of ids and metadata.
        files: Names of data files, in the order that `rows` counts them.
        rows: (N,) `LIVE_DTYPE` of the field's rows, by data file and vector id.
        places: (N,) int64: the row of each in `ids`.
    """

    store: Store
    layout: Layout
    ids: ipc.RecordBatchFileReader
    files: list[str]
    rows: npt.NDArray[np.void]
    places: Int64Array


def _open_source(
    store: Store, release: Release, field: str | None, columns: Sequence[str] | None
) -> _Source:
    manifest = store.read_json("indexes", release.indexes, "manifest.json")
    if "rows" not in manifest:
        raise StoreError(
            f"{store.root} is a copy for serving, without embeddings: name the store that it was "
            "exported from"
        )
    path = cache_ids(store, manifest["ids"], machine_cache() / "ids", ROW_GROUP_ROWS)
    ids = ipc.open_file(pa.memory_map(str(path)))
    space = read_contract(manifest["query"])
    named = field or next(name for name in FIELD_ORDER if name in space.fields)
    options = ExportOptions(
        to="",
        fields=(named,),
        columns=None if columns is None else tuple(columns),
        dtype="float32",
    )
    layout = resolve_layout(options, space, ids.schema, product_column(manifest))
    address = rows_address(store, release)
    rows, places = _read_rows(store, address, release, only_first=named == "text")
    files = read_file_names(store, address)
    return _Source(store=store, layout=layout, ids=ids, files=files, rows=rows, places=places)


def _read_rows(
    store: Store, address: str, release: Release, *, only_first: bool
) -> tuple[npt.NDArray[np.void], Int64Array]:
    """Read where the vectors of a release lie, and the row of each in its tables."""
    names = ["vector_id", "file", "row", "first"]
    groups = range(-(-release.vectors // ROW_GROUP_ROWS))
    table = read_row_groups(store, address, groups, names)
    if len(table) != release.vectors:
        raise StoreError(f"{address} has {len(table):,} rows, expected {release.vectors:,}")
    first = table["first"].to_numpy()
    places = np.flatnonzero(first) if only_first else np.arange(len(table))
    places = places[np.argsort(table["file"].to_numpy()[places], kind="stable")]
    rows = np.zeros(len(places), [(name, LIVE_DTYPE[name]) for name in names])
    for name in names:
        rows[name] = table[name].to_numpy()[places]
    return rows, places.astype(np.int64)


def _read_batches(source: _Source) -> Iterator[pa.RecordBatch]:
    """Yield the rows of one data file after the other."""
    (field,) = source.layout.fields
    starts = np.cumsum(
        [0, *(len(source.ids.get_batch(n)) for n in range(source.ids.num_record_batches))]
    )
    bounds = np.flatnonzero(np.diff(source.rows["file"], prepend=-1, append=-1))
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        rows, places = source.rows[low:high], source.places[low:high]
        ((ids, vectors),) = read_blocks(source.store, field, (0, source.files), rows)
        table = _take(source, starts, places)
        if not np.array_equal(table["vector_id"].to_numpy(), ids):
            raise StoreError(f"{source.store.root}: ids and rows are not of one release")
        kind = source.layout.schema.field(vector_column(field.name)).type
        packed = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=kind)
        table = table.append_column(vector_column(field.name), packed)
        yield from table.cast(source.layout.schema).combine_chunks().to_batches(ROW_GROUP_ROWS)


def _take(source: _Source, starts: Int64Array, places: Int64Array) -> pa.Table:
    """Return rows of the mapped file: keys and metadata columns, in the order of (N,) places."""
    batches = np.searchsorted(starts, places, "right") - 1
    parts = []
    for number in np.unique(batches).tolist():  # places rise
        batch = source.ids.get_batch(number)
        mine = pa.array(places[batches == number] - starts[number])
        names = [field.name for field in batch["metadata"].type]
        shown = dict(zip(names, batch["metadata"].flatten(), strict=True))
        columns = {name: batch[name].take(mine) for name in KEY_COLUMNS}
        columns |= {name: shown[own].take(mine) for own, name in source.layout.metadata}
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)
