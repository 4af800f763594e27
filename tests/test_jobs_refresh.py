"""The main job end to end: the real command line, real Ray, FAISS and Delta, a rendered catalog."""

import dataclasses
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from page_checks import check_page
from PIL import Image

from encoders.checkpoint import load_encoder
from jobs.config_file import read_config
from jobs.demo import DemoOptions, _open_releases
from jobs.progress import Progress

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"
PRODUCTS = 40
TINY = ("--set", "encoder.architecture=vitrine-tiny")
NO_GATE = ("--set", "gate.max_reject_share=1")
ODD_TEXTS = {
    "odd-emoji": "👩🏽‍🚀🧥 jacket 🏳️‍🌈",
    "odd-rtl": "\u202eמעיל אדום\u202c معطف",  # noqa: RUF001
    "odd-nul": "red\x00coat\x07",
    "odd-marks": "ẛ̣" + "\u0301" * 200 + "\ufeff\uffff\U0010ffff",
}


def write_job(path, store, catalog, **sections):
    """Write a configuration; JSON is YAML."""
    config = {
        "store": str(store),
        "catalog": {"path": str(catalog), "text": "{title}. {description}"},
        "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
        "ray": {"object_store_mb": 128},
    }
    path.write_text(json.dumps(config | sections))
    return path


def read_report(summary):
    return json.loads(Path(summary["report"]).with_suffix(".json").read_text(encoding="utf-8"))


def png_header(side_px):
    """A PNG of 60 bytes that says it is huge."""

    def chunk(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def write_bad_images(folder):
    folder.mkdir()
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 90).convert("RGB").save(buffer, "JPEG")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "truncated.jpg").write_bytes(buffer.getvalue()[:-5000])
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")
    (folder / "huge.png").write_bytes(png_header(60_000))
    (folder.parent.parent / "outside.jpg").write_bytes(buffer.getvalue())


def bad_rows(good):
    """Rows that must be rejected: (reason, row)."""
    images = {
        "missing_image": None,
        "not_found": "bad/nowhere.jpg",
        "empty_file": "bad/empty.jpg",
        "truncated": "bad/truncated.jpg",
        "not_an_image": "bad/page.jpg",
        "too_many_pixels": "bad/huge.png",
        "outside_catalog": "../outside.jpg",
        "http_not_allowed": "http://192.0.2.1/a.jpg",
        "bad_uri": "bad/a\x00b.jpg",
    }
    rows = [(reason, good | {"image_uri": uri}) for reason, uri in images.items()]
    rows.append(("empty_text", good | {"title": "", "description": None}))
    rows.append(("text_too_long", good | {"title": "long " * 2_000_000}))
    return [(reason, row | {"product_id": f"bad-{reason}"}) for reason, row in rows]


@dataclasses.dataclass
class Chain:
    """Four refreshes of one store, each in a fresh process; kept so that tests only look."""

    folder: Path
    config: Path
    rows: list
    changed: Path
    reasons: list
    done: dict = dataclasses.field(default_factory=dict)
    status: dict = dataclasses.field(default_factory=dict)

    def summary(self, name):
        assert self.done[name].returncode == 0, self.done[name].stderr
        return json.loads(self.done[name].stdout)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, sample_catalog, run_vitrine):
    folder = tmp_path_factory.mktemp("job")
    shutil.copytree(sample_catalog, folder / "catalog")
    first, changed = folder / "catalog" / "catalog.parquet", folder / "catalog" / "next.parquet"
    write_bad_images(folder / "catalog" / "bad")
    rows = pq.read_table(first).to_pylist()
    bad = bad_rows(rows[5])
    odd = [rows[6] | {"product_id": name, "title": text} for name, text in ODD_TEXTS.items()]
    kept = [rows[0] | {"title": "Something else"}, rows[1] | {"price": 1.5}, *rows[2:-1]]
    schema = pq.read_schema(first)
    pq.write_table(pa.Table.from_pylist([*kept, *(r for _, r in bad), *odd], schema), changed)
    config = write_job(
        folder / "job.yaml",
        folder / "store",
        first,
        embed={"fields": ["image", "text", "multimodal"]},
        evaluate={"queries": str(folder / "catalog" / "queries.parquet")},
    )
    chain = Chain(folder, config, rows, changed, [reason for reason, _ in bad])
    switch = ("--set", f"catalog.path={changed}")
    for name, options in (
        ("first", ()),
        ("again", ()),
        ("elsewhere", ("--set", f"store={folder / 'elsewhere'}", "--quiet")),
        ("gated", (*switch, "--set", "gate.max_reject_share=0", "--quiet")),
        ("changed", (*switch, *NO_GATE)),
    ):
        chain.done[name] = run_vitrine("refresh", "--config", config, "--json", *options)
        if name in ("first", "gated"):
            chain.status[name] = run_vitrine("status", "--config", config, "--json")
    return chain


@pytest.fixture(scope="module")
def first_release(chain):
    return ("--config", chain.config, "--release", "1", "--json")


def test_first_refresh_publishes_every_row(chain):
    summary = chain.summary("first")
    assert summary["published"] is True
    assert summary["release"] == 1
    assert summary["rows"] == summary["live"] + summary["rejected"] == PRODUCTS
    assert (summary["new"], summary["embedded"], summary["rejected"]) == (PRODUCTS, PRODUCTS, 0)


def test_standard_output_is_one_json_object(chain):
    assert len(chain.done["first"].stdout.splitlines()) == 1
    assert f"{PRODUCTS} of {PRODUCTS} rows" in chain.done["first"].stderr


def test_report_is_measured_and_self_contained(chain):
    summary = chain.summary("first")
    report, page = read_report(summary), Path(summary["report"]).read_text(encoding="utf-8")
    assert report["rows"] == report["vectors"] + report["rejected"] == PRODUCTS
    assert report["published"] is True
    assert report["rejects"] == []
    assert {index["field"] for index in report["indexes"]} == {"image", "text", "multimodal"}
    assert all(index["measured"]["intersection_at_10"] >= 0.8 for index in report["indexes"])
    assert all(index["why"] for index in report["indexes"])
    assert report["labelled"]["queries"] > 0
    assert {"embed", "embed: decode"} <= {stage["stage"] for stage in report["stages"]}
    images = check_page(page).images
    assert min(images["changes"], images["found"]) > 0


@pytest.mark.parametrize(
    ("overrides", "made"),
    [
        ([], False),
        (["embed.fields=[text,multimodal,image]"], False),
        (["encoder.seed=1"], True),
        (["embed.query_image_weight=0.4"], True),
    ],
)
def test_published_encoder_is_not_made_again(chain, overrides, made):
    assert find_encoder(chain.config, *overrides) is made


@pytest.mark.parametrize("damage", ["lost", "altered"])
def test_published_encoder_that_is_damaged_is_made_again(chain, tmp_path, damage):
    shutil.copytree(chain.folder / "store", tmp_path / "store")
    (checkpoint,) = (tmp_path / "store" / "checkpoints").iterdir()
    if damage == "lost":
        shutil.rmtree(checkpoint)
    else:
        weights = checkpoint / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert find_encoder(chain.config, f"store={tmp_path / 'store'}") is True


def find_encoder(config, *overrides):
    """Find the encoder and the contract as a refresh does; return whether torch was needed."""
    code = (
        "import sys; from pathlib import Path; from jobs.config_file import read_config\n"
        "from encoders.checkpoint_files import fingerprint\n"
        "from jobs.inputs import find_contract, made_encoder; from jobs.store import Store\n"
        "config = read_config(sys.argv[1], sys.argv[2:]); store = Store(config.store)\n"
        "with made_encoder(config, store) as (directory, space):\n"
        "    assert fingerprint(directory) == space.encoder\n"
        "    assert find_contract(store, directory, space)['encoder'] == space.encoder\n"
        "print('torch' in sys.modules)"
    )
    asked = [sys.executable, "-c", code, str(config), *overrides]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "True"


def test_manifest_counts_live_rows_by_precision(chain):
    """A run that the gate stopped has embedded what the next one publishes."""
    for name in ("first", "changed"):
        report, store = read_report(chain.summary(name)), chain.folder / "store"
        native = load_encoder(store / "checkpoints" / report["encoder"], device="cpu").precision
        manifest = json.loads((store / "indexes" / report["run"] / "manifest.json").read_text())
        assert manifest["query"]["bf16_cosine"] >= 0.999
        assert manifest["precisions"] == {native: report["vectors"]}
    assert read_report(chain.summary("first"))[f"rows_{native}"] == PRODUCTS
    assert chain.summary("changed")["embedded"] == 0


def test_report_and_status_agree(chain):
    summary = chain.summary("first")
    assert chain.status["first"].returncode == 0
    (release,) = json.loads(chain.status["first"].stdout)["releases"]
    report = read_report(summary)
    assert (release["version"], release["products"], release["rejected"]) == (1, PRODUCTS, 0)
    assert release["rows"] == release["vectors"] + release["rejected"]
    assert release["quality"] == report["quality"]
    assert release["config_hash"] == report["config_hash"]


def test_second_refresh_embeds_nothing(chain):
    summary = chain.summary("again")
    assert (summary["embedded"], summary["unchanged"]) == (0, PRODUCTS)
    assert (summary["new"], summary["changed"], summary["removed"]) == (0, 0, 0)
    assert (summary["release"], summary["published"]) == (1, False)  # there was nothing to do
    assert "Nothing to do" in Path(summary["report"]).read_text(encoding="utf-8")


def test_same_catalog_gives_the_same_indexes(chain):
    one, two = (read_report(chain.summary(name))["indexes"] for name in ("first", "elsewhere"))
    one, two = (
        [p["codes"]["sha256"] for i in built for p in i["partitions"]] for built in (one, two)
    )
    assert one == two


def test_failing_gate_publishes_nothing(chain, failed_line):
    line = failed_line(chain.done["gated"])
    assert "gate.max_reject_share" in line
    address = re.search(r"\(report: (\S+)\)", line).group(1)
    assert Path(address).is_file()
    releases = json.loads(chain.status["gated"].stdout)["releases"]
    assert [release["version"] for release in releases] == [1]
    report = read_report({"report": address})
    assert report["published"] is False
    assert report["release"] == 1
    assert report["gate_failures"]
    assert (report["changed"], report["removed"]) == (1, 1)
    assert report["new"] == len(chain.reasons) + len(ODD_TEXTS)
    assert report["embedded"] == len(ODD_TEXTS) + 1


def test_what_a_stopped_run_embedded_is_not_embedded_again(chain):
    summary = chain.summary("changed")
    assert summary["embedded"] == 0
    assert summary["published"] is True


def test_bad_rows_are_counted_by_reason_and_none_is_lost(chain):
    summary = chain.summary("changed")
    report = read_report(summary)
    assert {one["reason"]: one["rows"] for one in report["rejects"]} == dict.fromkeys(
        chain.reasons, 1
    )
    for one in report["rejects"]:
        (example,) = one["examples"]
        assert example["product_id"] == f"bad-{one['reason']}"
        assert example["detail"]
    assert summary["rejected"] == len(chain.reasons)
    assert summary["rows"] == summary["live"] + summary["rejected"]
    assert summary["live"] == PRODUCTS - 1 + len(ODD_TEXTS)
    text = check_page(Path(summary["report"]).read_text(encoding="utf-8")).texts["rejects"]
    assert all(f"bad-{reason}" in text for reason in chain.reasons)


def search(call, *args):
    done = call("search", *args)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == {"release", "results"}
    return answer["results"]


def test_search_in_a_fresh_process(chain, run_vitrine):
    row = chain.rows[7]
    image = chain.folder / "catalog" / row["image_uri"]
    done = run_vitrine(
        "search", "--config", chain.config, "--image", image, "--field", "image", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer["release"] == 2
    assert len(answer["results"]) == 10
    found = answer["results"][0]
    assert (found["product_id"], found["image_uri"]) == (row["product_id"], row["image_uri"])
    assert found["metadata"]["title"] == row["title"]
    assert found["score"] > 0.999


def test_each_kind_of_query_finds_its_own_product(chain, first_release, call_vitrine):
    row = chain.rows[3]
    image = ("--image", chain.folder / "catalog" / row["image_uri"])
    text = ("--text", f"{row['title']}. {row['description']}")
    for query, field in ((image, "image"), (text, "text"), ((*image, *text), "multimodal")):
        results = search(call_vitrine, *first_release, *query, "--field", field)
        assert results[0]["product_id"] == row["product_id"], field
        scores = [result["score"] for result in results]
        assert scores == sorted(scores, reverse=True)
        assert len({result["product_id"] for result in results}) == 10


def test_removed_product_is_found_no_more(chain, first_release, call_vitrine):
    row = chain.rows[-1]
    query = ("--image", chain.folder / "catalog" / row["image_uri"], "--field", "image", "-k", 100)
    before = search(call_vitrine, *first_release, *query)
    after = search(call_vitrine, "--config", chain.config, "--json", *query)
    assert row["product_id"] == before[0]["product_id"]
    assert len(before) == PRODUCTS
    found = {result["product_id"] for result in after}
    assert found == {r["product_id"] for r in chain.rows[:-1]} | set(ODD_TEXTS)


def test_metadata_is_tonights_and_changed_text_is_embedded(chain, call_vitrine):
    arguments = ("--config", chain.config, "--json")
    (priced,) = (
        r
        for r in search(call_vitrine, *arguments, "--text", "a", "-k", 100)
        if r["product_id"] == chain.rows[1]["product_id"]
    )
    assert priced["metadata"]["price"] == 1.5
    text = f"Something else. {chain.rows[0]['description']}"
    best = search(call_vitrine, *arguments, "--text", text, "--field", "text")[0]
    assert best["product_id"] == chain.rows[0]["product_id"]
    assert best["score"] > 0.999


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (("--image", "nowhere.jpg"), "query image"),
        (("--image", "pyproject.toml"), "query image"),
        (("--text", " "), "query text is empty"),
        (("--text", "a", "--field", "smell"), "no field 'smell'"),
        (("--text", "a", "--release", "99"), "no release 99"),
    ],
)
def test_query_that_cannot_be_used(chain, call_vitrine, failed_line, query, words):
    assert words in failed_line(call_vitrine("search", "--config", chain.config, *query))


def test_search_without_a_query_is_wrong_usage(chain, call_vitrine):
    assert call_vitrine("search", "--config", chain.config).returncode == 2


@pytest.mark.parametrize(
    "file",
    [
        "indexes/*/image.faiss",
        "indexes/*/ids.parquet",
        "indexes/*/manifest.json",
        "checkpoints/*/model.safetensors",
        "checkpoints/*/encoder.json",
    ],
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_file_is_refused(chain, tmp_path, call_vitrine, failed_line, file, damage):
    shutil.copytree(chain.folder / "store", tmp_path / "store")
    for path in (tmp_path / "store").glob(file):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x40
        if damage == "flipped":
            path.write_bytes(content)
        elif damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.unlink()
    line = failed_line(
        call_vitrine(
            "search",
            "--config",
            chain.config,
            "--set",
            f"store={tmp_path / 'store'}",
            "--text",
            "a",
        )
    )
    if damage == "gone":
        assert Path(file).name in line


def test_search_in_an_empty_store(chain, tmp_path, call_vitrine, failed_line):
    options = ("--config", chain.config, "--set", f"store={tmp_path / 'none'}")
    line = failed_line(call_vitrine("search", *options, "--text", "a"))
    assert "run `vitrine refresh` first" in line
    assert json.loads(call_vitrine("status", *options, "--json").stdout) == {"releases": []}


def write_catalog(path, **columns):
    good = {"product_id": ["a", "b"], "title": ["x", "y"], "description": ["x", "y"]}
    columns = good | {"image_uri": ["a.jpg", "b.jpg"]} | columns
    pq.write_table(pa.table({k: v for k, v in columns.items() if v is not None}), path)


@pytest.mark.parametrize(
    ("columns", "overrides", "words"),
    [
        ({"image_uri": None, "title": None}, (), ["'image_uri' is missing", "'title' is missing"]),
        ({"product_id": [1, 2]}, (), ["'product_id' is int64", "expected string"]),
        ({"title": []}, (), ["empty: 1 files, 0 rows"]),
        ({}, ("catalog.path=/nowhere/x.parquet",), ["/nowhere/x.parquet does not exist"]),
        ({}, ("catalog.text='{title'",), ["malformed"]),
        ({}, ("catalog.pth=x",), ["'catalog.pth'", "did you mean 'catalog.path'"]),
        ({}, ("embed.batch_size=no",), ["embed.batch_size"]),
        ({}, ("encoder.architecture=ViT-Z-99",), ["ViT-Z-99"]),
        ({}, ("encoder.pretrained=/nowhere.safetensors",), ["/nowhere.safetensors"]),
        ({}, ("encoder={checkpoint: /nowhere}",), ["/nowhere"]),
        ({}, ("encoder={architecture: ViT-B-32}",), ["pretrained: random"]),
        ({}, ("store=/dev/null/store",), ["/dev/null/store"]),
        ({}, ("index.factory=IVFfoo",), ["index.factory", "IVFfoo", "docs/indexes.md"]),
        ({}, ("index.factory='IVF4,PQ3'",), ["index.factory", "128"]),
    ],
)
def test_refresh_that_cannot_begin(tmp_path, call_vitrine, failed_line, columns, overrides, words):
    if columns.get("title") == []:
        names = ("product_id", "title", "description", "image_uri")
        columns = {name: pa.array([], pa.string()) for name in names}
    write_catalog(tmp_path / "c.parquet", **columns)
    job = write_job(tmp_path / "job.yaml", tmp_path / "store", tmp_path / "c.parquet")
    options = [part for one in overrides for part in ("--set", one)]
    line = failed_line(call_vitrine("refresh", "--config", job, "--quiet", *options))
    assert all(word in line for word in words), line


def test_weights_of_another_dimension(chain, tmp_path, call_vitrine, failed_line):
    from encoders.spec import DEMO_MODEL_CONFIG

    model = tmp_path / "narrow.json"
    model.write_text(json.dumps(DEMO_MODEL_CONFIG | {"embed_dim": 64}))
    (weights,) = (chain.folder / "store" / "checkpoints").glob("*/model.safetensors")
    encoder = f"encoder={{architecture: {model}, pretrained: {weights}}}"
    options = ("--config", chain.config, "--set", encoder, "--set", f"store={tmp_path / 's'}")
    line = failed_line(call_vitrine("refresh", "--quiet", *options))
    assert "encoder" in line


def test_checkpoint_whose_dimension_was_edited(chain, tmp_path, call_vitrine, failed_line):
    shutil.copytree(chain.folder / "store", tmp_path / "store")
    (path,) = (tmp_path / "store" / "checkpoints").glob("*/encoder.json")
    path.write_text(re.sub(r'("embed_dim":\s*)128', r"\g<1>64", path.read_text()))
    assert "64" in path.read_text()
    options = ("--config", chain.config, "--set", f"store={tmp_path / 'store'}")
    failed_line(call_vitrine("search", *options, "--text", "a"))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a", "b", "a"], ["more than once", "'a'"]),
        (["a", None, "c"], ["null product id", "row 1", "c.parquet"]),
    ],
)
def test_refresh_names_bad_ids(tmp_path, call_vitrine, failed_line, ids, words):
    columns = {name: ["x"] * 3 for name in ("title", "description", "image_uri")}
    write_catalog(tmp_path / "c.parquet", product_id=ids, **columns)
    job = write_job(tmp_path / "job.yaml", tmp_path / "store", tmp_path / "c.parquet")
    line = failed_line(call_vitrine("refresh", "--config", job, "--quiet"))
    assert all(word in line for word in words), line


@pytest.mark.usefixtures("local_ray")
def test_no_usable_row_publishes_nothing(tmp_path, call_vitrine, failed_line):
    write_catalog(tmp_path / "c.parquet")
    job = write_job(tmp_path / "job.yaml", tmp_path / "store", tmp_path / "c.parquet")
    line = failed_line(call_vitrine("refresh", "--config", job, "--quiet", *NO_GATE))
    assert "no row is live" in line


@pytest.mark.usefixtures("local_ray")
def test_tonights_release_is_seen_before_it_is_published(tmp_path, sample_catalog, call_vitrine):
    catalog = tmp_path / "catalog"
    shutil.copytree(sample_catalog, catalog)
    path = write_job(tmp_path / "job.yaml", tmp_path / "store", catalog / "catalog.parquet")

    def refresh(*options):
        done = call_vitrine("refresh", "--config", path, "--json", "--quiet", *options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    refresh()
    table = pq.read_table(catalog / "catalog.parquet")
    first, gone, *rest = table.to_pylist()
    changed = [first | {"title": "A title of tonight"}, *rest]
    pq.write_table(pa.Table.from_pylist(changed, table.schema), catalog / "catalog.parquet")
    candidate = refresh("--no-publish")
    assert (candidate["release"], candidate["published"]) == (1, False)
    assert (candidate["changed"], candidate["removed"], candidate["embedded"]) == (1, 1, 1)

    config = read_config(path)
    options = DemoOptions(compare=candidate["candidate"])
    newest, tonight = _open_releases(config, options, Progress(quiet=True))
    assert newest.searcher.encoder is tonight.searcher.encoder
    shown = []
    for one in (newest, tonight):
        found = one.searcher.search(text="a mug", k=100)
        shown.append({result.product_id: result.metadata["title"] for result in found})
    assert shown[0].pop(gone["product_id"]) == gone["title"]
    assert shown[1] == shown[0] | {first["product_id"]: "A title of tonight"}

    published = refresh()
    assert (published["release"], published["published"]) == (2, True)
    assert (published["embedded"], published["live"]) == (0, candidate["live"])


@pytest.mark.usefixtures("local_ray")
def test_text_that_is_no_utf8_ends_in_a_line_or_a_row(tmp_path, call_vitrine, failed_line):
    bad = pa.array([b"ok", b"caf\xe9"]).view(pa.string())
    write_catalog(tmp_path / "c.parquet", title=bad)
    job = write_job(
        tmp_path / "job.yaml",
        tmp_path / "store",
        tmp_path / "c.parquet",
        embed={"fields": ["text"]},
    )
    done = call_vitrine("refresh", "--config", job, "--quiet", "--json", *NO_GATE)
    if done.returncode:
        assert "c.parquet" in failed_line(done)
    else:
        assert json.loads(done.stdout)["rows"] == 2


@pytest.mark.usefixtures("local_ray")
def test_store_of_another_encoder_is_refused(chain, call_vitrine, failed_line):
    options = ("--config", chain.config, "--quiet", "--set", "encoder.seed=1")
    line = failed_line(call_vitrine("refresh", *options))
    assert "serves embeddings of encoder" in line
    assert "vitrine reindex" in line
    releases = json.loads(call_vitrine("status", "--config", chain.config, "--json").stdout)
    assert releases["releases"][0]["version"] == 2


@pytest.mark.usefixtures("local_ray")
def test_several_images_a_product_answer_with_products(chain, tmp_path, call_vitrine):
    """Three products of 3, 2 and 1 shop pictures, one of them broken: 6 rows, 5 live."""
    uris = [str(chain.folder / "catalog" / row["image_uri"]) for row in chain.rows[:5]]
    images = [uris[:3], [uris[3], "nowhere.jpg"], [uris[4]]]
    names = ["p", "q", "r"]
    write_catalog(
        tmp_path / "c.parquet", product_id=names, title=names, description=names, image_uri=images
    )
    job = write_job(tmp_path / "job.yaml", tmp_path / "store", tmp_path / "c.parquet")
    done = call_vitrine("refresh", "--config", job, "--quiet", "--json", *NO_GATE)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    counts = {name: summary[name] for name in ("rows", "live", "rejected", "products")}
    assert counts == {"rows": 6, "live": 5, "rejected": 1, "products": 3}
    for number, product in ((0, "p"), (2, "p"), (3, "q"), (4, "r")):
        query = ("--config", job, "--json", "--image", uris[number])
        results = search(call_vitrine, *query)
        assert [r["product_id"] for r in results[:1]] == [product]
        assert results[0]["image_uri"] == uris[number]
        assert sorted(r["product_id"] for r in results) == names
    by_text = search(call_vitrine, "--config", job, "--json", "--text", "q. q", "--field", "text")
    assert by_text[0]["product_id"] == "q"
    assert len(by_text) == 3


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("name", "products", "all_live"),
    [("grocery", 81, True), ("luma", 147, False), ("esci", 6764, False)],
)
def test_shared_data_by_the_configs_of_the_repository(
    tmp_path, monkeypatch, call_vitrine, name, products, all_live
):
    if not (SHARED / name).is_dir():
        pytest.skip(f"../shared/data/{name} is absent: the real catalog can't be tried")
    monkeypatch.chdir(REPOSITORY)
    config = REPOSITORY / "jobs" / "configs" / f"{name}.yaml"
    assert len(config.read_text().splitlines()) <= 15
    options = ("--set", f"store={tmp_path / 'store'}", *TINY, "--quiet", "--json")
    done = call_vitrine("refresh", "--config", config, *options)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["published"] is True
    assert summary["rows"] == summary["live"] + summary["rejected"] >= products
    assert 0.8 * products <= summary["products"] <= products
    if all_live:
        assert summary["live"] == products
