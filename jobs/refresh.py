"""The `refresh` command: embed what changed, update the indexes, publish if quality holds."""

from jobs.cluster import ray_session
from jobs.config import JobConfig
from jobs.inputs import made_encoder, open_catalog, read_fusion
from jobs.leases import hold_lease
from jobs.pipeline import (
    check_same_encoder,
    compare,
    on_machines,
    open_inputs,
    refresh_catalog,
)
from jobs.preview import Preview, make_preview
from jobs.progress import Progress
from jobs.publish import RunResult
from jobs.run import Run
from jobs.space import resolve_fields
from jobs.store import Store


def refresh(config: JobConfig, progress: Progress, *, publish: bool = True) -> RunResult:
    """Embed what changed in the catalog, update or build every index, publish if quality holds.

    Args:
        config: The job.
        progress: Shows what happens.
        publish: Whether to publish; else the release is left as a candidate. What was embedded
            stays: the next refresh publishes it without embedding it again.

    Returns:
        What was done; `published` is false, too, where the newest release already shows the
        catalog.

    Raises:
        JobError: See `jobs.errors`; what was embedded stays for the next run.
        GateError: Measured quality is under the bar; nothing was published.
    """
    run = Run("refresh", Store(config.store), progress)
    with hold_lease(run.store, run.run_id, run.parent):
        inputs = open_inputs(config, run)
        check_same_encoder(run, inputs.space)
        with ray_session(config.ray), run.counted():
            return on_machines(run, inputs, lambda: refresh_catalog(run, inputs, publish=publish))


def preview_refresh(config: JobConfig, progress: Progress) -> Preview:
    """Tell what a refresh would do, and what it would take; the store isn't touched.

    Args:
        config: The job.
        progress: Shows what happens.

    Raises:
        JobError: As `refresh`, before anything is embedded.
    """
    run = Run("refresh", Store(config.store), progress, writes=False)
    fields = resolve_fields(config.embed, read_fusion(config.encoder))
    catalog = open_catalog(config.catalog, fields)
    with made_encoder(config, run.store) as (directory, space):
        check_same_encoder(run, space)
        with ray_session(config.ray):
            diff = compare(run, config, catalog, space)
            return make_preview(run, config, catalog, diff, (directory, space))
