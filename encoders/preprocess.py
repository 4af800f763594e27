"""From a decoded picture to uint8 pixels, and from text to tokens, on the CPU.

This module imports neither torch nor open_clip, so that decode tasks stay light;
`load_tokenizer` imports open_clip when it is called.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from encoders.spec import (
    Int64Array,
    ModelConfig,
    PreprocessSpec,
    UInt8Array,
    context_length,
    first_line,
)

TokenizeTexts = Callable[[Sequence[str]], Int64Array]
"""From B texts to (B, L) int64 tokens."""

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
# Beyond this aspect ratio only the part that the crop keeps is resized: a strip of
# 1 x 10,000 pixels would else become 224 x 2,240,000.
_MAX_FULL_RESIZE_RATIO = 4
_MAX_CHARS_PER_TOKEN = 32
_MAX_CACHED_WORDS = 200_000
_CONTROL_TOKEN = re.compile("(start|end)_of_text", re.IGNORECASE)


def preprocess_image(image: Image.Image, spec: PreprocessSpec) -> UInt8Array:
    """Resize and crop a picture as open_clip's inference transform does.

    The order is open_clip's too: the picture is resized in its own mode, then converted to
    RGB. Turn it by its EXIF orientation and flatten its transparency before, if wanted.

    Args:
        image: A decoded picture of any mode and size.
        spec: The model's preprocessing.

    Returns:
        (H, W, 3) uint8 in [0, 255], H = W = spec.size_px; not normalised.

    Raises:
        ValueError: The picture has no pixels, or PIL can't resize or convert its mode.
    """
    if image.width < 1 or image.height < 1:
        raise ValueError(f"picture of {image.width} x {image.height} pixels")
    if spec.resize_mode == "squash":
        square = image.resize((spec.size_px, spec.size_px), _RESAMPLING[spec.interpolation])
    elif spec.resize_mode == "longest":
        square = _fit_and_pad(image, spec)
    else:
        square = _fill_and_crop(image, spec)
    return np.array(square.convert("RGB"), dtype=np.uint8)


def _fill_and_crop(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """Resize the shorter side to the target, and cut the centre out of the longer one."""
    size_px, resampling = spec.size_px, _RESAMPLING[spec.interpolation]
    shorter_px = min(image.size)
    width_px, height_px = (int(size_px * side_px / shorter_px) for side_px in image.size)
    # Python's round, to the even number, as in torchvision's center_crop.
    left_px, top_px = round((width_px - size_px) / 2), round((height_px - size_px) / 2)
    if max(width_px, height_px) <= _MAX_FULL_RESIZE_RATIO * size_px:
        resized = image.resize((width_px, height_px), resampling)
        return resized.crop((left_px, top_px, left_px + size_px, top_px + size_px))
    x_scale, y_scale = image.width / width_px, image.height / height_px
    box = (
        left_px * x_scale,
        top_px * y_scale,
        min((left_px + size_px) * x_scale, image.width),
        min((top_px + size_px) * y_scale, image.height),
    )
    return image.resize((size_px, size_px), resampling, box=box)


def _fit_and_pad(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """Resize the longer side to the target, and pad the shorter one on both sides."""
    ratio = max(image.size) / spec.size_px
    width_px, height_px = (max(1, round(side_px / ratio)) for side_px in image.size)
    resized = image.resize((width_px, height_px), _RESAMPLING[spec.interpolation])
    x_px, y_px = spec.size_px - width_px, spec.size_px - height_px
    border = (x_px // 2, y_px // 2, (x_px + 1) // 2, (y_px + 1) // 2)
    channels = len(resized.getbands())
    fill = spec.fill_color if channels == 1 else (spec.fill_color,) * channels
    return ImageOps.expand(resized, border=border, fill=fill)


class Tokenizer:
    """Turn any texts into one model's tokens; see `load_tokenizer`."""

    def __init__(self, tokenize: Callable[[list[str]], Any], length_tokens: int) -> None:
        """Wrap a tokenizer of open_clip that pads and cuts to `length_tokens`."""
        self._tokenize = tokenize
        self._length_tokens = length_tokens
        self._first_cache = dict(getattr(tokenize, "cache", {}))

    def __call__(self, texts: Sequence[str]) -> Int64Array:
        """Tokenize texts, whatever they hold; a text too long is cut.

        Args:
            texts: B texts. Lone surrogates become U+FFFD, NULs become spaces, and the names
                of the control tokens are taken apart, so that a title can't end itself early.

        Returns:
            (B, L) int64.
        """
        if not texts:
            return np.zeros((0, self._length_tokens), dtype=np.int64)
        self._forget_words()
        max_chars = _MAX_CHARS_PER_TOKEN * self._length_tokens
        tokens = self._tokenize([_clean_text(text, max_chars) for text in texts])
        return np.asarray(tokens, dtype=np.int64)

    def _forget_words(self) -> None:
        """Bound open_clip's cache of words, which else grows with the catalog."""
        cache: dict[str, str] | None = getattr(self._tokenize, "cache", None)
        if cache is not None and len(cache) > _MAX_CACHED_WORDS:
            cache.clear()
            cache.update(self._first_cache)


def _clean_text(text: str, max_chars: int) -> str:
    """Make a text valid Unicode, of one line, without control tokens, of bounded length."""
    valid = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    one_line = " ".join(valid.replace("\0", " ").split())
    return _CONTROL_TOKEN.sub(r"\1 of text", one_line)[:max_chars]


def load_tokenizer(model_config: ModelConfig) -> Tokenizer:
    """Load the tokenizer that an open_clip model config names.

    A config with `hf_tokenizer_name` needs the transformers package, and that tokenizer's
    files in the local cache or a network; all others need nothing beyond open_clip.

    Args:
        model_config: An open_clip model config.

    Returns:
        A callable from B texts to (B, L) int64 tokens.

    Raises:
        ValueError: The tokenizer can't be loaded, or masks tokens at random.
    """
    from open_clip import tokenizer as open_clip_tokenizer

    text_config = model_config["text_cfg"]
    length_tokens = context_length(model_config)
    options = dict(text_config.get("tokenizer_kwargs") or {})
    if options.get("reduction_mask") in ("simple", "random", "shuffle"):
        raise ValueError(
            f"the tokenizer drops tokens at random (reduction_mask: {options['reduction_mask']}):"
            " the same text would get other vectors; remove it from the model config"
        )
    name = text_config.get("hf_tokenizer_name")
    if not name:
        simple = open_clip_tokenizer.SimpleTokenizer(context_length=length_tokens, **options)
        return Tokenizer(simple, length_tokens)
    mode = text_config.get("tokenizer_mode")
    try:
        hub = open_clip_tokenizer.HFTokenizer(
            name, context_length=length_tokens, tokenizer_mode=mode, **options
        )
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"can't load the tokenizer {name}: {first_line(error)}") from error
    return Tokenizer(hub, length_tokens)


def join_tokenizers(first: TokenizeTexts, second: TokenizeTexts) -> TokenizeTexts:
    """Return a tokenizer whose rows are the first one's tokens, then the second one's."""
    return lambda texts: np.concatenate([first(texts), second(texts)], axis=1)
