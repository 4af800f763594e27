"""The catalog's own pictures, small: found by a row of a release, never by what a client names."""

import threading
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from jobs.catalog import Catalog, Unit
from jobs.fetch import fetch_images
from jobs.images import ImageRejected, ImagesConfig, RejectReason
from jobs.items import read_items, read_unit
from jobs.schemas import product_hash
from jobs.thumbnails import thumbnail_jpeg

PICTURE_PX: Final = 320
AT_ONCE: Final = 4  # bounds what decoding takes: max_bytes and max_pixels, so many times
TIMEOUT_S: Final = 3.0  # a browser asks for six things at once: a dead host must not keep them

Int64Array = npt.NDArray[np.int64]


class Pictures:
    """Thumbnails of products. Thread-safe.

    Where the catalog's images are addresses, the release's row has the address. Where they are
    bytes, the catalog is read; 16 bytes of memory a product say where.
    """

    def __init__(self, catalog: Catalog, images: ImagesConfig) -> None:
        """Find where each product's images are, if the catalog holds them itself.

        Args:
            catalog: The checked catalog.
            images: Limits; a picture that takes longer than `TIMEOUT_S` is not tried again.

        Raises:
            CatalogError: A file is damaged.
        """
        timeout_s = min(images.timeout_s, TIMEOUT_S)
        self._catalog, self._images = catalog, replace(images, timeout_s=timeout_s, retries=0)
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        self._units = _find_units(catalog) if catalog.has_bytes else None

    def has(self, image_uri: str | None) -> bool:
        """Whether the catalog has a picture for a row of a release's ids, by the row's address."""
        return self._units is not None or bool(image_uri)

    def thumbnail(self, row: dict[str, Any]) -> bytes:
        """Return a row's picture as a JPEG of at most `PICTURE_PX` a side.

        Args:
            row: As `jobs.ids_table.Ids.find` returns it.

        Raises:
            ImageRejected: There is none, or it can't be read.
            CatalogError: The catalog's file is damaged.
        """
        with self._slots:
            image = row["image_uri"] if self._units is None else self._read(self._units, row)
            found = fetch_images([image], self._catalog.root, self._images)[0]
            if isinstance(found, ImageRejected):
                raise found
            return thumbnail_jpeg(found, self._images, PICTURE_PX)

    def _read(self, units: tuple[Int64Array, Int64Array], row: dict[str, Any]) -> str | bytes:
        """Return the image of a product from the catalog's own bytes."""
        hashes, numbers = units
        wanted = product_hash(row["product_id"])
        first, past = (int(np.searchsorted(hashes, wanted, side)) for side in ("left", "right"))
        for number in numbers[first:past].tolist():
            for items in read_items(self._catalog, self._catalog.units[number], ""):
                for item in items:
                    if (item.product_id, item.image_number) == (
                        row["product_id"],
                        row["image_number"],
                    ):
                        return item.image or b""
        raise ImageRejected(RejectReason.MISSING_IMAGE, "the catalog no longer has it")


def _find_units(catalog: Catalog) -> tuple[Int64Array, Int64Array]:
    """Return the hashes of all product ids (N,) int64, rising, and the unit (N,) of each."""
    found = [_hash_products(catalog, unit) for unit in catalog.units]
    hashes = np.concatenate([np.zeros(0, np.int64), *found])
    counts = np.array([len(one) for one in found], np.int64)
    order = np.argsort(hashes, kind="stable")
    return hashes[order], np.repeat(np.arange(len(counts)), counts)[order]


def _hash_products(catalog: Catalog, unit: Unit) -> Int64Array:
    """Return the hashes of a unit's product ids (N,) int64."""
    column = catalog.columns["product_id"]
    names = (
        name
        for _, table in read_unit(catalog, unit, [column])
        for name in table[column].to_pylist()
        if name
    )
    return np.fromiter(map(product_hash, names), np.int64)
