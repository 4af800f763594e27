import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_intersection_counts_what_exists():
    exact = np.array([[1, 2, 3], [4, 5, 6]])
    assert intersection_at_k(exact, exact, 3) == 1.0
    assert intersection_at_k(exact[:, ::-1], exact, 3) == 1.0
    assert intersection_at_k(np.array([[1, 9, 8], [-1, -1, -1]]), exact, 3) == pytest.approx(1 / 6)
    assert intersection_at_k(exact[:, ::-1], exact, 1) == 0.0
    small = np.array([[1, 2, -1], [2, 1, -1]])
    assert intersection_at_k(small, small, 3) == 1.0
    assert intersection_at_k(np.array([[1, -1, -1], [7, 8, 9]]), small, 3) == pytest.approx(0.25)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_intersection_is_that_of_sets(k, n_queries, seed):
    generator = np.random.default_rng(seed)
    tables = []
    for _ in range(2):
        table = np.array([generator.permutation(9)[:6] for _ in range(n_queries)])
        tables.append(np.where(np.arange(6) < generator.integers(1, 7, (n_queries, 1)), table, -1))
    shares = [
        len((set(found[:k]) & set(exact[:k])) - {-1}) / len(set(exact[:k]) - {-1})
        for found, exact in zip(*tables, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("indexing.metrics.MAX_COMPARED", 2 * k * k)
        assert intersection_at_k(*tables, k) == pytest.approx(np.mean(shares))


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
