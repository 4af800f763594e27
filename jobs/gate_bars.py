"""Checks what was measured against the bars of the gate; a report's head shows both."""

from dataclasses import dataclass
from typing import Any

from jobs.config import GateConfig
from jobs.gate import Built
from jobs.index import FieldIndex
from jobs.store import Release

ROUNDING = 1e-12  # 7 live rows of 10 are 0.30000000000000004 fewer; a row is a larger share


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of the gate.

    Attributes:
        key: As in the configuration.
        of: What was measured, with the index field where there is one.
        value: What was measured.
        limit: The bar.
        most: Whether it is the most that may be; else the least that must be.
        failure: What is said where the bar is missed.
    """

    key: str
    of: str
    value: float
    limit: float
    most: bool
    failure: str

    @property
    def holds(self) -> bool:
        """Say whether the bar holds."""
        over = self.value - self.limit
        return over <= ROUNDING if self.most else over >= -ROUNDING

    def describe(self) -> dict[str, Any]:
        """Return the bar as the report has it."""
        names = ("key", "of", "value", "limit", "most", "holds")
        return {name: getattr(self, name) for name in names}


def check_gate(gate: GateConfig, rows: int, built: Built, parent: Release | None) -> list[str]:
    """List every bar that was missed, with the figure, and what no bar allows; empty: all is well.

    Args:
        gate: The bars.
        rows: Rows in the catalog.
        built: What would be published.
        parent: The newest release.
    """
    bars = list_bars(gate, rows, built, parent)
    return [*_list_faults(rows, built), *(bar.failure for bar in bars if not bar.holds)]


def _list_faults(rows: int, built: Built) -> list[str]:
    live, faults = built.live.rows, []
    if live.vectors + live.rejected != rows:
        faults.append(f"{rows} rows in, but {live.vectors} live and {live.rejected} rejected")
    if not live.vectors:
        faults.append("no row is live")
    for index in built.indexes:
        found = index.measured
        if found.missing or found.extra:
            faults.append(
                f"{index.field}: {found.missing} live ids are not in the index, {found.extra} ids "
                "in it are not live"
            )
    return faults


def list_bars(gate: GateConfig, rows: int, built: Built, parent: Release | None) -> list[Bar]:
    """List the bars that could be measured, in the order of the configuration.

    Args:
        gate: The bars.
        rows: Rows in the catalog.
        built: What was measured.
        parent: The newest release.
    """
    bars = [_bar_of_rejects(gate, rows, built.live.rows.rejected)]
    if parent is not None:
        bars.append(_bar_of_live(gate, built.live.rows.vectors, parent))
    for index in built.indexes:
        bars += _bars_of_index(gate, index)
    if built.measured.recall or gate.min_recall_at_10:  # a bar that nothing measures is missed
        bars.append(_bar_of_recall(gate, built.measured.recall.get("recall_at_10", 0.0)))
    return bars


def _bar_of_rejects(gate: GateConfig, rows: int, rejected: int) -> Bar:
    share, limit = rejected / rows, gate.max_reject_share
    return Bar(
        key="gate.max_reject_share",
        of="rejected rows",
        value=share,
        limit=limit,
        most=True,
        failure=f"{rejected} of {rows} rows rejected ({share:.1%}), "
        f"gate.max_reject_share is {limit:.1%}",
    )


def _bar_of_live(gate: GateConfig, live: int, parent: Release) -> Bar:
    drop, limit = max(0.0, 1 - live / parent.vectors), gate.max_live_drop
    return Bar(
        key="gate.max_live_drop",
        of=f"live rows lost since release {parent.version}",
        value=drop,
        limit=limit,
        most=True,
        failure=f"{live} rows are live, {drop:.1%} fewer than the {parent.vectors} of release "
        f"{parent.version}, gate.max_live_drop is {limit:.1%}",
    )


def _bars_of_index(gate: GateConfig, index: FieldIndex) -> list[Bar]:
    bars = []
    for name, of in (
        ("intersection_at_10", "exact neighbours found"),
        ("labelled_intersection_at_10", "the same of labelled queries"),
        ("self_retrieval", "vectors that find themselves"),
        ("overlap_at_10", "neighbours kept since the last release"),
    ):
        value = getattr(index.measured, name)
        if value is not None:
            key = f"min_{name.removeprefix('labelled_')}"
            limit = getattr(gate, key)
            bars.append(
                Bar(
                    key=f"gate.{key}",
                    of=f"{index.field}: {of}",
                    value=value,
                    limit=limit,
                    most=False,
                    failure=f"{index.field}: {name} {value:.3f}, gate.{key} is {limit:.3f}",
                )
            )
    return bars


def _bar_of_recall(gate: GateConfig, found: float) -> Bar:
    limit = gate.min_recall_at_10
    return Bar(
        key="gate.min_recall_at_10",
        of="right product in the first ten",
        value=found,
        limit=limit,
        most=False,
        failure=f"recall_at_10 {found:.3f}, gate.min_recall_at_10 is {limit:.3f}",
    )
