"""Compares the catalog with the embeddings table: what is new, changed, removed.

Resuming is this diff: rows are committed while a job runs, so a job that starts again finds them
unchanged. The driver keeps 28 bytes a catalog row and 33 a table row, and never a vector.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import ray

from jobs.catalog import Catalog, Unit
from jobs.cluster import cluster_cpus, gather_bounded
from jobs.errors import FingerprintError
from jobs.images import RejectReason
from jobs.items import PLAN_DTYPE, check_unique, scan_unit
from jobs.schemas import DELETE, REJECT, UPSERT
from jobs.store import Store

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

OPERATIONS = {UPSERT: 0, DELETE: 1, REJECT: 2}
TRANSIENT_REJECT = 3
STATE_DTYPE = np.dtype(
    [
        ("vector_id", "<i8"),
        ("generation", "<i8"),
        ("content_hash", "<i8"),
        ("operation", "i1"),
        ("file", "<i4"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Diff:
    """What a refresh has to do, in rows (product images).

    Attributes:
        plan: (N,) records of `PLAN_DTYPE`, sorted by vector_id: the whole catalog.
        todo: (M,) vector ids to embed, sorted: new, changed, and rejected for a passing fault.
        removed: (R,) vector ids that are in the table and no longer in the catalog, sorted.
        generation: Number of the rows that this refresh will append.
    """

    plan: npt.NDArray[np.void]
    todo: Int64Array
    removed: Int64Array
    new: int
    changed: int
    unchanged: int
    retried: int
    generation: int


def scan_catalog(catalog: Catalog, recipe: str) -> npt.NDArray[np.void]:
    """Return every item's identity and content hash, read by Ray tasks.

    Returns:
        (N,) records of `PLAN_DTYPE`, sorted by vector_id, without repetition.

    Raises:
        CatalogError: A product id is null, empty or occurs twice.
    """
    reference = ray.put(catalog)

    def submit(unit: Unit) -> Any:  # noqa: ANN401 - Ray's references are untyped
        return _scan_unit.remote(reference, unit, recipe)

    parts = list(gather_bounded(submit, catalog.units, in_flight=4 * cluster_cpus()))
    plan = np.concatenate([np.empty(0, PLAN_DTYPE), *parts])
    plan.sort(order="vector_id")
    check_unique(catalog, plan)
    return plan


@ray.remote(num_cpus=1)
def _scan_unit(catalog: Catalog, unit: Unit, recipe: str) -> npt.NDArray[np.void]:
    return scan_unit(catalog, unit, recipe)


def read_state(store: Store, version: int, encoder: str) -> npt.NDArray[np.void]:
    """Return the newest row of every vector id in the embeddings table.

    Args:
        store: The store.
        version: Version of the embeddings table.
        encoder: Fingerprint that all rows must have.

    Returns:
        (N,) records of `STATE_DTYPE`, sorted by vector_id. `file` counts in
        `store.embedding_files(version)`.

    Raises:
        FingerprintError: A row was made by another encoder.
    """

    def submit(numbered: tuple[int, str]) -> Any:  # noqa: ANN401
        return _read_state.remote(store, *numbered, encoder)

    files = enumerate(store.embedding_files(version))
    parts = list(gather_bounded(submit, files, in_flight=4 * cluster_cpus()))
    rows = np.concatenate([np.empty(0, STATE_DTYPE), *parts])
    rows.sort(order=["vector_id", "generation"])
    newest = np.ones(len(rows), bool)
    newest[:-1] = rows["vector_id"][1:] != rows["vector_id"][:-1]
    return rows[newest]


@ray.remote(num_cpus=1)
def _read_state(store: Store, number: int, file: str, encoder: str) -> npt.NDArray[np.void]:
    names = ["vector_id", "generation", "content_hash", "operation", "encoder", "reject_reason"]
    table = read_data_file(store, file, names)
    others = [e for e in pc.unique(table["encoder"]).to_pylist() if e != encoder]
    if others:
        raise FingerprintError(
            f"store {store.root} holds embeddings of encoder {others[0][:12]}, the config names "
            f"{encoder[:12]}: use that encoder (encoder.checkpoint: "
            f"{store.uri('checkpoints', others[0])}) or another store"
        )
    rows = np.empty(table.num_rows, STATE_DTYPE)
    for name in ("vector_id", "generation", "content_hash"):
        rows[name] = table[name].to_numpy()
    transient = [reason.value for reason in RejectReason if reason.transient]
    retry = pc.fill_null(pc.is_in(table["reject_reason"], pa.array(transient)), False).to_numpy()
    code = pc.index_in(table["operation"], pa.array(list(OPERATIONS))).to_numpy()
    rows["operation"] = np.where(retry, TRANSIENT_REJECT, code)
    rows["file"] = number
    return rows


def read_data_file(store: Store, file: str, columns: list[str]) -> pa.Table:
    """Read columns of one data file of the embeddings table.

    Args:
        store: The store.
        file: As `store.embedding_files` lists it.
        columns: Names of `EMBEDDINGS`.
    """
    filesystem = store.filesystem()
    source = ds.dataset(
        filesystem._strip_protocol(store.uri("embeddings", file)),
        format="parquet",
        filesystem=filesystem,
    )
    return source.to_table(columns=columns)


def diff_catalog(plan: npt.NDArray[np.void], state: npt.NDArray[np.void]) -> Diff:
    """Compare the catalog with the newest rows of the table.

    Args:
        plan: (N,) from `scan_catalog`.
        state: (M,) from `read_state`.
    """
    place, known = locate(state["vector_id"], plan["vector_id"])
    if len(state):
        operation = np.where(known, state["operation"][place], OPERATIONS[DELETE])
        same = known & (state["content_hash"][place] == plan["content_hash"])
    else:
        operation = np.full(len(plan), OPERATIONS[DELETE])
        same = np.zeros(len(plan), bool)
    new = operation == OPERATIONS[DELETE]
    retried = same & (operation == TRANSIENT_REJECT)
    unchanged = same & ~new & ~retried
    _, listed = locate(plan["vector_id"], state["vector_id"])
    removed = ~listed & (state["operation"] != OPERATIONS[DELETE])
    return Diff(
        plan=plan,
        todo=plan["vector_id"][~unchanged],
        removed=state["vector_id"][removed],
        new=int(new.sum()),
        changed=int((~new & ~same).sum()),
        unchanged=int(unchanged.sum()),
        retried=int(retried.sum()),
        generation=int(state["generation"].max()) + 1 if len(state) else 1,
    )


def locate(sorted_ids: Int64Array, wanted: Int64Array) -> tuple[Int64Array, BoolArray]:
    """Find ids in a sorted array.

    Args:
        sorted_ids: (N,) int64, sorted, unique.
        wanted: (M,) int64.

    Returns:
        Places (M,) int64 in [0, max(N - 1, 0)], and whether each id is there (M,) bool.
    """
    if len(sorted_ids) == 0:
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    places = np.minimum(np.searchsorted(sorted_ids, wanted), len(sorted_ids) - 1)
    return places, sorted_ids[places] == wanted
