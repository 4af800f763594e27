"""What an index is made of, how a catalog's size decides it, and which rows it takes.

Letters used in shapes across this package: N rows, Q queries, K neighbours, D dimension.
Vectors are float32 rows of unit length; similarity is the inner product; ids are int64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

FLAT_BELOW_ROWS = 1_000
TRAINING_ROWS_PER_CENTROID = 39  # FAISS's ClusteringParameters.min_points_per_centroid
MAX_PQ_NBITS = 8  # IndexIVFPQ has no search kernel for longer codes
ID_BYTES = 8
NORM_TOLERANCE = 1e-3  # rounding a unit row to float16 moves its length by up to 2**-11


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """Describe a FAISS index: flat, IVF-Flat or IVF-PQ, all with inner product.

    Attributes:
        dim: D, the length of every vector, > 0.
        nlist: How many inverted lists; 0: none, search is exhaustive.
        pq_m: How many sub-quantizers, a divisor of dim; 0: vectors are stored whole.
        pq_nbits: Bits a sub-quantizer, 1 to 8; without pq_m it has no effect.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}

    dim: int
    nlist: int = 0
    pq_m: int = 0
    pq_nbits: int = 8

    def __post_init__(self) -> None:
        """Refuse combinations that FAISS can't build.

        Raises:
            ValueError: A number is out of range, pq_m doesn't divide dim, or PQ lacks nlist.
        """
        if self.dim < 1:
            raise ValueError(f"dim is {self.dim}: at least 1 is needed")
        if self.nlist < 0:
            raise ValueError(f"nlist is {self.nlist}: 0 (no lists) or more is needed")
        if self.pq_m < 0:
            raise ValueError(f"pq_m is {self.pq_m}: 0 (no PQ) or more is needed")
        if not 1 <= self.pq_nbits <= MAX_PQ_NBITS:
            raise ValueError(f"pq_nbits is {self.pq_nbits}: 1 to {MAX_PQ_NBITS} is needed")
        if self.pq_m and not self.nlist:
            raise ValueError(f"pq_m is {self.pq_m} without lists: set nlist, or set pq_m to 0")
        if self.pq_m and self.dim % self.pq_m:
            raise ValueError(f"pq_m {self.pq_m} does not divide dim {self.dim}")

    @property
    def factory(self) -> str:
        """Return the FAISS factory string, e.g. 'Flat', 'IVF64,Flat', 'IVF512,PQ128np'.

        'np' turns off polysemous training, which FAISS does by default: it makes training
        several times slower for codes that are never used here.
        """
        if not self.nlist:
            return "Flat"
        if not self.pq_m:
            return f"IVF{self.nlist},Flat"
        nbits = "" if self.pq_nbits == 8 else f"x{self.pq_nbits}"
        return f"IVF{self.nlist},PQ{self.pq_m}{nbits}np"

    @property
    def bytes_per_vector(self) -> int:
        """Return the bytes one vector takes in the index file: its code and its 8-byte id."""
        if not self.pq_m:
            return 4 * self.dim + ID_BYTES
        return (self.pq_m * self.pq_nbits + 7) // 8 + ID_BYTES

    @property
    def min_training_rows(self) -> int:
        """Return the fewest training rows: 39 a centroid, as FAISS asks; 0 for flat."""
        if not self.nlist:
            return 0
        pq_centroids = 2**self.pq_nbits if self.pq_m else 0
        return TRAINING_ROWS_PER_CENTROID * max(self.nlist, pq_centroids)

    @classmethod
    def for_catalog(cls, ntotal: int, dim: int) -> tuple[IndexSpec, list[str]]:
        """Choose an index for a catalog of a given size.

        Args:
            ntotal: How many vectors the index will hold.
            dim: D, the length of every vector.

        Returns:
            The spec, which ntotal rows are enough to train, and one sentence a decision.

        Raises:
            ValueError: ntotal is negative, or dim < 1.
        """
        if ntotal < 0:
            raise ValueError(f"ntotal is {ntotal}: 0 or more is needed")
        if ntotal < FLAT_BELOW_ROWS:
            why = f"No lists: exhaustive search over {ntotal:,} vectors is exact and fast enough."
            return cls(dim=dim), [why]
        nlist, why_nlist = _choose_nlist(ntotal)
        pq_floor = TRAINING_ROWS_PER_CENTROID * 2**MAX_PQ_NBITS
        if ntotal < pq_floor:
            why = f"Whole vectors: training PQ takes {pq_floor:,} rows, there are {ntotal:,}."
            return cls(dim=dim, nlist=nlist), [why_nlist, why]
        dsub = _choose_dsub(dim)
        spec = cls(dim=dim, nlist=nlist, pq_m=dim // dsub)
        why = (
            f"PQ with {spec.pq_m} one-byte codes of {dsub} dimensions each: "
            f"{4 * dim / spec.pq_m:.3g} times smaller than float32, and fine enough to rank "
            "by the codes alone."
        )
        return spec, [why_nlist, why]


def check_unit_rows(rows: Float32Array, *, dim: int, name: str) -> None:
    """Refuse rows that an index would take without a word and then answer wrongly from.

    Args:
        rows: (N, D) float32; N may be 0.
        dim: The D that is expected.
        name: What the rows are, for the message.

    Raises:
        ValueError: The shape or dtype is wrong, or a row holds NaN or Inf or isn't of unit
            length (within 1e-3, which float16 rounding stays under).
    """
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise ValueError(f"{name}: shape is {rows.shape}, expected (N, {dim})")
    if rows.dtype != np.float32:
        raise ValueError(f"{name}: dtype is {rows.dtype}, expected float32")
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    _refuse_rows(~np.isfinite(norms), f"{name}: a row holds NaN or Inf")
    off_unit = np.abs(norms - 1.0) > NORM_TOLERANCE
    _refuse_rows(off_unit, f"{name}: a row is not of unit length")


def _refuse_rows(bad: npt.NDArray[np.bool_], fault: str) -> None:
    if bad.any():
        count = int(np.count_nonzero(bad))
        raise ValueError(f"{fault} ({count} of {len(bad)} rows, first row {int(bad.argmax())})")


def _choose_nlist(ntotal: int) -> tuple[int, str]:
    """Return nlist for ntotal >= 1,000 vectors, and why.

    The steps from a million rows on are those of FAISS's and autofaiss's guidelines.
    """
    if ntotal >= 300_000_000:
        return 131_072, "131,072 lists: the step for 300 million vectors and more."
    if ntotal >= 10_000_000:
        return 65_536, "65,536 lists: the step for 10 to 300 million vectors."
    if ntotal >= 1_000_000:
        return 16_384, "16,384 lists: the step for 1 to 10 million vectors."
    wanted = int(2 ** round(math.log2(4 * math.sqrt(ntotal))))
    trainable = int(2 ** math.floor(math.log2(ntotal / TRAINING_ROWS_PER_CENTROID)))
    if wanted <= trainable:
        return wanted, f"{wanted} lists: the power of two nearest to 4 * sqrt({ntotal:,})."
    why = f"{trainable} lists: the largest power of two that {ntotal:,} rows can train."
    return trainable, why


def _choose_dsub(dim: int) -> int:
    """Return the divisor of dim nearest to 2; the smaller of two, which keeps more."""
    if dim < 1:
        raise ValueError(f"dim is {dim}: at least 1 is needed")
    return min((dsub for dsub in (2, 1, 3) if dim % dsub == 0), key=lambda dsub: abs(dsub - 2))
