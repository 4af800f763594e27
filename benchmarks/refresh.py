"""What a nightly refresh costs, beside the first build; and whether memory grows with the catalog.

    python benchmarks/refresh.py churn [--products 20000] [--share 0.01] [--sample FOLDER]
    python benchmarks/refresh.py memory [--rows 10000 100000]

churn   renders a sample catalog, builds it, changes a share of it (text, picture, new, removed, and
        the price of everything), refreshes, and prints both runs' embedding time side by side.
memory  refreshes catalogs of different sizes (the same few pictures, other texts) and prints the
        peak memory of the driver of each, from the operating system.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parent.parent
PICTURES = 200
Row = dict[str, Any]


def run_refresh(folder: Path, catalog: Path, **sections: object) -> dict[str, Any]:
    """Run one refresh in a process of its own; return its report, and its peak memory in MiB."""
    config = folder / "job.yaml"
    job = {
        "store": str(folder / "store"),
        "catalog": {"path": str(catalog), "text": "{title}. {description}"},
        "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
        "gate": {"min_intersection_at_10": 0, "min_self_retrieval": 0, "min_overlap_at_10": 0},
    }
    config.write_text(json.dumps(job | sections))
    command = [sys.executable, "-m", "jobs", "refresh", "-c", str(config), "--json", "-q"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as driver:
        peak_mib = watch_peak(driver)
        summary = driver.stdout.read() if driver.stdout else ""
    if driver.returncode:
        raise SystemExit(f"the refresh failed with status {driver.returncode}")
    report = Path(json.loads(summary)["report"]).with_suffix(".json")
    return {"peak_mib": peak_mib, "report": json.loads(report.read_text(encoding="utf-8"))}


def watch_peak(driver: subprocess.Popen[str]) -> float:
    """Return a process's own peak resident memory in MiB (VmHWM), not its children's."""
    status, peak_kib = Path(f"/proc/{driver.pid}/status"), 0
    while driver.poll() is None:
        lines = status.read_text(encoding="utf-8").splitlines()
        peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
        peak_kib = max([peak_kib, *peaks])
        time.sleep(0.2)
    return peak_kib / 1024


def change(rows: list[Row], share: float) -> list[Row]:
    """Change a share of the rows: half other texts, a quarter new, a quarter removed."""
    random = np.random.default_rng(0)
    picked = random.permutation(len(rows))[: max(4, round(share * len(rows)))]
    quarter = len(picked) // 4
    removed, texts = set(picked[:quarter].tolist()), set(picked[2 * quarter :].tolist())
    after = [dict(row) for place, row in enumerate(rows) if place not in removed]
    for row in after:
        row["price"] = float(row["price"]) + 1
    names = {rows[place]["product_id"] for place in texts}
    for row in after:
        if row["product_id"] in names:
            row["title"] = f"{row['title']}, new"
    new = [rows[place] | {"product_id": f"new-{place}"} for place in picked[quarter : 2 * quarter]]
    return after + new


def render(folder: Path, products: int) -> Path:
    """Render a sample catalog; return its folder."""
    command = [sys.executable, "-m", "jobs", "sample", str(folder), "--products", str(products)]
    subprocess.run([*command, "-q"], cwd=REPOSITORY, check=True, capture_output=True)
    return folder


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a catalog."""
    pq.write_table(pa.Table.from_pylist(rows), path)


def churn(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build, change, refresh; return what both runs' reports say."""
    sample = arguments.sample or render(folder / "sample", arguments.products)
    rows = pq.read_table(sample / "catalog.parquet").to_pylist()
    first = run_refresh(folder, sample / "catalog.parquet")["report"]
    changed = sample / "changed.parquet"
    write_rows(changed, change(rows, arguments.share))
    second = run_refresh(folder, changed)["report"]
    shown = ("rows", "new", "changed", "removed", "metadata_changed", "embedded")
    runs = [
        {name: one[name] for name in (*shown, "embed_s", "worker_s")} for one in (first, second)
    ]
    for run, report in zip(runs, (first, second), strict=True):
        run["all_s"] = sum(
            stage["seconds"]
            for stage in report["stages"]
            if not stage["stage"].startswith("embed:")
        )
        run["indexes"] = [index["action"] for index in report["indexes"]]
    return {
        "first build": runs[0],
        "refresh": runs[1],
        "embedding, busy workers, refresh over first build": second["share_of_first_build"],
        "embedding, by the clock, refresh over first build": second["wall_share_of_first_build"],
        "whole run, refresh over first build": runs[1]["all_s"] / runs[0]["all_s"],
    }


def memory(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Refresh catalogs of several sizes; return the peak of each driver."""
    sample = render(folder / "sample", PICTURES)
    rows = pq.read_table(sample / "catalog.parquet").to_pylist()
    peaks: dict[str, Any] = {}
    for count in arguments.rows:
        one = folder / str(count)
        one.mkdir()
        many = [
            rows[n % PICTURES]
            | {
                "product_id": f"p{n:09d}",
                "title": f"{rows[n % PICTURES]['title']} {n}",
                "image_uri": str(sample / rows[n % PICTURES]["image_uri"]),
            }
            for n in range(count)
        ]
        write_rows(one / "catalog.parquet", many)
        built = run_refresh(one, one / "catalog.parquet")
        write_rows(one / "changed.parquet", change(many, 0.01))
        nightly = run_refresh(one, one / "changed.parquet")
        peaks[f"{count:,} rows"] = {
            "first build, driver MiB": round(built["peak_mib"]),
            "refresh of 1 %, driver MiB": round(nightly["peak_mib"]),
            "images embedded": built["report"]["images_embedded"],
            "images reused": built["report"]["images_reused"],
        }
    kinds = ("first build, driver MiB", "refresh of 1 %, driver MiB")
    smallest, largest = next(iter(peaks.values())), list(peaks.values())[-1]
    ratios = {f"{kind}, largest over smallest": largest[kind] / smallest[kind] for kind in kinds}
    return peaks | ratios


def main() -> None:
    """Run a subcommand in a temporary folder and print what it found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    nightly = commands.add_parser("churn")
    nightly.add_argument("--products", type=int, default=20_000)
    nightly.add_argument("--share", type=float, default=0.01)
    nightly.add_argument("--sample", type=Path, help="rendered before: vitrine sample FOLDER")
    nightly.set_defaults(run=churn)
    peaks = commands.add_parser("memory")
    peaks.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    peaks.set_defaults(run=memory)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vitrine-refresh-") as folder:
        print(json.dumps(arguments.run(arguments, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
