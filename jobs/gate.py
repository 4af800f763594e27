"""What a release shows before it is published: its bad rows and its figures."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from jobs.embed_steps import NO_IMAGE_COLUMN
from jobs.images import RejectReason
from jobs.index import FieldIndex
from jobs.live import Live, Reason
from jobs.queries import Measured
from jobs.schemas import REJECT, UPSERT
from jobs.state import read_data_file
from jobs.store import Store
from jobs.tasks import gather

Summary = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Built:
    """An index version that no release names yet, and what was measured of it.

    Attributes:
        rejects: Rows that are not live, by reason.
        masked: Rows that are live without their image or their text, by reason.
        placeholders: The images that most live rows share: rows, product_id, image_uri.
    """

    embeddings_version: int
    live: Live
    rejects: Summary
    masked: Summary
    placeholders: Summary
    indexes: list[FieldIndex]
    measured: Measured


def summarize_rows(store: Store, live: Live) -> tuple[Summary, Summary]:
    """Tell the catalog's rows that are rejected now, and those that are live by one modality.

    Args:
        store: The store.
        live: Their counts, and where to find examples.

    Returns:
        Rejects and masked rows, each one dict a reason, most rows first: reason, kind (transient
        or permanent), rows, examples (product_id, detail).
    """
    wanted = sorted({place for places in live.examples.values() for place in places})
    told = gather([_read_told.remote(store, live.names, wanted)])[0] if wanted else {}
    rejects, masked = (
        [
            {
                "reason": reason,
                "kind": RejectReason(reason).kind,
                "rows": rows,
                "examples": _examples(live, told, (name, reason)),
            }
            for (name, reason), rows in live.reasons.most_common()
            if name == operation
        ]
        for operation in (REJECT, UPSERT)
    )
    return rejects, masked


def _examples(live: Live, told: dict[tuple[int, int], Any], reason: Reason) -> Summary:
    """Name some rows; where no product has a picture, the count says it all."""
    rows = [told[place] for place in live.examples[reason]]
    return [row for row in rows if row["detail"] != NO_IMAGE_COLUMN]


@ray.remote(num_cpus=1)
def _read_told(
    store: Store, names: list[str], places: list[tuple[int, int]]
) -> dict[tuple[int, int], dict[str, str]]:
    """Read product id and detail of a few rows, by (file, row)."""
    told = {}
    for number in sorted({file for file, _ in places}):
        rows = [row for file, row in places if file == number]
        table = read_data_file(store, names[number], ["product_id", "reject_detail"])
        for row, values in zip(rows, table.take(pa.array(rows)).to_pylist(), strict=True):
            told[number, row] = {
                "product_id": values["product_id"],
                "detail": values["reject_detail"],
            }
    return told


def release_quality(built: Built) -> dict[str, Any]:
    """Return the figures that the row of a release carries."""
    quality: dict[str, Any] = {
        index.field: {
            "intersection_at_10": index.measured.intersection_at_10,
            "self_retrieval": index.measured.self_retrieval,
            **index.point,
            "factory": index.factory,
            "action": index.action,
        }
        for index in built.indexes
    }
    if built.measured.recall:
        quality["labelled"] = built.measured.recall | {"queries": built.measured.queries}
    return quality
