"""Runs the training loop on Ray Train: one process on a laptop, one a GPU on a cluster."""

import json
import queue as queues
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from jobs.config import JobConfig, TrainConfig
from jobs.errors import ConfigError, JobError
from jobs.images import ImagesConfig
from jobs.nodes import cluster_cpus, cluster_gpus, on_workers
from jobs.progress import Count, Progress
from jobs.run import Run
from jobs.store import Store, scratch_folder
from jobs.tasks import job_error
from jobs.train_loop import HISTORY_FILE, TrainTask, train_loop

# On a cluster, a spot worker that goes away is started again, from the last validation. On one
# machine nothing goes away, and what fails once fails again.
MOST_FAILURES = 3
POLL_S = 0.5
END_S = 5.0


@dataclass(frozen=True)
class _WorkerTask:
    """What Ray Train hands to every worker."""

    config: TrainConfig
    images: ImagesConfig
    store: Store
    start: tuple[str, str]
    gpu: bool
    threads: int
    steps: Any


def start_folder(name: str) -> str:
    """Return the folder, below the store's root, of the checkpoint that a run begins with."""
    return f"training/{name}-start"


def fit(
    config: JobConfig,
    section: TrainConfig,
    run: Run,
    name: str,
    start: str,
) -> ray.train.Checkpoint:
    """Run the workers to the end, from where a killed run of the same name was.

    Args:
        config: Its `images` and `ray` sections.
        section: How to train; its paths are absolute.
        run: Its store keeps what the workers report below `training/<name>`.
        name: Of this training.
        start: Fingerprint of the checkpoint to begin with, in the run's `start_folder`.

    Returns:
        The last folder that the workers reported.

    Raises:
        ConfigError: This machine has fewer GPUs or CPUs than `train.workers`.
        JobError: A worker failed.
    """
    gpus, cpus = cluster_gpus(), cluster_cpus()
    workers = section.workers or max(1, gpus)
    if config.ray.address is None and workers > (gpus or cpus):  # Ray would wait for ever
        found = f"{gpus} GPUs" if gpus else f"{cpus} CPUs"
        raise ConfigError(f"train.workers is {workers}, this machine has {found}")
    threads = max(1, cpus // workers)
    again = {"max_restarts": -1, "max_task_retries": -1}  # what was on its way to be shown is lost
    steps = Queue(actor_options={"num_cpus": 0, "label_selector": on_workers(), **again})
    place = (start_folder(name), start)
    task = _WorkerTask(section, config.images, run.store, place, gpus > 0, threads, steps)
    path, filesystem = _storage(run.store)
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=MOST_FAILURES if config.ray.address else 0),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    stage = f"train {section.preset} in {workers} process{'es' if workers > 1 else ''}"
    try:
        with (
            run.stage(stage),
            run.progress.count(section.steps, "steps") as shown,
            _watch(steps, run.progress, shown),
        ):
            result = _fit(trainer)
    finally:
        steps.shutdown(force=True)
        if handler is not None:  # Ray Train leaves its own behind
            signal.signal(signal.SIGINT, handler)
    if result.checkpoint is None:
        raise JobError("training ended without a checkpoint")
    return result.checkpoint


def _fit(trainer: TorchTrainer) -> ray.train.Result:
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    except SystemExit as error:  # what Ray Train makes of Ctrl-C, without a word
        raise KeyboardInterrupt from error


def _run_worker(loop_config: dict[str, Any]) -> None:
    """Run the loop in a worker of Ray Train."""
    given: _WorkerTask = loop_config["task"]
    context = ray.train.get_context()
    cache = scratch_folder("start")
    task = TrainTask(
        config=given.config,
        images=given.images,
        start=str(given.store.local_copy(cache, *given.start)),
        rank=context.get_world_rank(),
        ranks=context.get_world_size(),
        device=str(ray.train.torch.get_device()) if given.gpu else "cpu",
        threads=given.threads,
    )

    def report(figures: dict[str, Any], folder: Path | None) -> None:
        kept = None if folder is None else ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(figures, checkpoint=kept)

    def show(metrics: Any) -> None:  # noqa: ANN401 - StepMetrics
        if task.rank == 0:
            given.steps.put_nowait((metrics.step, metrics.loss))

    before = ray.train.get_checkpoint()
    try:
        if before is None:
            train_loop(task, report, on_step=show)
        else:
            with before.as_directory() as folder:
                if task.rank == 0:
                    given.steps.put_nowait((_steps_done(Path(folder)), None))
                train_loop(task, report, resume=Path(folder), on_step=show)
    finally:
        shutil.rmtree(cache)


def _steps_done(folder: Path) -> int:
    return len(json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))["steps"])


@contextmanager
def _watch(
    steps: Any,  # noqa: ANN401 - Ray's Queue
    progress: Progress,
    shown: Count,
) -> Iterator[None]:
    """Show the steps as rank 0 does them."""
    over = threading.Event()

    def follow() -> None:
        while not over.is_set():
            try:
                step, loss = steps.get(timeout=POLL_S)
            except queues.Empty:
                continue
            except ray.exceptions.RayError:
                return
            if loss is None:
                progress.step(f"a run was stopped: going on from step {step}")
            else:
                shown.update(step, note=f"loss {loss:.3f}")

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(END_S)  # while no machine has room for the queue, it would wait for that


def _cause(error: BaseException) -> BaseException:
    """Return our own error that a worker ended with, or say what Ray says."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        found = job_error(failure)
        if isinstance(found, JobError):
            return found
    return JobError(f"training failed: {str(error).strip().splitlines()[-1]}")


def _storage(store: Store) -> tuple[str, Any]:
    """Return Ray Train's storage path below the store, and a file system for a remote one."""
    if store.is_local:
        return store.uri("training"), None
    filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store.filesystem()))
    return store.uri("training").partition("://")[2], filesystem
