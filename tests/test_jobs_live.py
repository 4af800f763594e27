"""Which rows a release is made of, and what an update of the last one's indexes takes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from table_rows import make_plan, make_released, make_state

from jobs.live import join_rows, mark_first


def row(number, **values):
    return {"vector_id": number} | values


def join(plan, state, released=()):
    return join_rows(make_plan(*plan), make_state(*state), make_released(*released))


def test_live_rows_are_upserts_of_the_present_content():
    plan = [row(1), row(2), row(3), row(4)]
    state = [
        row(1, file=1, row=5),
        row(2, operation="reject", reason="truncated"),
        row(3, text_hash=9),
        row(9),
    ]
    live, _, found = join(plan, state)
    assert live[["vector_id", "file", "row"]].tolist() == [(1, 1, 5)]
    assert (found.live, found.products, found.lost) == (1, 1, 2)
    assert found.reasons == {("reject", "truncated"): 1}


def test_nothing_in_the_table():
    live, stale, found = join([row(1)], [])
    assert (len(live), len(stale), found.lost) == (0, 0, 1)


def test_text_is_indexed_by_the_first_live_image_of_a_product():
    # Product 100 has images 0, 1, 2 of which 0 is rejected; product 200 has one.
    plan = [
        row(7, product=100),
        row(5, product=100, image_number=1),
        row(3, product=100, image_number=2),
        row(4, product=200),
    ]
    state = [row(7, operation="reject", reason="truncated"), row(5), row(3), row(4)]
    live, _, found = join(plan, state)
    assert live["vector_id"].tolist() == [3, 4, 5]
    assert live["first"].tolist() == [False, True, True]
    assert (found.products, found.most_images) == (2, 3)


def test_fresh_and_stale_rows():
    plan = [row(1), row(2), row(4), row(5, product=50), row(6, product=50, image_number=1)]
    state = [
        row(1),
        row(2, generation=2),
        row(4),
        row(5, operation="reject", reason="timeout"),
        row(6),
    ]
    # 3 was removed; 5, which was the first image of its product, is a reject now.
    released = [row(1), row(2), row(3), row(5), row(6, first=False)]
    live, stale, _ = join(plan, state, released)
    assert live[["vector_id", "fresh", "fresh_first"]].tolist() == [
        (1, False, False),
        (2, True, True),
        (4, True, True),
        (6, False, True),
    ]
    assert stale.tolist() == [(2, True, True), (3, True, True), (5, True, True)]


def test_a_first_image_that_is_second_now_leaves_the_text_index_alone():
    plan = [row(5, product=50), row(6, product=50, image_number=1)]
    live, stale, _ = join(plan, [row(5, generation=3), row(6)], [row(6, first=True)])
    assert stale.tolist() == [(6, False, True)]
    assert live[["vector_id", "fresh", "fresh_first"]].tolist() == [
        (5, True, True),
        (6, False, False),
    ]


def test_live_rows_know_their_image():
    state = [row(n, content=c) for n, c in ((1, 8), (2, 8), (3, 0))]
    live, _, _ = join([row(n) for n in range(1, 4)], state)
    assert live["content"].tolist() == [8, 8, 0]


def test_reasons_of_masked_rows():
    _, _, found = join([row(1)], [row(1, reason="missing_image", file=2, row=3)])
    assert found.reasons == {("upsert", "missing_image"): 1}
    assert found.examples == {("upsert", "missing_image"): [(2, 3)]}


CONTENT = st.tuples(st.integers(0, 3), st.booleans())  # (generation; 0: none, live)


@settings(deadline=None)
@given(before=st.lists(CONTENT, max_size=12), after=st.lists(CONTENT, max_size=12))
def test_fresh_in_and_stale_out_turn_the_old_rows_into_the_new(before, after):
    """The release's ids less the stale ones plus the fresh ones are the live ids: of all rows,
    and of the first of each product (three images a product)."""

    def rows_of(contents):
        kept = [(n, g) for n, (g, live) in enumerate(contents) if g and live]
        return {n: g for n, g in kept}

    old, new = rows_of(before), rows_of(after)
    first_old = mark_first(np.array([n // 3 for n in old]), np.array(list(old), int))
    released = [
        row(n, generation=g, first=bool(f))
        for (n, g), f in zip(old.items(), first_old, strict=True)
    ]
    plan = [row(n, product=n // 3, image_number=n % 3) for n in range(12)]
    state = [row(n, generation=new.get(n, 1), operation="upsert" if n in new else "reject",
                 **({} if n in new else {"reason": "truncated"})) for n in range(12)]  # fmt: skip
    live, stale, _ = join(plan, state, released)
    for mark, gone, fresh in (("vector_id", "all", "fresh"), ("first", "first", "fresh_first")):
        was = {r["vector_id"] for r in released if mark == "vector_id" or r["first"]}
        rows = live if mark == "vector_id" else live[live["first"]]
        out = set(stale["vector_id"][stale[gone]].tolist())
        added = set(live["vector_id"][live[fresh]].tolist())
        assert out <= was
        assert not added & (was - out)
        assert (was - out) | added == set(rows["vector_id"].tolist())
        assert added >= {n for n in rows["vector_id"].tolist() if old.get(n) != new[n]}
