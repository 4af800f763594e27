"""What an encoder is made from, as plain frozen dataclasses: no torch here.

Letters in every docstring of this package: B batch, D dimension of the embedding,
H W pixels, L tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
ModelConfig = dict[str, Any]

RANDOM = "random"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
DEMO_ARCHITECTURE = "vitrine-tiny"

# Trains from scratch on rendered 96-px products on two CPU cores in minutes. A convolutional
# tower: colour, texture and outline are local, and a ViT learns them only with far more steps.
DEMO_MODEL_CONFIG: ModelConfig = {
    "embed_dim": 128,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 96},
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 128,
        "heads": 4,
        "layers": 2,
    },
}

_RESIZE_MODES = ("shortest", "longest", "squash")
_INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Say where an encoder's weights come from: exactly one of `pretrained`, `checkpoint`.

    Attributes:
        architecture: An open_clip model name, the path of an open_clip model config in JSON,
            or "vitrine-tiny". Not read when `checkpoint` is set.
        pretrained: An open_clip tag, the path of a weights file (.safetensors, .pt, .pth,
            .bin), or "random".
        checkpoint: A Vitrine checkpoint directory.
        image_weights: A weights file for the image tower's trunk alone, in timm's or
            open_clip's names; over what `pretrained` gave.
        text_weights: A Hugging Face folder for a Hugging Face text tower alone.
        seed: Seeds the weights of "random"; not read otherwise.

    Raises:
        ValueError: None or both of `pretrained` and `checkpoint` are set.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    architecture: str = "ViT-B-32"
    pretrained: str | None = None
    checkpoint: str | None = None
    image_weights: str | None = None
    text_weights: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.checkpoint is None and self.pretrained is None:
            raise ValueError(
                "an encoder needs a checkpoint or pretrained weights;"
                " random weights only when the config says pretrained: random"
            )
        if self.checkpoint is not None and self.pretrained is not None:
            raise ValueError(
                f"checkpoint ({self.checkpoint}) and pretrained ({self.pretrained}) are both set;"
                " keep one of them and set the other to null"
            )
        if self.checkpoint is not None and (self.image_weights or self.text_weights):
            raise ValueError("image_weights and text_weights don't go with a checkpoint")

    @property
    def names_files(self) -> bool:
        """Whether it is made from files, whose content may change; else from a tag or a seed."""
        files = (self.checkpoint, self.image_weights, self.text_weights)
        if any(files) or self.architecture.endswith(".json"):
            return True
        named = Path(str(self.pretrained))
        is_file = named.suffix in (".safetensors", *TORCH_SUFFIXES) or named.exists()
        return is_file and self.pretrained != RANDOM


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """Say how a picture becomes the pixels that one model expects.

    Attributes:
        size_px: Side of the square that the model sees.
        resize_mode: "shortest" (fill, then crop the centre), "longest" (fit, then pad),
            or "squash" (ignore the aspect ratio).
        interpolation: "bicubic" or "bilinear", both with antialiasing.
        mean: Per channel, of pixels in [0, 1]; subtracted on the device.
        std: Per channel, of pixels in [0, 1]; divided by on the device.
        fill_color: Grey level in [0, 255] of the padding of "longest".

    Raises:
        ValueError: A value is outside what is listed here.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    size_px: int
    resize_mode: str
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fill_color: int = 0

    def __post_init__(self) -> None:
        if self.size_px < 1:
            raise ValueError(f"size_px is {self.size_px}, expected 1 or more")
        if self.resize_mode not in _RESIZE_MODES:
            raise ValueError(
                f"resize_mode is {self.resize_mode!r}, expected one of {_RESIZE_MODES}"
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"interpolation is {self.interpolation!r}, expected one of {_INTERPOLATIONS}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError("mean and std need three values each, those of std above 0")
        if not 0 <= self.fill_color <= 255:
            raise ValueError(f"fill_color is {self.fill_color}, expected 0 to 255")


def context_length(model_config: ModelConfig) -> int:
    """Return L, the number of tokens of a text; 77 where the config is silent, as in open_clip."""
    return int(model_config["text_cfg"].get("context_length", 77))


def image_size_px(model_config: ModelConfig) -> int:
    """Return the side of the model's square input; 224 where the config is silent.

    Raises:
        ValueError: The model's input is not a square.
    """
    size = model_config["vision_cfg"].get("image_size", 224)
    sides = {int(side) for side in size} if isinstance(size, list | tuple) else {int(size)}
    if len(sides) != 1:
        raise ValueError(f"image_size is {size}, expected a square")
    return sides.pop()


def check_model_config(content: object, source: str) -> None:
    """Refuse what is no open_clip model config.

    Raises:
        ValueError: embed_dim, vision_cfg or text_cfg is missing or of another type.
    """
    wanted = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    config = content if isinstance(content, dict) else {}
    faults = [key for key, kind in wanted.items() if not isinstance(config.get(key), kind)]
    if faults:
        raise ValueError(f"{source}: no open_clip model config: {', '.join(faults)} missing")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: The file is missing or holds something else.
    """
    check_file(path)
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def check_file(path: Path) -> None:
    """Raise ValueError where there is no file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, since ours are one line."""
    return str(error).strip().split("\n", 1)[0]
