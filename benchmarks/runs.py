"""What benchmarks of several contenders share: medians, and environments of other projects."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


def keep_median(runs: Sequence[Figures], key: str) -> Figures:
    """Return the run whose figure is the median, with every run's as `all_<key>`.

    Args:
        runs: At least one; of an even number, the lower of the two in the middle.
        key: Names the figure.
    """
    ordered = sorted(runs, key=lambda run: float(run[key]))
    return ordered[(len(ordered) - 1) // 2] | {f"all_{key}": [run[key] for run in ordered]}


def make_environment(folder: Path, packages: Sequence[str], after: Sequence[str] = ()) -> Path:
    """Make a virtual environment with some packages, if it isn't there; return its python.

    Args:
        folder: Where.
        packages: As pip takes them.
        after: Those that are put in afterwards, whatever the others say of their versions.
    """
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        if after:
            subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *after], check=True)
        done.touch()
    return python
