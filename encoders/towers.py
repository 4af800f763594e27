"""Models of open_clip, built from a config: what is in every encoder, and what is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.overrides import TorchFunctionMode

from encoders.spec import (
    DEMO_ARCHITECTURE,
    DEMO_MODEL_CONFIG,
    ModelConfig,
    PreprocessSpec,
    check_model_config,
    first_line,
    read_json,
)

# The smallest image tower that open_clip builds: it is thrown away.
_NO_VISION: ModelConfig = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 16}


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
    except (TypeError, AttributeError, RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"open_clip refuses the model config: {first_line(error)}") from error
    return model


class without_init(TorchFunctionMode):  # noqa: N801 - used as a function is
    """Leave out the random weights of what is built in the block: others are loaded over them.

    They take most of the time of building. What the state dict doesn't hold must not come from
    `torch.nn.init`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        """Return the tensor as it is where it would be filled."""
        named = kwargs or {}
        if getattr(func, "__module__", "") == torch.nn.init.__name__:
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


def build_text_tower(text_config: ModelConfig, dim: int, *, seed: int = 0) -> torch.nn.Module:
    """Build a text tower by itself with random weights, the same for the same seed.

    Args:
        text_config: An open_clip `text_cfg`.
        dim: D of its vectors.
        seed: As `build_model`.

    Returns:
        A module from (B, L) tokens to (B, D) features, not of unit length.

    Raises:
        ValueError: open_clip refuses the config.
    """
    config = {"embed_dim": dim, "vision_cfg": _NO_VISION, "text_cfg": text_config}
    model: Any = build_model(config | {"custom_text": True}, seed=seed)
    text: torch.nn.Module = model.text
    return text


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
