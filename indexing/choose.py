"""Choose an index for a catalog: pure arithmetic over specs, explained.

It decides without having seen a vector; what the index reaches is then measured and tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from indexing.spec import TRAINING_ROWS_PER_CENTROID, Codec, IndexSpec, Refine

HELD_OUT_SHARE = 0.2  # of the rows, at most: they measure the index, and so can't train it
FLAT_BELOW_ROWS = 1_000
WHOLE_BELOW_ROWS = 10_000
HNSW_FROM_LISTS = 16_384
# Measured at 512 dimensions of rank 64: PCA to 256 and 128 4-bit codes, re-ranked, find what
# whole vectors find (.980 of the nearest 10 against .977), 4 to 20 times as fast as other codes.
PCA_DIMS = 256
# Ranked by 8 bits a dimension, .994 of the nearest 10 were right (60,000 x 256 of rank 48; by
# float16 .9996): above this target it would leave next to nothing for the probing to miss.
EIGHT_BITS_UP_TO = 0.98
# FastScan takes up to a block and a page more than a list needs: 512 codes make that small.
FASTSCAN_LIST_ROWS = 512


def trainable_rows(ntotal: int, held_out: float = HELD_OUT_SHARE) -> int:
    """Return how many of ntotal rows can train an index, with some held out to measure it.

    Which are held out is drawn: six standard deviations fewer than their share is the rest.

    Args:
        ntotal: How many rows there are.
        held_out: The share that is held out, 0 to 1.
    """
    spread = math.sqrt(ntotal * held_out * (1 - held_out))
    return max(0, math.floor(ntotal * (1 - held_out) - 6 * spread))


def choose_spec(
    ntotal: int,
    dim: int,
    *,
    memory_budget_bytes: int | None,
    target_intersection: float,
    partitions: int = 1,
) -> tuple[IndexSpec, list[str]]:
    """Choose an index for a catalog of a given size.

    Args:
        ntotal: How many vectors the index will hold.
        dim: D, the length of every vector.
        memory_budget_bytes: The most that the index may take once it is read from its files
            (`IndexSpec.memory_bytes`); None: no limit.
        target_intersection: The share of the true nearest neighbours that is wanted, in (0, 1].
        partitions: Over how many files the vectors will lie.

    Returns:
        The spec, which ntotal rows are enough to train, and one sentence a decision.

    Raises:
        ValueError: A number is out of range, or nothing fits the budget: the message names the
            fewest bytes that would do.
    """
    _check_numbers(ntotal, dim, memory_budget_bytes, target_intersection)

    def memory(spec: IndexSpec) -> int:
        return spec.memory_bytes(ntotal, partitions=partitions)

    if memory_budget_bytes is None:
        spec = _choose_freely(ntotal, dim, _refine_for(target_intersection))
    else:
        spec = _choose_within(memory_budget_bytes, memory, ntotal, dim, target_intersection)
    reasons = _reasons(spec, ntotal)
    if memory_budget_bytes is not None:
        reasons.append(
            f"Memory: at most {_size(memory(spec))} of the "
            f"{_size(memory_budget_bytes)} that are allowed."
        )
    return spec, reasons


def _check_numbers(ntotal: int, dim: int, budget: int | None, target: float) -> None:
    if ntotal < 0:
        raise ValueError(f"ntotal is {ntotal}: 0 or more is needed")
    if dim < 1:
        raise ValueError(f"dim is {dim}: at least 1 is needed")
    if budget is not None and budget < 1:
        raise ValueError(f"memory_budget_bytes is {budget}: at least 1 is needed")
    if not 0 < target <= 1:
        raise ValueError(f"target_intersection is {target}: more than 0, at most 1 is needed")


def _choose_freely(ntotal: int, dim: int, refine: Refine) -> IndexSpec:
    if ntotal < FLAT_BELOW_ROWS:
        return IndexSpec(dim=dim)
    nlist = _usual_nlist(ntotal)
    if ntotal < WHOLE_BELOW_ROWS:
        return _with_lists(dim, nlist)
    longest = max(1, min(dim, PCA_DIMS) // 2)
    return next(_fastscan(ntotal, dim, nlist, longest, refine))


def _choose_within(
    budget: int, memory: Callable[[IndexSpec], int], ntotal: int, dim: int, target: float
) -> IndexSpec:
    """Return the most exact of the candidates that fit; of FastScan, the longest codes."""
    whole = list(_scalar_candidates(ntotal, dim, target))
    for spec in whole:
        if memory(spec) <= budget:
            return spec
    coded = list(_fastscan_candidates(ntotal, dim, _refine_for(target)))
    fitting = [spec for spec in coded if memory(spec) <= budget]
    if fitting:
        return max(fitting, key=lambda spec: (_worth(spec), spec.nlist))
    least = min((*whole, *coded), key=memory)
    raise ValueError(
        f"memory_budget_bytes is {budget:,}: {ntotal:,} vectors of {dim} dimensions take at "
        f"least {memory(least):,} (as {least.factory})"
    )


def _scalar_candidates(ntotal: int, dim: int, target: float) -> Iterator[IndexSpec]:
    if ntotal < FLAT_BELOW_ROWS:
        yield IndexSpec(dim=dim)
    if trainable_rows(ntotal) < TRAINING_ROWS_PER_CENTROID:
        return
    nlist = _usual_nlist(ntotal)
    yield _with_lists(dim, nlist)
    yield _with_lists(dim, nlist, codec="fp16")
    refine: Refine = "fp16" if target > EIGHT_BITS_UP_TO else "none"
    yield _with_lists(dim, nlist, codec="sq8", refine=refine)


def _fastscan_candidates(ntotal: int, dim: int, refine: Refine) -> Iterator[IndexSpec]:
    """Yield 4-bit codes of all lengths, over the usual number of lists and over fewer."""
    if trainable_rows(ntotal) < TRAINING_ROWS_PER_CENTROID * 2**4:
        return
    nlist = _usual_nlist(ntotal)
    while True:
        yield from _fastscan(ntotal, dim, nlist, max(1, dim // 2), refine)
        if nlist * FASTSCAN_LIST_ROWS <= ntotal or nlist == 1:
            return
        nlist //= 2


def _fastscan(
    ntotal: int, dim: int, nlist: int, longest: int, refine: Refine
) -> Iterator[IndexSpec]:
    """Yield 4-bit codes of at most a given length, longest first.

    A code stands for two dimensions after PCA, for which there must be dim rows; or, after all
    of these, for any equal part of the vector as it is: PCA takes 4 * dim**2 bytes, which is
    much for a small catalog.
    """
    for pq_m in range(longest, 0, -1):
        if 2 * pq_m < dim <= trainable_rows(ntotal):
            yield _with_lists(dim, nlist, pca_dim=2 * pq_m, codec="pqfs", pq_m=pq_m, refine=refine)
        elif 2 * pq_m == dim:
            yield _with_lists(dim, nlist, codec="pqfs", pq_m=pq_m, refine=refine)
    for pq_m in range(longest, 0, -1):
        if dim % pq_m == 0:
            yield _with_lists(dim, nlist, codec="pqfs", pq_m=pq_m, refine=refine)


def _worth(spec: IndexSpec) -> float:
    """Return the codes of a vector, halved where PCA didn't come first.

    At 64 bytes a vector PQ found .753 of the neighbours without it, .834 and more after it.
    """
    return spec.pq_m if spec.inner_dim <= 2 * spec.pq_m else spec.pq_m / 2


def _with_lists(
    dim: int,
    nlist: int,
    *,
    codec: Codec = "flat",
    pq_m: int = 0,
    pca_dim: int = 0,
    refine: Refine = "none",
) -> IndexSpec:
    return IndexSpec(
        dim=dim,
        nlist=nlist,
        coarse="hnsw" if nlist >= HNSW_FROM_LISTS else "flat",
        rotation="pca" if pca_dim else "none",
        rotated_dim=pca_dim,
        codec=codec,
        pq_m=pq_m,
        refine=refine,
    )


def _refine_for(target: float) -> Refine:
    return "fp16" if target > EIGHT_BITS_UP_TO else "sq8"


def _usual_nlist(ntotal: int) -> int:
    """Return nlist for ntotal >= 49 vectors: a power of two, and no more than can be trained.

    The steps from a million rows on are those of FAISS's and autofaiss's guidelines.
    """
    for rows, nlist in ((300_000_000, 131_072), (10_000_000, 65_536), (1_000_000, 16_384)):
        if ntotal >= rows:
            return nlist
    trainable = 2 ** math.floor(math.log2(trainable_rows(ntotal) / TRAINING_ROWS_PER_CENTROID))
    return int(min(_wanted_nlist(ntotal), trainable))


def _wanted_nlist(ntotal: int) -> int:
    return int(2 ** round(math.log2(4 * math.sqrt(ntotal))))


def _reasons(spec: IndexSpec, ntotal: int) -> list[str]:
    if not spec.nlist:
        return [f"No lists: exhaustive search over {ntotal:,} vectors is exact and fast enough."]
    reasons = [_why_lists(spec, ntotal)]
    if spec.coarse == "hnsw":
        mflops = 2 * spec.nlist * spec.inner_dim / 1e6
        reasons.append(
            f"An HNSW graph finds the lists: comparing with all {spec.nlist:,} centroids takes "
            f"{mflops:,.1f} million operations for each vector that is added or searched for."
        )
    reasons.append(_why_codec(spec, ntotal))
    if spec.refine != "none":
        rows = "float16" if spec.refine == "fp16" else "8-bit"
        reasons.append(
            f"Re-ranking with {rows} vectors, memory-mapped from disk: "
            f"{_size(ntotal * spec.refine_bytes_per_vector)} there, none of the memory that "
            "the index is held to."
        )
    return reasons


def _why_lists(spec: IndexSpec, ntotal: int) -> str:
    usual, nlist = _usual_nlist(ntotal), f"{spec.nlist:,} lists"
    if spec.nlist < usual:
        return (
            f"{nlist} instead of {usual:,}: FastScan fills up every list in memory, and fewer "
            "lists leave room for longer codes."
        )
    if ntotal >= 1_000_000:
        return f"{nlist}: the step for {ntotal:,} vectors."
    if spec.nlist < _wanted_nlist(ntotal):
        return f"{nlist}: the largest power of two that {ntotal:,} rows can train and measure."
    return f"{nlist}: the power of two nearest to 4 * sqrt({ntotal:,})."


def _why_codec(spec: IndexSpec, ntotal: int) -> str:
    size = f"{spec.code_bytes:,} B each, {_size(ntotal * spec.code_bytes)} in all"
    if spec.codec == "flat":
        return f"Whole vectors: {size}, and scores are exact."
    if spec.codec == "fp16":
        return f"Float16 vectors: {size}; whole ones don't fit, and these rank the same."
    if spec.codec == "sq8":
        return f"8 bits a dimension: {size}; float16 doesn't fit."
    of = f"{spec.inner_dim} of {spec.dim} dimensions after PCA"
    if spec.rotation == "none":
        of = f"all {spec.dim} dimensions"
    return (
        f"FastScan PQ, {spec.pq_m} codes of 4 bits for {of}: {size}; trained in seconds, "
        "scanned several times as fast as other codes, and fine enough to re-rank after."
    )


def _size(size_bytes: int) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= factor:
            return f"{size_bytes / factor:,.1f} {unit}"
    return f"{size_bytes} B"
