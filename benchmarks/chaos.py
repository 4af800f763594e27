"""Breaks refreshes on purpose and prints what came of it.

    python benchmarks/chaos.py kills --kills 20 --seed 0 [--products 400] [--json]
    python benchmarks/chaos.py faults --rounds 6 --seed 0 [--products 60] [--json]

kills  kill -9 of the driver, an embedding actor, another worker, the raylet, the whole Ray head,
       or all at once, at seeded random moments of first builds and of refreshes on top of a
       release; each is started again until it survives, and compared with an uninterrupted one.

faults  first builds on a real S3 server behind a proxy that answers 503 without or after carrying
       a request out, cuts answers and delays them; in every second one the server is killed too.

The harness is tests/chaos.py. Exit status 1 where anything was lost, doubled, half visible or not
said in one line.
"""

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
BAD = ("rows_lost", "duplicates", "half_visible_releases", "differences", "faults")
Figures = dict[str, Any]


def run_kills(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Kill refreshes; return the figures."""
    figures: Figures = importlib.import_module("chaos").run_kills(
        folder, kills=arguments.kills, seed=arguments.seed, products=arguments.products
    )
    return figures


def run_faults(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Refresh under storage faults; return the figures."""
    figures: Figures = importlib.import_module("chaos_faults").run_faults(
        folder, rounds=arguments.rounds, seed=arguments.seed, products=arguments.products
    )
    return figures


def print_figures(figures: Figures) -> None:
    """Print a line a figure; a list gets a line an entry."""
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items())
        if isinstance(value, list):
            value = f"{len(value)}" + "".join(f"\n  {entry}" for entry in value)
        print(f"{name.replace('_', ' ')}: {value}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    kills = commands.add_parser("kills", help="kill -9 at random moments")
    kills.add_argument("--kills", type=int, default=20, help="how many")
    kills.add_argument("--products", type=int, default=400, help="in the catalog")
    kills.set_defaults(run=run_kills)
    faults = commands.add_parser("faults", help="a failing S3 server")
    faults.add_argument("--rounds", type=int, default=6, help="stores built")
    faults.add_argument("--products", type=int, default=60, help="in the catalog")
    faults.set_defaults(run=run_faults)
    for command in (kills, faults):
        command.add_argument("--seed", type=int, default=0, help="of victims and moments")
        command.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_args()


def main() -> None:
    """Run a subcommand; what it left on disk is kept only where something went wrong."""
    arguments = _parse()
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
    run: Callable[[argparse.Namespace, Path], Figures] = arguments.run
    from jobs.progress import Progress

    with tempfile.TemporaryDirectory(prefix="vitrine-chaos-") as folder, Progress() as progress:
        progress.stage(f"chaos: {arguments.command}")
        figures = run(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(figures))
    else:
        print_figures(figures)
    raise SystemExit(any(figures[name] for name in BAD))


if __name__ == "__main__":
    main()
