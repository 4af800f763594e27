"""The plan of a run: what it is made from, what is unknown, and the truth beside it afterwards."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from store_maker import Row, append, publish

from encoders.checkpoint import load_model, save_checkpoint
from encoders.create import create_checkpoint
from encoders.spec import EncoderSpec
from jobs import plan_truth
from jobs.config import EmbedConfig, JobConfig
from jobs.errors import ConfigError
from jobs.plan_cluster import Cluster, Machines, add_prices, read_cluster
from jobs.plan_rates import EmbedRate, describe_cluster, find_embed_rate, read_past, scale_stage
from jobs.plan_truth import compare_plan, write_plan
from jobs.progress import Progress
from jobs.refresh import preview_refresh, refresh
from jobs.reindex import reindex
from jobs.run import Run
from jobs.store import Store

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "ray_cluster.yaml"
QUIET = Progress(quiet=True)
ENCODER = "e" * 64
TWO_CORES = Machines(type="local", count=1, cpus=2, gpus=0, memory_bytes=2**33)


def make_cluster(**changes):
    return Cluster(name="a test", machines=(replace(TWO_CORES, **changes),))


def test_the_repositorys_cluster_file_is_read():
    cluster = read_cluster(CLUSTER, ())
    head, gpu, cpu = cluster.machines
    assert (head.type, head.count, head.cpus, head.gpus) == ("head", 1, 0, 0)
    assert (gpu.type, gpu.count, gpu.cpus, gpu.gpus) == ("gpu_embed", 8, 16, 1)
    assert (cpu.type, cpu.count, cpu.memory_bytes) == ("cpu_index", 16, 80 * 2**30)
    assert (cluster.cpus, cluster.gpus, cluster.most_cpus) == (24 * 16, 8, 16)
    assert cluster.most_memory is None  # gpu_embed doesn't say its own
    embedders = cluster.embedders(EmbedConfig())
    assert (embedders.count, embedders.gpus, embedders.precision) == (8, 1.0, "auto")
    assert cluster.embedders(EmbedConfig(gpus_per_actor=0.5)).count == 16
    assert cluster.embedders(EmbedConfig(gpus_per_actor=0, precision="fp32")).count == 24 * 16


def test_workers_and_prices_are_set():
    cluster = read_cluster(CLUSTER, ["gpu_embed=2", "cpu_index=1"])
    priced = add_prices(cluster, ["gpu_embed=1.5", "head=0"])
    assert [one.count for one in priced.machines] == [1, 2, 1]
    assert [one.price_per_hour for one in priced.machines] == [0.0, 1.5, None]
    assert read_cluster(CLUSTER, ["cpu_index=30"]).notes


@pytest.mark.parametrize(
    ("workers", "prices", "words"),
    [
        (["gpu=2"], [], "--workers 'gpu=2': no known type; the types are head, gpu_embed"),
        (["gpu_embed"], [], "expected TYPE=N"),
        (["gpu_embed=two"], [], "'two' is no number"),
        (["gpu_embed=-1"], [], "0 or more"),
        ([], ["cheap=1"], "--price 'cheap=1': no known type"),
        ([], ["head=-0.1"], "0 or more"),
        ([], ["head=nan"], "0 or more"),
    ],
)
def test_bad_workers_and_prices_are_refused(workers, prices, words):
    with pytest.raises(ConfigError, match=words):
        add_prices(read_cluster(CLUSTER, workers), prices)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list", "must be a YAML mapping"),
        ("a: [", "can't be read"),
        ("cluster_name: x", "no Ray cluster file"),
        ("available_node_types: {a: {}}", "head_node_type is None"),
        ("{head_node_type: a, available_node_types: {a: {}}}", "a.resources has no CPU"),
        ("{head_node_type: a, available_node_types: {a: 3}}", "a.resources has no CPU"),
        (
            "{head_node_type: a, available_node_types: {a: {resources: {CPU: many}}}}",
            "CPU of a is 'many'",
        ),
    ],
)
def test_a_malformed_cluster_file_is_refused(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_cluster(tmp_path / "c.yaml", ())


def make_rate(**changes):
    values = {
        "source": "a test",
        "rows": 1000,
        "embedders": make_cluster().embedders(EmbedConfig()),
        "start_s": 5.0,
        "steps": {"fetch": 0.01, "decode": 0.03, "embed": 0.1},
        "image_bytes": 10.0,
        "written_bytes": 20.0,
    }
    return EmbedRate(**values | changes)


def test_time_on_cpus_shrinks_with_actors_as_long_as_each_has_work():
    rate = make_rate()
    more = make_cluster(count=4).embedders(EmbedConfig())
    assert rate.seconds(1000, rate.embedders, 2) == pytest.approx(5 + 1000 * 0.14 / 2)
    assert rate.seconds(1000, more, 8) == pytest.approx(5 + 1000 * 0.14 / 8)
    assert rate.seconds(16, more, 8) == pytest.approx(5 + 16 * 0.14)
    assert rate.seconds(0, more, 8) == 0


def test_decoding_cores_limit_a_gpu():
    gpus = make_cluster(gpus=1, cpus=4).embedders(EmbedConfig())
    rate = make_rate(embedders=gpus, steps={"decode": 0.04, "embed": 0.001})
    assert rate.seconds(1000, gpus, 4) == pytest.approx(5 + 1000 * 0.04 / 4)
    assert rate.seconds(1000, gpus, 400) == pytest.approx(5 + 1000 * 0.001)
    assert rate.needs_cpus() == pytest.approx(40)


def add_report(store, run, rows, cluster, seconds_a_row, *, bf16=False, without=()):
    publish(store, run)
    report = {
        "embedded": rows,
        "rejected_in_run": 0,
        "rows_fp32": 0 if bf16 else rows,
        "rows_bf16": rows if bf16 else 0,
        "embed_s": 3 + rows * seconds_a_row / 2,
        "image_bytes": 100 * rows,
        "written_bytes": 50 * rows,
        "cluster": describe_cluster(cluster, EmbedConfig()),
        "config": config_of(store.root, "catalog.parquet").model_dump(mode="json"),
        "indexes": [],
        "stages": [
            {"stage": "embed: embed", "seconds": rows * seconds_a_row, "rows_per_s": 1.0},
            {"stage": "write ids", "seconds": rows / 100, "rows_per_s": 100.0},
        ],
    }
    report = {name: value for name, value in report.items() if name not in without}
    store.write_json(report, "runs", run, "report.json")


def config_of(store, catalog, **sections):
    return JobConfig.model_validate(
        {
            "store": str(store),
            "catalog": {"path": str(catalog), "text": "{title}. {description}"},
            "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
            "embed": {"fields": ["image"]},
            "evaluate": {"sample_rows": 20},
        }
        | sections
    )


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "store"))
    append(store, [Row(0, 1)])
    return store


@pytest.fixture
def past(store):
    """Runs of 5,000, of 2,000 and of 20 rows, the last one the newest; one has no report."""
    publish(store, "20260101T000000-000000")
    for number, (rows, seconds) in enumerate([(5000, 0.4), (2000, 0.2), (20, 1.0)]):
        add_report(store, f"2026020{number}T000000-000000", rows, make_cluster(), seconds)
    return list(read_past(store, ENCODER))


def test_rates_come_from_the_newest_run_that_embedded_enough(past):
    assert [one.embedded for one in past] == [20, 2000, 5000]
    embedders = make_cluster().embedders(EmbedConfig())
    rate, _ = find_embed_rate(past, embedders, 1_000_000)
    assert rate.rows == 2000
    assert (rate.start_s, rate.steps["embed"]) == (pytest.approx(3), pytest.approx(0.2))
    assert (rate.image_bytes, rate.written_bytes) == (100, 50)
    assert find_embed_rate(past, embedders, 50)[0].rows == 20
    assert find_embed_rate(past[:1], embedders, 1_000_000)[0].rows == 20  # there is no other


def test_no_gpu_rate_is_made_of_cpu_rates(past):
    gpus = make_cluster(gpus=1).embedders(EmbedConfig())
    assert find_embed_rate(past, gpus, 100) == (None, "no earlier run on a GPU")
    bf16 = make_cluster(gpus=1).embedders(EmbedConfig(precision="bf16"))
    assert find_embed_rate(past, bf16, 100) == (None, "no earlier run on a GPU in bf16")


def test_a_rate_is_of_the_precision_that_rows_were_embedded_in(store):
    add_report(store, "20260201T000000-000000", 3000, make_cluster(), 0.4)
    add_report(store, "20260202T000000-000000", 2000, make_cluster(), 0.1, bf16=True)
    past = read_past(store, ENCODER)
    for precision, rows in {"auto": 2000, "bf16": 2000, "fp32": 3000}.items():
        embedders = make_cluster().embedders(EmbedConfig(precision=precision))
        assert find_embed_rate(past, embedders, 1000)[0].rows == rows


@pytest.mark.parametrize("name", ["cluster", "rows_bf16", "image_bytes", "stages", "config"])
def test_a_report_that_lacks_a_figure_is_of_no_past_run(store, name):
    add_report(store, "20260201T000000-000000", 3000, make_cluster(), 0.4)
    add_report(store, "20260202T000000-000000", 2000, make_cluster(), 0.1, without=[name])
    assert [one.embedded for one in read_past(store, ENCODER)] == [3000]


def test_no_more_reports_are_read_than_a_rate_needs(store):
    add_report(store, "20260201T000000-000000", 3000, make_cluster(), 0.4)
    add_report(store, "20260202T000000-000000", 2000, make_cluster(), 0.1)
    past = read_past(store, ENCODER)
    embedders = make_cluster().embedders(EmbedConfig())
    assert find_embed_rate(past, embedders, 1000)[0].rows == 2000
    oldest = Path(store.uri("runs", "20260201T000000-000000", "report.json"))
    oldest.unlink()  # it was not read yet
    newest = Path(store.uri("runs", "20260202T000000-000000", "report.json"))
    newest.unlink()  # it was, and is kept
    assert [one.embedded for one in past] == [2000]


def test_a_stage_is_scaled_by_work_and_cpus(past):
    runs = [(run, run.stages["write ids"], float(run.rows["write ids"])) for run in past]
    one = scale_stage(runs, 4000, workers="cpus", here=4)
    assert one.value == pytest.approx(4000 / 100 / 2)
    assert past[1].run in one.source
    assert not one.too_high
    far = scale_stage(runs, 10_000_000, workers="cpus", here=2)
    assert far.too_high
    assert "start-up makes it too high" in far.source
    assert scale_stage([], 1, workers="cpus", here=2) is None


def test_what_was_unknown_or_not_measured_has_no_ratio():
    plan = {
        "run": "p",
        "cluster": {"name": "here"},
        "rows": {"to_embed": 4},
        "stages": [
            {"stage": "embed", "seconds": 2.0, "source": "s"},
            {"stage": "index image", "seconds": None, "source": "no earlier run"},
        ],
        "seconds": 2.0,
        "unknown": ["index image"],
        "bytes": {name: {"value": 10, "source": "s"} for name in ("image", "table", "index")},
    }
    stages = [{"stage": "embed", "seconds": 3.0}, {"stage": "index image", "seconds": 9.0}]
    written = {"image_bytes": 20, "written_bytes": 5, "indexes": []}
    done = {"run": "r", "embedded": 3, "rejected_in_run": 1, "stages": stages} | written
    found = compare_plan(plan, done)
    ratios = {one["figure"]: one["ratio"] for one in found["figures"]}
    assert ratios == {
        "rows to embed": 1.0,
        "embed": 1.5,
        "index image": None,
        "the stages that were planned": 1.5,
        "images fetched": 2.0,
        "table written": 0.5,
        "index files written": 0.0,
    }


def test_only_a_plan_of_the_same_job_on_rays_machines_is_the_runs(store):
    config = config_of(store.root, "catalog.parquet")
    other = config_of(store.root, "catalog.parquet", embed={"fields": ["image"], "batch_size": 7})
    space, key = SimpleNamespace(encoder=ENCODER), plan_truth._key

    def write(job, *, of_ray):
        run = Run("plan", store, QUIET, writes=False)
        write_plan(run, job, space, {"rows": {}}, of_ray=of_ray)
        return run.run_id

    write(config, of_ray=False)
    write(other, of_ray=True)
    run = Run("refresh", store, QUIET, writes=False)
    assert plan_truth._find_plan(run, key(run, config, space)) is None
    right = write(config, of_ray=True)
    write(config, of_ray=False)
    assert plan_truth._find_plan(run, key(run, config, space))["run"] == right
    publish(store, "20990101T000000-000000")
    later = Run("refresh", store, QUIET, writes=False)
    assert plan_truth._find_plan(later, key(later, config, space)) is None


@pytest.fixture(scope="module")
def job(tmp_path_factory, sample_catalog):
    """A configuration file of a store that has nothing yet."""
    folder = tmp_path_factory.mktemp("plan")
    config = config_of(folder / "store", sample_catalog / "catalog.parquet")
    values = {name: config.model_dump(mode="json")[name] for name in config.model_fields_set}
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    return folder / "job.yaml"


def read_report(config, result):
    return Store(config.store).read_json("runs", result.run, "report.json")


def figures_of(report):
    return {one["figure"]: one for one in report["plan"]["figures"]}


@pytest.mark.usefixtures("local_ray")
def test_a_plan_before_and_a_refresh_after(job, call_vitrine, sample_catalog):
    config = JobConfig.model_validate(yaml.safe_load(job.read_text()))
    store = Store(config.store)
    done = call_vitrine("plan", "-c", job, "--price", "local=3.6", "--json", "-q")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    run = json.loads(done.stdout)["address"].split("/")[-2]
    assert store.releases() == []
    assert store.embeddings_version() is None
    embed = next(one for one in plan["stages"] if one["stage"] == "embed")
    assert embed["seconds"] > 0
    assert "a calibration" in embed["source"]
    assert "write ids" in plan["unknown"]
    assert plan["rows"]["to_embed"] == 40
    assert plan["cost"]["value"] == pytest.approx(plan["seconds"] / 1000)
    assert "is unknown" in plan["cost"]["source"]
    assert {one["fits"] for one in plan["memory"]} == {True}
    assert plan["serving_bytes"]["image"] > 0

    first = refresh(config, QUIET)
    report = read_report(config, first)
    assert (report["plan"]["run"], report["plan"]["made_before"]) == (run, True)
    figures = figures_of(report)
    assert figures["rows to embed"]["ratio"] == 1
    assert figures["embed"]["ratio"] > 0
    assert figures["write ids"]["ratio"] is None
    assert figures["write ids"]["truth"] > 0
    assert figures["index image: add and merge"]["truth"] > 0
    assert 0.5 < figures["images fetched"]["ratio"] < 2
    assert 0.3 < figures["index files written"]["ratio"] < 1.5
    page = Path(store.uri("runs", first.run, "report.html")).read_text(encoding="utf-8")
    assert "Plan and truth" in page

    idle = read_report(config, refresh(config, QUIET))
    assert "plan" not in idle
    assert preview_refresh(config, QUIET).up_to_date
    evaluate = config.evaluate.model_copy(update={"sample_rows": 10})
    dry = preview_refresh(config.model_copy(update={"evaluate": evaluate}), QUIET)
    assert not dry.up_to_date
    assert {"write ids", "index image"} <= {one["stage"] for one in dry.plan["stages"]}

    rows = pq.read_table(sample_catalog / "catalog.parquet").to_pylist()
    rows = [row | {"image_uri": str(sample_catalog / row["image_uri"])} for row in rows]
    changed = job.parent / "changed.parquet"
    pq.write_table(pq.read_table(sample_catalog / "catalog.parquet").from_pylist(rows), changed)
    other = config.model_copy(
        update={"catalog": config.catalog.model_copy(update={"path": str(changed)})}
    )
    second = read_report(other, refresh(other, QUIET))
    figures = figures_of(second)
    assert second["plan"]["made_before"] is False  # that plan was of another catalog and release
    assert figures["rows to embed"]["truth"] == second["embedded"] == 40
    assert figures["embed"]["ratio"] > 0
    assert figures["write ids"]["ratio"] > 0
    assert first.run in figures["write ids"]["from"]
    rebuilt = read_report(other, reindex(other, QUIET, publish=False))
    assert figures_of(rebuilt)["rows to embed"]["plan"] == 0
    assert figures_of(rebuilt)["index image: exact search"]["ratio"] > 0


@pytest.mark.usefixtures("local_ray")
def test_an_encoder_that_bf16_moves_is_calibrated_in_fp32(tmp_path, sample_catalog):
    """As in test_jobs_contract; on a CPU that multiplies in bf16, auto would take that."""
    create_checkpoint(
        EncoderSpec(architecture="vitrine-tiny", pretrained="random"), tmp_path / "plain"
    )
    model, described = load_model(tmp_path / "plain")
    with torch.no_grad():
        model.ln_final.bias.fill_(1000)
        model.text_projection.sub_(model.text_projection.mean(dim=0))
    save_checkpoint(model, described, tmp_path / "sharp")
    encoder = {"checkpoint": str(tmp_path / "sharp")}
    job = config_of(tmp_path / "store", sample_catalog / "catalog.parquet", encoder=encoder)
    stages = preview_refresh(job, QUIET).plan["stages"]
    assert " rows in fp32, this machine" in next(
        s["source"] for s in stages if s["stage"] == "embed"
    )


@pytest.mark.usefixtures("local_ray")
def test_a_plan_for_a_cluster_file_says_what_it_cannot_know(job, call_vitrine):
    store = f"--set=store={job.parent / 'empty'}"
    prices = ("--price", "gpu_embed=1", "--price", "head=0.1")
    done = call_vitrine("plan", "-c", job, store, "--cluster", CLUSTER, *prices, "-q")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    embed = next(line.split() for line in lines if line.startswith("  embed "))
    assert embed[1] == "unknown"
    assert "no earlier run on a GPU" in " ".join(embed)
    assert any("without cpu_index, whose price is not given" in line for line in lines)
    assert any("doesn't say the memory of gpu_embed" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "cpu_index=2"], "--cluster"),
        (["--cluster", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--cluster", CLUSTER, "--workers", "x=2"], "no known type"),
        (["--cluster", CLUSTER, "--price", "head=-1"], "0 or more is needed"),
    ],
)
def test_bad_options_are_told_in_one_line(job, call_vitrine, failed_line, options, words):
    assert words in failed_line(call_vitrine("plan", "-c", job, *options, "-q"))
