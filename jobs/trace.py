"""Where a run's time went: its stages, its embedding actors, and each data file that was written.

`runs/<run>/trace.json` is in the Trace Event Format, which Perfetto and Chrome's tracing open. The
report shows the same in short.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state

from jobs.run import Run

MOST_SPANS = 4000  # some MB, and no more than a screen shows
LEAST_GAP_S = 0.01
STEPS = ("fetch", "decode", "tokenize", "embed")  # before a file is written

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Write:
    """A data file, or some of one process one after the other, on the way to the store.

    Attributes:
        node: The machine's address.
        pid: The process.
        began_at: When writing began, by that machine's clock, in seconds since 1970.
        ended_at: When it ended.
        seconds: What its rows took in each step before, whose processes may be others.
    """

    node: str
    pid: int
    began_at: float
    ended_at: float
    files: int
    rows: int
    rejected: int
    size_bytes: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Actor:
    """An embedding actor from when its encoder was loaded to its end, in seconds since 1970.

    Attributes:
        alone: Whether it prepares and writes, too; else tasks do that for it.
    """

    node: str
    pid: int
    began_at: float
    ended_at: float
    alone: bool


def read_write(row: Mapping[str, Any]) -> Write:
    """Return what a worker told of a data file; see `jobs.embed_write.write_rows`."""
    return Write(
        node=row["node"],
        pid=row["pid"],
        began_at=row["began_at"],
        ended_at=row["began_at"] + row["write_s"],
        files=1,
        rows=row["rows"],
        rejected=row["rejected"],
        size_bytes=row["size_bytes"],
        seconds={step: row[f"{step}_s"] for step in STEPS},
    )


def read_actors(run: Run) -> list[Actor]:
    """Ask Ray for the actors of this run's last embedding; none if Ray tells less than it did."""
    since_s = max((one["began_s"] for one in run.stages if one["stage"] == "embed"), default=0.0)
    job, now = ray.get_runtime_context().get_job_id(), run.began_at + run.elapsed_s()
    with suppress(KeyError):  # Ray promises nothing of this table
        return [
            Actor(
                node=one["Address"]["IPAddress"],
                pid=one["Pid"],
                began_at=one["StartTime"] / 1e3,
                ended_at=one["EndTime"] / 1e3 or now,
                alone="PieceEmbedder" in one["ActorClassName"],
            )
            for one in state.actors().values()
            if one["JobID"] == job
            and "Embedder" in one["ActorClassName"]
            and one["StartTime"] / 1e3 >= run.began_at + since_s
        ]
    return []


def write_trace(
    run: Run,
    writes: Sequence[Write],
    seconds: Mapping[str, float],
    actors: Sequence[Actor] = (),
) -> dict[str, Any]:
    """Write `trace.json`; return what the report says of time.

    Args:
        run: The run; it is nearly over.
        writes: The data files that it wrote.
        seconds: What each step of embedding took, summed over all workers, as `decode_s`.
        actors: Those that embedded.

    Raises:
        StoreError: It can't be written.
    """
    wall_s = run.elapsed_s()
    spans = list_spans(run.stages, wall_s)
    trace = make_trace(f"vitrine {run.command} {run.run_id}", run.began_at, spans, writes, actors)
    run.store.write_text(json.dumps(trace, separators=(",", ":")), "runs", run.run_id, "trace.json")
    embed = describe_embedding(actors, seconds, run.began_at) if writes else None
    return {"wall_s": wall_s, "spans": spans, "embed": embed, "begun_again": run.begun_again}


def list_spans(stages: Iterable[Mapping[str, Any]], wall_s: float) -> list[dict[str, Any]]:
    """Return the stages in order, and what lies between them: together the whole run.

    Args:
        stages: See `Run.stages`.
        wall_s: The run's seconds.
    """
    spans: list[dict[str, Any]] = []
    over_s = 0.0
    ended: dict[str, Any] = {"began_s": wall_s, "seconds": 0.0}
    for stage in [*(one for one in stages if one["began_s"] is not None), ended]:
        gap_s = stage["began_s"] - over_s
        if gap_s >= LEAST_GAP_S:
            name = "between stages" if spans else "start"
            name = name if stage is not ended else "end"
            spans.append({"stage": name, "began_s": over_s, "seconds": gap_s, "rows_per_s": None})
        over_s = stage["began_s"] + stage["seconds"]
        spans += [dict(stage)] if stage is not ended else []
    return spans


def describe_embedding(
    actors: Sequence[Actor], seconds: Mapping[str, float], began_at: float
) -> dict[str, Any]:
    """Return the seconds of each step beside what all actors had.

    Args:
        actors: All of the last embedding.
        seconds: What each step took, summed over all workers, as `decode_s`.
        began_at: The run's beginning, in seconds since 1970.

    Returns:
        actors; ready_s, when the first was; their actor_s, the share of it that they were busy,
        and of each step its seconds and the share of actor_s: None for a step that other
        processes do.
    """
    actor_s = sum(one.ended_at - one.began_at for one in actors)
    inside = (*STEPS, "write") if any(one.alone for one in actors) else ("embed",)
    named = {key.removesuffix("_s"): value for key, value in seconds.items()}
    shares = {name: value / actor_s for name, value in named.items() if name in inside and actor_s}
    return {
        "actors": len(actors),
        "ready_s": min((one.began_at for one in actors), default=began_at) - began_at,
        "actor_s": actor_s,
        "busy_share": sum(shares.values()),
        "steps": [
            {"step": name, "seconds": value, "share": shares.get(name)}
            for name, value in named.items()
        ],
    }


def make_trace(
    title: str,
    began_at: float,
    spans: Sequence[Mapping[str, Any]],
    writes: Sequence[Write],
    actors: Sequence[Actor],
) -> dict[str, Any]:
    """Return a trace: a track of stages, and one of each process that embedded or wrote.

    Args:
        title: Names the stages' track.
        began_at: The run's beginning, in seconds since 1970; the trace's times count from it.
        spans: See `list_spans`. What other machines' clocks put outside of them is drawn in.
        writes: The data files; of more than `MOST_SPANS`, some of a process are one span.
        actors: The embedding actors.
    """
    wall_s = max((one["began_s"] + one["seconds"] for one in spans), default=0.0)
    tracks = {(one.node, one.pid): "writes" for one in writes}
    tracks |= {(one.node, one.pid): "embeds" for one in actors}
    nodes = {node: n for n, node in enumerate(sorted({node for node, _ in tracks}), 1)}

    def draw(name: str, one: Write | Actor, args: Mapping[str, Any]) -> Event:
        begin, end = (min(max(at - began_at, 0.0), wall_s) for at in (one.began_at, one.ended_at))
        return _span(name, (nodes[one.node], one.pid), begin, end - begin, args)

    events = [_name("process", (0, 0), title), _name("thread", (0, 0), "stages")]
    events += [_span(s["stage"], (0, 0), s["began_s"], s["seconds"], {}) for s in spans]
    events += [_name("process", (n, 0), f"machine {node}") for node, n in nodes.items()]
    events += [
        _name("thread", (nodes[node], pid), f"{what}, process {pid}")
        for (node, pid), what in sorted(tracks.items())
    ]
    events += [draw("embedding actor", one, {}) for one in actors]
    for one in merge_writes(writes, MOST_SPANS):
        figures = {name: getattr(one, name) for name in ("files", "rows", "rejected", "size_bytes")}
        steps = {f"{step}_s": round(value, 3) for step, value in one.seconds.items()}
        events.append(draw("write", one, figures | steps))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"began_at": began_at}}


def merge_writes(writes: Sequence[Write], most: int) -> list[Write]:
    """Sum up neighbours of a process until there are hardly more than `most` in all."""
    each = -(-len(writes) // most)
    if each <= 1:
        return list(writes)
    tracks: dict[tuple[str, int], list[Write]] = {}
    for one in sorted(writes, key=lambda one: one.began_at):
        tracks.setdefault((one.node, one.pid), []).append(one)
    return [
        _merge(track[start : start + each])
        for track in tracks.values()
        for start in range(0, len(track), each)
    ]


def _merge(writes: Sequence[Write]) -> Write:
    steps = writes[0].seconds
    return Write(
        node=writes[0].node,
        pid=writes[0].pid,
        began_at=writes[0].began_at,
        ended_at=max(one.ended_at for one in writes),
        files=sum(one.files for one in writes),
        rows=sum(one.rows for one in writes),
        rejected=sum(one.rejected for one in writes),
        size_bytes=sum(one.size_bytes for one in writes),
        seconds={step: sum(one.seconds[step] for one in writes) for step in steps},
    )


def _name(kind: str, track: tuple[int, int], name: str) -> Event:
    args = {"name": name}
    return {"ph": "M", "name": f"{kind}_name", "pid": track[0], "tid": track[1], "args": args}


def _span(
    name: str, track: tuple[int, int], began_s: float, seconds: float, args: Mapping[str, Any]
) -> Event:
    """Return a complete event; times in microseconds."""
    times = {"ts": round(began_s * 1e6), "dur": round(seconds * 1e6)}
    return {"ph": "X", "name": name, "pid": track[0], "tid": track[1], **times, "args": dict(args)}
