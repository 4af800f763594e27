import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from jobs.images import ImageRejected, ImagesConfig, RejectReason, decode_image

CONFIG = ImagesConfig()


def encode(image, format_name, **options):
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def reject(data, config=CONFIG):
    with pytest.raises(ImageRejected) as caught:
        decode_image(data, config)
    assert "\n" not in caught.value.detail
    return caught.value.reason


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    idat = b"\x00\x00\x00\x00IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + chunk + idat


SOUND = {
    name: encode(noise(24, 16), name)
    for name in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
    + (("AVIF",) if features.check("avif") else ())
}


@pytest.mark.parametrize("name", SOUND)
def test_every_format_gives_rgb(name):
    image = decode_image(SOUND[name], CONFIG)
    assert (image.mode, image.size) == ("RGB", (24, 16))


def test_transparency_is_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encode(clear, "PNG"), CONFIG).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encode(clear.convert("LA"), "PNG"), CONFIG).getpixel((0, 0))[0] == 255
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 1), 1)
    image = decode_image(encode(palette, "PNG", transparency=0), CONFIG)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (0, 0, 200)


def test_cmyk_one_bit_and_first_frame():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, _ = decode_image(encode(cmyk, "JPEG"), CONFIG).getpixel((4, 4))
    assert red > 240
    assert green < 15
    assert decode_image(encode(Image.new("1", (4, 4), 1), "PNG"), CONFIG).getpixel((0, 0))[0] == 255
    frames = [Image.new("RGB", (4, 4), color) for color in ("lime", "blue")]
    for name in ("GIF", "WEBP"):
        options = {"lossless": True} if name == "WEBP" else {}
        data = encode(frames[0], name, save_all=True, append_images=frames[1:], **options)
        assert decode_image(data, CONFIG).getpixel((0, 0)) == (0, 255, 0)


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(name):
    grey = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    image = decode_image(encode(grey, name), CONFIG)
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation(name, orientation):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))  # left half
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(encode(image, name, exif=exif), CONFIG)
    if orientation == 6:  # a quarter turn clockwise: left becomes top
        assert upright.size == (16, 32)
        bright, dark = upright.getpixel((8, 4)), upright.getpixel((8, 28))
    else:
        bright, dark = upright.getpixel((28, 8)), upright.getpixel((4, 8))
    assert bright[0] > 240
    assert dark[0] < 15


def test_min_side_shrinks_jpeg_but_not_below():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(noise(800, 400), "JPEG", exif=exif)
    assert decode_image(data, CONFIG, min_side_px=100).size == (100, 200)
    assert decode_image(data, CONFIG, min_side_px=101).size == (200, 400)
    assert decode_image(data, CONFIG, min_side_px=4000).size == (400, 800)
    assert decode_image(encode(noise(80, 40), "PNG"), CONFIG, min_side_px=5).size == (80, 40)
    with pytest.raises(ValueError, match="min_side_px"):
        decode_image(data, CONFIG, min_side_px=0)


def test_reasons():
    assert reject(b"") == RejectReason.EMPTY_FILE
    assert reject(b"<!doctype html><title>404</title>") == RejectReason.NOT_AN_IMAGE
    assert reject(b"%!PS-Adobe-3.0 EPSF-3.0\n") == RejectReason.NOT_AN_IMAGE
    assert reject(png_header(60_000, 60_000)) == RejectReason.TOO_MANY_PIXELS
    assert reject(png_header(12_000, 12_000)) == RejectReason.TOO_MANY_PIXELS
    small = ImagesConfig(max_pixels=24 * 16 - 1)
    assert reject(SOUND["JPEG"], small) == RejectReason.TOO_MANY_PIXELS
    floats = Image.fromarray(np.zeros((4, 4), dtype=np.float32))
    assert reject(encode(floats, "TIFF")) == RejectReason.UNDECODABLE
    broken = bytearray(SOUND["PNG"])
    broken[60:90] = b"\xff" * 30
    assert reject(bytes(broken)) == RejectReason.UNDECODABLE


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_truncated(name, share):
    data = encode(noise(64, 64), name)
    assert reject(data[: int(len(data) * share)]) == RejectReason.TRUNCATED


def test_rejected_pickles_and_only_two_reasons_are_transient():
    rejected = pickle.loads(pickle.dumps(ImageRejected(RejectReason.TIMEOUT, "a\n b")))
    assert (rejected.reason, rejected.detail) == (RejectReason.TIMEOUT, "a b")
    assert str(rejected) == "timeout: a b"
    assert {reason.value for reason in RejectReason if reason.transient} == {
        "timeout",
        "unreachable",
    }
    assert RejectReason.TIMEOUT.kind == "transient"
    assert RejectReason.NOT_FOUND.kind == "permanent"


@pytest.mark.parametrize(
    "options",
    [
        {"max_bytes": 0},
        {"timeout_s": 0.0},
        {"max_pixels": 10**9},
        {"http_hosts": ("https://a",)},
        {"http_hosts": ("*",)},
    ],
)
def test_config_refuses(options):
    with pytest.raises(ValueError, match="images"):
        ImagesConfig(**options)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_corrupt_bytes_give_rgb_or_a_reason(data):
    damaged = bytearray(SOUND[data.draw(st.sampled_from(sorted(SOUND)))])
    flips = st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(flips, max_size=8)):
        damaged[position] = value
    cut = data.draw(st.integers(0, len(damaged)))
    try:
        side = data.draw(st.sampled_from([None, 4]))
        config = ImagesConfig(max_pixels=1_000_000)
        image = decode_image(bytes(damaged[:cut]), config, min_side_px=side)
    except ImageRejected:
        return
    assert image.mode == "RGB"
