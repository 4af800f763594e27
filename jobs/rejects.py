"""The `rejects` command: what could not be embedded, and why."""

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import ray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.cluster import ray_session
from jobs.config import JobConfig
from jobs.delta import read_actions
from jobs.diff import read_retry
from jobs.errors import JobError
from jobs.images import RejectReason
from jobs.machines import check_shared
from jobs.reject_rows import Counts, Kind, Reject, RejectQuery, find_rows
from jobs.schemas import REJECT, UPSERT
from jobs.state import REASONS, read_data_file
from jobs.store import Release, Store
from jobs.tasks import gather


@dataclass(frozen=True, kw_only=True)
class ReasonCount:
    """Rows of one reason.

    Attributes:
        share: Of the catalog's rows of the newest release; None before there is one.
        retry: Rows that the next refresh tries again.
        given_up: Rows with a transient fault that it does not: it was there too often.
    """

    reason: RejectReason
    kind: Kind
    rows: int
    share: float | None
    retry: int
    given_up: int


@dataclass(frozen=True, kw_only=True)
class RejectList:
    """What was found.

    Attributes:
        release: Version of the newest release; None before there is one.
        rows: Rows (product images) of the catalog that it was made from.
        encoder: Fingerprint: of that release; before there is one, of the newest rows; None where
            nothing was embedded yet.
        by_reason: Rejects, most rows first.
        masked_by_reason: Rows that are live without their image or text, most rows first.
        masked: Whether `pages` lists these, in place of the rejects.
        more: How many of them are not listed.
        pages: Those that are listed, what was first seen last before the others.
    """

    release: int | None
    rows: int | None
    encoder: str | None
    by_reason: tuple[ReasonCount, ...]
    masked_by_reason: tuple[ReasonCount, ...]
    masked: bool
    more: int
    pages: Iterator[list[Reject]]

    @property
    def rejected(self) -> int:
        """How many rows are rejected."""
        return sum(one.rows for one in self.by_reason)

    @property
    def masked_rows(self) -> int:
        """How many rows are live without their image or text."""
        return sum(one.rows for one in self.masked_by_reason)


def parse_reasons(names: Sequence[str]) -> tuple[RejectReason, ...]:
    """Return the reasons of these names.

    Raises:
        JobError: There is no such reason; it names the nearest.
    """
    known = [str(reason) for reason in RejectReason]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise JobError(f"--reason {name!r}: no such reason; {hint}")
    return tuple(RejectReason(name) for name in names)


@contextmanager
def open_rejects(config: JobConfig, query: RejectQuery) -> Iterator[RejectList]:
    """Count the rejects of a store and begin to list them; nothing is written.

    Args:
        config: Names the store, and how often a transient fault is tried.
        query: Which rows are asked for.

    Yields:
        What was found; its pages can be read until the block ends.

    Raises:
        StoreError: The store can't be read.
    """
    store = Store(config.store)
    release, version = store.current_release(), store.embeddings_version()
    if version is None or not sum(store.embedding_counts(version)):
        yield _describe(release, None, query, {UPSERT: Counter(), REJECT: Counter()}, iter(()))
        return
    with ray_session(config.ray):
        check_shared([store.uri("embeddings")])
        encoder = release.encoder if release else _newest_encoder(store, version)
        counts, pages = find_rows(
            store,
            version,
            encoder,
            query,
            retry=read_retry(config, release),
            bucket_rows=config.ray.bucket_rows,
        )
        yield _describe(release, encoder, query, counts, pages)


def _newest_encoder(store: Store, version: int) -> str:
    """Return the encoder of the file that was committed last: each holds the rows of one."""
    actions = read_actions(store.embeddings(version), store.uri("embeddings"))
    newest = actions.sort_by([("modification_time", "descending"), ("path", "descending")])
    encoder: str = gather([_read_encoder.remote(store, newest["path"][0].as_py())])[0]
    return encoder


@ray.remote(num_cpus=1)
def _read_encoder(store: Store, file: str) -> str:
    return str(read_data_file(store, file, ["encoder"])["encoder"][0].as_py())


def _describe(
    release: Release | None,
    encoder: str | None,
    query: RejectQuery,
    counts: Counts,
    pages: Iterator[list[Reject]],
) -> RejectList:
    total = counts[UPSERT if query.masked else REJECT].total()
    rows = release.rows if release else None
    return RejectList(
        release=release.version if release else None,
        rows=rows,
        encoder=encoder,
        by_reason=_count_reasons(counts[REJECT], rows),
        masked_by_reason=_count_reasons(counts[UPSERT], rows, live=True),
        masked=query.masked,
        more=max(0, total - query.limit) if query.limit else 0,
        pages=pages,
    )


def _count_reasons(
    counts: Counter[tuple[int, bool]], rows: int | None, *, live: bool = False
) -> tuple[ReasonCount, ...]:
    found = []
    for number in {number for number, _ in counts}:
        reason, again, left = REASONS[number - 1], counts[number, True], counts[number, False]
        count = ReasonCount(
            reason=reason,
            kind=reason.kind,
            rows=again + left,
            share=(again + left) / rows if rows else None,
            retry=again,
            given_up=left if reason.transient and not live else 0,
        )
        found.append(count)
    return tuple(sorted(found, key=lambda one: (-one.rows, one.reason)))


def json_parts(found: RejectList) -> Iterator[str]:
    """Yield the parts of one JSON object, a page at a time."""
    head = {
        "release": found.release,
        "rows": found.rows,
        "encoder": found.encoder,
        "rejected": found.rejected,
        "by_reason": [asdict(one) for one in found.by_reason],
        "masked": found.masked_rows,
        "masked_by_reason": [asdict(one) for one in found.masked_by_reason],
    }
    name = "masked_rows" if found.masked else "rejects"
    yield f'{json.dumps(head)[:-1]}, "{name}": ['
    for number, page in enumerate(found.pages):
        rows = (json.dumps(asdict(row), ensure_ascii=False) for row in page)
        yield (", " if number else "") + ", ".join(rows)
    yield "]}"


def print_rejects(found: RejectList, console: Console) -> None:
    """Print the counts, and then the rows, a page at a time."""
    if found.encoder is None:
        console.print("nothing was embedded yet: run `vitrine refresh`")
        return
    share = f" ({found.rejected / found.rows:.2%} of {found.rows:,})" if found.rows else ""
    source = "no release yet" if found.release is None else f"release {found.release}"
    console.print(f"{source}: {found.rejected:,} rows rejected{share}")
    if found.by_reason:
        console.print(_count_table(found.by_reason, live=False))
    if found.masked_by_reason:
        hint = "" if found.masked else "; --masked lists them"
        console.print(f"{found.masked_rows:,} rows live without their image or text{hint}")
        console.print(_count_table(found.masked_by_reason, live=True))
    for page in found.pages:
        console.print(_row_table(page, live=found.masked))
    if found.more:
        console.print(f"… and {found.more:,} more: --limit 0 shows all")


def _count_table(counts: Sequence[ReasonCount], *, live: bool) -> Table:
    table = Table("reason", "kind", "rows", "share", *(() if live else ("next refresh",)))
    for one in counts:
        share = f"{one.share:.2%}" if one.share is not None else ""
        after = () if live else (_tell_next(one),)
        table.add_row(one.reason, one.kind, f"{one.rows:,}", share, *after)
    return table


def _tell_next(one: ReasonCount) -> str:
    """Say what the next refresh does with the rows of a reason, if the catalog stays as it is."""
    rest = one.rows - one.retry - one.given_up
    parts = ((one.retry, "tried again"), (one.given_up, "given up"), (rest, "left as they are"))
    return ", ".join(f"{rows:,} {words}" for rows, words in parts if rows)


def _row_table(page: Sequence[Reject], *, live: bool) -> Table:
    columns = ["product", "image", "reason", "kind"]
    times = ["embedded, UTC"]
    if not live:
        times = ["first seen, UTC", "last seen, UTC", "attempts", "next refresh"]
    table = Table()
    for name in (*columns, *times):
        table.add_column(name, no_wrap=name != "product")
    table.add_column("detail", overflow="fold", ratio=1)
    for row in page:
        seen = [_minute(row.last_seen)] if live else _tell_seen(row)
        known = (str(row.image_number), row.reason, row.kind, *seen)
        table.add_row(_plain(row.product_id), *known, _plain(row.detail))
    return table


def _tell_seen(row: Reject) -> list[str]:
    if row.retry:
        after = "tried again"
    else:
        after = "given up" if row.kind == "transient" else "left as it is"
    return [_minute(row.first_seen or ""), _minute(row.last_seen), str(row.attempts), after]


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _plain(text: str) -> Text:
    """Return a catalog's text without markup and without what would steer a terminal."""
    return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))
