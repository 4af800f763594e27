"""Labelled queries with their vectors: an index is tuned and measured with them.

Letters: Q queries, D dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from jobs.config import EvaluateConfig
from jobs.contract import QueryEncoder, allowed_precision, read_contract
from jobs.errors import CatalogError, JobError
from jobs.fetch import fetch_images
from jobs.images import ImagesConfig
from jobs.nodes import cluster_gpus
from jobs.queries import IMAGE, KEY, TEXT, Query, read_queries
from jobs.storage import machine_cache
from jobs.store import Store
from jobs.tasks import gather

FETCH_ROWS = 64

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Labelled queries that could be encoded.

    Attributes:
        queries: Q of them, each with a right product.
        root: The folder that relative image URIs start from.
        vectors: (Q, D) float32 unit rows.
        failed: Those that could not be encoded, with the reason.
    """

    queries: list[Query]
    root: str
    vectors: Float32Array = field(repr=False)
    failed: list[str]


def encode_labelled(
    config: EvaluateConfig,
    images: ImagesConfig,
    store: Store,
    contract: dict[str, Any],
    *,
    use_images: bool,
) -> Labelled | None:
    """Encode the configured labelled queries in a Ray task, on a GPU if the cluster has one.

    Args:
        config: Says where they are and how many count.
        images: Limits for their photos.
        store: Has the encoder.
        contract: Names it, its precision, and the weight of a photo beside words.
        use_images: Whether to ask with photos, or with words.

    Returns:
        The queries that could be encoded; None where none are configured.

    Raises:
        CatalogError: The file can't be used, or has no query of this kind.
    """
    if config.queries is None:
        return None
    read = read_queries(config)
    queries = _one_kind(read.queries, use_images=use_images)
    if not queries:
        column = IMAGE if use_images else TEXT
        raise CatalogError(f"{KEY} {config.queries} has no labelled query with {column}")
    task = _encode.options(num_gpus=1 if cluster_gpus() else 0)
    kept, vectors, failed = gather([task.remote(queries, read.root, images, store, contract)])[0]
    return Labelled(queries=kept, root=read.root, vectors=vectors, failed=failed)


def _one_kind(queries: Sequence[Query], *, use_images: bool) -> list[Query]:
    """Keep what a photo alone, or words alone, can ask; queries without a right product go."""
    return [
        replace(query, text=None) if use_images else replace(query, image=None)
        for query in queries
        if (query.image if use_images else query.text) and query.relevant
    ]


@ray.remote(num_cpus=1)
def _encode(
    queries: list[Query], root: str, images: ImagesConfig, store: Store, contract: dict[str, Any]
) -> tuple[list[Query], Float32Array, list[str]]:
    from encoders.checkpoint import load_encoder, load_tokenizers

    space, precision = read_contract(contract), allowed_precision(contract)
    directory = store.local_copy(machine_cache(), "checkpoints", space.encoder)
    encoder = QueryEncoder(
        encoder=load_encoder(directory, precision=precision, expected_fingerprint=space.encoder),
        tokenizer=load_tokenizers(directory).query,
        images=images,
        image_weight=space.fusion.query_image_weight,
    )
    kept: list[Query] = []
    vectors: list[Float32Array] = []
    failed: list[str] = []
    for start in range(0, len(queries), FETCH_ROWS):
        batch = queries[start : start + FETCH_ROWS]
        photos = fetch_images([query.image or b"" for query in batch], root, images)
        for query, photo in zip(batch, photos, strict=True):
            try:
                if query.image and not isinstance(photo, bytes):
                    raise JobError(f"the query image can't be used: {photo}")
                image = photo if query.image and isinstance(photo, bytes) else None
                vectors.append(encoder.encode([image], [query.text]))
                kept.append(query)
            except JobError as error:
                failed.append(f"{query}: {error}")
    dim = max((row.shape[1] for row in vectors), default=0)
    return kept, np.concatenate([np.zeros((0, dim), np.float32), *vectors]), failed
