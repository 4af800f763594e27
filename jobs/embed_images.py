"""Fetched bytes to the pixels of a batch, as an encoder wants them.

Letters: B rows of a batch, H W pixels.
"""

import numpy as np
import numpy.typing as npt

from encoders.spec import PreprocessSpec
from jobs.images import ImageRejected, ImagesConfig, decode_image

Fault = ImageRejected | None


def decode_images(
    fetched: dict[int, bytes | ImageRejected],
    contents: npt.NDArray[np.int64],
    images: ImagesConfig,
    preprocess: PreprocessSpec,
) -> tuple[npt.NDArray[np.uint8], list[Fault]]:
    """Decode the images of a batch, equal ones once.

    Args:
        fetched: Row in the batch to the image's bytes, or why there are none.
        contents: (B,) int64 hashes of the bytes.
        images: Limits.
        preprocess: What the encoder wants.

    Returns:
        (B, H, W, 3) uint8, zeros where there is none; and what is wrong with each row's image.
    """
    side = preprocess.size_px
    pixels = np.zeros((len(contents), side, side, 3), np.uint8)
    faults: list[Fault] = [None] * len(contents)
    first: dict[int, int] = {}
    for place, data in fetched.items():
        before = place
        if isinstance(data, bytes):
            before = first.setdefault(int(contents[place]), place)
        if before != place:
            pixels[place], faults[place] = pixels[before], faults[before]
            continue
        try:
            pixels[place] = load_pixels(data, images, preprocess)
        except ImageRejected as reject:
            faults[place] = reject
    return pixels, faults


def load_pixels(
    data: bytes | ImageRejected, images: ImagesConfig, preprocess: PreprocessSpec
) -> npt.NDArray[np.uint8]:
    """Decode one fetched image into (H, W, 3) uint8 as the encoder wants it.

    Raises:
        ImageRejected: It was not fetched, or can't be decoded.
    """
    from encoders.preprocess import preprocess_image

    if isinstance(data, ImageRejected):
        raise data
    image = decode_image(data, images, min_side_px=2 * preprocess.size_px)
    return preprocess_image(image, preprocess)
