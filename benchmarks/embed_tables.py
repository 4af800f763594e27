"""The table and the ratios of benchmarks/embed.py, as Markdown on standard output."""

from __future__ import annotations

from typing import Any

from index_tables import print_table

Figures = dict[str, Any]


def print_points(points: list[Figures]) -> None:
    """Print contenders side by side."""
    print_table(
        "contender | setting | images | images/s | start-up s | images/s with it"
        " | CPU s per 1,000 | largest process, MiB | all together, own pages, MiB",
        [
            [
                one["contender"],
                one["setting"],
                f"{one['images']:,}",
                f"{one['images_per_s']:.1f}",
                f"{one['startup_s']:.1f}",
                f"{_whole(one):.1f}",
                f"{one['cpu_s_per_1000']:.1f}",
                f"{one['peaks_mib'][0][0]}: {one['peaks_mib'][0][1]:.0f}",
                f"{one['together_mib']:.0f}",
            ]
            for one in points
        ],
    )


def print_processes(points: list[Figures]) -> None:
    """Print the peak memory of each process of the stage."""
    for one in (one for one in points if one["contender"] == "stage"):
        print()
        rows = [[name, f"{mib:.0f}"] for name, mib in one["peaks_mib"]]
        rows.append(["all: object store", f"{one['object_store_mib']:.1f}"])
        print_table("process of stage | peak MiB (with shared pages)", rows)


def compare_points(points: list[Figures], precision: str) -> dict[str, float]:
    """Return the stage's images a second over the best of each other's, and its CPU over theirs.

    Args:
        points: One a contender and setting.
        precision: The stage's: `forward` has others too.
    """
    best: dict[str, Figures] = {}
    for one in points:
        name, other = one["contender"], one["precision"] not in (precision, None) or one["side_px"]
        if not other and one["images_per_s"] > best.get(name, {"images_per_s": 0})["images_per_s"]:
            best[name] = one
    stage, ratios = best.get("stage"), {}
    if stage is None:
        return {}
    rates = {name: one["images_per_s"] for name, one in best.items()}
    if "loader" in best:
        ratios["stage over loader"] = rates["stage"] / rates["loader"]
        ratios["stage over loader, start-up included"] = _whole(stage) / _whole(best["loader"])
        ratios["stage over loader, CPU"] = _cpu(stage) / _cpu(best["loader"])
    if "forward" in best and "decode" in best:
        forward, decode = rates["forward"], rates["decode"]
        ratios["stage over min(forward, decode)"] = rates["stage"] / min(forward, decode)
        # On CPUs both want the same cores, so that no loop can do both at the slower one's rate.
        both = 1 / (1 / forward + 1 / decode)
        ratios["stage over forward and decode on the same cores"] = rates["stage"] / both
    if "clip-retrieval" in best:
        ratios["stage over clip-retrieval"] = rates["stage"] / rates["clip-retrieval"]
        ratios["stage over clip-retrieval, CPU"] = _cpu(stage) / _cpu(best["clip-retrieval"])
    return ratios


def _cpu(one: Figures) -> float:
    return float(one["cpu_s_per_1000"])


def _whole(one: Figures) -> float:
    return float(one["images"] / (one["seconds"] + one["startup_s"]))
