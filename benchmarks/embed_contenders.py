"""Embeds photos by hand, in a process of its own; benchmarks/embed.py runs it.

    python benchmarks/embed_contenders.py forward|decode|loader '{"photos": FOLDER, ...}'

forward  The encoder alone, on batches that lie ready.
decode   Files to pixels alone, as the embedding stage makes them, in several processes.
loader   Both: PyTorch's DataLoader with the stage's own decoding in its workers; no store.

Letters: B rows of a batch, D dimension, H W pixels.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from encoders.preprocess import preprocess_image
from encoders.spec import PreprocessSpec
from jobs.images import ImagesConfig, decode_image

if TYPE_CHECKING:
    from encoders.encoder import Encoder

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
CHUNK_PHOTOS = 8  # that a process of `decode` takes at a time
WARM_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a contender does.

    Attributes:
        photos: A folder of photos.
        checkpoint: The encoder.
        batch: B.
        precision: "fp32" or "bf16".
        threads: Of the forward pass.
        processes: That decode; those of `decode` itself, or the workers of `loader`.
        forward_s: How long `forward` runs.
        born: When the process was started, in seconds since the epoch.
        figures: The file that the figures are written to.
    """

    photos: Path
    checkpoint: Path
    batch: int
    precision: str
    threads: int
    processes: int
    forward_s: float
    born: float
    figures: Path

    @property
    def files(self) -> list[Path]:
        """All photos."""
        return sorted(self.photos.iterdir())

    @property
    def preprocess(self) -> PreprocessSpec:
        """The encoder's preprocessing, read without torch."""
        header = json.loads((self.checkpoint / "encoder.json").read_text(encoding="utf-8"))
        return PreprocessSpec(**header["preprocess"])


class Meter:
    """Seconds and CPU seconds of what runs inside `measure`, and the seconds before it."""

    def __init__(self, born: float) -> None:
        """Count the start from when the process was started, in seconds since the epoch."""
        self._born = born
        self.seconds = self.cpu_s = self.startup_s = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure the block; it must wait for the processes that it starts."""
        started, spent = time.perf_counter(), _cpu_s()
        self.startup_s = time.time() - self._born
        yield
        self.seconds, self.cpu_s = time.perf_counter() - started, _cpu_s() - spent


def _cpu_s() -> float:
    """Return the CPU seconds of this process and of those it waited for."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, both))


def load_pixels(path: Path, spec: PreprocessSpec, images: ImagesConfig) -> UInt8Array:
    """Read one photo as the embedding stage does: (H, W, 3) uint8."""
    image = decode_image(path.read_bytes(), images, min_side_px=2 * spec.size_px)
    return preprocess_image(image, spec)


def load_model(task: Task) -> Encoder:
    """Load the encoder and set its threads."""
    import torch

    from encoders.checkpoint import load_encoder

    torch.set_num_threads(task.threads)
    return load_encoder(task.checkpoint, precision=task.precision)


def encode(encoder: Encoder, pixels: UInt8Array) -> Float32Array:
    """Encode (B, H, W, 3) uint8 pixels: (B, D) float32."""
    there = np.ones(len(pixels), bool)
    return encoder.encode_products(pixels, None, there, ~there)["image"]


def run_forward(task: Task, meter: Meter) -> int:
    """Encode one ready batch again and again; return the number of images."""
    encoder, images = load_model(task), ImagesConfig()
    files = task.files
    chosen = [files[number % len(files)] for number in range(task.batch)]
    pixels = np.stack([load_pixels(path, task.preprocess, images) for path in chosen])
    for _ in range(WARM_BATCHES):
        encode(encoder, pixels)
    batches = 0
    with meter.measure():
        over = time.perf_counter() + task.forward_s
        while time.perf_counter() < over:
            encode(encoder, pixels)
            batches += 1
    return batches * task.batch


class _Decode:
    """Decodes one photo; made once a process."""

    def __init__(self, spec: PreprocessSpec) -> None:
        self._spec, self._images = spec, ImagesConfig()

    def __call__(self, path: Path) -> int:
        return len(load_pixels(path, self._spec, self._images))


def run_decode(task: Task, meter: Meter) -> int:
    """Decode all photos in processes that keep nothing; return the number of images."""
    files, decode = task.files, _Decode(task.preprocess)
    with meter.measure():
        pool = multiprocessing.get_context("fork").Pool(task.processes)
        for _ in pool.imap_unordered(decode, files, CHUNK_PHOTOS):
            pass
        pool.close()
        pool.join()
    return len(files)


class Photos:
    """A data set as DataLoader asks for it: pixels by number."""

    def __init__(self, files: list[Path], spec: PreprocessSpec) -> None:
        """Keep what is to be read."""
        self._files, self._spec, self._images = files, spec, ImagesConfig()

    def __len__(self) -> int:
        """Count the photos."""
        return len(self._files)

    def __getitem__(self, number: int) -> Any:  # noqa: ANN401 - torch is not imported here
        """Return one photo as a (H, W, 3) uint8 tensor: workers hand it over in shared memory."""
        import torch

        return torch.from_numpy(load_pixels(self._files[number], self._spec, self._images))


def run_loader(task: Task, meter: Meter) -> int:
    """Embed all photos with a DataLoader; return the number of images.

    Raises:
        ValueError: A vector is not of unit length.
    """
    encoder = load_model(task)
    from torch.utils.data import DataLoader

    photos: Any = Photos(task.files, task.preprocess)
    loader: Any = DataLoader(photos, batch_size=task.batch, num_workers=task.processes)
    with meter.measure():
        vectors = np.concatenate([encode(encoder, batch.numpy()) for batch in loader])
    if not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=0.01):
        raise ValueError("a vector is not of unit length")
    return len(vectors)


RUNNERS = {"forward": run_forward, "decode": run_decode, "loader": run_loader}


def read_task(text: str) -> Task:
    """Read a task from JSON."""
    values = json.loads(text)
    paths = {name: Path(values[name]) for name in ("photos", "checkpoint", "figures")}
    return Task(**values | paths)


def main() -> None:
    """Run one contender and write its figures."""
    contender, text = sys.argv[1:]
    task = read_task(text)
    meter = Meter(task.born)
    images = RUNNERS[contender](task, meter)
    figures = {
        "images": images,
        "seconds": meter.seconds,
        "startup_s": meter.startup_s,
        "cpu_s": meter.cpu_s,
    }
    task.figures.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
