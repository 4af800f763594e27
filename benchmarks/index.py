"""What an index costs to build and how well it answers, beside plain FAISS and autofaiss.

    python benchmarks/index.py compare mnist --contenders plain cores autofaiss [--json FILE]
    python benchmarks/index.py specs mnist --bytes 64
    python benchmarks/index.py growth synthetic --rows 50000 100000 200000 400000 800000
    python benchmarks/index.py data mnist --to FOLDER [--mnist FOLDER] [--checkpoint FOLDER]
    python benchmarks/index.py data synthetic --to FOLDER [--rows 1000000] [--dim 256]

compare  builds the same vectors with every contender, one after the other, each in a process of
         its own, and prints them side by side.
specs    builds several indexes of about so many bytes a vector, with and without a refine store.
growth   builds the first so many vectors, and fits time and memory.
data     embeds Fashion-MNIST, or draws clustered vectors of low rank. The others make `mnist` and
         `synthetic` by themselves below --work; a folder that `data` wrote will do as well.

Contenders: plain (FAISS 1.15.1 and nothing else), cores (`indexing` in one process), stage (the
index stage on Ray, from a store), autofaiss (2.18.0, in an environment that is made for it). All
have the same threads, vectors and held-out queries, and are measured against the same exact
search. Tables are Markdown on standard output; --json keeps all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from index_data import count_vectors, find_exact, make_synthetic
from index_probe import TUNING_QUERIES, K
from index_tables import compare_times, print_growth, print_memory, print_results, print_specs
from runs import Figures, keep_median, make_environment

from indexing.metrics import intersection_at_k
from indexing.spec import ID_BYTES, IndexSpec

HERE = Path(__file__).resolve().parent
AUTOFAISS = ("autofaiss==2.18.0", "numpy<2", "faiss-cpu==1.11.*", "pyarrow<22")
TRAIN_ROWS, TRAIN_ROWS_PER_LIST = 65_536, 64  # as the index stage draws them
KINDS = {"mnist": 60_000, "synthetic": 1_000_000, "synthetic-small": 200_000}  # rows
CONTENDERS = ("plain", "cores", "stage", "autofaiss")


def run_step(script: list[str], step: str, task: Figures) -> Figures:
    """Run one step of a contender; return the figures that it wrote."""
    threads = str(task["threads"])
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    # Spinning threads would steal a core from whatever has work on it. The stage sets its own.
    settings = dict.fromkeys(names, threads) | {"OMP_WAIT_POLICY": "PASSIVE"}
    if step == "build" and script[-1].endswith("index_stage.py"):
        settings = {}
    root = {"PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"}
    command = [*script, step, json.dumps(task)]
    done = subprocess.run(
        command, env=os.environ | settings | root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr[-2000:]
        raise SystemExit(f"{' '.join(command[:-1])} ended with {done.returncode}:\n{said}")
    found: Figures = json.loads((Path(task["folder"]) / f"{step}.json").read_text(encoding="utf-8"))
    return found


def run_contender(name: str, arguments: argparse.Namespace, task: Figures) -> Figures:
    """Build and search with one contender in an empty folder; return its figures."""
    with tempfile.TemporaryDirectory(prefix=f"vitrine-{name}-") as folder:
        script = [sys.executable, str(HERE / "index_contenders.py"), name]
        if name == "stage":
            script = [sys.executable, str(HERE / "index_stage.py")]
        own = task | {"folder": folder}
        if name == "autofaiss":
            script = [
                str(make_environment(arguments.work / "autofaiss", AUTOFAISS)),
                str(HERE / "autofaiss_run.py"),
            ]
            budget = budget_bytes(arguments, task["rows"])
            own |= {"index_bytes": budget, "memory_bytes": arguments.memory_bytes}
        built = run_step(script, "build", own)
        searched = run_step(script, "search", own)
        found = np.load(Path(folder) / "found.npy")
    exact = find_exact(Path(task["data"]), task["rows"])[TUNING_QUERIES:]
    result = {
        "contender": name,
        "factory": built["factory"],
        "point": searched.get("point", built.get("point")),
        "build_s": sum(built["seconds"].values()),
        "seconds": built["seconds"],
        "build_peak_mib": built["peak_mib"],
        "index_mib": built["index_bytes"] / 2**20,
        "intersection": intersection_at_k(found, exact, K),
        "search_peak_mib": searched["peak_mib"],
    }
    kept = ("tune_s", "ms_per_query", "p50_ms", "p99_ms", "codes_alone", "curve")
    more = (
        "tune_s",
        "apart_s",
        "steps_s",
        "table_bytes",
        "driver_peak_mib",
        "worker_peaks_mib",
        "asked_mib",
        "told",
    )
    result |= {key: built[key] for key in more if key in built}
    return result | {key: searched[key] for key in kept if key in searched}


def run_medians(arguments: argparse.Namespace, task: Figures) -> list[Figures]:
    """Build with each contender in turn, several times; keep each one's run of median time.

    autofaiss, whose minutes hardly vary, builds once.
    """
    runs: dict[str, list[Figures]] = {name: [] for name in arguments.contenders}
    for number in range(arguments.repeats):
        for name in arguments.contenders:
            if number == 0 or name != "autofaiss":
                runs[name].append(run_contender(name, arguments, task))
    return [keep_median(own, "build_s") for own in runs.values()]


def make_task(arguments: argparse.Namespace, rows: int, factory: str | None) -> Figures:
    """Return what every contender is told; without a factory string the size chooses one."""
    _, dim = count_vectors(arguments.data)
    if factory:
        spec, why = IndexSpec.parse(factory, dim), list[str]()
    else:
        budget = budget_bytes(arguments, rows)
        spec, why = IndexSpec.for_catalog(
            rows, dim, memory_budget_bytes=budget, target_intersection=arguments.target
        )
    print(f"{rows:,} vectors: {spec.factory}", *why, sep="\n  ", file=sys.stderr)
    find_exact(arguments.data, rows)
    return {
        "data": str(arguments.data),
        "rows": rows,
        "factory": spec.factory,
        "train_rows": arguments.train_rows or max(TRAIN_ROWS, TRAIN_ROWS_PER_LIST * spec.nlist),
        "target": arguments.target,
        "seed": 0,
        "threads": arguments.threads,
    }


def budget_bytes(arguments: argparse.Namespace, rows: int) -> int:
    """Return the most bytes that an index of so many vectors may take."""
    return int(rows * (arguments.bytes + ID_BYTES))


def compare(arguments: argparse.Namespace) -> Figures:
    """Build the same vectors with every contender; return and print them side by side."""
    rows, dim = count_vectors(arguments.data)
    task = make_task(arguments, rows, arguments.factory)
    results = run_medians(arguments, task)
    budget_mib = budget_bytes(arguments, rows) / 2**20
    told = f"{arguments.threads} threads, a budget of {budget_mib:.1f} MiB without refine store"
    print(f"\n{rows:,} vectors of {dim} dimensions, {told}\n")
    print_results(results)
    print_memory(results)
    ratios = compare_times(results)
    for name, ratio in ratios.items():
        print(f"\n{name}: {ratio:.3g}")
    return {"rows": rows, "dim": dim, "results": results, "ratios": ratios}


def code_specs(dim: int, code_bytes: int, nlist: int) -> list[str]:
    """Return factory strings of about so many bytes a code, without a refine store.

    RaBitQ takes a bit a dimension and 8 bytes: over 8 * (bytes - 8) dimensions a rotation
    reduces, under it the code is smaller than asked.
    """
    lists, half = f"IVF{nlist}", min(dim, 2 * code_bytes)
    bits = min(dim, 8 * (code_bytes - 8))
    specs = [
        f"PCAR{half},{lists},PQ{2 * code_bytes}x4fs" if half < dim else "",
        f"{lists},PQ{2 * code_bytes}x4fs" if dim % (2 * code_bytes) == 0 else "",
        f"PCAR{4 * code_bytes},{lists},PQ{code_bytes}np" if 4 * code_bytes < dim else "",
        f"PCAR{half},{lists},PQ{code_bytes}np",
        f"OPQ{code_bytes},{lists},PQ{code_bytes}np" if dim % code_bytes == 0 else "",
        f"PCAR{half},{lists},SQ4",
        f"PCAR{code_bytes},{lists},SQ8",
        f"PCAR{bits},{lists},RaBitQfs" if bits < dim else f"{lists},RaBitQfs",
    ]
    return [spec for spec in specs if spec]


def specs(arguments: argparse.Namespace) -> Figures:
    """Build one index a spec and refine store; print what each reaches."""
    rows, dim = count_vectors(arguments.data)
    results = []
    for spec in arguments.factories or code_specs(dim, arguments.bytes, arguments.nlist):
        for refine in arguments.refines:
            task = make_task(arguments, rows, f"{spec},Refine({refine})")
            results.append(run_contender(arguments.contenders[0], arguments, task))
            print(
                json.dumps({k: v for k, v in results[-1].items() if k != "curve"}), file=sys.stderr
            )
    print(f"\n{rows:,} vectors of {dim} dimensions, {arguments.threads} threads\n")
    print_specs(results)
    return {"rows": rows, "dim": dim, "results": results}


def growth(arguments: argparse.Namespace) -> Figures:
    """Build the first so many vectors; print seconds by step, memory, and what they fit."""
    results: dict[str, list[Figures]] = {}
    for name in arguments.contenders:
        for rows in arguments.rows:
            task = make_task(arguments, rows, arguments.factory)
            results.setdefault(name, []).append(run_contender(name, arguments, task))
    fits: Figures = {}
    for name, runs in results.items():
        print(f"\n{name}, {arguments.threads} threads\n")
        fits[name] = print_growth(arguments.rows, runs)
    return {"rows": arguments.rows, "results": results, "fits": fits}


def make_data(arguments: argparse.Namespace) -> Figures:
    """Make a data set."""
    if arguments.kind == "mnist":
        from index_mnist import make_mnist  # torch: nothing else here needs it

        make_mnist(arguments.to, mnist=arguments.mnist, checkpoint=arguments.checkpoint)
    else:
        rows = arguments.rows or KINDS[arguments.kind]
        make_synthetic(arguments.to, rows=rows, dim=arguments.dim, seed=arguments.seed)
    rows, dim = count_vectors(arguments.to)
    print(f"{arguments.to}: {rows:,} vectors of {dim} dimensions", file=sys.stderr)
    return {"rows": rows, "dim": dim}


def find_data(given: Path, work: Path) -> Path:
    """Return a data set's folder; one that is named by its kind is made where it is missing."""
    if str(given) not in KINDS:
        return given
    made = work / given
    if not (made / "queries.npy").exists():  # which is written last
        main(["data", str(given), "--to", str(made)])
    return made


def parse(words: list[str]) -> argparse.Namespace:
    """Read a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data")
    data.add_argument("kind", choices=KINDS)
    data.add_argument("--to", type=Path, required=True)
    data.add_argument("--mnist", type=Path, help="folder of the images; else they are fetched")
    data.add_argument("--checkpoint", type=Path, help="else EfficientNet-lite0 of ImageNet")
    data.add_argument("--rows", type=int, help="else as many as its kind has")
    data.add_argument("--dim", type=int, default=256)
    data.add_argument("--seed", type=int, default=0)
    data.set_defaults(run=make_data)
    for name, run in (("compare", compare), ("specs", specs), ("growth", growth)):
        one = commands.add_parser(name)
        one.add_argument("data", type=Path, help=f"{', '.join(KINDS)}, or a folder")
        one.add_argument("--threads", type=int, default=os.cpu_count() or 1)
        one.add_argument("--train-rows", type=int, help="else as the index stage draws them")
        one.add_argument("--target", type=float, default=0.95)
        one.add_argument("--bytes", type=int, default=64, help="of a code; its id has 8 more")
        one.add_argument("--contenders", nargs="+", choices=CONTENDERS)
        one.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vitrine-index")
        one.set_defaults(run=run)
        if name != "specs":
            one.add_argument("--factory", help="else the catalog's size and --bytes choose it")
    comparing, choosing, growing = (commands.choices[n] for n in ("compare", "specs", "growth"))
    comparing.set_defaults(contenders=CONTENDERS)
    comparing.add_argument("--repeats", type=int, default=3)
    choosing.set_defaults(contenders=["cores"])
    growing.set_defaults(contenders=["plain", "cores"])
    comparing.add_argument("--memory-bytes", type=int, default=4 << 30, help="to build it")
    choosing.add_argument("--nlist", type=int, default=1024)
    choosing.add_argument("--factories", nargs="+", help="else those of --bytes")
    choosing.add_argument("--refines", nargs="+", default=["SQfp16", "SQ8"])
    growing.add_argument(
        "--rows", type=int, nargs="+", default=[50_000, 100_000, 200_000, 400_000, 800_000]
    )
    for one in commands.choices.values():
        one.add_argument("--json", type=Path, help="where to keep all figures")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    """Run a subcommand; print its table, and keep its figures where asked."""
    arguments = parse(words)
    if arguments.command != "data":
        arguments.data = find_data(arguments.data, arguments.work)
    figures = arguments.run(arguments)
    if arguments.json:
        figures |= {"command": words, "load": os.getloadavg(), "cores": os.cpu_count()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
