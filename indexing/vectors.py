"""The arrays of this package, and which rows an index takes.

Letters used in shapes across this package: N rows, Q queries, K neighbours, D dimension.
Vectors are float32 rows of unit length; similarity is the inner product; ids are int64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

NORM_TOLERANCE = 1e-3  # rounding a unit row to float16 moves its length by up to 2**-11


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
