"""The `train` command: pairs in, a checkpoint out. One process, the MIM 3-tower terms.

Street photo, shop photo and product text of a pair are pulled together by
`encoders.train.train_mim`; how the terms are weighted is our reconstruction.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from encoders.checkpoint import create_checkpoint, load_encoder, load_model, save_checkpoint
from encoders.preprocess import Tokenizer, load_tokenizer
from encoders.spec import PreprocessSpec
from encoders.train import TrainBatch, TrainSpec, train_mim
from indexing.metrics import recall_at_k
from jobs.config import JobConfig, TrainConfig
from jobs.embed_steps import load_pixels
from jobs.errors import ConfigError, JobError
from jobs.fetch import fetch_images
from jobs.images import ImageRejected, ImagesConfig
from jobs.pairs import read_pairs
from jobs.progress import Progress
from jobs.schemas import hash63
from jobs.store import scratch_folder

PAIR_COLUMNS = ("query_image_uri", "product_image_uri", "product_text", "product_id")
CACHE_BYTES = 2**30
MAX_VALIDATION_PAIRS = 500
DECODE_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run gave.

    Attributes:
        checkpoint: The directory.
        fingerprint: Its fingerprint.
        final_loss: Mean of the last tenth of the steps.
        recall_at_1: Street photo to shop photo on the validation pairs; none without them.
        validation_products: The products that were searched for it.
        unusable_pairs: Training pairs left out because a picture can't be used.
    """

    checkpoint: str
    fingerprint: str
    pairs: int
    unusable_pairs: int
    final_loss: float
    recall_at_1: float | None
    recall_at_10: float | None
    validation_products: int


class Pairs:
    """Pairs of one Parquet file; pictures are decoded once and kept while they fit a bound."""

    def __init__(
        self, path: str, key: str, images: ImagesConfig, preprocess: PreprocessSpec
    ) -> None:
        """Read the table; see `jobs.pairs.read_pairs`.

        Raises:
            CatalogError: The file can't be read, lacks columns or is empty.
        """
        table, self._root = read_pairs(path, PAIR_COLUMNS, key=key)
        self.rows: list[dict[str, Any]] = table.to_pylist()
        self._images, self._preprocess = images, preprocess
        self._cache: dict[str, npt.NDArray[np.uint8] | None] = {}
        self._cached_bytes = 0

    def pixels(self, uri: str | None) -> npt.NDArray[np.uint8] | None:
        """Return a picture as (H, W, 3) uint8; None if it can't be used."""
        if uri is None:
            return None
        if uri not in self._cache:
            data = fetch_images([uri], self._root, self._images)[0]
            try:
                found = load_pixels(data, self._images, self._preprocess)
            except ImageRejected:
                return None
            if self._cached_bytes + found.nbytes > CACHE_BYTES:
                return found
            self._cached_bytes += found.nbytes
            self._cache[uri] = found
        return self._cache[uri]


def train(config: JobConfig, destination: Path, progress: Progress) -> TrainResult:
    """Train the configured encoder on pairs and write a checkpoint.

    Args:
        config: Its `train` and `encoder` sections.
        destination: The checkpoint's folder; must not exist, or be empty.
        progress: Shows steps and loss.

    Raises:
        ConfigError: There is no `train` section, or the encoder can't be made.
        CatalogError: The pairs can't be read.
        JobError: Too few pairs are usable, or the destination is not empty.
    """
    if config.train is None:
        raise ConfigError("train: the config has no train section (train.pairs at the least)")
    if destination.exists() and any(destination.iterdir()):
        raise JobError(f"{destination} is not empty; checkpoints are never replaced")
    progress.stage("prepare the encoder and the pairs")
    start = scratch_folder("train")
    try:
        create_checkpoint(config.encoder, start)
        model, model_config, preprocess = load_model(start)
        tokenizer = load_tokenizer(model_config)
    except ValueError as error:
        raise ConfigError(f"encoder: {error}") from error
    pairs = Pairs(config.train.pairs, "train.pairs", config.images, preprocess)
    usable = _usable_rows(pairs, progress)
    if len(usable) < config.train.batch_size:
        raise JobError(
            f"{len(usable)} of {len(pairs.rows)} pairs are usable, "
            f"train.batch_size is {config.train.batch_size}"
        )
    spec = train_spec(config.train)
    progress.stage(f"train on {len(usable)} pairs")
    losses: list[float] = []
    batches = _batches(pairs, usable, tokenizer, config.train)
    with progress.count(spec.steps, "steps") as shown:
        for metrics in train_mim(model, batches, spec, preprocess):
            losses.append(metrics.loss)
            shown.update(metrics.step)
    fingerprint = save_checkpoint(model, model_config, preprocess, destination)
    recall = _validate(config, destination, preprocess, progress)
    result = TrainResult(
        checkpoint=str(destination),
        fingerprint=fingerprint,
        pairs=len(usable),
        unusable_pairs=len(pairs.rows) - len(usable),
        final_loss=float(np.mean(losses[-max(1, len(losses) // 10) :])),
        recall_at_1=recall.get(1),
        recall_at_10=recall.get(10),
        validation_products=int(recall.get(0, 0)),
    )
    (destination / "training.json").write_text(
        json.dumps(asdict(result) | {"losses": losses, "spec": asdict(spec)}, indent=2)
    )
    return result


def train_spec(config: TrainConfig) -> TrainSpec:
    """Turn the config's section into the core's."""
    return TrainSpec(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=min(50, config.steps // 10),
        text_loss_weight=config.text_loss_weight,
        seed=config.seed,
    )


def _usable_rows(pairs: Pairs, progress: Progress) -> list[int]:
    """Decode every picture once; keep the pairs whose two pictures and text can be used."""
    with ThreadPoolExecutor(DECODE_THREADS) as pool, progress.count(len(pairs.rows)) as shown:
        usable = []
        good = pool.map(lambda row: _is_usable(pairs, row), pairs.rows)
        for place, ok in enumerate(good):
            usable += [place] if ok else []
            shown.update(place + 1, place + 1 - len(usable))
    return usable


def _is_usable(pairs: Pairs, row: dict[str, Any]) -> bool:
    pictures = (row["query_image_uri"], row["product_image_uri"])
    text = row["product_id"] and row["product_text"]
    return bool(text) and all(pairs.pixels(uri) is not None for uri in pictures)


def _batches(
    pairs: Pairs, usable: Sequence[int], tokenizer: Tokenizer, config: TrainConfig
) -> Iterator[TrainBatch]:
    """Yield batches for ever: each pass over the pairs in another seeded order."""
    random = np.random.default_rng(config.seed)
    tokens = tokenizer([pairs.rows[place]["product_text"] for place in usable])
    while True:
        order = random.permutation(len(usable))
        for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
            picked = order[start : start + config.batch_size]
            rows = [pairs.rows[usable[place]] for place in picked]
            yield TrainBatch(
                query_pixels=_stack(pairs, [row["query_image_uri"] for row in rows]),
                product_pixels=_stack(pairs, [row["product_image_uri"] for row in rows]),
                product_tokens=tokens[picked],
                product_ids=np.array(
                    [hash63((row["product_id"].encode("utf-8", "replace"),)) for row in rows],
                    np.int64,
                ),
            )


def _stack(pairs: Pairs, uris: Sequence[str]) -> npt.NDArray[np.uint8]:
    pictures = [pairs.pixels(uri) for uri in uris]
    gone = [uri for uri, picture in zip(uris, pictures, strict=True) if picture is None]
    if gone:
        raise JobError(f"picture {gone[0]} was there when training began and is not any more")
    return np.stack([picture for picture in pictures if picture is not None])


def _validate(
    config: JobConfig, checkpoint: Path, preprocess: PreprocessSpec, progress: Progress
) -> dict[int, float]:
    """Search the validation pairs' products by their street photos, exactly.

    Returns:
        recall_at_k by k, and under 0 the number of products; empty without validation pairs.
    """
    if config.train is None or config.train.validation is None:
        return {}
    progress.stage("validate")
    pairs = Pairs(config.train.validation, "train.validation", config.images, preprocess)
    rows = pairs.rows[:MAX_VALIDATION_PAIRS]
    rows = [row for row in rows if _is_usable(pairs, row)]
    if not rows:
        raise JobError(f"no pair of {config.train.validation} is usable")
    encoder = load_encoder(checkpoint)
    products = {row["product_id"]: row["product_image_uri"] for row in rows}
    names = list(products)
    database = encoder.encode_images(_stack(pairs, list(products.values())))
    queries = encoder.encode_images(_stack(pairs, [row["query_image_uri"] for row in rows]))
    order = np.argsort(-(queries @ database.T), axis=1, kind="stable")[:, :10]
    found = [[names[place] for place in ranked] for ranked in order]
    relevant = [{row["product_id"]} for row in rows]
    return {0: len(names)} | {k: recall_at_k(found, relevant, k) for k in (1, 10)}
