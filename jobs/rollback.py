"""The `rollback` command: make an older release the newest again, in one commit."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime

from jobs.config import JobConfig
from jobs.errors import StoreError
from jobs.leases import hold_lease
from jobs.progress import Progress
from jobs.release_files import check_files
from jobs.store import Release, Store, new_run_id


@dataclass(frozen=True, kw_only=True)
class RollbackResult:
    """What a rollback did.

    Attributes:
        release: The newest release now.
        content: The older release that it has the content of.
        replaced: The release that was the newest.
    """

    release: int
    content: int
    replaced: int
    products: int
    live: int


def rollback(config: JobConfig, progress: Progress, version: int | None = None) -> RollbackResult:
    """Publish an older release's content as the newest release.

    Args:
        config: The job; only its store counts.
        progress: Shows what happens.
        version: The older release; None: the one that the newest replaced.

    Raises:
        StoreError: There is no such release, it is the newest, or something of it is missing.
        PublishConflictError: Another job published meanwhile.
    """
    store = Store(config.store)
    newest = store.release()
    target = find_target(store, newest, version)
    with hold_lease(store, new_run_id(), target):
        # Again: what `gc` dropped before it could see the lease is gone.
        target = store.release(target.version)
        progress.stage(f"check what release {target.version} needs")
        check_files(store, target)
        progress.stage(f"publish it as release {newest.version + 1}")
        store.publish(_restored(target, newest))
    return RollbackResult(
        release=newest.version + 1,
        content=target.version,
        replaced=newest.version,
        products=target.products,
        live=target.vectors,
    )


def find_target(store: Store, newest: Release, version: int | None) -> Release:
    """Find the release to go back to.

    Raises:
        StoreError: There is none, or the newest release has its content already.
    """
    if version is None and newest.parent is None:
        raise StoreError(
            f"release {newest.version} of {store.root} is the first: nothing to go back to"
        )
    target = store.release(newest.parent if version is None else version)
    if (target.indexes, target.encoder) == (newest.indexes, newest.encoder):
        same = (
            "is the newest"
            if target.version == newest.version
            else (f"is what the newest release, {newest.version}, shows")
        )
        raise StoreError(f"release {target.version} of {store.root} {same}; name an older one")
    return target


def _restored(target: Release, newest: Release) -> Release:
    return replace(
        target,
        version=newest.version + 1,
        parent=newest.version,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=f"rollback to {target.version}",
    )
