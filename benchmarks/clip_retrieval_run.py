"""Embeds photos with clip-retrieval; benchmarks/embed.py runs it in its own environment.

    python benchmarks/clip_retrieval_run.py '{"photos": FOLDER, "folder": FOLDER, ...}'

It is `clip inference` with the command line's arguments. The clock runs from the first batch that
is asked for to the vectors on disk: loading the model and warming up are told apart. Nothing of
Vitrine is imported.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_retrieval.clip_inference import worker
from clip_retrieval.clip_inference.main import main as clip_inference


class Clock:
    """When the work began and ended, in seconds since the epoch, and how long it took."""

    begun = ended = seconds = 0.0


class Logger(worker.LoggerWriter):
    """Runs the clock where the runner runs its own."""

    def start(self) -> None:
        """Start."""
        super().start()
        Clock.begun = time.time()

    def end(self) -> None:
        """Stop; the statistics themselves, which take seconds to wind up, are not counted."""
        Clock.ended = time.time()
        Clock.seconds = Clock.ended - Clock.begun
        super().end()


class Writer(worker.NumpyWriter):
    """Adds the time of writing the vectors, which the runner leaves out."""

    def flush(self) -> None:
        """Write what is left."""
        started = time.time()
        super().flush()
        Clock.seconds += time.time() - started


def main() -> None:
    """Embed all photos into one file of vectors, and write the figures."""
    task: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    worker.LoggerWriter, worker.NumpyWriter = Logger, Writer
    folder = Path(task["folder"])
    clip_inference(
        input_dataset=task["photos"],
        output_folder=str(folder / "vectors"),
        input_format="files",
        batch_size=task["batch"],
        num_prepro_workers=task["processes"],
        enable_text=False,
        clip_model=f"open_clip:{task['architecture']}/{task['weights']}",
    )
    images = sum(len(np.load(path)) for path in (folder / "vectors" / "img_emb").glob("*.npy"))
    figures = {
        "images": images,
        "seconds": Clock.seconds,
        "startup_s": Clock.begun - task["born"],
        "window": [Clock.begun, Clock.ended],
    }
    Path(task["figures"]).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
