"""Short measurements where no earlier run tells a rate: some rows embedded, a small index built."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray

from indexing.build import add_vectors
from indexing.search import search_exact
from indexing.spec import IndexSpec
from indexing.train import train_index
from jobs.catalog import Catalog
from jobs.config import JobConfig
from jobs.diff import Diff
from jobs.embed import EmbedResult, probe_rows
from jobs.embed_actors import LEAST_ROWS
from jobs.embed_steps import EmbedTask
from jobs.files import delete_files, list_files
from jobs.plan_cluster import Cluster
from jobs.plan_index import FieldPlan, IndexRates
from jobs.plan_rates import EmbedRate, name_precisions
from jobs.run import Run
from jobs.space import VectorSpace
from jobs.store import Store, scratch_folder
from jobs.tasks import gather

PIECES_EACH = 3  # of each actor; its first one is left out
SAMPLE_ROWS = 20_000
PROBE_LISTS = 64
QUERIES = 200
EXACT_K = 10


def probe_embedding(
    run: Run,
    config: JobConfig,
    catalog: Catalog,
    diff: Diff,
    encoder: tuple[Path, VectorSpace],
    cluster: Cluster,
) -> EmbedRate | None:
    """Embed some of the rows into a folder that is deleted again, and return the rate.

    The first pieces are slower: as many as there are actors are left out, as long as others are
    left.

    Args:
        run: Names the folder on a cluster, whose machines share nothing but the store.
        config: The job, with the precision that the encoder's contract allows.
        catalog: The checked catalog.
        diff: Which rows.
        encoder: Folder of the checkpoint, and what the job makes of it.
        cluster: The machines that Ray has now.

    Returns:
        None where no machine has room for an actor.

    Raises:
        JobError: A step failed.
    """
    directory, space = encoder
    embedders = cluster.embedders(config.embed)
    if not embedders.count:
        return None
    # A file a batch on a GPU, so that each tells its seconds.
    rows = config.embed.batch_size if embedders.gpus else LEAST_ROWS
    embed = config.embed.model_copy(update={"rows_per_file": rows})
    with _probe_store(run, is_local=config.ray.address is None) as store:
        store.add_checkpoint(directory, space.encoder)
        task = EmbedTask(
            catalog=catalog,
            images=config.images,
            embed=embed,
            store=store,
            space=space,
            generation=1,
        )
        started, files = time.monotonic(), list[tuple[float, EmbedResult]]()
        for found in probe_rows(task, diff, rows, PIECES_EACH * embedders.count):
            files.append((time.monotonic() - started, found))
    warm = files[min(embedders.count, len(files) - 1) :]
    seconds: Counter[str] = sum((one.seconds for _, one in warm), Counter())
    done = sum(one.embedded + one.rejected for _, one in warm)
    precisions = [n for n in ("fp32", "bf16") if any(getattr(one, f"rows_{n}") for _, one in warm)]
    first_s, first = files[0]
    return EmbedRate(
        source=f"a calibration on {done:,} rows{name_precisions(precisions)}, {cluster.name}",
        rows=done,
        embedders=embedders,
        start_s=max(0.0, first_s - sum(first.seconds.values())),
        steps={name.removesuffix("_s"): value / done for name, value in seconds.items()},
        image_bytes=sum(one.image_bytes for _, one in warm) / done,
        written_bytes=sum(one.written_bytes for _, one in warm) / done,
    )


@contextmanager
def _probe_store(run: Run, *, is_local: bool) -> Iterator[Store]:
    """Make a store that is gone afterwards: in a temporary folder, or in the run's on a cluster."""
    if is_local:
        scratch = scratch_folder("probe")
        try:
            yield Store(str(scratch))
        finally:
            shutil.rmtree(scratch)
        return
    folder = ("runs", run.run_id, "probe")
    try:
        yield Store(run.store.uri(*folder))
    finally:
        delete_files(run.store, [file.path for file in list_files(run.store, *folder)])


def probe_indexes(plans: list[FieldPlan], seed: int) -> dict[str, IndexRates]:
    """Time a small index like each field's on one core, over random vectors.

    Args:
        plans: The fields; those that are not trained are left out.
        seed: Of the vectors.

    Returns:
        Field to rates; none of a flat index, which takes no training.

    Raises:
        JobError: A task failed.
    """
    trained = [one for one in plans if one.action == "train" and one.spec and one.spec.nlist]
    found = gather([_time_index.remote(one.spec, seed) for one in trained])
    return {one.field.name: rates for one, rates in zip(trained, found, strict=True)}


@ray.remote(num_cpus=1)
def _time_index(spec: IndexSpec, seed: int) -> IndexRates:
    """Train, fill and search an index of fewer lists."""
    small = replace(spec, nlist=min(spec.nlist, PROBE_LISTS), coarse="flat")
    rows = max(SAMPLE_ROWS, small.min_training_rows)
    vectors = np.random.default_rng(seed).normal(size=(rows, spec.dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = np.arange(rows, dtype=np.int64)
    started = time.monotonic()
    template = train_index(small, vectors, seed=seed)
    trained = time.monotonic()
    add_vectors(template, ids, vectors)
    added = time.monotonic()
    search_exact(vectors[:QUERIES], [(ids, vectors)], EXACT_K)
    exact_s = (time.monotonic() - added) / rows / QUERIES
    # Finding the list of a vector is comparing it with each centroid, as exact search does.
    lists_s = (spec.nlist - small.nlist) * exact_s * spec.inner_dim / spec.dim
    walks = spec.coarse == "hnsw"  # how long a walk in a large graph takes, a small one can't tell
    return IndexRates(
        train_gflops=small.training_gflops(rows) / (trained - started),
        add_s=None if walks else (added - trained) / rows + lists_s,
        exact_s=exact_s,
    )
