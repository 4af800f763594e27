"""Waits for Ray tasks: shows how far they are, and tells what went wrong in one line.

What a task raised of ours passes as it is; where a process or a machine died, that is said.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import exceptions

from jobs.errors import JobError
from jobs.progress import open_progress
from jobs.storage import one_line

WATCH_S = 5.0
SHOW_S = 0.5
GOES_ON = "what was committed stays, and the next run goes on from there"
LESS = "if it happens again, try fewer embed.actors, a smaller embed.batch_size or ray.bucket_rows"


class LostError(JobError):
    """A process or machine of the cluster died, and what it held or did is lost."""


# What Ray says when a process or machine ends that no error of our code has ended.
CRASHES: tuple[tuple[type[BaseException], str], ...] = (
    (exceptions.OutOfMemoryError, f"Ray killed a worker as memory ran out; {GOES_ON}; {LESS}"),
    (exceptions.WorkerCrashedError, f"a Ray worker process died; {GOES_ON}; {LESS}"),
    (exceptions.RayActorError, f"a Ray actor process died; {GOES_ON}; {LESS}"),
    (exceptions.NodeDiedError, f"a machine of the Ray cluster died; {GOES_ON}"),
    (exceptions.LocalRayletDiedError, f"Ray died on this machine; {GOES_ON}"),
    (exceptions.ObjectLostError, f"Ray lost data with the process that held them; {GOES_ON}"),
    (exceptions.OutOfDiskError, f"Ray's disk for spilled data is full; {GOES_ON}: free some space"),
    (
        exceptions.ObjectStoreFullError,
        f"Ray's object store is full; {GOES_ON}; try a larger ray.object_store_mb",
    ),
)
# What says that a task was lost with its process or machine.
LOST = (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.ObjectLostError)
TRIES = 4  # as Ray's own tasks have
# How Ray quotes our error where an actor's own start raised it: it keeps the words alone.
QUOTED_RAY = re.compile(r"^ray\.exceptions\.(\w+): ", re.MULTILINE)
QUOTED_ERROR = re.compile(r"^jobs\.(?:errors|storage)\.\w+: (.+)$", re.MULTILINE)


def gather(refs: Sequence[Any]) -> list[Any]:
    """Wait for task results, in order; on a terminal, show how many there are.

    Raises:
        JobError: See `ray_errors`.
    """
    progress = open_progress()
    with ray_errors():
        if not progress.draws or len(refs) < 2:
            return list(ray.get(list(refs)))
        found: dict[Any, Any] = {}
        pending = list(dict.fromkeys(refs))
        with progress.tasks(len(pending)) as tell:
            while pending:
                done, pending = ray.wait(pending, num_returns=len(pending), timeout=SHOW_S)
                found.update(zip(done, ray.get(done), strict=True))  # a failed one ends the wait
                tell(len(found))
        return [found[ref] for ref in refs]


@contextmanager
def ray_errors() -> Iterator[None]:
    """Turn what Ray raises into our own error; any other error of a task is a bug, and passes.

    Raises:
        JobError: A task raised one: its own type and message, not Ray's wrapping. Or a process or
            machine of the cluster died.
    """
    try:
        yield
    except exceptions.RayError as error:
        found = job_error(error)
        if isinstance(found, JobError):
            raise found from error
        raise


def gather_bounded(
    submit: Callable[[Any], Any], inputs: Iterable[Any], *, in_flight: int
) -> Iterator[Any]:
    """Yield task results in order, with a bounded number of tasks under way.

    Args:
        submit: Starts a task for one input and returns its reference.
        inputs: One value a task; if they have a length, how far it is shows on a terminal.
        in_flight: Most tasks that are started and not yet yielded.
    """
    pending: list[Any] = []
    total = len(inputs) if isinstance(inputs, Sized) else 0
    with open_progress().tasks(total) as tell:
        for number, value in enumerate(inputs, 1):
            pending.append(submit(value))
            if len(pending) >= in_flight:
                yield gather([pending.pop(0)])[0]
                tell(number - len(pending))
        for number, ref in enumerate(pending, total - len(pending) + 1):
            yield gather([ref])[0]
            tell(number)


def run_telling(work: Callable[[Callable[[str], None]], Any]) -> Iterator[Any]:
    """Do a task's work in a thread, and yield what it tells meanwhile; at last, its result.

    A streaming task that returns this needs no actor beside it, whose start would cost seconds.

    Args:
        work: Takes what it may tell words with, of which the newest are yielded every `WATCH_S`;
            its result is no text.
    """
    newest: deque[str] = deque(maxlen=1)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work, newest.append)
        while not wait([result], timeout=WATCH_S).done:
            with suppress(IndexError):
                yield newest.pop()
    yield result.result()


def watch(start: Callable[[], Any], waiting: str, progress: Callable[[str], None]) -> Any:  # noqa: ANN401
    """Run a task that `run_telling` runs: pass on its words, and return its result.

    A lost task is started again here, `TRIES` times in all. Ray, which counts what a stream
    yields, would drop the result of a second try that tells fewer words.

    Args:
        start: Starts the task, with `max_retries=0`, and returns its references.
        waiting: What to say while no machine has room for the task.
        progress: Called with words.

    Raises:
        JobError: See `ray_errors`.
    """
    with ray_errors():
        for _ in range(TRIES - 1):
            try:
                return _follow(start(), waiting, progress)
            except (exceptions.OutOfMemoryError, *LOST) as error:
                progress(f"try again: {one_line(_crash(error) or error)}")
        return _follow(start(), waiting, progress)


def _follow(steps: Any, waiting: str, progress: Callable[[str], None]) -> Any:  # noqa: ANN401
    if not ray.wait([steps], timeout=2 * WATCH_S)[0]:
        progress(waiting)
    value = None
    for reference in steps:
        value = ray.get(reference)
        if isinstance(value, str):
            progress(value)
    return value


def job_error(error: BaseException) -> BaseException:
    """Return the JobError that a Ray exception wraps or comes to, or the exception itself."""
    causes = list(_causes(error))
    # Ray's own exception is an instance of what it wraps, too, and its words are a traceback.
    ours = (e for e in causes if isinstance(e, JobError) and not isinstance(e, exceptions.RayError))
    crashes = (told for told in map(_crash, causes) if told is not None)
    return next(ours, None) or next(crashes, error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what Ray wrapped in it, from the outside in."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) and cause is not seen else seen.__cause__


def _crash(error: BaseException) -> JobError | None:
    """Say what died, if that is what Ray tells; or what an actor's start raised, if it is ours."""
    if isinstance(error, exceptions.RayActorError) and error.actor_init_failed:
        if quoted := QUOTED_ERROR.findall(str(error)):
            return JobError(quoted[-1])
        kinds = [getattr(exceptions, name, None) for name in QUOTED_RAY.findall(str(error))]
        lost = any(kind and issubclass(kind, exceptions.ObjectLostError) for kind in kinds)
        return LostError(f"an actor could not start again; {GOES_ON}") if lost else None
    made = LostError if isinstance(error, (exceptions.RayActorError, *LOST)) else JobError
    return next((made(words) for kind, words in CRASHES if isinstance(error, kind)), None)
