"""Notice when a trained index no longer fits its vectors, so that updating it no longer does.

Needs no FAISS: the configuration holds the limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class IndexHealth:
    """Hold what tells how well an index's quantizers fit its vectors.

    Attributes:
        ntotal: How many vectors the index holds.
        imbalance: `indexing.metrics.list_imbalance`, 1 to nlist; 1 on a flat index.
        quantization_error: `quantization_error` over live vectors, 0 to 4; 0 on a flat index.
        intersection_at_10: Mean `intersection_at_k` with exact search, 0 to 1.
    """

    ntotal: int
    imbalance: float
    quantization_error: float
    intersection_at_10: float

    def __post_init__(self) -> None:
        """Refuse figures that no comparison would ever find too high.

        Raises:
            ValueError: A figure is negative, NaN or infinite.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{field.name} is {value}: a finite number >= 0 is needed")


@dataclass(frozen=True, kw_only=True)
class DriftLimits:
    """Bound how far an index may drift from its training before it is trained again.

    Attributes:
        max_imbalance_growth: Largest list imbalance, as a multiple of that when trained, >= 1.
        max_quantization_error_growth: Largest mean squared distance between vectors and what
            the index keeps of them, as a multiple of that when trained, >= 1.
        max_intersection_drop: Largest fall of intersection_at_10 since training, 0 to 1.
        max_size_growth: Largest growth of the number of vectors since training, as a multiple,
            >= 1; a shrinkage by as much counts too.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    max_imbalance_growth: float = 1.5
    max_quantization_error_growth: float = 1.25
    max_intersection_drop: float = 0.02
    max_size_growth: float = 2.0

    def __post_init__(self) -> None:
        """Check every limit.

        Raises:
            ValueError: A growth is under 1 or not finite, or the drop is outside 0..1.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_growth") and not 1 <= value < math.inf:
                raise ValueError(f"{field.name} is {value}: a finite number >= 1 is needed")
        if not 0 <= self.max_intersection_drop <= 1:
            raise ValueError(
                f"max_intersection_drop is {self.max_intersection_drop}: 0 to 1 is needed"
            )


def find_drift(trained: IndexHealth, now: IndexHealth, limits: DriftLimits) -> list[str]:
    """Say which limits an index has passed since it was trained.

    A flat index learnt nothing that could age: of it, only the intersection counts.

    Args:
        trained: Measured right after training and filling.
        now: Measured the same way, over the live vectors of today.
        limits: What is still fine.

    Returns:
        A sentence a limit that is passed, with both figures and the limit; none: the index may
        go on being updated.
    """
    return [
        *_find_growth(
            "list imbalance", trained.imbalance, now.imbalance, limits.max_imbalance_growth
        ),
        *_find_growth(
            "quantization error",
            trained.quantization_error,
            now.quantization_error,
            limits.max_quantization_error_growth,
        ),
        *_find_drop(trained, now, limits.max_intersection_drop),
        *_find_resizing(trained, now, limits.max_size_growth),
    ]


def _find_growth(name: str, trained: float, now: float, limit: float) -> list[str]:
    if now <= limit * trained:
        return []
    return [f"The {name} is {now:.4g}, more than {limit:g} times the {trained:.4g} at training."]


def _find_drop(trained: IndexHealth, now: IndexHealth, limit: float) -> list[str]:
    # Rounded: 0.98 - 0.96 is a little more than 0.02 in binary, and not past that limit.
    if round(trained.intersection_at_10 - now.intersection_at_10, 9) <= limit:
        return []
    return [
        f"The intersection_at_10 is {now.intersection_at_10:.4g}, more than {limit:g} under the "
        f"{trained.intersection_at_10:.4g} at training."
    ]


def _find_resizing(trained: IndexHealth, now: IndexHealth, limit: float) -> list[str]:
    if trained.quantization_error == now.quantization_error == 0:  # flat: no other index has none
        return []
    if now.ntotal > limit * trained.ntotal:
        return [
            f"The index holds {now.ntotal:,} vectors, more than {limit:g} times the "
            f"{trained.ntotal:,} at training."
        ]
    if trained.ntotal > limit * now.ntotal:
        return [
            f"The index holds {now.ntotal:,} vectors: the {trained.ntotal:,} at training were "
            f"more than {limit:g} times as many."
        ]
    return []
