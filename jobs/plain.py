"""Turns rows of Arrow tables into plain values and titles, whatever bytes their texts hold.

A catalog's column that is not embedded need not be UTF-8: its rows are live, and must be shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

TITLE_CHARS = 60


def title_columns(columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the metadata columns that may hold a product's title, the likeliest first.

    Args:
        columns: Of the configuration, `catalog.columns`.
    """
    return tuple(dict.fromkeys((columns.get("title", "title"), "name")))


def title_of(row: Mapping[str, Any], titles: Sequence[str]) -> str:
    """Return the title of a row that has metadata, cut to what a caption takes; empty: none.

    Args:
        row: With `metadata`.
        titles: See `title_columns`.
    """
    metadata = row["metadata"] or {}
    found = next((metadata[key] for key in titles if metadata.get(key)), "")
    return str(found)[:TITLE_CHARS]


def plain_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return a table's rows; of a text that is no UTF-8, what can be read, the rest marked."""
    columns = {name: _plain_values(table[name]) for name in table.column_names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _plain_values(column: pa.ChunkedArray) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = _decode(column.cast(_as_bytes(column.type)).to_pylist())
    return values


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return a type with bytes in the place of texts, as far as it can be cast to."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([one.with_type(_as_bytes(one.type)) for one in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_dictionary(kind):
        return _as_bytes(kind.value_type)
    return kind


def _decode(value: Any) -> Any:  # noqa: ANN401 - values of any column
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {name: _decode(one) for name, one in value.items()}
    return [_decode(one) for one in value] if isinstance(value, list) else value
