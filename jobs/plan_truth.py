"""Keeps plans in the store, and puts a plan beside what the run then measured."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from jobs import __version__
from jobs.config import JobConfig
from jobs.errors import StoreError
from jobs.files import list_files
from jobs.plan import Work, make_plan, read_given
from jobs.plan_cluster import live_cluster
from jobs.run import Run
from jobs.space import VectorSpace
from jobs.storage import StorageError

FILE = "plan.json"


def write_plan(
    run: Run, config: JobConfig, space: VectorSpace, plan: Mapping[str, Any], *, of_ray: bool
) -> str:
    """Write `runs/<run>/plan.json`, which the next run of the same job is compared with.

    Args:
        run: Names it.
        config: The job.
        space: What it makes of the encoder.
        plan: A `Plan` as plain values.
        of_ray: Whether it is made for the machines of Ray; that for others is no run's plan.

    Returns:
        Its address.

    Raises:
        StoreError: It can't be written.
    """
    made = {"run": run.run_id, "created_at": datetime.now(UTC).isoformat(timespec="seconds")}
    return run.store.write_json(
        made | _key(run, config, space) | {"of_ray": of_ray, **plan}, "runs", run.run_id, FILE
    )


def _key(run: Run, config: JobConfig, space: VectorSpace) -> dict[str, Any]:
    """Return what a plan and the run that it was made for have in common."""
    return {
        "vitrine": __version__,
        "release": run.parent.version if run.parent else None,
        "encoder": space.encoder,
        "config": config.model_dump(mode="json"),
        "of_ray": True,
    }


def plan_of_run(run: Run, config: JobConfig, space: VectorSpace, work: Work) -> dict[str, Any]:
    """Return the newest plan that was made for a run; else make one of earlier runs' rates.

    Args:
        run: The run, after its comparison; nothing is measured for the plan.
        config: The job.
        space: What it makes of the encoder.
        work: What it has to do.

    Raises:
        StoreError: The store can't be read.
    """
    found = None if work.rebuilds else _find_plan(run, _key(run, config, space))
    if found is None:
        cluster = live_cluster(config.ray.address)
        plan = make_plan(read_given(run, config, space, cluster, work))
        found = {"run": run.run_id} | asdict(plan)
    run.log("plan", seconds=found["seconds"], unknown=found["unknown"], made_by=found["run"])
    return found


def _find_plan(run: Run, key: Mapping[str, Any]) -> dict[str, Any] | None:
    first = run.parent.run if run.parent else ""  # an older plan is of an older release
    for file in reversed(list_files(run.store, "runs")):
        folders = file.path.split("/")
        if folders[2:] != [FILE]:
            continue
        if folders[1] < first:
            return None
        try:
            plan = run.store.read_json(*folders)
        except StorageError:
            raise
        except StoreError:  # gc removes old ones
            continue
        if all(plan.get(name) == value for name, value in key.items()):
            return plan
    return None


def compare_plan(plan: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, Any]:
    """Put each planned figure beside what the run measured.

    Args:
        plan: As `plan_of_run` returns it.
        truth: Of the report: run, embedded, rejected_in_run, image_bytes, written_bytes, indexes
            and stages.

    Returns:
        The plan's run, its machines, and `figures`: name, unit, plan, truth, ratio (truth over
        plan), and what the plan is taken from; None where nothing was known or measured.
    """
    return {
        "run": plan["run"],
        "made_before": plan["run"] != truth["run"],
        "machines": plan["cluster"]["name"],
        "figures": _figures(plan, truth),
    }


def _figures(plan: Mapping[str, Any], truth: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = truth["embedded"] + truth["rejected_in_run"]
    figures = [_figure("rows to embed", "rows", plan["rows"]["to_embed"], rows, "the comparison")]
    spent: dict[str, float] = {}
    for one in truth["stages"]:  # a run that began again has a stage twice
        spent[one["stage"]] = spent.get(one["stage"], 0.0) + one["seconds"]
    for stage in plan["stages"]:
        name = stage["stage"]
        figures.append(_figure(name, "s", stage["seconds"], spent.get(name), stage["source"]))
    figures.append(_whole(plan, spent))
    written = [
        file["size_bytes"]
        for index in truth["indexes"]
        for file in _files(index)
        if file["folder"] == truth["run"]
    ]
    measured = {
        "image": ("images fetched", truth["image_bytes"]),
        "table": ("table written", truth["written_bytes"]),
        "index": ("index files written", sum(written)),
    }
    for key, (name, value) in measured.items():
        planned = plan["bytes"][key]
        figures.append(_figure(name, "bytes", planned["value"], value, planned["source"]))
    return figures


def _whole(plan: Mapping[str, Any], spent: Mapping[str, float]) -> dict[str, Any]:
    """Compare all stages; where some are unknown, the others."""
    parts = {one["stage"].rpartition(": ")[0] for one in plan["stages"]}
    known = [one["stage"] for one in plan["stages"] if one["seconds"] is not None]
    leaves = [name for name in known if name not in parts]
    total = sum(spent.get(name, 0.0) for name in leaves)
    name = "the stages that were planned" if plan["unknown"] else "all stages"
    return _figure(name, "s", plan["seconds"], total, "the sum of those above")


def _files(index: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    parts = [part[kind] for part in index["partitions"] for kind in ("codes", "refine")]
    return [file for file in (index["template"], *parts) if file is not None]


def _figure(
    name: str, unit: str, plan: float | None, truth: float | None, source: str
) -> dict[str, Any]:
    ratio = truth / plan if plan and truth is not None else None
    return {
        "figure": name,
        "unit": unit,
        "plan": plan,
        "truth": truth,
        "ratio": ratio,
        "from": source,
    }
