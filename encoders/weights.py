"""Weights of open_clip models: tags, files, one tower's alone; each has to fit exactly."""

import pickle
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from encoders.spec import TORCH_SUFFIXES, ModelConfig, check_file, first_line
from encoders.towers import build_model, without_init

_MAX_FAULTS_SHOWN = 4
# What a Hugging Face text tower and its tokenizer are loaded from; the weights are ours.
HF_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
)
_HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HF_UNUSED = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids")
# Older BERT files have TensorFlow's names.
_HF_RENAMED = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def download_tag(name: str, tag: str) -> dict[str, torch.Tensor]:
    """Let open_clip fetch a tag's weights and convert them to its own names.

    Raises:
        ValueError: The tag's weights can't be had.
    """
    try:
        model = open_clip.create_model(name, pretrained=tag, device="cpu")
    except (RuntimeError, OSError) as error:
        raise ValueError(f"can't get {name} with tag {tag}: {first_line(error)}") from error
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def read_weights_file(path: Path, name: str) -> dict[str, torch.Tensor]:
    """Read a state dict from a local file; never unpickles code.

    Args:
        path: .safetensors, .pt, .pth or .bin.
        name: Whose weights, to name its tags where there is no such file.

    Raises:
        ValueError: The file is missing, unreadable or holds something else.
    """
    if not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"pretrained {path}: neither a file nor a tag of {name} (tags: {tags})")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if path.suffix not in TORCH_SUFFIXES:
        raise ValueError(f"{path}: expected .safetensors or one of {TORCH_SUFFIXES}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: no plain state dict: {first_line(error)}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a .safetensors file; ValueError if it is missing or corrupt."""
    check_file(path)
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: corrupt: {first_line(error)}") from error
    return tensors


def build_loaded(
    config: ModelConfig, state: dict[str, torch.Tensor], source: str
) -> torch.nn.Module:
    """Build a model and load weights whose names and shapes are exactly its own.

    Raises:
        ValueError: They are not; the message names the first differences.
    """
    with without_init():
        model = build_model(config)
    load_exactly(model, state, source)
    return model


def load_exactly(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load weights whose names and shapes are exactly the model's own.

    Raises:
        ValueError: They are not; the message names the first differences.
    """
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


def load_image_weights(model: Any, path: Path) -> None:  # noqa: ANN401 - open_clip is untyped
    """Load a file's weights into the image tower, over what is there.

    Args:
        model: An open_clip model.
        path: A file with the names of open_clip's image tower, or of timm's model where the
            tower is one; then the projection keeps its weights, and timm's classifier is left.

    Raises:
        ValueError: The file can't be read or doesn't fit.
    """
    tower = getattr(model.visual, "trunk", model.visual)
    classifier = getattr(tower, "default_cfg", {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    state = {
        key: value
        for key, value in read_weights_file(path, "the image tower").items()
        if not any(key.startswith(f"{head}.") for head in heads)
    }
    load_exactly(tower, state, str(path))


def load_text_weights(model: Any, folder: Path) -> None:  # noqa: ANN401 - open_clip is untyped
    """Load a Hugging Face folder's weights into a Hugging Face text tower; its projection stays.

    Args:
        model: An open_clip model.
        folder: Holds model.safetensors or pytorch_model.bin.

    Raises:
        ValueError: The tower is of another kind, or the weights don't fit.
    """
    tower: Any = getattr(getattr(model, "text", None), "transformer", None)
    prefix = getattr(tower, "base_model_prefix", None)
    if prefix is None:
        raise ValueError("text_weights: the text tower is no Hugging Face model")
    files = [folder / name for name in _HF_WEIGHTS if (folder / name).is_file()]
    if not files:
        raise ValueError(f"{folder}: holds none of {', '.join(_HF_WEIGHTS)}")
    state = {
        _hf_name(key.removeprefix(f"{prefix}.")): value
        for key, value in read_weights_file(files[0], "the text tower").items()
    }
    own = tower.state_dict().keys()
    kept = {k: v for k, v in state.items() if k in own or not k.startswith(_HF_UNUSED)}
    load_exactly(tower, kept, str(files[0]))


def _hf_name(key: str) -> str:
    for old, new in _HF_RENAMED:
        key = key.replace(old, new)
    return key


def hf_folder(name: str) -> Path:
    """Return the local folder of a Hugging Face model's config and tokenizer.

    Args:
        name: A folder, or a hub name: then the files are fetched, or come from its cache.

    Raises:
        ValueError: There is no such folder, and the hub doesn't give it.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HF_FILES)))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{name}: no folder, and not on the hub: {first_line(error)}") from error
