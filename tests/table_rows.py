"""Makes the records that the joins take: rows of a catalog, of the table, of a release."""

import numpy as np

from jobs.images import RejectReason
from jobs.items import PLAN_DTYPE
from jobs.live import LIVE_DTYPE
from jobs.state import OPERATIONS, REASONS, RELEASED_DTYPE, STATE_DTYPE


def make_records(dtype, rows):
    """Records from dicts, zero where a name is not given, sorted by vector id."""
    records = np.zeros(len(rows), dtype)
    for place, row in enumerate(rows):
        for name, value in row.items():
            records[name][place] = value
    return records[np.argsort(records["vector_id"], kind="stable")]


def make_plan(*rows):
    """Dicts with vector_id; text and image hashes are 1, the product is the id by default."""
    filled = [{"image_hash": 1, "text_hash": 1, "product": r["vector_id"]} | r for r in rows]
    return make_records(PLAN_DTYPE, filled)


def make_state(*rows):
    """Dicts with vector_id; upserts of generation 1 and hashes 1 by default."""
    filled = []
    for row in rows:
        values = {"generation": 1, "image_hash": 1, "text_hash": 1, "operation": "upsert"} | row
        values["operation"] = OPERATIONS[values["operation"]]
        if "reason" in values:
            values["reason"] = REASONS.index(RejectReason(values["reason"])) + 1
        filled.append(values)
    return make_records(STATE_DTYPE, filled)


def make_released(*rows):
    """Dicts with vector_id; generation 1, first of their product by default."""
    return make_records(RELEASED_DTYPE, [{"generation": 1, "first": True} | r for r in rows])


def make_live(*rows):
    """Dicts with vector_id; first of their product by default."""
    return make_records(LIVE_DTYPE, [{"generation": 1, "first": True} | r for r in rows])
