import faiss
import numpy as np
import pytest

from indexing.build import add_vectors, train_index
from indexing.search import search_exact
from indexing.spec import IndexSpec
from indexing.tune import measure_point, tune_nprobe

faiss.omp_set_num_threads(1)

K = 5


def unit_rows(count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


VECTORS, IDS, QUERIES = unit_rows(900, seed=1), np.arange(900) + 100, unit_rows(40, seed=2)
EXACT_IDS = search_exact(QUERIES, [(IDS, VECTORS)], K)[1]


def build(**fields):
    spec = IndexSpec(dim=8, **fields)
    return add_vectors(train_index(spec, VECTORS, seed=3), IDS, VECTORS)


def tune(index, target):
    return tune_nprobe(index, QUERIES, EXACT_IDS, k=K, target_intersection=target)


def test_the_cheapest_point_that_meets_the_target_is_chosen():
    index = build(nlist=20)
    _, curve = tune(index, 1.0)
    assert [point.nprobe for point in curve] == [1, 2, 4, 8, 16, 20][: len(curve)]
    assert curve[-1].intersection == 1.0
    assert all(point.intersection < 1.0 for point in curve[:-1])
    assert all(point.latency_ms > 0 for point in curve)
    for position, point in enumerate(curve):
        chosen, _ = tune(index, point.intersection)
        assert chosen.nprobe == curve[position].nprobe == index.nprobe


def test_an_unmet_target_returns_the_best_point():
    index = build(nlist=4, pq_m=2, pq_nbits=2)
    chosen, curve = tune(index, 1.0)
    assert [point.nprobe for point in curve] == [1, 2, 4]
    assert chosen.intersection == max(point.intersection for point in curve) < 1.0
    assert index.nprobe == chosen.nprobe


def test_a_flat_index_has_one_point():
    chosen, curve = tune(build(), 0.9)
    assert curve == [chosen]
    assert (chosen.nprobe, chosen.intersection) == (0, 1.0)


def test_one_list_has_one_point():
    chosen, curve = tune(build(nlist=1), 0.9)
    assert [point.nprobe for point in curve] == [1]
    assert chosen.intersection == 1.0


def test_bad_requests_are_refused():
    index = build(nlist=4)
    for target in (0.0, 1.1):
        with pytest.raises(ValueError, match="target_intersection"):
            tune(index, target)
    with pytest.raises(ValueError, match="expected 1 to nlist 4"):
        measure_point(index, QUERIES, EXACT_IDS, k=K, nprobe=5)
    with pytest.raises(ValueError, match="nothing to compare"):
        tune_nprobe(index, QUERIES[:0], EXACT_IDS[:0], k=K, target_intersection=0.9)
