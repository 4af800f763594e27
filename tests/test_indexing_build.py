import gc
from itertools import pairwise

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_codes import codes_by_id

from indexing import anatomy
from indexing.anatomy import rotate
from indexing.build import (
    add_vectors,
    append_vectors,
    ivf_of,
    list_sizes,
    merge_indexes,
    read_index,
    read_partial,
    share_quantizer,
    stored_ids,
    take_range,
    template_hash,
    train_index,
    write_index,
    write_partial,
)
from indexing.search import SearchPoint, search_exact, search_index
from indexing.spec import IndexSpec

faiss.omp_set_num_threads(1)

DIM = 16
FACTORIES = [
    "Flat",
    "IVF4,Flat",
    "IVF4,SQfp16",
    "IVF4,SQ6",
    "IVF4,PQ4x4np",
    "PCAR8,IVF4,SQ8",
    "PCAR8,IVF4_HNSW32,SQ4",
    "OPQ4_8,IVF4,PQ4x4np",
    "PCAR8,IVF4,PQ8x4fs",
    "IVF4,RaBitQ",
    "PCAR8,IVF4,RaBitQfs",
]
SPECS = {name: IndexSpec.parse(name, DIM) for name in FACTORIES}
FLAT, IVF, IVF_PQ, ROTATED = (SPECS[FACTORIES[number]] for number in (0, 1, 4, 5))
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=FACTORIES)
EVERY_IVF = pytest.mark.parametrize("spec", list(SPECS.values())[1:], ids=FACTORIES[1:])


def unit_rows(count, seed, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


TRAINING_ROWS = 39 * 256  # OPQ takes no fewer
SAMPLE = unit_rows(TRAINING_ROWS, seed=1)


def train(spec, seed=7):
    return train_index(spec, SAMPLE[: max(700, spec.min_training_rows)], seed=seed)


TEMPLATES = {spec: train(spec) for spec in SPECS.values()}
VECTORS = unit_rows(60, seed=2)
IDS = np.random.default_rng(3).permutation(2**40 + np.arange(60))
QUERIES = unit_rows(9, seed=4)


def serialized(index):
    return faiss.serialize_index(index).tobytes()


def answers(index, nprobe=3, k=10):
    return search_index(index, QUERIES, k, point_of(index, nprobe))


def point_of(index, nprobe):
    if isinstance(index, faiss.IndexIDMap2):
        return SearchPoint(nprobe=0)
    quantizer = faiss.downcast_index(ivf_of(index).quantizer)
    return SearchPoint(nprobe=nprobe, ef_search=16 * isinstance(quantizer, faiss.IndexHNSW))


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(found[1], expected[1])


@EVERY
def test_training_with_other_threads_gives_the_same_bytes_and_no_vectors(spec):
    faiss.omp_set_num_threads(2)
    try:
        again = train(spec)
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(1)
    assert again.ntotal == 0
    assert again.metric_type == faiss.METRIC_INNER_PRODUCT
    assert serialized(again) == serialized(TEMPLATES[spec])


@EVERY_IVF
def test_another_seed_gives_another_template(spec):
    other = train(spec, seed=8)
    assert template_hash(other) != template_hash(TEMPLATES[spec])


def test_the_seed_reaches_the_product_quantizer():
    first, second = train(IVF_PQ, seed=7), train(IVF_PQ, seed=8)
    assert (first.cp.seed, first.pq.cp.seed) == (7, 7)
    assert (second.cp.seed, second.pq.cp.seed) == (8, 8)
    assert not first.do_polysemous_training


@EVERY_IVF
def test_training_tells_how_far_it_is(spec):
    told = []
    train_index(
        spec,
        SAMPLE[: max(700, spec.min_training_rows)],
        seed=7,
        progress=lambda *step: told.append(step),
    )
    rotation = [] if spec.rotation == "none" else [("rotation", 0, 1), ("rotation", 1, 1)]
    lists = [("lists", done, 10) for done in range(11)]
    assert told == rotation + lists + [("codec", 0, 1), ("codec", 1, 1)]


def test_lists_are_those_of_one_faiss_run():
    plain = faiss.index_factory(DIM, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    plain.cp.seed = 7
    plain.train(SAMPLE[:700])
    assert serialized(plain.quantizer) == serialized(TEMPLATES[IVF].quantizer)


def test_pca_ranks_vectors_that_are_far_from_their_mean_zero():
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((900, 4)) @ rng.standard_normal((4, DIM)) + 3 * np.ones(DIM)
    rows += 0.05 * rng.standard_normal(rows.shape)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    ids, queries = np.arange(900), rows[:50]
    spec = IndexSpec.parse("PCAR6,IVF2,Flat", DIM)
    index = add_vectors(train_index(spec, rows, seed=7), ids, rows)
    found = search_index(index, queries, 10, SearchPoint(nprobe=2))[1]
    exact = search_exact(queries, [(ids, rows)], 10)[1]
    shared = [len(set(ours) & set(theirs)) for ours, theirs in zip(found, exact, strict=True)]
    assert np.mean(shared) >= 9  # FAISS's own PCAR: 5.4


@EVERY_IVF
def test_small_samples_are_refused(spec):
    with pytest.raises(ValueError, match="needs at least"):
        train_index(spec, SAMPLE[: spec.min_training_rows - 1], seed=7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    bad = VECTORS.copy()
    bad[5, 2] = value
    with pytest.raises(ValueError, match=r"NaN or Inf \(1 of 60 rows, first row 5\)"):
        add_vectors(TEMPLATES[IVF_PQ], IDS, bad)
    bad = SAMPLE.copy()
    bad[5, 2] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        train_index(IVF_PQ, bad, seed=7)
    bad = QUERIES.copy()
    bad[0, 0] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        search_index(TEMPLATES[IVF_PQ], bad, 3, SearchPoint(nprobe=1))


def test_rows_of_another_length_or_dim_are_refused():
    with pytest.raises(ValueError, match="unit length"):
        add_vectors(TEMPLATES[FLAT], IDS, VECTORS * 2)
    with pytest.raises(ValueError, match=r"expected \(N, 16\)"):
        add_vectors(TEMPLATES[FLAT], IDS, unit_rows(60, seed=1, dim=7))
    with pytest.raises(ValueError, match=r"expected \(N, 16\)"):
        train_index(IVF, unit_rows(700, seed=1, dim=7), seed=7)


def test_zero_rows_are_refused():
    for bad in (VECTORS.copy(), np.zeros_like(VECTORS)):
        bad[5] = 0
        with pytest.raises(ValueError, match="not of unit length"):
            add_vectors(TEMPLATES[IVF], IDS, bad)
    bad = SAMPLE.copy()
    bad[5] = 0
    with pytest.raises(ValueError, match=r"unit length \(1 of 9984 rows, first row 5\)"):
        train_index(IVF, bad, seed=7)
    with pytest.raises(ValueError, match="queries: a row is not of unit length"):
        search_index(TEMPLATES[IVF], bad[5:6], 3, SearchPoint(nprobe=1))


def test_queries_of_another_dim_are_refused():
    for spec in (FLAT, IVF, ROTATED):
        with pytest.raises(ValueError, match=r"queries: shape is \(2, 7\), expected \(N, 16\)"):
            search_index(
                TEMPLATES[spec],
                unit_rows(2, seed=1, dim=7),
                3,
                SearchPoint(nprobe=int(spec.nlist > 0)),
            )


def test_more_lists_than_points_are_refused():
    spec = IndexSpec.parse("IVF64,Flat", DIM)
    with pytest.raises(ValueError, match="60 rows, IVF64,Flat needs at least 2496: take a larger"):
        train_index(spec, VECTORS, seed=7)


@given(
    starts=st.lists(st.integers(0, 59), max_size=4, unique=True),
    threads=st.integers(1, 2),
    at_once=st.sampled_from([DIM, 7 * DIM, 2**19]),
)
@settings(max_examples=30, deadline=None)
def test_a_row_is_rotated_to_the_same_bits_in_any_block(starts, threads, at_once):
    template = TEMPLATES[ROTATED]
    whole = rotate(template, VECTORS)
    faiss.omp_set_num_threads(threads)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(anatomy, "ROTATED_AT_ONCE", at_once)
            blocks = pairwise(sorted({0, *starts, 60}))
            parts = [rotate(template, VECTORS[slice(*block)]) for block in blocks]
    finally:
        faiss.omp_set_num_threads(1)
    np.testing.assert_array_equal(np.concatenate(parts).view(np.int32), whole.view(np.int32))


def test_bad_ids_are_refused():
    repeated = IDS.copy()
    repeated[3] = repeated[40]
    with pytest.raises(ValueError, match="is repeated"):
        add_vectors(TEMPLATES[IVF], repeated, VECTORS)
    negative = IDS.copy()
    negative[0] = -1
    with pytest.raises(ValueError, match="negative"):
        add_vectors(TEMPLATES[IVF], negative, VECTORS)
    with pytest.raises(ValueError, match=r"expected \(60,\)"):
        add_vectors(TEMPLATES[IVF], IDS[:-1], VECTORS)
    with pytest.raises(ValueError, match="expected int64"):
        add_vectors(TEMPLATES[IVF], IDS.astype(np.uint64), VECTORS)


@EVERY
def test_the_template_stays_empty_and_all_ids_are_stored(spec):
    template = TEMPLATES[spec]
    before = serialized(template)
    index = add_vectors(template, IDS, VECTORS)
    assert (index.ntotal, template.ntotal) == (60, 0)
    assert serialized(template) == before
    assert sorted(stored_ids(index)) == sorted(IDS)
    assert add_vectors(template, IDS[:0], VECTORS[:0]).ntotal == 0
    with pytest.raises(ValueError, match="holds 60 vectors"):
        add_vectors(index, IDS, VECTORS)


@EVERY
@given(cuts=st.lists(st.integers(0, 60), max_size=4), nprobe=st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_merged_shards_answer_like_one_build(spec, cuts, nprobe):
    template = TEMPLATES[spec]
    bounds = [0, *sorted(cuts), 60]
    parts = [
        add_vectors(template, IDS[start:end], VECTORS[start:end]) for start, end in pairwise(bounds)
    ]
    merged, single = merge_indexes(parts), add_vectors(template, IDS, VECTORS)
    assert [part.ntotal for part in parts] == [60] + [0] * len(cuts)
    assert codes_by_id(merged) == codes_by_id(single)
    if "fs" not in spec.factory:  # FastScan leaves whatever was in memory beyond its last code
        assert serialized(merged) == serialized(single)
    np.testing.assert_array_equal(answers(merged, nprobe), answers(single, nprobe))


@EVERY
def test_vectors_can_be_appended_in_place(spec):
    index = faiss.clone_index(TEMPLATES[spec])
    for start in range(0, 60, 13):
        append_vectors(index, IDS[start : start + 13], VECTORS[start : start + 13])
    assert codes_by_id(index) == codes_by_id(add_vectors(TEMPLATES[spec], IDS, VECTORS))


@EVERY_IVF
def test_foreign_templates_are_refused_and_left_whole(spec):
    first = add_vectors(TEMPLATES[spec], IDS[:30], VECTORS[:30])
    foreign = train(spec, seed=8)
    second = add_vectors(foreign, IDS[30:], VECTORS[30:])
    with pytest.raises(ValueError, match="part 1 stems from template"):
        merge_indexes([first, second])
    assert (first.ntotal, second.ntotal) == (30, 30)


def test_merges_that_would_repeat_vectors_are_refused():
    first = add_vectors(TEMPLATES[IVF], IDS[:30], VECTORS[:30])
    overlapping = add_vectors(TEMPLATES[IVF], IDS[29:], VECTORS[29:])
    with pytest.raises(ValueError, match="is repeated"):
        merge_indexes([first, overlapping])
    with pytest.raises(ValueError, match="given twice"):
        merge_indexes([first, first])
    with pytest.raises(ValueError, match="no parts"):
        merge_indexes([])
    assert (first.ntotal, overlapping.ntotal) == (30, 31)


def test_flat_indexes_of_different_dims_do_not_merge():
    other = train_index(IndexSpec(dim=4), unit_rows(5, seed=1, dim=4), seed=7)
    with pytest.raises(ValueError, match="stems from template"):
        merge_indexes([TEMPLATES[FLAT], other])


@EVERY
def test_the_template_hash_ignores_contents_and_nprobe(spec):
    index = add_vectors(TEMPLATES[spec], IDS, VECTORS)
    if spec.nlist:
        ivf_of(index).nprobe = 3
    before = serialized(index)
    assert template_hash(index) == template_hash(TEMPLATES[spec])
    assert serialized(index) == before


@EVERY
def test_files_round_trip_and_hold_what_the_spec_says(spec, tmp_path):
    index = add_vectors(TEMPLATES[spec], IDS, VECTORS)
    path = tmp_path / "image.faiss"
    sha256 = write_index(index, path)
    assert serialized(read_index(path, sha256=sha256)) == serialized(index)
    assert [file.name for file in tmp_path.iterdir()] == ["image.faiss"]
    half = add_vectors(TEMPLATES[spec], IDS[:30], VECTORS[:30])
    growth = len(serialized(index)) - len(serialized(half))
    if not spec.is_fastscan:
        assert abs(growth - 30 * spec.bytes_per_vector) <= 8 * 2 * spec.nlist


@EVERY
def test_the_same_vectors_give_the_same_file_however_they_came_together(spec, tmp_path):
    """FastScan's blocks end in memory that was never written."""
    digests = set()
    for cuts in ([], [13], [1, 20, 44]):
        parts = [
            add_vectors(TEMPLATES[spec], IDS[low:high], VECTORS[low:high])
            for low, high in pairwise([0, *cuts, len(IDS)])
        ]
        digests.add(write_index(merge_indexes(parts), tmp_path / "index"))
    assert len(digests) == 1


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_flipped_byte_is_noticed(tmp_path, place):
    path = tmp_path / "image.faiss"
    sha256 = write_index(add_vectors(TEMPLATES[IVF_PQ], IDS, VECTORS), path)
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image\.faiss is corrupted: sha256 .* expected"):
        read_index(path, sha256=sha256)


def test_missing_files_and_folders_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_index(tmp_path / "absent", sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_index(TEMPLATES[FLAT], tmp_path / "absent" / "image.faiss")


def test_a_failed_write_leaves_no_file_and_the_old_one_whole(tmp_path, monkeypatch):
    path = tmp_path / "image.faiss"
    sha256 = write_index(TEMPLATES[FLAT], path)
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_index(add_vectors(TEMPLATES[FLAT], IDS, VECTORS), path)
    assert [file.name for file in tmp_path.iterdir()] == ["image.faiss"]
    assert read_index(path, sha256=sha256).ntotal == 0


@EVERY
def test_mapped_files_answer_alike_from_another_folder_and_refuse_changes(spec, tmp_path):
    index = add_vectors(TEMPLATES[spec], IDS, VECTORS)
    path = tmp_path / "image.faiss"
    sha256 = write_index(index, path)
    moved = tmp_path / "elsewhere" / "other.faiss"
    moved.parent.mkdir()
    path.rename(moved)
    mapped = read_index(moved, sha256=sha256, mapped=True)
    np.testing.assert_array_equal(answers(mapped), answers(index))
    assert sorted(stored_ids(mapped)) == sorted(IDS)
    assert template_hash(mapped) == template_hash(index)
    part = take_range(mapped, 2**40, 2**40 + 30)
    assert sorted(stored_ids(part)) == sorted(IDS)[:30]
    for change in (
        lambda: append_vectors(mapped, IDS[:1], VECTORS[:1]),
        lambda: merge_indexes([TEMPLATES[spec], mapped]),
        lambda: merge_indexes([mapped, faiss.clone_index(TEMPLATES[spec])]),
        lambda: write_index(mapped, path),
        lambda: write_partial(mapped, path, template_sha256="00"),
    ):
        with pytest.raises(ValueError, match="mapped from its file"):
            change()
    assert mapped.ntotal == 60
    assert not path.exists()
    path.write_bytes(moved.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is corrupted"):
        read_index(path, sha256=sha256, mapped=True)


def resident_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


@pytest.mark.parametrize("name", ["Flat", "IVF4,Flat", "IVF4,SQ8"])
def test_a_mapped_file_is_not_read_into_memory(name, tmp_path):
    spec = IndexSpec.parse(name, DIM)
    index = faiss.clone_index(TEMPLATES.get(spec) or train(spec))
    vectors = unit_rows(100_000, seed=5)
    for start in range(0, 500_000, 100_000):
        append_vectors(index, np.arange(start, start + 100_000), vectors)
    path = tmp_path / "image.faiss"
    sha256 = write_index(index, path)
    size_mib = path.stat().st_size / 2**20
    del index, vectors
    gc.collect()
    before = resident_mib()
    mapped = read_index(path, sha256=sha256, mapped=True)
    search_index(mapped, QUERIES, 3, point_of(mapped, 4))
    assert mapped.ntotal == 500_000
    assert size_mib > 10
    assert resident_mib() - before < size_mib / 3


@EVERY
def test_partials_share_their_templates_quantizer(spec, tmp_path):
    template = faiss.clone_index(TEMPLATES[spec])
    index = add_vectors(template, IDS, VECTORS)
    path = tmp_path / "part.faiss"
    seal = template_hash(template)
    sha256 = write_partial(index, path, template_sha256=seal)
    expected = codes_by_id(index), answers(index), template_hash(index)
    assert answers(index)[1].tolist() == expected[1][1].tolist()  # writing left it as it was
    if spec.nlist:
        assert path.stat().st_size < len(serialized(index)) + 32
    part = read_partial(path, template, sha256=sha256, template_sha256=seal)
    del index, template  # the part keeps the template alive
    gc.collect()
    assert (codes_by_id(part), template_hash(part)) == (expected[0], expected[2])
    np.testing.assert_array_equal(answers(part), expected[1])
    clone = faiss.clone_index(part)
    base = add_vectors(TEMPLATES[spec], IDS[:0], VECTORS[:0])
    merge_indexes([base, part])
    del part
    gc.collect()
    assert codes_by_id(base) == codes_by_id(clone) == expected[0]


@EVERY_IVF
def test_parts_of_another_template_or_with_another_byte_are_refused(spec, tmp_path):
    path = tmp_path / "part.faiss"
    template, other = TEMPLATES[spec], train(spec, seed=8)
    seal = template_hash(template)
    index = add_vectors(template, IDS, VECTORS)
    sha256 = write_partial(index, path, template_sha256=seal)
    with pytest.raises(ValueError, match=r"part\.faiss stems from template .* expected"):
        read_partial(path, other, sha256=sha256, template_sha256=template_hash(other))
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 1
    for changed in (content[:-1], content[:10], b"", bytes(flipped)):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="is corrupted"):
            read_partial(path, template, sha256=sha256, template_sha256=seal)


@EVERY
def test_a_range_of_ids_is_taken_with_its_codes(spec):
    index = add_vectors(TEMPLATES[spec], IDS, VECTORS)
    whole, before = codes_by_id(index), answers(index)
    low, high = 2**40 + 11, 2**40 + 42
    for bounds in ((low, high), (None, high), (low, None), (0, 2**63), (high, high)):
        first, past = bounds[0] or 0, bounds[1] or 2**63
        taken = take_range(index, *bounds)
        assert codes_by_id(taken) == {i: code for i, code in whole.items() if first <= i < past}
        kept = np.array([first <= one < past for one in IDS.tolist()])
        afresh = add_vectors(TEMPLATES[spec], IDS[kept], VECTORS[kept])
        assert_same(answers(taken), answers(afresh))
        assert (taken.ntotal, template_hash(taken)) == (kept.sum(), template_hash(index))
    assert (codes_by_id(index), index.ntotal) == (whole, 60)
    np.testing.assert_array_equal(answers(index), before)
    assert take_range(TEMPLATES[spec], low, high).ntotal == 0


@EVERY
def test_partitions_share_one_quantizer(spec, tmp_path):
    opened = []
    for number, (start, end) in enumerate(pairwise([0, 20, 40, 60])):
        path = tmp_path / f"{number}.faiss"
        part = add_vectors(TEMPLATES[spec], IDS[start:end], VECTORS[start:end])
        opened.append(read_index(path, sha256=write_index(part, path), mapped=True))
    expected = [answers(index) for index in opened]
    first, *others = opened
    share_quantizer(first, others)
    for index, found in zip(opened, expected, strict=True):
        np.testing.assert_array_equal(answers(index), found)
    if spec.nlist:
        assert len({int(ivf_of(index).quantizer.this) for index in opened}) == 1
        with pytest.raises(ValueError, match="other indexes use this one's coarse quantizer"):
            share_quantizer(others[0], [first])
    share_quantizer(first, others)
    del first, opened, index
    gc.collect()
    for index, found in zip(others, expected[1:], strict=True):
        np.testing.assert_array_equal(answers(index), found)
    with pytest.raises(ValueError, match=r"stems from template|given twice"):
        share_quantizer(others[0], [train(spec, seed=8) if spec.nlist else others[0]])


def test_list_sizes_sum_to_ntotal():
    index = add_vectors(TEMPLATES[IVF], IDS, VECTORS)
    sizes = list_sizes(index)
    assert (sizes.shape, sizes.dtype, sizes.sum()) == ((4,), np.int64, 60)
    assert list_sizes(TEMPLATES[FLAT]).shape == (0,)
    with pytest.raises(ValueError, match="IndexFlat"):
        list_sizes(faiss.IndexFlatIP(DIM))
    with pytest.raises(ValueError, match="IndexIDMap2 has no inverted lists"):
        ivf_of(TEMPLATES[FLAT])
