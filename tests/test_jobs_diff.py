import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_rows import make_plan, make_released, make_state

from jobs.buckets import count_buckets, number_buckets, split_by_bucket, split_rows
from jobs.diff import Counts, Retry, compare_rows, join_parts
from jobs.items import PLAN_DTYPE
from jobs.schemas import product_hash, vector_id
from jobs.state import RELEASED_DTYPE, STATE_DTYPE, locate, newest_rows, take_rows

ONCE = Retry(max_attempts=3, limits_hash=7, published_us=100)


def compare(plan, state=(), released=(), retry=ONCE):
    return compare_rows(make_plan(*plan), make_state(*state), make_released(*released), retry)


def row(number, **values):
    return {"vector_id": number} | values


def test_first_run_is_all_new():
    counts, todo, removed = compare([row(5), row(2)])
    assert todo["vector_id"].tolist() == [2, 5]
    assert (counts.new, counts.changed, counts.unchanged, len(removed)) == (2, 0, 0, 0)
    assert counts.generation == 0


def test_every_kind_of_row():
    plan = [row(1), row(2, text_hash=2), row(3), row(4), row(6), row(7, image_hash=2), row(8)]
    state = [
        row(1),
        row(2, generation=3),  # its text changed
        row(3, operation="reject", reason="timeout", attempts=2, first_seen=77),
        row(4, operation="delete"),  # came back
        row(5),  # removed
        row(7, operation="reject", reason="truncated"),  # a reject with another image
        row(8, operation="reject", reason="truncated"),
        row(9, operation="delete", generation=2),  # removed long ago: not again
        row(10, operation="reject", reason="timeout"),  # a reject that was removed
    ]
    counts, todo, removed = compare(plan, state, [row(1)])
    assert todo["vector_id"].tolist() == [2, 3, 4, 6, 7]
    assert removed.tolist() == [5, 10]
    assert (counts.new, counts.changed, counts.retried, counts.unchanged) == (2, 2, 1, 2)
    assert (counts.changed_text, counts.changed_image, counts.formerly_rejected) == (1, 1, 2)
    assert counts.new + counts.changed + counts.retried + counts.unchanged == len(plan)
    assert counts.generation == 3
    retried = todo[todo["vector_id"] == 3][0]
    assert (retried["attempts"], retried["first_seen"]) == (2, 77)
    assert todo["attempts"].tolist() == [0, 2, 0, 0, 0]
    assert [v for v, _ in counts.examples["changed"]] == [2, 7]


@pytest.mark.parametrize(
    ("reject", "retry", "again"),
    [
        ({"reason": "timeout", "attempts": 2}, ONCE, True),
        ({"reason": "timeout", "attempts": 3}, ONCE, False),
        ({"reason": "truncated", "attempts": 1}, ONCE, False),
        ({"reason": "too_many_bytes", "limits_hash": 7}, ONCE, False),
        ({"reason": "too_many_bytes", "limits_hash": 6}, ONCE, True),
        ({"reason": "truncated", "limits_hash": 6}, ONCE, False),
        ({"reason": "not_found", "written_at": 100}, ONCE, False),
        ({"reason": "not_found", "written_at": 101}, ONCE, True),  # nothing was published since
        ({"reason": "truncated", "written_at": 101}, ONCE, False),
        ({"reason": "text_too_long", "limits_hash": 6, "operation": "upsert"}, ONCE, True),
        ({"reason": "timeout", "operation": "upsert"}, ONCE, False),  # live without its image
    ],
)
def test_which_rejects_are_tried_again(reject, retry, again):
    state = [row(1, **({"operation": "reject"} | reject))]
    counts, todo, _ = compare([row(1)], state, retry=retry)
    assert (counts.retried, len(todo), counts.unchanged) == (again, again, not again)


def test_an_etag_that_could_not_be_had_says_nothing():
    plan = [row(1, etag_hash=0), row(2, etag_hash=5), row(3, etag_hash=6)]
    counts, todo, _ = compare(plan, [row(1, etag_hash=5), row(2, etag_hash=5), row(3, etag_hash=5)])
    assert todo["vector_id"].tolist() == [3]
    assert counts.changed_image == 1


def test_metadata_alone_embeds_nothing_but_is_counted():
    plan = [row(1, metadata_hash=7), row(2, metadata_hash=8), row(3, metadata_hash=9)]
    state = [row(1), row(2), row(3, operation="reject", reason="truncated")]
    released = [row(1, metadata_hash=7), row(2, metadata_hash=0)]
    counts, todo, _ = compare(plan, state, released)
    assert (len(todo), counts.unchanged, counts.metadata_changed) == (0, 3, 1)
    assert (counts.live, counts.released) == (2, 2)


def test_what_was_embedded_and_not_published_is_told_from_the_release():
    counts, todo, _ = compare([row(1)], [row(1, generation=4)], [row(1)])
    assert (len(todo), counts.live, counts.released) == (0, 1, 0)


def test_empty_catalog_removes_everything():
    _, _, removed = compare([], [row(1)])
    assert removed.tolist() == [1]


def test_ids_that_come_twice_are_told():
    counts, _, _ = compare([row(1), row(1), row(2)])
    assert counts.twice == {1}


def test_newest_row_wins_whatever_the_order():
    rows = make_state(row(1, generation=2, file=1), row(1, generation=3), row(2), row(1))
    newest = newest_rows(rows[::-1])
    assert newest["generation"].tolist() == [3, 1]


def test_rows_of_one_generation_are_told_apart_by_their_place():
    rows = make_state(row(1, file=1, row=4), row(1, file=1, row=9), row(1, file=0, row=99))
    assert newest_rows(rows)["row"].tolist() == [9]


def test_locate_in_nothing():
    places, known = locate(np.zeros(0, np.int64), np.array([3, 4]))
    assert places.tolist() == [0, 0]
    assert not known.any()
    taken, known = take_rows(np.zeros(0, STATE_DTYPE), np.array([3]))
    assert (taken["vector_id"].tolist(), known.tolist()) == ([0], [False])


def test_counts_of_buckets_add_up():
    total = Counts()
    for number in range(5):
        one = Counts(new=1, generation=number, todo=np.array([1, 2]), twice={number})
        one.examples = {"new": [(number, 0)]}
        total.add(one)
    assert (total.new, total.generation, total.todo.tolist()) == (5, 4, [5, 10])
    assert total.twice == {0, 1, 2, 3, 4}
    assert total.examples == {"new": [(0, 0), (1, 0), (2, 0)]}


@pytest.mark.parametrize(
    ("rows", "size", "buckets"), [(0, 10, 1), (10, 10, 1), (11, 10, 2), (10**9, 4 * 10**6, 256)]
)
def test_number_of_buckets(rows, size, buckets):
    assert count_buckets(rows, size) == buckets


def test_images_of_a_product_share_their_bucket_at_any_number_of_buckets():
    for name in ("a", "b", "kühl", "x" * 1000):
        ids = np.array([vector_id(name, n) for n in range(50)])
        assert len(set(ids.tolist())) == 50
        assert (ids >= 0).all()
        assert set(number_buckets(ids, 2**16).tolist()) == {product_hash(name) >> 47}


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 2**63 - 1), max_size=50),
    buckets=st.sampled_from([1, 2, 8, 2**10]),
)
def test_splitting_by_bucket_keeps_every_row_and_the_order_of_ids(ids, buckets):
    plan = np.zeros(len(ids), PLAN_DTYPE)
    plan["vector_id"] = ids
    parts = split_by_bucket(plan, buckets)
    assert len(parts) == buckets
    joined = np.concatenate([np.sort(part["vector_id"]) for part in parts])
    assert joined.tolist() == sorted(ids)


def test_split_rows_without_rows():
    parts = split_rows(np.zeros(0, PLAN_DTYPE), np.zeros(0, int), 3)
    assert [len(part) for part in parts] == [0, 0, 0]


def test_parts_of_a_bucket_are_joined_and_sorted():
    plan = [make_plan(row(3)), make_plan(row(1))]
    state = [make_state(row(3)), make_state(row(3, generation=2), row(2))]
    found = join_parts([2, 2, 0], (*plan, *state))
    assert found[0]["vector_id"].tolist() == [1, 3]
    assert found[1]["generation"].tolist() == [1, 2]
    assert (found[2].dtype, len(found[2])) == (RELEASED_DTYPE, 0)
