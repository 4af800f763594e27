import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexing.choose import HELD_OUT_SHARE, trainable_rows
from indexing.spec import IndexSpec


@pytest.mark.parametrize(
    ("ntotal", "factory"),
    [
        (0, "Flat"),
        (999, "Flat"),
        (1_000, "IVF16,Flat"),
        (9_999, "IVF128,Flat"),
        (10_000, "PCAR256,IVF128,PQ128x4fs,Refine(SQ8)"),
        (100_000, "PCAR256,IVF1024,PQ128x4fs,Refine(SQ8)"),
        (999_999, "PCAR256,IVF4096,PQ128x4fs,Refine(SQ8)"),
        (1_000_000, "PCAR256,IVF16384_HNSW32,PQ128x4fs,Refine(SQ8)"),
        (10_000_000, "PCAR256,IVF65536_HNSW32,PQ128x4fs,Refine(SQ8)"),
        (300_000_000, "PCAR256,IVF131072_HNSW32,PQ128x4fs,Refine(SQ8)"),
    ],
)
def test_steps_without_a_budget(ntotal, factory):
    spec, reasons = IndexSpec.for_catalog(ntotal, 512)
    assert spec.factory == factory
    assert spec.min_training_rows <= (1 - HELD_OUT_SHARE) * ntotal
    fields = [spec.nlist, spec.nlist, spec.coarse == "hnsw", spec.refine != "none"]
    assert len(reasons) == max(1, sum(map(bool, fields)))
    assert all(reason.endswith(".") for reason in reasons)


@pytest.mark.parametrize(
    ("dim", "factory"),
    [
        (768, "PCAR256,IVF256,PQ128x4fs,Refine(SQ8)"),
        (384, "PCAR256,IVF256,PQ128x4fs,Refine(SQ8)"),
        (256, "IVF256,PQ128x4fs,Refine(SQ8)"),
        (63, "PCAR62,IVF256,PQ31x4fs,Refine(SQ8)"),
        (2, "IVF256,PQ1x4fs,Refine(SQ8)"),
        (1, "IVF256,PQ1x4fs,Refine(SQ8)"),
        (40_009, "IVF256,PQ1x4fs,Refine(SQ8)"),  # a prime, and more than there are rows for PCA
    ],
)
def test_any_dim_works(dim, factory):
    assert IndexSpec.for_catalog(20_000, dim)[0].factory == factory


@pytest.mark.parametrize(
    ("bytes_per_vector", "factory"),
    [
        (1_100, "IVF2048,Flat"),
        (1_000, "IVF2048,SQfp16"),
        (500, "IVF2048,SQ8"),
        (250, "IVF2048,PQ128x4fs,Refine(SQ8)"),
        (64, "PCAR180,IVF256,PQ90x4fs,Refine(SQ8)"),
        (24, "PCAR32,IVF256,PQ16x4fs,Refine(SQ8)"),
    ],
)
def test_a_smaller_budget_takes_a_smaller_codec(bytes_per_vector, factory):
    budget = bytes_per_vector * 200_000
    spec, reasons = IndexSpec.for_catalog(200_000, 256, memory_budget_bytes=budget)
    assert spec.factory == factory
    assert spec.memory_bytes(200_000) <= budget
    assert reasons[-1].startswith("Memory: at most")


def test_a_high_target_re_ranks_with_float16():
    high = {"target_intersection": 0.99}
    assert IndexSpec.for_catalog(50_000, 64, **high)[0].refine == "fp16"
    spec, _ = IndexSpec.for_catalog(50_000, 64, memory_budget_bytes=5_000_000, **high)
    assert (spec.codec, spec.refine) == ("sq8", "fp16")


def test_the_re_rank_store_is_said_to_be_on_disk():
    spec, reasons = IndexSpec.for_catalog(1_000_000, 256)
    assert spec.refine_bytes_per_vector == 268
    assert any("memory-mapped from disk: 268.0 MB" in reason for reason in reasons)


@given(
    ntotal=st.integers(0, 10**9) | st.integers(0, 50_000),
    dim=st.integers(1, 600),
    bytes_per_vector=st.floats(1, 3_000),
    target=st.floats(0.01, 1),
    partitions=st.sampled_from([1, 4]),
)
@settings(max_examples=150, deadline=None)
def test_the_budget_holds_or_the_least_that_would_do_is_named(
    ntotal, dim, bytes_per_vector, target, partitions
):
    budget = 1 + int(bytes_per_vector * ntotal)

    def choose(budget):
        return IndexSpec.for_catalog(
            ntotal,
            dim,
            memory_budget_bytes=budget,
            target_intersection=target,
            partitions=partitions,
        )[0]

    try:
        spec = choose(budget)
    except ValueError as error:
        least = int(re.search(r"at least ([\d,]+)", str(error))[1].replace(",", ""))
        assert least > budget
        assert choose(least).memory_bytes(ntotal, partitions=partitions) == least
    else:
        assert spec.memory_bytes(ntotal) <= budget
        assert spec.min_training_rows <= (1 - HELD_OUT_SHARE) * ntotal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ntotal": -1}, "ntotal is -1"),
        ({"dim": 0}, "dim is 0"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes is 0"),
        ({"target_intersection": 0.0}, "target_intersection is 0"),
        ({"target_intersection": 1.1}, "target_intersection is 1.1"),
        ({"memory_budget_bytes": 10_000}, "20,000 vectors of 8 dimensions take at least"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        IndexSpec.for_catalog(**{"ntotal": 20_000, "dim": 8, **arguments})


@pytest.mark.parametrize("ntotal", [1560, 1600, 3120, 6240, 12_480, 24_960, 49_920])
def test_what_is_held_out_leaves_enough_to_train(ntotal):
    """Which rows are held out is drawn: in 300 draws there are always enough of the others."""
    spec, _ = IndexSpec.for_catalog(ntotal, 64)
    held = np.random.default_rng(0).binomial(ntotal, HELD_OUT_SHARE, 300)
    assert ntotal - held.max() >= max(spec.min_training_rows, trainable_rows(ntotal))
