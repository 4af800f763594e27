"""Checkpoints: a directory of encoder.json and model.safetensors, known by its fingerprint.

encoder.json holds the whole open_clip model config and the preprocessing, so that loading
needs neither a registry of models nor a network. It is written last: without it there is
no checkpoint.
"""

import hashlib
import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from encoders.encoder import OpenClipEncoder, build_model, read_model_config
from encoders.spec import (
    RANDOM,
    EncoderSpec,
    ModelConfig,
    PreprocessSpec,
    check_file,
    check_model_config,
    first_line,
    image_size_px,
    read_json,
)

CONFIG_FILE = "encoder.json"
WEIGHTS_FILE = "model.safetensors"

_FORMAT_VERSION = 1
_KIND = "open_clip"
_MAX_FAULTS_SHOWN = 4
_CHUNK_BYTES = 1 << 20
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")


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
        return _copy_checkpoint(Path(spec.checkpoint), Path(directory))
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
        model = _build_loaded(config, _download_tag(name, pretrained), f"tag {pretrained}")
    else:
        model = _build_loaded(config, _read_weights_file(Path(pretrained), name), pretrained)
    return save_checkpoint(model, config, _build_preprocess(config, overrides), directory)


def save_checkpoint(
    model: torch.nn.Module,
    model_config: ModelConfig,
    preprocess: PreprocessSpec,
    directory: str | Path,
) -> str:
    """Write a model as a checkpoint; an older one there is replaced.

    Args:
        model: An open_clip model, on any device.
        model_config: The open_clip config that it was built from.
        preprocess: Its preprocessing.
        directory: Where to write; made if missing.

    Returns:
        The fingerprint.

    Raises:
        ValueError: The config has a value that JSON can't hold.
    """
    header = {
        "format_version": _FORMAT_VERSION,
        "kind": _KIND,
        "model_config": model_config,
        "preprocess": asdict(preprocess),
    }
    try:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"the model config is not JSON: {error}") from error
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    (root / CONFIG_FILE).unlink(missing_ok=True)
    tensors = {
        key: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for key, tensor in model.state_dict().items()
    }
    save_file(tensors, root / WEIGHTS_FILE)
    _write_last(root / CONFIG_FILE, f"{text}\n".encode())
    return fingerprint(root)


def fingerprint(directory: str | Path) -> str:
    """Return the sha256, in hex, of both files' names, lengths and bytes.

    Raises:
        ValueError: A file is missing.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = Path(directory) / name
        check_file(path)
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def load_encoder(
    directory: str | Path,
    *,
    device: str | None = None,
    precision: str = "auto",
    expected_fingerprint: str | None = None,
) -> OpenClipEncoder:
    """Load a checkpoint as a live encoder.

    Args:
        directory: A checkpoint.
        device: A torch device; None is "cuda" where there is one, else "cpu".
        precision: "fp32", "bf16" or "auto": bf16 on cuda, else fp32.
        expected_fingerprint: Refuse any other checkpoint.

    Returns:
        The encoder.

    Raises:
        ValueError: A file is missing or corrupt, the format is unknown, the weights don't
            fit the config, or the fingerprint is another one.
    """
    found = fingerprint(directory)
    if expected_fingerprint is not None and found != expected_fingerprint:
        raise ValueError(
            f"{directory} has the fingerprint {found[:12]}, expected"
            f" {expected_fingerprint[:12]}: its vectors would belong to another space"
        )
    model, config, preprocess = load_model(directory)
    return OpenClipEncoder(
        model, config, preprocess, fingerprint=found, device=device, precision=precision
    )


def load_model(
    directory: str | Path,
) -> tuple[torch.nn.Module, ModelConfig, PreprocessSpec]:
    """Load a checkpoint's model on the CPU, its open_clip config and its preprocessing.

    Raises:
        ValueError: As `load_encoder`.
    """
    root = Path(directory)
    config, preprocess = read_checkpoint_config(root)
    size_px = image_size_px(config)
    if preprocess.size_px != size_px:
        raise ValueError(f"{root}: pixels of {preprocess.size_px}, but a model of {size_px}")
    model = _build_loaded(config, _read_tensors(root / WEIGHTS_FILE), str(root))
    return model, config, preprocess


def read_checkpoint_config(directory: str | Path) -> tuple[ModelConfig, PreprocessSpec]:
    """Read a checkpoint's open_clip model config and its preprocessing, without its weights.

    Raises:
        ValueError: encoder.json is missing, is no JSON, or has an unknown format.
    """
    path = Path(directory) / CONFIG_FILE
    header = read_json(path)
    version, kind = header.get("format_version"), header.get("kind")
    if version != _FORMAT_VERSION or kind != _KIND:
        raise ValueError(
            f"{path}: format {version!r} of kind {kind!r}, expected {_FORMAT_VERSION} of {_KIND!r}"
        )
    try:
        values = dict(header["preprocess"])
        values |= {"mean": tuple(values["mean"]), "std": tuple(values["std"])}
        config: ModelConfig = header["model_config"]
        preprocess = PreprocessSpec(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: incomplete or with unknown keys: {error}") from error
    check_model_config(config, str(path))
    return config, preprocess


def _copy_checkpoint(source: Path, directory: Path) -> str:
    """Check a checkpoint and copy it, encoder.json last; return its fingerprint."""
    load_model(source)
    if source.resolve() == directory.resolve():
        return fingerprint(source)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    shutil.copyfile(source / WEIGHTS_FILE, directory / WEIGHTS_FILE)
    _write_last(directory / CONFIG_FILE, (source / CONFIG_FILE).read_bytes())
    return fingerprint(directory)


def _write_last(path: Path, content: bytes) -> None:
    """Write a file so that it appears under its name only when it is whole."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)


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


def _download_tag(name: str, tag: str) -> dict[str, torch.Tensor]:
    """Let open_clip fetch a tag's weights and convert them to its own names."""
    try:
        model = open_clip.create_model(name, pretrained=tag, device="cpu")
    except (RuntimeError, OSError) as error:
        raise ValueError(f"can't get {name} with tag {tag}: {first_line(error)}") from error
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def _read_weights_file(path: Path, name: str) -> dict[str, torch.Tensor]:
    """Read a state dict from a local file; never unpickles code."""
    if not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"pretrained {path}: neither a file nor a tag of {name} (tags: {tags})")
    if path.suffix == ".safetensors":
        return _read_tensors(path)
    if path.suffix not in _TORCH_SUFFIXES:
        raise ValueError(f"{path}: expected .safetensors or one of {_TORCH_SUFFIXES}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: no plain state dict: {first_line(error)}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    check_file(path)
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: corrupt: {first_line(error)}") from error
    return tensors


def _build_loaded(
    config: ModelConfig, state: dict[str, torch.Tensor], source: str
) -> torch.nn.Module:
    """Build a model and load weights whose names and shapes are exactly its own.

    Raises:
        ValueError: They are not; the message names the first differences.
    """
    model = build_model(config)
    wanted = model.state_dict()
    faults = [f"missing {key}" for key in wanted.keys() - state.keys()]
    faults += [f"unknown {key}" for key in state.keys() - wanted.keys()]
    for key in wanted.keys() & state.keys():
        shape = getattr(state[key], "shape", None)
        if shape != wanted[key].shape:
            found = "no tensor" if shape is None else str(tuple(shape))
            faults.append(f"{key} is {found}, expected {tuple(wanted[key].shape)}")
    if faults:
        shown = "; ".join(sorted(faults)[:_MAX_FAULTS_SHOWN])
        raise ValueError(
            f"{source}: the weights don't fit the architecture, {len(faults)} differences: {shown}"
        )
    model.load_state_dict(state, strict=True)
    return model
