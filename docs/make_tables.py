"""Renders docs/tables.md: every table that Vitrine reads or writes, from the schemas in the code.

A column's meaning is in docs/tables.yaml, which must have exactly the columns of each schema.
`docs/make_reference.py` writes the page.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from encoders.fusion import FusionSpec
from encoders.spec import PreprocessSpec
from jobs.catalog import IMAGE_COLUMNS, IMAGE_KINDS, VERSION_COLUMNS
from jobs.csv_rows import RowFault
from jobs.export_layout import ExportOptions, resolve_layout
from jobs.ids import KEYS, ROWS
from jobs.images import RejectReason
from jobs.import_csv import REJECTS_SCHEMA
from jobs.queries import IMAGE, TEXT
from jobs.schemas import EMBEDDINGS, RELEASES
from jobs.space import VectorSpace

MEANINGS = Path(__file__).with_name("tables.yaml")
PICTURES = {f"{role}_image{end}" for role in ("query", "product") for end in ("", "_uri")}
INPUTS = {
    "catalog": {"product_id", *IMAGE_COLUMNS, *VERSION_COLUMNS},
    "pairs": {"product_id", "query_text", "product_text", *PICTURES},
    "queries": {"product_id", IMAGE, TEXT, "query_id", "gain"},
}
"""Tables that others write: column names. Those of pairs are what `jobs.pair_data` reads."""


def render_tables() -> str:
    """Return docs/tables.md as it should be.

    Raises:
        ValueError: The meanings of a table are not of exactly its columns.
    """
    told = yaml.safe_load(MEANINGS.read_text(encoding="utf-8"))
    parts = [told["head"]]
    parts += [_render_input(name, told[name], columns) for name, columns in INPUTS.items()]
    parts += [_render_schema(name, told[name], schema()) for name, schema in SCHEMAS.items()]
    parts += [_render_faults(told["row_faults"]), _render_reasons(told["reasons"])]
    return "".join(parts)


def _ids_schema() -> pa.Schema:
    shown = pa.struct([("title", pa.string()), ("price", pa.float64())])
    return KEYS.append(pa.field("metadata", shown))


def _export_schema() -> pa.Schema:
    preprocess = PreprocessSpec(
        size_px=224, resize_mode="shortest", interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
    )
    fusion = FusionSpec()
    space = VectorSpace(
        encoder="", dim=512, preprocess=preprocess, fusion=fusion, fields=fusion.fields
    )
    ids = KEYS.append(pa.field("metadata", pa.struct([("title", pa.string())])))
    return resolve_layout(ExportOptions(to=""), space, ids, "product_id").schema


SCHEMAS: Mapping[str, Callable[[], pa.Schema]] = {
    "embeddings": lambda: EMBEDDINGS,
    "releases": lambda: RELEASES,
    "ids": _ids_schema,
    "rows": lambda: ROWS,
    "export": _export_schema,
    "import_rejects": lambda: REJECTS_SCHEMA,
}


def _render_input(name: str, told: dict[str, Any], columns: Collection[str]) -> str:
    _check_names(name, told["columns"], columns)
    kinds = IMAGE_KINDS.replace("/", ", ")
    rows = [
        (column, f"`{kind.replace('IMAGE_KINDS', kinds)}`", meaning)
        for column, (kind, meaning) in told["columns"].items()
    ]
    note = f"\n{told['note']}" if "note" in told else ""
    return _render_head(told) + _render_rows(("column", "type", "meaning"), rows) + note


def _render_schema(name: str, told: dict[str, Any], schema: pa.Schema) -> str:
    _check_names(name, told["columns"], schema.names)
    rows = [(one.name, _type_name(one.type), told["columns"][one.name]) for one in schema]
    return _render_head(told) + _render_rows(("column", "type", "meaning"), rows)


def _render_faults(told: dict[str, str]) -> str:
    _check_names("row_faults", told, [one.value for one in RowFault])
    return _render_rows(("reason", "", ""), [(name, "", why) for name, why in told.items()])


def _render_reasons(told: dict[str, Any]) -> str:
    _check_names("reasons", told["values"], [one.value for one in RejectReason])
    rows = [
        (one.value, f"{one.kind}, by a limit" if one.configured else one.kind, meaning)
        for one in RejectReason
        for meaning in [told["values"][one.value]]
    ]
    return _render_head(told) + _render_rows(("reason", "kind", "meaning"), rows)


def _render_head(told: dict[str, Any]) -> str:
    return f"\n## {told['title']}\n\n{told['about'].strip()}\n"


def _render_rows(head: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> str:
    """Render a table; without its second column where the head names none."""
    lines = [head, ("-", "-", "-"), *((f"`{one}`", kind, why) for one, kind, why in rows)]
    shown = [line if head[1] else (line[0], line[2]) for line in lines]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in shown) + "\n"


def _check_names(name: str, described: Collection[str], names: Collection[str]) -> None:
    missing, unknown = set(names) - set(described), set(described) - set(names)
    if missing or unknown:
        raise ValueError(
            f"docs/tables.yaml, {name}: not described: {sorted(missing)}, not in the table: "
            f"{sorted(unknown)}"
        )


def _type_name(kind: pa.DataType) -> str:
    name = str(kind).replace("item: ", "").replace("element: ", "").replace("halffloat", "float16")
    return f"`{name}`"  # Markdown would take its <…> for a tag
