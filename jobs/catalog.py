"""Finds a catalog's files and checks that each has what the configuration names.

A *unit* is a slice of a row group: the piece of work of one task.
"""

import os
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.config import CatalogConfig
from jobs.errors import CatalogError
from jobs.storage import PARQUET_ERRORS, StorageError, one_line, open_filesystem

IMAGE_COLUMNS = ("image_uri", "image")
VERSION_COLUMNS = ("image_version", "updated_at")
IMAGE_KINDS = "string/bytes/struct/list of strings/list of bytes/list of structs"
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
MIN_UNIT_ROWS = 256


@dataclass(frozen=True)
class Unit:
    """A slice of one row group: rows [start, stop) of it."""

    file: str
    row_group: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """A catalog whose files and schema were found good.

    Attributes:
        root: The folder that relative image URIs start from.
        files: All Parquet files, sorted.
        rows: Products in all files.
        images: Rows of a release, about: images by the files' metadata, an empty list as one.
        columns: Our name to the physical column, for what is read: product_id, image (or none),
            image_version (or none) and each name of the text template.
        metadata: Physical columns that ride along; a file may lack some.
        partitions: Hive partition columns; their values are in the file's path.
        has_bytes: Whether images are stored in the catalog itself.
    """

    root: str
    files: tuple[str, ...]
    rows: int
    images: int
    units: tuple[Unit, ...] = field(repr=False)
    columns: Mapping[str, str]
    metadata: tuple[str, ...]
    partitions: tuple[str, ...]
    has_bytes: bool
    text: str
    max_text_chars: int


def read_catalog(config: CatalogConfig, *, need_images: bool, need_text: bool) -> Catalog:
    """Find the catalog's files and check that each has what the configuration names.

    Args:
        config: The catalog section.
        need_images: Whether an image column must exist.
        need_text: Whether the columns of the text template must exist.

    Raises:
        CatalogError: The path is missing or empty, or columns are missing or of a wrong type; all
            faults at once, each with its file.
    """
    filesystem, files = _list_files(config.path)
    faults: list[str] = []
    units: list[Unit] = []
    images = 0
    found: dict[str, Any] | None = None
    shown: dict[str, None] = {}  # metadata of any file, in the order of their coming
    for file in files:
        try:
            with filesystem.open(file, "rb") as handle:
                parquet = pq.ParquetFile(handle)
                schema, metadata = parquet.schema_arrow, parquet.metadata
        except PARQUET_ERRORS as error:
            faults.append(f"{file}: no readable Parquet file: {one_line(error)}")
            continue
        partitions = tuple(partition_values(file))
        resolved = _resolve(schema, partitions, config, need_images, need_text)
        faults += [f"{file}: {fault}" for fault in resolved["faults"]]
        found = found or resolved
        shown |= dict.fromkeys(resolved["metadata"])
        if not resolved["faults"] and resolved["columns"] != found["columns"]:
            faults.append(f"{file}: columns {resolved['columns']} differ from {found['columns']}")
        units += _units(file, metadata, resolved["has_bytes"])
        images += _count_images(metadata, resolved["columns"].get("image"))
    if faults:
        raise CatalogError(faults)
    rows = sum(unit.stop - unit.start for unit in units)
    if found is None or rows == 0:
        raise CatalogError(f"catalog {config.path} is empty: {len(files)} files, 0 rows")
    return Catalog(
        root=_root(config.path, filesystem),
        files=tuple(files),
        rows=rows,
        images=images,
        units=tuple(units),
        columns=found["columns"],
        metadata=tuple(shown),
        partitions=found["partitions"],
        has_bytes=found["has_bytes"],
        text=config.text,
        max_text_chars=config.max_text_chars,
    )


def _list_files(path: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    try:
        filesystem, root = open_filesystem(path)
        if any(mark in path for mark in "*?["):
            found = filesystem.glob(root, detail=True)
            files = [name for name, one in found.items() if one["type"] == "file"]
        elif filesystem.info(root)["type"] == "directory":  # isdir() says no of a dead storage
            files = filesystem.glob(f"{root.rstrip('/')}/**/*.parquet")
        else:
            files = [root]
    except FileNotFoundError as error:
        raise CatalogError(f"catalog {path} does not exist") from error
    except StorageError as error:
        raise CatalogError(f"catalog {path}: {error}") from error
    except (*PARQUET_ERRORS, ValueError, ImportError) as error:
        raise CatalogError(f"catalog {path} can't be listed: {one_line(error)}") from error
    hidden = re.compile(r"(^|/)[._]")  # _delta_log, _SUCCESS, .crc: the writers' own files
    base = len(re.split(r"[*?\[]", root)[0])
    files = sorted(f for f in files if f == root or not hidden.search(f[base:]))
    if not files:
        raise CatalogError(f"catalog {path} is empty: no Parquet file found")
    return filesystem, files


def _root(path: str, filesystem: fsspec.AbstractFileSystem) -> str:
    """Return the folder that relative image URIs start from, with its protocol."""
    base = re.split(r"[*?\[]", path)[0]
    is_folder = base == path and filesystem.isdir(filesystem._strip_protocol(path))
    if not is_folder:
        base = base.rpartition("/")[0] or "."
    if filesystem.protocol in ("file", "local") or "file" in filesystem.protocol:
        return os.path.abspath(str(filesystem._strip_protocol(base)))  # tasks run in other folders
    return base.rstrip("/")


def partition_values(file: str) -> dict[str, str | None]:
    """Read the `column=value` folders of a Hive partition's path."""
    parts = (part.partition("=") for part in file.split("/")[:-1])
    return {
        key: None if value == NULL_PARTITION else unquote(value)
        for key, mark, value in parts
        if mark and key
    }


def template_names(template: str) -> list[str]:
    """List the column names of a text template.

    Raises:
        CatalogError: The template is malformed or names no column.
    """
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise CatalogError(f"catalog.text {template!r} is malformed: {error}") from error
    if any(layout or conversion for _, _, layout, conversion in parts):
        raise CatalogError(f"catalog.text {template!r}: a column is named alone, as in '{{title}}'")
    names = [str(name) for _, name, _, _ in parts]
    if not names or not all(name.isidentifier() for name in names):
        raise CatalogError(f"catalog.text {template!r}: expected column names as in '{{title}}'")
    return list(dict.fromkeys(names))


def _resolve(
    schema: pa.Schema,
    partitions: tuple[str, ...],
    config: CatalogConfig,
    need_images: bool,
    need_text: bool,
) -> dict[str, Any]:
    """Map our names to one file's columns, and list what is wrong with it."""
    faults: list[str] = []
    columns: dict[str, str] = {}

    def take(name: str, *, required: bool, accepts: str) -> None:
        physical = config.columns.get(name, name)
        if physical in schema.names:
            if _kind(schema.field(physical).type) not in accepts.split("/"):
                kind = schema.field(physical).type
                faults.append(f"column {physical!r} is {kind}, expected {accepts}")
            columns[name] = physical
        elif physical in partitions and "string" in accepts.split("/"):
            columns[name] = physical
        elif required or name in config.columns:
            faults.append(f"column {physical!r} is missing; it has {', '.join(schema.names)}")

    take("product_id", required=True, accepts="string")
    image_name = next(
        (n for n in IMAGE_COLUMNS if n in config.columns or n in schema.names), IMAGE_COLUMNS[0]
    )
    if need_images:
        take(image_name, required=True, accepts=IMAGE_KINDS)
        if image_name in columns:
            columns["image"] = columns.pop(image_name)
        for name in VERSION_COLUMNS:
            take(name, required=False, accepts="string/number/time")
    for name in template_names(config.text) if need_text else ():
        take(name, required=True, accepts="string/number/list of strings")
    unknown = [name for name in config.columns.values() if name not in (*schema.names, *partitions)]
    faults += [
        f"column {name!r} (catalog.columns) is missing; it has {', '.join(schema.names)}"
        for name in unknown
        if not any(repr(name) in fault for fault in faults)
    ]
    kind = _kind(schema.field(columns["image"]).type) if "image" in columns else ""
    has_bytes = kind in ("bytes", "struct", "list of bytes", "list of structs")
    image = {columns.get("image")}
    shown = ("string", "number", "time", "list of strings")
    binary = {f.name for f in schema if _kind(f.type) not in shown}
    metadata = tuple(n for n in (*schema.names, *partitions) if n not in image | binary)
    return {
        "faults": faults,
        "columns": columns,
        "metadata": metadata,
        "partitions": tuple(p for p in partitions if p not in schema.names),
        "has_bytes": has_bytes,
    }


def _kind(type_: pa.DataType) -> str:
    """Name a column type as the error messages do."""
    types = pa.types
    if types.is_dictionary(type_):
        return _kind(type_.value_type)
    if types.is_string(type_) or types.is_large_string(type_):
        return "string"
    if types.is_binary(type_) or types.is_large_binary(type_):
        return "bytes"
    if types.is_struct(type_) and {"bytes", "path"} <= {f.name for f in type_}:
        return "struct"
    if types.is_list(type_) or types.is_large_list(type_):
        inner = _kind(type_.value_type)
        lists = {"string": "list of strings", "bytes": "list of bytes", "struct": "list of structs"}
        return lists.get(inner, "other")
    if types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_):
        return "number"
    if types.is_boolean(type_):
        return "number"
    if types.is_timestamp(type_) or types.is_date(type_):
        return "time"
    return "other"


def _count_images(metadata: pq.FileMetaData, image: str | None) -> int:
    """Count the images of a file by its metadata; null and empty lists count as one."""
    if image is None:
        return int(metadata.num_rows)
    names = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
    mine = [n for n, path in enumerate(names) if path.partition(".")[0] == image]
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return sum(max(group.column(n).num_values for n in mine) for group in groups) if mine else 0


def _units(file: str, metadata: pq.FileMetaData, has_bytes: bool) -> Iterator[Unit]:
    # A slice is found by decoding what lies before it: few slices where rows are heavy.
    most = 8 if has_bytes else 64
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        step = max(MIN_UNIT_ROWS, -(-rows // most))
        for start in range(0, rows, step):
            yield Unit(file, group, start, min(rows, start + step))
