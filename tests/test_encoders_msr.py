import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoders.checkpoint import (
    build_checkpoint_model,
    load_encoder,
    load_model,
    load_tokenizers,
    save_checkpoint,
    wrap_model,
)
from encoders.checkpoint_files import CheckpointConfig
from encoders.fusion import FusionSpec, fuse_products
from encoders.msr import MsrModel
from encoders.spec import PreprocessSpec
from encoders.towers import build_model

torch.set_num_threads(1)

TEXT = {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
BI_TEXT = TEXT | {"context_length": 4, "vocab_size": 32}
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
CLIP = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
PREPROCESS = PreprocessSpec(
    size_px=32,
    resize_mode="squash",
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.3, 0.3, 0.3),
)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
HAS_IMAGE = np.array([True, True, False, False])
HAS_TEXT = np.array([True, False, True, False])
CASES = [
    (preset, kind) for preset in ("msr3", "msr4") for kind in ("concat", "alpha_concat", "mlp")
]


def make_config(preset, kind, image_weight=0.3):
    return CheckpointConfig(
        model_config=CLIP,
        preprocess=PREPROCESS,
        fusion=FusionSpec(kind=kind, image_weight=image_weight),
        text_config=BI_TEXT if preset == "msr4" else None,
    )


def make_encoder(preset, kind, seed=3):
    """Build an encoder of random weights, its learned fusion among them."""
    config = make_config(preset, kind)
    model = build_checkpoint_model(config, seed=seed)
    if model.mlp is not None:
        with torch.no_grad():
            torch.manual_seed(0)
            model.mlp[2].weight.normal_(std=0.1)
    return (
        model,
        config,
        wrap_model(model, config, fingerprint="test", device="cpu", precision="fp32"),
    )


def make_tokens(preset, side, rows=4):
    rng = np.random.default_rng(7)
    clip, text = rng.integers(1, 64, (rows, 6)), rng.integers(1, 32, (rows, 4))
    if preset == "msr3":
        return clip
    return text if side == "product" else np.concatenate([text, clip], axis=1)


def fuse_found(encoder, found):
    if encoder.fusion.kind == "mlp":
        return found["multimodal"]
    weight = encoder.fusion.image_weight
    return fuse_products(encoder.fusion, found["image"], found["text"], weight)


@pytest.mark.parametrize(("preset", "kind"), CASES)
def test_saved_encoder_gives_the_same_vectors(tmp_path, preset, kind):
    model, config, encoder = make_encoder(preset, kind)
    saved = save_checkpoint(model, config, tmp_path)
    loaded = load_encoder(tmp_path, device="cpu", precision="fp32", expected_fingerprint=saved)
    assert (loaded.fusion, loaded.dim) == (encoder.fusion, config.dim)
    tokens = make_tokens(preset, "product")
    first = encoder.encode_products(PIXELS, tokens, HAS_IMAGE, HAS_TEXT)
    second = loaded.encode_products(PIXELS, tokens, HAS_IMAGE, HAS_TEXT)
    assert tuple(first) == tuple(second) == encoder.fusion.columns(("multimodal",))
    for name, rows in first.items():
        np.testing.assert_array_equal(rows, second[name])
    words = make_tokens(preset, "query")
    np.testing.assert_array_equal(
        encoder.encode_queries(None, words, image_weight=0.5),
        loaded.encode_queries(None, words, image_weight=0.5),
    )


@pytest.mark.parametrize(("preset", "kind"), CASES)
def test_dimensions_are_those_of_the_config(preset, kind):
    model, config, encoder = make_encoder(preset, kind)
    assert config.dim == (32 if (preset, kind) == ("msr4", "mlp") else 16)
    wide = config.fusion.field_dim("multimodal", config.dim)
    assert wide == model.fused_dim
    there = np.ones(4, bool)
    found = encoder.encode_products(PIXELS, make_tokens(preset, "product"), there, there)
    for rows in found.values():
        assert rows.shape == (4, config.dim)
    for vectors in (
        fuse_found(encoder, found),
        encoder.encode_queries(PIXELS, None, image_weight=1.0),
        encoder.encode_queries(None, make_tokens(preset, "query"), image_weight=0.0),
        encoder.encode_queries(PIXELS, make_tokens(preset, "query"), image_weight=0.4),
    ):
        assert vectors.shape == (4, wide)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("preset", "kind"), CASES)
def test_missing_part_is_the_learned_vector_and_a_row_of_nothing_is_nan(preset, kind):
    model, _, encoder = make_encoder(preset, kind)
    found = encoder.encode_products(PIXELS, make_tokens(preset, "product"), HAS_IMAGE, HAS_TEXT)
    for rows in found.values():
        assert np.isfinite(rows[:3]).all()
        assert np.isnan(rows[3]).all()
        np.testing.assert_allclose(np.linalg.norm(rows[:3], axis=1), 1, atol=1e-5)
    if kind != "mlp":
        no_text, no_image = (
            F.normalize(vector.detach(), dim=0).numpy()
            for vector in (model.missing_text, model.missing_image)
        )
        np.testing.assert_allclose(found["text"][1], no_text, atol=1e-6)
        np.testing.assert_allclose(found["image"][2], no_image, atol=1e-6)


@pytest.mark.parametrize(("preset", "kind"), CASES)
def test_what_a_row_lacks_may_hold_anything(preset, kind):
    encoder = make_encoder(preset, kind)[2]
    tokens, other_pixels = make_tokens(preset, "product"), PIXELS.copy()
    other_tokens = tokens.copy()
    other_pixels[~HAS_IMAGE], other_tokens[~HAS_TEXT] = 255, 0
    first = encoder.encode_products(PIXELS, tokens, HAS_IMAGE, HAS_TEXT)
    second = encoder.encode_products(other_pixels, other_tokens, HAS_IMAGE, HAS_TEXT)
    for name, rows in first.items():
        np.testing.assert_allclose(rows, second[name], atol=1e-6)


def test_parts_that_are_not_wanted_are_missing():
    encoder = make_encoder("msr3", "mlp")[2]
    tokens = make_tokens("msr3", "product")
    there = np.ones(4, bool)
    words = encoder.encode_products(None, tokens, there, HAS_TEXT)["multimodal"]
    expected = encoder.encode_products(PIXELS, tokens, ~there, HAS_TEXT)["multimodal"]
    np.testing.assert_allclose(words, expected, atol=1e-6)
    assert np.isnan(words[~HAS_TEXT]).all()


@pytest.mark.parametrize(("preset", "kind"), CASES)
def test_stored_vectors_fuse_as_in_training(preset, kind):
    model, config, encoder = make_encoder(preset, kind)
    tokens = make_tokens(preset, "product")
    found = encoder.encode_products(PIXELS, tokens, HAS_IMAGE, HAS_TEXT)
    pixels = (torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255 - 0.5) / 0.3
    masks = torch.from_numpy(HAS_IMAGE), torch.from_numpy(HAS_TEXT)
    with torch.inference_mode():
        text, image = model.train().encode_parts(pixels, torch.from_numpy(tokens), *masks)
        expected = model.fuse(text, image, config.fusion.image_weight).numpy()
    np.testing.assert_allclose(fuse_found(encoder, found)[:3], expected[:3], atol=1e-5)


@pytest.mark.parametrize("preset", ["msr3", "msr4"])
def test_alpha_concat_scores_are_the_weighted_sum_of_cosines(preset):
    model, _, encoder = make_encoder(preset, "alpha_concat")
    there = np.ones(4, bool)
    found = encoder.encode_products(PIXELS, make_tokens(preset, "product"), there, there)
    words = make_tokens(preset, "query")
    queries = encoder.encode_queries(None, words, image_weight=0.0)
    with torch.inference_mode():
        if preset == "msr3":
            text = clip = F.normalize(model.clip.encode_text(torch.from_numpy(words)), dim=-1)
        else:
            text = F.normalize(model.text(torch.from_numpy(words[:, :4])), dim=-1)
            clip = F.normalize(model.clip.encode_text(torch.from_numpy(words[:, 4:])), dim=-1)
    weight = encoder.fusion.image_weight
    cosines = (1 - weight) * text.numpy() @ found["text"].T
    cosines = cosines + weight * clip.numpy() @ found["image"].T
    expected = cosines / np.sqrt(2 * ((1 - weight) ** 2 + weight**2))
    np.testing.assert_allclose(queries @ fuse_found(encoder, found).T, expected, atol=1e-5)


@pytest.mark.parametrize("preset", ["msr3", "msr4"])
def test_untrained_mlp_is_the_plain_fusion(preset):
    model = build_checkpoint_model(make_config(preset, "mlp"))
    text, image = (F.normalize(torch.randn(3, 16), dim=-1) for _ in range(2))
    plain = text + image if preset == "msr3" else torch.cat([text, image], dim=1)
    torch.testing.assert_close(model.fuse(text, image, 0.9), F.normalize(plain, dim=-1))


def test_msr4_has_a_tower_of_its_own_and_msr3_has_not():
    three, four = (
        build_checkpoint_model(make_config(preset, "mlp")) for preset in ("msr3", "msr4")
    )
    assert three.text is None
    own = {parameter.data_ptr() for parameter in four.text.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in four.clip.parameters())


def test_same_seed_builds_the_same_model():
    first, second = (build_checkpoint_model(make_config("msr4", "mlp"), seed=5) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_photos_are_products_without_a_text():
    encoder = make_encoder("msr4", "mlp")[2]
    there = np.ones(4, bool)
    expected = encoder.encode_products(PIXELS, None, there, ~there)["multimodal"]
    found = encoder.encode_queries(PIXELS, None, image_weight=1.0)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("preset", "kind"), CASES)
def test_empty_batches_give_no_rows(preset, kind):
    config, encoder = make_encoder(preset, kind)[1:]
    nothing = np.zeros(0, bool)
    tokens = make_tokens(preset, "product", 0)
    found = encoder.encode_products(PIXELS[:0], tokens, nothing, nothing)
    assert all(rows.shape == (0, config.dim) for rows in found.values())
    wide = config.fusion.field_dim("multimodal", config.dim)
    words = make_tokens(preset, "query", 0)
    assert encoder.encode_queries(None, words, image_weight=0.0).shape == (0, wide)
    assert encoder.encode_queries(PIXELS[:0], words, image_weight=0.5).shape == (0, wide)


def test_wrong_inputs_are_refused():
    encoder = make_encoder("msr4", "concat")[2]
    there = np.ones(4, bool)
    with pytest.raises(ValueError, match="needs pixels, tokens, or both"):
        encoder.encode_queries(None, None, image_weight=0.5)
    with pytest.raises(ValueError, match=r"expected \(B, 10\) int64"):
        encoder.encode_queries(None, make_tokens("msr4", "product"), image_weight=0.0)
    with pytest.raises(ValueError, match=r"expected \(B, 4\) int64"):
        encoder.encode_products(PIXELS, make_tokens("msr4", "query"), there, there)
    swapped = np.concatenate([np.full((4, 4), 40), np.full((4, 6), 40)], axis=1)
    with pytest.raises(ValueError, match="vocabulary has 32"):
        encoder.encode_queries(None, swapped, image_weight=0.0)
    with pytest.raises(ValueError, match="uint8"):
        encoder.encode_products(PIXELS.astype(np.int64), None, there, there)
    with pytest.raises(ValueError, match="for msr"):
        MsrModel(build_model(CLIP), 16, "sum")


def test_tokenizers_of_the_two_roles():
    config = make_config("msr4", "mlp")
    full = {"text_cfg": TEXT | {"vocab_size": 49408}}
    tokenizers = load_tokenizers(
        CheckpointConfig(
            model_config=config.model_config | full,
            preprocess=PREPROCESS,
            fusion=config.fusion,
            text_config=BI_TEXT,
        )
    )
    texts = ["red shoe", ""]
    query, product = tokenizers.query(texts), tokenizers.product(texts)
    assert (query.shape, product.shape) == ((2, 10), (2, 4))
    np.testing.assert_array_equal(query[:, :4], product)


def test_weights_of_another_preset_are_refused(tmp_path):
    model, config, _ = make_encoder("msr3", "concat")
    other = make_config("msr4", "concat")
    save_checkpoint(model, other, tmp_path)
    assert config.text_config is None
    with pytest.raises(ValueError, match=r"missing text\."):
        load_model(tmp_path)
