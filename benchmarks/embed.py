"""What embedding photos costs: the stage beside a hand-written loop, its parts, clip-retrieval.

    python benchmarks/embed.py [PHOTOS] [--images 1200] [--architecture ViT-B-32] [--repeats 3]
    python benchmarks/embed.py --contenders stage loader clip-retrieval --json FILE

All contenders have the same photos, random weights, batch and cores, and run one after the other,
each setting in a process of its own; each is told by its run of median speed.

forward         the encoder alone on ready batches, by batch and precision
decode          files to pixels alone, as the stage makes them, by number of processes and by size
loader          PyTorch's DataLoader with the same decoding and the encoder, by number of workers
stage           the embedding stage of `vitrine refresh`, from a catalog to the committed table
clip-retrieval  `clip inference` 2.45.0 in an environment that is made for it below --work, with
                the same version of torch: gigabytes, so it must be asked for

clip-retrieval has no bf16 on CPUs, and runs in fp32. Images a second and CPU leave out the start
(imports, loading the encoder, starting actors), which stands beside them. Tables are Markdown on
standard output; --json keeps all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embed_photos import make_checkpoint, make_photos, resize_photos, write_catalog
from embed_stage import WATCH_S, describe, run_stage
from embed_tables import compare_points, print_points, print_processes
from processes import Processes
from runs import Figures, keep_median, make_environment

HERE = Path(__file__).resolve().parent
PHOTOS = HERE.parent.parent / "shared" / "data" / "clothes"
# torch comes as Vitrine has it: another version has other kernels.
CLIP_RETRIEVAL = "clip-retrieval==2.45.0"
OLD_SETUPTOOLS = "setuptools<70"  # it imports pkg_resources; torch asks for a newer one to compile
SIZED_PHOTOS = 100
CONTENDERS = ("forward", "decode", "loader", "stage", "clip-retrieval")


def run_process(command: list[str], task: Figures) -> Figures:
    """Run a contender in a process of its own; return its figures and those of its processes."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    # What the stage's own processes get: spinning threads would steal a core from whatever has
    # work on it, and small pages cost a forward pass some percent.
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1"}
    settings |= dict.fromkeys(names, str(task["threads"]))
    root = {"PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"}
    figures, processes = Path(task["figures"]), Processes(WATCH_S)
    said = figures.with_suffix(".log")
    with (
        said.open("wb") as output,
        subprocess.Popen(
            [*command, json.dumps(task | {"born": time.time()})],
            env=os.environ | settings | root,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
        processes.watch(process.pid),
    ):
        process.wait()
    if process.returncode:
        words = said.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{words}")
    found: Figures = json.loads(figures.read_text(encoding="utf-8"))
    if "window" in found:  # clip-retrieval doesn't wait for its processes before the work is over
        found["cpu_s"] = processes.cpu_between(*found["window"])
    return found | describe(processes)


def run_point(point: Figures, task: Figures, work: Path) -> Figures:
    """Run one contender at one setting in an empty folder; return its figures."""
    name = point["contender"]
    with tempfile.TemporaryDirectory(prefix=f"vitrine-{name}-", dir=work) as scratch:
        folder = Path(scratch)
        shared = {key: task[key] for key in ("checkpoint", "forward_s", "threads")}
        own = shared | {key: point[key] or task[key] for key in ("batch", "precision")}
        own["photos"] = str(_sized(work, point["side_px"])) if point["side_px"] else task["photos"]
        own |= {"processes": point["processes"], "figures": str(folder / "figures.json")}
        if name == "stage":
            found = run_stage(own | {"catalog": task["catalog"]}, folder)
        elif name == "clip-retrieval":
            more = {"folder": scratch, **{key: task[key] for key in ("architecture", "weights")}}
            torch = f"torch=={version('torch').partition('+')[0]}"
            environment = work / "clip-retrieval"
            packages = (CLIP_RETRIEVAL, torch)
            python = str(make_environment(environment, packages, (OLD_SETUPTOOLS,)))
            found = run_process([python, str(HERE / "clip_retrieval_run.py")], own | more)
        else:
            script = str(HERE / "embed_contenders.py")
            found = run_process([sys.executable, script, name], own)
    found["images_per_s"] = found["images"] / found["seconds"]
    found["cpu_s_per_1000"] = 1e3 * found["cpu_s"] / found["images"]
    return point | found


def make_points(arguments: argparse.Namespace) -> list[Figures]:
    """Return every contender at every setting, in the order in which they run."""

    def point(name: str, setting: str, **values: object) -> Figures:
        told: Figures = {"batch": None, "precision": None, "processes": 1, "side_px": None}
        return {"contender": name, "setting": setting} | told | values

    threads, precision = arguments.threads, arguments.precision
    shared = f"batch {arguments.batch}, {precision}"
    some = sorted({1, *(2**n for n in range(threads.bit_length())), threads})
    points = {
        "forward": [
            point("forward", f"batch {batch}, {kind}", batch=batch, precision=kind)
            for kind in arguments.precisions
            for batch in arguments.batches
        ],
        "decode": [
            *(point("decode", f"processes {n}", processes=n) for n in some),
            *(point("decode", f"one process, {px} px", side_px=px) for px in arguments.sides),
        ],
        "loader": [
            point("loader", f"workers {n}, {shared}", processes=n)
            for n in arguments.workers or sorted({max(1, threads // 2), threads})
        ],
        "stage": [point("stage", shared)],
        "clip-retrieval": [
            # It has no other precision on CPUs.
            point(
                "clip-retrieval",
                f"workers {threads}, batch {arguments.batch}, fp32",
                processes=threads,
            )
        ],
    }
    return [one for name in arguments.contenders for one in points[name]]


def _sized(work: Path, side_px: int) -> Path:
    return work / f"photos-{side_px}"


def run_medians(points: list[Figures], task: Figures, arguments: argparse.Namespace) -> list[Any]:
    """Run all settings in turn, several times; keep each one's run of median speed."""
    runs: list[list[Figures]] = [[] for _ in points]
    for number in range(arguments.repeats):
        for point, own in zip(points, runs, strict=True):
            own.append(run_point(point, task, arguments.work))
            told = f"{point['contender']}, {point['setting']}: {own[-1]['images_per_s']:.1f}/s"
            print(f"{number + 1}/{arguments.repeats} {told}", file=sys.stderr)
    return [keep_median(own, "images_per_s") for own in runs]


def make_task(arguments: argparse.Namespace) -> Figures:
    """Make what all contenders share; return what they are told."""
    photos = make_photos(arguments.photos, arguments.work / "photos", arguments.images)
    for px in arguments.sides if "decode" in arguments.contenders else ():
        resize_photos(photos[:SIZED_PHOTOS], _sized(arguments.work, px), px)
    checkpoint, weights = make_checkpoint(arguments.architecture, arguments.work)
    write_catalog(arguments.work / "catalog.parquet", photos)
    return {
        "photos": str(arguments.work / "photos"),
        "catalog": str(arguments.work / "catalog.parquet"),
        "checkpoint": str(checkpoint),
        "weights": str(weights),
        "architecture": arguments.architecture,
        "batch": arguments.batch,
        "precision": arguments.precision,
        "threads": arguments.threads,
        "forward_s": arguments.forward_s,
    }


def native_precision() -> str:
    """Return what Vitrine takes by itself on this CPU."""
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    return "bf16" if {"amx_bf16", "avx512_bf16", "bf16"} & set(flags) else "fp32"


def parse(words: list[str]) -> argparse.Namespace:
    """Read a command line."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", type=Path, nargs="?", default=PHOTOS, help="a folder of JPEGs")
    parser.add_argument("--images", type=int, default=1200, help="repeated where there are fewer")
    parser.add_argument("--architecture", default="ViT-B-32", help="a name of open_clip's")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS[:-1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores, help="cores that everybody has")
    parser.add_argument("--batch", type=int, default=64, help="of all but forward")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default=native_precision(), help="as --batch"
    )
    parser.add_argument("--workers", type=int, nargs="+", help="of loader; else half and all cores")
    parser.add_argument(
        "--sides", type=int, nargs="*", default=[256, 512, 1024, 2048], help="px, of decode"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--precisions", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"]
    )
    parser.add_argument(
        "--forward-s", type=float, default=5.0, help="how long each of forward runs"
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vitrine-embed")
    parser.add_argument("--json", type=Path, help="where to keep all figures")
    arguments = parser.parse_args(words)
    if not 1 <= arguments.threads <= cores:
        parser.error(f"--threads must be in 1..{cores}")
    return arguments


def main(words: list[str]) -> None:
    """Run all contenders; print the table and the ratios, and keep the figures where asked."""
    arguments = parse(words)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    points = run_medians(make_points(arguments), make_task(arguments), arguments)
    print(f"\n{arguments.images:,} photos, {arguments.architecture}, {arguments.threads} cores\n")
    print_points(points)
    print_processes(points)
    ratios = compare_points(points, arguments.precision)
    for name, ratio in ratios.items():
        print(f"\n{name}: {ratio:.3g}")
    if arguments.json:
        told = {"command": words, "load": os.getloadavg(), "cores": arguments.threads}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"images": arguments.images, "points": points, "ratios": ratios} | told
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
