"""Training pairs: what a preset needs of them, and their pictures, decoded and kept in a bound."""

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encoders.checkpoint_files import CheckpointConfig
from encoders.objectives import MSR_PRESETS, PRESETS
from jobs.embed_steps import load_pixels
from jobs.errors import CatalogError
from jobs.fetch import fetch_images
from jobs.images import ImageRejected, ImagesConfig, RejectReason
from jobs.pairs import read_pairs
from jobs.schemas import hash63

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]

CACHE_BYTES = 2**30
MOST_ANSWERS = 64  # products that one query's words are known to be right for, in the loss
PHOTO_MARGIN = 1.25  # street photos are kept larger, so that a crop of them keeps its detail


def picture_column(names: Sequence[str], role: str) -> str | None:
    """Return the column of a role's picture: `<role>_image_uri`, or `<role>_image`; or None."""
    return next((n for n in (f"{role}_image_uri", f"{role}_image") if n in names), None)


@dataclass(frozen=True, kw_only=True)
class Products:
    """The distinct products of some pairs.

    Attributes:
        ids: (P,) int64, the hash of the product id.
        rows: (P,) int64, a row of the pairs where each is.
    """

    ids: Int64Array
    rows: Int64Array


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A row that can be trained on, with its pictures.

    Attributes:
        row: The row.
        photo: (H, W, 3) uint8, the query's; None in MSR, which has words alone.
        picture: (H, W, 3) uint8, the product's; None where an MSR product has none.
    """

    row: int
    photo: UInt8Array | None
    picture: UInt8Array | None


class PairData:
    """Pairs of one Parquet file; pictures are decoded when first wanted, and kept within a bound.

    Attributes:
        table: The pairs, all of one row or more.
        product_ids: (N,) int64, hash of the product id.
        query_ids: (N,) int64, hash of the query text; of the row's number where there is none.
        answers: By query id, the products (hashes) that any pair says are right for it, sorted.
        bad_pictures: Why a picture could not be used, by its address; by its row where a MIM
            pair has none.
    """

    def __init__(
        self,
        path: str,
        key: str,
        preset: str,
        encoder: CheckpointConfig,
        images: ImagesConfig,
        *,
        threads: int = 2,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Read the table; no picture yet.

        Args:
            path: A Parquet file, local or `s3://`.
            key: The configuration's key that names it.
            preset: Decides which columns have to be there.
            encoder: What the encoder is: its preprocessing is read.
            images: Limits on pictures.
            threads: How many pictures `pictures` fetches and decodes at once.
            cache_bytes: Most bytes of decoded pictures to keep.

        Raises:
            CatalogError: The file can't be read, lacks columns or has them of other types, is
                empty, or has null product ids.
        """
        self.is_msr = preset in MSR_PRESETS
        self.preset = preset
        optional = [f"{r}_image{s}" for r in ("query", "product") for s in ("_uri", "")]
        texts = ("query_text", "product_text")
        self.table, self._root = read_pairs(
            path, ("product_id",), key=key, optional=[*optional, *texts]
        )
        self._pictures = {
            role: picture_column(self.table.column_names, role) for role in ("query", "product")
        }
        self._check_columns(path, key)
        _check_types(self.table, path, key)
        self.preprocess = encoder.preprocess
        side = round(encoder.preprocess.size_px * PHOTO_MARGIN)
        self._photo = replace(encoder.preprocess, size_px=side)
        self._images, self._threads = images, threads
        self._cache: dict[tuple[str | int, int], UInt8Array] = {}
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._lock = threading.Lock()
        self.bad_pictures: dict[str, str] = {}
        names = self.table["product_id"].to_pylist()
        nameless = sum(name in (None, "") for name in names)
        if nameless:
            raise CatalogError(f"{key} {path}: {nameless} rows have no product_id")
        self.names: list[str] = [str(name) for name in names]
        self.product_ids = _hash_all(self.names)
        self.query_ids = _hash_all(
            [text or f"\0{row}" for row, text in enumerate(self.texts("query", range(len(self))))]
        )
        self.answers = _group_answers(self.query_ids, self.product_ids)
        most = max(len(products) for products in self.answers.values())
        self._most_answers = min(MOST_ANSWERS, most)

    def __len__(self) -> int:
        return len(self.table)

    def _check_columns(self, path: str, key: str) -> None:
        roles = {role for term in PRESETS[self.preset] for role in (term.query, term.key)}
        if self.is_msr:
            roles = {"query_text", "product_text"}
        have = {f"{role}_image" for role, column in self._pictures.items() if column}
        missing = sorted(
            role
            for role in roles - {"fused_query"}
            if role not in have and role not in self.table.column_names
        )
        if missing:
            names = [f"{n}_uri" if n.endswith("image") else n for n in missing]
            raise CatalogError(f"{key} {path} has no column {', '.join(names)}: {self.preset}")

    def products(self) -> Products:
        """List the distinct products, each at its first row."""
        ids, rows = np.unique(self.product_ids, return_index=True)
        return Products(ids=ids, rows=rows.astype(np.int64))

    def right_ids(self, rows: Sequence[int]) -> Int64Array:
        """Return the products that answer the rows' queries, (B, R) int64, padded with -1.

        R is the same for all rows of the file; at most `MOST_ANSWERS`, beyond which some are left
        out.
        """
        found = np.full((len(rows), self._most_answers), -1, np.int64)
        for place, row in enumerate(rows):
            known = self.answers[int(self.query_ids[row])][: self._most_answers]
            found[place, : len(known)] = known
        return found

    def texts(self, role: str, rows: Sequence[int] | Int64Array | range) -> list[str]:
        """Return `query` or `product` texts of rows; "" where there is none."""
        name = f"{role}_text"
        if name not in self.table.column_names:
            return [""] * len(rows)
        picked = self.table[name].take(pa.array(np.asarray(rows, np.int64)))
        return [(text or "").strip() for text in picked.to_pylist()]

    def picture(self, role: str, row: int, *, photo: bool = False) -> UInt8Array | None:
        """Return a row's picture.

        Args:
            role: "query" or "product".
            row: The row.
            photo: Whether to return it larger, to be cropped from.

        Returns:
            (H, W, 3) uint8; None where there is none, or it can't be used: see `bad_pictures`.
        """
        column = self._pictures[role]
        value = None if column is None else self.table[column][row].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            if not self.is_msr:
                self._reject(f"{role} of row {row}", RejectReason.MISSING_IMAGE)
            return None
        spec = self._photo if photo else self.preprocess
        key = (value if isinstance(value, str) else hash63((value,)), spec.size_px)
        with self._lock:
            if key in self._cache or str(key[0]) in self.bad_pictures:
                return self._cache.get(key)
        data = fetch_images([value], self._root, self._images)[0]
        try:
            found = load_pixels(data, self._images, spec)
        except ImageRejected as reject:
            self._reject(str(key[0]), reject)
            return None
        with self._lock:
            fits = self._cached_bytes + found.nbytes <= self._cache_bytes
            if fits and key not in self._cache:
                self._cached_bytes += found.nbytes
                self._cache[key] = found
        return found

    def pictures(
        self, role: str, rows: Sequence[int] | Int64Array
    ) -> tuple[UInt8Array, npt.NDArray[np.bool_]]:
        """Return the pictures of B rows.

        Returns:
            (B, H, W, 3) uint8, black where there is none, and (B,) bool: where there is one.
        """
        side = self.preprocess.size_px
        pixels = np.zeros((len(rows), side, side, 3), np.uint8)
        there = np.zeros(len(rows), bool)
        with ThreadPoolExecutor(self._threads) as pool:
            found = pool.map(lambda row: self.picture(role, int(row)), rows)
            for place, picture in enumerate(found):
                if picture is not None:
                    pixels[place], there[place] = picture, True
        return pixels, there

    def load(self, row: int, *, photo: bool = False) -> Pair | None:
        """Load what a row is trained with: both pictures (MIM), or words and a product (MSR).

        Args:
            row: The row.
            photo: As `picture`, for the street photo.

        Returns:
            The pair; None where something is missing.
        """
        picture = self.picture("product", row)
        if self.is_msr:
            product = picture is not None or self.texts("product", [row])[0]
            usable = product and self.texts("query", [row])[0]
            return Pair(row=row, photo=None, picture=picture) if usable else None
        street = self.picture("query", row, photo=photo)
        if picture is None or street is None:
            return None
        return Pair(row=row, photo=street, picture=picture)

    def count_bad(self) -> dict[str, int]:
        """Count the pictures that could not be used by reason, the most frequent first."""
        with self._lock:
            reasons = [why.partition(":")[0] for why in self.bad_pictures.values()]
        return dict(Counter(reasons).most_common())

    def explain_bad(self) -> str:
        """Say in one line why pairs can't be used: the reasons, and an example."""
        with self._lock:
            example = next(iter(self.bad_pictures.values()), "")
        counts = ", ".join(f"{count} {reason}" for reason, count in self.count_bad().items())
        if not counts:
            return "they have no words, or neither text nor picture of the product"
        return f"{counts} (such as {example})"

    def _reject(self, address: str, why: ImageRejected | RejectReason) -> None:
        with self._lock:
            self.bad_pictures[address] = str(why)


def _check_types(table: pa.Table, path: str, key: str) -> None:
    """Refuse columns of other types than they have in catalogs, and texts that are no UTF-8."""
    faults = []
    for one in table.schema:
        kind = one.type.value_type if pa.types.is_dictionary(one.type) else one.type
        expected, fits = _judge_type(one.name, kind)
        if not (fits or pa.types.is_null(kind)):
            faults.append(f"column {one.name} is {one.type}, expected {expected}")
    if faults:
        raise CatalogError(f"{key} {path}: {', '.join(faults)}")
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        raise CatalogError(f"{key} {path}: {error}") from error


def _judge_type(name: str, kind: pa.DataType) -> tuple[str, bool]:
    types = pa.types
    text = types.is_string(kind) or types.is_large_string(kind)
    if name == "product_id":
        return "string", text or types.is_integer(kind)
    if not name.endswith("_image"):
        return "string", text
    names = [one.name for one in kind] if types.is_struct(kind) else []
    pictures = types.is_binary(kind) or types.is_large_binary(kind) or {"bytes", "path"} & {*names}
    return "string, binary or struct<bytes, path>", text or bool(pictures)


def _hash_all(texts: Sequence[str]) -> Int64Array:
    return np.array([hash63((t.encode("utf-8", "surrogatepass"),)) for t in texts], np.int64)


def _group_answers(query_ids: Int64Array, product_ids: Int64Array) -> dict[int, Int64Array]:
    found: dict[int, set[int]] = {}
    for query, product in zip(query_ids.tolist(), product_ids.tolist(), strict=True):
        found.setdefault(query, set()).add(product)
    return {query: np.array(sorted(products), np.int64) for query, products in found.items()}
