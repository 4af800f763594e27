"""Reads a catalog's units as items: one (product, image) each, with its text and identity.

A product without an image is one item too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.catalog import VERSION_COLUMNS, Catalog, Unit, partition_values, template_names
from jobs.errors import CatalogError
from jobs.fetch import read_etags
from jobs.images import ImagesConfig
from jobs.schemas import hash63, product_hash, vector_id
from jobs.storage import PARQUET_ERRORS, one_line, open_filesystem

READ_ROWS = 256
PLAN_DTYPE = np.dtype(
    [
        ("vector_id", "<i8"),
        ("product", "<i8"),
        ("image_hash", "<i8"),
        ("text_hash", "<i8"),
        ("etag_hash", "<i8"),
        ("metadata_hash", "<i8"),
        ("image_number", "<i4"),
        ("unit", "<i4"),
    ]
)
"""What the diff keeps of an item: 56 bytes. `product` is the hash of the product's id, `unit` the
number of the catalog's unit that holds it; `etag_hash` is 0 where nothing is known."""


def read_unit(catalog: Catalog, unit: Unit, physical: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yield a unit's rows in small tables of at most `READ_ROWS` rows.

    Args:
        catalog: The checked catalog.
        unit: What to read.
        physical: Columns of the file or of its partition path.

    Yields:
        (number of the first row in its row group, table).

    Raises:
        CatalogError: The file is damaged.
    """
    try:
        yield from _read_unit(catalog, unit, physical)
    except PARQUET_ERRORS as error:
        raise CatalogError(f"{unit.file}: no readable Parquet file: {one_line(error)}") from error


def _read_unit(catalog: Catalog, unit: Unit, physical: list[str]) -> Iterator[tuple[int, pa.Table]]:
    values = partition_values(unit.file)
    stored = [name for name in physical if name not in catalog.partitions]
    filesystem = open_filesystem(catalog.root)[0]
    with filesystem.open(unit.file, "rb") as handle:
        parquet = pq.ParquetFile(handle)
        position = 0
        for batch in parquet.iter_batches(READ_ROWS, row_groups=[unit.row_group], columns=stored):
            first, position = position, position + batch.num_rows
            if position <= unit.start:
                continue
            if first >= unit.stop:
                return
            low, high = max(first, unit.start), min(position, unit.stop)
            table = pa.Table.from_batches([batch.slice(low - first, high - low)])
            for name in set(physical) & set(catalog.partitions):
                table = table.append_column(
                    name, pa.array([values[name]] * table.num_rows, pa.string())
                )
            yield low, table


@dataclass(frozen=True)
class Item:
    """One (product, image) of the catalog: what is embedded as one row.

    Attributes:
        image_hash: Of the recipe, the image's reference or bytes, and its version column.
        text_hash: Of the recipe and the text.
        image: A URI, the encoded bytes, or None where the catalog has nothing.
        text: The filled template; its length is not yet checked.
    """

    product_id: str
    image_number: int
    vector_id: int
    image_hash: int
    text_hash: int
    image: str | bytes | None = field(repr=False)
    text: str = field(repr=False)

    @property
    def image_uri(self) -> str | None:
        """The image's address, if it has one."""
        return self.image if isinstance(self.image, str) else None


def read_items(catalog: Catalog, unit: Unit, recipe: str) -> Iterator[list[Item]]:
    """Yield a unit's items, in lists of some `READ_ROWS` products.

    Args:
        catalog: The checked catalog.
        unit: What to read.
        recipe: Names what is made of the content (see `VectorSpace.recipe`); part of each
            hash, so that another recipe embeds again.

    Raises:
        CatalogError: A product id is null or empty, or a text is no UTF-8; the row is named.
    """
    physical = list(dict.fromkeys(catalog.columns.values()))
    for first, table in read_unit(catalog, unit, physical):
        items: list[Item] = []
        try:
            columns = {ours: table[name].to_pylist() for ours, name in catalog.columns.items()}
        except UnicodeDecodeError as error:
            raise CatalogError(
                f"{unit.file}: a text in rows {first} to {first + len(table) - 1} of row group "
                f"{unit.row_group} is no UTF-8: {error}"
            ) from error
        for row in range(table.num_rows):
            values = {ours: column[row] for ours, column in columns.items()}
            if not values["product_id"]:
                raise CatalogError(
                    f"{unit.file}: row {first + row} of row group {unit.row_group} "
                    f"has {'a null' if values['product_id'] is None else 'an empty'} product id"
                )
            items += _product_items(catalog, values, recipe)
        yield items


def _product_items(catalog: Catalog, values: dict[str, Any], recipe: str) -> Iterator[Item]:
    names = template_names(catalog.text) if catalog.text else []
    text = fill_template(catalog.text, {n: values.get(n) for n in names}) if names else ""
    image = values.get("image")
    images = list(image) if isinstance(image, list) else [image]
    version = "|".join(str(values.get(name)) for name in VERSION_COLUMNS)
    product_id = values["product_id"]
    text_hash = hash63((recipe.encode(), text.encode("utf-8", "replace")))
    for number, one in enumerate(images or [None]):
        if isinstance(one, dict):
            one = one["bytes"] if one["bytes"] is not None else one["path"]
        content = one.encode("utf-8", "replace") if isinstance(one, str) else (one or b"")
        yield Item(
            product_id=product_id,
            image_number=number,
            vector_id=vector_id(product_id, number),
            image_hash=hash63((recipe.encode(), content, version.encode())),
            text_hash=text_hash,
            image=one,
            text=text,
        )


def fill_template(template: str, values: dict[str, Any]) -> str:
    """Fill a template; empty if all its columns are, whatever stands between them."""
    texts = {name: _text(value) for name, value in values.items()}
    if not any(texts.values()):
        return ""
    return template.format_map(texts).strip()


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value)
    return str(value).strip()


def scan_unit(
    catalog: Catalog, number: int, recipe: str, images: ImagesConfig
) -> npt.NDArray[np.void]:
    """Return what the diff needs of a unit's items.

    Args:
        catalog: The checked catalog.
        number: Of the unit, in `catalog.units`.
        recipe: As for `read_items`.
        images: Says whether the servers are asked for ETags.

    Returns:
        (N,) records of `PLAN_DTYPE`, in the catalog's order.

    Raises:
        CatalogError: As `read_items`.
    """
    unit = catalog.units[number]
    metadata = _metadata_hashes(catalog, unit)
    parts = []
    for items in read_items(catalog, unit, recipe):
        rows = np.zeros(len(items), PLAN_DTYPE)
        for name in ("vector_id", "image_hash", "text_hash", "image_number"):
            rows[name] = [getattr(item, name) for item in items]
        rows["product"] = [product_hash(item.product_id) for item in items]
        rows["metadata_hash"] = [metadata[item.product_id] for item in items]
        if images.etags:
            etags = read_etags([item.image for item in items], catalog.root, images)
            rows["etag_hash"] = [hash63((etag.encode(),)) if etag else 0 for etag in etags]
        parts.append(rows)
    found = np.concatenate([np.zeros(0, PLAN_DTYPE), *parts])
    found["unit"] = number
    return found


def _metadata_hashes(catalog: Catalog, unit: Unit) -> dict[str, int]:
    """Return the hash of each product's metadata: price and stock that changed are told by it."""
    hashes: dict[str, int] = {}
    key = catalog.columns["product_id"]
    names = list(dict.fromkeys((key, *sorted(catalog.metadata))))
    for _, table in read_unit(catalog, unit, names):
        there = [name for name in names if name in table.column_names]  # not in every file
        columns = [_plain_values(table[name]) for name in there]
        for row in zip(*columns, strict=True):
            named = repr(list(zip(there, row, strict=True)))
            hashes[row[0]] = hash63((named.encode("utf-8", "replace"),))
    return hashes


def _plain_values(column: pa.ChunkedArray) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # the column may be none that is embedded: it is told by its bytes
        values = column.cast(pa.large_binary()).to_pylist()
    return values


def explain_duplicates(catalog: Catalog, twice: set[int]) -> CatalogError:
    """Name the products behind vector ids that occur twice; reads the catalog's ids again.

    Args:
        catalog: The catalog.
        twice: Some of the vector ids.
    """
    physical = catalog.columns["product_id"]
    counts: dict[str, int] = {}
    for unit in catalog.units:
        for _, table in read_unit(catalog, unit, [physical]):
            for value in pc.drop_null(table[physical]).to_pylist():
                if vector_id(value, 0) in twice:
                    counts[value] = counts.get(value, 0) + 1
    names = sorted(name for name, count in counts.items() if count > 1)
    if not names:
        return CatalogError(f"the hashes of two product images collide: {sorted(counts)[:5]}")
    shown = ", ".join(repr(n) for n in names[:10]) + (", …" if len(names) > 10 else "")
    return CatalogError(f"{len(names)} product ids occur more than once: {shown}")
