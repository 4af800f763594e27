import hashlib

import faiss
import numpy as np
import pytest

from indexing import refine
from indexing.refine import (
    decode_refine,
    encode_refine,
    kept_blocks,
    open_refine,
    refine_code_bytes,
    stored_blocks,
    write_refine,
)

DIM = 24
KINDS = ["fp16", "sq8"]
ROWS = 90
LOWEST = np.finfo(np.float32).min


def unit_rows(count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


VECTORS = unit_rows(ROWS, seed=1)
IDS = np.random.default_rng(2).permutation(2**62 + 3 * np.arange(ROWS))
ORDER = np.argsort(IDS)
QUERIES = unit_rows(7, seed=3)


def blocks_of(kind, rows, size=8):
    """Ids and codes of some rows, in blocks; a list can be iterated twice."""
    return [
        (IDS[rows[start : start + size]], encode_refine(kind, VECTORS[rows[start : start + size]]))
        for start in range(0, len(rows), size)
    ]


def make_store(folder, kind, parts, count=ROWS):
    path = folder / "image.refine"
    sha256 = write_refine(path, kind=kind, dim=DIM, parts=parts, count=count)
    return open_refine(path, kind=kind, dim=DIM, sha256=sha256)


@pytest.mark.parametrize(("kind", "step"), [("fp16", 2**-11), ("sq8", 1 / 254)])
def test_codes_keep_vectors_to_within_a_step(kind, step):
    codes = encode_refine(kind, VECTORS)
    assert codes.dtype == np.uint8
    assert codes.shape == (ROWS, refine_code_bytes(kind, DIM))
    largest = np.abs(VECTORS).max(axis=1, keepdims=True)
    assert (np.abs(decode_refine(kind, codes) - VECTORS) <= 1.01 * step * largest).all()
    np.testing.assert_array_equal(encode_refine(kind, VECTORS[40:50]), codes[40:50])
    assert encode_refine(kind, VECTORS[:0]).shape == (0, refine_code_bytes(kind, DIM))


def test_float16_is_decoded_to_the_bit():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    decoded = decode_refine("fp16", halves[:, None].view(np.uint8))[:, 0]
    np.testing.assert_array_equal(decoded.view(np.int32), halves.astype("f4").view(np.int32))


def test_many_queries_are_scored_alike_by_any_threads(tmp_path, monkeypatch):
    store = make_store(tmp_path, "sq8", [blocks_of("sq8", np.arange(ROWS))])
    ids = IDS[np.random.default_rng(4).integers(0, ROWS, (7, 5))]
    whole = store.scores(QUERIES, ids)
    monkeypatch.setattr(refine, "IDS_AT_ONCE", 10)
    for threads in (1, 3):
        monkeypatch.setattr(faiss, "omp_get_max_threads", lambda count=threads: count)
        np.testing.assert_array_equal(store.scores(QUERIES, ids), whole)
        with pytest.raises(ValueError, match="vector id 5 is not in the refine store"):
            store.scores(QUERIES, np.where(ids == ids[6, 4], 5, ids))
    np.testing.assert_array_equal(
        store.vectors(ids[0]),
        decode_refine("sq8", encode_refine("sq8", VECTORS))[
            [np.flatnonzero(one == IDS)[0] for one in ids[0]]
        ],
    )


def test_what_cannot_be_encoded_is_refused():
    assert refine_code_bytes("none", DIM) == 0
    with pytest.raises(ValueError, match="refine is none"):
        encode_refine("none", VECTORS)
    with pytest.raises(ValueError, match="NaN or Inf"):
        encode_refine("sq8", VECTORS * np.float32(np.nan))
    with pytest.raises(ValueError, match="unit length"):
        encode_refine("fp16", VECTORS * 2)
    with pytest.raises(ValueError, match=r"expected \(N, D\)"):
        encode_refine("fp16", VECTORS[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_ids_then_the_codes_in_the_order_of_the_ids(kind, tmp_path):
    parts = [blocks_of(kind, np.arange(50)), [], blocks_of(kind, np.arange(50, ROWS), size=3)]
    path = tmp_path / "image.refine"
    sha256 = write_refine(path, kind, DIM, parts, ROWS)
    content = path.read_bytes()
    assert sha256 == hashlib.sha256(content).hexdigest()
    codes = encode_refine(kind, VECTORS)
    assert content == IDS[ORDER].astype("<i8").tobytes() + codes[ORDER].tobytes()
    assert [file.name for file in tmp_path.iterdir()] == ["image.refine"]
    moved = path.rename(tmp_path / "moved.refine")
    store = open_refine(moved, kind=kind, dim=DIM, sha256=sha256)
    assert isinstance(store.codes, np.memmap)
    np.testing.assert_array_equal(store.ids, IDS[ORDER])
    np.testing.assert_array_equal(store.codes, codes[ORDER])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_values", [3 * 5 * DIM, 2**17])
def test_scores_are_inner_products_with_what_is_stored(kind, block_values, tmp_path, monkeypatch):
    monkeypatch.setattr(refine, "VALUES_AT_ONCE", block_values)
    store = make_store(tmp_path, kind, [blocks_of(kind, np.arange(ROWS))])
    rows = np.random.default_rng(4).integers(0, ROWS, (7, 5))
    ids = IDS[rows]
    ids[2, 3:] = ids[6] = -1
    kept = decode_refine(kind, encode_refine(kind, VECTORS))
    expected = np.einsum("qkd,qd->qk", kept[rows], QUERIES)
    expected[ids == -1] = LOWEST
    scores = store.scores(QUERIES, ids)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    assert store.scores(QUERIES[:0], ids[:0]).shape == (0, 5)
    assert store.scores(QUERIES, ids[:, :0]).shape == (7, 0)
    ids[0, 0] += 1
    with pytest.raises(ValueError, match=f"vector id {ids[0, 0]} is not in the refine store"):
        store.scores(QUERIES, ids)
    with pytest.raises(ValueError, match="expected"):
        store.scores(QUERIES, ids[:3])
    with pytest.raises(ValueError, match="queries have 23 dimensions"):
        store.scores(QUERIES[:, 1:], ids)


def test_an_empty_store_has_no_id(tmp_path):
    store = make_store(tmp_path, "sq8", [], count=0)
    assert len(store.ids) == 0
    assert (store.scores(QUERIES, np.full((7, 2), -1)) == LOWEST).all()
    with pytest.raises(ValueError, match="vector id 5 is not"):
        store.scores(QUERIES, np.full((7, 2), 5))
    assert list(stored_blocks(store)) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_bytes", [300, 2**24])
def test_an_updated_store_is_one_written_afresh(kind, block_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(refine, "BLOCK_BYTES", block_bytes)
    old = make_store(tmp_path, kind, [blocks_of(kind, np.arange(70))], count=70)
    changed = [3, 8, 69]
    low, high = np.sort(IDS)[[10, 80]].tolist()
    kept = [n for n in range(70) if n not in changed and low <= IDS[n] < high]
    new = [n for n in [*changed, *range(70, ROWS)] if low <= IDS[n] < high]
    removed = np.append(IDS[changed], 2**61)
    for bounds in ((low, high), (low, None), (None, 2**63), (None, None)):
        rows = np.concatenate([ids for ids, _ in kept_blocks(old, removed, *bounds)])
        assert len(kept_blocks(old, removed, *bounds)) == len(rows)
        first, past = bounds[0] or 0, bounds[1] or 2**63
        assert sorted(rows) == sorted(
            IDS[n] for n in range(70) if n not in changed and first <= int(IDS[n]) < past
        )
    parts = [kept_blocks(old, removed, low=low, high=high), blocks_of(kind, np.array(new))]
    digests = [
        write_refine(tmp_path / name, kind=kind, dim=DIM, parts=chosen, count=len(kept + new))
        for name, chosen in (
            ("updated", parts),
            ("afresh", [blocks_of(kind, np.array(kept + new))]),
        )
    ]
    assert digests[0] == digests[1]
    copied = write_refine(tmp_path / "copied", kind, DIM, [stored_blocks(old)], 70)
    assert copied == hashlib.sha256((tmp_path / "image.refine").read_bytes()).hexdigest()


def test_bad_parts_leave_no_file_and_the_old_one_whole(tmp_path):
    path = tmp_path / "image.refine"
    good = blocks_of("sq8", np.arange(ROWS))
    sha256 = write_refine(path, "sq8", DIM, [good], ROWS)
    ids, codes = good[0]
    cases = [
        ([good, good[:1]], ROWS + 8, f"{min(ids)} is repeated"),
        ([good], ROWS + 1, f"hold {ROWS} vectors, expected {ROWS + 1}"),
        ([good], ROWS - 1, f"hold {ROWS} vectors, expected {ROWS - 1}"),
        ([[(-ids, codes)]], 8, "is negative"),
        ([[(ids.astype(np.int32), codes)]], 8, "expected int64"),
        ([[(ids, codes[:, 1:])]], 8, r"expected uint8 \(8, 28\)"),
        ([[(ids, codes.view(np.int8))]], 8, "expected uint8"),
        ([iter(good)], ROWS, "the second time, expected 90"),
    ]
    for parts, count, message in cases:
        with pytest.raises(ValueError, match=message):
            write_refine(path, "sq8", DIM, parts, count)
    with pytest.raises(ValueError, match="refine is none"):
        write_refine(path, "none", DIM, [good], ROWS)
    assert [file.name for file in tmp_path.iterdir()] == ["image.refine"]
    assert len(open_refine(path, kind="sq8", dim=DIM, sha256=sha256).ids) == ROWS


def test_changed_files_and_other_kinds_are_refused(tmp_path):
    path = tmp_path / "image.refine"
    sha256 = write_refine(path, "sq8", DIM, [blocks_of("sq8", np.arange(ROWS))], ROWS)
    with pytest.raises(ValueError, match="isn't made of fp16 rows of 24 dimensions"):
        open_refine(path, kind="fp16", dim=DIM, sha256=sha256)
    with pytest.raises(ValueError, match="isn't made of none rows"):
        open_refine(path, kind="none", dim=DIM, sha256=sha256)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    for changed in (content[:-1], b"", bytes(flipped)):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="is corrupted"):
            open_refine(path, kind="sq8", dim=DIM, sha256=sha256)
    with pytest.raises(FileNotFoundError):
        open_refine(tmp_path / "absent", kind="sq8", dim=DIM, sha256=sha256)
