"""The tables of benchmarks/index.py, as Markdown on standard output."""

from __future__ import annotations

from typing import Any

import numpy as np

Figures = dict[str, Any]


def print_table(head: str, rows: list[list[str]]) -> None:
    """Print rows of cells under a head of columns that bars part."""
    columns = head.split(" | ")
    for cells in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(cells) + " |")


def print_results(results: list[Figures]) -> None:
    """Print contenders side by side."""
    print_table(
        "contender | index | point | build s | tuning s | peak MiB | index MiB | intersection@10"
        " | ms a query, batch | p50 / p99 ms, one | peak MiB, search",
        [
            [
                one["contender"],
                one["factory"],
                one["point"],
                f"{one['build_s']:.1f}",
                f"{one['tune_s']:.1f}" if "tune_s" in one else "in build",
                f"{one['build_peak_mib']:.0f}",
                f"{one['index_mib']:.1f}",
                f"{one['intersection']:.3f}",
                f"{one['ms_per_query']:.3f}",
                f"{one['p50_ms']:.2f} / {one['p99_ms']:.2f}",
                f"{one['search_peak_mib']:.0f}",
            ]
            for one in results
        ],
    )


def print_memory(results: list[Figures]) -> None:
    """Print what the stage's tasks asked of Ray, beside the most that a process of each took."""
    for one in (one for one in results if "asked_mib" in one):
        taken = one["worker_peaks_mib"]
        rows = [
            [name, f"{asked:.0f}", f"{taken[name]:.0f}" if name in taken else "too short to see"]
            for name, asked in one["asked_mib"].items()
        ]
        print()
        print_table(f"task of {one['contender']} | asked MiB | took MiB", rows)


def print_specs(results: list[Figures]) -> None:
    """Print what each index reaches by its codes alone, and with its refine store."""
    rows = []
    for one in results:
        cells = [one["factory"], f"{one['seconds']['train']:.1f}"]
        for found in (one["codes_alone"], one):
            reached, batch_ms = f"{found['intersection']:.3f}", f"{found['ms_per_query']:.3f}"
            cells += [reached, found["point"], batch_ms]
        rows.append(cells)
    found = "point | ms a query"
    print_table(f"index | train s | codes alone | {found} | with refine | {found}", rows)


def print_growth(rows: list[int], runs: list[Figures]) -> Figures:
    """Print seconds by step and memory by rows; return and print what they fit."""
    steps = list(runs[0]["seconds"])
    lines = []
    for count, run in zip(rows, runs, strict=True):
        cells = [f"{count:,}", run["factory"]]
        cells += [f"{run['seconds'][step]:.2f}" for step in steps]
        lines.append([*cells, f"{run['build_peak_mib']:.0f}", f"{run['index_mib']:.1f}"])
    shown = " | ".join(f"{step} s" for step in steps)
    print_table(f"vectors | index | {shown} | peak MiB | index MiB", lines)
    values = {f"{step} s": [run["seconds"][step] for run in runs] for step in steps}
    values |= {key: [run[key] for run in runs] for key in ("build_s", "build_peak_mib")}
    fits = {key: fit(rows, column) for key, column in values.items()}
    for key, found in fits.items():
        line = f"{found['at_zero']:.3g} + {found['per_million']:.3g} a million vectors"
        print(f"\n{key}: {line}; exponent {found['exponent']:.2f}")
    return fits


def fit(rows: list[int], values: list[float]) -> dict[str, float]:
    """Fit values over rows: a line, and the exponent of a power law."""
    slope, at_zero = np.polyfit(np.array(rows) / 1e6, values, 1)
    exponent = np.polyfit(np.log(rows), np.log(np.maximum(values, 1e-6)), 1)[0]
    return {
        "per_million": float(slope),
        "at_zero": float(at_zero),
        "exponent": float(exponent),
    }


def compare_times(results: list[Figures]) -> dict[str, float]:
    """Return our seconds over the others': with tuning where autofaiss's building includes its."""
    by_name = {result["contender"]: result for result in results}
    ratios = {}
    for ours in (one for name, one in by_name.items() if name in ("cores", "stage")):
        if plain := by_name.get("plain"):
            name = f"{ours['contender']} over plain, build"
            ratios[name] = ours["build_s"] / plain["build_s"]
        if autofaiss := by_name.get("autofaiss"):
            name = f"{ours['contender']} over autofaiss, build and tuning"
            ratios[name] = (ours["build_s"] + ours["tune_s"]) / autofaiss["build_s"]
    return ratios
