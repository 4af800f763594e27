"""Real vectors for benchmarks/index.py: Fashion-MNIST, embedded by an encoder of Vitrine."""

from __future__ import annotations

import gzip
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from index_data import write_rows
from index_probe import Float32Array
from PIL import Image
from towers import GROCERY_TOWERS, WEIGHTS

from encoders.checkpoint import load_encoder
from encoders.create import create_checkpoint
from encoders.encoder import Encoder
from encoders.preprocess import preprocess_image
from encoders.spec import EncoderSpec

PACKAGE = "dataset-fashion-mnist"
IMAGES = {"vectors": "train-images-idx3-ubyte.gz", "queries": "t10k-images-idx3-ubyte.gz"}
EMBED_BATCH = 250

TOWERS: dict[str, Any] = {
    "model_cfg": GROCERY_TOWERS
    | {
        "vision_cfg": GROCERY_TOWERS["vision_cfg"] | {"image_size": 64},
        "text_cfg": {"context_length": 8, "width": 64, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
}


def make_mnist(folder: Path, *, mnist: Path | None, checkpoint: Path | None) -> None:
    """Embed Fashion-MNIST: 60,000 training images as vectors, 10,000 test images as queries.

    Args:
        folder: Where to write.
        mnist: Holds the image files; None: the Debian package is fetched.
        checkpoint: The encoder; None: EfficientNet-lite0 with its ImageNet weights, from
            ../shared/weights, and a random linear head to 256 dimensions.
    """
    with tempfile.TemporaryDirectory(prefix="vitrine-mnist-") as scratch:
        images = fetch_mnist(Path(scratch)) if mnist is None else mnist
        encoder = load_encoder(checkpoint or make_encoder(Path(scratch)))
        vectors = embed(encoder, read_images(images / IMAGES["vectors"]))
        queries = embed(encoder, read_images(images / IMAGES["queries"]))
    write_rows(folder, vectors, queries)


def fetch_mnist(scratch: Path) -> Path:
    """Unpack the Debian package without installing it; return the folder of its files."""
    subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=scratch, check=True)
    (package,) = scratch.glob(f"{PACKAGE}_*.deb")
    subprocess.run(["dpkg", "-x", package, scratch / "package"], check=True)
    return scratch / "package" / "usr" / "share" / "datasets" / "fashion-mnist"


def make_encoder(scratch: Path) -> Path:
    """Write a checkpoint of ImageNet's features; return its folder."""
    towers = scratch / "towers.json"
    towers.write_text(json.dumps(TOWERS), encoding="utf-8")
    spec = EncoderSpec(
        architecture=str(towers), pretrained="random", image_weights=str(WEIGHTS), seed=0
    )
    create_checkpoint(spec, scratch / "checkpoint")
    return scratch / "checkpoint"


def read_images(path: Path) -> npt.NDArray[np.uint8]:
    """Read an IDX file of images: (N, H, W) uint8.

    Raises:
        ValueError: It isn't one.
    """
    with gzip.open(path) as stream:
        header = np.frombuffer(stream.read(16), ">i4").tolist()
        if header[0] != 0x803:
            raise ValueError(f"{path} is no IDX file of images: it begins with {header[0]:#x}")
        return np.frombuffer(stream.read(), np.uint8).reshape(header[1:])


def embed(encoder: Encoder, images: npt.NDArray[np.uint8]) -> Float32Array:
    """Embed (N, H, W) uint8 grey images: (N, D) float32 unit rows."""
    parts = []
    for start in range(0, len(images), EMBED_BATCH):
        batch = images[start : start + EMBED_BATCH]
        pixels = np.stack([preprocess_image(Image.fromarray(i), encoder.preprocess) for i in batch])
        parts.append(encoder.encode_queries(pixels, None, image_weight=1.0))
    return np.concatenate(parts)
