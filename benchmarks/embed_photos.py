"""The photos, the catalog and the encoder that all contenders of benchmarks/embed.py share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SUFFIXES = (".jpg", ".jpeg")
START, COMMENT = b"\xff\xd8", b"\xff\xfe"  # JPEG's markers of a file and of a comment


def make_photos(source: Path, folder: Path, count: int) -> list[Path]:
    """Copy so many photos into an empty folder, in the order of their names; return the copies.

    Where there are fewer, they come again with a comment in the file: the same pixels, but other
    bytes, so that nobody embeds a photo once for all that equal it.

    Args:
        source: A folder with JPEG files, at any depth.
        folder: Where to write; what was there goes.
        count: How many.

    Raises:
        SystemExit: There is no JPEG file.
    """
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise SystemExit(f"{source} holds no JPEG file")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    photos = []
    for number in range(count):
        data, turn = found[number % len(found)].read_bytes(), number // len(found)
        photo = folder / f"{number:07d}.jpg"
        photo.write_bytes(add_comment(data, f"copy {turn}".encode()) if turn else data)
        photos.append(photo)
    return photos


def resize_photos(photos: list[Path], folder: Path, side_px: int) -> None:
    """Write photos scaled to a longer side into an empty folder; what was there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for photo in photos:
        with Image.open(photo) as image:
            scale = side_px / max(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            image.convert("RGB").resize(size).save(folder / photo.name, "JPEG", quality=90)


def add_comment(data: bytes, words: bytes) -> bytes:
    """Return a JPEG file with a comment at its start.

    Raises:
        ValueError: It is no JPEG file.
    """
    if not data.startswith(START):
        raise ValueError(f"no JPEG file: it begins with {data[:2]!r}")
    size = (2 + len(words)).to_bytes(2, "big")
    return START + COMMENT + size + words + data[len(START) :]


def write_catalog(path: Path, photos: list[Path]) -> None:
    """Write a catalog of the photos: a product each."""
    columns = {
        "product_id": [photo.stem for photo in photos],
        "title": [f"photo {photo.stem}" for photo in photos],
        "image_uri": [str(photo) for photo in photos],
    }
    pq.write_table(pa.table(columns), path)


def make_checkpoint(architecture: str, work: Path) -> tuple[Path, Path]:
    """Write random weights of an architecture, if they aren't there.

    Args:
        architecture: A name of open_clip's, or the path of a model config.
        work: Where they lie.

    Returns:
        A checkpoint of Vitrine; and the same weights as open_clip reads them, in a file.
    """
    name = Path(architecture).stem
    checkpoint, weights = work / f"checkpoint-{name}", work / f"weights-{name}.pt"
    if not weights.exists():
        import torch

        from encoders.checkpoint import load_model
        from encoders.create import create_checkpoint
        from encoders.spec import EncoderSpec

        create_checkpoint(EncoderSpec(architecture=architecture, pretrained="random"), checkpoint)
        model, _ = load_model(checkpoint)
        unfinished = weights.with_suffix(".part")
        torch.save(model.state_dict(), unfinished)
        unfinished.rename(weights)
    return checkpoint, weights
