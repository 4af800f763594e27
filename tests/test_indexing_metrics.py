from itertools import pairwise, product

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexing import search
from indexing.metrics import (
    bootstrap_interval,
    intersection_at_k,
    list_imbalance,
    mean_reciprocal_rank,
    ndcgs_at_k,
    recall_at_k,
    recalls_at_k,
    reciprocal_ranks,
)
from indexing.search import group_by_product, merge_topk, search_exact, search_index

faiss.omp_set_num_threads(1)

# All sums over these are exact in float32, so that equal scores are common and truly equal.
SIGNS = np.array(list(product((-0.5, 0.5), repeat=4)), dtype=np.float32)
QUERIES = SIGNS[[0, 3, 5]]
LOWEST = np.finfo(np.float32).min


def exact_by_sorting(queries, ids, vectors, k):
    scores = queries @ vectors.T
    out_scores = np.full((len(queries), k), LOWEST, dtype=np.float32)
    out_ids = np.full((len(queries), k), -1, dtype=np.int64)
    for row, found in enumerate(scores):
        order = np.lexsort((ids, -found))[:k]
        out_scores[row, : len(order)] = found[order]
        out_ids[row, : len(order)] = ids[order]
    return out_scores, out_ids


def assert_same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.int64)


blocks_of_signs = st.lists(st.lists(st.integers(0, 15), max_size=12), max_size=5)


@given(choices=blocks_of_signs, k=st.integers(1, 9), max_scores=st.sampled_from([1, 9, 30, 2**24]))
@settings(max_examples=60, deadline=None)
def test_search_over_blocks_is_one_sort_over_all(choices, k, max_scores):
    total = sum(map(len, choices))
    ids = np.random.default_rng(total).permutation(total)
    vectors = SIGNS[[choice for block in choices for choice in block]]
    bounds = np.cumsum([0, *map(len, choices)])
    spans = [slice(*span) for span in pairwise(bounds)]
    blocks = [(ids[span], vectors[span]) for span in spans]
    expected = exact_by_sorting(QUERIES, ids, vectors, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MAX_SCORES", max_scores)
        assert_same(search_exact(QUERIES, iter(blocks), k), expected)
    if blocks:
        parts = [search_exact(QUERIES, [block], k) for block in blocks]
        assert_same(merge_topk(parts, k), expected)


def test_exact_search_agrees_with_faiss():
    rows = np.random.default_rng(0).standard_normal((320, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries, vectors, ids = rows[:20], rows[20:], np.arange(300) * 7
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(16))
    index.add_with_ids(vectors, ids)
    blocks = [(ids[start : start + 90], vectors[start : start + 90]) for start in range(0, 300, 90)]
    found = search_exact(queries, blocks, 5)
    scores, expected_ids = search_index(index, queries, 5)
    np.testing.assert_array_equal(found[1], expected_ids)
    np.testing.assert_allclose(found[0], scores, atol=1e-6)


def test_small_databases_are_padded_alike():
    ids, vectors = np.array([4, 9]), SIGNS[:2]
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(4))
    index.add_with_ids(vectors, ids)
    expected = exact_by_sorting(QUERIES, ids, vectors, 5)
    assert_same(search_exact(QUERIES, [(ids, vectors)], 5), expected)
    assert_same(merge_topk([search_exact(QUERIES, [], 3), expected], 5), expected)
    found = search_index(index, QUERIES, 5)
    np.testing.assert_array_equal(found[0], expected[0])
    assert (found[1][:, 2:] == -1).all()


def test_searches_refuse_what_is_wrong():
    ids, vectors = np.arange(16), SIGNS
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(4))
    for call in (
        lambda: search_index(index, QUERIES, 0),
        lambda: search_exact(QUERIES, [], 0),
        lambda: merge_topk([(QUERIES, ids[:12].reshape(3, 4))], 0),
    ):
        with pytest.raises(ValueError, match="k is 0"):
            call()
    with pytest.raises(ValueError, match="unit length"):
        search_index(index, QUERIES * 2, 1)
    with pytest.raises(ValueError, match=r"expected \(Q, D\)"):
        search_exact(QUERIES[0], [(ids, vectors)], 1)
    with pytest.raises(ValueError, match="block: shape"):
        search_exact(QUERIES, [(ids, vectors[:, :3])], 1)
    with pytest.raises(ValueError, match="16 vectors but ids"):
        search_exact(QUERIES, [(ids[1:], vectors)], 1)
    with pytest.raises(ValueError, match="came twice"):
        search_exact(QUERIES, [(ids, vectors), (ids, vectors)], 2)
    with pytest.raises(ValueError, match="no results"):
        merge_topk([], 2)
    with pytest.raises(ValueError, match="results of shapes"):
        merge_topk([(QUERIES, ids[:3])], 2)


def test_grouping_keeps_the_best_vector_of_each_product():
    scores = np.array([0.9, 0.8, 0.8, 0.7, LOWEST], dtype=np.float32)
    ids = np.array([5, 8, 2, 1, -1])
    products = ["a", "b", "a", "c", ""]
    grouped = group_by_product(scores, ids, products, 10)
    assert [(name, vector_id) for name, _, vector_id in grouped] == [("a", 5), ("b", 8), ("c", 1)]
    assert grouped[0][1] == pytest.approx(0.9)
    assert group_by_product(scores, ids, products, 2) == grouped[:2]
    assert group_by_product(scores[:0], ids[:0], [], 2) == []
    shuffled = [3, 4, 2, 0, 1]
    again = group_by_product(scores[shuffled], ids[shuffled], [products[i] for i in shuffled], 9)
    assert again == grouped
    with pytest.raises(ValueError, match="expected as many"):
        group_by_product(scores, ids, products[:-1], 2)


def test_grouping_breaks_ties_by_the_smaller_id():
    scores = np.array([0.5, 0.5], dtype=np.float32)
    assert group_by_product(scores, np.array([9, 3]), ["a", "a"], 5) == [("a", 0.5, 3)]


def test_intersection_counts_what_exists():
    exact = np.array([[1, 2, 3], [4, 5, 6]])
    assert intersection_at_k(exact, exact, 3) == 1.0
    assert intersection_at_k(exact[:, ::-1], exact, 3) == 1.0
    assert intersection_at_k(np.array([[1, 9, 8], [-1, -1, -1]]), exact, 3) == pytest.approx(1 / 6)
    assert intersection_at_k(exact[:, ::-1], exact, 1) == 0.0
    small = np.array([[1, 2, -1], [2, 1, -1]])
    assert intersection_at_k(small, small, 3) == 1.0
    assert intersection_at_k(np.array([[1, -1, -1], [7, 8, 9]]), small, 3) == pytest.approx(0.25)


def test_intersection_refuses_what_can_not_be_compared():
    ids = np.array([[1, 2]])
    with pytest.raises(ValueError, match="k is 3"):
        intersection_at_k(ids, ids, 3)
    with pytest.raises(ValueError, match="k is 0"):
        intersection_at_k(ids, ids, 0)
    with pytest.raises(ValueError, match="nothing to compare"):
        intersection_at_k(ids, -np.ones((1, 2), dtype=np.int64), 2)
    with pytest.raises(ValueError, match="nothing to compare"):
        intersection_at_k(ids[:0], ids[:0], 2)
    with pytest.raises(ValueError, match="ids of shapes"):
        intersection_at_k(ids, ids[:0], 2)


def test_recall_and_reciprocal_rank():
    found = [["a", "b", "c"], ["b", "a"], []]
    relevant = ["b", {"b", "z"}, "q"]
    assert recall_at_k(found, relevant, 1) == pytest.approx((0 + 1 + 0) / 3)
    assert recall_at_k(found, relevant, 2) == pytest.approx((1 + 0.5 + 0) / 3)
    assert mean_reciprocal_rank(found, relevant) == pytest.approx((0.5 + 1 + 0) / 3)
    assert recall_at_k([["a"]], [{"a", "b"}], 1) == 1.0


def test_labels_must_fit():
    for measure in (mean_reciprocal_rank, lambda found, labels: recall_at_k(found, labels, 1)):
        with pytest.raises(ValueError, match="1 rankings but 2 labels"):
            measure([["a"]], ["a", "b"])
        with pytest.raises(ValueError, match="nothing to compare"):
            measure([["a"]], [set()])
        with pytest.raises(ValueError, match="nothing to compare"):
            measure([], [])
    with pytest.raises(ValueError, match="k is 0"):
        recall_at_k([["a"]], ["a"], 0)


def test_list_imbalance():
    assert list_imbalance(np.array([5, 5, 5])) == pytest.approx(1.0)
    assert list_imbalance(np.array([15, 0, 0])) == pytest.approx(3.0)
    assert list_imbalance(np.array([], dtype=np.int64)) == 1.0
    assert list_imbalance(np.array([0, 0])) == 1.0


def test_figures_of_each_query_average_to_the_metric():
    found, relevant = [["a", "b"], ["c"], ["b", "a"]], ["a", "d", {"a", "c"}]
    assert recalls_at_k(found, relevant, 2).tolist() == [1.0, 0.0, 0.5]
    assert reciprocal_ranks(found, relevant).tolist() == [1.0, 0.0, 0.5]
    assert recall_at_k(found, relevant, 2) == mean_reciprocal_rank(found, relevant) == 0.5


def test_ndcg_by_hand():
    gains = {"a": 100.0, "b": 10.0, "c": 0.0}
    ideal = 100 + 10 / np.log2(3)
    found = [["a", "b"], ["b", "a"], ["x", "a"], ["c"], []]
    expected = [ideal, 10 + 100 / np.log2(3), 100 / np.log2(3), 0, 0]
    values = ndcgs_at_k(found, [gains] * 5, 10)
    np.testing.assert_allclose(values, np.array(expected) / ideal)
    np.testing.assert_allclose(ndcgs_at_k([["a"], ["b", "a"]], [gains] * 2, 1), [1.0, 0.1])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 12), st.randoms())
@settings(max_examples=60, deadline=None)
def test_ndcg_is_one_for_the_best_order_and_never_above(values, k, random):
    gains = {str(number): float(value) for number, value in enumerate([*values, 1])}
    best = sorted(gains, key=lambda product: -gains[product])
    shuffled = random.sample(best, len(best))
    first, second = ndcgs_at_k([best, shuffled], [gains] * 2, k)
    assert first == pytest.approx(1)
    assert 0 <= second <= 1 + 1e-12


@pytest.mark.parametrize(
    ("found", "gains", "k"),
    [
        ([], [], 1),
        ([["a"]], [], 1),
        ([["a"]], [{}], 1),
        ([["a"]], [{"a": 0.0}], 1),
        ([["a"]], [{"a": -1.0, "b": 2.0}], 1),
        ([["a"]], [{"a": float("nan")}], 1),
        ([["a"]], [{"a": 1.0}], 0),
    ],
)
def test_ndcg_refuses(found, gains, k):
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own words
        ndcgs_at_k(found, gains, k)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_bootstrap_interval_contains_the_mean(values, seed):
    figures = np.array(values)
    low, high = bootstrap_interval(figures, resamples=50, seed=seed)
    assert figures.min() - 1e-12 <= low <= figures.mean() <= high <= figures.max() + 1e-12
    assert (low, high) == bootstrap_interval(figures, resamples=50, seed=seed)


def test_bootstrap_of_a_constant_has_no_width():
    low, high = bootstrap_interval(np.full(20, 0.3))
    assert (low, high) == pytest.approx((0.3, 0.3), abs=1e-12)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    trials = 400
    hits = 0
    for trial in range(trials):
        sample = (generator.random(200) < 0.6).astype(np.float64)
        low, high = bootstrap_interval(sample, resamples=400, seed=trial)
        hits += low <= 0.6 <= high
    assert 0.92 <= hits / trials <= 0.975


def test_bootstrap_in_parts_is_the_same(monkeypatch):
    values = np.random.default_rng(1).random(50)
    whole = bootstrap_interval(values)
    monkeypatch.setattr("indexing.metrics.MAX_DRAWN", 120)
    assert bootstrap_interval(values) == whole


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ([], {}),
        ([float("nan")], {}),
        ([[1.0]], {}),
        ([1.0], {"resamples": 0}),
        ([1.0], {"level": 1.0}),
    ],
)
def test_bootstrap_refuses(values, options):
    with pytest.raises(ValueError, match="expected"):
        bootstrap_interval(np.array(values, np.float64), **options)
