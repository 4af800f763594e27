"""The `gc` command: drop what no kept release and no running job needs.

First the rows of old releases go from the releases table, in one commit: from then on nothing
leads to their files. Then the embeddings table is compacted, then files are deleted. What is
younger than an hour, or was part of a table within the last hour (or within the hour before the
oldest running job began), always stays: a job may have just begun to read or write it.
"""

import time
from dataclasses import dataclass, field

from jobs.cluster import ray_session
from jobs.compact import (
    Compaction,
    TableFiles,
    compact,
    find_encoders,
    list_table,
    plan_compaction,
)
from jobs.config import JobConfig
from jobs.errors import ConfigError, StoreError
from jobs.files import DELETE_BATCH, delete_files
from jobs.garbage import Garbage, Kept, find_garbage
from jobs.leases import Lease, hold_lease, live_leases
from jobs.machines import check_shared
from jobs.progress import Progress
from jobs.release_files import ReleaseFiles, find_files, read_candidates
from jobs.release_rows import drop_releases
from jobs.storage import StorageError
from jobs.store import Release, Store, new_run_id

MIN_AGE_S = 3600.0
UNFINISHED_S = 7 * 86_400.0  # how long a killed backfill's rows and unpublished releases stay
KEEP = 3


@dataclass(frozen=True, kw_only=True)
class GcResult:
    """What was removed, or would be.

    Attributes:
        dry_run: Whether nothing was changed.
        kept: Releases that stay, newest first.
        dropped: Releases that go.
        running: Runs that write to the store at the moment.
        removed: Kind to its files and bytes.
        compaction: What became of the embeddings table.
    """

    dry_run: bool
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    running: tuple[str, ...]
    removed: dict[str, dict[str, int]]
    compaction: Compaction


@dataclass(frozen=True, kw_only=True)
class _Collector:
    """One collection on its way."""

    config: JobConfig
    store: Store
    progress: Progress
    keep: int
    dry_run: bool
    min_age_s: float
    own_run: str
    now: float = field(default_factory=time.time)

    def leases(self) -> list[Lease]:
        """List what runs at the moment, but for this run itself."""
        return [lease for lease in live_leases(self.store) if lease.run != self.own_run]


@dataclass(frozen=True, kw_only=True)
class _Needs:
    """What is needed at a moment.

    Attributes:
        kept: Published releases that stay, newest first.
        rescued: Dropped ones that a job goes back to at this moment.
        candidates: Releases that a run built lately and did not publish.
        files: Folder below `indexes/` to what its release needs.
    """

    leases: list[Lease]
    kept: list[Release]
    rescued: list[Release]
    candidates: list[Release]
    files: dict[str, ReleaseFiles]


def gc(
    config: JobConfig,
    progress: Progress,
    *,
    keep: int = KEEP,
    dry_run: bool = False,
    min_age_s: float = MIN_AGE_S,
) -> GcResult:
    """Keep the newest releases; remove what neither they nor running jobs need.

    Args:
        config: The job; its store and Ray count.
        progress: Shows what happens.
        keep: How many releases stay, at least 1.
        dry_run: Change nothing.
        min_age_s: Seconds for which anything written or read by the newest tables stays.

    Raises:
        ConfigError: `keep` is under 1.
        StoreError: There is no release, or a kept one is damaged: nothing was removed.
    """
    if keep < 1:
        raise ConfigError(f"keep {keep} releases: at least 1, the newest, is kept")
    store, run = Store(config.store), new_run_id()
    newest = store.release()
    collector = _Collector(
        config=config,
        store=store,
        progress=progress,
        keep=keep,
        dry_run=dry_run,
        min_age_s=min_age_s,
        own_run=run,
    )
    if dry_run:
        return _collect(collector)
    with hold_lease(store, run, newest):
        return _collect(collector)


def _collect(collector: _Collector) -> GcResult:
    collector.progress.stage("find what is needed")
    dropped = _drop(collector)
    needs = _find_needs(collector, dropped)
    encoders, compaction = _compact(collector, needs, dropped)
    collector.progress.stage("find what is not needed")
    needs = _find_needs(collector, dropped)  # once more: seconds before anything goes
    garbage = _find_garbage(collector, needs, dropped, encoders)
    if not collector.dry_run:
        collector.progress.stage("delete files")
        _delete(collector, [file.path for files in garbage.values() for file in files])
    return GcResult(
        dry_run=collector.dry_run,
        kept=tuple(release.version for release in needs.kept),
        dropped=tuple(release.version for release in dropped),
        running=tuple(lease.run for lease in needs.leases),
        removed={
            kind: {"files": len(files), "bytes": sum(file.size_bytes for file in files)}
            for kind, files in garbage.items()
        },
        compaction=compaction,
    )


def _delete(collector: _Collector, paths: list[str]) -> None:
    """Delete files in their order, some at a time, so that it shows how far it is."""
    with collector.progress.count(len(paths), "files") as shown:
        for start in range(0, len(paths), DELETE_BATCH):
            batch = paths[start : start + DELETE_BATCH]
            delete_files(collector.store, batch)
            shown.update(start + len(batch))


def _drop(collector: _Collector) -> list[Release]:
    """Take old releases out of the table; return them. A release that a job names stays."""
    store = collector.store
    named = {lease.parent for lease in collector.leases()}
    releases = store.releases()
    old = [r for r in releases[collector.keep :] if r.version not in named]
    for release in releases:
        if release not in old:
            find_files(store, release)  # what can't be read is told before anything is changed
    if collector.dry_run or not old:
        return old
    # Refused where another job publishes just now: the next gc drops them.
    return old if drop_releases(store, [release.version for release in old]) else []


def _find_needs(collector: _Collector, dropped: list[Release]) -> _Needs:
    """Find what is needed: leases before releases, since a job publishes before it lets go."""
    store = collector.store
    leases = collector.leases()
    named, gone = {lease.parent for lease in leases}, {release.version for release in dropped}
    published = store.releases()
    kept = [release for release in published if release.version not in gone]
    # A rollback that had read its release before it was dropped.
    rescued = [release for release in dropped if release.version in named]
    files = {release.indexes: find_files(store, release) for release in (*kept, *rescued)}
    since, known = collector.now - UNFINISHED_S, [*published, *dropped]
    candidates = read_candidates(store, since=since, published=known)
    files |= _find_candidates(store, candidates)
    return _Needs(leases=leases, kept=kept, rescued=rescued, candidates=candidates, files=files)


def _find_candidates(store: Store, candidates: list[Release]) -> dict[str, ReleaseFiles]:
    found = {}
    for release in candidates:
        try:
            found[release.indexes] = find_files(store, release)
        except StorageError:
            raise
        except StoreError:
            continue  # what is damaged can't be evaluated any more, and needs nothing
    return found


def _compact(
    collector: _Collector, needs: _Needs, dropped: list[Release]
) -> tuple[set[str], Compaction]:
    """Compact the embeddings table; return the encoders whose rows and checkpoints stay."""
    store, bucket_rows = collector.store, collector.config.ray.bucket_rows
    used = {r.encoder for r in (*needs.kept, *needs.rescued, *needs.candidates)}
    known = used | {release.encoder for release in dropped}
    files = list_table(store)
    with ray_session(collector.config.ray):
        check_shared([store.uri("embeddings")])
        collector.progress.stage("find which stored rows are needed")
        written = find_encoders(store, files, bucket_rows)
        encoders = {
            encoder
            for encoder, newest in written.items()
            # A job at work may just begin with any of them; one without a release may be that of
            # a backfill that was killed.
            if needs.leases
            or encoder in used
            or (encoder not in known and collector.now - newest < UNFINISHED_S)
        }
        return encoders | used, _rewrite(collector, files, sorted(encoders))


def _rewrite(collector: _Collector, files: TableFiles, encoders: list[str]) -> Compaction:
    plan = plan_compaction(collector.store, files, encoders, collector.config.ray.bucket_rows)
    chosen = int(plan.rewritten.sum())
    if collector.dry_run and chosen:
        size = int(files.size_bytes[plan.rewritten].sum())
        return Compaction(
            done=False,
            files=chosen,
            bytes=size,
            dropped_rows=plan.dropped_rows,
            note="a dry run",
        )
    if chosen:
        collector.progress.stage(f"rewrite {chosen} data files")
    return compact(collector.store, plan)


def _find_garbage(
    collector: _Collector, needs: _Needs, dropped: list[Release], encoders: set[str]
) -> Garbage:
    running = {lease.run for lease in needs.leases}
    stay = [*needs.kept, *needs.rescued]
    files = list(needs.files.values())
    began = min([collector.now, *(lease.started_at for lease in needs.leases)])
    keep = Kept(
        runs={release.run for release in stay} | running | {collector.own_run},
        folders=running | needs.files.keys(),
        index_files={file.path for one in files for file in one.indexes},
        data={f"embeddings/{name}" for one in files for name in one.data},
        encoders=None if running else encoders | {release.encoder for release in stay},
        dropped={release.indexes for release in dropped},
        before=began - collector.min_age_s,
        unfinished_before=collector.now - UNFINISHED_S,
    )
    return find_garbage(collector.store, keep)


def describe(result: GcResult) -> str:
    """Return what a person is shown."""
    would = "would be " if result.dry_run else ""
    dropped = ", ".join(map(str, result.dropped)) or "none"
    lines = [f"releases kept: {', '.join(map(str, result.kept))}; {would}dropped: {dropped}"]
    if result.running:
        lines.append(f"jobs at work, whose files stay: {', '.join(result.running)}")
    for kind, counts in result.removed.items():
        if counts["files"]:
            lines.append(
                f"{would}removed: {kind}: {counts['files']:,} files, {counts['bytes']:,} bytes"
            )
    found = result.compaction
    if found.done or (result.dry_run and found.files):
        into = f" into {found.written:,} ({found.written_bytes:,} bytes)" if found.done else ""
        lines.append(
            f"{would}compacted: {found.files:,} data files ({found.bytes:,} bytes){into}, "
            f"{found.dropped_rows:,} rows dropped; the old files go an hour from then, or with the "
            "last release that reads them"
        )
    else:
        lines.append(f"not compacted: {found.note or 'no data file is worth it'}")
    return "\n".join(lines)
