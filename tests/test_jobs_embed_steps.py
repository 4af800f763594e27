"""What decoding for the encoder may cost: scaled JPEG decoding against the full one."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from encoders.checkpoint import create_checkpoint, load_encoder
from encoders.preprocess import preprocess_image
from encoders.spec import EncoderSpec
from jobs.embed_steps import load_pixels
from jobs.images import ImagesConfig, decode_image


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
