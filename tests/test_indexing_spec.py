from functools import cache
from typing import get_args

import faiss
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexing.spec import Codec, IndexSpec, Refine, check_unit_rows

DIM = 32
ROWS = 6_000
NLIST = 16
CODECS = {codec: {} for codec in get_args(Codec)} | {
    "pq": {"pq_m": 16},
    "pqfs": {"pq_m": 16},
}
EACH_CODEC = [
    IndexSpec(dim=DIM, nlist=NLIST, codec=codec, **fields) for codec, fields in CODECS.items()
]
WITH_ROTATION = [
    IndexSpec(dim=DIM, nlist=NLIST, rotation="pca", rotated_dim=24, codec="sq8"),
    IndexSpec(dim=DIM, nlist=NLIST, rotation="pca", rotated_dim=30, codec="pqfs", pq_m=15),
    IndexSpec(dim=DIM, nlist=128, coarse="hnsw", codec="fp16"),
]


@st.composite
def specs(draw):
    dim = draw(st.integers(1, 64))
    if draw(st.integers(0, 9)) == 0:
        return IndexSpec(dim=dim)
    codec = draw(st.sampled_from(get_args(Codec)))
    is_pq = codec in ("pq", "pqfs")
    rotation = draw(st.sampled_from(["none", "pca", "opq"] if is_pq else ["none", "pca"]))
    rotated_dim = draw(st.integers(0, dim)) if rotation != "none" else 0
    inner_dim = rotated_dim or dim
    divisors = [m for m in range(1, inner_dim + 1) if inner_dim % m == 0]
    return IndexSpec(
        dim=dim,
        nlist=draw(st.integers(1, 5_000)),
        coarse=draw(st.sampled_from(["flat", "hnsw"])),
        rotation=rotation,
        rotated_dim=rotated_dim,
        codec=codec,
        pq_m=draw(st.sampled_from(divisors)) if is_pq else 0,
        pq_nbits=draw(st.integers(0, 8)) if codec == "pq" else 0,
        refine=draw(st.sampled_from(get_args(Refine))),
    )


def unit_rows(count, dim):
    rows = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@cache
def file_bytes(spec):
    rows = unit_rows(ROWS, spec.dim)
    if spec.nlist:
        index = faiss.index_factory(spec.dim, spec.base_factory, faiss.METRIC_INNER_PRODUCT)
        ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
        ivf.cp.niter = 2
        if hasattr(ivf, "pq"):
            ivf.pq.cp.niter = 1
    else:
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(spec.dim))
    index.train(rows[:3_000])
    index.add_with_ids(rows, np.arange(ROWS))
    return faiss.serialize_index(index).size


@given(specs())
@settings(max_examples=200, deadline=None)
def test_every_spec_is_read_back_from_its_factory_string(spec):
    assert IndexSpec.parse(spec.factory, spec.dim) == spec
    base = IndexSpec.parse(spec.base_factory, spec.dim)
    assert base.refine == "none"
    assert base.base_factory == spec.base_factory


@given(specs())
@settings(max_examples=60, deadline=None)
def test_faiss_builds_every_spec_with_codes_of_that_size(spec):
    index = faiss.index_factory(spec.dim, spec.base_factory, faiss.METRIC_INNER_PRODUCT)
    if not spec.nlist:
        assert index.code_size == spec.code_bytes
        return
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    assert ivf.d == spec.inner_dim
    assert ivf.nlist == spec.nlist
    assert ivf.code_size == spec.code_bytes
    assert isinstance(ivf, faiss.IndexIVFFastScan) == spec.is_fastscan


@pytest.mark.parametrize(
    ("factory", "fields"),
    [
        ("Flat", {}),
        ("IVF64,Flat", {"nlist": 64}),
        ("IVF64_HNSW32,SQ8", {"nlist": 64, "coarse": "hnsw", "codec": "sq8"}),
        ("IVF64_HNSW,SQ6", {"nlist": 64, "coarse": "hnsw", "codec": "sq6"}),
        ("IVF64,PQ16", {"nlist": 64, "codec": "pq", "pq_m": 16, "pq_nbits": 8}),
        ("IVF64,PQ16np", {"nlist": 64, "codec": "pq", "pq_m": 16, "pq_nbits": 8}),
        ("IVF64,PQ32x6np", {"nlist": 64, "codec": "pq", "pq_m": 32, "pq_nbits": 6}),
        ("IVF64,PQ32x4fs", {"nlist": 64, "codec": "pqfs", "pq_m": 32, "pq_nbits": 4}),
        ("PCA16,IVF64,SQ4", {"nlist": 64, "rotation": "pca", "rotated_dim": 16, "codec": "sq4"}),
        (
            "PCAR16, IVF64, RaBitQ",
            {"nlist": 64, "rotation": "pca", "rotated_dim": 16} | {"codec": "rabitq"},
        ),
        (
            "OPQ16_32,IVF64,PQ16",
            {"nlist": 64, "rotation": "opq", "rotated_dim": 32, "codec": "pq"} | {"pq_m": 16},
        ),
        ("OPQ16,IVF64,PQ16", {"nlist": 64, "rotation": "opq", "codec": "pq", "pq_m": 16}),
        ("IVF64,RaBitQfs,Refine(SQfp16)", {"nlist": 64, "codec": "rabitqfs", "refine": "fp16"}),
        ("IVF64,SQfp16,Refine(SQ8)", {"nlist": 64, "codec": "fp16", "refine": "sq8"}),
    ],
)
def test_parse(factory, fields):
    assert IndexSpec.parse(factory, 64) == IndexSpec(dim=64, **fields)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("", "found '', understood here: IVF1024"),
        ("HNSW32", "found 'HNSW32'"),
        ("Flat,Refine(SQ8)", "found 'Flat'"),
        ("IVF64", "found '', understood here: Flat"),
        ("IVF0,Flat", "found 'IVF0'"),
        ("IVF64_HNSW16,SQ8", "found 'IVF64_HNSW16', understood here: .*HNSW32"),
        ("PCAR0,IVF64,SQ8", "found 'PCAR0'"),
        ("IVF64,SQ5", "found 'SQ5', understood here: Flat, SQfp16"),
        ("IVF64,PQ16x8fs", "FastScan codes have 4"),
        ("IVF64,PQ16x12np", "pq_nbits is 12"),
        ("IVF64,PQ48np", "does not divide dim 64"),
        ("PCAR128,IVF64,SQ8", "rotated_dim is 128, more than dim 64"),
        ("OPQ8_32,IVF64,PQ16np", "OPQ8 is learned for another PQ"),
        ("OPQ8_32,IVF64,SQ8", "rotation is opq with codec sq8"),
        ("IVF64,SQ8,RFlat", r"found 'RFlat', understood here: nothing, Refine\(SQfp16\)"),
        ("IVF64,SQ8,Refine(SQ8),Flat", r"found 'Refine\(SQ8\),Flat'"),
    ],
)
def test_parse_says_what_it_found(factory, message):
    with pytest.raises(ValueError, match=message):
        IndexSpec.parse(factory, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"nlist": -1}, "nlist is -1"),
        ({"codec": "sq8"}, "codec is sq8 without lists"),
        ({"refine": "sq8"}, "refine is sq8 without lists"),
        ({"coarse": "hnsw"}, "coarse is hnsw without lists"),
        ({"nlist": 4, "codec": "sq5"}, "codec is 'sq5': one of flat, fp16"),
        ({"nlist": 4, "rotated_dim": 4}, "rotated_dim is 4 without a rotation"),
        ({"nlist": 4, "rotation": "pca", "rotated_dim": 9}, "more than dim 8"),
        ({"nlist": 4, "rotation": "opq"}, "rotation is opq with codec flat"),
        ({"nlist": 4, "pq_m": 4}, "pq_m is 4 with codec flat"),
        ({"nlist": 4, "pq_nbits": 4}, "pq_nbits is 4 with codec flat"),
        ({"nlist": 4, "codec": "pq"}, "codec is pq without pq_m"),
        ({"nlist": 4, "codec": "pq", "pq_m": -2}, "pq_m is -2"),
        ({"nlist": 4, "codec": "pqfs", "pq_m": 3}, "pq_m 3 does not divide dim 8"),
        (
            {"nlist": 4, "codec": "pq", "pq_m": 4, "rotation": "pca", "rotated_dim": 6},
            "pq_m 4 does not divide rotated_dim 6",
        ),
        ({"nlist": 4, "codec": "pq", "pq_m": 4, "pq_nbits": 9}, "pq_nbits is 9"),
        ({"nlist": 4, "codec": "pqfs", "pq_m": 4, "pq_nbits": 8}, "FastScan codes have 4"),
    ],
)
def test_impossible_specs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        IndexSpec(**{"dim": 8, **fields})


def test_what_zero_stands_for_is_filled_in():
    pca = IndexSpec(dim=8, nlist=4, rotation="pca")
    assert pca == IndexSpec(dim=8, nlist=4, rotation="pca", rotated_dim=8)
    fastscan = IndexSpec(dim=8, nlist=4, codec="pqfs", pq_m=4)
    assert fastscan == IndexSpec(dim=8, nlist=4, codec="pqfs", pq_m=4, pq_nbits=4)


def test_pydantic_refuses_unknown_keys():
    adapter = pydantic.TypeAdapter(IndexSpec)
    fields = {"dim": 8, "nlist": 4, "codec": "pq", "pq_m": 4}
    assert adapter.validate_python(fields) == IndexSpec(**fields)
    with pytest.raises(pydantic.ValidationError, match="nprobe"):
        adapter.validate_python({"dim": 8, "nprobe": 4})


@pytest.mark.parametrize(
    ("factory", "rows"),
    [
        ("Flat", 0),
        ("IVF64,SQ8", 39 * 64),
        ("IVF4,PQ4np", 39 * 256),
        ("IVF4,PQ4x4fs", 39 * 16),
        ("OPQ4_8,IVF4,PQ4x4fs", 39 * 16),
        ("OPQ4_8,IVF4,PQ4np", 39 * 256),
        ("PCAR8,IVF4,SQ8", 512),
    ],
)
def test_min_training_rows(factory, rows):
    assert IndexSpec.parse(factory, 512 if "PCA" in factory else 8).min_training_rows == rows


@pytest.mark.parametrize("spec", EACH_CODEC + WITH_ROTATION, ids=lambda spec: spec.factory)
def test_memory_is_that_of_the_file_and_a_little_more(spec):
    beside = 2_048 + spec.nlist * (200 if spec.coarse == "hnsw" else 160)
    tails = 4_096 * spec.nlist if spec.is_fastscan else 0
    padding = 31 * spec.code_bytes * spec.nlist if spec.is_fastscan else 0
    excess = spec.memory_bytes(ROWS) - file_bytes(spec)
    assert 0 <= excess <= beside + tails + padding
    assert excess - tails <= 0.06 * file_bytes(spec)


def test_memory_of_a_flat_index_counts_its_map_of_ids():
    spec = IndexSpec(dim=DIM)
    assert spec.memory_bytes(ROWS) == pytest.approx(file_bytes(spec) + 48 * ROWS, rel=0.01)


def test_memory_of_fastscan_holds_its_blocks_and_powers_of_two():
    spec = IndexSpec(dim=64, nlist=64, codec="pqfs", pq_m=32)
    rows = unit_rows(20_000, 64)
    index = faiss.index_factory(64, spec.base_factory, faiss.METRIC_INNER_PRODUCT)
    index.train(rows[:3_000])
    index.add_with_ids(rows, np.arange(len(rows)))
    lists = [index.invlists.list_size(number) for number in range(64)]
    blocks = [-(-size // 32) * 32 * spec.code_bytes for size in lists]
    allocated = [max(256, 1 << (size - 1).bit_length()) for size in blocks]
    resident = sum(min(a, b + 4_096) for a, b in zip(allocated, blocks, strict=True))
    assert spec.memory_bytes(len(rows)) >= spec.fixed_bytes + 8 * len(rows) + resident


def test_refine_bytes():
    spec = IndexSpec(dim=32, nlist=4, codec="pqfs", pq_m=16)
    assert spec.refine_bytes_per_vector == 0
    assert IndexSpec.parse("IVF4,SQ8,Refine(SQ8)", 32).refine_bytes_per_vector == 32 + 4 + 8
    assert IndexSpec.parse("IVF4,SQ8,Refine(SQfp16)", 32).refine_bytes_per_vector == 64 + 8


def test_mappable():
    mappable = {spec.codec for spec in EACH_CODEC if spec.is_mappable}
    assert mappable == set(CODECS) - {"pqfs", "rabitqfs"}
    assert IndexSpec(dim=8).is_mappable


@pytest.mark.parametrize("factory", ["Flat", "PCAR32,IVF64_HNSW32,SQ8", "IVF64,PQ32x4fs"])
def test_partitions_share_one_quantizer(factory):
    spec, shared = IndexSpec.parse(factory, 64), 0
    if spec.nlist:
        shared = spec.nlist * (4 * spec.inner_dim + (288 if spec.coarse == "hnsw" else 0))
    assert spec.memory_bytes(500, partitions=1) == spec.memory_bytes(500)
    parts = spec.memory_bytes(2_000, partitions=4)
    assert parts == 4 * spec.memory_bytes(500) - 3 * shared
    assert spec.memory_bytes(1_999, partitions=4) <= parts
    with pytest.raises(ValueError, match="partitions is 0"):
        spec.memory_bytes(500, partitions=0)


def test_training_estimates_follow_the_formulas():
    flat = IndexSpec(dim=8)
    assert flat.training_bytes(100) == 100 * 8 * 4
    assert flat.training_gflops(100) == 0
    spec = IndexSpec(dim=128, nlist=256)
    assert spec.training_gflops(60_000) == 2 * 60_000 * 256 * 128 * 10 / 1e9
    assert spec.training_gflops(10**6) == spec.training_gflops(256 * 256)
    assert spec.training_bytes(60_000) >= 60_000 * 128 * 4
    for dearer in ("PCAR64,IVF256,Flat", "IVF256,PQ32np", "IVF256_HNSW32,Flat"):
        assert IndexSpec.parse(dearer, 128).training_bytes(60_000) >= spec.training_bytes(60_000)
    fast = IndexSpec.parse("IVF256,PQ64x4fs", 128).training_gflops(70_000)
    slow = IndexSpec.parse("IVF256,PQ32np", 128).training_gflops(70_000)
    opq = IndexSpec.parse("OPQ32,IVF256,PQ32np", 128)
    assert fast < slow < opq.training_gflops(70_000)
    codebooks = 2 * 65_536 * 256 * 128 * (40 + 9 * 4 + 10)
    turns = 10 * (4 * 65_536 * 128 * 128 + 20 * 128**3)
    extra = (codebooks + turns + 2 * 70_000 * 128 * 128) / 1e9
    assert opq.training_gflops(70_000) - slow == pytest.approx(extra)
    pca = IndexSpec.parse("PCAR128,IVF256,Flat", 128)
    extra = (2 * 60_000 * 128 * 128 + 4 * 64 * 128 * 128 * 128 + 9 * 128**3) / 1e9
    assert pca.training_gflops(60_000) - spec.training_gflops(60_000) == pytest.approx(extra)


def test_rows_are_checked():
    rows = np.eye(4, dtype=np.float32)
    check_unit_rows(rows, dim=4, name="rows")
    check_unit_rows(rows[:0], dim=4, name="rows")
    with pytest.raises(ValueError, match=r"shape is \(4, 4\)"):
        check_unit_rows(rows, dim=5, name="rows")
    with pytest.raises(ValueError, match="dtype is float64"):
        check_unit_rows(rows.astype(np.float64), dim=4, name="rows")
    rows[2] *= 1.01
    with pytest.raises(ValueError, match=r"unit length \(1 of 4 rows, first row 2\)"):
        check_unit_rows(rows, dim=4, name="rows")


def test_float16_rounding_stays_within_unit_length():
    rows = unit_rows(500, 512)
    check_unit_rows(rows.astype(np.float16).astype(np.float32), dim=512, name="rows")
