"""What an export's files hold: which columns, which vectors, which Hive folders.

Letters: N rows, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.errors import ConfigError
from jobs.schemas import EMBEDDING_FIELDS
from jobs.space import VectorField, VectorSpace

KEY_COLUMNS = ("product_id", "image_number", "vector_id", "image_uri")
DTYPES = ("float16", "float32")
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, and how it is divided into files.

    float16 is the default since no digit is lost that a store has: it keeps vectors rounded to
    float16. DuckDB, pandas, Polars and Ray read it; readers that know no Parquet FLOAT16
    (Spark, most warehouses) need float32.

    Attributes:
        to: A new or empty folder, or `s3://bucket/prefix`.
        release: A release's version; the newest if None.
        fields: Which vectors; all of the release if empty.
        columns: Which metadata columns; all if None.
        dtype: Of the vectors' numbers: float16 or float32.
        rows_per_file: Most rows of a file.
        row_group_rows: Most rows of a row group.
        partition_by: Metadata columns that become folders, the outermost first.
        index: Whether index files and query encoder are copied too.
    """

    to: str
    release: int | None = None
    fields: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    dtype: str = "float16"
    rows_per_file: int = 250_000
    row_group_rows: int = 25_000
    partition_by: tuple[str, ...] = ()
    index: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The resolved options.

    Attributes:
        fields: The vectors, with the weights of the release.
        metadata: Name in `ids.parquet`'s `metadata` and in the files, partition columns included.
        partition_by: Of the names in the files.
        schema: Of the files.
    """

    fields: tuple[VectorField, ...]
    metadata: tuple[tuple[str, str], ...]
    partition_by: tuple[str, ...]
    schema: pa.Schema
    rows_per_file: int
    row_group_rows: int


def vector_column(field: str) -> str:
    """Return the column of a field's vectors, named as in the embeddings table."""
    return f"{field}_embedding"


def product_column(manifest: dict[str, Any]) -> str:
    """Return what the catalog of a release calls `product_id`, by its manifest."""
    columns = manifest.get("config", {}).get("catalog", {}).get("columns", {})
    return str(columns.get("product_id", "product_id"))


def resolve_layout(
    options: ExportOptions, space: VectorSpace, ids: pa.Schema, product_column: str
) -> Layout:
    """Check the options against a release.

    Args:
        options: What is asked for.
        space: The release's vectors.
        ids: The schema of its `ids.parquet`.
        product_column: The catalog's name of `product_id`.

    Raises:
        ConfigError: The release has no such field or column, or an option is impossible.
    """
    _check_numbers(options)
    names = list(dict.fromkeys(options.fields)) or list(space.fields)
    _check_known("field", names, space.fields)
    fields = tuple(space.field(name) for name in names)
    types = {field.name: field.type for field in ids.field("metadata").type}
    shown = _name_columns(list(types), product_column)
    wanted = list(shown) if options.columns is None else list(dict.fromkeys(options.columns))
    _check_known("column", [*wanted, *options.partition_by], list(shown))
    partition_by = list(dict.fromkeys(options.partition_by))
    for name in partition_by:
        _check_partition(name, types[name])
    described = [ids.field(name) for name in KEY_COLUMNS]
    described += [pa.field(shown[name], types[name]) for name in wanted if name not in partition_by]
    kind = pa.float16() if options.dtype == "float16" else pa.float32()
    number = pa.field("element", kind)  # as Parquet calls it: what is read has the same type
    described += [pa.field(vector_column(f.name), pa.list_(number, f.dim)) for f in fields]
    return Layout(
        fields=fields,
        metadata=tuple((name, shown[name]) for name in dict.fromkeys([*wanted, *partition_by])),
        partition_by=tuple(shown[name] for name in partition_by),
        schema=pa.schema(described),
        rows_per_file=options.rows_per_file,
        row_group_rows=options.row_group_rows,
    )


def _check_numbers(options: ExportOptions) -> None:
    if options.dtype not in DTYPES:
        raise ConfigError(f"dtype is {options.dtype!r}, expected {' or '.join(DTYPES)}")
    for name in ("rows_per_file", "row_group_rows"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} is {getattr(options, name)}, expected at least 1")


def _check_known(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            f"the release has no {kind} {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(known) or 'none'}"
        )


def _name_columns(names: list[str], product_column: str) -> dict[str, str]:
    """Return the names in the files: a catalog's column must not hide one of ours.

    Readers such as DuckDB ignore case.
    """
    reserved = {*KEY_COLUMNS, *(vector_column(name) for name in EMBEDDING_FIELDS)}
    kept = [name for name in names if (name, product_column) != ("product_id", "product_id")]
    return {name: f"metadata_{name}" if name.lower() in reserved else name for name in kept}


def _check_partition(name: str, kind: pa.DataType) -> None:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    known = ("is_string", "is_large_string", "is_boolean", "is_integer", "is_date", "is_null")
    if not any(getattr(pa.types, one)(value) for one in known):
        raise ConfigError(
            f"column {name!r} is {kind}: folders can be made of text, whole numbers, true or "
            "false, and dates"
        )


def hive_folders(
    table: pa.Table, partition_by: Sequence[str]
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the Hive folders of a table's rows: `brand=Acme%20Shoes/year=2024`.

    Args:
        table: N rows.
        partition_by: C of its columns, the outermost first.

    Returns:
        Different folders, and which of them each row belongs to: (N,) int64.
    """
    if not partition_by:
        return [""], np.zeros(len(table), np.int64)
    columns = [_name_values(table[name], name) for name in partition_by]
    codes = np.stack([numbers for _, numbers in columns], axis=1)
    different, places = np.unique(codes, axis=0, return_inverse=True)
    folders = [
        "/".join(names[code] for (names, _), code in zip(columns, row, strict=True))
        for row in different.tolist()
    ]
    return folders, places.reshape(-1).astype(np.int64)


def _name_values(column: pa.ChunkedArray, name: str) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return `name=value` of a column's different values, null the last, and each row's."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    values = [quote(value, safe="") for value in encoded.dictionary.to_pylist()]
    codes = pc.fill_null(encoded.indices, len(values)).to_numpy(zero_copy_only=False)
    names = [f"{quote(name, safe='')}={value}" for value in [*values, NO_VALUE]]
    return names, codes.astype(np.int64)
