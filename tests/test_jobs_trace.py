"""Where the time went: spans that lie inside their run, add up, and open as a trace."""

import itertools
import json
from pathlib import Path

import pytest
import ray
from page_checks import check_page

from jobs.config import JobConfig
from jobs.errors import JobError
from jobs.progress import Progress
from jobs.refresh import refresh
from jobs.reindex import reindex
from jobs.report import open_templates
from jobs.run import Run
from jobs.store import Store
from jobs.trace import (
    Actor,
    Write,
    describe_embedding,
    list_spans,
    make_trace,
    merge_writes,
    read_actors,
    write_trace,
)

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory, sample_catalog):
    values = {
        "store": str(tmp_path_factory.mktemp("trace") / "store"),
        "catalog": {"path": str(sample_catalog / "catalog.parquet")},
        "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
        "embed": {"fields": ["image"]},
    }
    return JobConfig.model_validate(values)


@pytest.fixture(scope="module")
def runs(local_ray, config):
    """The folder of a run each: one that embeds, one that finds nothing to do, a reindex."""
    done = refresh(config, QUIET), refresh(config, QUIET), reindex(config, QUIET)
    return [Path(one.report).parent for one in done]


def read(folder):
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report["time"], json.loads((folder / "trace.json").read_text(encoding="utf-8"))


def on_tracks(trace):
    """The spans of each track, in order of time."""
    found = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    found.sort(key=lambda event: (event["pid"], event["tid"], event["ts"]))
    tracks = itertools.groupby(found, key=lambda event: (event["pid"], event["tid"]))
    return {track: list(spans) for track, spans in tracks}


def test_stages_add_up_to_the_run(runs):
    for folder in runs:
        time, trace = read(folder)
        stages = on_tracks(trace)[0, 0]
        assert sum(span["dur"] for span in stages) == pytest.approx(
            time["wall_s"] * 1e6, abs=50_000
        )
        named = {span["name"] for span in stages if " stages" not in span["name"]}
        assert {"start"} < named
        page = check_page((folder / "report.html").read_text(encoding="utf-8"))
        assert all(name in page.texts["time"] for name in named)
        assert ("href", "trace.json") in page.references


def test_spans_lie_inside_the_run_one_after_the_other(runs):
    for folder in runs:
        time, trace = read(folder)
        for spans in on_tracks(trace).values():
            over, inside = 0, time["wall_s"] * 1e6 + 1
            for span in spans:
                assert span["ts"] >= over - 1
                over = span["ts"] + span["dur"]
                assert over <= inside
                if span["name"] == "embedding actor":  # what it writes lies inside
                    over, inside = span["ts"], over + 1
        assert (folder / "trace.json").stat().st_size < 100_000


def test_what_embedded_and_wrote_is_traced(runs):
    time, trace = read(runs[0])
    report = json.loads((runs[0] / "report.json").read_text(encoding="utf-8"))
    spans = [span for one in on_tracks(trace).values() for span in one]
    embed = next(span for span in spans if span["name"] == "embed")
    writes = [span for span in spans if span["name"] == "write"]
    assert sum(span["args"]["rows"] for span in writes) == report["rows"]
    assert sum(span["args"]["size_bytes"] for span in writes) == report["written_bytes"]
    actors = [span for span in spans if span["name"] == "embedding actor"]
    assert len(actors) == time["embed"]["actors"] > 0
    for span in writes + actors:
        assert embed["ts"] - 50_000 <= span["ts"]  # two clocks
        assert span["ts"] + span["dur"] <= embed["ts"] + embed["dur"] + 1e6  # an actor's end
    assert 0 < time["embed"]["busy_share"] <= 1
    assert embed["ts"] < time["embed"]["ready_s"] * 1e6 < embed["ts"] + embed["dur"]
    assert {one["step"]: one["share"] is None for one in time["embed"]["steps"]} == {
        "fetch": False, "decode": False, "tokenize": False, "embed": False, "write": False,
    }  # fmt: skip
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert f"vitrine refresh {runs[0].name}" in names


def test_runs_that_embed_nothing(runs):
    for folder in runs[1:]:
        time, trace = read(folder)
        assert time["embed"] is None
        assert list(on_tracks(trace)) == [(0, 0)]
        assert "Inside embed" not in (folder / "report.html").read_text(encoding="utf-8")


def stage(name, began_s, seconds):
    return {"stage": name, "began_s": began_s, "seconds": seconds, "rows_per_s": None}


def test_what_lies_between_stages_is_a_span():
    stages = [stage("a", 1.0, 2.0), stage("a: step", None, 9.0), stage("b", 3.5, 1.0)]
    spans = list_spans(stages, 5.0)
    assert [(one["stage"], one["began_s"], one["seconds"]) for one in spans] == [
        ("start", 0.0, 1.0),
        ("a", 1.0, 2.0),
        ("between stages", 3.0, 0.5),
        ("b", 3.5, 1.0),
        ("end", 4.5, 0.5),
    ]
    assert list_spans([stage("a", 0.0, 5.0)], 5.0) == [stage("a", 0.0, 5.0)]


def test_a_stage_that_failed_and_the_one_after_it(local_ray, tmp_path):
    @ray.remote(num_cpus=0)
    class Embedder:
        def ready(self):
            return True

    def embed(*, fails):
        with run.stage("embed"):
            actor = Embedder.remote()
            ray.get(actor.ready.remote())
            if fails:
                raise JobError("a machine died")
            return actor

    run = Run("refresh", Store(str(tmp_path / "store")), QUIET)
    with pytest.raises(JobError):
        embed(fails=True)
    run.begin_again("a machine was lost: <it>")
    held = embed(fails=False)
    (actor,) = read_actors(run)
    assert actor.pid
    del held
    time = write_trace(run, (), {})
    names = [one["stage"] for one in time["spans"] if one["seconds"] > 0.1]
    assert [name for name in names if "embed" in name] == ["embed (failed)", "embed"]
    assert sum(one["seconds"] for one in time["spans"]) == pytest.approx(time["wall_s"], abs=0.05)
    assert time["begun_again"] == ["a machine was lost: <it>"]
    macros = open_templates().get_template("macros.html")
    told = str(macros.module.where_time_went(time))
    assert "begun again 1 time; " in told
    assert "1: a machine was lost: &lt;it&gt;." in told
    assert "begun again" not in str(macros.module.where_time_went(time | {"begun_again": []}))


def write(node, pid, began_at, rows=1):
    return Write(
        node=node, pid=pid, began_at=began_at, ended_at=began_at + 1, files=1, rows=rows,
        rejected=0, size_bytes=10, seconds={"fetch": 0.5, "embed": 1.0},
    )  # fmt: skip


def test_a_trace_stays_small():
    writes = [write(f"10.0.0.{n % 3}", 7, 100.0 + n, rows=n) for n in range(30_000)]
    merged = merge_writes(writes, 4000)
    assert 3000 < len(merged) <= 4003
    assert sum(one.rows for one in merged) == sum(one.rows for one in writes)
    assert sum(one.files for one in merged) == 30_000
    assert sum(one.seconds["embed"] for one in merged) == 30_000
    trace = make_trace("many", 0.0, [stage("embed", 0.0, 40_000.0)], writes, [])
    assert len(json.dumps(trace)) < 2_000_000


def test_another_machines_clock_is_drawn_into_the_run():
    trace = make_trace("t", 100.0, [stage("embed", 0.0, 5.0)], [write("a", 7, 99.0)], [])
    (span,) = (event for event in trace["traceEvents"] if event.get("name") == "write")
    assert (span["ts"], span["dur"]) == (0, 0)


def test_gpu_actors_have_the_embed_step_alone():
    actors = [Actor(node="a", pid=n, began_at=0.0, ended_at=10.0, alone=False) for n in range(2)]
    found = describe_embedding(actors, {"decode_s": 30.0, "embed_s": 15.0}, -3.0)
    assert (found["actors"], found["actor_s"], found["busy_share"]) == (2, 20.0, 0.75)
    assert found["ready_s"] == 3.0
    assert [one["share"] for one in found["steps"]] == [None, 0.75]
