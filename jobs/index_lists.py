"""Describes how an index's vectors are spread over its lists: a few figures and a histogram."""

from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 40  # at most, however many lists there are: the figures go into a manifest
LONG_TAIL = 20  # a list of so many medians would leave most bins of equal width empty

Int64Array = npt.NDArray[np.int64]


def describe_lists(sizes: Int64Array) -> dict[str, Any] | None:
    """Count lists and their vectors by how long the lists are.

    Args:
        sizes: (nlist,) int64, vectors in each list, over all partitions.

    Returns:
        lists, vectors, empty (lists), median and largest (vectors in a list), and bins: each
        `from` <= size < `to`, with its lists and their vectors. None: a flat index has no list.
    """
    if not len(sizes):
        return None
    median, largest = float(np.median(sizes)), int(sizes.max())
    edges = _edges(median, largest)
    lists, vectors = (
        np.histogram(sizes, edges, weights=weights)[0].astype(np.int64).tolist()
        for weights in (None, sizes)
    )
    return {
        "lists": len(sizes),
        "vectors": int(sizes.sum()),
        "empty": int((sizes == 0).sum()),
        "median": median,
        "largest": largest,
        "bins": [
            {"from": low, "to": high, "lists": count, "vectors": held}
            for low, high, count, held in zip(
                edges[:-1].tolist(), edges[1:].tolist(), lists, vectors, strict=True
            )
        ],
    }


def _edges(median: float, largest: int) -> Int64Array:
    """Return the bins' bounds, rising from 0 to more than the largest size."""
    if largest > max(BINS, LONG_TAIL * median):  # one bin for the empty lists, then by ratio
        rising = np.ceil(np.geomspace(1, largest + 1, BINS)).astype(np.int64)
        return np.unique(np.append(0, rising))
    step = largest // BINS + 1
    return np.arange(0, largest + 1 + step, step, dtype=np.int64)
