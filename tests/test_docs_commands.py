"""Every command in the pages runs, prints what they show, and writes what they describe.

`tests/pages.py` runs a page; what it can't run is counted here, so that none is left out silently.
"""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pages import Page, read_page, run_page, shown_commands
from s3_server import S3Server

ROOT = Path(__file__).resolve().parent.parent
IN_PROCESS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/tutorial.md",
    "docs/why-delta.md",
    "docs/how-to/own-model.md",
    "docs/how-to/several-images.md",
    "docs/how-to/change-encoder.md",
    "docs/how-to/roll-back.md",
    "docs/how-to/tune-index.md",
)
ON_S3 = "docs/how-to/s3.md"
NOT_RUN = {
    "README.md": ["make demo", "make test", "vitrine demo -c demo.yaml --compare 2"],
    "CONTRIBUTING.md": ["make check", "make test", "make chaos"],
}
"""What no test runs: CI runs two targets of make, people the others."""
ELSEWHERE = {
    "docs/cli.md": "generated; tests/test_docs.py checks its options",
    "docs/demo-page.md": "tests/test_jobs_demo.py serves the page, tests/test_docs.py its options",
    "docs/plan.md": "tests/test_docs.py checks its options, tests/test_jobs_plan.py runs it",
}
"""Pages whose commands are not run from the page, and what does."""


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """Run a page once, in a folder of its own; return the folder."""
    visited = {}

    def run(name, **settings):
        if name not in visited:
            folder = tmp_path_factory.mktemp(Path(name).stem)
            page = Page(name=name, folder=folder.resolve(), **settings)
            run_page(page)
            shown = [re.split(r"\s+#", command)[0] for command in page.not_run]
            assert shown == NOT_RUN.get(name, [])
            visited[name] = page.folder
        return visited[name]

    return run


@pytest.mark.parametrize("name", IN_PROCESS)
def test_commands_of_page(visit, local_ray, name):
    visit(name)


def test_commands_on_s3(visit, tmp_path_factory):
    with S3Server(tmp_path_factory.mktemp("s3-pages")) as server:
        visit(ON_S3, environment=server.environment, in_process=False)


def test_no_page_with_commands_is_forgotten():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    names = [str(path.relative_to(ROOT)) for path in pages]
    assert {name for name in names if shown_commands(name)} <= {*IN_PROCESS, ON_S3, *ELSEWHERE}


# The files that docs/manifests.md and docs/tables.md describe, of the stores that pages made


def described(title):
    """The keys that a section of docs/manifests.md lists."""
    page = read_page("docs/manifests.md")
    section = re.split(r"^#+ ", page.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)
    cells = re.findall(r"^\| (`.+?`) \|", section[0], re.MULTILINE)
    keys = [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    assert keys, title
    assert len(keys) == len(set(keys))
    return set(keys)


def check_keys(title, objects):
    """The objects together have the section's keys, and none has another."""
    objects = list(objects)
    assert objects, title
    assert set().union(*objects) == described(title), title


def read_all(folder, pattern):
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]
    assert found, pattern
    return found


def named(values, key):
    return [value[key] for value in values]


@pytest.fixture(scope="module")
def stores(visit, local_ray):
    """The folders of pages whose stores together have every kind of file."""
    return [visit("README.md"), visit("docs/how-to/tune-index.md")]


def test_release_manifests_are_described(stores):
    manifests = [m for s in stores for m in read_all(s, "store*/indexes/*/manifest.json")]
    fields = [field for one in manifests for field in one["fields"].values()]
    partitions = [part for one in fields for part in one["partitions"]]
    refines = [one for one in named(partitions, "refine") if one]
    files = [*named(fields, "template"), *named(partitions, "codes"), *refines]
    queries = named(manifests, "query")
    check_keys("Release manifest", manifests)
    check_keys("A field", fields)
    check_keys("A partition", partitions)
    check_keys("A file", [*files, *named(manifests, "ids"), *named(manifests, "rows")])
    check_keys("`spec`", named(fields, "spec"))
    check_keys("`point`", named(fields, "point"))
    check_keys("`trained`", named(fields, "trained"))
    check_keys("`curve`", [point for one in fields for point in one["curve"]])
    check_keys("`measured`", named(fields, "measured"))
    check_keys("`query`", queries)
    check_keys("A canary", [canary for one in queries for canary in one["canaries"]])


def test_checkpoints_are_described(stores):
    checkpoints = [one for s in stores for one in read_all(s, "store*/checkpoints/*/encoder.json")]
    check_keys("Checkpoint", checkpoints)
    check_keys("`preprocess`", named(checkpoints, "preprocess"))
    check_keys("`fusion`", named(checkpoints, "fusion"))


def test_exports_are_described(stores):
    (export,) = read_all(stores[0], "embeddings/_manifest.json")
    check_keys("Export manifest", [export])
    check_keys("A field of an export", export["fields"].values())
    check_keys("A file of an export", [*export["files"], *export["serving"]["files"]])
    check_keys("`serving`", [export["serving"]])


def test_reports_are_described(stores):
    reports = [one for folder in stores for one in read_all(folder, "store*/runs/*/report.json")]
    check_keys("Report of a refresh or reindex", [one for one in reports if "quality" in one])
    check_keys("Report of an evaluation", [one for one in reports if "metrics" in one])
    check_keys("Report of a training", [one for one in reports if "validations" in one])
    kinds = [one for one in reports if {"quality", "metrics", "validations"} & set(one)]
    assert len(kinds) == len(reports)


@pytest.mark.parametrize(
    ("title", "pattern"),
    [
        ("Embeddings", "store-trained/embeddings/*.parquet"),
        ("Releases", "store-trained/releases/*.parquet"),
        ("ids.parquet", "store-trained/indexes/*/ids.parquet"),
        ("rows.parquet", "store-trained/indexes/*/rows.parquet"),
        ("Rejects of import-csv", "shop/rejects.parquet"),
    ],
)
def test_tables_are_described(stores, title, pattern):
    section = read_page("docs/tables.md").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    names = re.findall(r"^\| `(\w+)` \| `", section, re.MULTILINE)
    paths = sorted(stores[0].glob(pattern))
    assert paths
    assert all(pq.read_schema(path).names == names for path in paths)
