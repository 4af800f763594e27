import numpy as np
import pytest

from jobs.diff import OPERATIONS, STATE_DTYPE, TRANSIENT_REJECT, diff_catalog, locate
from jobs.index import LiveRows, live_rows
from jobs.items import PLAN_DTYPE
from jobs.schemas import DELETE, REJECT, UPSERT


def make_plan(*rows):
    """Rows (vector_id, content_hash[, product, image_number])."""
    filled = [(*row, row[0], 0) if len(row) == 2 else row for row in rows]
    return np.array(sorted(filled), dtype=PLAN_DTYPE)


def make_state(*rows):
    """Rows (vector_id, generation, content_hash, operation, file)."""
    coded = [(i, g, h, OPERATIONS.get(o, o), f) for i, g, h, o, f in rows]
    return np.array(sorted(coded), dtype=STATE_DTYPE)


def test_first_run_is_all_new():
    diff = diff_catalog(make_plan((5, 1), (2, 1)), make_state())
    assert diff.todo.tolist() == [2, 5]
    assert (diff.new, diff.changed, diff.unchanged, len(diff.removed)) == (2, 0, 0, 0)
    assert diff.generation == 1


def test_every_kind_of_row():
    plan = make_plan((1, 10), (2, 21), (3, 30), (4, 40), (6, 60), (7, 71))
    state = make_state(
        (1, 1, 10, UPSERT, 0),  # unchanged
        (2, 3, 20, UPSERT, 0),  # changed
        (3, 1, 30, TRANSIENT_REJECT, 0),  # retried
        (4, 1, 40, DELETE, 0),  # came back: new, though the content is the same
        (5, 1, 50, UPSERT, 0),  # removed
        (7, 1, 70, REJECT, 0),  # a reject whose content changed
        (8, 2, 0, DELETE, 0),  # removed long ago: not again
        (9, 2, 90, REJECT, 0),  # a reject that was removed
    )
    diff = diff_catalog(plan, state)
    assert diff.todo.tolist() == [2, 3, 4, 6, 7]
    assert diff.removed.tolist() == [5, 9]
    assert (diff.new, diff.changed, diff.unchanged, diff.retried) == (2, 2, 1, 1)
    assert diff.new + diff.changed + diff.unchanged + diff.retried == len(plan)
    assert diff.generation == 4


def test_lasting_reject_is_not_tried_again():
    diff = diff_catalog(make_plan((1, 10)), make_state((1, 1, 10, REJECT, 0)))
    assert (diff.todo.tolist(), diff.unchanged) == ([], 1)


def test_empty_catalog_removes_everything():
    diff = diff_catalog(make_plan(), make_state((1, 1, 10, UPSERT, 0)))
    assert diff.removed.tolist() == [1]


def test_locate_in_nothing():
    places, known = locate(np.zeros(0, np.int64), np.array([3, 4]))
    assert places.tolist() == [0, 0]
    assert not known.any()


def test_live_rows_are_upserts_of_the_present_content():
    plan = make_plan((1, 10), (2, 20), (3, 30), (4, 40))
    state = make_state(
        (1, 1, 10, UPSERT, 1), (2, 2, 20, REJECT, 0), (3, 1, 29, UPSERT, 0), (9, 1, 1, UPSERT, 0)
    )
    live = live_rows(plan, state, ["a", "b"])
    assert live.vector_id.tolist() == [1]
    assert live.generation.tolist() == [1]
    assert live.files == ("b",)
    assert live.rejected == 3


def test_live_rows_of_an_empty_table():
    live = live_rows(make_plan((1, 10)), make_state(), [])
    assert (len(live.vector_id), live.rejected, live.products, live.files) == (0, 1, 0, ())


def test_text_is_indexed_by_the_first_live_image_of_a_product():
    # Product 100 has images 0, 1, 2 of which 0 is rejected; product 200 has one.
    plan = make_plan((7, 1, 100, 0), (5, 1, 100, 1), (3, 1, 100, 2), (4, 1, 200, 0))
    state = make_state(
        (7, 1, 1, REJECT, 0), (5, 1, 1, UPSERT, 0), (3, 1, 1, UPSERT, 0), (4, 1, 1, UPSERT, 0)
    )
    live = live_rows(plan, state, ["a"])
    assert live.vector_id.tolist() == [3, 4, 5]
    assert live.first.tolist() == [False, True, True]
    assert live.products == 2
    assert live.select("text").vector_id.tolist() == [4, 5]
    assert live.select("image") is live


def live_of(ids):
    ids = np.asarray(ids, np.int64)
    return LiveRows(
        vector_id=ids,
        generation=np.ones(len(ids), np.int64),
        product=ids,
        first=np.ones(len(ids), bool),
        files=("a",),
        rejected=0,
    )


def test_draw_is_a_function_of_ids_seed_and_salt():
    ids = np.random.default_rng(0).integers(0, 2**63 - 1, 500)
    drawn = live_of(np.sort(ids)).draw(100, seed=1, salt="a")
    assert drawn.tolist() == live_of(ids).draw(100, seed=1, salt="a").tolist()
    assert drawn.tolist() != live_of(ids).draw(100, seed=2, salt="a").tolist()
    assert drawn.tolist() != live_of(ids).draw(100, seed=1, salt="b").tolist()
    assert len(set(drawn.tolist())) == 100
    assert (np.diff(drawn) > 0).all()


def test_draw_keeps_its_sample_when_rows_go():
    ids = np.arange(1000)
    drawn = live_of(ids).draw(100, seed=0, salt="a")
    rest = np.setdiff1d(ids, drawn)[::2]
    assert live_of(np.union1d(drawn, rest)).draw(100, seed=0, salt="a").tolist() == drawn.tolist()


@pytest.mark.parametrize("ids", [np.arange(4000), np.arange(4000) * 2**50 + 7])
def test_draw_is_uniform(ids):
    """Each of 10 stretches of the ids gets its share: chi-square, 9 degrees, p = 0.0001."""
    drawn = live_of(ids).draw(1000, seed=0, salt="train/image")
    counts = np.bincount(np.searchsorted(ids, drawn) // 400, minlength=10)
    assert counts.sum() == 1000
    assert ((counts - 100) ** 2 / 100).sum() < 33.7


def test_draw_of_more_than_there_is():
    assert live_of([3, 5]).draw(10, seed=0, salt="a").tolist() == [3, 5]
    assert live_of([3, 5]).draw(0, seed=0, salt="a").tolist() == []
    assert live_of([]).draw(10, seed=0, salt="a").tolist() == []
