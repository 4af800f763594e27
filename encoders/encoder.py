"""Live encoders, and the models in them: pixels and tokens in, float32 unit rows out."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import open_clip
import torch

from encoders.spec import (
    DEMO_ARCHITECTURE,
    DEMO_MODEL_CONFIG,
    Float32Array,
    Int64Array,
    ModelConfig,
    PreprocessSpec,
    UInt8Array,
    check_model_config,
    context_length,
    first_line,
    read_json,
)


class Encoder(Protocol):
    """What stages ask of any encoder.

    Attributes:
        fingerprint: Identity of the vector space; vectors of two fingerprints never mix.
        dim: D of every vector.
        preprocess: How pictures become the pixels for `encode_images`.
    """

    fingerprint: str
    dim: int
    preprocess: PreprocessSpec

    def encode_images(self, pixels: UInt8Array) -> Float32Array:
        """Encode (B, H, W, 3) uint8 pixels into (B, D) float32 unit rows."""
        ...

    def encode_texts(self, tokens: Int64Array) -> Float32Array:
        """Encode (B, L) int64 tokens into (B, D) float32 unit rows."""
        ...


class OpenClipEncoder:
    """Run an open_clip model for inference.

    A row that the model gives no direction to (it holds NaN or infinity, or is all zero)
    comes back as NaN: the caller rejects that row, and keeps the rest of the batch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        preprocess: PreprocessSpec,
        *,
        fingerprint: str,
        device: str | None = None,
        precision: str = "auto",
    ) -> None:
        """Put a model on a device, ready to encode.

        Args:
            model: An open_clip model with `encode_image` and `encode_text`; it is moved.
            model_config: The open_clip config that the model was built from.
            preprocess: The model's preprocessing.
            fingerprint: The checkpoint's fingerprint.
            device: A torch device; None is "cuda" where there is one, else "cpu".
            precision: "fp32", "bf16" (autocast), or "auto": bf16 on cuda, else fp32.

        Raises:
            ValueError: `precision` is none of the three.
        """
        self.fingerprint = fingerprint
        self.dim = int(model_config["embed_dim"])
        self.preprocess = preprocess
        self.device = pick_device(device)
        self.precision = _pick_precision(precision, self.device)
        self._model: Any = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self._length_tokens = context_length(model_config)
        self._vocab_size: int | None = getattr(model, "vocab_size", None)
        self._mean, self._std = channel_statistics(preprocess, self.device)

    def encode_images(self, pixels: UInt8Array) -> Float32Array:
        """Encode pixels made by `preprocess_image`.

        Args:
            pixels: (B, H, W, 3) uint8 in [0, 255], H = W = preprocess.size_px.

        Returns:
            (B, D) float32, unit rows; NaN rows where the model gave no direction.

        Raises:
            ValueError: Another shape or dtype.
        """
        size_px = self.preprocess.size_px
        _check_array("pixels", pixels, (size_px, size_px, 3), np.uint8)
        if len(pixels) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        with torch.inference_mode(), self._autocast():
            images = normalize_pixels(self._to_device(pixels), self._mean, self._std)
            return _unit_rows(self._model.encode_image(images))

    def encode_texts(self, tokens: Int64Array) -> Float32Array:
        """Encode tokens made by this model's tokenizer.

        Args:
            tokens: (B, L) int64, L the model's context length.

        Returns:
            (B, D) float32, unit rows; NaN rows where the model gave no direction.

        Raises:
            ValueError: Another shape or dtype, or a token outside the vocabulary.
        """
        _check_array("tokens", tokens, (self._length_tokens,), np.int64)
        if len(tokens) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        self._check_vocabulary(tokens)
        with torch.inference_mode(), self._autocast():
            return _unit_rows(self._model.encode_text(self._to_device(tokens)))

    def _check_vocabulary(self, tokens: Int64Array) -> None:
        # On a GPU, a wrong index would kill the whole process's device context.
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or (self._vocab_size is not None and highest >= self._vocab_size):
            raise ValueError(
                f"tokens range from {lowest} to {highest}, the vocabulary has"
                f" {self._vocab_size}: they were made by another model's tokenizer"
            )

    def _to_device(self, array: UInt8Array | Int64Array) -> torch.Tensor:
        writable = np.require(array, requirements=["C", "W"])
        return torch.from_numpy(writable).to(self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


def fuse(image: Float32Array, text: Float32Array, weight: float) -> Float32Array:
    """Blend image and text vectors: normalize(weight * image + (1 - weight) * text).

    Args:
        image: (B, D) float32 unit rows.
        text: (B, D) float32 unit rows.
        weight: Share of the image in [0, 1].

    Returns:
        (B, D) float32 unit rows; NaN where the two cancel out or one holds NaN.

    Raises:
        ValueError: The shapes differ or are not (B, D), or weight is outside [0, 1].
    """
    if image.shape != text.shape or image.ndim != 2:
        raise ValueError(f"image {image.shape} and text {text.shape}, expected the same (B, D)")
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight is {weight}, expected 0 to 1")
    blend = np.float32(weight) * image + np.float32(1.0 - weight) * text
    norms = np.linalg.norm(blend, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit: Float32Array = (blend / norms).astype(np.float32, copy=False)
    return unit


def read_model_config(architecture: str) -> tuple[ModelConfig, dict[str, Any]]:
    """Look an architecture up.

    Args:
        architecture: An open_clip name, the path of a JSON file (a bare model config, or one
            with `model_cfg` and `preprocess_cfg`), or "vitrine-tiny".

    Returns:
        The open_clip model config, a copy, and what it says of preprocessing (maybe nothing).

    Raises:
        ValueError: There is none of that name, or the file is no model config.
    """
    if architecture == DEMO_ARCHITECTURE:
        return json.loads(json.dumps(DEMO_MODEL_CONFIG)), {}
    if architecture.endswith(".json"):
        content = read_json(Path(architecture))
        config = content.get("model_cfg", content)
        check_model_config(config, architecture)
        return config, content.get("preprocess_cfg", {})
    name = architecture.replace("/", "-")
    if name not in open_clip.list_models():
        raise ValueError(
            f"unknown architecture {architecture!r}: expected a name that"
            f" open_clip.list_models() lists, a .json file, or {DEMO_ARCHITECTURE!r}"
        )
    return open_clip.get_model_config(name), {}


def build_model(model_config: ModelConfig, *, seed: int = 0) -> torch.nn.Module:
    """Build an open_clip model with random weights, the same for the same seed.

    Args:
        model_config: An open_clip model config.
        seed: Seeds the weights; torch's global generator is left as it was.

    Returns:
        A CLIP, CustomTextCLIP or CoCa on the CPU, in float32 and evaluation mode.

    Raises:
        ValueError: open_clip refuses the config.
    """
    config = json.loads(json.dumps(model_config))
    custom_text = config.pop("custom_text", False)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
        custom_text = True
    model_class = open_clip.CLIP
    if custom_text:
        model_class = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: torch.nn.Module = model_class(**config).eval()
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"open_clip refuses the model config: {first_line(error)}") from error
    return model


def pick_device(device: str | None) -> torch.device:
    """Return the device asked for; None is "cuda" where there is one, else "cpu"."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def channel_statistics(
    preprocess: PreprocessSpec, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and std on a device, each (1, 3, 1, 1) float32, of pixels in [0, 255]."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1) * 255.0
        for values in (preprocess.mean, preprocess.std)
    )
    return mean, std


def normalize_pixels(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Turn (B, H, W, 3) uint8 into (B, 3, H, W) float32, channels last in memory.

    Args:
        pixels: (B, H, W, 3) uint8 in [0, 255].
        mean: (1, 3, 1, 1) float32, from `channel_statistics`.
        std: (1, 3, 1, 1) float32, from `channel_statistics`.

    Returns:
        (B, 3, H, W) float32.
    """
    # The permuted view of contiguous NHWC memory *is* channels-last: nothing is copied.
    return (pixels.permute(0, 3, 1, 2).float() - mean) / std


def _unit_rows(features: torch.Tensor) -> Float32Array:
    # A plain division: a zero row becomes NaN, where F.normalize would leave zeros.
    rows = features.float()
    unit: Float32Array = (rows / rows.norm(dim=-1, keepdim=True)).cpu().numpy()
    return unit


def _pick_precision(precision: str, device: torch.device) -> str:
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}, expected auto, fp32 or bf16")
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def _check_array(
    name: str, array: UInt8Array | Int64Array, row_shape: tuple[int, ...], dtype: type
) -> None:
    if array.dtype != dtype or array.shape[1:] != row_shape or array.ndim != len(row_shape) + 1:
        expected = ", ".join(["B", *map(str, row_shape)])
        raise ValueError(
            f"{name} are {array.shape} {array.dtype}, expected ({expected}) {dtype.__name__}"
        )
