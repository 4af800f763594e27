"""What the page can filter by: the metadata columns of a release, and predicates over them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any, Final, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from jobs.errors import JobError

MOST_VALUES: Final = 30  # a string column with more is searched for a part of the string


@dataclass(frozen=True, kw_only=True)
class ColumnFilter:
    """A metadata column that products can be filtered by.

    Attributes:
        column: Its name.
        kind: "values": any of some; "contains": a part of a text; "range": from a number to one.
        values: Of "values": all that the release has, sorted.
        low: Of "range": the least number.
        high: Of "range": the largest number.
        whole: Of "range": whether the numbers are integers.
    """

    column: str
    kind: Literal["values", "contains", "range"]
    values: tuple[str | bool, ...] = ()
    low: float | None = None
    high: float | None = None
    whole: bool = False


class Filter(BaseModel):
    """One filter of a query, as the page sends it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    column: str
    values: tuple[str | bool, ...] | None = None
    contains: str | None = Field(default=None, min_length=1, max_length=1000)
    low: float | None = Field(default=None, alias="from")
    high: float | None = Field(default=None, alias="to")

    @property
    def kind(self) -> str:
        """The kind of column that it is for."""
        if self.values is not None:
            return "values"
        return "range" if self.contains is None else "contains"

    @model_validator(mode="after")
    def _is_one_filter(self) -> Self:
        ranged = self.low is not None or self.high is not None
        if (self.values is not None) + (self.contains is not None) + ranged != 1:
            raise ValueError("expected values, contains, or from and to")
        return self


_FILTERS: Final = TypeAdapter(list[Filter])


def read_filters(text: str) -> list[Filter]:
    """Read filters from JSON, as `[{"column": "price", "to": 20}]`.

    Raises:
        JobError: It is no such list.
    """
    try:
        return _FILTERS.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise JobError(f"filters{'.' if place else ''}{place}: {reason}") from error


def describe_columns(path: Path) -> dict[str, ColumnFilter]:
    """Say by column what can be filtered by: strings, booleans and numbers.

    Args:
        path: A release's ids as an Arrow file (`jobs.ids_cache`); read once, a batch at a time.
    """
    reader = ipc.open_file(pa.memory_map(str(path)))
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    flat = [batch["metadata"].flatten() for batch in batches]
    found = (
        _describe(field.name, field.type, [columns[number] for columns in flat])
        for number, field in enumerate(reader.schema.field("metadata").type)
    )
    return {one.column: one for one in found if one is not None}


def _describe(name: str, kind: pa.DataType, chunks: Sequence[pa.Array]) -> ColumnFilter | None:
    """Return nothing for a column of another type, or of nulls alone."""
    types = pa.types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind):
        values = _few_values(chunks)
        if values is None:
            return ColumnFilter(column=name, kind="contains")
        return ColumnFilter(column=name, kind="values", values=values) if values else None
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        limits = [number for chunk in chunks for number in _limits(chunk)]
        if limits:
            whole = types.is_integer(kind)
            low, high = min(limits), max(limits)
            return ColumnFilter(column=name, kind="range", low=low, high=high, whole=whole)
    return None


def _few_values(chunks: Sequence[pa.Array]) -> tuple[Any, ...] | None:
    """Return all values, sorted; None if there are more than `MOST_VALUES`, or one is no UTF-8."""
    seen: set[Any] = set()
    for chunk in chunks:
        values = pc.unique(chunk)
        if len(values) > MOST_VALUES + 1:  # null is none of them
            return None
        try:
            seen |= set(values.to_pylist()) - {None}
        except UnicodeDecodeError:  # Arrow doesn't check: the page has no way to say such a value
            return None
        if len(seen) > MOST_VALUES:
            return None
    return tuple(sorted(seen))


def _limits(chunk: pa.Array) -> list[float]:
    found = pc.min_max(chunk.cast(pa.float64(), safe=False)).as_py()
    return [value for value in found.values() if value is not None and math.isfinite(value)]


def make_predicate(
    filters: Sequence[Filter], columns: Mapping[str, ColumnFilter]
) -> pc.Expression | None:
    """Join filters to one predicate, which all of them must let a product through; None: no filter.

    Args:
        filters: What is wanted.
        columns: What `describe_columns` found.

    Raises:
        JobError: A column is unknown, or is filtered otherwise.
    """
    return reduce(and_, [_predicate(one, columns) for one in filters]) if filters else None


def _predicate(one: Filter, columns: Mapping[str, ColumnFilter]) -> pc.Expression:
    known = columns.get(one.column)
    if known is None:
        raise JobError(
            f"there is no column {one.column!r} to filter by; there are {', '.join(columns)}"
        )
    # A string column that has few values in one release may have many in another.
    if one.kind != known.kind and "range" in (one.kind, known.kind):
        raise JobError(f"column {one.column!r} is filtered by {known.kind}, not by {one.kind}")
    column = pc.field(one.column)
    if one.values is not None:
        return column.isin(_to_array(one.column, one.values, known))
    if one.contains is not None:
        _to_array(one.column, (one.contains,), known)
        return pc.match_substring(column, one.contains, ignore_case=True)
    number = column.cast(pa.float64(), safe=False)
    bounds = [] if one.low is None else [number >= one.low]
    bounds += [] if one.high is None else [number <= one.high]
    return reduce(and_, bounds)


def _to_array(name: str, values: Sequence[str | bool], known: ColumnFilter) -> pa.Array:
    """Return values of a column's own type.

    Raises:
        JobError: One is of another type.
    """
    booleans = bool(known.values) and isinstance(known.values[0], bool)
    if not all(isinstance(value, bool if booleans else str) for value in values):
        words = "true and false" if booleans else "texts"
        raise JobError(f"column {name!r} is filtered by {words} alone")
    return pa.array(values, pa.bool_() if booleans else pa.string())
