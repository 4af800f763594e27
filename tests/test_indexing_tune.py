from dataclasses import replace
from itertools import pairwise

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexing.build import add_vectors, train_index
from indexing.metrics import intersection_at_k
from indexing.refine import encode_refine, open_refine, write_refine
from indexing.search import Partition, SearchPoint, merge_topk, search_exact, search_partition
from indexing.spec import IndexSpec
from indexing.tune import (
    MeasuredPoint,
    choose_point,
    model_costs,
    prune_curve,
    rerank_depths,
    sweep_partition,
    time_point,
)

faiss.omp_set_num_threads(1)

DIM, K = 8, 5


def unit_rows(count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


VECTORS, QUERIES = unit_rows(900, seed=1), unit_rows(40, seed=2)
IDS = np.arange(900) * 2 + 100
EXACT_IDS = search_exact(QUERIES, [(IDS, VECTORS)], K)[1]


def build(factory, rows=slice(None)):
    template = train_index(IndexSpec.parse(factory, DIM), VECTORS, seed=3)
    return add_vectors(template, IDS[rows], VECTORS[rows])


@pytest.fixture
def partition(tmp_path):
    def partition(factory, rows=slice(None)):
        path = tmp_path / f"{rows.start}.refine"
        parts = [[(IDS[rows], encode_refine("fp16", VECTORS[rows]))]]
        sha256 = write_refine(path, "fp16", DIM, parts, len(IDS[rows]))
        store = open_refine(path, kind="fp16", dim=DIM, sha256=sha256)
        return Partition(build(factory, rows), store)

    return partition


def nprobes(found):
    return [point.nprobe for point in found]


def test_the_grid_of_each_kind_of_index(partition):
    found = sweep_partition(Partition(build("Flat")), QUERIES, K, depths=(0,))
    assert list(found) == [SearchPoint(nprobe=0)]
    np.testing.assert_array_equal(found[SearchPoint(nprobe=0)][1], EXACT_IDS)
    index = build("IVF20,Flat")
    found = sweep_partition(Partition(index), QUERIES, K, depths=(0, 10))
    assert nprobes(found) == [1, 2, 4, 8, 16, 20]
    np.testing.assert_array_equal(found[SearchPoint(nprobe=20)][1], EXACT_IDS)
    found = sweep_partition(Partition(index), QUERIES, K, depths=(0,), max_nprobe=4)
    assert nprobes(found) == [1, 2, 4]
    assert nprobes(sweep_partition(Partition(build("IVF1,Flat")), QUERIES, K, depths=(0,))) == [1]
    found = sweep_partition(partition("IVF20_HNSW32,Flat"), QUERIES, K, depths=(0, 10))
    assert [(point.nprobe, point.ef_search) for point in found][::2] == [
        *((nprobe, ef) for nprobe in (1, 2, 4) for ef in (16,)),
        *((nprobe, ef) for nprobe in (8, 16) for ef in (16, 20)),
        (20, 20),
    ]
    assert {point.rerank for point in found} == {0, 10}


def test_depths_end_at_the_size_of_a_partition():
    assert rerank_depths(10, 10**6) == (0, 20, 50, 100, 200, 400)
    assert rerank_depths(10, 199) == (0, 20, 50, 100)
    assert rerank_depths(10, 3) == (0,)


@pytest.mark.parametrize("factory", ["IVF8,Flat", "PCAR4,IVF8,SQ8", "IVF8_HNSW32,PQ4x4fs"])
def test_a_sweep_finds_what_a_search_at_each_point_finds(partition, factory):
    searched = partition(factory)
    found = sweep_partition(searched, QUERIES, K, depths=(20, 0, 3, 900))
    assert {point.rerank for point in found} == {0, 3, 20, 900}
    for point, (scores, _) in found.items():
        direct = search_partition(searched, QUERIES, K, point)
        # FastScan scores many vectors alike: which of them are candidates may differ.
        same = np.isclose(scores, direct[0], atol=1e-5).mean()
        assert same > 0.9 if point.rerank in (3, 20) else same == 1


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "PCAR4,IVF8,SQ8"])
def test_an_excluded_id_is_as_if_it_were_not_there(partition, factory):
    rows = np.arange(0, 900, 300)
    depths = (0,) if factory == "Flat" else (0, 10)
    whole = partition(factory)
    found = sweep_partition(whole, VECTORS[rows], K, depths=depths, exclude=IDS[rows])
    for number, row in enumerate(rows.tolist()):
        index = build(factory, np.delete(np.arange(900), row))
        alone = sweep_partition(Partition(index, whole.refine), VECTORS[[row]], K, depths=depths)
        assert list(alone) == list(found)
        for point, (scores, ids) in alone.items():
            np.testing.assert_array_equal(found[point][1][number], ids[0])
            np.testing.assert_allclose(found[point][0][number], scores[0], atol=1e-6)
    nobody = sweep_partition(whole, VECTORS[rows], K, depths=depths, exclude=np.full(3, -1))
    if factory.endswith("Flat"):
        assert any((ids[:, 0] == IDS[rows]).all() for _, ids in nobody.values())


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 5), st.integers(0, 5), st.integers(1, 40)),
        min_size=1,
        max_size=12,
        unique_by=lambda value: value[3],
    ),
    st.integers(1, 5),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_the_pruned_curve_holds_every_choice(values, target, labelled):
    points = [
        MeasuredPoint(
            point=SearchPoint(nprobe=nprobe),
            cost=float(cost),
            intersection=catalog / 5,
            labelled_intersection=street / 5 if labelled else None,
        )
        for cost, catalog, street, nprobe in values
    ]
    chosen = choose_point(points, target / 5)
    assert chosen == choose_point(points[::-1], target / 5)
    good = [point for point in points if point.reached >= target / 5]
    if good:
        assert chosen.cost == min(point.cost for point in good)
    else:
        assert chosen.reached == max(point.reached for point in points)
    curve = prune_curve(points)
    assert chosen in curve
    assert choose_point(curve, target / 5) == chosen
    for cheaper, dearer in pairwise(curve):
        assert cheaper.cost < dearer.cost
        assert cheaper.reached < dearer.reached


def test_both_kinds_of_queries_must_meet_the_target():
    cheap = MeasuredPoint(
        point=SearchPoint(nprobe=1), cost=1, intersection=0.99, labelled_intersection=0.8
    )
    dear = replace(cheap, point=SearchPoint(nprobe=2), cost=2, labelled_intersection=0.95)
    assert choose_point([cheap, dear], 0.9) == dear
    assert choose_point([cheap, dear], 0.8) == cheap
    assert choose_point([cheap, dear], 1.0) == dear
    for target in (0.0, 1.1):
        with pytest.raises(ValueError, match="target_intersection"):
            choose_point([cheap], target)
    with pytest.raises(ValueError, match="no points"):
        choose_point([], 0.9)


def test_partitions_are_tuned_together(partition):
    parts = [partition("IVF8,PQ4x4fs", rows) for rows in (slice(0, 250), slice(250, 900))]
    depths = rerank_depths(K, 650)
    swept = [sweep_partition(part, QUERIES, K, depths=depths) for part in parts]
    costs = [model_costs(part, found, K) for part, found in zip(parts, swept, strict=True)]
    points = [
        MeasuredPoint(
            point=point,
            cost=sum(cost[point] for cost in costs),
            intersection=intersection_at_k(
                merge_topk([found[point] for found in swept], K)[1], EXACT_IDS, K
            ),
        )
        for point in swept[0]
    ]
    assert list(swept[0]) == list(swept[1])
    chosen = choose_point(points, 0.9)
    assert chosen.intersection >= 0.9
    assert chosen.point.rerank > 0
    best_of_codes = max(point.intersection for point in points if not point.point.rerank)
    assert best_of_codes < 0.9
    assert len(prune_curve(points)) < len(points)


def test_costs_are_bytes_touched(partition):
    flat = model_costs(Partition(build("Flat")), [SearchPoint(nprobe=0)], K)
    assert flat == {SearchPoint(nprobe=0): 900 * DIM * 4}
    points = [SearchPoint(nprobe=8), SearchPoint(nprobe=8, rerank=20)]
    whole, reranked = model_costs(partition("IVF8,SQ8"), points, K).values()
    assert whole == 900 * DIM + 8 * DIM * 4
    assert reranked == whole + 20 * 4096
    graph = [SearchPoint(nprobe=1, ef_search=ef) for ef in (2, 16, 64)]
    low, high, full = model_costs(Partition(build("IVF20_HNSW32,Flat")), graph, K).values()
    assert low < high == full
    narrow, wide = model_costs(
        Partition(build("IVF20,Flat")), [SearchPoint(nprobe=n) for n in (1, 2)], K
    ).values()
    assert 900 * DIM * 4 / 20 < narrow < wide < 900 * DIM * 4


def test_timing(partition):
    p50_ms, p99_ms, queries_per_s = time_point(
        partition("IVF8,SQ8"), QUERIES, K, SearchPoint(nprobe=2, rerank=10), singles=7
    )
    assert 0 < p50_ms <= p99_ms
    assert queries_per_s > 0


def test_bad_requests_are_refused():
    whole = Partition(build("IVF8,Flat"))
    for depths in ((), (5,), (-1, 0)):
        with pytest.raises(ValueError, match="depths are"):
            sweep_partition(whole, QUERIES, K, depths=depths)
    with pytest.raises(ValueError, match="exclude"):
        sweep_partition(whole, QUERIES, K, depths=(0,), exclude=IDS[:1])
    with pytest.raises(ValueError, match="nothing to time"):
        time_point(whole, QUERIES[:0], K, SearchPoint(nprobe=1))
