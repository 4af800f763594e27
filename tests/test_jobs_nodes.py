"""Refreshes on a cluster of several nodes that share no disk: whole, killed, cut off."""

import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from fault_proxy import FaultProxy
from index_codes import codes_by_id
from nodes import RAY, REPOSITORY, Cluster, can_hide
from s3_server import BUCKET, S3Server

from jobs.storage import PATIENCE_VARIABLE

PRODUCTS = 80
PATIENCE_S = 5
SLOW_TOWERS = {  # some 20 ms an image on one core, so that what happens meets the embedding
    "embed_dim": 32,
    "vision_cfg": {
        "layers": 4, "width": 192, "head_width": 32, "patch_size": 8, "image_size": 96,
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1,
    },
}  # fmt: skip


# Some work on one machine, as a run's: begun again without it, wherever the machine is then.
WORK = """
import json, sys, time
from pathlib import Path
import ray
from jobs.cluster import ray_session
from jobs.nodes import live_nodes
from jobs.tasks import gather
from jobs.config import RayConfig
from jobs.machines import without_cut_off
from jobs.storage import open_filesystem, storage_errors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

host, address, mark, tries, reasons = *sys.argv[1:], [], []

@ray.remote(num_cpus=0, max_retries=0)
def read_and_wait():
    with storage_errors(address, "read"):
        open_filesystem(address)[0].cat_file(address)
    Path(mark).touch()
    time.sleep(300)

def find():
    return [one["NodeID"] for one in live_nodes() if one["NodeManagerAddress"] == host]

def work():
    tries.append(time.monotonic())
    Path(mark + ".begun").touch()
    while len(tries) == 1 and not find():
        time.sleep(0.2)
    for node in find():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        gather([read_and_wait.options(scheduling_strategy=there).remote()])

with ray_session(RayConfig(address="auto")):
    without_cut_off(work, [address], reasons.append)
print(json.dumps([len(tries), reasons]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An S3 server whose bucket holds a catalog."""
    from jobs.sample import write_sample

    folder = tmp_path_factory.mktemp("nodes-sample") / "catalog"
    write_sample(folder, products=PRODUCTS, seed=5, street_per_product=1, image_px=96)
    with S3Server(tmp_path_factory.mktemp("nodes")) as server:
        server.files.put(str(folder) + os.sep, f"{BUCKET}/catalog/", recursive=True)
        yield server


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes-job")
    (folder / "towers.json").write_text(json.dumps(SLOW_TOWERS))
    job = {
        "store": f"s3://{BUCKET}/none",
        "catalog": {"path": f"s3://{BUCKET}/catalog/catalog.parquet"},
        "encoder": {"architecture": str(folder / "towers.json"), "pretrained": "random"},
        "embed": {
            "fields": ["image"], "batch_size": 8, "rows_per_file": 8, "commit_interval_s": 1,
        },
        "ray": {"object_store_mb": 100},
    }  # fmt: skip
    (folder / "job.yaml").write_text(json.dumps(job))
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def expected(server, config, run_vitrine):
    """What a refresh on the one local node publishes."""
    done = run_vitrine(
        "refresh", "-c", config, "--quiet", "--json", "--set", f"store=s3://{BUCKET}/local",
        env=server.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return published(server, "local")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    """A folder that the second worker does not see; None where that can't be arranged."""
    return tmp_path_factory.mktemp("nodes-hidden") if can_hide() else None


@pytest.fixture(scope="module")
def cluster(server, hidden):
    """A head without CPUs and two workers of one each."""
    patience = {PATIENCE_VARIABLE: str(PATIENCE_S)}
    with (
        tempfile.TemporaryDirectory(prefix="vn") as folder,  # short: of sockets
        Cluster(Path(folder), server.environment | patience) as cluster,
    ):
        cluster.add()
        cluster.add(hidden=hidden)
        cluster.wait()
        yield cluster


@pytest.fixture(autouse=True)
def no_command_left(cluster):
    """A run that did not end in time would meddle with the next test's machines.

    What was submitted goes on: its process here only follows it.
    """
    yield
    cluster.end_commands()


def command_line(config, store, *more):
    return [
        sys.executable, "-m", "jobs", "refresh", "-c", str(config), "--quiet", "--json",
        "--set", f"store=s3://{BUCKET}/{store}", "--set", "ray.address=auto", *more,
    ]  # fmt: skip


def submit(cluster, command):
    """Run a command by `ray job submit`, on the head; return its exit status and what was told."""
    job = [RAY, "job", "submit", "--address", cluster.dashboard, "--", "env", "-C", str(REPOSITORY)]
    process = cluster.run([*job, *command])
    out, err = process.communicate(timeout=200)
    return process.returncode, out + err


def tables(server, store, folder):
    paths = [p for p in server.files.find(f"{BUCKET}/{store}/{folder}") if p.endswith(".parquet")]
    return [pq.read_table(io.BytesIO(server.files.cat_file(path))) for path in paths]


def published(server, store):
    """What a store's one release serves: counts, ids, vectors, index codes."""
    (release,) = [row for table in tables(server, store, "releases") for row in table.to_pylist()]
    address = f"{BUCKET}/{store}/indexes/{release['indexes']}"
    manifest = json.loads(server.files.cat_file(f"{address}/manifest.json"))
    ids = pq.read_table(io.BytesIO(server.files.cat_file(f"{address}/{manifest['ids']['file']}")))
    rows = [row for table in tables(server, store, "embeddings") for row in table.to_pylist()]
    rows.sort(key=lambda row: row["generation"])
    codes = server.files.cat_file(f"{address}/image.faiss")
    return {
        "counts": {name: release[name] for name in ("products", "rows", "vectors", "rejected")},
        "ids": ids.to_pylist(),
        "vectors": {row["vector_id"]: row["image_embedding"] for row in rows},
        "codes": codes_by_id(faiss.deserialize_index(np.frombuffer(codes, np.uint8))),
    }


def cached(node):
    """Whether a process of a node has fetched the encoder to the node's own folder."""
    return any(node.folder.glob("vitrine-cache-*/checkpoints/*/*"))


def count(server, store, names):
    """How many files of a store have such names."""
    return len(server.files.glob(f"{BUCKET}/{store}/{names}"))


def embedding(server, store):
    """Whether the embedding is under way."""
    return count(server, store, "embeddings/generation-*.parquet") >= 3


def building(server, store):
    """Whether a template is trained."""
    return count(server, store, "partials/*/record.json") >= 1


def act(process, *steps, timeout_s=150):
    """While a process runs, wait for each condition and do what belongs to it; say if all was."""
    for condition, action in steps:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        action()
    return process.poll() is None


def test_local_store_that_a_node_does_not_see_is_one_line(cluster, config, hidden):
    if hidden is None:
        pytest.skip("no folder can be hidden from a process here: that takes root")
    command = command_line(config, "none", "--set", f"store={hidden}")
    process = cluster.run(command)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    (line,) = err.splitlines()
    assert line.startswith(f"vitrine: error: {hidden}/runs/")
    assert f"({cluster.workers[1].host})" in line


def test_submitted_job_works_on_all_nodes_and_makes_what_one_node_makes(
    cluster, server, config, expected
):
    status, told = submit(cluster, command_line(config, "nodes"))
    assert status == 0, told
    assert "succeeded" in told
    assert f'"embedded": {PRODUCTS}' in told
    assert all(cached(node) for node in cluster.workers)
    assert published(server, "nodes") == expected


def test_submitted_job_that_fails_says_so(cluster, config):
    status, told = submit(cluster, command_line(config, "none", "--set", "catalog.path=s3://no/x"))
    assert status == 1, told
    assert "vitrine: error: " in told
    assert "Traceback" not in told


def test_workers_killed_while_embedding_and_while_building(cluster, server, config, expected):
    process = cluster.run(command_line(config, "killed"))
    first, second = cluster.workers

    def replace():
        cluster.kill(second)
        cluster.add()

    assert act(
        process,
        (lambda: embedding(server, "killed"), replace),
        (lambda: building(server, "killed"), lambda: cluster.kill(first)),
    ), process.communicate(timeout=100)[1][-3000:]
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    assert json.loads(out)["published"] is True  # one object, whatever Ray tells of the dead
    assert published(server, "killed") == expected


def start_work(cluster, host, mark):
    """Start `WORK` on a machine that is there or will be."""
    address = f"s3://{BUCKET}/catalog/catalog.parquet"
    return cluster.run([sys.executable, "-c", WORK, host, address, str(mark)])


def test_machine_that_joined_later_is_missed(cluster, tmp_path):
    mark = tmp_path / "mark"
    process = start_work(cluster, cluster.next_host, mark)
    assert act(
        process,
        (mark.with_suffix(".begun").exists, cluster.add),
        (mark.exists, lambda: cluster.kill(cluster.workers[-1])),
    ), process.communicate(timeout=100)[1][-3000:]
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err[-3000:]
    tries, (reason,) = json.loads(out.splitlines()[-1])
    assert tries == 2
    assert reason.startswith("a machine was lost: ")


def test_machine_that_the_store_refuses_gets_no_more_work(cluster, tmp_path):
    refused = cluster.add(AWS_SECRET_ACCESS_KEY="of another shop")
    cluster.wait()
    process = start_work(cluster, refused.host, tmp_path / "mark")
    out, err = process.communicate(timeout=100)
    cluster.kill(refused)
    assert process.returncode == 0, err[-3000:]
    tries, (reason,) = json.loads(out.splitlines()[-1])
    assert tries == 2
    assert ", refused on machine " in reason
    (line,) = [line for line in err.splitlines() if "gets no more work" in line]
    assert f"({refused.host})" in line


def test_node_that_the_store_does_not_answer_gets_no_more_work(cluster, server, config, expected):
    with FaultProxy(server.port) as proxy:
        cut = cluster.add(AWS_ENDPOINT_URL=proxy.endpoint)
        cluster.wait()
        process = cluster.run(command_line(config, "cut"))
        steps = (lambda: embedding(server, "cut") and cached(cut), proxy.down)
        assert act(process, steps), process.communicate(timeout=100)[1][-3000:]
        _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    lines = [line for line in err.splitlines() if "gets no more work" in line]
    assert len(lines) == 1, err
    assert f"({cut.host})" in lines[0]
    assert published(server, "cut") == expected
