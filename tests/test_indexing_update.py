import dataclasses
import math

import faiss
import numpy as np
import pydantic
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from index_codes import codes_by_id

from indexing import update
from indexing.build import (
    add_vectors,
    ivf_of,
    list_sizes,
    merge_indexes,
    read_index,
    stored_ids,
    take_range,
    template_hash,
    train_index,
    write_index,
)
from indexing.drift import DriftLimits, IndexHealth, find_drift
from indexing.search import SearchPoint, search_index
from indexing.spec import IndexSpec
from indexing.update import (
    empty_clone,
    quantization_error,
    remove_vectors,
    update_index,
)

faiss.omp_set_num_threads(1)

DIM = 16
FACTORIES = [
    "Flat",
    "IVF8,Flat",
    "IVF8,PQ4x4np",
    "PCAR8,IVF8_HNSW32,SQ8",
    "PCAR8,IVF8,PQ8x4fs",
    "IVF8,RaBitQ",
    "IVF8,RaBitQfs",
]
SPECS = {name: IndexSpec.parse(name, DIM) for name in FACTORIES}
FLAT, IVF, IVF_PQ, ROTATED, FASTSCAN, RABITQ, _ = SPECS.values()
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=FACTORIES)
EVERY_IVF = pytest.mark.parametrize("spec", list(SPECS.values())[1:], ids=FACTORIES[1:])
START, IDS = 200, 260
TOLERANCE = 2e-6  # FAISS sums in another order where a vector lies elsewhere in a list


def unit_rows(count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


SAMPLE = unit_rows(700, seed=1)
TEMPLATES = {spec: train_index(spec, SAMPLE, seed=7) for spec in SPECS.values()}
VECTORS = unit_rows(120, seed=2)  # fewer than ids: many products share a picture, so scores tie
VECTOR_IDS = np.random.default_rng(3).permutation(2**62 + np.arange(IDS))
QUERIES = unit_rows(7, seed=4)
FIRST_STATE = {number: number % len(VECTORS) for number in range(START)}


def fill(spec, state, template=None):
    """An index of a {number of an id: number of its vector}."""
    numbers, chosen = list(state), list(state.values())
    return add_vectors(template or TEMPLATES[spec], VECTOR_IDS[numbers], VECTORS[chosen])


def serialized(index):
    return faiss.serialize_index(index).tobytes()


def point_of(spec, nprobe):
    return SearchPoint(nprobe=nprobe, ef_search=16 * (spec.coarse == "hnsw"))


def assert_same_answers(found, expected):
    """Compare (scores, ids): equal scores may come in any order, and the last be any of equals."""
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=TOLERANCE)
    for scores, ids, other_scores, other_ids in zip(*found, *expected, strict=True):
        ours = dict(zip(ids, scores, strict=True))
        theirs = dict(zip(other_ids, other_scores, strict=True))
        above = scores[-1] + 2 * TOLERANCE
        assert {i for i, score in ours.items() if score > above} <= set(theirs)
        assert {i for i, score in theirs.items() if score > above} <= set(ours)
        for shared in set(ours) & set(theirs):
            assert abs(ours[shared] - theirs[shared]) <= TOLERANCE


def assert_answers_like_built_afresh(index, spec, state):
    afresh = fill(spec, state)
    assert index.ntotal == len(state)
    assert sorted(stored_ids(index)) == sorted(stored_ids(afresh))
    np.testing.assert_array_equal(list_sizes(index), list_sizes(afresh))
    assert codes_by_id(index) == codes_by_id(afresh)
    for nprobe in (1, 3, spec.nlist) if spec.nlist else (0,):
        for k in (10, IDS):
            found, expected = (
                search_index(one, QUERIES, k, point_of(spec, nprobe)) for one in (index, afresh)
            )
            assert_same_answers(found, expected)


def apply(index, state, edits, count_parts):
    """Update by edits {number of an id: a vector's number, or None to remove}; the new state."""
    removed = [number for number in edits if number in state]
    added = {number: vector for number, vector in edits.items() if vector is not None}
    parts = [
        fill(None, dict(list(added.items())[start::count_parts]), template=empty_clone(index))
        for start in range(count_parts)
    ]
    kept = {number: vector for number, vector in state.items() if number not in edits}
    return update_index(index, VECTOR_IDS[removed], parts), kept | added


edits_of_a_generation = st.dictionaries(
    st.integers(0, IDS - 1), st.none() | st.integers(0, len(VECTORS) - 1), max_size=40
)


@EVERY
@given(generations=st.lists(st.tuples(edits_of_a_generation, st.integers(1, 3)), max_size=5))
@example(generations=[(dict.fromkeys(range(START)), 1), ({3: 5, 250: 5}, 2), ({3: 6}, 1)])
@settings(max_examples=12, deadline=None)
def test_an_updated_index_answers_like_one_built_afresh(spec, generations):
    index, state = fill(spec, FIRST_STATE), FIRST_STATE
    for edits, count_parts in generations:
        index, state = apply(index, state, edits, count_parts)
        assert template_hash(index) == template_hash(TEMPLATES[spec])
    assert_answers_like_built_afresh(index, spec, state)


@EVERY
def test_generations_go_on_from_files(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(update, "REMOVED_AT_ONCE", 7)
    monkeypatch.setattr(update, "COMPARED_AT_ONCE", 9)
    index, state = fill(spec, FIRST_STATE), FIRST_STATE
    rng = np.random.default_rng(5)
    for generation in range(4):
        removed = dict.fromkeys(rng.choice(IDS, 15, replace=False).tolist())
        changed = dict(zip(rng.choice(IDS, 30).tolist(), rng.integers(120, size=30), strict=True))
        index, state = apply(index, state, removed | changed, 2)
        path = tmp_path / f"{generation}.faiss"
        sha256 = write_index(index, path)
        read = read_index(path, sha256=sha256)
        assert serialized(read) == serialized(index)
        assert_answers_like_built_afresh(read, spec, state)
        index = read


@EVERY
def test_removal_takes_exactly_the_given_ids(spec, monkeypatch):
    monkeypatch.setattr(update, "REMOVED_AT_ONCE", 7)
    monkeypatch.setattr(update, "COMPARED_AT_ONCE", 9)
    index = fill(spec, FIRST_STATE)
    removed = VECTOR_IDS[:START:3]
    removed.flags.writeable = False
    remove_vectors(index, removed)
    state = {number: vector for number, vector in FIRST_STATE.items() if number % 3}
    assert_answers_like_built_afresh(index, spec, state)
    remove_vectors(index, removed[:0])
    assert index.ntotal == len(state)
    remove_vectors(index, stored_ids(index))
    assert index.ntotal == 0
    point = point_of(spec, 8 if spec.nlist else 0)
    assert (search_index(index, QUERIES, 3, point)[1] == -1).all()


@EVERY
def test_refused_removals_change_nothing(spec):
    index = fill(spec, FIRST_STATE)
    before = serialized(index)
    absent = VECTOR_IDS[[4, START, START + 1, 5]]
    first = min(absent[1:3])
    with pytest.raises(ValueError, match=f"2 of 4 vector ids .* not in the index, first {first}"):
        remove_vectors(index, absent)
    with pytest.raises(ValueError, match=f"{VECTOR_IDS[4]} is repeated"):
        remove_vectors(index, VECTOR_IDS[[4, 5, 4]])
    with pytest.raises(ValueError, match="1 of 1 vector ids to remove are not in the index"):
        remove_vectors(empty_clone(index), VECTOR_IDS[:1])
    with pytest.raises(ValueError, match="expected int64"):
        remove_vectors(index, VECTOR_IDS[:3].astype(np.int32))
    with pytest.raises(ValueError, match=r"shape is \(\), expected"):
        remove_vectors(index, np.array(3))
    assert serialized(index) == before


def test_indexes_of_other_kinds_are_refused():
    for refuse in (empty_clone, lambda index: remove_vectors(index, VECTOR_IDS[:0])):
        with pytest.raises(ValueError, match="IndexFlat"):
            refuse(faiss.IndexFlatIP(DIM))


@EVERY
def test_refused_updates_leave_base_and_parts_whole(spec):
    base = fill(spec, FIRST_STATE)
    overlapping, other = fill(spec, {4: 1, 230: 2}), fill(spec, {230: 3})
    before = [serialized(index) for index in (base, overlapping, other)]
    none = VECTOR_IDS[:0]
    with pytest.raises(ValueError, match=f"{VECTOR_IDS[4]} is repeated"):
        update_index(base, none, [overlapping])
    with pytest.raises(ValueError, match=f"{VECTOR_IDS[230]} is repeated"):
        update_index(base, VECTOR_IDS[[4]], [overlapping, other])
    with pytest.raises(ValueError, match="1 of 2 vector ids to remove are not in the index"):
        update_index(base, VECTOR_IDS[[4, 230]], [overlapping])
    with pytest.raises(ValueError, match="is repeated"):
        update_index(base, VECTOR_IDS[[4, 4]], [overlapping])
    for parts in ([other, other], [base]):
        with pytest.raises(ValueError, match="given twice"):
            update_index(base, none, parts)
    assert [serialized(index) for index in (base, overlapping, other)] == before


@EVERY_IVF
def test_parts_of_another_template_are_refused(spec):
    foreign = fill(spec, {230: 2}, template=train_index(spec, SAMPLE, seed=8))
    base = fill(spec, FIRST_STATE)
    with pytest.raises(ValueError, match="part 1 stems from template"):
        update_index(base, VECTOR_IDS[:1], [foreign])
    assert (base.ntotal, foreign.ntotal) == (START, 1)


@EVERY
def test_an_update_works_in_place_and_keeps_nprobe(spec):
    base, part = fill(spec, FIRST_STATE), fill(spec, {4: 9})
    if spec.nlist:
        ivf_of(base).nprobe = 3
    assert update_index(base, VECTOR_IDS[[4]], [part]) is base
    assert (base.ntotal, part.ntotal) == (START, 0)
    assert not spec.nlist or ivf_of(base).nprobe == 3
    before = serialized(base)
    assert serialized(update_index(base, VECTOR_IDS[:0], [])) == before


@EVERY
def test_an_update_splits_a_partition(spec):
    low, high = np.sort(VECTOR_IDS)[[60, 190]].tolist()
    removed, added = [4, 9, 150], {4: 7, 220: 1, 251: 2}
    after = {number: v for number, v in FIRST_STATE.items() if number not in removed} | added
    for bounds in ((None, low), (low, high), (high, None)):
        base, part = fill(spec, FIRST_STATE), fill(spec, added)
        update_index(base, VECTOR_IDS[removed], [part], low=bounds[0], high=bounds[1])
        first, past = bounds[0] or 0, bounds[1] or 2**63
        mine = {n: v for n, v in after.items() if first <= int(VECTOR_IDS[n]) < past}
        assert part.ntotal == 0
        assert_answers_like_built_afresh(base, spec, mine)


def test_ids_outside_the_range_may_be_twice():
    base, part = fill(IVF, FIRST_STATE), fill(IVF, {4: 7, 220: 1})
    high = int(VECTOR_IDS[4])
    update_index(base, VECTOR_IDS[:0], [part], high=high)
    mine = {n: v for n, v in (FIRST_STATE | {220: 1}).items() if VECTOR_IDS[n] < high}
    assert_answers_like_built_afresh(base, IVF, mine)


@EVERY
def test_mapped_indexes_are_not_updated(spec, tmp_path):
    path = tmp_path / "image.faiss"
    sha256 = write_index(fill(spec, FIRST_STATE), path)
    mapped = read_index(path, sha256=sha256, mapped=True)
    for change in (
        lambda: update_index(mapped, VECTOR_IDS[:1], []),
        lambda: update_index(fill(spec, {230: 1}), VECTOR_IDS[:0], [mapped]),
        lambda: remove_vectors(mapped, VECTOR_IDS[:1]),
    ):
        with pytest.raises(ValueError, match="mapped from its file"):
            change()
    assert_answers_like_built_afresh(take_range(mapped, None, None), spec, FIRST_STATE)


@EVERY
def test_an_empty_clone_is_the_template(spec):
    index = fill(spec, FIRST_STATE)
    if spec.nlist:
        ivf_of(index).nprobe = 3
    before = serialized(index)
    clone = empty_clone(index)
    assert serialized(clone) == serialized(TEMPLATES[spec])
    assert template_hash(clone) == template_hash(index)
    assert serialized(index) == before
    del index
    part = fill(spec, {230: 2}, template=clone)
    assert (part.ntotal, clone.ntotal) == (1, 0)
    merged = merge_indexes([fill(spec, FIRST_STATE), part])
    assert_answers_like_built_afresh(merged, spec, FIRST_STATE | {230: 2})


@pytest.mark.parametrize("block_values", [5 * DIM, 2**22])
def test_the_quantization_error_is_the_distance_to_what_is_kept(monkeypatch, block_values):
    monkeypatch.setattr(update, "VALUES_AT_ONCE", block_values)
    sample = unit_rows(53, seed=6)
    centroids = TEMPLATES[IVF].quantizer.reconstruct_n(0, IVF.nlist)
    distances = ((sample[:, None] - centroids) ** 2).sum(axis=2).min(axis=1)
    assert quantization_error(TEMPLATES[IVF], sample) == pytest.approx(distances.mean(), rel=1e-5)
    assert quantization_error(TEMPLATES[FLAT], sample) == 0.0

    index = add_vectors(TEMPLATES[IVF_PQ], np.arange(53), sample)
    expected = quantization_error(TEMPLATES[IVF_PQ], sample)
    assert quantization_error(index, sample) == expected
    index.make_direct_map()
    kept = np.stack([index.reconstruct(number) for number in range(53)])
    assert expected == pytest.approx(((sample - kept) ** 2).sum(axis=1).mean(), rel=1e-5)


def test_rotated_codes_are_decoded_and_others_compared_with_their_centroid():
    sample = unit_rows(53, seed=6)
    index = add_vectors(TEMPLATES[ROTATED], np.arange(53), sample)
    ivf = ivf_of(index)
    ivf.make_direct_map()
    kept = index.chain.at(0).reverse_transform(np.stack([ivf.reconstruct(n) for n in range(53)]))
    expected = ((sample - kept) ** 2).sum(axis=1).mean()
    assert quantization_error(TEMPLATES[ROTATED], sample) == pytest.approx(expected, rel=1e-5)
    assert quantization_error(TEMPLATES[FASTSCAN], sample) > expected
    centroids = TEMPLATES[RABITQ].quantizer.reconstruct_n(0, 8)
    numbers = (sample @ centroids.T).argmax(axis=1)
    expected = ((sample - centroids[numbers]) ** 2).sum(axis=1).mean()
    assert quantization_error(TEMPLATES[RABITQ], sample) == pytest.approx(expected, rel=1e-5)


@EVERY_IVF
def test_vectors_unlike_the_training_sample_raise_the_error(spec):
    narrow = SAMPLE.copy()
    narrow[:, 8:] *= 0.1
    narrow /= np.linalg.norm(narrow, axis=1, keepdims=True)
    template = train_index(spec, narrow, seed=7)
    like, unlike = narrow[:200], np.roll(narrow[:200], 8, axis=1)
    assert quantization_error(template, unlike) > 1.1 * quantization_error(template, like)


def test_bad_samples_are_refused():
    with pytest.raises(ValueError, match="0 rows, at least 1"):
        quantization_error(TEMPLATES[IVF], SAMPLE[:0])
    with pytest.raises(ValueError, match="unit length"):
        quantization_error(TEMPLATES[FLAT], SAMPLE * 2)
    with pytest.raises(ValueError, match=r"expected \(N, 16\)"):
        quantization_error(TEMPLATES[IVF_PQ], np.ascontiguousarray(SAMPLE[:, :8]))


TRAINED = IndexHealth(ntotal=1_000, imbalance=1.2, quantization_error=0.05, intersection_at_10=0.98)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"imbalance": 2.0},
            "The list imbalance is 2, more than 1.5 times the 1.2 at training.",
        ),
        (
            {"quantization_error": 0.07},
            "The quantization error is 0.07, more than 1.25 times the 0.05 at training.",
        ),
        (
            {"intersection_at_10": 0.955},
            "The intersection_at_10 is 0.955, more than 0.02 under the 0.98 at training.",
        ),
        (
            {"ntotal": 2_001},
            "The index holds 2,001 vectors, more than 2 times the 1,000 at training.",
        ),
        (
            {"ntotal": 499},
            "The index holds 499 vectors: the 1,000 at training were more than 2 times as many.",
        ),
    ],
)
def test_every_passed_limit_is_one_sentence(change, sentence):
    now = dataclasses.replace(TRAINED, **change)
    assert find_drift(TRAINED, now, DriftLimits()) == [sentence]


def test_all_limits_count_and_a_limit_that_is_met_is_not_passed():
    worse = IndexHealth(ntotal=9_000, imbalance=3.0, quantization_error=0.2, intersection_at_10=0.5)
    assert len(find_drift(TRAINED, worse, DriftLimits())) == 4
    assert find_drift(TRAINED, TRAINED, DriftLimits()) == []
    strict = DriftLimits(
        max_imbalance_growth=1,
        max_quantization_error_growth=1,
        max_intersection_drop=0,
        max_size_growth=1,
    )
    assert find_drift(TRAINED, TRAINED, strict) == []
    better = IndexHealth(
        ntotal=1_000, imbalance=1.1, quantization_error=0.04, intersection_at_10=1.0
    )
    assert find_drift(TRAINED, better, strict) == []
    at_limits = dataclasses.replace(TRAINED, ntotal=2_000, intersection_at_10=0.96)
    assert find_drift(TRAINED, at_limits, DriftLimits()) == []
    assert find_drift(TRAINED, dataclasses.replace(TRAINED, ntotal=500), DriftLimits()) == []


def test_a_flat_index_drifts_only_in_what_it_finds():
    flat = IndexHealth(ntotal=100, imbalance=1.0, quantization_error=0.0, intersection_at_10=1.0)
    grown = dataclasses.replace(flat, ntotal=900)
    assert find_drift(flat, grown, DriftLimits()) == []
    assert find_drift(grown, flat, DriftLimits()) == []
    broken = dataclasses.replace(grown, intersection_at_10=0.9)
    assert find_drift(flat, broken, DriftLimits()) == [
        "The intersection_at_10 is 0.9, more than 0.02 under the 1 at training."
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_imbalance_growth", 0.99),
        ("max_quantization_error_growth", math.nan),
        ("max_size_growth", math.inf),
        ("max_intersection_drop", -0.01),
        ("max_intersection_drop", 1.01),
        ("max_intersection_drop", math.nan),
    ],
)
def test_limits_out_of_range_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"{key} is {value}"):
        DriftLimits(**{key: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(IndexHealth)])
def test_figures_that_cannot_be_compared_are_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} is {value}"):
        dataclasses.replace(TRAINED, **{key: value})


def test_limits_read_from_text_refuse_unknown_keys():
    adapter = pydantic.TypeAdapter(DriftLimits)
    assert adapter.validate_python({"max_size_growth": 3}) == DriftLimits(max_size_growth=3.0)
    with pytest.raises(pydantic.ValidationError, match="max_size"):
        adapter.validate_python({"max_size": 3})
