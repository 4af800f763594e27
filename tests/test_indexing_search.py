from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise, product

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexing import probe, search
from indexing.build import add_vectors, train_index
from indexing.refine import encode_refine, open_refine, write_refine
from indexing.search import (
    Partition,
    SearchPoint,
    group_by_product,
    merge_topk,
    search_exact,
    search_index,
    search_partition,
    search_partitions,
    search_pool,
)
from indexing.spec import IndexSpec

faiss.omp_set_num_threads(1)

FLAT = SearchPoint(nprobe=0)
# All sums over these are exact in float32, so that equal scores are common and truly equal.
SIGNS = np.array(list(product((-0.5, 0.5), repeat=4)), dtype=np.float32)
SIGN_QUERIES = SIGNS[[0, 3, 5]]
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
    expected = exact_by_sorting(SIGN_QUERIES, ids, vectors, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MAX_SCORES", max_scores)
        assert_same(search_exact(SIGN_QUERIES, iter(blocks), k), expected)
    if blocks:
        parts = [search_exact(SIGN_QUERIES, [block], k) for block in blocks]
        assert_same(merge_topk(parts, k), expected)


def test_exact_search_agrees_with_faiss():
    rows = np.random.default_rng(0).standard_normal((320, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries, vectors, ids = rows[:20], rows[20:], np.arange(300) * 7
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(16))
    index.add_with_ids(vectors, ids)
    blocks = [(ids[start : start + 90], vectors[start : start + 90]) for start in range(0, 300, 90)]
    found = search_exact(queries, blocks, 5)
    scores, expected_ids = search_index(index, queries, 5, FLAT)
    np.testing.assert_array_equal(found[1], expected_ids)
    np.testing.assert_allclose(found[0], scores, atol=1e-6)


def test_small_databases_are_padded_alike():
    ids, vectors = np.array([4, 9]), SIGNS[:2]
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(4))
    index.add_with_ids(vectors, ids)
    expected = exact_by_sorting(SIGN_QUERIES, ids, vectors, 5)
    assert_same(search_exact(SIGN_QUERIES, [(ids, vectors)], 5), expected)
    assert_same(merge_topk([search_exact(SIGN_QUERIES, [], 3), expected], 5), expected)
    found = search_index(index, SIGN_QUERIES, 5, FLAT)
    np.testing.assert_array_equal(found[0], expected[0])
    assert (found[1][:, 2:] == -1).all()


def test_searches_refuse_what_is_wrong():
    ids, vectors = np.arange(16), SIGNS
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(4))
    for call in (
        lambda: search_index(index, SIGN_QUERIES, 0, FLAT),
        lambda: search_exact(SIGN_QUERIES, [], 0),
        lambda: merge_topk([(SIGN_QUERIES, ids[:12].reshape(3, 4))], 0),
    ):
        with pytest.raises(ValueError, match="k is 0"):
            call()
    with pytest.raises(ValueError, match="unit length"):
        search_index(index, SIGN_QUERIES * 2, 1, FLAT)
    with pytest.raises(ValueError, match=r"expected \(Q, D\)"):
        search_exact(SIGN_QUERIES[0], [(ids, vectors)], 1)
    with pytest.raises(ValueError, match="block: shape"):
        search_exact(SIGN_QUERIES, [(ids, vectors[:, :3])], 1)
    with pytest.raises(ValueError, match="16 vectors but ids"):
        search_exact(SIGN_QUERIES, [(ids[1:], vectors)], 1)
    with pytest.raises(ValueError, match="came twice"):
        search_exact(SIGN_QUERIES, [(ids, vectors), (ids, vectors)], 2)
    with pytest.raises(ValueError, match="no results"):
        merge_topk([], 2)
    with pytest.raises(ValueError, match="results of shapes"):
        merge_topk([(SIGN_QUERIES, ids[:3])], 2)


def test_exact_search_leaves_out_what_each_query_excludes():
    ids, vectors = np.arange(16) * 3, SIGNS
    own = np.array([0, 9, 15])
    expected = [
        exact_by_sorting(SIGN_QUERIES[[row]], ids[ids != own[row]], vectors[ids != own[row]], 6)
        for row in range(3)
    ]
    expected = tuple(map(np.concatenate, zip(*expected, strict=True)))
    for size in (16, 5, 1):
        blocks = [(ids[at : at + size], vectors[at : at + size]) for at in range(0, 16, size)]
        assert_same(search_exact(SIGN_QUERIES, blocks, 6, exclude=own), expected)
        nothing = np.full(3, -1)
        found = search_exact(SIGN_QUERIES, blocks, 6, exclude=nothing)
        assert_same(found, exact_by_sorting(SIGN_QUERIES, ids, vectors, 6))
    for bad in (own[:2], own.astype(np.int32)):
        with pytest.raises(ValueError, match="exclude: int"):
            search_exact(SIGN_QUERIES, [], 6, exclude=bad)


DIM, K = 16, 5


def unit_rows(count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


VECTORS, QUERIES = unit_rows(1200, seed=1), unit_rows(30, seed=2)
IDS = np.sort(np.random.default_rng(3).choice(2**62, len(VECTORS), replace=False))
EXACT = search_exact(QUERIES, [(IDS, VECTORS)], K)
FACTORIES = [
    "Flat",
    "IVF16,Flat",
    "IVF16_HNSW32,Flat",
    "IVF16,PQ8x4fs",
    "IVF16,RaBitQ",
    "PCAR8,IVF16,SQ8",
    "PCAR8,IVF16_HNSW32,PQ4x4fs",
]


@pytest.fixture(scope="module")
def templates():
    specs = {factory: IndexSpec.parse(factory, DIM) for factory in FACTORIES}
    return {name: train_index(spec, VECTORS, seed=3) for name, spec in specs.items()}


def deepest(factory):
    """Return the point that visits every list."""
    nprobe = 0 if factory == "Flat" else 16
    return SearchPoint(nprobe=nprobe, ef_search=64 if "HNSW" in factory else 0)


@pytest.fixture
def refined(tmp_path):
    def refined(ids, vectors, name="refine"):
        path = tmp_path / name
        parts = [[(ids, encode_refine("fp16", vectors))]]
        sha256 = write_refine(path, "fp16", DIM, parts, len(ids))
        return open_refine(path, kind="fp16", dim=DIM, sha256=sha256)

    return refined


def fill(template, rows=slice(None)):
    return add_vectors(template, IDS[rows], VECTORS[rows])


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_filtered_search_finds_only_those_ids(templates, factory):
    index, point = fill(templates[factory]), deepest(factory)
    for count in (0, 1, 3, 40, 900):
        chosen = np.sort(np.random.default_rng(count).choice(len(IDS), count, replace=False))
        scores, ids = search_index(index, QUERIES, K, point, only=IDS[chosen])
        assert np.isin(ids[ids >= 0], IDS[chosen]).all()
        assert ((ids >= 0).sum(axis=1) == min(K, count)).all()
        assert (scores[ids < 0] == LOWEST).all()
        if factory.endswith("Flat"):
            exact = search_exact(QUERIES, [(IDS[chosen], VECTORS[chosen])], K)
            np.testing.assert_array_equal(ids, exact[1])
            np.testing.assert_allclose(scores, exact[0], atol=1e-6)
    strangers = np.setdiff1d(np.arange(50), IDS)
    assert (search_index(index, QUERIES, K, point, only=strangers)[1] == -1).all()


def test_few_ids_widen_the_search(templates):
    index, only = fill(templates["IVF16,Flat"]), IDS[::100]
    exact = search_exact(QUERIES, [(only, VECTORS[::100])], K)
    found = search_index(index, QUERIES, K, SearchPoint(nprobe=1), only=only)
    np.testing.assert_array_equal(found[1], exact[1])
    half = search_index(index, QUERIES, K, SearchPoint(nprobe=4), only=IDS[::2])[1]
    exact = search_exact(QUERIES, [(IDS[::2], VECTORS[::2])], K)[1]
    narrow = search_index(index, QUERIES, K, SearchPoint(nprobe=4))[1]
    assert (half == exact).mean() > (narrow == EXACT[1]).mean()


@pytest.mark.parametrize("factory", FACTORIES)
def test_few_ids_are_compared_exactly_where_refine_allows(templates, refined, factory):
    rounded = VECTORS.astype(np.float16).astype(np.float32)
    partition = Partition(fill(templates[factory]), refined(IDS, VECTORS))
    only = np.union1d(IDS[::30], [4, 5, 2**62])
    point = deepest(factory)
    expected = search_exact(QUERIES, [(IDS[::30], rounded[::30])], K)
    found = search_partition(partition, QUERIES, K, point, only=only)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MAX_SCORES", 100)
        in_parts = search_partition(partition, QUERIES, K, point, only=only)
    np.testing.assert_array_equal(in_parts[1], expected[1])
    np.testing.assert_allclose(in_parts[0], expected[0], atol=1e-6)  # a BLAS rounds by the shape
    assert (search_partition(partition, QUERIES, K, point, only=only[:0])[1] == -1).all()
    assert search_partition(partition, QUERIES[:0], K, point, only=only)[1].shape == (0, K)


@pytest.mark.parametrize("factory", ["IVF16,PQ8x4fs", "IVF16,RaBitQ", "PCAR8,IVF16_HNSW32,PQ4x4fs"])
def test_reranking_makes_the_order_exact(templates, refined, factory):
    partition = Partition(fill(templates[factory]), refined(IDS, VECTORS))
    probes = deepest(factory)
    raw = search_partition(partition, QUERIES, K, probes)
    assert_same(raw, search_index(partition.index, QUERIES, K, probes))
    hits = [(raw[1] == EXACT[1]).mean()]
    for rerank in (40, len(IDS)):
        scores, ids = search_partition(partition, QUERIES, K, replace(probes, rerank=rerank))
        hits.append((ids == EXACT[1]).mean())
    assert hits[0] < hits[1] <= hits[2]
    assert hits[2] > 0.95  # float16 may swap neighbours
    np.testing.assert_allclose(scores, EXACT[0], atol=1e-3)


@pytest.mark.parametrize("factory", FACTORIES)
def test_partitions_answer_like_one_index(templates, refined, factory):
    bounds = [0, 300, 300, 1200]
    parts = [slice(*span) for span in pairwise(bounds)]
    whole = search_index(fill(templates[factory]), QUERIES, K, deepest(factory))
    partitions = [
        Partition(fill(templates[factory], rows), refined(IDS[rows], VECTORS[rows], str(number)))
        for number, rows in enumerate(parts)
    ]
    alone = search_partitions(partitions, QUERIES, K, deepest(factory))
    np.testing.assert_allclose(alone[0], whole[0], atol=1e-5)
    with search_pool(2) as pool:
        together = search_partitions(partitions, QUERIES, K, deepest(factory), pool=pool)
        assert_same(together, alone)
        only = IDS[::7]
        found = search_partitions(partitions, QUERIES, K, deepest(factory), only=only, pool=pool)
    exact = search_exact(QUERIES, [(only, VECTORS[::7].astype(np.float16).astype(np.float32))], K)
    np.testing.assert_array_equal(found[1], exact[1])


@pytest.mark.parametrize("factory", FACTORIES)
def test_threads_search_one_index_at_points_of_their_own(templates, refined, factory):
    partition = Partition(fill(templates[factory]), refined(IDS, VECTORS))
    ef_search = deepest(factory).ef_search
    nprobes = [0] if factory == "Flat" else [1, 2, 16]
    jobs = [
        (SearchPoint(nprobe=nprobe, ef_search=ef_search, rerank=rerank), only)
        for nprobe, rerank, only in product(nprobes, (0, 20), (None, IDS[::3]))
    ]

    def run(job):
        return search_partition(partition, QUERIES, K, job[0], only=job[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MAX_COMPARED", 10)
        expected = list(map(run, jobs))
        with ThreadPoolExecutor(4) as pool:
            for found, wanted in zip(pool.map(run, jobs * 5), expected * 5, strict=True):
                assert_same(found, wanted)
    assert not np.array_equal(expected[0][1], expected[-1][1])


@pytest.mark.parametrize("factory", FACTORIES)
def test_more_neighbours_than_vectors_are_padded(templates, refined, factory):
    rows = slice(0, 3)
    partition = Partition(fill(templates[factory], rows), refined(IDS[rows], VECTORS[rows]))
    for rerank in (0, 2, 50):
        point = replace(deepest(factory), rerank=rerank)
        scores, ids = search_partition(partition, QUERIES, 7, point)
        assert (ids[:, 3:] == -1).all()
        assert (scores[ids == -1] == LOWEST).all()
        # FastScan leaves out a vector with the lowest score that its tables can express.
        whole = (np.sort(ids[:, :3], axis=1) == IDS[:3]).all(axis=1)
        assert whole.mean() > 0.9 if factory.endswith("fs") else whole.all()
    empty = Partition(templates[factory])
    for only in (None, IDS[:2]):
        found = search_partition(empty, QUERIES, 7, deepest(factory), only=only)
        assert (found[1] == -1).all()
        assert (found[0] == LOWEST).all()


def test_calls_of_bounded_memory_are_one_search(templates):
    index, point = fill(templates["IVF16,PQ8x4fs"]), SearchPoint(nprobe=4)
    whole = search_index(index, QUERIES, K, point)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "MAX_PROBES", 40)
        np.testing.assert_array_equal(search_index(index, QUERIES, K, point)[0], whole[0])


def test_rabitq_asks_for_no_more_queries_at_once_than_faiss_survives():
    dim, point = 256, SearchPoint(nprobe=8)
    rows = np.random.default_rng(5).standard_normal((400, dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    template = train_index(IndexSpec.parse("IVF8,RaBitQfs", dim), rows, seed=0)
    index = add_vectors(template, np.arange(len(rows)), rows)
    # 2 GiB of rotated queries crash FAISS 1.15.1 in one thread.
    assert probe._queries_at_once(index, 8, K) * 4 * dim * 8 <= 2**31
    assert probe._queries_at_once(index, 2**22, K) == 1
    whole = search_index(index, rows, K, point)
    np.testing.assert_array_equal(whole[1][:, 0], np.arange(400))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "MAX_RABITQ_BYTES", 4 * dim * 8 * 150)
        assert probe._queries_at_once(index, 8, K) == 150
        assert_same(search_index(index, rows, K, point), whole)


def test_points_that_do_not_fit_are_refused(templates):
    flat, ivf, hnsw = (fill(templates[name]) for name in FACTORIES[:3])
    for index, fields, fault in (
        (flat, {"nprobe": 1}, "a flat index has no lists"),
        (flat, {"nprobe": 0, "ef_search": 16}, "a flat index has no lists"),
        (ivf, {"nprobe": 0}, "expected 1 to nlist 16"),
        (ivf, {"nprobe": 17}, "expected 1 to nlist 16"),
        (ivf, {"nprobe": 1, "ef_search": 16}, "there is no HNSW"),
        (hnsw, {"nprobe": 1}, "HNSW finds the lists"),
        (ivf, {"nprobe": 1, "rerank": 9}, "no refine store"),
    ):
        with pytest.raises(ValueError, match=fault):
            search_index(index, QUERIES, K, SearchPoint(**fields))
    with pytest.raises(ValueError, match="negative"):
        SearchPoint(nprobe=1, rerank=-1)
    for only in (IDS[:2][::-1], IDS[[1, 1]], IDS[:2, None], IDS[:2].astype(np.uint64)):
        with pytest.raises(ValueError, match="expected rising int64"):
            search_index(ivf, QUERIES, K, SearchPoint(nprobe=1), only=only)
    with pytest.raises(ValueError, match="0 partitions"):
        search_partitions([], QUERIES, K, FLAT)


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
