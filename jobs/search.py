"""Opens a release and searches it: photo, words or both in, products out.

`Searcher` is what a serving process uses, and the `search` command with it.
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from indexing.search import (
    Chosen,
    SearchPoint,
    choose,
    group_by_product,
    search_partitions,
    search_pool,
)
from indexing.topk import PADDING_ID
from jobs.contract import (
    QueryEncoder,
    allowed_precision,
    check_contract,
    check_encoder,
    read_contract,
)
from jobs.errors import FingerprintError, JobError, StoreError
from jobs.fetch import fetch_images
from jobs.ids_table import Ids
from jobs.images import ImageRejected, ImagesConfig
from jobs.index_files import open_partitions, read_files, read_point
from jobs.schemas import MANIFEST_FORMAT
from jobs.storage import machine_cache
from jobs.store import Store

if TYPE_CHECKING:
    from encoders.encoder import Encoder

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
MANIFEST_KEYS = {"encoder", "fields", "ids", "products", "query"}
FIELD_ORDER = ("multimodal", "image", "text")
DEEPER = 4  # times as many vectors, where the first hold too few products
SearchIds = Callable[[Float32Array, int], tuple[Float32Array, Int64Array]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A found product: its best vector and its score (inner product of unit vectors, -1 to 1)."""

    product_id: str
    score: float
    image_uri: str | None
    metadata: dict[str, Any]
    vector_id: int


class Searcher:
    """One release, opened: encoder, indexes and ids that belong together. Thread-safe.

    Index files, refine stores and ids are mapped into memory, read only; FastScan codes are read
    into it. Partitions are searched in parallel.

    Attributes:
        manifest: The index version's manifest.
        space: What the release's vectors are, and the weights in force.
        fields: The fields that can be searched, the default one first.
        points: By field: the operating point, which a search uses that names no other.
        indexes: By field: its partitions.
        ids: What each vector id is.
        encoder: Encodes queries; another release of the same encoder can be opened with it.
    """

    def __init__(
        self,
        store: Store,
        indexes: str,
        *,
        images: ImagesConfig | None = None,
        encoder: "str | Encoder | None" = None,
    ) -> None:
        """Open an index version and its encoder.

        Every file's checksum is verified, and the encoder must give the canaries of the
        release's query contract their vectors.

        Args:
            store: The store.
            indexes: Name of the folder below `indexes/`: `Release.indexes`.
            images: Limits for query images.
            encoder: Fingerprint that the release must have, or a live encoder of the caller's
                own (on another device, compiled); None: the release's own, whatever it is.

        Raises:
            StoreError: A file is missing, corrupted or of another version.
            FingerprintError: The indexes belong to another encoder, or the encoder doesn't keep
                the query contract.
        """
        self.store, self.images = store, images or ImagesConfig()
        self.manifest = store.read_json("indexes", indexes, "manifest.json")
        version, missing = self.manifest.get("format_version"), MANIFEST_KEYS - set(self.manifest)
        if version != MANIFEST_FORMAT or missing or not isinstance(self.manifest["query"], dict):
            raise StoreError(
                f"{store.uri('indexes', indexes)}: a manifest of format {version!r}, expected "
                f"{MANIFEST_FORMAT}: it is of another version of Vitrine; make the store anew"
            )
        self.space = read_contract(self.manifest["query"])
        expected = encoder if isinstance(encoder, str) else self.manifest["encoder"]
        if expected != self.space.encoder:
            raise FingerprintError(
                f"{store.uri('indexes', indexes)} belongs to encoder "
                f"{self.space.encoder[:12]}, not to {expected[:12]}"
            )
        entries = self.manifest["fields"]
        self.fields = [name for name in FIELD_ORDER if name in entries]
        self.points = {name: read_point(entry) for name, entry in entries.items()}
        self.indexes = {
            name: open_partitions(store, read_files(entry)) for name, entry in entries.items()
        }
        self.ids = Ids.open(store, self.manifest["ids"], machine_cache() / "ids")
        most = max(len(partitions) for partitions in self.indexes.values())
        self._pool = search_pool(min(most, os.cpu_count() or 1)) if most > 1 else None
        try:
            self._open_encoder(store, None if isinstance(encoder, str) else encoder)
        except ValueError as error:
            raise StoreError(f"{store.uri('indexes', indexes)}: {error}") from error

    def _open_encoder(self, store: Store, encoder: "Encoder | None") -> None:
        from encoders.checkpoint import load_encoder, load_tokenizers  # torch and open_clip

        directory = store.local_copy(machine_cache(), "checkpoints", self.space.encoder)
        if encoder is None:
            precision = allowed_precision(self.manifest["query"])
            encoder = load_encoder(
                directory, precision=precision, expected_fingerprint=self.space.encoder
            )
        check_encoder(self.space, encoder)
        self.encoder = encoder
        self._queries = QueryEncoder(
            encoder=encoder,
            tokenizer=load_tokenizers(directory).query,
            images=self.images,
            image_weight=self.space.fusion.query_image_weight,
        )
        canaries = replace(self._queries, images=ImagesConfig())
        check_contract(self.manifest["query"], canaries.encode)

    def encode(
        self, image: bytes | None, text: str | None, *, image_weight: float | None = None
    ) -> Float32Array:
        """Return the query vector (D,) float32 of a photo, words, or both.

        Args:
            image: Encoded bytes.
            text: Words.
            image_weight: Share of the photo where there are both; the release's own if None.

        Raises:
            JobError: The image can't be decoded, the text is empty, there is neither, or the
                weight is outside [0, 1].
        """
        found: Float32Array = self.encode_batch([image], [text], image_weight=image_weight)[0]
        return found

    def encode_batch(
        self,
        images: Sequence[bytes | None],
        texts: Sequence[str | None],
        *,
        image_weight: float | None = None,
    ) -> Float32Array:
        """Return the query vectors (Q, D) float32 of Q queries, a forward pass a kind of query.

        Args:
            images: Encoded bytes; None: words alone.
            texts: Words; None: the photo alone.
            image_weight: As in `encode`.

        Raises:
            JobError: As `encode`, for any of the queries.
        """
        if image_weight is None:
            return self._queries.encode(images, texts)
        if not 0.0 <= image_weight <= 1.0:
            raise JobError(f"image_weight is {image_weight}, expected 0 to 1")
        return replace(self._queries, image_weight=image_weight).encode(images, texts)

    def search(
        self,
        *,
        image: bytes | str | Path | None = None,
        text: str | None = None,
        k: int = 10,
        field: str | None = None,
        image_weight: float | None = None,
        only: pc.Expression | Collection[str] | None = None,
    ) -> list[Result]:
        """Find the k products that are most like a photo, words, or both.

        Args:
            image: Encoded bytes or a path.
            text: Words.
            k: Most products.
            field: Which product vectors to compare with; the release's first field if None.
            image_weight: As in `encode`.
            only: As in `search_vectors`.

        Raises:
            JobError: The query can't be used, or there is no such field.
        """
        if image is None or isinstance(image, bytes):
            query = self.encode(image, text, image_weight=image_weight)
        else:
            query = self._encode_file(Path(image), text, image_weight)
        return self.search_vectors(query[None], k=k, field=field, only=only)[0]

    def _encode_file(
        self, path: Path, text: str | None, image_weight: float | None
    ) -> Float32Array:
        read = fetch_images([str(path.absolute())], ".", self.images)[0]
        if isinstance(read, ImageRejected):
            raise JobError(f"the query image {path} can't be used: {read}") from read
        try:
            return self.encode(read, text, image_weight=image_weight)
        except JobError as error:
            if isinstance(error.__cause__, ImageRejected):
                raise JobError(
                    f"the query image {path} can't be used: {error.__cause__}"
                ) from error
            raise

    def search_vectors(
        self,
        queries: Float32Array,
        *,
        k: int = 10,
        field: str | None = None,
        only: pc.Expression | Collection[str] | Chosen | None = None,
        point: SearchPoint | None = None,
    ) -> list[list[Result]]:
        """Find the k most similar products of each query vector.

        Args:
            queries: (Q, D) float32 unit rows.
            k: Most products a query.
            field: As in `search`.
            only: Which products may be found: a predicate over metadata columns, as
                `pyarrow.compute.field("price") < 20`, a collection of product ids, or either as
                `choose` prepared it for this field.
            point: How deep to search; the release's operating point if None.

        Raises:
            JobError: There is no such field, k < 1, the filter can't be used, or the point
                doesn't fit the index.
        """
        name = self._field(field)
        if k < 1:
            raise JobError(f"k is {k}, expected at least 1")
        chosen = only if isinstance(only, Chosen) else self.choose(only, field=name)
        search = partial(self.search_ids, field=name, only=chosen, point=point)
        try:
            return self._search_products(queries, k, self.depth(k, name), search)
        except ValueError as error:
            raise JobError(str(error)) from error

    def search_ids(
        self,
        queries: Float32Array,
        k: int,
        *,
        field: str | None = None,
        only: Int64Array | Chosen | None = None,
        point: SearchPoint | None = None,
    ) -> tuple[Float32Array, Int64Array]:
        """Find the k most similar vectors of each query vector, not grouped into products.

        Args:
            queries: (Q, D) float32 unit rows.
            k: Neighbours a query.
            field: As in `search`.
            only: (M,) int64, rising: the vector ids that may be found (`select`); or `choose`'s.
            point: As in `search_vectors`.

        Returns:
            Scores (Q, K) float32, best first, and vector ids (Q, K) int64, padded with -1.

        Raises:
            JobError: There is no such field.
            ValueError: See `indexing.search.search_partitions`.
        """
        name = self._field(field)
        point = point or self.points[name]
        pool = self._pool if len(self.indexes[name]) > 1 else None
        return search_partitions(self.indexes[name], queries, k, point, only=only, pool=pool)

    def choose(
        self, only: pc.Expression | Collection[str] | None, *, field: str | None = None
    ) -> Chosen | None:
        """Prepare a filter for many searches of a field; one that lets much through is dear.

        Raises:
            JobError: The predicate can't be used, or there is no such field.
        """
        self._field(field)
        ids = self.select(only)
        # A text field holds one vector a product, the filter all its images: the share is of those.
        return None if ids is None else choose(ids, len(self.ids))

    def select(self, only: pc.Expression | Collection[str] | None) -> Int64Array | None:
        """Return the vector ids (M,) int64, rising, that a filter lets through; None: all.

        Raises:
            JobError: The predicate can't be used.
        """
        if only is None:
            return None
        if isinstance(only, pc.Expression):
            return self.ids.select(only)
        return self.ids.select_products([only] if isinstance(only, str) else only)

    def depth(self, k: int, field: str) -> int:
        """Return how many vectors of a field are looked at first for k products.

        Several images a product share one place in the answer, so that it is more than k.
        """
        images = 1 if field == "text" else round(len(self.ids) / max(1, self.manifest["products"]))
        held = sum(partition.index.ntotal for partition in self.indexes[field])
        depth: int = min(held, 4 * k * max(1, images))
        return depth

    def _field(self, field: str | None) -> str:
        name = field or self.fields[0]
        if name not in self.indexes:
            raise JobError(f"the release has no field {name!r}; it has {', '.join(self.fields)}")
        return name

    def _search_products(
        self, queries: Float32Array, k: int, depth: int, search: SearchIds
    ) -> list[list[Result]]:
        """Return each query's products, from so many vectors, or from more where those are few.

        A product may have far more images than most, and take all of the first places.
        """
        scores, ids = search(queries, depth)
        found = [self._products(s, i, k) for s, i in zip(scores, ids, strict=True)]
        short = [n for n, one in enumerate(found) if len(one) < k and ids[n, -1] != PADDING_ID]
        if short:
            deeper = self._search_products(queries[short], k, DEEPER * depth, search)
            for number, results in zip(short, deeper, strict=True):
                found[number] = results
        return found

    def _products(self, scores: Float32Array, ids: Int64Array, k: int) -> list[Result]:
        scores, ids = scores[ids >= 0], ids[ids >= 0]
        found = group_by_product(scores, ids, self.ids.products(ids), k)
        rows = self.ids.find(np.array([vector for _, _, vector in found], np.int64))
        return [
            Result(
                product_id=product,
                score=score,
                image_uri=row["image_uri"],
                metadata=row["metadata"] or {},
                vector_id=vector,
            )
            for (product, score, vector), row in zip(found, rows, strict=True)
        ]


def open_release(
    store: Store | str | PathLike[str],
    version: int | None = None,
    *,
    images: ImagesConfig | None = None,
) -> Searcher:
    """Open a published release, the newest if no version is given.

    Args:
        store: The store, or its address: a folder or `s3://bucket/prefix`.
        version: A release's version.
        images: Limits for query images.

    Raises:
        StoreError: There is no such release, or it is damaged.
    """
    opened = store if isinstance(store, Store) else Store(fspath(store))
    release = opened.release(version)
    return Searcher(opened, release.indexes, images=images, encoder=release.encoder)


def result_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Turn results into plain values for JSON."""
    return [
        {
            "product_id": r.product_id,
            "score": r.score,
            "image_uri": r.image_uri,
            "metadata": r.metadata,
        }
        for r in results
    ]
