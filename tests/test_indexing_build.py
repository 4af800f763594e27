from itertools import pairwise

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexing.build import (
    add_vectors,
    list_sizes,
    merge_indexes,
    read_index,
    set_nprobe,
    stored_ids,
    template_hash,
    train_index,
    write_index,
)
from indexing.search import search_index
from indexing.spec import IndexSpec

faiss.omp_set_num_threads(1)

DIM = 8
FLAT = IndexSpec(dim=DIM)
IVF = IndexSpec(dim=DIM, nlist=4)
IVF_PQ = IndexSpec(dim=DIM, nlist=4, pq_m=4, pq_nbits=4)
SPECS = [FLAT, IVF, IVF_PQ]


def unit_rows(count, seed, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


SAMPLE = unit_rows(700, seed=1)
TEMPLATES = {spec: train_index(spec, SAMPLE, seed=7) for spec in SPECS}
VECTORS = unit_rows(60, seed=2)
IDS = np.random.default_rng(3).permutation(2**40 + np.arange(60))
QUERIES = unit_rows(9, seed=4)


def serialized(index):
    return faiss.serialize_index(index).tobytes()


@pytest.mark.parametrize("spec", SPECS)
def test_training_is_deterministic_and_leaves_the_index_empty(spec):
    again = train_index(spec, SAMPLE, seed=7)
    assert again.ntotal == 0
    assert again.metric_type == faiss.METRIC_INNER_PRODUCT
    assert serialized(again) == serialized(TEMPLATES[spec])


@pytest.mark.parametrize("spec", [IVF, IVF_PQ])
def test_another_seed_gives_another_template(spec):
    other = train_index(spec, SAMPLE, seed=8)
    assert template_hash(other) != template_hash(TEMPLATES[spec])


def test_the_seed_reaches_the_product_quantizer():
    first, second = (train_index(IVF_PQ, SAMPLE, seed=seed) for seed in (7, 8))
    assert (first.cp.seed, first.pq.cp.seed) == (7, 7)
    assert (second.cp.seed, second.pq.cp.seed) == (8, 8)
    assert not first.do_polysemous_training


@pytest.mark.parametrize("spec", [IVF, IVF_PQ])
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
        search_index(TEMPLATES[IVF_PQ], bad, 3)


def test_rows_of_another_length_or_dim_are_refused():
    with pytest.raises(ValueError, match="unit length"):
        add_vectors(TEMPLATES[FLAT], IDS, VECTORS * 2)
    with pytest.raises(ValueError, match=r"expected \(N, 8\)"):
        add_vectors(TEMPLATES[FLAT], IDS, unit_rows(60, seed=1, dim=7))
    with pytest.raises(ValueError, match=r"expected \(N, 8\)"):
        train_index(IVF, unit_rows(700, seed=1, dim=7), seed=7)


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


@pytest.mark.parametrize("spec", SPECS)
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


@pytest.mark.parametrize("spec", SPECS)
@given(cuts=st.lists(st.integers(0, 60), max_size=4), nprobe=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_merged_shards_answer_like_one_build(spec, cuts, nprobe):
    template = TEMPLATES[spec]
    bounds = [0, *sorted(cuts), 60]
    parts = [
        add_vectors(template, IDS[start:end], VECTORS[start:end]) for start, end in pairwise(bounds)
    ]
    merged, single = merge_indexes(parts), add_vectors(template, IDS, VECTORS)
    for index in (merged, single):
        set_nprobe(index, nprobe if spec.nlist else 0)
    assert [part.ntotal for part in parts] == [60] + [0] * len(cuts)
    assert serialized(merged) == serialized(single)
    for found, expected in zip(
        search_index(merged, QUERIES, 10), search_index(single, QUERIES, 10), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("spec", [IVF, IVF_PQ])
def test_foreign_templates_are_refused_and_left_whole(spec):
    first = add_vectors(TEMPLATES[spec], IDS[:30], VECTORS[:30])
    foreign = train_index(spec, SAMPLE, seed=8)
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


@pytest.mark.parametrize("spec", SPECS)
def test_the_template_hash_ignores_contents_and_nprobe(spec):
    index = add_vectors(TEMPLATES[spec], IDS, VECTORS)
    set_nprobe(index, 3 if spec.nlist else 0)
    before = serialized(index)
    assert template_hash(index) == template_hash(TEMPLATES[spec])
    assert serialized(index) == before


@pytest.mark.parametrize("spec", SPECS)
def test_files_round_trip_and_hold_what_the_spec_says(spec, tmp_path):
    index = add_vectors(TEMPLATES[spec], IDS, VECTORS)
    path = tmp_path / "image.faiss"
    sha256 = write_index(index, path)
    assert serialized(read_index(path, sha256=sha256)) == serialized(index)
    assert [file.name for file in tmp_path.iterdir()] == ["image.faiss"]
    half = add_vectors(TEMPLATES[spec], IDS[:30], VECTORS[:30])
    growth = len(serialized(index)) - len(serialized(half))
    assert abs(growth - 30 * spec.bytes_per_vector) <= 8 * 2 * spec.nlist


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


def test_nprobe_is_set_within_bounds():
    index = faiss.clone_index(TEMPLATES[IVF])
    set_nprobe(index, 4)
    assert index.nprobe == 4
    set_nprobe(TEMPLATES[FLAT], 0)
    for nprobe in (0, 5):
        with pytest.raises(ValueError, match="expected 1 to nlist 4"):
            set_nprobe(index, nprobe)
    with pytest.raises(ValueError, match="no lists"):
        set_nprobe(TEMPLATES[FLAT], 1)


def test_list_sizes_sum_to_ntotal():
    index = add_vectors(TEMPLATES[IVF], IDS, VECTORS)
    sizes = list_sizes(index)
    assert (sizes.shape, sizes.dtype, sizes.sum()) == ((4,), np.int64, 60)
    assert list_sizes(TEMPLATES[FLAT]).shape == (0,)
    with pytest.raises(ValueError, match="IndexFlat"):
        list_sizes(faiss.IndexFlatIP(DIM))
