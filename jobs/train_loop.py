"""The training loop of one process: batches in, steps, validations, checkpoints out.

Ray Train runs it in every worker; it runs by itself too, where no group was started.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoders.checkpoint import Tokenizers, load_model, load_tokenizers, save_checkpoint, wrap_model
from encoders.checkpoint_files import CheckpointConfig
from encoders.encoder import Encoder
from encoders.objectives import MSR_PRESETS, MimTowers, MsrTowers
from encoders.towers import pick_device
from encoders.train import StepMetrics, TrainBatch, Trainer, TrainSpec
from jobs.batches import Batches
from jobs.config import TrainConfig
from jobs.errors import JobError
from jobs.images import ImagesConfig
from jobs.mining import mine_negatives
from jobs.pair_data import PairData
from jobs.validate import Validation, validate

STATE_FILE, HISTORY_FILE, BEST_FOLDER = "state.pt", "history.json", "best"


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What every worker of a run needs; small and picklable.

    Attributes:
        start: Folder of the checkpoint to start from, of the preset's own kind.
        threads: Of torch, and that fetch and decode pictures.
    """

    config: TrainConfig
    images: ImagesConfig
    start: str
    rank: int = 0
    ranks: int = 1
    device: str | None = None
    threads: int = 2


@dataclass
class History:
    """What a run has shown so far; it outlives a kill.

    Attributes:
        steps: `StepMetrics` as dicts.
        validations: `Validation` as dicts, each with its step.
        best_step: Step of the checkpoint in `best/`; 0 is the start, with fusion weights chosen.
        fingerprint: Its fingerprint.
        bad_pictures: How many pictures rank 0 could not use, by reason.
        seconds: What rank 0 took for its steps, for batches that it had to wait for, for
            validation, and for mining negatives; without what a kill undid.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = -1
    best_score: tuple[float, float] = (-1.0, -1.0)
    fingerprint: str = ""
    pairs: int = 0
    bad_pictures: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


Report = Callable[[dict[str, Any], Path | None], None]
"""Called by every rank at each validation with figures, and with the folder to keep."""


def train_loop(
    task: TrainTask,
    report: Report,
    *,
    resume: Path | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
) -> History:
    """Train from a checkpoint, or go on from where a killed run was.

    Args:
        task: What to do.
        report: Keeps the folder that it is given (rank 0 alone has one) before it returns.
        resume: A folder that `report` was given.
        on_step: Called after every step.

    Returns:
        The history; the best checkpoint is in the folder of the last report.

    Raises:
        JobError: The pairs can't be used, or the loss is not finite.
    """
    run = _Run(task, resume)
    last = run.spec.steps
    if resume is None and task.config.validation is not None:
        run.conclude_part(0, report)  # training may well make a good start worse
    if run.trainer.step < last:
        run.mine_negatives()
    with ThreadPoolExecutor(1) as loader:
        for step, batch in _prefetch(run, loader):
            try:
                with run.timed("steps"):
                    metrics = run.trainer.run_step(batch)
            except ValueError as error:
                raise JobError(f"train: {error}") from error
            run.history.steps.append(asdict(metrics))
            if on_step is not None:
                on_step(metrics)
            if step % run.validate_every == 0 or step == last:
                run.conclude_part(step, report)
            if step % run.validate_every == 0 and step < last:
                run.mine_negatives()
    return run.history


def _prefetch(run: "_Run", loader: ThreadPoolExecutor) -> Iterator[tuple[int, TrainBatch]]:
    """Yield (step, batch); the next batch is made while a step runs.

    Not across a validation, after which the mined negatives are others.
    """
    steps = range(run.trainer.step + 1, run.spec.steps + 1)
    waiting: Future[TrainBatch] | None = None
    for step in steps:
        with run.timed("waiting for batches"):
            batch = run.batches.load(step) if waiting is None else waiting.result()
        waiting = None
        if step % run.validate_every and step < run.spec.steps:
            waiting = loader.submit(run.batches.load, step + 1)
        yield step, batch


class _Run:
    """What lives as long as the loop."""

    def __init__(self, task: TrainTask, resume: Path | None) -> None:
        config = task.config
        self.task, self.spec = task, train_spec(config)
        self.validate_every = config.validate_every or max(1, config.steps // 10)
        torch.set_num_threads(task.threads)
        try:
            self.model, self.config = load_model(task.start)
            self.tokenizers: Tokenizers = load_tokenizers(task.start)
            self.trainer = Trainer(
                _towers(self.model, self.config, config), self.spec, device=task.device
            )
        except ValueError as error:
            raise JobError(f"train: {error}") from error
        self.history = History()
        self.best = Path(task.start)
        if resume is not None:
            self._resume(resume)
        self.data = self._pairs("pairs", config.pairs)
        self.held_out: PairData | None = None
        if config.validation is not None and task.rank == 0:
            self.held_out = self._pairs("validation", config.validation)
        self.batches = Batches(
            self.data,
            self.tokenizers,
            config,
            rank=task.rank,
            ranks=task.ranks,
            threads=task.threads,
        )
        self.history.pairs = len(self.data)
        self._kept = tempfile.TemporaryDirectory(prefix="vitrine-best-")
        if resume is not None:
            shutil.copytree(resume / BEST_FOLDER, self._kept.name, dirs_exist_ok=True)
            self.best = Path(self._kept.name)

    def _pairs(self, name: str, path: str) -> PairData:
        return PairData(
            path,
            f"train.{name}",
            self.task.config.preset,
            self.config,
            self.task.images,
            threads=self.task.threads,
        )

    def _resume(self, folder: Path) -> None:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        self.trainer.load_state(state)
        saved = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
        self.history = History(**saved | {"best_score": tuple(saved["best_score"])})

    def conclude_part(self, step: int, report: Report) -> None:
        """Validate, keep the best, and report the folder that a killed run goes on from."""
        if self.task.rank:
            report({"step": step}, None)
            return
        found = self._validate()
        score = found.score if found else (float(step), 0.0)
        if score > self.history.best_score:
            fusion = found.fusion if found else self.config.fusion
            config = replace(self.config, fusion=fusion)
            self.history.fingerprint = save_checkpoint(self.model, config, self._kept.name)
            self.history.best_step, self.history.best_score = step, score
            self.best = Path(self._kept.name)
        figures: dict[str, Any] = {"step": step}
        if self.history.steps:
            figures["loss"] = self.history.steps[-1]["loss"]
        if found:
            self.history.validations.append({"step": step} | asdict(found))
            figures["score"] = found.score[0]
        self.history.bad_pictures = self.data.count_bad()
        folder = self._write_folder()
        try:
            report(figures, folder)
        finally:
            shutil.rmtree(folder)

    def _validate(self) -> Validation | None:
        if self.held_out is None:
            return None
        most = self.task.config.validation_queries
        with self.timed("validation"):
            return validate(self._encoder(), self.tokenizers, self.held_out, max_queries=most)

    def _write_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="vitrine-train-"))
        torch.save(self.trainer.state(), folder / STATE_FILE)
        shutil.copytree(self.best, folder / BEST_FOLDER)
        text = json.dumps(asdict(self.history), default=str)
        (folder / HISTORY_FILE).write_text(text, encoding="utf-8")
        return folder

    def mine_negatives(self) -> None:
        """Find wrong products near each query, by the encoder as it is now; MSR alone.

        Every rank finds the same ones by itself.
        """
        wanted = self.task.config.hard_negatives
        if not self.data.is_msr or not wanted:
            return
        with self.timed("mining negatives"):
            self.batches.negatives = mine_negatives(
                self._encoder(),
                self.tokenizers,
                self.data,
                wanted=wanted,
                random=np.random.default_rng((self.task.config.seed, self.trainer.step)),
            )

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's seconds to a part of the history's."""
        began = time.monotonic()
        yield
        before = self.history.seconds.get(part, 0.0)
        self.history.seconds[part] = before + time.monotonic() - began

    def _encoder(self) -> Encoder:
        """Return the encoder as it is now."""
        on_cpu = pick_device(self.task.device).type == "cpu"
        trained_in_fp32 = self.spec.precision == "auto" and on_cpu
        return wrap_model(
            self.model,
            self.config,
            fingerprint="in training",
            device=self.task.device,
            precision="fp32" if trained_in_fp32 else self.spec.precision,
        )


def train_spec(config: TrainConfig) -> TrainSpec:
    """Turn the config's section into the core's."""
    names = set(TrainSpec.__dataclass_fields__) & set(TrainConfig.model_fields)
    values = {name: getattr(config, name) for name in names}
    if values["warmup_steps"] is None:
        values["warmup_steps"] = min(50, config.steps // 10)
    return TrainSpec(**values)


def _towers(
    model: Any,  # noqa: ANN401 - either model
    encoder: CheckpointConfig,
    config: TrainConfig,
) -> torch.nn.Module:
    if (config.preset in MSR_PRESETS) != encoder.is_msr:
        raise ValueError(f"the start is no encoder for {config.preset}")
    if encoder.is_msr:
        return MsrTowers(model, encoder.preprocess, encoder.fusion.image_weight)
    return MimTowers(model, encoder.preprocess, config.preset)
