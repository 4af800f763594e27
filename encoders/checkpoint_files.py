"""What a checkpoint is, known without its weights: its config, its files, its fingerprint.

Light on purpose, without torch: a job whose encoder is in the store already loads nothing else.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from encoders.fusion import FusionSpec
from encoders.spec import ModelConfig, PreprocessSpec, check_file, check_model_config, read_json

CONFIG_FILE = "encoder.json"
WEIGHTS_FILE = "model.safetensors"

FORMAT_VERSION = 2
KINDS = ("open_clip", "msr")
HF_KEYS = ("hf_model_name", "hf_tokenizer_name")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What an encoder is, without its weights.

    Attributes:
        model_config: An open_clip model config; the paths in it are absolute.
        preprocess: The image tower's preprocessing.
        fusion: How its vectors are fused; any kind but "sum" is an MSR encoder.
        text_config: The open_clip `text_cfg` of an msr4 encoder's fourth tower.
    """

    model_config: ModelConfig
    preprocess: PreprocessSpec
    fusion: FusionSpec = field(default_factory=FusionSpec)
    text_config: ModelConfig | None = None

    @property
    def dim(self) -> int:
        """D of the vectors that are stored."""
        dim = int(self.model_config["embed_dim"])
        return 2 * dim if self.fusion.kind == "mlp" and self.text_config is not None else dim

    @property
    def is_msr(self) -> bool:
        """Whether the model is an MSR model."""
        return self.fusion.kind != "sum"


def checkpoint_files(directory: str | Path) -> list[str]:
    """List a checkpoint's files, relative to it; encoder.json, the mark that it is whole, last.

    Raises:
        ValueError: A file is missing.
    """
    root = Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        check_file(root / name)
    beside = sorted(f"{path.parent.name}/{path.name}" for path in root.glob("*-tower/*"))
    return [WEIGHTS_FILE, *beside, CONFIG_FILE]


def fingerprint(directory: str | Path) -> str:
    """Return the sha256, in hex, of all files' names, lengths and bytes.

    Raises:
        ValueError: A file is missing.
    """
    digest = hashlib.sha256()
    for name in sorted(checkpoint_files(directory)):
        path = Path(directory) / name
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def read_checkpoint_config(directory: str | Path) -> CheckpointConfig:
    """Read what a checkpoint is, without its weights.

    Raises:
        ValueError: encoder.json is missing, is no JSON, or has an unknown format.
    """
    root = Path(directory)
    path = root / CONFIG_FILE
    header = read_json(path)
    version, kind = header.get("format_version"), header.get("kind")
    if version != FORMAT_VERSION or kind not in KINDS:
        raise ValueError(
            f"{path}: format {version!r} of kind {kind!r}, expected {FORMAT_VERSION} of {KINDS}"
        )
    try:
        values = dict(header["preprocess"])
        values |= {"mean": tuple(values["mean"]), "std": tuple(values["std"])}
        config, text_config = header["model_config"], header["text_config"]
        check_model_config(config, str(path))
        return CheckpointConfig(
            model_config=config | {"text_cfg": _resolve_hf(config["text_cfg"], root)},
            preprocess=PreprocessSpec(**values),
            fusion=FusionSpec(**header["fusion"]),
            text_config=None if text_config is None else _resolve_hf(text_config, root),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: incomplete or with unknown keys: {error}") from error


def _resolve_hf(text_config: ModelConfig, root: Path) -> ModelConfig:
    """Make the folder names of a Hugging Face tower absolute."""
    there = [key for key in HF_KEYS if key in text_config]
    return text_config | {key: str(root.absolute() / text_config[key]) for key in there}
