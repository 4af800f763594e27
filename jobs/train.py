"""The `train` command: pairs in, a checkpoint out, on Ray Train.

Workers of Ray Train (`jobs.train_ray`) run `jobs.train_loop.train_loop`. What a killed run had
reached lies in the store below `training/<run>`, where the name is the hash of all that decides
the result; the same command goes on from there.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
from botocore.exceptions import BotoCoreError

from encoders.checkpoint_files import read_checkpoint_config
from encoders.create import create_checkpoint, create_start
from encoders.fusion import FusionSpec
from encoders.objectives import MSR_PRESETS
from encoders.spec import EncoderSpec
from jobs.batches import check_batch_size
from jobs.cluster import ray_session
from jobs.config import JobConfig, TrainConfig
from jobs.errors import CatalogError, ConfigError, JobError, StoreError
from jobs.machines import check_shared
from jobs.outputs import check_new_folder
from jobs.pair_data import PairData
from jobs.progress import Progress
from jobs.run import Run
from jobs.storage import open_filesystem
from jobs.store import Store, scratch_folder
from jobs.train_loop import BEST_FOLDER, HISTORY_FILE, train_spec
from jobs.train_ray import fit, start_folder
from jobs.train_report import write_train_report


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run gave.

    Attributes:
        checkpoint: The directory.
        fingerprint: Its fingerprint.
        pairs: In the file.
        bad_pictures: How many the first process could not use; their pairs were passed over.
        best_step: The step that the checkpoint is from; 0 is the start.
        final_loss: Mean of the last tenth of the steps.
        validation: Figures of the kept checkpoint by kind of query and field; none without pairs.
        report: Address of report.html.
    """

    checkpoint: str
    fingerprint: str
    preset: str
    pairs: int
    bad_pictures: int
    steps: int
    best_step: int
    final_loss: float
    validation: dict[str, Any] | None
    report: str


def train(config: JobConfig, destination: Path, progress: Progress) -> TrainResult:
    """Train the configured encoder on pairs and write the best checkpoint.

    Args:
        config: Its `train`, `encoder`, `images` and `ray` sections, and the store.
        destination: The checkpoint's folder; must not exist, or be empty.
        progress: Shows steps and loss.

    Raises:
        ConfigError: There is no `train` section, or the encoder can't be made.
        CatalogError: The pairs can't be read.
        StoreError: The store can't be written.
        JobError: Too few pairs are usable, the destination is not empty or can't be written.
    """
    if config.train is None:
        raise ConfigError("train: the config has no train section (train.pairs at the least)")
    section = _absolute(config.train)
    _check_settings(section)
    _check_destination(destination)
    run = Run("train", Store(config.store), progress)
    progress.stage("prepare the encoder")
    start = scratch_folder("train")
    try:
        fingerprint = make_start(config, section, start)
        _check_pairs(config, section, start)
        name = f"train-{_identity(config, section, fingerprint)}"
        _add_start(run.store, start, fingerprint, name)
    finally:
        shutil.rmtree(start)
    with ray_session(config.ray):
        check_shared([run.store.uri(start_folder(name)), section.pairs, section.validation])
        kept = fit(config, section, run, name, fingerprint)
        result = _conclude(config, run, kept, destination)
    _forget(run.store, name)
    return result


def _check_settings(section: TrainConfig) -> None:
    try:
        train_spec(section)
    except ValueError as error:
        raise ConfigError(f"train: {error}") from error


def _check_destination(destination: Path) -> None:
    """Refuse what can't be written to; after hours of training it would be late."""
    check_new_folder(destination)
    parent = destination.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"{destination} can't be made: {error}") from error
    if not os.access(parent, os.W_OK):
        raise JobError(f"{destination} can't be made: {parent} is not writable")


def make_start(config: JobConfig, section: TrainConfig, directory: Path) -> str:
    """Write the checkpoint that the run begins with; return its fingerprint.

    Raises:
        ConfigError: The encoder can't be made, or doesn't go with the preset.
    """
    spec = config.encoder
    if section.init_from is not None:
        spec = EncoderSpec(checkpoint=section.init_from)
    fusion = None
    if section.preset in MSR_PRESETS:
        weight = section.image_weight if section.fusion == "alpha_concat" else 0.5
        fusion = FusionSpec(kind=section.fusion, image_weight=weight)
    try:
        return create_start(
            spec,
            directory,
            preset=section.preset,
            fusion=fusion,
            text_encoder=section.text_encoder,
            seed=section.seed,
        )
    except ValueError as error:
        raise ConfigError(f"encoder: {error}") from error


def _add_start(store: Store, start: Path, fingerprint: str, name: str) -> None:
    try:
        store.add_checkpoint(start, fingerprint, start_folder(name))
    except (OSError, BotoCoreError) as error:
        raise StoreError(f"store {store.root} can't be written: {error}") from error


def _absolute(section: TrainConfig) -> TrainConfig:
    """Return the section with absolute paths: workers run in folders of their own."""
    paths = {
        name: str(Path(path).absolute())
        for name in ("pairs", "validation")
        if (path := getattr(section, name)) and "://" not in path
    }
    return section.model_copy(update=paths)


def _check_pairs(config: JobConfig, section: TrainConfig, start: Path) -> None:
    """Read the pairs once, so that what is wrong with them is said before workers start."""
    encoder = read_checkpoint_config(start)
    for name in ("pairs", "validation"):
        path = getattr(section, name)
        if path is not None:
            data = PairData(path, f"train.{name}", section.preset, encoder, config.images)
            if name == "pairs":
                check_batch_size(data, section, max(1, section.workers))


def _identity(config: JobConfig, section: TrainConfig, fingerprint: str) -> str:
    """Hash all that decides the result: the section, the limits on pictures, the start."""
    pairs = [path for path in (section.pairs, section.validation) if path]
    values = section.model_dump(mode="json")
    parts = [values, asdict(config.images), fingerprint, [_version(path) for path in pairs]]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(path: str) -> str:
    """Return what changes when a file does: its size and time, or its ETag."""
    try:
        filesystem, local = open_filesystem(path)
        return str(filesystem.ukey(local))
    except (OSError, ValueError, BotoCoreError) as error:
        raise CatalogError(f"pairs {path} can't be read: {error}") from error


def _conclude(
    config: JobConfig, run: Run, kept: ray.train.Checkpoint, destination: Path
) -> TrainResult:
    """Write the report, and copy the best checkpoint to its place, whole or not at all."""
    place = destination.absolute()
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with kept.as_directory() as folder:
        history = json.loads((Path(folder) / HISTORY_FILE).read_text(encoding="utf-8"))
        found = create_checkpoint(EncoderSpec(checkpoint=str(Path(folder) / BEST_FOLDER)), part)
    if config.train is None or found != history["fingerprint"]:
        raise JobError(f"{part}: the checkpoint is not the one that was trained")
    losses = [step["loss"] for step in history["steps"]]
    tail = losses[-max(1, len(losses) // 10) :]
    best = [v for v in history["validations"] if v["step"] == history["best_step"]]
    report = write_train_report(run, config, history)
    try:
        part.replace(place)
    except OSError as error:
        raise JobError(f"{place} can't be made: {error}; the checkpoint is in {part}") from error
    return TrainResult(
        checkpoint=str(destination),
        fingerprint=found,
        preset=config.train.preset,
        pairs=history["pairs"],
        bad_pictures=sum(history["bad_pictures"].values()),
        steps=len(losses),
        best_step=history["best_step"],
        final_loss=sum(tail) / len(tail),
        validation=best[0]["figures"] if best else None,
        report=report,
    )


def _forget(store: Store, name: str) -> None:
    """Remove what only a killed run would need."""
    filesystem = store.filesystem()
    for folder in (store.uri("training", name), store.uri(start_folder(name))):
        if filesystem.exists(folder):
            filesystem.rm(folder, recursive=True)
