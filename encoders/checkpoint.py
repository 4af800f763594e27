"""Checkpoints: a directory of encoder.json and model.safetensors, known by its fingerprint.

encoder.json holds the whole open_clip model config, the preprocessing and the fusion; a Hugging
Face text tower's own config and tokenizer lie in a folder beside it. So loading needs neither a
registry of models nor a network. encoder.json is written last: without it there is no checkpoint.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from encoders.checkpoint_files import (
    CONFIG_FILE,
    FORMAT_VERSION,
    HF_KEYS,
    WEIGHTS_FILE,
    CheckpointConfig,
    checkpoint_files,
    fingerprint,
    read_checkpoint_config,
)
from encoders.encoder import Encoder, MsrEncoder, OpenClipEncoder
from encoders.msr import MsrModel
from encoders.preprocess import TokenizeTexts, join_tokenizers, load_tokenizer
from encoders.runtime import round_weights
from encoders.spec import (
    ModelConfig,
    context_length,
    image_size_px,
)
from encoders.towers import build_model, build_text_tower, without_init
from encoders.weights import (
    HF_FILES,
    hf_folder,
    load_exactly,
    read_tensors,
)


@dataclass(frozen=True, kw_only=True)
class Tokenizers:
    """The two roles of text; for all but msr4 encoders it is one tokenizer."""

    product: TokenizeTexts
    query: TokenizeTexts


def save_checkpoint(model: torch.nn.Module, config: CheckpointConfig, directory: str | Path) -> str:
    """Write a model as a checkpoint; an older one there is replaced.

    Args:
        model: The model of that config, on any device.
        config: What it was built from.
        directory: Where to write; made if missing.

    Returns:
        The fingerprint.

    Raises:
        ValueError: The config has a value that JSON can't hold, or names a Hugging Face model
            that can't be had.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    (root / CONFIG_FILE).unlink(missing_ok=True)
    model_config = json.loads(_to_json(config.model_config))
    model_config["text_cfg"] = _keep_hf_files(model_config["text_cfg"], root, "text")
    text_config = json.loads(_to_json(config.text_config or {}))
    text_config = _keep_hf_files(text_config, root, "query-text") or None
    header = {
        "format_version": FORMAT_VERSION,
        "kind": "msr" if config.is_msr else "open_clip",
        "model_config": model_config,
        "preprocess": asdict(config.preprocess),
        "fusion": asdict(config.fusion),
        "text_config": text_config,
    }
    tensors = {
        key: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for key, tensor in model.state_dict().items()
    }
    save_file(tensors, root / WEIGHTS_FILE)
    _write_last(root / CONFIG_FILE, f"{_to_json(header)}\n".encode())
    return fingerprint(root)


def copy_checkpoint(source: Path, directory: Path) -> str:
    """Check a checkpoint and copy it, encoder.json last; return its fingerprint.

    Args:
        source: The checkpoint.
        directory: Where to write; made if missing.

    Raises:
        ValueError: As `load_model`.
    """
    load_model(source)
    if source.resolve() == directory.resolve():
        return fingerprint(source)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    for stale in directory.glob("*-tower"):
        shutil.rmtree(stale)
    *first, last = checkpoint_files(source)
    for name in first:
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, directory / name)
    _write_last(directory / last, (source / last).read_bytes())
    return fingerprint(directory)


def load_encoder(
    directory: str | Path,
    *,
    device: str | None = None,
    precision: str = "auto",
    expected_fingerprint: str | None = None,
) -> Encoder:
    """Load a checkpoint as a live encoder.

    Args:
        directory: A checkpoint.
        device: A torch device; None is "cuda" where there is one, else "cpu".
        precision: "fp32", "bf16" or "auto": bf16 where the device multiplies in it, else fp32.
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
    model, config = load_model(directory)
    encoder = wrap_model(model, config, fingerprint=found, device=device, precision=precision)
    if encoder.precision == "bf16":
        round_weights(model)
    return encoder


def wrap_model(
    model: torch.nn.Module,
    config: CheckpointConfig,
    *,
    fingerprint: str,
    device: str | None = None,
    precision: str = "auto",
) -> Encoder:
    """Make a live encoder of a model that is in memory; it is moved and set to evaluation.

    Args:
        model: The model of that config.
        config: What it is.
        fingerprint: The name of its vector space.
        device: As `load_encoder`.
        precision: As `load_encoder`.

    Raises:
        ValueError: `precision` is unknown.
    """
    build: Any = MsrEncoder if config.is_msr else OpenClipEncoder
    encoder: Encoder = build(
        model,
        config.preprocess,
        dim=config.dim,
        length_tokens=context_length(config.model_config),
        fingerprint=fingerprint,
        fusion=config.fusion,
        device=device,
        precision=precision,
    )
    return encoder


def load_model(directory: str | Path) -> tuple[torch.nn.Module, CheckpointConfig]:
    """Load a checkpoint's model on the CPU: an open_clip model, or an MsrModel.

    Raises:
        ValueError: As `load_encoder`.
    """
    root = Path(directory)
    config = read_checkpoint_config(root)
    size_px = image_size_px(config.model_config)
    if config.preprocess.size_px != size_px:
        raise ValueError(f"{root}: pixels of {config.preprocess.size_px}, but a model of {size_px}")
    with without_init():
        model = build_checkpoint_model(config)
    load_exactly(model, read_tensors(root / WEIGHTS_FILE), str(root))
    return model, config


def build_checkpoint_model(config: CheckpointConfig, *, seed: int = 0) -> torch.nn.Module:
    """Build a config's model with random weights, the same for the same seed.

    Raises:
        ValueError: open_clip refuses the config.
    """
    clip = build_model(config.model_config, seed=seed)
    if not config.is_msr:
        return clip
    dim, text, text_tokens = int(config.model_config["embed_dim"]), None, 0
    if config.text_config is not None:
        text = build_text_tower(config.text_config, dim, seed=seed)
        text_tokens = context_length({"text_cfg": config.text_config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MsrModel(clip, dim, config.fusion.kind, text=text, text_tokens=text_tokens).eval()


def load_tokenizers(source: str | Path | CheckpointConfig) -> Tokenizers:
    """Load the tokenizers of an encoder's text towers.

    Args:
        source: A checkpoint, or its config.

    Raises:
        ValueError: One can't be loaded.
    """
    config = source if isinstance(source, CheckpointConfig) else read_checkpoint_config(source)
    clip = load_tokenizer(config.model_config)
    if config.text_config is None:
        return Tokenizers(product=clip, query=clip)
    text = load_tokenizer({"text_cfg": config.text_config})
    return Tokenizers(product=text, query=join_tokenizers(text, clip))


def _keep_hf_files(text_config: ModelConfig, root: Path, role: str) -> ModelConfig:
    """Copy a Hugging Face tower's config and tokenizer into the checkpoint, and point there.

    A tower without a tokenizer's name has that of its own folder; open_clip's own text towers
    may have a Hugging Face tokenizer too.
    """
    folder = root / f"{role}-tower"
    model, tokenizer = (text_config.get(key) for key in HF_KEYS)
    names = [str(name) for name in (tokenizer or model, model) if name]  # the model's config wins
    sources = {name: hf_folder(name) for name in names}
    in_place = folder.resolve() in [source.resolve() for source in sources.values()]
    if folder.is_dir() and not in_place:
        shutil.rmtree(folder)  # an older checkpoint's
    if not sources:
        return text_config
    folder.mkdir(exist_ok=True)
    for number, source in enumerate(sources.values()):
        for name in HF_FILES if number == 0 else HF_FILES[:1]:
            if source.resolve() != folder.resolve() and (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    kept = HF_KEYS if model else HF_KEYS[1:]
    return text_config | dict.fromkeys(kept, folder.name)


def _to_json(value: Any) -> str:  # noqa: ANN401 - whatever a config holds
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"the model config is not JSON: {error}") from error


def _write_last(path: Path, content: bytes) -> None:
    """Write a file so that it appears under its name only when it is whole."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)
