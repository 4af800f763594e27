"""Kills refreshes for real, again and again, and compares what is left with an unharmed one.

An *episode* is one store on its way to one release: attempts that are killed, each started again
on what the one before left, until one survives. Its release must be the one that an uninterrupted
refresh of the same catalog publishes. There are two kinds: the first build, and a refresh of a
changed catalog on top of a release that is served meanwhile.
"""

import bisect
import json
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from chaos_processes import VICTIMS
from chaos_runs import Attempt, Moment, Outcome, Query, appended_rows, read_outcome, run_refresh

from jobs.progress import open_progress
from jobs.sample import write_sample
from jobs.store import Store

CASES = ("build", "update")
COMMIT_INTERVAL_S = 1.0
COMMIT_SLACK_S = 10.0  # files are committed when the next one comes: on a busy machine, later
GROUP_ROWS = 32  # small row groups, so that files are written and committed all along
KILLS_AN_EPISODE = 3
QUERIES = 8
SLOW_TOWERS = {  # some 20 ms a row on one core: embedding lasts, so that kills meet it
    "embed_dim": 32,
    "vision_cfg": {
        "layers": 6, "width": 256, "head_width": 32, "patch_size": 8, "image_size": 96,
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1,
    },
}  # fmt: skip
SCORE_TOLERANCE = 1e-3  # stored vectors are rounded to float16, after batches of other sizes


@dataclass(kw_only=True)
class Episode:
    """One store on its way to one release, and how that differs from the reference's."""

    case: str
    attempts: list[Attempt] = field(default_factory=list)
    lost_rows: int = 0
    duplicates: int = 0
    half_visible: int = 0
    embedded_again: int = 0
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What an uninterrupted refresh did: its release, rows appended, how long each role lived."""

    outcome: Outcome
    appended: int
    attempt: Attempt


class Chaos:
    """A folder with a catalog, its changed version, and a reference of each case."""

    def __init__(self, folder: Path, *, products: int, seed: int) -> None:
        """Render the catalog and refresh it twice, unharmed.

        Args:
            folder: Everything is written below it.
            products: Good ones; a few more rows must be rejected.
            seed: Of the catalog, the victims and the moments.
        """
        self.folder, self.random, self.episodes = folder, random.Random(seed), 0
        self.towers = folder / "towers.json"
        self.catalogs = write_catalogs(folder / "catalog", products, seed)
        self.towers.write_text(json.dumps(SLOW_TOWERS))
        self.queries = _read_queries(folder / "catalog")
        reference = folder / "reference"
        self.references: dict[str, Reference] = {}
        for case in CASES:
            self.references[case] = self._run_reference(case, reference)
            if case == "build":
                shutil.copytree(reference / "store", folder / "base")

    def _run_reference(self, case: str, folder: Path) -> Reference:
        config, store = self._job(case, folder)
        before = appended_rows(store)
        attempt = run_refresh(config, store)
        outcome = read_outcome(config, store, self.queries)
        if outcome is None or attempt.faults:
            raise RuntimeError(f"the reference failed: {attempt.last_words} {attempt.faults}")
        return Reference(outcome=outcome, appended=appended_rows(store) - before, attempt=attempt)

    def _job(self, case: str, folder: Path) -> tuple[Path, Store]:
        config = {
            "store": str(folder / "store"),
            "catalog": {"path": str(self.catalogs[case]), "text": "{title}. {description}"},
            "encoder": {"architecture": str(self.towers), "pretrained": "random"},
            "embed": {
                "batch_size": 1,
                "rows_per_file": 8,
                "commit_interval_s": COMMIT_INTERVAL_S,
            },
            "ray": {"object_store_mb": 100},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{case}.yaml").write_text(json.dumps(config))
        return folder / f"{case}.yaml", Store(config["store"])

    def run_episode(self, case: str, victims: list[str]) -> Episode:
        """Refresh one store until an attempt survives; kill the first attempts.

        Args:
            case: One of `CASES`.
            victims: Those of the first attempts. One that is never met kills nothing.
        """
        self.episodes += 1
        folder = self.folder / f"episode-{self.episodes:02d}"
        config, store = self._job(case, folder)
        if case == "update":
            shutil.copytree(self.folder / "base", folder / "store")
        episode, before = Episode(case=case), appended_rows(store)
        for victim in [*victims, None]:
            attempt = run_refresh(config, store, self._moment(case, victim) if victim else None)
            episode.attempts.append(attempt)
            self._check_visible(episode, config, store)
            if attempt.survived:
                break
        self._compare(episode, config, store, appended_rows(store) - before)
        if not episode.differences:
            shutil.rmtree(folder)
        return episode

    def _moment(self, case: str, victim: str) -> Moment:
        """Draw a moment from the time in which such a victim lives in an unharmed run."""
        unharmed = self.references[case].attempt
        role = {"all": "driver", "head": "raylet"}.get(victim, victim)
        at_s = self.random.uniform(*unharmed.spans[role])
        stage = bisect.bisect_right(unharmed.stages, at_s) - 1
        return Moment(victim=victim, stage=stage, offset_s=at_s - unharmed.stages[stage])

    def _check_visible(self, episode: Episode, config: Path, store: Store) -> None:
        """Check that what is newest is whole, and either the old release or the right new one."""
        found = read_outcome(config, store, self.queries)
        right = [self.references[episode.case].outcome]
        if episode.case == "update":
            right.append(self.references["build"].outcome)
        elif found is None:
            return
        if found is None or not any(_differences(found, one) == [] for one in right):
            episode.half_visible += 1

    def _compare(self, episode: Episode, config: Path, store: Store, appended: int) -> None:
        reference = self.references[episode.case]
        found = read_outcome(config, store, self.queries)
        episode.embedded_again = sum(attempt.lost_rows for attempt in episode.attempts) + max(
            0, appended - reference.appended
        )
        if found is None:
            episode.differences = ["no release"]
            return
        episode.differences = _differences(found, reference.outcome)
        missing = set(reference.outcome.vector_ids) - set(found.vector_ids)
        episode.lost_rows = len(missing) + abs(found.rows - len(found.vector_ids) - found.rejected)
        episode.duplicates = len(found.vector_ids) - len(set(found.vector_ids))


def _differences(found: Outcome, right: Outcome) -> list[str]:
    """Name what differs between two releases of the same catalog."""
    names = ("version", "rows", "rejected", "products", "vector_ids")
    differences = [name for name in names if getattr(found, name) != getattr(right, name)]
    for mine, theirs in zip(found.answers, right.answers, strict=True):
        scores = [abs(a[1] - b[1]) for a, b in zip(mine, theirs, strict=False)]
        if len(mine) != len(theirs) or max(scores, default=0.0) > SCORE_TOLERANCE:
            differences.append("scores")
        elif [a for a, _ in mine] != [b for b, _ in theirs]:
            differences.append("answers")
    return sorted(set(differences))


def run_kills(folder: Path, *, kills: int, seed: int, products: int) -> dict[str, Any]:
    """Kill refreshes until so many kills have hit, and return the figures.

    Args:
        folder: A new one; the stores of episodes that went wrong stay in it.
        kills: How many, spread evenly over `VICTIMS`.
        seed: Of the catalog, the victims' order and the moments.
        products: In the catalog.
    """
    started = time.monotonic()
    chaos = Chaos(folder, products=products, seed=seed)
    waiting = [VICTIMS[number % len(VICTIMS)] for number in range(kills)]
    chaos.random.shuffle(waiting)
    episodes: list[Episode] = []
    with open_progress().count(kills, "kills") as shown:
        while waiting and len(episodes) < 2 * kills:  # a victim may be missed: the run was quicker
            case = CASES[len(episodes) % len(CASES)]
            episodes.append(chaos.run_episode(case, waiting[:KILLS_AN_EPISODE]))
            for attempt in episodes[-1].attempts:
                if attempt.victim is not None:
                    waiting.remove(attempt.victim)
            shown.update(kills - len(waiting))
    return summarize(episodes, time.monotonic() - started)


def summarize(episodes: list[Episode], seconds: float) -> dict[str, Any]:
    """Add up what the episodes showed; one plain object, for people and JSON."""
    attempts = [attempt for episode in episodes for attempt in episode.attempts]
    killed = [attempt for attempt in attempts if attempt.victim is not None]
    return {
        "kills": len(killed),
        "kills_by_victim": dict(sorted(Counter(str(a.victim) for a in killed).items())),
        "kills_by_stage": dict(sorted(Counter(a.stage for a in killed).items())),
        "attempts": len(attempts),
        "survived_their_kill": sum(attempt.survived for attempt in killed),
        "episodes": len(episodes),
        "rows_lost": sum(episode.lost_rows for episode in episodes),
        "duplicates": sum(episode.duplicates for episode in episodes),
        "half_visible_releases": sum(episode.half_visible for episode in episodes)
        + sum(fault.startswith("half-visible") for a in attempts for fault in a.faults),
        "differences": [d for episode in episodes for d in episode.differences],
        "rows_embedded_again": sum(episode.embedded_again for episode in episodes),
        "most_rows_lost_by_a_kill": max((a.lost_rows for a in killed), default=0),
        "oldest_lost_s": round(max((a.oldest_lost_s for a in killed), default=0.0), 1),
        "oldest_lost_allowed_s": COMMIT_INTERVAL_S + COMMIT_SLACK_S,
        "slowest_end_s": round(max((a.ended_s for a in killed if not a.survived), default=0.0), 1),
        "longest_orphans_s": round(max((a.orphans_s for a in attempts), default=0.0), 1),
        "ray_agents_left": sum(attempt.agents for attempt in attempts),
        "faults": [f"{a.victim} in {a.stage!r}: {f}" for a in attempts for f in a.faults],
        "seconds": round(seconds, 1),
    }


def write_catalogs(folder: Path, products: int, seed: int) -> dict[str, Path]:
    """Render a catalog and a later version of it; return each case's table."""
    write_sample(folder, products=products, seed=seed, street_per_product=1, image_px=96)
    rows = pq.read_table(folder / "catalog.parquet")
    good = rows.to_pylist()
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")
    bad = [
        good[0] | {"product_id": "bad-missing", "image_uri": None},
        good[1] | {"product_id": "bad-absent", "image_uri": "nowhere.jpg"},
        good[2] | {"product_id": "bad-page", "image_uri": "page.jpg"},
        good[3] | {"product_id": "bad-words", "title": "", "description": None},
    ]
    catalogs = {"build": good + bad, "update": _change(good, random.Random(seed)) + bad[1:]}
    for case, listed in catalogs.items():
        table = pa.Table.from_pylist(listed, schema=rows.schema)
        pq.write_table(table, folder / f"{case}.parquet", row_group_size=GROUP_ROWS)
    return {case: folder / f"{case}.parquet" for case in catalogs}


def _change(good: list[dict[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    """Drop a tenth of the rows, change the words of a third, and add a fifth."""
    kept = [row for row in good if chance.random() > 0.1]
    changed = [
        row | {"title": f"{row['title']}, second edition"} if chance.random() < 0.3 else row
        for row in kept
    ]
    added = chance.sample(good, len(good) // 5)
    return changed + [row | {"product_id": f"new-{row['product_id']}"} for row in added]


def _read_queries(folder: Path) -> list[Query]:
    rows = pq.read_table(folder / "queries.parquet").slice(0, QUERIES).to_pylist()
    photos = [(folder / row["query_image_uri"]).read_bytes() for row in rows]
    titles = pq.read_table(folder / "build.parquet")["title"].to_pylist()[:QUERIES]
    return [Query(photo=photo, words=None) for photo in photos] + [
        Query(photo=None, words=words) for words in titles
    ]
