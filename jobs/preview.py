"""`refresh --dry-run`: what a refresh would do, and what it would take; nothing is changed."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from jobs.catalog import Catalog
from jobs.cluster import gather
from jobs.config import JobConfig
from jobs.diff import Diff
from jobs.embed import probe_rows
from jobs.embed_steps import EmbedTask
from jobs.errors import StoreError
from jobs.items import read_unit
from jobs.pipeline import describe_counts
from jobs.run import Run
from jobs.schemas import vector_id
from jobs.space import VectorSpace
from jobs.state import read_data_file
from jobs.store import Store, scratch_folder

PROBE_ROWS = 64
PAST_RELEASES = 20


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a refresh would do, in rows (product images).

    Attributes:
        counts: By kind: new, changed (changed_text, changed_image: by that alone), removed,
            unchanged, metadata_changed, retried, formerly_rejected.
        examples: Kind to product ids.
        to_embed: Rows that would be embedded.
        up_to_date: Whether the newest release shows the catalog as it is.
        estimate: seconds of embedding and of the rest, image_bytes to fetch, written_bytes of
            the embeddings table, and in words what they are taken from; null where unknown.
    """

    rows: int
    release: int | None
    counts: dict[str, int]
    examples: dict[str, list[str]]
    to_embed: int
    up_to_date: bool
    estimate: dict[str, Any]


def make_preview(
    run: Run, config: JobConfig, catalog: Catalog, diff: Diff, encoder: tuple[Path, VectorSpace]
) -> Preview:
    """Describe a diff and estimate what it takes.

    Args:
        run: The run, which writes nothing.
        config: The job.
        catalog: The checked catalog.
        diff: What was found.
        encoder: Folder of the checkpoint, and what the job makes of it.

    Raises:
        JobError: A step of the probe failed.
    """
    return Preview(
        rows=diff.plan.rows,
        release=run.parent.version if run.parent else None,
        counts=describe_counts(diff.counts),
        examples=_name_examples(catalog, run.store, diff),
        to_embed=diff.todo_rows,
        up_to_date=diff.up_to_date,
        estimate=_estimate(run, config, catalog, diff, encoder),
    )


def _name_examples(catalog: Catalog, store: Store, diff: Diff) -> dict[str, list[str]]:
    files = store.embedding_files(diff.version)
    names: dict[str, list[str]] = {}
    for kind, found in diff.counts.examples.items():
        if kind == "removed":
            names[kind] = gather([_read_removed.remote(store, files[f], r) for _, f, r in found])
        else:
            names[kind] = gather([_read_name.remote(catalog, v, unit) for v, unit in found])
    return {kind: found for kind, found in names.items() if found}


@ray.remote(num_cpus=1)
def _read_removed(store: Store, file: str, row: int) -> str:
    table = read_data_file(store, file, ["product_id"])
    return str(table["product_id"][row].as_py())


@ray.remote(num_cpus=1)
def _read_name(catalog: Catalog, wanted: int, unit: int) -> str:
    """Return the product that a vector id of a unit belongs to, with its image's number."""
    physical = catalog.columns["product_id"]
    for _, table in read_unit(catalog, catalog.units[unit], [physical]):
        for name in table[physical].to_pylist():
            first = vector_id(name, 0)
            if first == wanted:
                return str(name)
            if first >> 47 == wanted >> 47:
                number = next((n for n in range(1, 1000) if vector_id(name, n) == wanted), None)
                if number is not None:
                    return f"{name} (image {number})"
    return f"vector id {wanted}"


def _estimate(
    run: Run, config: JobConfig, catalog: Catalog, diff: Diff, encoder: tuple[Path, VectorSpace]
) -> dict[str, Any]:
    rows, space = diff.todo_rows, encoder[1]
    past = _past_run(run, space)
    if past is None and rows and config.ray.address is None:
        past = _probe(config, catalog, diff, encoder)
    if past is None:
        unknown = "nothing to embed" if not rows else "no earlier run has embedded anything"
        return {"embed_s": None if rows else 0.0, "rest_s": None, "from": unknown} | dict.fromkeys(
            ("image_bytes", "written_bytes")
        )
    return {
        "embed_s": rows * past["s_per_row"],
        "rest_s": past["rest_s"],
        "image_bytes": round(rows * past["image_bytes_per_row"]),
        "written_bytes": round(rows * past["written_bytes_per_row"]),
        "from": past["from"],
    }


def _past_run(run: Run, space: VectorSpace) -> dict[str, Any] | None:
    """Return the rates of the run of this encoder, among the newest, that embedded most rows."""
    best: dict[str, Any] | None = None
    for release in run.store.releases()[:PAST_RELEASES]:
        if release.encoder != space.encoder:
            continue
        try:
            report = run.store.read_json("runs", release.run, "report.json")
        except StoreError:  # gc removes old reports
            continue
        rows = report.get("embedded", 0)
        if rows and (best is None or rows > best["rows"]):
            stages = {one["stage"]: one["seconds"] for one in report["stages"]}
            rest = [s for name, s in stages.items() if not name.startswith("embed")]
            best = {
                "rows": rows,
                "s_per_row": report["embed_s"] / rows,
                "rest_s": sum(rest),
                "image_bytes_per_row": report["image_bytes"] / rows,
                "written_bytes_per_row": report["written_bytes"] / rows,
                "from": f"run {release.run}, which embedded {rows:,} rows",
            }
    return best


def _probe(
    config: JobConfig, catalog: Catalog, diff: Diff, encoder: tuple[Path, VectorSpace]
) -> dict[str, Any]:
    """Embed some of the rows into a temporary folder, and return the rates."""
    directory, space = encoder
    scratch = scratch_folder("probe")
    try:
        store = Store(str(scratch))
        store.add_checkpoint(directory, space.encoder)
        task = EmbedTask(
            catalog=catalog,
            images=config.images,
            embed=config.embed,
            store=store,
            space=space,
            generation=1,
        )
        found, actors = probe_rows(task, diff, PROBE_ROWS)
    finally:
        shutil.rmtree(scratch)
    rows = found.embedded + found.rejected
    return {
        "s_per_row": sum(found.seconds.values()) / rows / actors,
        "rest_s": None,
        "image_bytes_per_row": found.image_bytes / rows,
        "written_bytes_per_row": found.written_bytes / rows,
        "from": f"a probe of {rows} rows on this machine",
    }
