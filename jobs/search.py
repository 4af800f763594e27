"""Opens a release and searches it: photo, words or both in, products out.

`Searcher` is what a serving process uses, and the `search` command with it.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from encoders.checkpoint import load_encoder, load_tokenizers
from encoders.encoder import Encoder
from indexing.build import read_index, set_nprobe
from indexing.search import group_by_product, search_index
from jobs.contract import QueryEncoder, check_contract, check_encoder, read_contract
from jobs.embed_steps import checkpoint_cache
from jobs.errors import FingerprintError, JobError, StoreError
from jobs.fetch import fetch_images
from jobs.ids import Ids
from jobs.images import ImageRejected, ImagesConfig
from jobs.store import Store, scratch_folder

Float32Array = npt.NDArray[np.float32]
FORMAT_VERSION = 3
MANIFEST_KEYS = {"encoder", "fields", "ids", "products", "query"}
FIELD_ORDER = ("multimodal", "image", "text")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A found product: its best vector's score (inner product of unit vectors, -1 to 1)."""

    product_id: str
    score: float
    image_uri: str | None
    metadata: dict[str, Any]


class Searcher:
    """One release, opened: encoder, indexes and ids that belong together.

    Attributes:
        manifest: The index version's manifest.
        space: What the release's vectors are, and the weights in force.
        fields: The fields that can be searched, the default one first.
    """

    def __init__(
        self,
        store: Store,
        indexes: str,
        *,
        images: ImagesConfig | None = None,
        encoder: str | Encoder | None = None,
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
        if version != FORMAT_VERSION or missing or not isinstance(self.manifest["query"], dict):
            raise StoreError(
                f"{store.uri('indexes', indexes)}: a manifest of format {version!r}, expected "
                f"{FORMAT_VERSION}: run the refresh again"
            )
        self.space = read_contract(self.manifest["query"])
        expected = encoder if isinstance(encoder, str) else self.manifest["encoder"]
        if expected != self.space.encoder:
            raise FingerprintError(
                f"{store.uri('indexes', indexes)} belongs to encoder "
                f"{self.space.encoder[:12]}, not to {expected[:12]}"
            )
        self.fields = [name for name in FIELD_ORDER if name in self.manifest["fields"]]
        cache = scratch_folder("release")
        try:
            self._open(store, cache, indexes, None if isinstance(encoder, str) else encoder)
        except ValueError as error:
            raise StoreError(f"{store.uri('indexes', indexes)}: {error}") from error
        finally:
            shutil.rmtree(cache)

    def _open(self, store: Store, cache: Path, indexes: str, encoder: Encoder | None) -> None:
        self.indexes: dict[str, faiss.Index] = {}
        for name, entry in self.manifest["fields"].items():
            path = store.local_copy(cache, "indexes", entry["folder"], entry["file"])
            self.indexes[name] = read_index(path, sha256=entry["sha256"])
            set_nprobe(self.indexes[name], entry["nprobe"])
        path = store.local_copy(
            cache, "indexes", self.manifest["ids"]["folder"], self.manifest["ids"]["file"]
        )
        self.ids = Ids(path, sha256=self.manifest["ids"]["sha256"])
        directory = store.local_copy(checkpoint_cache(), "checkpoints", self.space.encoder)
        if encoder is None:
            encoder = load_encoder(
                directory, precision="auto", expected_fingerprint=self.space.encoder
            )
        check_encoder(self.space, encoder)
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
    ) -> list[Result]:
        """Find the k products that are most like a photo, words, or both.

        Args:
            image: Encoded bytes or a path.
            text: Words.
            k: Most products.
            field: Which product vectors to compare with; the release's first field if None.
            image_weight: As in `encode`.

        Raises:
            JobError: The query can't be used, or there is no such field.
        """
        if image is not None and not isinstance(image, bytes):
            read = fetch_images([str(Path(image).absolute())], ".", self.images)[0]
            if isinstance(read, ImageRejected):
                raise JobError(f"the query image can't be used: {read}") from read
            image = read
        query = self.encode(image, text, image_weight=image_weight)
        return self.search_vectors(query[None], k=k, field=field)[0]

    def search_vectors(
        self, queries: Float32Array, *, k: int = 10, field: str | None = None
    ) -> list[list[Result]]:
        """Find the k most similar products of each query vector.

        Args:
            queries: (Q, D) float32 unit rows.
            k: Most products a query.
            field: As in `search`.

        Raises:
            JobError: There is no such field, or k < 1.
        """
        name = field or self.fields[0]
        if name not in self.indexes:
            raise JobError(f"the release has no field {name!r}; it has {', '.join(self.fields)}")
        if k < 1:
            raise JobError(f"k is {k}, expected at least 1")
        scores, ids = search_index(self.indexes[name], queries, self.depth(k, name))
        return [self._products(s, i, k) for s, i in zip(scores, ids, strict=True)]

    def depth(self, k: int, field: str) -> int:
        """Return how many vectors of a field are looked at for k products.

        Several images a product share one place in the answer, so that it is more than k.
        """
        images_a_product = round(len(self.ids.vector_id) / max(1, self.manifest["products"]))
        depth: int = min(self.indexes[field].ntotal, 4 * k * max(1, images_a_product))
        return depth

    def _products(self, scores: Float32Array, ids: npt.NDArray[np.int64], k: int) -> list[Result]:
        scores, ids = scores[ids >= 0], ids[ids >= 0]
        rows = self.ids.find(ids)
        by_id = {row["vector_id"]: row for row in rows}
        found = group_by_product(scores, ids, [row["product_id"] for row in rows], k)
        return [
            Result(
                product_id=product,
                score=score,
                image_uri=by_id[vector]["image_uri"],
                metadata=by_id[vector]["metadata"] or {},
            )
            for product, score, vector in found
        ]


def open_release(
    store: Store, version: int | None = None, *, images: ImagesConfig | None = None
) -> Searcher:
    """Open a published release, the newest if no version is given.

    Raises:
        StoreError: There is no such release, or it is damaged.
    """
    release = store.release(version)
    return Searcher(store, release.indexes, images=images, encoder=release.encoder)


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
