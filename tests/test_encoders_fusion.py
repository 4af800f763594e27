import numpy as np
import pytest

from encoders.fusion import FusionSpec, fuse, fuse_products


def make_units(rows, seed, dim=4):
    units = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return units / np.linalg.norm(units, axis=1, keepdims=True)


def test_fused_rows_are_the_normalised_weighted_sum():
    image, text = make_units(5, 0), make_units(5, 1)
    expected = 0.3 * image.astype(np.float64) + 0.7 * text
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = fuse(image, text, 0.3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(fuse_products(FusionSpec(), image, text, 0.3), found)
    np.testing.assert_allclose(fuse(image, text, 1.0), image, atol=1e-6)
    np.testing.assert_allclose(fuse(image, text, 0.0), text, atol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_sum_takes_the_part_that_is_there(weight):
    image, text = make_units(4, 0), make_units(4, 1)
    image[1], text[2], image[3], text[3] = np.nan, np.nan, np.nan, np.nan
    found = fuse_products(FusionSpec(), image, text, weight)
    np.testing.assert_allclose(np.linalg.norm(found[:3], axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(found[1], text[1])
    np.testing.assert_array_equal(found[2], image[2])
    assert np.isnan(found[3]).all()


@pytest.mark.filterwarnings("error")
def test_parts_that_cancel_out_give_nan():
    image = make_units(2, 0)
    found = fuse(image, np.stack([-image[0], image[1]]), 0.5)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], image[1], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_alpha_concat_is_a_weighted_sum_of_two_cosines(alpha):
    image, text, words, clip = (make_units(6, seed) for seed in range(4))
    spec = FusionSpec(kind="alpha_concat")
    products = fuse_products(spec, image, text, alpha)
    assert products.shape == (6, spec.field_dim("multimodal", 4))
    query = np.concatenate([words, clip], axis=1) / np.sqrt(2)
    cosines = (1 - alpha) * (words * text).sum(1) + alpha * (clip * image).sum(1)
    expected = cosines / np.sqrt(2 * ((1 - alpha) ** 2 + alpha**2))
    np.testing.assert_allclose((query * products).sum(1), expected, atol=1e-6)


def test_plain_concat_has_no_weight():
    image, text = make_units(3, 0), make_units(3, 1)
    spec = FusionSpec(kind="concat", image_weight=0.1)
    expected = np.concatenate([text, image], axis=1) / np.sqrt(2)
    for weight in (0.0, 0.1, 1.0):
        np.testing.assert_allclose(fuse_products(spec, image, text, weight), expected, atol=1e-6)


def test_rows_that_lack_all_are_nan_in_a_concatenation():
    image, text = make_units(2, 0), make_units(2, 1)
    image[0] = text[0] = np.nan
    found = fuse_products(FusionSpec(kind="alpha_concat"), image, text, 0.5)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def test_no_rows_stay_no_rows():
    nothing = np.zeros((0, 4), np.float32)
    assert fuse(nothing, nothing, 0.5).shape == (0, 4)
    assert fuse_products(FusionSpec(), nothing, nothing, 0.5).shape == (0, 4)
    assert fuse_products(FusionSpec(kind="concat"), nothing, nothing, 0.5).shape == (0, 8)


def test_wrong_inputs_are_refused():
    image = make_units(2, 0)
    with pytest.raises(ValueError, match="expected the same"):
        fuse(image, make_units(3, 0), 0.5)
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            fuse(image, image, weight)
        with pytest.raises(ValueError, match="image_weight"):
            FusionSpec(image_weight=weight)
    with pytest.raises(ValueError, match="query_image_weight"):
        FusionSpec(query_image_weight=2.0)
    with pytest.raises(ValueError, match="fusion is 'beta'"):
        FusionSpec(kind="beta")
    with pytest.raises(ValueError, match="by its encoder"):
        fuse_products(FusionSpec(kind="mlp"), image, image, 0.5)


@pytest.mark.parametrize(
    ("kind", "fields", "stored", "dim"),
    [
        ("sum", ("image", "text", "multimodal"), ("image", "text"), 8),
        ("concat", ("multimodal",), ("image", "text"), 16),
        ("alpha_concat", ("multimodal",), ("image", "text"), 16),
        ("mlp", ("multimodal",), ("multimodal",), 8),
    ],
)
def test_fields_columns_and_dimensions(kind, fields, stored, dim):
    spec = FusionSpec(kind=kind)
    assert spec.fields == fields
    assert spec.columns(("multimodal",)) == stored
    assert spec.field_dim("multimodal", 8) == dim
    assert spec.field_dim("image", 8) == 8
    assert spec.weighted == (kind in ("sum", "alpha_concat"))


def test_only_the_wanted_vectors_are_stored():
    assert FusionSpec().columns(("text",)) == ("text",)
    assert FusionSpec().columns(("text", "image")) == ("image", "text")
