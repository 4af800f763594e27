"""Catalog and store on S3: a real SeaweedFS server on this machine, the real command line."""

import json
import os

import pytest
from s3_server import S3Server


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A running S3 server with an empty bucket: (file system, environment for a process)."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server.files, server.environment


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
