"""What Prometheus sees of a run: real values over HTTP, and every name that the papers use."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import metrics

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
DASHBOARD = json.loads((REPOSITORY / "deploy/grafana/vitrine.json").read_text(encoding="utf-8"))
OURS = {metric.exported: metric for metric in metrics.METRICS}
NAME = re.compile(r"\bray_[a-z0-9_]+")

# A process of its own: of Ray's exporter there is one a process, and a local Ray ends with it.
# It keeps the last value of each series, as Prometheus does: Ray drops old gauges.
RUN = """
import json, sys, threading, time, urllib.request
from contextlib import suppress
import ray
from prometheus_client.parser import text_string_to_metric_families
from jobs.cluster import ray_session
from jobs.config import JobConfig
from jobs.errors import JobError
from jobs.metrics import scrape_addresses
from jobs.progress import Progress
from jobs.refresh import refresh
from jobs.run import Run
from jobs.store import Store

config, quiet = JobConfig.model_validate_json(sys.argv[1]), Progress(quiet=True)
seen, over = {}, threading.Event()

def scrape(address):
    while not over.wait(0.4):
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as page:
            for family in text_string_to_metric_families(page.read().decode()):
                for one in family.samples:
                    seen[one.name, tuple(sorted(one.labels.items()))] = one.value

def has_ended():
    return any(("outcome", "idle") in labels for _, labels in list(seen))

def fail():
    run = Run("refresh", Store(config.store), quiet)
    with suppress(JobError), run.counted():
        with suppress(JobError), run.stage("embed"):
            raise JobError("a machine died, and the work is begun again")
        raise JobError("between two stages")

with ray_session(config.ray):
    (address,) = scrape_addresses()
    scraper = threading.Thread(target=scrape, args=(address,))
    scraper.start()
    done = [refresh(config, quiet)]
    fail()
    done.append(refresh(config, quiet))
    deadline = time.monotonic() + 30
    while not has_ended() and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(1.5)  # of one report of values, all
    over.set()
    scraper.join()
print(json.dumps({"reports": [one.report for one in done], "seen": [*seen.items()]}))
"""


@pytest.fixture(scope="module")
def scraped(tmp_path_factory, sample_catalog):
    """(report of a run with rejects, samples): after it and a second run that does nothing."""
    folder = tmp_path_factory.mktemp("metrics")
    shutil.copytree(sample_catalog, folder / "catalog")
    path = folder / "catalog" / "catalog.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows[:3]:
        row["image_uri"] = "nowhere.jpg"
    pq.write_table(pa.Table.from_pylist(rows), path)
    job = {
        "store": str(folder / "store"),
        "catalog": {"path": str(path)},
        "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
        "embed": {"fields": ["image"]},
        "gate": {"max_reject_share": 0.5},
        "ray": {"object_store_mb": 128},
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(job)],
        cwd=REPOSITORY,
        env=os.environ | {"RAY_metrics_report_interval_ms": "1000"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    report = json.loads(Path(told["reports"][0]).with_suffix(".json").read_text(encoding="utf-8"))
    return report, [(name, dict(labels), value) for (name, labels), value in told["seen"]]


def total(samples, name, **labels):
    found = [
        value for one, told, value in samples if one == name and labels.items() <= told.items()
    ]
    assert found, f"{name} {labels} is not exported"
    return sum(found)


def test_counters_are_what_the_report_says(scraped):
    report, samples = scraped
    for name, key in (
        ("rows_embedded", "embedded"),
        ("images_embedded", "images_embedded"),
        ("images_fetched_bytes", "image_bytes"),
        ("written_bytes", "written_bytes"),
    ):
        assert total(samples, f"ray_vitrine_{name}_total") == report[key] > 0
    assert report["rejected_in_run"] == 3
    assert total(samples, "ray_vitrine_rows_rejected_total", reason="not_found") == 3
    assert total(samples, "ray_vitrine_rows_rejected_total") == 3
    for step in report["time"]["embed"]["steps"]:
        found = total(samples, "ray_vitrine_embed_step_seconds_total", step=step["step"])
        assert found == pytest.approx(step["seconds"])


def test_gauges_show_the_end(scraped):
    report, samples = scraped
    assert total(samples, "ray_vitrine_backlog_rows") == 0
    assert total(samples, "ray_vitrine_release_version") == report["release"] == 1
    assert total(samples, "ray_vitrine_release_rows", state="live") == report["vectors"]
    assert total(samples, "ray_vitrine_release_rows", state="rejected") == 3
    assert total(samples, "ray_vitrine_gate_failures") == 0
    measured = report["indexes"][0]["measured"]["intersection_at_10"]
    found = total(samples, "ray_vitrine_index_intersection_at_10", field="image")
    assert found == pytest.approx(measured)
    for outcome in ("published", "failed", "idle"):
        assert total(samples, "ray_vitrine_runs_total", outcome=outcome, command="refresh") == 1


def test_every_stage_is_counted(scraped):
    report, samples = scraped
    assert total(samples, "ray_vitrine_stage_running") == 0
    for stage in report["stages"]:
        if stage["began_s"] is not None:
            found = total(samples, "ray_vitrine_stage_seconds_total", stage=stage["stage"])
            assert found >= 0.99 * stage["seconds"]
    embed = total(samples, "ray_vitrine_stage_rows_total", stage="embed", command="refresh")
    assert embed == report["rows"]


def test_what_ray_exports_beside_ours(scraped):
    """The names that the docs take from Ray, but for those that need a GPU."""
    _, samples = scraped
    named = {name for name in NAME.findall(DOCS) if name not in OURS and "vitrine" not in name}
    gpu = {"ray_node_gpus_utilization", "ray_node_gram_used"}
    assert named - {name for name, _, _ in samples} <= gpu
    ours = {name for name, _, _ in samples if name.startswith("ray_vitrine_")}
    assert ours <= set(OURS)
    # Nothing was reused in this catalog.
    assert set(OURS) - ours == {"ray_vitrine_images_reused_total"}


def documented():
    """Name: (type, labels) of the table in docs/metrics.md."""
    rows = re.findall(r"^\| `(ray_vitrine_\w+)` \| (\w+) \| [^|]+ \| ([^|]*) \|", DOCS, re.M)
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_docs_name_every_metric_and_no_other():
    assert documented() == {n: (metric.kind, metric.labels) for n, metric in OURS.items()}
    assert {name for name in NAME.findall(DOCS) if "vitrine" in name} == set(OURS)


def expressions():
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert all(panel["targets"] for panel in panels)
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_dashboard_asks_for_what_exists():
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    assert {name for name in asked if "vitrine" in name} == set(OURS)
    assert asked - set(OURS) <= set(NAME.findall(DOCS))


def test_dashboard_has_the_shape_that_grafana_imports():
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["id"] is None
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    source = {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
    taken, ids = set(), set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
        ids.add(panel["id"])
        assert panel["datasource"] == source
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert len(ids) == len(DASHBOARD["panels"])


def test_alerts_are_rules_of_metrics_that_exist():
    (text,) = re.findall(r"^```yaml\n(groups:.*?)^```", DOCS, re.M | re.S)
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    assert {"alert", "expr", "labels", "annotations"} <= set(rules[0])
    for rule in rules:
        assert set(NAME.findall(rule["expr"])) <= set(OURS)


def test_a_metric_that_fails_is_told_once(local_ray, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            metrics._record(metrics.REJECTED, 1)  # without its label
    assert [record.message for record in caplog.records] == [
        "vitrine: metrics are incomplete: ray_vitrine_rows_rejected_total: "
        "Missing value for tag key(s): reason."
    ]
