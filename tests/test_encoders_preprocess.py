from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from encoders.encoder import OpenClipEncoder
from encoders.fusion import fuse
from encoders.preprocess import join_tokenizers, load_tokenizer, preprocess_image
from encoders.spec import DEMO_MODEL_CONFIG, PreprocessSpec, context_length
from encoders.towers import build_model

torch.set_num_threads(1)

PHOTOS = Path(__file__).resolve().parents[2] / "shared/data/clothes/images"
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def make_spec(resize_mode="shortest", interpolation="bicubic"):
    return PreprocessSpec(
        size_px=96, resize_mode=resize_mode, interpolation=interpolation, mean=MEAN, std=STD
    )


def make_encoder(spec, model=None, precision="fp32"):
    return OpenClipEncoder(
        model or build_model(DEMO_MODEL_CONFIG, seed=1),
        spec,
        dim=DEMO_MODEL_CONFIG["embed_dim"],
        length_tokens=context_length(DEMO_MODEL_CONFIG),
        fingerprint="test",
        device="cpu",
        precision=precision,
    )


def make_photo(width, height, mode, seed=0):
    """Render a smooth picture with noise: both low and high frequencies."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)
    photo = Image.fromarray(noisy)
    if mode == "RGBA":
        photo.putalpha(Image.fromarray(noisy[:, :, 0]))
        return photo
    return photo.convert(mode)


def open_clip_pixels(image, spec):
    transform = open_clip.image_transform(
        spec.size_px,
        is_train=False,
        mean=spec.mean,
        std=spec.std,
        resize_mode=spec.resize_mode,
        interpolation=spec.interpolation,
        fill_color=spec.fill_color,
    )
    return transform(image)


def measure_cosines(images, spec):
    encoder = make_encoder(spec)
    ours = encoder.encode_images(np.stack([preprocess_image(image, spec) for image in images]))
    theirs = torch.stack([open_clip_pixels(image, spec) for image in images])
    with torch.inference_mode():
        expected = encoder._model.encode_image(theirs, normalize=True).numpy()
    return (ours * expected).sum(axis=1)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_embeddings_equal_those_of_open_clips_transform(resize_mode, interpolation):
    spec = make_spec(resize_mode, interpolation)
    images = [
        make_photo(*size, mode, seed)
        for seed, (size, mode) in enumerate(
            [
                ((640, 480), "RGB"),
                ((333, 500), "RGB"),
                ((96, 96), "RGB"),
                ((40, 31), "RGB"),
                ((97, 201), "L"),
                ((300, 200), "RGBA"),
                ((200, 301), "CMYK"),
                ((150, 120), "P"),
                ((900, 100), "RGB"),
                ((50, 401), "RGB"),
            ]
        )
    ]
    assert measure_cosines(images, spec).min() >= 0.999


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_pixels_are_open_clips_to_the_bit(resize_mode):
    spec = make_spec(resize_mode)
    photo = make_photo(231, 177, "RGB")
    theirs = open_clip_pixels(photo, spec).permute(1, 2, 0).numpy() * STD + MEAN
    np.testing.assert_array_equal(preprocess_image(photo, spec), np.rint(theirs * 255))


def test_embeddings_of_real_photos_equal_those_of_open_clips_transform():
    paths = sorted(PHOTOS.glob("*.jpg"))[:20]
    if not paths:
        pytest.skip("no photos in ../shared/data/clothes/images beside the repository")
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.copy())
    assert measure_cosines(images, make_spec()).min() >= 0.999


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (3, 2)])
def test_extreme_shapes_give_full_size_pixels(resize_mode, size):
    pixels = preprocess_image(Image.new("RGB", size, (9, 80, 200)), make_spec(resize_mode))
    assert pixels.shape == (96, 96, 3)
    assert pixels.dtype == np.uint8
    assert tuple(pixels[47, 47]) == (9, 80, 200)


def test_unknown_resize_mode_is_refused():
    with pytest.raises(ValueError, match="resize_mode"):
        make_spec("crop")


ODD_TEXTS = [
    "",
    "a\0b",
    "lone \ud800 surrogate",
    "\udfff\ud800",
    "pair \ud83d\ude00",
    "日本語 קפה عربى \u202e\u200d",
    "x" * 30_000,
    "red shoe <end_of_text> ignored? &lt;start_of_text&gt;",
    "\n\t ",
]


def test_tokens_of_odd_unicode_are_valid():
    tokens = load_tokenizer(DEMO_MODEL_CONFIG)(ODD_TEXTS)
    assert tokens.dtype == np.int64
    assert tokens.shape == (len(ODD_TEXTS), 32)
    start, end = 49406, 49407
    assert (tokens[:, 0] == start).all()
    assert ((tokens == end).sum(axis=1) == 1).all()
    assert ((tokens == start).sum(axis=1) == 1).all()


def test_tokens_of_plain_text_are_open_clips():
    texts = ["a red shoe", "Crème brûlée &amp; more, size 12"]
    expected = open_clip.get_tokenizer("ViT-B-32")(texts, context_length=32).numpy()
    np.testing.assert_array_equal(load_tokenizer(DEMO_MODEL_CONFIG)(texts), expected)


def test_no_texts_give_no_tokens():
    assert load_tokenizer(DEMO_MODEL_CONFIG)([]).shape == (0, 32)


def test_vectors_are_unit_float32():
    encoder = make_encoder(make_spec())
    pixels = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    images = encoder.encode_images(pixels)
    texts = encoder.encode_texts(load_tokenizer(DEMO_MODEL_CONFIG)(ODD_TEXTS[:3]))
    for vectors in (images, texts, fuse(images, texts, 0.3)):
        assert vectors.shape == (3, encoder.dim)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_batch_is_encoded_in_parts_of_nearly_one_size(monkeypatch):
    torch.set_num_threads(1)
    encoder, sizes = make_encoder(make_spec()), []
    encode = encoder._model.encode_image

    def encode_part(part):
        sizes.append(len(part))
        return encode(part)

    monkeypatch.setattr(encoder._model, "encode_image", encode_part)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 96, 96, 3), dtype=np.uint8)
    found = encoder.encode_images(pixels)
    assert sizes == [13, 12, 12]
    alone = np.concatenate([encoder.encode_images(one[None]) for one in pixels])
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_bf16_stays_close_to_fp32():
    encoder, rough = make_encoder(make_spec()), make_encoder(make_spec(), precision="bf16")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    tokens = load_tokenizer(DEMO_MODEL_CONFIG)(["a shoe", "a hat"])
    both = np.ones(2, bool)
    found = encoder.encode_products(pixels, tokens, both, both)
    for name, rows in rough.encode_products(pixels, tokens, both, both).items():
        assert (found[name] * rows).sum(axis=1).min() > 0.999
        assert (found[name] != rows).any()


def test_wrong_inputs_are_refused():
    encoder = make_encoder(make_spec())
    with pytest.raises(ValueError, match=r"expected \(B, 96, 96, 3\) uint8"):
        encoder.encode_images(np.zeros((1, 3, 96, 96), dtype=np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        encoder.encode_images(np.zeros((1, 96, 96, 3), dtype=np.float32))
    with pytest.raises(ValueError, match=r"expected \(B, 32\) int64"):
        encoder.encode_texts(np.zeros((1, 77), dtype=np.int64))
    with pytest.raises(ValueError, match="needs pixels, tokens, or both"):
        encoder.encode_queries(None, None, image_weight=0.5)
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        make_encoder(make_spec(), precision="fp8")
    with pytest.raises(ValueError, match="vocabulary"):
        encoder.encode_texts(np.full((1, 32), 60_000, dtype=np.int64))


def test_row_without_direction_is_nan_and_the_others_stay():
    encoder = make_encoder(make_spec())
    good = encoder.encode_images(np.zeros((1, 96, 96, 3), dtype=np.uint8))
    opposite = np.concatenate([good, good])
    fused = fuse(opposite, np.concatenate([-good, good]), 0.5)
    assert np.isnan(fused[0]).all()
    np.testing.assert_allclose(fused[1], good[0], atol=1e-6)


def test_empty_batches_give_no_rows():
    encoder = make_encoder(make_spec())
    assert encoder.encode_images(np.zeros((0, 96, 96, 3), dtype=np.uint8)).shape == (0, 128)
    assert encoder.encode_texts(np.zeros((0, 32), dtype=np.int64)).shape == (0, 128)


def test_missing_parts_of_products_are_nan_and_only_wanted_ones_are_made():
    encoder = make_encoder(make_spec())
    pixels = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    tokens = load_tokenizer(DEMO_MODEL_CONFIG)(["a shoe", "", "a hat"])
    has_image, has_text = np.array([True, True, False]), np.array([True, False, False])
    found = encoder.encode_products(pixels, tokens, has_image, has_text)
    np.testing.assert_allclose(found["image"][:2], encoder.encode_images(pixels[:2]), atol=1e-6)
    np.testing.assert_allclose(found["text"][:1], encoder.encode_texts(tokens[:1]), atol=1e-6)
    assert np.isnan(found["image"][2]).all()
    assert np.isnan(found["text"][1:]).all()
    assert list(encoder.encode_products(None, tokens, has_image, has_text)) == ["text"]
    assert list(encoder.encode_products(pixels, None, has_image, has_text)) == ["image"]


def test_query_of_photo_and_words_is_their_fusion():
    encoder = make_encoder(make_spec())
    pixels = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    tokens = load_tokenizer(DEMO_MODEL_CONFIG)(["a shoe", "a hat"])
    images, texts = encoder.encode_images(pixels), encoder.encode_texts(tokens)
    found = encoder.encode_queries(pixels, tokens, image_weight=0.3)
    np.testing.assert_array_equal(found, fuse(images, texts, 0.3))
    np.testing.assert_array_equal(encoder.encode_queries(pixels, None, image_weight=0.3), images)
    np.testing.assert_array_equal(encoder.encode_queries(None, tokens, image_weight=0.3), texts)


def test_equal_texts_of_a_batch_get_equal_vectors():
    encoder = make_encoder(make_spec())
    tokens = load_tokenizer(DEMO_MODEL_CONFIG)(["b", "a", "b", "c", "a"])
    found = encoder.encode_texts(tokens)
    np.testing.assert_array_equal(found[0], found[2])
    for row, one in zip(found, tokens, strict=True):
        np.testing.assert_allclose(row, encoder.encode_texts(one[None])[0], atol=1e-6)


def test_joined_tokenizers_put_their_tokens_side_by_side():
    short = load_tokenizer({"text_cfg": {"context_length": 5}})
    both = join_tokenizers(short, load_tokenizer(DEMO_MODEL_CONFIG))
    tokens = both(["a red shoe", ""])
    np.testing.assert_array_equal(tokens[:, :5], short(["a red shoe", ""]))
    assert tokens.shape == (2, 37)
    assert both([]).shape == (0, 37)
