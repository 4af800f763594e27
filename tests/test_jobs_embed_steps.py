"""What decoding for the encoder may cost, and which rows can be live."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from encoders.checkpoint import load_encoder
from encoders.create import create_checkpoint
from encoders.fusion import FusionSpec
from encoders.preprocess import preprocess_image
from encoders.spec import EncoderSpec, PreprocessSpec
from jobs.embed_steps import judge_row, load_pixels
from jobs.embed_write import gather_rows
from jobs.images import ImageRejected, ImagesConfig, RejectReason, decode_image
from jobs.space import VectorSpace


def large_photo(seed, size):
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 255, (40, 60, 3), np.uint8)).resize(size)
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        x, y = random.integers(0, size[0]), random.integers(0, size[1])
        color = tuple(int(c) for c in random.integers(0, 255, 3))
        draw.rectangle((x, y, x + 150, y + 90), fill=color)
    buffer = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(1)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1200, 900), (2000, 3000), (4000, 1000)])
def test_scaled_decoding_keeps_the_embedding(size, tmp_path):
    create_checkpoint(EncoderSpec(architecture="vitrine-tiny", pretrained="random"), tmp_path)
    encoder = load_encoder(tmp_path)
    data, config = large_photo(1, size), ImagesConfig()
    fast = load_pixels(data, config, encoder.preprocess)
    full = preprocess_image(decode_image(data, config), encoder.preprocess)
    noise = np.square(fast.astype(float) - full).mean()
    assert 10 * np.log10(255**2 / max(noise, 1e-9)) > 35  # PSNR in dB
    vectors = encoder.encode_images(np.stack([fast, full]))
    assert float(vectors[0] @ vectors[1]) > 0.999


def make_space(*fields):
    preprocess = PreprocessSpec(
        size_px=8, resize_mode="squash", interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3
    )
    return VectorSpace(
        encoder="e", dim=4, preprocess=preprocess, fusion=FusionSpec(), fields=fields
    )


@pytest.mark.parametrize(
    ("fields", "image", "text", "rejected", "reason"),
    [
        (("multimodal",), None, None, False, None),
        (("multimodal",), "truncated", None, False, "truncated"),
        (("multimodal",), None, "text_too_long", False, "text_too_long"),
        (("multimodal",), "truncated", "empty_text", True, "truncated"),
        (("multimodal",), "timeout", None, True, "timeout"),
        (("multimodal",), "timeout", "empty_text", True, "timeout"),
        (("image", "multimodal"), "truncated", None, True, "truncated"),
        (("image", "multimodal"), None, "empty_text", False, "empty_text"),
        (("text", "multimodal"), "truncated", None, False, "truncated"),
        (("text", "multimodal"), "timeout", None, True, "timeout"),
        (("text", "multimodal"), None, "empty_text", True, "empty_text"),
        (("image", "text"), "truncated", "empty_text", True, "empty_text"),
        (("image",), None, "empty_text", False, None),
        (("image",), "truncated", None, True, "truncated"),
        (("text",), "missing_image", None, False, None),
        (("text",), "missing_image", "empty_text", True, "empty_text"),
    ],
)
def test_what_a_row_may_lack(fields, image, text, rejected, reason):
    faults = [name and ImageRejected(RejectReason(name), "why") for name in (image, text)]
    found, fault = judge_row(make_space(*fields), *faults)
    assert (found, fault and str(fault.reason)) == (rejected, reason)


def test_recipe_names_what_is_stored_and_required_alone():
    recipe = make_space("image", "text").recipe
    assert make_space("text", "image", "multimodal").recipe == recipe
    others = [("image",), ("text",), ("multimodal",), ("image", "multimodal")]
    assert len({make_space(*fields).recipe for fields in others} | {recipe}) == 5


@pytest.mark.parametrize("most", [1, 4, 7, 18, 50])
def test_batches_become_files_of_so_many_rows(most):
    ends = [0, 3, 3, 8, 9, 18]
    batches = [
        {
            "vector_id": np.arange(*part),
            "reject_reason": np.array([""] * (part[1] - part[0]), object),
        }
        for part in itertools.pairwise(ends)
    ]
    found = list(gather_rows(batches, most))
    sizes = [len(batch["vector_id"]) for batch in found]
    assert set(sizes[:-1]) <= {most}
    assert 0 < sizes[-1] <= most
    assert np.concatenate([batch["vector_id"] for batch in found]).tolist() == list(range(18))
    assert all(len(batch["reject_reason"]) == n for batch, n in zip(found, sizes, strict=True))
    assert list(gather_rows([], most)) == []
