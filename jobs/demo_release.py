"""A release as the page shows it: opened, with its columns described and its products' vectors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from jobs.config import JobConfig
from jobs.demo_columns import ColumnFilter, describe_columns
from jobs.errors import StoreError
from jobs.ids_cache import cache_ids
from jobs.live import LIVE_DTYPE
from jobs.plain import title_columns
from jobs.release_files import read_file_names
from jobs.search import Searcher
from jobs.state import ROW_GROUP_ROWS, rows_address
from jobs.storage import machine_cache, parquet_errors
from jobs.store import Release, Store
from jobs.vectors import read_blocks

if TYPE_CHECKING:
    from encoders.encoder import Encoder  # torch: seconds

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One release on the page.

    Attributes:
        name: As people say it: "release 3", "candidate 20260101T120000-aaaaaa".
        release: What it is made of; of a candidate, `version` is not published.
        searcher: The opened release.
        columns: What can be filtered by.
        title: The metadata column that is a product's title, if there is one.
        price: The one that is its price.
    """

    name: str
    release: Release
    searcher: Searcher = field(repr=False)
    columns: Mapping[str, ColumnFilter] = field(repr=False)
    title: str | None
    price: str | None

    @property
    def key(self) -> str:
        """What names its rows, and never other ones: the folder of its indexes."""
        return self.release.indexes


def open_shown(
    store: Store, release: Release, name: str, config: JobConfig, beside: Shown | None = None
) -> Shown:
    """Open a release or a candidate.

    Args:
        store: The store.
        release: Which.
        name: As people say it.
        config: Its `images` are the limits of photos, its `catalog.columns` name the title.
        beside: Another one; where both have the same query contract, they share the encoder.

    Raises:
        StoreError: It is damaged.
        FingerprintError: See `jobs.search.Searcher`.
    """
    encoder: str | Encoder = release.encoder
    if beside is not None:
        manifest = store.read_json("indexes", release.indexes, "manifest.json")
        if manifest.get("query") == beside.searcher.manifest["query"]:
            encoder = beside.searcher.encoder
    searcher = Searcher(store, release.indexes, images=config.images, encoder=encoder)
    path = cache_ids(store, searcher.manifest["ids"], machine_cache() / "ids", ROW_GROUP_ROWS)
    physical, there = config.catalog.columns, searcher.ids.columns
    titles = title_columns(physical)
    price = physical.get("price", "price")
    return Shown(
        name=name,
        release=release,
        searcher=searcher,
        columns=describe_columns(path),
        title=next((column for column in titles if column in there), None),
        price=price if price in there else None,
    )


def product_vector(shown: Shown, product_id: str, field: str) -> Float32Array | None:
    """Read the stored vector (D,) float32 of a product's first image; None: it isn't there.

    Args:
        shown: The release.
        product_id: The product.
        field: Which of its vectors; a fused one is fused as the index's are.

    Raises:
        StoreError: A file is missing or damaged.
    """
    store = shown.searcher.store
    row = shown.searcher.ids.first_rows([product_id]).get(product_id)
    if row is None:
        return None
    address = rows_address(store, shown.release)
    names = ["vector_id", "file", "row", "first"]
    wanted = [("vector_id", "==", row["vector_id"])]
    with parquet_errors(address), store.filesystem().open(address, "rb") as handle:
        table = pq.read_table(handle, columns=names, filters=wanted)
    if table.num_rows != 1:
        raise StoreError(f"{address}: {table.num_rows} rows of one vector id: it is damaged")
    live = np.zeros(1, LIVE_DTYPE)
    for name in names:
        live[name] = table[name].to_numpy()
    files = (0, read_file_names(store, address))
    blocks = list(read_blocks(store, shown.searcher.space.field(field), files, live))
    vector: Float32Array = blocks[0][1][0]
    return vector
