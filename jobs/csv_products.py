"""Turns the rows of a CSV into products: rows of one product are joined, what is left is rejected.

Two passes: the first finds the types and the ids that come twice, the second makes the products.
"""

import html
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.csv_columns import ROLE_COLUMNS, is_code, name_columns
from jobs.csv_images import place_image, split_images
from jobs.csv_numbers import NumberFormat, NumberProfile
from jobs.csv_rows import CsvRow, CsvSource, RejectedRow, RowFault, read_rows
from jobs.schemas import hash63

_TAG = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|</?[A-Za-z][^<>]*>", re.DOTALL | re.I)
_BLANKS = re.compile(r"[ \t\xa0]+")

FirstLine = Callable[[int, int], int | None]
"""(hash of a product id, its line) to the line where that id came first, None if here."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What each column of a CSV becomes.

    Attributes:
        roles: Role to column numbers; several for `image` only.
        others: Number to name of the columns that ride along.
        image_root: Where relative image references start.
        image_root_given: Whether the user named it.
    """

    source: CsvSource
    roles: Mapping[str, tuple[int, ...]]
    others: Mapping[int, str]
    image_root: str
    image_root_given: bool

    def cell(self, row: CsvRow, role: str) -> str:
        """Return the stripped cell of a role; empty if the role has no column."""
        numbers = self.roles.get(role)
        return row.cells[numbers[0]].strip() if numbers else ""

    def images(self, row: CsvRow) -> list[str]:
        """Return a row's image references, each once."""
        found = [one for n in self.roles.get("image", ()) for one in split_images(row.cells[n])]
        placed = (place_image(one, self.image_root, given=self.image_root_given) for one in found)
        return list(dict.fromkeys(placed))


@dataclass(kw_only=True, slots=True)
class Product:
    """A product's first row, the images of all its rows, and how many rows were joined to it."""

    product_id: str
    row: CsvRow
    title: str
    images: list[str]
    merged: int = 0


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What the first pass found.

    Attributes:
        rows: All rows after the header.
        numbers: Column number to its number format.
        texts: Number of a price column that is no number, to the cell that made it text.
        empty: Columns that hold nothing.
        several_images: Whether any product has more than one.
        repeated: Hashes of the product ids that come twice.
    """

    rows: int
    numbers: Mapping[int, NumberFormat]
    texts: Mapping[int, str]
    empty: frozenset[int]
    several_images: bool
    repeated: frozenset[int] = field(repr=False)


def build_layout(
    source: CsvSource, roles: Mapping[str, tuple[int, ...]], image_root: str | None
) -> Layout:
    """Name every column.

    Args:
        source: The CSV.
        roles: From `guess_roles`.
        image_root: Where relative image references start; None: the CSV's folder.
    """
    return Layout(
        source=source,
        roles=roles,
        others=name_columns(source.header, roles),
        image_root=_absolute(image_root or str(source.path.resolve().parent)),
        image_root_given=image_root is not None,
    )


def _absolute(root: str) -> str:
    """Return a folder's absolute path: the catalog will lie in another folder."""
    return root if "://" in root else str(Path(root).resolve())


def profile_rows(layout: Layout) -> Profile:
    """Read the CSV once and find types and repeated ids.

    Memory: 8 bytes a product.

    Raises:
        JobError: The file can't be read.
    """
    price = layout.roles.get("price", ())
    header = layout.source.header
    seen = {n: NumberProfile() for n in (*layout.others, *price)}
    open_columns = {n: one for n, one in seen.items() if n in price or not is_code(header[n])}
    codes = {n: one for n, one in seen.items() if n not in open_columns}
    hashes = array("q")
    rows, most_images = 0, 0

    def count(product_hash: int, _line: int) -> None:
        hashes.append(product_hash)

    def watch() -> Iterator[CsvRow | RejectedRow]:
        nonlocal rows
        for row in read_rows(layout.source):
            rows += 1
            if isinstance(row, CsvRow):
                _add_cells(open_columns, row)
                _add_cells(codes, row)
            yield row

    for product in join_rows(watch(), layout, count):
        if isinstance(product, Product):
            most_images = max(most_images, len(product.images))
    formats = {n: one.format(price=n in price) for n, one in seen.items() if not is_code(header[n])}
    ids, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    return Profile(
        rows=rows,
        numbers={n: one for n, one in formats.items() if one is not None},
        texts={n: text for n in price if (text := seen[n].text) is not None},
        empty=frozenset(n for n, one in seen.items() if not one.filled and n not in price),
        several_images=most_images > 1,
        repeated=frozenset(ids[counts > 1].tolist()),
    )


def _add_cells(columns: dict[int, NumberProfile], row: CsvRow) -> None:
    """Add a row's cells to the columns; forget those that turn out to be text."""
    decided = [n for n, profile in columns.items() if not profile.add(row.cells[n])]
    for number in decided:
        del columns[number]


def build_products(layout: Layout, profile: Profile) -> Iterator[Product | RejectedRow]:
    """Read the CSV again and yield its products and its rejected rows.

    Args:
        layout: What each column becomes.
        profile: From `profile_rows` of the same file.
    """
    lines: dict[int, int] = {}

    def first_line(product_hash: int, line: int) -> int | None:
        if product_hash not in profile.repeated:
            return None
        first = lines.setdefault(product_hash, line)
        return None if first == line else first

    return join_rows(read_rows(layout.source), layout, first_line)


def join_rows(
    rows: Iterator[CsvRow | RejectedRow], layout: Layout, first_line: FirstLine
) -> Iterator[Product | RejectedRow]:
    """Join adjacent rows of one product, as Shopify writes them: a row a variant and a picture.

    A row with the id of the product before it belongs to it if its title is empty, or if the
    title is the same and the row has a further picture. Any other repeated id is rejected.

    Args:
        rows: In the file's order.
        layout: What each column is.
        first_line: Tells where an id came first.
    """
    current: Product | None = None
    for row in rows:
        if isinstance(row, RejectedRow):
            yield row
            continue
        product_id, title = layout.cell(row, "product_id"), layout.cell(row, "title")
        images = layout.images(row)
        if not product_id:
            yield _reject(row, RowFault.MISSING_PRODUCT_ID, "the product_id cell is empty")
        elif current is not None and current.product_id == product_id:
            further = [one for one in images if one not in current.images]
            if title and (title != current.title or not further):
                yield _repeated(row, product_id, current.row.line)
            else:
                current.images += further
                current.merged += 1
        elif (line := first_line(hash63((product_id.encode(),)), row.line)) is not None:
            if current is not None:  # the rows after this one are not adjacent to it any more
                yield current
                current = None
            yield _repeated(row, product_id, line)
        else:
            if current is not None:
                yield current
            current = Product(product_id=product_id, row=row, title=title, images=images)
    if current is not None:
        yield current


def _repeated(row: CsvRow, product_id: str, line: int) -> RejectedRow:
    return _reject(row, RowFault.DUPLICATE_ID, f"{product_id!r} is already on line {line}")


def _reject(row: CsvRow, reason: RowFault, detail: str) -> RejectedRow:
    return RejectedRow(line=row.line, reason=reason, detail=detail, raw=row.raw)


def plain_text(cell: str) -> str:
    """Return a text without HTML: shops export their pages' markup.

    Args:
        cell: As written.
    """
    text = cell
    if "<" in text:
        text = _TAG.sub(" ", text)
    if "&" in text:
        text = html.unescape(text)
    return _BLANKS.sub(" ", text).strip()


def product_values(product: Product, layout: Layout, profile: Profile) -> dict[str, Any]:
    """Return a product as a row of the catalog: column name to value, empty cells as None.

    Args:
        product: One product.
        layout: What each column becomes.
        profile: The columns' types.
    """
    values: dict[str, Any] = {"product_id": product.product_id}
    cells = product.row.cells
    for role, numbers in layout.roles.items():
        number = numbers[0]
        if role == "image":
            several = product.images if profile.several_images else None
            values["image_uri"] = several or next(iter(product.images), None)
        elif number in profile.numbers:
            values[role] = profile.numbers[number].parse(cells[number])
        elif role in ("title", "description"):
            values[role] = plain_text(cells[number]) or None
        elif role != "product_id":
            values[role] = cells[number].strip() or None
    for number, name in layout.others.items():
        form = profile.numbers.get(number)
        cell = cells[number].strip()
        values[name] = (cell or None) if form is None else form.parse(cell)
    return values


def catalog_schema(layout: Layout, profile: Profile) -> pa.Schema:
    """Return the catalog's schema: the roles by their own names, then what rides along.

    Args:
        layout: What each column becomes.
        profile: The columns' types.
    """
    strings = pa.list_(pa.string())
    types: dict[str, pa.DataType] = {}
    for role, numbers in layout.roles.items():
        listed = role == "image" and profile.several_images
        types[ROLE_COLUMNS[role]] = strings if listed else _type(profile, numbers[0])
    others = {name: _type(profile, n) for n, name in layout.others.items()}
    kept = {name: others[name] for n, name in layout.others.items() if n not in profile.empty}
    return pa.schema(list((types | kept).items()))


def _type(profile: Profile, number: int) -> pa.DataType:
    form = profile.numbers.get(number)
    if form is None:
        return pa.string()
    return pa.int64() if form.integer else pa.float64()
