"""The `reindex` command: other indexes from stored embeddings, or another encoder for all."""

from jobs.build import BuildTask, build_version
from jobs.cluster import ray_session
from jobs.config import JobConfig
from jobs.diff import Counts
from jobs.embed import EmbedResult
from jobs.errors import StoreError
from jobs.exact import release_live
from jobs.leases import hold_lease
from jobs.pipeline import Inputs, on_machines, open_inputs, refresh_catalog
from jobs.progress import Progress
from jobs.publish import Changes, RunResult, conclude
from jobs.run import Run
from jobs.store import Store


def reindex(config: JobConfig, progress: Progress, *, publish: bool = True) -> RunResult:
    """Build the indexes anew from stored embeddings, gate, publish.

    With the newest release's encoder nothing is embedded: the same rows, with the metadata of
    that release, get other indexes. With another encoder every row of the catalog is embedded
    with it first, while the old release goes on serving; one commit then switches. A backfill
    that is killed, or that another job's release overtakes, goes on where it stopped.

    Args:
        config: The job.
        progress: Shows what happens.
        publish: Whether to publish; else the index version is left for `evaluate` and `demo`.

    Raises:
        JobError: See `jobs.errors`; there is no release yet.
        GateError: Measured quality is under the bar; nothing was published.
    """
    run = Run("reindex", Store(config.store), progress)
    if run.parent is None:
        raise StoreError(f"store {run.store.root} has no release; run `vitrine refresh` first")
    with hold_lease(run.store, run.run_id, run.parent):
        inputs = open_inputs(config, run)
        with ray_session(config.ray), run.counted():
            same = run.parent.encoder == inputs.space.encoder
            work = _rebuild if same else refresh_catalog
            return on_machines(run, inputs, lambda: work(run, inputs, publish=publish))


def _rebuild(run: Run, inputs: Inputs, *, publish: bool) -> RunResult:
    if run.parent is None:
        raise ValueError("there is no release")
    with run.stage("read the release's rows") as counted:
        live = release_live(run.store, run.parent, inputs.config.ray.bucket_rows)
        counted["rows"] = run.parent.vectors
    task = BuildTask(
        config=inputs.config,
        catalog=inputs.catalog,
        space=inputs.space,
        contract=inputs.contract,
        live=live,
        plan=None,
        version=run.parent.embeddings_version,
        retrain=("A reindex trains anew.",),
    )
    changes = Changes(counts=Counts(unchanged=live.rows.vectors), embedded=EmbedResult())
    return conclude(run, task, build_version(run, task), changes, publish=publish)
