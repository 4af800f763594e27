"""What an encoder's image tower reaches on one device, and how many cores must decode for it.

    python benchmarks/forward.py [--architectures ViT-B-32 ViT-B-16 ViT-L-14] [--json FILE]

It needs torch, open_clip and Pillow, and nothing of Ray, Arrow or FAISS, so that it runs on a bare
GPU machine. Weights are random. One after the other, in turn, so many times; medians:

bare      the model's `encode_image` in bf16 weights, on a batch that lies on the device
compiled  the same under torch.compile (--compile)
encoder   `OpenClipEncoder.encode_images` of Vitrine: from uint8 pixels in memory to float32 unit
          rows in memory, so with copies, normalising and rounding
texts     `OpenClipEncoder.encode_texts` of texts of 15 tokens, and of texts that fill the context
decode    JPEG bytes to pixels as the embedding stage makes them, on one core

An embedding actor adds bookkeeping to `encoder`: benchmarks/embed.py measures it, with Ray.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where nothing is installed

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from PIL import Image

from encoders.encoder import OpenClipEncoder
from encoders.preprocess import preprocess_image
from encoders.runtime import round_weights
from encoders.spec import PreprocessSpec, context_length, image_size_px
from encoders.towers import build_model, read_model_config

Figures = dict[str, Any]
UInt8Array = npt.NDArray[np.uint8]
TEXTS, SHORT_TOKENS = 128, 15
SIDE_PX = (1000, 750)  # of a rendered photo, where no folder is named


def read_photos(folder: Path | None, count: int) -> list[bytes]:
    """Return so many JPEG files, of a folder, or rendered."""
    if folder is not None:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".jpg")
        if not paths:
            raise SystemExit(f"{folder} holds no JPEG file")
        return [paths[number % len(paths)].read_bytes() for number in range(count)]
    return [render_photo(seed) for seed in range(count)]


def render_photo(seed: int) -> bytes:
    """Render soft blobs with noise: about as many bytes as a photo."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(SIDE_PX)
    noisy = np.asarray(blobs, np.int16) + rng.integers(-12, 13, (*SIDE_PX[::-1], 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def decode(data: bytes, spec: PreprocessSpec) -> UInt8Array:
    """Decode as `jobs.images` does: no larger than twice the side that is wanted."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (2 * spec.size_px, 2 * spec.size_px))
        return preprocess_image(image.convert("RGB"), spec)


def measure(run: Callable[[], object], images: int, seconds: float, device: str) -> float:
    """Return images a second of a call that is repeated for some seconds, after two to warm up."""
    for _ in range(2):
        run()
    wait(device)
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        run()
        calls += 1
    wait(device)
    return images * calls / (time.perf_counter() - started)


def wait(device: str) -> None:
    """Wait for what the device was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure_architecture(name: str, photos: list[bytes], arguments: argparse.Namespace) -> Figures:
    """Measure one architecture; return the medians of all rounds."""
    config, _ = read_model_config(name)
    statistics_of = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    spec = PreprocessSpec(
        size_px=image_size_px(config),
        resize_mode="shortest",
        interpolation="bicubic",
        mean=statistics_of[0],
        std=statistics_of[1],
    )
    pixels = np.stack([decode(data, spec) for data in photos])
    encoders = {
        precision: OpenClipEncoder(
            build_model(config),
            spec,
            dim=int(config["embed_dim"]),
            length_tokens=context_length(config),
            fingerprint=name,
            device=arguments.device,
            precision=precision,
        )
        for precision in ("fp32", "bf16")
    }
    round_weights(encoders["bf16"]._model)  # as `load_encoder` does
    few = pixels[: arguments.check]
    cosines = (encoders["fp32"].encode_images(few) * encoders["bf16"].encode_images(few)).sum(1)
    rounds = [
        measure_round(name, encoders, pixels, photos, arguments) for _ in range(arguments.rounds)
    ]
    found = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    bare = max(rate for key, rate in found.items() if key.startswith("bare"))
    return found | {
        "min_cosine_bf16": float(cosines.min()),
        "encoder_over_bare": found["encoder"] / bare,
        "cores_to_feed": found["encoder"] / found["decode"],
    }


def measure_round(
    name: str,
    encoders: dict[str, OpenClipEncoder],
    pixels: UInt8Array,
    photos: list[bytes],
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Measure every part once, one after the other; return images a second of each."""
    device, seconds = arguments.device, arguments.seconds
    spec = encoders["bf16"].preprocess
    model: Any = build_model(read_model_config(name)[0]).to(device).to(torch.bfloat16)
    found: dict[str, float] = {}
    for batch in arguments.batches:
        ready = torch.zeros((batch, 3, spec.size_px, spec.size_px), dtype=torch.bfloat16)
        ready = ready.to(device).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            found[f"bare at {batch}"] = measure(
                lambda ready=ready: model.encode_image(ready), batch, seconds, device
            )
            if arguments.compile:
                fast = torch.compile(model.encode_image, mode="max-autotune-no-cudagraphs")
                found[f"compiled at {batch}"] = measure(
                    lambda ready=ready, fast=fast: fast(ready), batch, seconds, device
                )
    for precision, key in (("bf16", "encoder"), ("fp32", "encoder fp32")):
        one = encoders[precision]
        found[key] = measure(
            lambda one=one: one.encode_images(pixels), len(pixels), seconds, device
        )
    for length in (SHORT_TOKENS, context_length(read_model_config(name)[0])):
        tokens = make_texts(encoders["bf16"], length)
        found[f"texts of {length} tokens"] = measure(
            lambda tokens=tokens: encoders["bf16"].encode_texts(tokens), TEXTS, seconds, device
        )
    few = photos[:64]
    found["decode"] = measure(
        lambda: [decode(data, spec) for data in few], len(few), seconds, "cpu"
    )
    return found


def make_texts(encoder: OpenClipEncoder, length: int) -> npt.NDArray[np.int64]:
    """Return so many different texts of a length: the last token has the highest number."""
    (known,) = encoder._texts
    last = int(known.vocab_size or 49408) - 1
    tokens = np.zeros((TEXTS, known.length_tokens), np.int64)
    tokens[:, : length - 1] = np.random.default_rng(0).integers(1, last, (TEXTS, length - 1))
    tokens[:, length - 1] = last
    return tokens


def describe_device(device: str) -> Figures:
    """Name the device and the versions that the figures are of."""
    told: Figures = {"torch": torch.__version__, "open_clip": open_clip.__version__}
    told["threads"] = torch.get_num_threads()
    if device == "cuda":
        return told | {"device": torch.cuda.get_device_name()}
    found = torch.cpu.get_capabilities()
    return told | {
        "device": found["cpu_name"],
        "bf16": [n for n in found if "bf16" in n and found[n]],
    }


def main() -> None:
    """Measure all architectures; print a table, and keep the figures where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = ["ViT-B-32", "ViT-B-16", "ViT-L-14"]
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--architectures", nargs="+", default=names)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs; else they are rendered")
    parser.add_argument("--images", type=int, default=1024 if here == "cuda" else 64)
    parser.add_argument("--check", type=int, default=32, help="images of the cosine of bf16")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each part")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    photos = read_photos(arguments.photos, arguments.images)
    figures: Figures = describe_device(arguments.device)
    for name in arguments.architectures:
        found = measure_architecture(name, photos, arguments)
        figures[name] = found
        print(f"\n{name}, {figures['device']}, {arguments.device}\n\n| part | |\n|---|---|")
        for key, value in found.items():
            print(f"| {key} | {value:.5g} |")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
