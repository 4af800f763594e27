"""Training: the real command on real Ray Train, kills by real signals, and the loop by itself."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from page_checks import check_page

from encoders.checkpoint import load_encoder
from encoders.checkpoint_files import fingerprint, read_checkpoint_config
from encoders.encoder import MsrEncoder, OpenClipEncoder
from jobs.config import JobConfig
from jobs.errors import ConfigError
from jobs.images import ImagesConfig
from jobs.train import make_start
from jobs.train_loop import BEST_FOLDER, TrainTask, train_loop

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def job(tmp_path, sample_catalog, tiny_towers):
    """Write a configuration and return its path; keyword arguments are of its train section."""

    def write(*, name="job", top=None, **train):
        section = {
            "pairs": str(sample_catalog / "pairs-train.parquet"),
            "validation": str(sample_catalog / "pairs-val.parquet"),
            "steps": 6,
            "batch_size": 8,
            "validate_every": 3,
        }
        config = {
            "store": str(tmp_path / "store"),
            "catalog": {"path": str(sample_catalog / "catalog.parquet")},
            "encoder": {"architecture": str(tiny_towers), "pretrained": "random"},
            "ray": {"object_store_mb": 128},
            "train": section | train,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(config | (top or {})))
        return path

    return write


def summary(done):
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)


def read_report(result):
    return json.loads(Path(result["report"]).with_suffix(".json").read_text(encoding="utf-8"))


def test_command_trains_reports_and_cleans_up(local_ray, job, tmp_path, call_vitrine):
    config = job(preset="mim4")
    result = summary(call_vitrine("train", tmp_path / "new" / "out", "--config", config, "--json"))
    assert (result["preset"], result["pairs"], result["steps"]) == ("mim4", 40, 6)
    assert result["bad_pictures"] == 0
    assert result["fingerprint"] == fingerprint(tmp_path / "new" / "out")
    encoder = load_encoder(tmp_path / "new" / "out")
    assert isinstance(encoder, OpenClipEncoder)
    report = read_report(result)
    assert [one["step"] for one in report["steps"]] == list(range(1, 7))
    assert [one["step"] for one in report["validations"]] == [0, 3, 6]
    best = max(report["validations"], key=lambda one: one["score"])
    assert (report["best_step"], result["validation"]) == (best["step"], best["figures"])
    assert report["fingerprint"] == result["fingerprint"]
    assert encoder.fusion.image_weight == best["fusion"]["image_weight"]
    assert report["config"]["train"]["preset"] == "mim4"
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert page.count("<svg ") == 3
    assert check_page(page).sections == ["quality", "curves", "time", "configuration"]
    assert set(report["seconds"]) == {"steps", "waiting for batches", "validation"}
    spans = {one["stage"]: one["seconds"] for one in report["time"]["spans"]}
    assert 0 < sum(report["seconds"].values()) < spans["train mim4 in 1 process"]
    assert (Path(result["report"]).parent / "trace.json").exists()
    assert list((tmp_path / "store" / "training").iterdir()) == []
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "out"]
    left = [name for name in os.listdir(tmp_path / "store") if name not in ("checkpoints", "runs")]
    assert left == ["training"]


def test_two_workers_train_as_one_and_tell_people(local_ray, job, loop, tmp_path, call_vitrine):
    options = {"steps": 3, "validation": None, "validate_every": None}
    config = job(workers=2, **options)
    done = call_vitrine("train", tmp_path / "out", "--config", config)
    assert done.returncode == 0, done.stderr
    assert "best_step: 3" in done.stdout
    assert "train mim3 in 2 processes" in done.stderr
    assert re.search(r"3 of 3 steps, .*loss \d", done.stderr)
    report = re.search(r"report: (\S+)", done.stdout)[1]
    one, _ = loop.run(**options)
    for two, alone in zip(read_report({"report": report})["steps"], one.steps, strict=True):
        assert two["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert two["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-2)


def test_error_of_a_worker_is_one_line(
    local_ray, job, tmp_path, sample_catalog, call_vitrine, failed_line
):
    rows = pq.read_table(sample_catalog / "pairs-train.parquet").to_pylist()
    gone = [row | {"query_image_uri": "gone.jpg"} for row in rows]
    pq.write_table(pa.Table.from_pylist(gone), tmp_path / "gone.parquet")
    config = job(pairs=str(tmp_path / "gone.parquet"), validation=None)
    line = failed_line(call_vitrine("train", tmp_path / "o", "--quiet", "--config", config))
    assert "train.pairs: 40 pairs in a row can't be used: 41 not_found (such as" in line
    assert not (tmp_path / "o").exists()


def test_more_workers_than_the_machine_has(local_ray, job, tmp_path, call_vitrine, failed_line):
    config = job(workers=8 * (os.cpu_count() or 1), batch_size=8 * (os.cpu_count() or 1))
    line = failed_line(call_vitrine("train", tmp_path / "o", "--quiet", "--config", config))
    assert re.search(r"train.workers is \d+, this machine has \d+ [CG]PUs", line)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"pairs": "/nowhere.parquet"}, "train.pairs /nowhere.parquet can't be read"),
        ({"validation": "/nowhere.parquet"}, "train.validation /nowhere.parquet can't be read"),
        ({"preset": "mim5"}, "train.preset: Input should be 'image_only'"),
        ({"batch_size": 41}, "train.pairs has 40 pairs, fewer than train.batch_size 41"),
        ({"batch_size": 8, "workers": 3}, "does not divide by 3 workers"),
        ({"preset": "image_only", "lock": "image"}, "image_only trains the image tower"),
        ({"warmup_steps": 7}, "warmup_steps is 7, expected 0 to 6"),
        ({"init_from": "/nowhere"}, "/nowhere/encoder.json: no such file"),
        ({"preset": "msr4"}, "msr4 needs train.text_encoder"),
        ({"preset": "msr3", "pairs": "PAIRS"}, "has no column product_text: msr3"),
        ({"text_encoder": {"pretrained": "random"}}, "train.text_encoder is of msr4, not of mim3"),
    ],
)
def test_what_is_wrong_is_said_before_workers_start(
    job, tmp_path, sample_catalog, call_vitrine, failed_line, train, words
):
    table = pq.read_table(sample_catalog / "pairs-train.parquet").drop(["product_text"])
    pq.write_table(table, tmp_path / "pairs.parquet")
    values = {k: str(tmp_path / "pairs.parquet") if v == "PAIRS" else v for k, v in train.items()}
    started = time.monotonic()
    done = call_vitrine("train", tmp_path / "o", "--quiet", "--config", job(**values))
    assert words in failed_line(done)
    assert time.monotonic() - started < 10
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "store" / "training").exists()


def test_no_section_and_destinations_that_cannot_be(job, tmp_path, call_vitrine, failed_line):
    bare = job(name="bare", top={"train": None})
    assert "no train section" in failed_line(call_vitrine("train", tmp_path / "o", "-c", bare))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for name, words in (
        ("full", "full is not empty; name a new or empty folder"),
        ("full/x", "is a file"),
        ("full/x/y", "can't be made"),
    ):
        assert words in failed_line(call_vitrine("train", tmp_path / name, "-c", job()))
    nowhere = job(name="nowhere", top={"store": str(tmp_path / "full" / "x")})
    line = failed_line(call_vitrine("train", tmp_path / "o", "--quiet", "-c", nowhere))
    assert "full/x/training/" in line
    assert "can't be written" in line


def start_and_kill(command, store, folder):
    """Start a run, and kill it and all of its Ray after its first validation past the start."""
    with (folder / "killed.log").open("wb") as log:
        driver = subprocess.Popen(
            command, cwd=REPOSITORY, start_new_session=True, stdout=log, stderr=log
        )
    deadline = time.monotonic() + 240
    while reached(store) < 8:
        assert driver.poll() is None, (folder / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes = [driver.pid, *descendants(driver.pid)]
    names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes]
    assert any(b"raylet" in name for name in names)
    assert any(b"gcs_server" in name for name in names)
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    driver.wait()


def reached(store):
    """The last step that the newest snapshot of the run would go on from."""
    steps = [0]
    for path in store.glob("training/train-*/checkpoint_manager_snapshot.json"):
        text = path.read_text()
        for name in re.findall(r"checkpoint_[\w.-]+", text):
            history = path.parent / name / "history.json"
            with contextlib.suppress(FileNotFoundError, ValueError):
                steps.append(len(json.loads(history.read_text())["steps"]))
    return max(steps)


def descendants(pid):
    """All processes below one, from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def cores():
    """Threads that the only worker of a local run has."""
    return max(2, os.cpu_count() or 2)


class Loop:
    """Run the loop in this process, without Ray."""

    def __init__(self, folder, sample, tiny):
        self.folder, self.sample, self.tiny, self.runs = folder, sample, tiny, 0

    def configure(self, **train):
        section = {
            "pairs": str(self.sample / "pairs-train.parquet"),
            "validation": str(self.sample / "pairs-val.parquet"),
            "steps": 4,
            "batch_size": 8,
            "validate_every": 2,
        }
        encoder = {"architecture": str(self.tiny), "pretrained": "random"}
        values = {"store": "s", "catalog": {"path": "c"}, "encoder": encoder}
        return JobConfig.model_validate(values | {"train": section | train})

    def run(self, *, resume=None, threads=1, **train):
        """Return the history, and the folders that were reported."""
        self.runs += 1
        folder = self.folder / str(self.runs)
        config = self.configure(**train)
        make_start(config, config.train, folder / "start")
        task = TrainTask(
            config=config.train, images=ImagesConfig(), start=str(folder / "start"), threads=threads
        )
        kept = []

        def report(figures, reported):
            kept.append(folder / f"kept-{figures['step']}")
            shutil.copytree(reported, kept[-1])

        return train_loop(task, report, resume=resume), kept


@pytest.fixture
def loop(tmp_path, sample_catalog, tiny_towers):
    return Loop(tmp_path, sample_catalog, tiny_towers)


def test_seed_and_augmentation_decide_the_result(loop):
    runs = [{}, {}, {"seed": 1}, {"augment": False}]
    prints = [loop.run(validation=None, **options)[0].fingerprint for options in runs]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_run_without_validation_keeps_its_last_step(loop):
    history, kept = loop.run(validation=None)
    assert [folder.name for folder in kept] == ["kept-2", "kept-4"]
    assert (history.best_step, history.validations) == (4, [])
    assert history.fingerprint == fingerprint(kept[-1] / BEST_FOLDER)


def test_start_is_kept_where_training_makes_it_worse(loop):
    good, kept = loop.run(steps=60, validate_every=20, learning_rate=3e-3, preset="mim3")
    assert good.best_step > 0
    best = str(kept[-1] / BEST_FOLDER)
    history, kept = loop.run(init_from=best, learning_rate=10.0, warmup_steps=0)
    assert history.best_step == 0
    assert history.best_score == tuple(good.best_score)
    encoder = load_encoder(kept[-1] / BEST_FOLDER)
    assert encoder.fingerprint == history.fingerprint


@pytest.mark.parametrize("preset", ["mim3", "msr3"])
def test_loop_goes_on_from_each_validation(loop, preset):
    whole, kept = loop.run(preset=preset, steps=5)
    assert [folder.name for folder in kept] == ["kept-0", "kept-2", "kept-4", "kept-5"]
    for folder, reports in zip(kept, (3, 2, 1, 0), strict=True):
        again, more = loop.run(preset=preset, steps=5, resume=folder)
        unlike_clocks = {"seconds": {}}
        assert json.dumps(asdict(again) | unlike_clocks) == json.dumps(
            asdict(whole) | unlike_clocks
        )
        assert again.seconds.keys() == whole.seconds.keys()  # of the parts before the kill, too
        assert len(more) == reports


@pytest.mark.parametrize("fusion", ["mlp", "concat", "alpha_concat"])
def test_msr3(loop, fusion):
    history, kept = loop.run(preset="msr3", fusion=fusion, image_weight=0.3)
    encoder = load_encoder(kept[-1] / BEST_FOLDER)
    assert isinstance(encoder, MsrEncoder)
    assert encoder.fusion.kind == fusion
    assert {one["kind"] for one in history.validations} == {"text to multimodal"}
    assert set(history.steps[0]["terms"]) == {"query-product"}


def test_msr4_from_another_encoders_text_tower(loop):
    text_encoder = {"architecture": str(loop.tiny), "pretrained": "random", "seed": 5}
    history, kept = loop.run(preset="msr4", text_encoder=text_encoder)
    best = kept[-1] / BEST_FOLDER
    assert read_checkpoint_config(best).text_config is not None
    assert load_encoder(best).dim == 64
    again, _ = loop.run(preset="msr4", init_from=str(best))
    assert (
        again.validations[0]["figures"]
        == max(history.validations, key=lambda one: one["score"])["figures"]
    )


def test_msr_checkpoint_takes_the_new_share_of_the_image(loop, tmp_path):
    options = {"preset": "msr3", "fusion": "alpha_concat", "validation": None}
    _, kept = loop.run(image_weight=0.3, **options)
    config = loop.configure(init_from=str(kept[-1] / BEST_FOLDER), image_weight=0.8, **options)
    make_start(config, config.train, tmp_path / "next")
    assert read_checkpoint_config(tmp_path / "next").fusion.image_weight == 0.8


def test_mim4_starts_from_mim3(loop, tmp_path):
    first, kept = loop.run(preset="mim3")
    best = kept[-1] / BEST_FOLDER
    config = loop.configure(preset="mim4", init_from=str(best))
    assert make_start(config, config.train, tmp_path / "start") == first.fingerprint
    second, _ = loop.run(preset="mim4", init_from=str(best))
    assert second.validations[0]["score"] == first.best_score
    assert len(second.steps[0]["terms"]) == 6


@pytest.mark.parametrize("lock", ["image", "text"])
def test_locked_tower_stays_as_it_is(loop, lock):
    _, kept = loop.run(lock=lock, validation=None)
    start = load_encoder(kept[0].parent / "start")
    end = load_encoder(kept[-1] / BEST_FOLDER)
    changed = {
        name.startswith("visual.")
        for name, tensor in end._model.state_dict().items()
        if (tensor != start._model.state_dict()[name]).any() and "logit" not in name
    }
    assert changed == {lock == "text"}


def test_accumulation_is_the_same_training(loop):
    one, _ = loop.run(validation=None)
    two, _ = loop.run(validation=None, accumulate=4)
    assert [s["loss"] for s in two.steps] == pytest.approx([s["loss"] for s in one.steps], abs=1e-4)


def test_encoder_and_preset_of_two_kinds(loop):
    _, kept = loop.run(preset="msr3", validation=None)
    with pytest.raises(ConfigError, match="an msr encoder can't be trained as mim3"):
        loop.run(preset="mim3", init_from=str(kept[-1] / BEST_FOLDER))


def test_killed_run_goes_on_and_ends_as_if_nothing_had_happened(job, loop, tmp_path, run_vitrine):
    options = {"steps": 24, "validate_every": 4, "preset": "mim3"}
    config = job(name="killed", top={"store": str(tmp_path / "other")}, **options)
    command = ["train", str(tmp_path / "out"), "--json", "--config", str(config)]
    start_and_kill([sys.executable, "-m", "jobs", *command], tmp_path / "other", tmp_path)
    assert not (tmp_path / "out").exists()
    first = reached(tmp_path / "other")
    assert 8 <= first < 24
    done = run_vitrine(*command)
    result = summary(done)
    went_on = re.search(r"a run was stopped: going on from step (\d+)", done.stderr)
    assert went_on, done.stderr
    assert first <= int(went_on[1]) < 24
    whole, _ = loop.run(threads=cores(), **options)
    assert result["fingerprint"] == whole.fingerprint
    report, expected = read_report(result), json.loads(json.dumps(asdict(whole)))
    assert [one["step"] for one in report["steps"]] == list(range(1, 25))
    assert report["steps"] == expected["steps"]
    assert report["validations"] == expected["validations"]
    assert list((tmp_path / "other" / "training").iterdir()) == []
