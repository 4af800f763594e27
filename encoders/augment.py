"""Augment street photos for training; every draw comes from the caller's generator."""

import math

import numpy as np
import torch
from torchvision.transforms.v2 import functional as pixel_ops

from encoders.spec import UInt8Array

# Usual ranges of image-text training, wider in scale: a product fills any part of a street photo.
_SCALE = (0.4, 1.0)
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_JITTER = 0.3
_MAX_BLUR_SIGMA = 1.5
_BLUR_SHARE = 0.2


def augment_photo(pixels: UInt8Array, size_px: int, random: np.random.Generator) -> UInt8Array:
    """Crop, flip, recolour and sometimes blur a photo.

    Args:
        pixels: (H, W, 3) uint8, best somewhat larger than `size_px`.
        size_px: Side of the result.
        random: Decides everything drawn.

    Returns:
        (size_px, size_px, 3) uint8.
    """
    image = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)
    top, left, height, width = _draw_crop(image.shape[1], image.shape[2], random)
    image = pixel_ops.resized_crop(
        image, top, left, height, width, [size_px, size_px], antialias=True
    )
    if random.random() < 0.5:
        image = pixel_ops.horizontal_flip(image)
    for adjust in (
        pixel_ops.adjust_brightness,
        pixel_ops.adjust_contrast,
        pixel_ops.adjust_saturation,
    ):
        image = adjust(image, float(random.uniform(1 - _JITTER, 1 + _JITTER)))
    if random.random() < _BLUR_SHARE:
        sigma = float(random.uniform(0.1, _MAX_BLUR_SIGMA))
        image = pixel_ops.gaussian_blur(image, [5, 5], [sigma, sigma])
    found: UInt8Array = image.permute(1, 2, 0).contiguous().numpy()
    return found


def _draw_crop(
    height_px: int, width_px: int, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a part of the picture as (top, left, height, width) pixels."""
    area = height_px * width_px * random.uniform(*_SCALE)
    ratio = math.exp(random.uniform(*_LOG_RATIO))
    width = min(width_px, max(1, round(math.sqrt(area * ratio))))
    height = min(height_px, max(1, round(math.sqrt(area / ratio))))
    top = int(random.integers(height_px - height + 1))
    left = int(random.integers(width_px - width + 1))
    return top, left, height, width
