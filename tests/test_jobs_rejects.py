"""The `rejects` command: real refreshes of a catalog with bad rows, night after night."""

import json
import shutil
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.config_file import read_config
from jobs.diff import Retry
from jobs.errors import GateError, JobError
from jobs.images import RejectReason
from jobs.progress import Progress
from jobs.refresh import refresh
from jobs.reject_rows import RejectQuery, select_rows
from jobs.rejects import json_parts, open_rejects, parse_reasons, print_rejects
from jobs.schemas import DELETE, REJECT, UPSERT
from jobs.state import OPERATIONS, REASONS, STATE_DTYPE

pytestmark = pytest.mark.usefixtures("local_ray")

CLOSED_PORT = "127.0.0.1:9"
ODD_NAME = "[red]\x1b[31modd"
RETRY = Retry(max_attempts=3, limits_hash=0, published_us=1_000_000)


def state(*rows):
    """Rows of the table: (vector id, generation, operation, reason or None, attempts, seen)."""
    made = np.zeros(len(rows), STATE_DTYPE)
    for place, (vector_id, generation, operation, reason, attempts, seen) in enumerate(rows):
        number = REASONS.index(RejectReason(reason)) + 1 if reason else 0
        made[place]["vector_id"], made[place]["generation"] = vector_id, generation
        made[place]["operation"], made[place]["reason"] = OPERATIONS[operation], number
        made[place]["attempts"], made[place]["first_seen"] = attempts, seen
        made[place]["written_at"], made[place]["row"] = 100 + generation, place
    return made


def test_the_newest_row_of_an_id_decides():
    rows = state(
        (1, 1, REJECT, "timeout", 1, 5),
        (1, 2, REJECT, "timeout", 2, 5),
        (2, 1, REJECT, "not_found", 1, 5),
        (2, 2, UPSERT, None, 0, 0),
        (3, 1, REJECT, "not_found", 1, 5),
        (3, 2, DELETE, None, 0, 0),
        (4, 2, REJECT, "truncated", 1, 9),
        (5, 1, UPSERT, "empty_text", 0, 0),
        (6, 1, UPSERT, None, 0, 0),
        (6, 2, REJECT, "timeout", 3, 6),
    )
    timeout, truncated = (REASONS.index(RejectReason(n)) + 1 for n in ("timeout", "truncated"))
    counts, listed = select_rows(rows[::-1], RejectQuery(), RETRY)
    assert counts[REJECT] == {(timeout, True): 1, (timeout, False): 1, (truncated, False): 1}
    assert counts[UPSERT].total() == 1
    assert listed["vector_id"].tolist() == [4, 6, 1]
    assert listed["attempts"].tolist() == [1, 3, 2]
    assert listed["retry"].tolist() == [False, False, True]
    assert listed["written_at"].tolist() == [102] * 3
    counts, listed = select_rows(rows, RejectQuery(masked=True), RETRY)
    assert counts[REJECT].total() == 3
    assert listed["vector_id"].tolist() == [5]


def test_what_is_asked_for_is_counted_whole_and_listed_up_to_the_limit():
    rows = state(*((n, 1, REJECT, "timeout", 1, n) for n in range(1, 8)))
    counts, listed = select_rows(rows, RejectQuery(limit=3), RETRY)
    assert counts[REJECT].total() == 7
    assert listed["vector_id"].tolist() == [7, 6, 5]
    for query in (RejectQuery(kinds=("permanent",)), RejectQuery(reasons=(RejectReason.BAD_URI,))):
        counts, listed = select_rows(rows, query, RETRY)
        assert (counts[REJECT].total(), len(listed)) == (0, 0)
    counts, listed = select_rows(rows[:0], RejectQuery(), RETRY)
    assert (counts[REJECT].total(), len(listed)) == (0, 0)


def test_reason_that_does_not_exist():
    assert parse_reasons(["timeout", "bad_uri"]) == (RejectReason.TIMEOUT, RejectReason.BAD_URI)
    with pytest.raises(JobError, match=r"'time_out'.*did you mean 'timeout'"):
        parse_reasons(["time_out"])
    with pytest.raises(JobError, match="there are missing_image, "):
        parse_reasons(["qqqqq"])


class Shop:
    """A store that is refreshed night after night; kept so that tests only look."""

    def __init__(self, folder, sample, **sections):
        shutil.copytree(sample, folder / "catalog")
        self.file = folder / "catalog" / "catalog.parquet"
        self.rows = {row["product_id"]: row for row in pq.read_table(self.file).to_pylist()[:24]}
        self.schema = pq.read_schema(self.file)
        good = next(iter(self.rows.values()))
        for name, uri in (
            ("lost", "nowhere.jpg"),
            ("unreachable", f"http://{CLOSED_PORT}/a.jpg"),
            ("repaired", "late.jpg"),
            ("removed", "nowhere.jpg"),
            ("blank", None),
            (ODD_NAME, "<>.jpg"),
        ):
            self.rows[name] = good | {"product_id": name, "image_uri": uri}
        self.config = folder / "job.yaml"
        config = {
            "store": str(folder / "store"),
            "catalog": {"path": str(self.file), "text": "{title}. {description}"},
            "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
            "embed": {"fields": ["image"]},
            "images": {"http_hosts": [CLOSED_PORT], "retries": 0, "max_attempts": 3},
            "gate": {"max_reject_share": 1, "min_self_retrieval": 0},
            "ray": {"object_store_mb": 128},
        }
        self.config.write_text(json.dumps(config | sections))
        self.nights = {}

    def refresh(self, *overrides):
        pq.write_table(pa.Table.from_pylist(list(self.rows.values()), self.schema), self.file)
        return refresh(read_config(self.config, overrides), Progress(quiet=True))

    def list(self, *overrides, **query):
        with open_rejects(read_config(self.config, overrides), RejectQuery(**query)) as found:
            return json.loads("".join(json_parts(found)))


def by_product(listed, name="rejects"):
    return {row["product_id"]: row for row in listed[name]}


@pytest.fixture(scope="module")
def shop(tmp_path_factory, sample_catalog):
    shop = Shop(tmp_path_factory.mktemp("rejects"), sample_catalog)
    shop.nights["none"] = shop.list()
    with pytest.raises(GateError):
        shop.refresh("gate.max_reject_share=0")
    shop.nights["gated"] = shop.list()
    shop.refresh()
    shop.nights["first"] = shop.list()
    good = next(iter(shop.rows.values()))["image_uri"]
    shutil.copy(shop.file.parent / good, shop.file.parent / "late.jpg")
    shop.rows["repaired"] |= {"image_uri": good}
    del shop.rows["removed"]
    shop.refresh()
    shop.nights["second"] = shop.list()
    shop.rows.popitem()  # else there would be nothing to do
    shop.refresh()
    shop.nights["third"] = shop.list()
    return shop


def test_a_store_that_holds_nothing(shop, tmp_path, call_vitrine):
    assert shop.nights["none"] == {
        "release": None,
        "rows": None,
        "encoder": None,
        "rejected": 0,
        "by_reason": [],
        "masked": 0,
        "masked_by_reason": [],
        "rejects": [],
    }
    done = call_vitrine(
        "rejects", "--config", shop.config, "--set", f"store={tmp_path / 'nowhere'}"
    )
    assert (done.returncode, done.stdout) == (
        0,
        "nothing was embedded yet: run `vitrine refresh`\n",
    )
    assert not (tmp_path / "nowhere").exists()


def test_before_any_release_the_newest_rows_count(shop):
    found = shop.nights["gated"]
    assert (found["release"], found["rows"], found["rejected"]) == (None, None, 6)
    assert {one["share"] for one in found["by_reason"]} == {None}
    assert found["encoder"] == shop.nights["first"]["encoder"]


def test_each_reject_is_listed_with_its_reason(shop):
    found = shop.nights["first"]
    assert (found["release"], found["rows"], found["rejected"]) == (1, 30, 6)
    assert {row["product_id"]: row["reason"] for row in found["rejects"]} == {
        "lost": "not_found",
        "repaired": "not_found",
        "removed": "not_found",
        ODD_NAME: "not_found",
        "unreachable": "unreachable",
        "blank": "missing_image",
    }
    assert all(row["detail"] for row in found["rejects"])
    first, *_ = found["by_reason"]
    assert first == {
        "reason": "not_found",
        "kind": "permanent",
        "rows": 4,
        "share": 4 / 30,
        "retry": 0,
        "given_up": 0,
    }
    assert sum(one["rows"] for one in found["by_reason"]) == 6
    seen = [row["first_seen"] for row in found["rejects"]]
    assert seen == sorted(seen, reverse=True)
    assert all(datetime.fromisoformat(one).tzinfo for one in seen)


def test_a_passing_fault_is_tried_again_and_given_up(shop):
    rows = [by_product(shop.nights[n])["unreachable"] for n in ("gated", "first", "second")]
    assert [row["attempts"] for row in rows] == [1, 2, 3]
    assert [row["retry"] for row in rows] == [True, True, False]
    assert {row["kind"] for row in rows} == {"transient"}
    assert len({row["first_seen"] for row in rows}) == 1
    last = [row["last_seen"] for row in rows]
    assert last == sorted(set(last))
    assert by_product(shop.nights["third"])["unreachable"] == rows[-1]
    counts = {one["reason"]: one for one in shop.nights["third"]["by_reason"]}
    assert (counts["unreachable"]["retry"], counts["unreachable"]["given_up"]) == (0, 1)


def test_more_attempts_are_told_as_they_are_configured(shop):
    found = shop.list("images.max_attempts=5")
    assert by_product(found)["unreachable"]["retry"] is True


def test_a_lasting_fault_is_not_tried_again(shop):
    gated, first, second = (
        by_product(shop.nights[n])["lost"] for n in ("gated", "first", "second")
    )
    assert first == second
    # Of a run that published nothing, a missing picture may be a missing mount: tried once more.
    assert (gated["attempts"], gated["retry"]) == (1, True)
    assert (first["attempts"], first["retry"]) == (2, False)
    assert gated["first_seen"] == first["first_seen"] < first["last_seen"]


def test_what_was_repaired_or_removed_is_gone(shop):
    assert {"repaired", "removed"} <= set(by_product(shop.nights["first"]))
    found = shop.nights["second"]
    assert set(by_product(found)) == {"lost", "unreachable", "blank", ODD_NAME}
    assert found["rejected"] == 4


def test_many_buckets_and_small_blocks_list_the_same(shop, monkeypatch):
    monkeypatch.setattr("jobs.reject_rows.BLOCK_ROWS", 1)
    monkeypatch.setattr("jobs.reject_rows.PAGE_ROWS", 2)
    assert shop.list("ray.bucket_rows=4", limit=0) == shop.nights["third"]


def test_filters_and_limit_on_the_command_line(shop, call_vitrine):
    def call(*options):
        done = call_vitrine("rejects", "--config", shop.config, "--json", *options)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1
        return json.loads(done.stdout)

    assert set(by_product(call("--kind", "transient"))) == {"unreachable"}
    found = call("--reason", "missing_image", "--reason", "unreachable")
    assert set(by_product(found)) == {"blank", "unreachable"}
    assert found["rejected"] == 2
    found = call("--limit", "1")
    assert (found["rejected"], len(found["rejects"])) == (3, 1)
    assert call("--kind", "transient", "--reason", "not_found")["rejects"] == []


def test_wrong_options(shop, call_vitrine, failed_line):
    options = ("rejects", "--config", shop.config)
    assert "did you mean 'not_found'" in failed_line(call_vitrine(*options, "--reason", "notfound"))
    assert call_vitrine(*options, "--kind", "sometimes").returncode == 2
    assert call_vitrine(*options, "--limit", "-1").returncode == 2


def test_tables_tell_all_and_steer_no_terminal(shop, call_vitrine):
    done = call_vitrine("rejects", "--config", shop.config, "--limit", "1")
    assert done.returncode == 0, done.stderr
    assert "release 3: 3 rows rejected (10.71% of 28)" in done.stdout
    assert "1 given up" in done.stdout
    assert "… and 2 more: --limit 0 shows all" in done.stdout
    with open_rejects(read_config(shop.config), RejectQuery()) as found:
        console = Console(width=160, record=True, force_terminal=True)
        print_rejects(found, console)
    text = console.export_text()
    assert all(name in text for name in ("lost", "unreachable", "blank", "left as it is"))
    assert "more" not in text


def test_a_lost_data_file_is_one_line(shop, tmp_path, call_vitrine, failed_line):
    shutil.copytree(shop.config.parent / "store", tmp_path / "store")
    next((tmp_path / "store" / "embeddings").glob("*.parquet")).unlink()
    store = f"store={tmp_path / 'store'}"
    done = call_vitrine("rejects", "--config", shop.config, "--set", store, "--json")
    assert ".parquet is missing" in failed_line(done)
    assert done.stdout == ""


def test_rows_that_are_live_without_their_image(tmp_path, sample_catalog, call_vitrine):
    shop = Shop(tmp_path, sample_catalog, embed={"fields": ["multimodal"]})
    shop.refresh()
    found = shop.list(masked=True)
    assert (found["rejected"], found["masked"]) == (1, 5)
    assert by_product(found, "masked_rows").keys() == {
        "lost",
        "repaired",
        "removed",
        "blank",
        ODD_NAME,
    }
    for row in found["masked_rows"]:
        assert (row["retry"], row["attempts"], row["first_seen"]) == (False, 0, None)
    assert {one["reason"]: one["rows"] for one in found["masked_by_reason"]} == {
        "not_found": 4,
        "missing_image": 1,
    }
    assert set(by_product(shop.list())) == {"unreachable"}
    done = call_vitrine("rejects", "--config", shop.config, "--masked")
    assert done.returncode == 0, done.stderr
    assert r"[red]\x1b[31modd" in done.stdout
    assert "5 rows live without their image or text" in done.stdout
