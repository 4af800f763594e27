"""Train an index: the rotation, the centroids of the lists, then the codec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np

from indexing.anatomy import empty_flat, ivf_of
from indexing.spec import IndexSpec
from indexing.threads import for_each_block
from indexing.vectors import Float32Array, check_unit_rows

Progress = Callable[[str, int, int], None]  # the step, how much of it is done, how much there is

KMEANS_ITERATIONS = 10  # FAISS's own for the lists of an IVF index
ROWS_PER_CENTROID = 256  # FAISS's own: k-means takes no more, they hardly move the centroids
# FAISS does 50. Tried on 100k x 512 (64 latent dimensions) with 10: 76 s to train OPQ64_256 and
# PQ64, and the intersection after re-ranking is that of every other rotation.
OPQ_ITERATIONS = 10
PCA_ROWS_PER_DIM = 64  # D x D second moments settle long before the 1,000 a dimension of FAISS
ROTATED_ROWS = 4_096  # of the sample, by one thread at once
HNSW_EF_CONSTRUCTION = 80
HNSW_EF_SEARCH = 64  # to add with; 16, FAISS's own, sends too many vectors to a farther list


def train_index(
    spec: IndexSpec, sample: Float32Array, *, seed: int, progress: Progress | None = None
) -> faiss.Index:
    """Train an empty index; `add_vectors` fills a clone of it per shard.

    The result has the same bytes for the same sample and seed, with any number of threads: what
    depends on it (PCA, OPQ, filling an HNSW graph) runs in one. The other steps take as many as
    `faiss.omp_set_num_threads` allows. Where FAISS is built for GPUs and finds some, k-means
    assigns on all of them: that path is checked by types alone, no test here runs it, and its
    bytes may differ from a CPU's.

    PCA keeps the directions of largest second moment, not of largest variance: the inner product
    of vectors with their mean taken away ranks otherwise than that of the vectors.

    Args:
        spec: What to build.
        sample: (N, D) float32 unit rows, drawn at random from the whole catalog;
            N >= spec.min_training_rows. A flat index learns nothing from it; N may be 0.
        seed: Seeds k-means and the PQ: the same sample then gives the same bytes.
        progress: Called with the step ('rotation', 'lists', 'codec'), how much of it is done and
            how much there is: at its start, after each k-means iteration, at its end.

    Returns:
        A trained index with ntotal == 0.

    Raises:
        ValueError: The sample is too small, of another D, not finite or not of unit length.
    """
    check_unit_rows(sample, dim=spec.dim, name="training sample")
    if len(sample) < spec.min_training_rows:
        raise ValueError(
            f"training sample: {len(sample)} rows, {spec.factory} needs at least "
            f"{spec.min_training_rows}: take a larger sample, or a smaller nlist or pq_nbits"
        )
    if not spec.nlist:
        return empty_flat(spec.dim)
    report = progress or _ignore
    index = faiss.index_factory(spec.dim, spec.base_factory, faiss.METRIC_INNER_PRODUCT)
    rotated = _train_rotation(spec, index, sample, seed, report)
    _train_lists(ivf_of(index), rotated, seed, report)
    _train_codec(ivf_of(index), rotated, seed, report)
    index.is_trained = True
    return index


def _ignore(step: str, done: int, total: int) -> None: ...


def _train_rotation(
    spec: IndexSpec,
    index: Any,  # noqa: ANN401 - faiss's stubs lack methods
    sample: Float32Array,
    seed: int,
    report: Progress,
) -> Float32Array:
    """Train the rotation, if there is one; return the (N, inner_dim) rotated sample."""
    if spec.rotation == "none":
        return sample
    report("rotation", 0, 1)
    transform: Any = faiss.downcast_VectorTransform(index.chain.at(0))
    with _one_thread():
        if spec.rotation == "opq":
            _train_opq(transform, sample, spec, seed)
        else:
            rows = _draw(sample, PCA_ROWS_PER_DIM * spec.dim, seed)
            transform.train(np.concatenate([rows, -rows]))  # their mean is 0: no bias
            faiss.copy_array_to_vector(np.zeros(spec.inner_dim, dtype=np.float32), transform.b)
    rotated = _rotate_sample(transform, sample)
    report("rotation", 1, 1)
    return rotated


def _rotate_sample(
    transform: Any,  # noqa: ANN401 - faiss's stubs lack methods
    sample: Float32Array,
) -> Float32Array:
    """Rotate the (N, D) sample: in float32, unlike `rotate`, and the same on any threads.

    A block is always of the same rows and one thread's, which fixes its bits.
    """
    rotated = np.empty((len(sample), transform.d_out), dtype=np.float32)
    rows = np.ascontiguousarray(sample)

    def rotate(block: slice) -> None:
        part, into = rows[block], rotated[block]
        transform.apply_noalloc(len(part), faiss.swig_ptr(part), faiss.swig_ptr(into))

    for_each_block(rotate, len(rows), ROTATED_ROWS)
    return rotated


def _train_opq(
    transform: faiss.OPQMatrix, sample: Float32Array, spec: IndexSpec, seed: int
) -> None:
    codec = faiss.ProductQuantizer(spec.inner_dim, spec.pq_m, spec.pq_nbits)
    codec.cp.seed = seed
    transform.niter = OPQ_ITERATIONS
    transform.pq = codec
    transform.train(sample)
    transform.pq = None  # codec ends with this function


def _train_lists(ivf: faiss.IndexIVF, rotated: Float32Array, seed: int, report: Progress) -> None:
    """Find the centroids by spherical k-means, and fill the coarse quantizer with them.

    FAISS run for one iteration after the other gives the bytes of one run for all, and tells how
    far it is. Tried on 82k x 256, 2,048 lists: `use_super_kmeans` changes neither time nor bytes;
    the class SuperKMeans is 1.4 times as fast and as good, but can't be watched or resumed.
    """
    rows = _draw(rotated, ROWS_PER_CENTROID * ivf.nlist, seed)
    settings = faiss.ClusteringParameters()
    settings.seed, settings.niter, settings.spherical = seed, 1, True
    settings.max_points_per_centroid = ROWS_PER_CENTROID
    settings.check_input_data_for_NaNs = False  # check_unit_rows did
    clustering = faiss.Clustering(ivf.d, ivf.nlist, settings)
    assigner = _assigner(ivf.d)
    report("lists", 0, KMEANS_ITERATIONS)
    for done in range(1, KMEANS_ITERATIONS + 1):
        clustering.train(rows, assigner)
        report("lists", done, KMEANS_ITERATIONS)
    centroids = faiss.vector_to_array(clustering.centroids).reshape(ivf.nlist, ivf.d)
    quantizer = faiss.downcast_index(ivf.quantizer)
    if isinstance(quantizer, faiss.IndexHNSW):
        quantizer.hnsw.efConstruction = HNSW_EF_CONSTRUCTION
        quantizer.hnsw.efSearch = HNSW_EF_SEARCH
    with _one_thread():
        quantizer.add(centroids)


def _train_codec(
    ivf: Any,  # noqa: ANN401 - faiss's stubs lack methods
    rotated: Float32Array,
    seed: int,
    report: Progress,
) -> None:
    """Train what codes are made with; FAISS leaves a filled coarse quantizer as it is."""
    ivf.cp.seed = seed
    if isinstance(ivf, faiss.IndexIVFPQ | faiss.IndexIVFPQFastScan):
        ivf.pq.cp.seed = seed
    report("codec", 0, 1)
    ivf.train(rotated)
    report("codec", 1, 1)


def _assigner(dim: int) -> faiss.Index:
    """Return an empty exact index that k-means asks for the nearest centroids."""
    flat = faiss.IndexFlatIP(dim)
    return faiss.index_cpu_to_all_gpus(flat) if faiss.get_num_gpus() else flat


def _draw(rows: Float32Array, count: int, seed: int) -> Float32Array:
    """Return at most count of (N, D) rows, drawn at random."""
    if len(rows) <= count:
        return rows
    drawn = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return rows[np.sort(drawn)]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
