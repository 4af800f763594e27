"""What an index takes: bytes of memory, and bytes and operations of its training.

Formulas over an `IndexSpec`, with constants measured on FAISS 1.15.1 or read from its defaults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from indexing.spec import IndexSpec

FASTSCAN_BLOCK_ROWS = 32

# Measured with glibc as the growth of a process while it reads an index.
HEADER_BYTES = 2_048
LIST_BYTES = 160  # an empty list: two vectors and what malloc adds to them
HNSW_NODE_BYTES = 288  # 64 links of 4 bytes on the ground level, the upper levels, two offsets
ID_MAP_BYTES = 48  # IndexIDMap2 keeps a hash table from id to position
PAGE_BYTES = 4_096  # allocated, but never written and so never resident, beyond the last page

KMEANS_ITERATIONS = 10
PQ_ITERATIONS = 25
MAX_ROWS_PER_CENTROID = 256  # k-means takes a random part of a larger sample
MAX_SQ_ROWS = 100_000
PCA_ROWS_PER_DIM = 64  # as many as `train_index` draws; it takes each with its negative
OPQ_MAX_ROWS = 65_536
OPQ_ITERATIONS = 10  # as `train_index` sets it
OPQ_PQ_ITERATIONS = 40 + (OPQ_ITERATIONS - 1) * 4  # 40 in the first round, 4 in the others
EIGEN_FLOPS, SVD_FLOPS = 9, 20  # times dim ** 3 (Golub & Van Loan, 8.3 and 8.6)
HNSW_CANDIDATES = 80 * 64  # efConstruction nodes are opened, of 64 links each
BLAS_BLOCK_BYTES = 4 * 4_096 * 1_024  # inner products that one step of assignment works on


def fixed_bytes(spec: IndexSpec) -> int:
    """Return the bytes of rotation, coarse quantizer, codebooks and empty lists."""
    return _own_bytes(spec) + _quantizer_bytes(spec)


def memory_bytes(spec: IndexSpec, ntotal: int, *, partitions: int = 1) -> int:
    """Return the most memory that an index takes once it is read from its files, in bytes.

    The files are smaller by some 150 bytes a list, a flat one by 40 bytes a vector. FastScan is
    counted at its worst: lists end in the middle of a block of 32, and their codes are allocated
    in powers of two, of which whole untouched pages take no memory. While vectors are *added*,
    lists double when they are full: up to twice this.

    Args:
        spec: The index; its re-rank store stays on disk and isn't counted.
        ntotal: How many vectors it holds.
        partitions: Over how many files of about as many vectors each; they use one coarse
            quantizer, each has the rest of `fixed_bytes` and the lists.

    Raises:
        ValueError: ntotal is negative, or partitions under 1.
    """
    if ntotal < 0:
        raise ValueError(f"ntotal is {ntotal}: 0 or more is needed")
    if partitions < 1:
        raise ValueError(f"partitions is {partitions}: 1 or more is needed")
    fixed = _quantizer_bytes(spec) + partitions * _own_bytes(spec)
    stored = fixed + ntotal * spec.bytes_per_vector
    if not spec.nlist:
        return stored + ntotal * ID_MAP_BYTES
    return stored + (partitions * _slack(spec, -(-ntotal // partitions)) if spec.is_fastscan else 0)


def _slack(spec: IndexSpec, ntotal: int) -> int:
    """Return the most bytes that FastScan's lists take beyond their ntotal codes and ids."""
    lists = min(spec.nlist, ntotal)
    padding = lists * (FASTSCAN_BLOCK_ROWS - 1) * spec.code_bytes
    smallest = lists * FASTSCAN_BLOCK_ROWS * 8  # 256 bytes is the first power of two
    allocated = max(ntotal * spec.code_bytes + padding, smallest)
    return padding + min(allocated, lists * PAGE_BYTES)


def training_bytes(spec: IndexSpec, rows: int) -> int:
    """Return about how much memory training takes at its peak, in bytes, the sample with it.

    The sample (rows * dim float32), its rotated copy, the index itself, and the largest of what
    the steps keep beside: k-means a part of the sample and a block of inner products, PQ and the
    scalar quantizer a part and its residuals, OPQ copies of its part, PCA its part four times.

    Args:
        spec: The index.
        rows: How many training rows are given.
    """
    if not spec.nlist:
        return 4 * rows * spec.dim
    row, rotated_row = 4 * spec.dim, 4 * spec.inner_dim
    rotated = rows * rotated_row if spec.rotation != "none" else 0
    part = _kmeans_rows(spec, rows)
    steps = [
        (part if part < rows else 0) * rotated_row + BLAS_BLOCK_BYTES,
        2 * _codec_rows(spec, rows) * rotated_row,
        2 * min(rows, OPQ_MAX_ROWS) * (row + rotated_row) if spec.rotation == "opq" else 0,
        4 * _pca_rows(spec, rows) * row if spec.rotation == "pca" else 0,
    ]
    return rows * row + rotated + fixed_bytes(spec) + max(steps)


def training_gflops(spec: IndexSpec, rows: int) -> float:
    """Return about how many operations training takes, in 10**9 floating-point operations.

    The sum of:
        lists: 2 * part * nlist * inner_dim a round of k-means, 10 rounds;
        HNSW: 2 * nlist * 80 * 64 * inner_dim;
        PQ: 2 * part * 2**nbits * inner_dim a round, 25 rounds;
        PCA: 4 * part * dim * dim + 9 * dim**3;
        OPQ: as PQ, 76 rounds and 10 encodings, and 10 times 4 * part * dim * inner_dim +
            20 * dim**3 to rotate and to solve;
        rotating the sample: 2 * rows * dim * inner_dim.
    Here part is what is taken of the sample: at most 256 rows a centroid, 64 a dimension for PCA,
    65,536 for OPQ. Operations aren't seconds: k-means over lists ran at 30 * 10**9 a
    second and core, that of 8-bit PQ, whose vectors are 4 long, at 1 * 10**9.

    Args:
        spec: The index.
        rows: How many training rows are given.
    """
    if not spec.nlist:
        return 0.0
    inner = spec.inner_dim
    flops = 2 * _kmeans_rows(spec, rows) * spec.nlist * inner * KMEANS_ITERATIONS
    if spec.coarse == "hnsw":
        flops += 2 * spec.nlist * HNSW_CANDIDATES * inner
    if spec.pq_m:
        flops += 2 * _codec_rows(spec, rows) * (1 << spec.pq_nbits) * inner * PQ_ITERATIONS
    return (flops + _rotation_flops(spec, rows)) / 1e9


def _quantizer_bytes(spec: IndexSpec) -> int:
    """Return the bytes of the coarse quantizer, which partitions share."""
    return spec.nlist * (4 * spec.inner_dim + (HNSW_NODE_BYTES if spec.coarse == "hnsw" else 0))


def _own_bytes(spec: IndexSpec) -> int:
    """Return the bytes that each partition takes before it holds a vector."""
    if not spec.nlist:
        return HEADER_BYTES
    lists = spec.nlist * LIST_BYTES
    return HEADER_BYTES + _rotation_bytes(spec) + _codebook_bytes(spec) + lists


def _rotation_bytes(spec: IndexSpec) -> int:
    matrix = 4 * spec.dim * spec.inner_dim
    if spec.rotation == "pca":  # FAISS keeps all eigenvectors, the mean and the offset too
        return matrix + 4 * (spec.dim**2 + 2 * spec.dim + spec.inner_dim)
    return matrix if spec.rotation == "opq" else 0


def _codebook_bytes(spec: IndexSpec) -> int:
    if spec.pq_m:
        return 4 * (1 << spec.pq_nbits) * spec.inner_dim
    return 8 * spec.inner_dim if spec.codec in ("sq8", "sq6", "sq4") else 0


def _kmeans_rows(spec: IndexSpec, rows: int) -> int:
    return min(rows, MAX_ROWS_PER_CENTROID * spec.nlist)


def _pca_rows(spec: IndexSpec, rows: int) -> int:
    return min(rows, PCA_ROWS_PER_DIM * spec.dim)


def _codec_rows(spec: IndexSpec, rows: int) -> int:
    if spec.pq_m:
        return min(rows, MAX_ROWS_PER_CENTROID * (1 << spec.pq_nbits))
    return min(rows, MAX_SQ_ROWS) if spec.codec in ("fp16", "sq8", "sq6", "sq4") else 0


def _rotation_flops(spec: IndexSpec, rows: int) -> int:
    if spec.rotation == "none":
        return 0
    dim, inner = spec.dim, spec.inner_dim
    cube = dim * dim * dim
    flops = 2 * rows * dim * inner
    if spec.rotation == "pca":
        return flops + 4 * _pca_rows(spec, rows) * dim * dim + EIGEN_FLOPS * cube
    part = min(rows, OPQ_MAX_ROWS)
    codebooks = 2 * part * (1 << spec.pq_nbits) * inner * (OPQ_PQ_ITERATIONS + OPQ_ITERATIONS)
    return flops + codebooks + OPQ_ITERATIONS * (4 * part * dim * inner + SVD_FLOPS * cube)
