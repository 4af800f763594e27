"""Shared by the tests: a rendered catalog, and `vitrine` in a fresh process or in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before numpy and torch are loaded
    os.environ.setdefault(_name, "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_PRODUCTS = 40


# The smallest CLIP towers; without batch statistics, so that two workers compute what one does.
TINY_TOWERS = {
    "embed_dim": 32,
    "vision_cfg": {
        "layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32,
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_towers(tmp_path_factory):
    """The path of an architecture of tiny towers."""
    path = tmp_path_factory.mktemp("architecture") / "tiny.json"
    path.write_text(json.dumps(TINY_TOWERS))
    return path


@pytest.fixture(scope="session")
def sample_catalog(tmp_path_factory):
    """A folder with a sample of 40 products; copy it before changing anything in it."""
    from jobs.sample import write_sample

    folder = tmp_path_factory.mktemp("sample") / "catalog"
    write_sample(folder, products=SAMPLE_PRODUCTS, seed=3, street_per_product=1, image_px=96)
    return folder


@pytest.fixture(scope="session")
def local_ray():
    """One local Ray for all tests, and for what `call_vitrine` runs from then on.

    Its workers have the environment of its start: a test that changes what they read of it runs
    `run_vitrine`, whose Ray is its own.
    """
    import ray

    from jobs.cluster import connect
    from jobs.config import RayConfig

    # Not watched: tests that need another Ray end this one in between, and a watch that saw its
    # processes end would interrupt them all.
    connect(RayConfig(object_store_mb=128))
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def run_vitrine():
    """Run the real command line in a fresh process."""

    def run(*args, env=None) -> CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobs", *map(str, args)],
            cwd=REPOSITORY,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return run


@pytest.fixture
def call_vitrine(capsys, monkeypatch):
    """Run the command line's own `main` in this process: the same code, without the start-up."""
    from jobs.cli import main

    def call(*args) -> CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["vitrine", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return CompletedProcess(args, stop.value.code or 0, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def failed_line():
    """Check that a command failed as it must, and return its one line."""

    def check(done: CompletedProcess[str]) -> str:
        assert "Traceback" not in done.stderr + done.stdout
        assert done.returncode == 1, done
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("vitrine: error: ")
        return lines[0]

    return check


@pytest.fixture(scope="session")
def demo_shop(tmp_path_factory, tiny_towers, local_ray):
    """A trained shop of two releases and a candidate, for the page; nobody changes it."""
    from demo_shop import DemoShop

    return DemoShop(tmp_path_factory.mktemp("demo"), tiny_towers)
