"""Opens a release and searches it: photo, words or both in, products out.

`Searcher` is what a serving process uses, and the `search` command with it.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from encoders.checkpoint import load_encoder, read_checkpoint_config
from encoders.encoder import fuse
from encoders.preprocess import load_tokenizer
from indexing.build import read_index, set_nprobe
from indexing.search import group_by_product, search_index
from jobs.embed_steps import checkpoint_cache, load_pixels
from jobs.errors import FingerprintError, JobError, StoreError
from jobs.fetch import fetch_images
from jobs.ids import Ids
from jobs.images import ImageRejected, ImagesConfig
from jobs.store import Store, scratch_folder

Float32Array = npt.NDArray[np.float32]
FORMAT_VERSION = 1
MANIFEST_KEYS = {"encoder", "fields", "ids", "image_weight", "products"}
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
        fields: The fields that can be searched, the default one first.
    """

    def __init__(
        self,
        store: Store,
        indexes: str,
        *,
        images: ImagesConfig | None = None,
        encoder: str | None = None,
    ) -> None:
        """Open an index version and its encoder; every file's checksum is verified.

        Args:
            store: The store.
            indexes: Name of the folder below `indexes/`: `Release.indexes`.
            images: Limits for query images.
            encoder: Fingerprint that the release must have; not checked if None.

        Raises:
            StoreError: A file is missing, corrupted or of another version.
            FingerprintError: The indexes belong to another encoder.
        """
        self.store, self.images = store, images or ImagesConfig()
        self.manifest = store.read_json("indexes", indexes, "manifest.json")
        if self.manifest.get("format_version") != FORMAT_VERSION or MANIFEST_KEYS - set(
            self.manifest
        ):
            raise StoreError(f"{store.uri('indexes', indexes)}: unknown manifest format")
        if encoder is not None and encoder != self.manifest["encoder"]:
            raise FingerprintError(
                f"{store.uri('indexes', indexes)} belongs to encoder "
                f"{self.manifest['encoder'][:12]}, not to {encoder[:12]}"
            )
        self.fields = [name for name in FIELD_ORDER if name in self.manifest["fields"]]
        cache = scratch_folder("release")
        try:
            self._open(store, cache, indexes)
        except ValueError as error:
            raise StoreError(f"{store.uri('indexes', indexes)}: {error}") from error
        finally:
            shutil.rmtree(cache)

    def _open(self, store: Store, cache: Path, indexes: str) -> None:
        self.indexes: dict[str, faiss.Index] = {}
        for name, entry in self.manifest["fields"].items():
            path = store.local_copy(cache, "indexes", indexes, entry["file"])
            self.indexes[name] = read_index(path, sha256=entry["sha256"])
            set_nprobe(self.indexes[name], entry["nprobe"])
        path = store.local_copy(cache, "indexes", indexes, self.manifest["ids"]["file"])
        self.ids = Ids(path, sha256=self.manifest["ids"]["sha256"])
        directory = store.local_copy(checkpoint_cache(), "checkpoints", self.manifest["encoder"])
        self.encoder = load_encoder(
            directory, precision="auto", expected_fingerprint=self.manifest["encoder"]
        )
        self.tokenizer = load_tokenizer(read_checkpoint_config(directory)[0])

    def encode(self, image: bytes | None, text: str | None) -> Float32Array:
        """Return the query vector (D,) of a photo, words, or both (fused by the release's weight).

        Raises:
            JobError: The image can't be decoded, the text is empty, or there is neither.
        """
        if image is None and text is None:
            raise JobError("a search needs an image, a text, or both")
        if text is not None and not text.strip():
            raise JobError("the query text is empty")
        vectors: list[Float32Array] = []
        if image is not None:
            try:
                pixels = load_pixels(image, self.images, self.encoder.preprocess)
            except ImageRejected as reject:
                raise JobError(f"the query image can't be used: {reject}") from reject
            vectors.append(self.encoder.encode_images(pixels[None]))
        if text is not None:
            vectors.append(self.encoder.encode_texts(self.tokenizer([text])))
        if len(vectors) == 2:
            vectors = [fuse(vectors[0], vectors[1], self.manifest["image_weight"])]
        found: Float32Array = vectors[0][0]
        return found

    def search(
        self,
        *,
        image: bytes | str | Path | None = None,
        text: str | None = None,
        k: int = 10,
        field: str | None = None,
    ) -> list[Result]:
        """Find the k products that are most like a photo, words, or both.

        Args:
            image: Encoded bytes or a path.
            text: Words.
            k: Most products.
            field: Which product vectors to compare with; the release's first field if None.

        Raises:
            JobError: The query can't be used, or there is no such field.
        """
        if image is not None and not isinstance(image, bytes):
            read = fetch_images([str(Path(image).absolute())], ".", self.images)[0]
            if isinstance(read, ImageRejected):
                raise JobError(f"the query image can't be used: {read}") from read
            image = read
        return self.search_vectors(self.encode(image, text)[None], k=k, field=field)[0]

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
        index = self.indexes[name]
        # Several images a product share one place in the answer: look further than k.
        images_a_product = max(
            1, round(len(self.ids.vector_id) / max(1, self.manifest["products"]))
        )
        depth = min(index.ntotal, 4 * k * images_a_product)
        scores, ids = search_index(index, queries, depth)
        return [self._products(s, i, k) for s, i in zip(scores, ids, strict=True)]

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
