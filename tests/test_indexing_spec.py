import numpy as np
import pydantic
import pytest

from indexing.spec import IndexSpec, check_unit_rows


@pytest.mark.parametrize(
    ("spec", "factory", "bytes_per_vector", "min_training_rows"),
    [
        (IndexSpec(dim=8), "Flat", 40, 0),
        (IndexSpec(dim=8, nlist=64), "IVF64,Flat", 40, 39 * 64),
        (IndexSpec(dim=256, nlist=512, pq_m=128), "IVF512,PQ128np", 136, 39 * 512),
        (IndexSpec(dim=8, nlist=4, pq_m=4), "IVF4,PQ4np", 12, 39 * 256),
        (IndexSpec(dim=8, nlist=4, pq_m=4, pq_nbits=4), "IVF4,PQ4x4np", 10, 39 * 16),
    ],
)
def test_derived_numbers(spec, factory, bytes_per_vector, min_training_rows):
    assert spec.factory == factory
    assert spec.bytes_per_vector == bytes_per_vector
    assert spec.min_training_rows == min_training_rows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 8, "nlist": -1}, "nlist is -1"),
        ({"dim": 8, "nlist": 4, "pq_m": -2}, "pq_m is -2"),
        ({"dim": 8, "nlist": 4, "pq_m": 3}, "does not divide"),
        ({"dim": 8, "pq_m": 4}, "without lists"),
        ({"dim": 8, "nlist": 4, "pq_m": 4, "pq_nbits": 9}, "pq_nbits is 9"),
        ({"dim": 8, "nlist": 4, "pq_m": 4, "pq_nbits": 0}, "pq_nbits is 0"),
    ],
)
def test_impossible_specs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        IndexSpec(**fields)


def test_pydantic_refuses_unknown_keys():
    adapter = pydantic.TypeAdapter(IndexSpec)
    assert adapter.validate_python({"dim": 8, "nlist": 4}) == IndexSpec(dim=8, nlist=4)
    with pytest.raises(pydantic.ValidationError, match="nprobe"):
        adapter.validate_python({"dim": 8, "nprobe": 4})


@pytest.mark.parametrize(
    ("ntotal", "factory"),
    [
        (0, "Flat"),
        (999, "Flat"),
        (1_000, "IVF16,Flat"),
        (9_983, "IVF128,Flat"),
        (9_984, "IVF256,PQ256np"),
        (100_000, "IVF1024,PQ256np"),
        (999_999, "IVF4096,PQ256np"),
        (1_000_000, "IVF16384,PQ256np"),
        (10_000_000, "IVF65536,PQ256np"),
        (300_000_000, "IVF131072,PQ256np"),
    ],
)
def test_for_catalog_steps(ntotal, factory):
    spec, reasons = IndexSpec.for_catalog(ntotal, 512)
    assert spec.factory == factory
    assert spec.min_training_rows <= ntotal
    assert len(reasons) == (2 if spec.nlist else 1)
    assert all(reason.endswith(".") for reason in reasons)


@pytest.mark.parametrize(("dim", "pq_m"), [(512, 256), (15, 15), (7, 7), (1, 1)])
def test_for_catalog_takes_any_dim(dim, pq_m):
    assert IndexSpec.for_catalog(20_000, dim)[0].pq_m == pq_m


def test_for_catalog_refuses_nonsense():
    with pytest.raises(ValueError, match="ntotal"):
        IndexSpec.for_catalog(-1, 8)
    with pytest.raises(ValueError, match="dim"):
        IndexSpec.for_catalog(20_000, 0)


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
    rows = np.random.default_rng(0).standard_normal((500, 512)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    check_unit_rows(rows.astype(np.float16).astype(np.float32), dim=512, name="rows")
