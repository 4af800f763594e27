"""Runs the demo: render a catalog, train a mim3 encoder, refresh, find street photos' products.

The same catalog is searched with an untrained encoder too, and the difference printed.

`make demo` calls it: python docs/demo.py FOLDER
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

CONFIG = Path(__file__).resolve().parent.parent / "jobs" / "configs" / "demo.yaml"
PRODUCTS = 800
PHOTOS = 5
TOP = 5
UNTRAINED = "encoder={architecture: vitrine-tiny, pretrained: random}"
LEAST_MARGIN = 0.2


def run_vitrine(folder: Path, *arguments: str) -> str:
    """Run one command in the demo's folder, shown as a user would type it; return its output."""
    print(f"\n$ vitrine {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "jobs", *arguments]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def show_search(folder: Path, query: dict[str, str]) -> bool:
    """Search one held-out street photo; print what came; return whether its product did."""
    photo = f"catalog/{query['query_image_uri']}"
    output = run_vitrine(folder, "search", "-c", "demo.yaml", "-i", photo, "-k", str(TOP), "--json")
    results = json.loads(output)["results"]
    for place, one in enumerate(results, 1):
        mark = "<- the photographed product" if one["product_id"] == query["product_id"] else ""
        title = one["metadata"]["title"]
        print(f"  {place}. {one['score']:.3f}  {one['product_id']}  {title}  {mark}")
    return query["product_id"] in [one["product_id"] for one in results]


def read_recall(folder: Path, *settings: str) -> dict[str, float]:
    """Return what the newest release's refresh measured with all labelled street photos."""
    output = run_vitrine(folder, "status", "-c", "demo.yaml", "--json", *settings)
    labelled = json.loads(output)["releases"][0]["quality"]["labelled"]
    return {name: labelled[name] for name in ("recall_at_1", "recall_at_10")}


def main() -> None:
    """Run all steps; exit 1 if training did not pay, or no street photo finds its product."""
    started = time.monotonic()
    folder = Path(sys.argv[1])
    if folder.exists() and not (folder / "demo.yaml").exists():
        sys.exit(f"{folder} exists and is no earlier demo: name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(CONFIG, folder / "demo.yaml")
    print(run_vitrine(folder, "sample", "catalog", "--products", str(PRODUCTS), "--seed", "0"))
    print(run_vitrine(folder, "train", "checkpoint", "-c", "demo.yaml", "--set", UNTRAINED))
    refreshed = json.loads(run_vitrine(folder, "refresh", "-c", "demo.yaml", "--json"))
    print(run_vitrine(folder, "status", "-c", "demo.yaml"))
    queries = pq.read_table(folder / "catalog" / "queries.parquet").slice(0, PHOTOS).to_pylist()
    hits = sum(show_search(folder, query) for query in queries)
    print(f"\n{hits} of {len(queries)} held-out street photos found their product in the top {TOP}")
    before = ("--set", UNTRAINED, "--set", "store=store-untrained")
    no_gate = "gate={min_intersection_at_10: 0, min_self_retrieval: 0}"  # untrained vectors tie
    run_vitrine(folder, "refresh", "-c", "demo.yaml", "--quiet", *before, "--set", no_gate)
    trained, untrained = read_recall(folder), read_recall(folder, *before)
    print(f"\nall {len(pq.read_table(folder / 'catalog' / 'queries.parquet'))} held-out photos:")
    for name, value in trained.items():
        margin = value - untrained[name]
        print(f"  {name}: mim3 {value:.3f}, untrained {untrained[name]:.3f}, margin {margin:+.3f}")
    print(f"contact sheet, figures: {refreshed['report']}")
    print(f"the demo took {time.monotonic() - started:.0f} s; its files are in {folder}/")
    paid = trained["recall_at_1"] - untrained["recall_at_1"] >= LEAST_MARGIN
    sys.exit(0 if hits and paid else f"the margin is under {LEAST_MARGIN}, or nothing was found")


if __name__ == "__main__":
    main()
