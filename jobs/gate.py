"""What a release must show before it is published: its bad rows, its figures, and the bars."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from jobs.cluster import cluster_cpus, gather_bounded
from jobs.config import GateConfig
from jobs.diff import locate, read_data_file
from jobs.embed_steps import NO_IMAGE_COLUMN
from jobs.index import FieldIndex
from jobs.queries import Measured
from jobs.schemas import REJECT, UPSERT
from jobs.store import Store
from jobs.vectors import Int64Array, LiveRows

EXAMPLES = 3
Summary = list[dict[str, Any]]
_Reasons = dict[str, tuple[int, list[dict[str, str]]]]


@dataclass(frozen=True, kw_only=True)
class Built:
    """An index version that no release names yet, and what was measured of it.

    Attributes:
        rejects: Rows that are not live, by reason.
        masked: Rows that are live without their image or their text, by reason.
    """

    embeddings_version: int
    live: LiveRows
    rejects: Summary
    masked: Summary
    indexes: list[FieldIndex]
    measured: Measured


def summarize_rows(
    store: Store, files: list[str], state: npt.NDArray[np.void], plan: npt.NDArray[np.void]
) -> tuple[Summary, Summary]:
    """Count the catalog's rows that are rejected now, and those that are live by one modality.

    Args:
        store: The store.
        files: The data files of the version that `state` was read of.
        state: (M,) from `jobs.diff.read_state`, after embedding.
        plan: (N,) from `jobs.diff.scan_catalog`.

    Returns:
        Rejects and masked rows, each one dict a reason, most rows first: reason, rows, examples
        (product_id, detail).
    """
    places, known = locate(state["vector_id"], plan["vector_id"])
    ids = ray.put(plan["vector_id"][known])
    generations = ray.put(state["generation"][places[known]] if len(state) else places[known])

    def submit(file: str) -> Any:  # noqa: ANN401 - Ray's references are untyped
        return _count_reasons.remote(store, file, ids, generations)

    totals: dict[str, Counter[str]] = {REJECT: Counter(), UPSERT: Counter()}
    examples: dict[tuple[str, str], list[dict[str, str]]] = {}
    for part in gather_bounded(submit, files, in_flight=2 * cluster_cpus()):
        for operation, reasons in part.items():
            for reason, (count, shown) in reasons.items():
                totals[operation][reason] += count
                examples.setdefault((operation, reason), []).extend(shown)
    rejects, masked = (
        [
            {"reason": reason, "rows": rows, "examples": examples[name, reason][:EXAMPLES]}
            for reason, rows in totals[name].most_common()
        ]
        for name in (REJECT, UPSERT)
    )
    return rejects, masked


@ray.remote(num_cpus=1)
def _count_reasons(
    store: Store, file: str, ids: Int64Array, generations: Int64Array
) -> dict[str, _Reasons]:
    """Return what is wrong with the newest rows of a file: {operation: {reason: …}}."""
    names = ["vector_id", "generation", "operation", "product_id", "reject_reason"]
    table = read_data_file(store, file, [*names, "reject_detail"])
    table = table.filter(pc.is_valid(table["reject_reason"]))
    places, known = locate(ids, table["vector_id"].to_numpy())
    if len(ids):
        known &= generations[places] == table["generation"].to_numpy()
    table = table.filter(pa.array(known))
    found: dict[str, _Reasons] = {}
    for operation in (REJECT, UPSERT):
        rows = table.filter(pc.equal(table["operation"], operation))
        counts = Counter(rows["reject_reason"].to_pylist())
        found[operation] = {r: (count, _examples(rows, r)) for r, count in counts.items()}
    return found


def _examples(table: pa.Table, reason: str) -> list[dict[str, str]]:
    # Where no product has a picture, the count says it all.
    telling = pc.and_(
        pc.equal(table["reject_reason"], reason),
        pc.not_equal(table["reject_detail"], NO_IMAGE_COLUMN),
    )
    rows = table.filter(telling).slice(0, EXAMPLES).to_pylist()
    return [{"product_id": row["product_id"], "detail": row["reject_detail"]} for row in rows]


def check_gate(gate: GateConfig, rows: int, built: Built) -> list[str]:
    """List every bar that was missed, with the figure; empty if all hold."""
    failures = []
    live = len(built.live.vector_id)
    share = built.live.rejected / rows
    if share > gate.max_reject_share:
        failures.append(
            f"{built.live.rejected} of {rows} rows rejected ({share:.1%}), "
            f"gate.max_reject_share is {gate.max_reject_share:.1%}"
        )
    if live + built.live.rejected != rows:
        failures.append(f"{rows} rows in, but {live} live and {built.live.rejected} rejected")
    if not live:
        failures.append("no row is live")
    for index in built.indexes:
        expected = len(built.live.select(index.field).vector_id)
        if index.ntotal != expected:
            failures.append(f"{index.field}: {index.ntotal} vectors indexed, {expected} are live")
        for name, value, bar in (
            ("intersection_at_10", index.intersection_at_10, gate.min_intersection_at_10),
            ("self_retrieval", index.self_retrieval, gate.min_self_retrieval),
        ):
            if value < bar:
                failures.append(f"{index.field}: {name} {value:.3f}, gate.min_{name} is {bar:.3f}")
    found = built.measured.recall.get("recall_at_10", 0.0)
    if found < gate.min_recall_at_10:
        bar = gate.min_recall_at_10
        failures.append(f"recall_at_10 {found:.3f}, gate.min_recall_at_10 is {bar:.3f}")
    return failures


def release_quality(built: Built) -> dict[str, Any]:
    """Return the figures that the row of a release carries."""
    quality: dict[str, Any] = {
        index.field: {
            "intersection_at_10": index.intersection_at_10,
            "self_retrieval": index.self_retrieval,
            "nprobe": index.nprobe,
            "factory": index.factory,
        }
        for index in built.indexes
    }
    if built.measured.recall:
        quality["labelled"] = built.measured.recall | {"queries": built.measured.queries}
    return quality
