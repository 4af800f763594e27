"""Makes checkpoints: of what a spec names, and of what a preset's training starts from."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import convert_to_custom_text_state_dict

from encoders.checkpoint import build_checkpoint_model, copy_checkpoint, load_model, save_checkpoint
from encoders.checkpoint_files import CheckpointConfig
from encoders.fusion import FusionSpec
from encoders.objectives import MSR_PRESETS
from encoders.spec import RANDOM, EncoderSpec, ModelConfig, PreprocessSpec, image_size_px
from encoders.towers import build_model, read_model_config
from encoders.weights import (
    build_loaded,
    download_tag,
    load_exactly,
    load_image_weights,
    load_text_weights,
    read_weights_file,
)


def create_checkpoint(spec: EncoderSpec, directory: str | Path) -> str:
    """Write the encoder that a spec describes as a checkpoint directory.

    A pretrained tag brings its own mean, std, interpolation, resize mode and activation; for
    a weights file they are those of the config's `preprocess_cfg`, else open_clip's defaults.

    Args:
        spec: Where the weights come from.
        directory: Where to write; made if missing.

    Returns:
        The fingerprint.

    Raises:
        ValueError: The architecture, tag, file or checkpoint is unknown or unreadable, or
            the weights don't fit the architecture.
    """
    if spec.checkpoint is not None:
        return copy_checkpoint(Path(spec.checkpoint), Path(directory))
    config, overrides = read_model_config(spec.architecture)
    pretrained = str(spec.pretrained)
    name = spec.architecture.replace("/", "-")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if pretrained == RANDOM:
        model = build_model(config, seed=spec.seed)
    elif tag:
        # Builds with the tag's activation: with the other GELU the same weights score worse.
        config["quick_gelu"] = bool(tag.get("quick_gelu", False))
        overrides = tag
        model = build_loaded(config, download_tag(name, pretrained), f"tag {pretrained}")
    else:
        model = build_loaded(config, read_weights_file(Path(pretrained), name), pretrained)
    if spec.image_weights is not None:
        load_image_weights(model, Path(spec.image_weights))
    if spec.text_weights is not None:
        load_text_weights(model, Path(spec.text_weights))
    found = CheckpointConfig(model_config=config, preprocess=_build_preprocess(config, overrides))
    return save_checkpoint(model, found, directory)


def create_start(
    spec: EncoderSpec,
    directory: str | Path,
    *,
    preset: str,
    fusion: FusionSpec | None = None,
    text_encoder: EncoderSpec | None = None,
    seed: int = 0,
) -> str:
    """Write the encoder that a preset's training begins with.

    MIM presets start from an open_clip model; so do MSR presets, which put their fusion on it,
    or from an MSR checkpoint of the same shape, which keeps its weights and takes the new share of
    the image.

    Args:
        spec: The encoder: a CLIP model, or a checkpoint.
        directory: Where to write; made if missing.
        preset: A name in `encoders.objectives.PRESETS`.
        fusion: Of an MSR preset.
        text_encoder: Of msr4: the encoder whose text tower is the bi-encoder; an msr4 checkpoint
            has its own.
        seed: Seeds what MSR adds.

    Returns:
        The fingerprint.

    Raises:
        ValueError: The encoder can't be made, or is of another kind than the preset.
    """
    if preset not in MSR_PRESETS and text_encoder is not None:
        raise ValueError(f"train.text_encoder is of msr4, not of {preset}")
    with tempfile.TemporaryDirectory(prefix="vitrine-start-") as scratch:
        create_checkpoint(spec, scratch)
        model, config = load_model(scratch)
        if preset not in MSR_PRESETS:
            if config.is_msr:
                raise ValueError(f"an msr encoder can't be trained as {preset}")
            return create_checkpoint(EncoderSpec(checkpoint=scratch), directory)
        if fusion is None:
            raise ValueError(f"{preset} needs a fusion")
        if config.is_msr:
            if text_encoder is not None:
                raise ValueError("an msr checkpoint has its own text encoder")
            _check_same(config, fusion, preset)
            return save_checkpoint(model, replace(config, fusion=fusion), directory)
        if (preset == "msr4") != (text_encoder is not None):
            raise ValueError("msr4 needs train.text_encoder, and no other preset has one")
        wanted = replace(config, fusion=fusion)
        text_state = None
        if text_encoder is not None:
            dim = int(config.model_config["embed_dim"])
            text_config, text_state = _read_text_tower(text_encoder, dim, Path(scratch) / "text")
            wanted = replace(wanted, text_config=text_config)
        msr: Any = build_checkpoint_model(wanted, seed=seed)
        msr.clip.load_state_dict(model.state_dict())
        if text_state is not None:
            load_exactly(msr.text, text_state, "train.text_encoder")
        return save_checkpoint(msr, wanted, directory)


def _check_same(config: CheckpointConfig, fusion: FusionSpec, preset: str) -> None:
    found = ("msr4" if config.text_config is not None else "msr3", config.fusion.kind)
    if found != (preset, fusion.kind):
        raise ValueError(
            f"the checkpoint is {found[0]} with {found[1]}, the config asks for"
            f" {preset} with {fusion.kind}"
        )


def _read_text_tower(
    spec: EncoderSpec, dim: int, directory: Path
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Return an encoder's open_clip text_cfg and its text tower's weights, by the tower's names."""
    create_checkpoint(spec, directory)
    model, config = load_model(directory)
    found = int(config.model_config["embed_dim"])
    if config.is_msr or found != dim:
        raise ValueError(f"train.text_encoder has {found} dimensions, the encoder {dim}")
    state = convert_to_custom_text_state_dict(model.state_dict())
    text = {k.removeprefix("text."): v for k, v in state.items() if k.startswith("text.")}
    return config.model_config["text_cfg"], text


def _build_preprocess(config: ModelConfig, overrides: dict[str, Any]) -> PreprocessSpec:
    """Put what a tag or a config says over open_clip's defaults; random means bicubic."""
    defaults = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    values = defaults | {k: v for k, v in overrides.items() if k in defaults and v is not None}
    interpolation = str(values["interpolation"])
    return PreprocessSpec(
        size_px=image_size_px(config),
        resize_mode=str(values["resize_mode"]),
        interpolation="bicubic" if interpolation == "random" else interpolation,
        mean=_three(values["mean"]),
        std=_three(values["std"]),
        fill_color=int(values["fill_color"]),
    )


def _three(value: Any) -> tuple[float, float, float]:  # noqa: ANN401 - whatever JSON holds
    channels = [value] * 3 if isinstance(value, int | float) else list(value)
    red, green, blue = (float(channel) for channel in channels)
    return red, green, blue
