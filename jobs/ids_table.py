"""Opens what each vector id of a release is: random look-ups, memory-mapped, for serving.

Letters: N rows, M of them.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import acero, ipc

from jobs.errors import JobError
from jobs.ids_cache import cache_ids
from jobs.plain import plain_rows
from jobs.schemas import IMAGE_BITS, product_hash
from jobs.state import ROW_GROUP_ROWS
from jobs.store import Store

Int64Array = npt.NDArray[np.int64]
BLOCK_ROWS: Final = 2**20  # about; a range of ids holds 15 000 rows of a billion


class Ids:
    """What each vector id of a release is; finds rows with a binary search. Thread-safe.

    A row is a dict: vector_id, product_id, image_number, image_uri, metadata.

    Attributes:
        columns: Names of the metadata columns.
    """

    def __init__(self, path: Path) -> None:
        """Map an Arrow file that `cache_ids` made."""
        reader = ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        empty = pa.RecordBatch.from_pylist([], schema=reader.schema)
        self._batches = [batch for batch in batches if len(batch)] or [empty]
        self._ids: list[Int64Array] = [batch["vector_id"].to_numpy() for batch in self._batches]
        self._products = [batch["product_id"] for batch in self._batches]
        self._firsts = np.array([ids[0] if len(ids) else 0 for ids in self._ids], np.int64)
        self._starts = np.cumsum([0, *map(len, self._ids)])
        self._empty = empty
        self.columns: list[str] = [field.name for field in reader.schema.field("metadata").type]

    @classmethod
    def open(
        cls, store: Store, entry: dict[str, Any], cache: Path, *, batch_rows: int = ROW_GROUP_ROWS
    ) -> "Ids":
        """Open a release's `ids.parquet`; the cache's copy if there is one.

        Args:
            store: The store.
            entry: The manifest's entry `ids`.
            cache: A local folder that processes may share, as `machine_cache` names one.
            batch_rows: Rows of a batch in the Arrow file.

        Raises:
            StoreError: The file is missing or corrupted, or the cache can't be written.
        """
        return cls(cache_ids(store, entry, cache, batch_rows))

    def __len__(self) -> int:
        """Return N."""
        return int(self._starts[-1])

    def find(self, vector_ids: Int64Array) -> list[dict[str, Any]]:
        """Return the rows of vector ids (M,) int64, in their order.

        Raises:
            ValueError: An id is not in the table: index and table are not of one release.
        """
        return self._rows(*self._locate(vector_ids))

    def products(self, vector_ids: Int64Array) -> list[str]:
        """Return the product ids of vector ids (M,) int64, in their order; quicker than `find`.

        Raises:
            ValueError: As in `find`.
        """
        return [
            self._products[batch][row].as_py() for batch, row in _pairs(*self._locate(vector_ids))
        ]

    def present(self, vector_ids: Int64Array) -> Int64Array:
        """Return those of vector ids (M,) int64 that are in the table."""
        batches, rows = self._search(vector_ids, "left")
        there = [
            row < len(self._ids[batch]) and self._ids[batch][row] == wanted
            for wanted, (batch, row) in zip(vector_ids.tolist(), _pairs(batches, rows), strict=True)
        ]
        known: Int64Array = vector_ids[np.array(there, bool)]
        return known

    def select(self, predicate: pc.Expression) -> Int64Array:
        """Return the vector ids whose row satisfies a predicate; reads the columns that it names.

        Args:
            predicate: Over metadata columns by name, as in `pc.field("price") < 20`, and over
                `vector_id`, `product_id`, `image_number` and `image_uri` where the metadata has
                no column of that name. Where it gives null it is not satisfied.

        Returns:
            (M,) int64, sorted.

        Raises:
            JobError: A column is unknown, the types don't fit, or it gives no bool.
        """
        try:
            kind = _evaluate(_flatten(self._empty), predicate).type
            if not pa.types.is_boolean(kind):
                raise JobError(f"the filter {predicate} gives {kind}, expected bool")
            found = [
                ids[_to_mask(_evaluate(_flatten(batch), predicate))]
                for ids, batch in zip(self._ids, self._batches, strict=True)
            ]
        except pa.ArrowException as error:
            reason = str(error).partition("\n")[0].partition(" in vector_id: ")[0]  # no schema
            names = ", ".join(_flatten(self._empty).column_names)
            raise JobError(
                f"the filter {predicate} can't be used: {reason}; the columns are {names}"
            ) from error
        return np.concatenate([np.zeros(0, np.int64), *found])

    def select_products(self, products: Collection[str]) -> Int64Array:
        """Return the vector ids (M,) int64 of products, sorted; the release may lack some."""
        batches, rows, _ = self._images(sorted(set(products)))
        found = np.zeros(len(rows), np.int64)
        for batch, mine in _group(batches):
            found[mine] = self._ids[batch][rows[mine]]
        return np.sort(found)

    def first_rows(self, products: Collection[str]) -> dict[str, dict[str, Any]]:
        """Return the row of the first live image of every product that the release has.

        Args:
            products: Product ids; the release may lack some.

        Returns:
            Rows by product id; `metadata` is a dict, never None.
        """
        batches, rows, owners = self._images(sorted(set(products)))
        numbers = np.zeros(len(rows), np.int64)
        for batch, mine in _group(batches):
            column = self._batches[batch]["image_number"]
            numbers[mine] = column.take(pa.array(rows[mine])).to_numpy()
        order = np.lexsort((numbers, owners))
        first = order[np.unique(owners[order], return_index=True)[1]]
        found = self._rows(batches[first], rows[first])
        return {row["product_id"]: row | {"metadata": row["metadata"] or {}} for row in found}

    def sample_rows(self, count: int) -> list[dict[str, Any]]:
        """Return at most so many rows, evenly spaced, in the order of their vector ids."""
        size = len(self)
        places = np.unique(np.linspace(0, size - 1, min(count, size)).astype(np.int64))
        return self._rows(*self._divide(places))

    def _locate(self, vector_ids: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the batch of each id, and its row there, both (M,) int64.

        Raises:
            ValueError: An id is not in the table.
        """
        batches, rows = self._search(vector_ids, "left")
        for wanted, (batch, row) in zip(vector_ids.tolist(), _pairs(batches, rows), strict=True):
            ids = self._ids[batch]
            if row == len(ids) or ids[row] != wanted:
                raise ValueError(f"vector id {wanted} is not in ids.parquet")
        return batches, rows

    def _search(
        self, wanted: Int64Array, side: Literal["left", "right"]
    ) -> tuple[Int64Array, Int64Array]:
        """Return where ids would be inserted: the batch, and the row in [0, its rows]."""
        batches = np.maximum(np.searchsorted(self._firsts, wanted, "right") - 1, 0)
        rows = np.zeros(len(wanted), np.int64)
        for batch, mine in _group(batches):
            rows[mine] = np.searchsorted(self._ids[batch], wanted[mine], side)
        return batches, rows

    def _divide(self, places: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the batch and the row there of places in [0, N)."""
        batches = np.searchsorted(self._starts, places, "right") - 1
        return batches, places - self._starts[batches]

    def _images(self, products: list[str]) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return batch, row and place in `products` of every image of theirs, each (M,) int64.

        The upper bits of a vector id are its product's, so that its images are a range.
        """
        lows = np.array([product_hash(one) for one in products], np.int64)
        lows = lows >> IMAGE_BITS << IMAGE_BITS
        batches, rows = self._search(lows, "left")
        starts = self._starts[batches] + rows
        batches, rows = self._search(lows | (1 << IMAGE_BITS) - 1, "right")
        counts = self._starts[batches] + rows - starts
        names, found = pa.array(products, pa.string()), [np.zeros((3, 0), np.int64)]
        for _, mine in _group((np.cumsum(counts) - counts) // BLOCK_ROWS):
            found.append(self._own_images(names, mine, starts[mine], counts[mine]))
        batches, rows, owners = np.hstack(found)
        return batches, rows, owners

    def _own_images(
        self, names: pa.StringArray, places: Int64Array, starts: Int64Array, counts: Int64Array
    ) -> Int64Array:
        """Return what `_images` does, (3, M), of the products at some places in `names`.

        Args:
            names: Product ids.
            places: (P,), of the products in `names`.
            starts: (P,) places in [0, N): where each one's range begins.
            counts: (P,) rows of its range; two products may share it, so names are compared.
        """
        owners = np.repeat(np.arange(len(places)), counts)
        offsets = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        batches, rows = self._divide(starts[owners] + offsets)
        owners = places[owners]
        kept = np.zeros(len(owners), bool)
        for batch, mine in _group(batches):
            found = self._products[batch].take(pa.array(rows[mine]))
            kept[mine] = _to_mask(pc.equal(found, names.take(pa.array(owners[mine]))))
        return np.stack((batches[kept], rows[kept], owners[kept]))

    def _rows(self, batches: Int64Array, rows: Int64Array) -> list[dict[str, Any]]:
        """Return rows as dicts, in the order that they are given in."""
        slices = [self._batches[batch].slice(row, 1) for batch, row in _pairs(batches, rows)]
        return plain_rows(pa.Table.from_batches([self._empty, *slices]))


def _pairs(batches: Int64Array, rows: Int64Array) -> Iterator[tuple[int, int]]:
    return zip(batches.tolist(), rows.tolist(), strict=True)


def _group(batches: Int64Array) -> Iterator[tuple[int, Int64Array]]:
    """Yield each batch that is named in (M,) int64, and where it is."""
    order = np.argsort(batches, kind="stable")
    ends = np.flatnonzero(np.diff(batches[order], append=-1)) + 1
    start = 0
    for end in ends.tolist():
        yield int(batches[order[start]]), order[start:end]
        start = end


def _to_mask(values: pa.Array) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return mask


def _flatten(batch: pa.RecordBatch) -> pa.Table:
    """Return the metadata's columns, and the keys that don't bear the name of one."""
    names = [field.name for field in batch.schema.field("metadata").type]
    columns = dict(zip(names, batch["metadata"].flatten(), strict=True))
    keys = {name: batch[name] for name in batch.schema.names if name != "metadata"}
    return pa.table(keys | columns)


def _evaluate(table: pa.Table, predicate: pc.Expression) -> pa.ChunkedArray:
    """Return an expression's value in every row, in their order; no other column is copied."""
    steps = [
        acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
        acero.Declaration("project", acero.ProjectNodeOptions([predicate], ["value"])),
    ]
    return acero.Declaration.from_sequence(steps).to_table(use_threads=False)["value"]
