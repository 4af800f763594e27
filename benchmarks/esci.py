"""Measures text queries on real products: msr3 against BM25 and MiniLM as it is.

    python benchmarks/esci.py run msr3-text --seed 0
    python benchmarks/esci.py choose
    python benchmarks/esci.py all
    python benchmarks/esci.py table

../shared/data/esci: 6,764 Amazon products and 70 real queries, graded by hand; a product that
nobody judged for a query gains 0. No step or rate is chosen by the judged queries; but bm25-title
is the best of five choices of BM25's text that were tried on them. Training
has pseudo-pairs of the product data alone: a few words of a title ask for the product, whose text
is its brand, bullets and description, with the title in half of the pairs. Products of the test
are among them, without labels. 256 other pseudo-pairs choose steps and learning rate (`choose`).

bm25        bm25s over title, brand, bullets and description. bm25-title: over title and brand,
            about what the encoders see in their 32 tokens.
minilm      all-MiniLM-L6-v2 as it is: mean-pooled, cosine. minilm-64: twice as many tokens.
msr3-text   msr3 from MiniLM; the product is its text alone (alpha_concat, image_weight 0).
msr3-fused  msr3 from MiniLM with a learned fusion (mlp). The images are addresses that can't be
            reached, so every product has the learned vector of a missing image: the row shows
            what masking costs, not what images bring. (With a concatenation masking changes no
            ranking: the missing image adds the same to every score.) Nothing of the image tower
            reaches a vector, so that it is the smallest there is.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from towers import REPOSITORY, SHARED, minilm_folder

from encoders.checkpoint import load_encoder, load_tokenizers
from encoders.checkpoint_files import read_checkpoint_config
from encoders.create import create_checkpoint, create_start
from encoders.fusion import FusionSpec, fuse_stored
from encoders.spec import EncoderSpec
from indexing.metrics import bootstrap_interval, ndcgs_at_k, recalls_at_k
from jobs.config import TrainConfig
from jobs.images import ImagesConfig
from jobs.pair_data import PairData
from jobs.train_loop import BEST_FOLDER, TrainTask, train_loop
from jobs.validate import encode_products

DATA = SHARED / "data" / "esci"
RESULTS = REPOSITORY / "benchmarks" / "results" / "esci"
SEEDS = (0, 1, 2)
LENGTH_TOKENS = 32
FUSIONS = {
    "msr3-text": FusionSpec(kind="alpha_concat", image_weight=0.0),
    "msr3-fused": FusionSpec(kind="mlp"),
}
BM25 = {"bm25": True, "bm25-title": False}  # whether over all the words
UNTRAINED = {"minilm": LENGTH_TOKENS, "minilm-64": 64}
ROWS = (*BM25, *UNTRAINED, *FUSIONS)

# One core shared with others: a step of 32 pairs, each with 3 mined negatives, takes seconds.
TRAIN_PAIRS, HELD_OUT_PAIRS = 768, 256
SPLIT_SEED = 7
BUDGET: dict[str, Any] = {"steps": 40, "batch_size": 32, "hard_negatives": 3, "precision": "bf16"}
VALIDATE_EVERY = 20
RATES = (2e-5, 1e-4)  # `choose` tries both, with the seed that is none of SEEDS
LEARNING_RATE = 1e-4
CHOICE_SEED = 100

FIGURES = ("ndcg_at_10", "recall_at_100 E", "recall_at_100 ESC")
RETRIEVED = 100

PerQuery = npt.NDArray[np.float64]


def read_products() -> list[dict[str, Any]]:
    """Read the products, in the order of the file."""
    rows: list[dict[str, Any]] = pq.read_table(DATA / "products.parquet").to_pylist()
    return rows


def read_judged() -> dict[str, dict[str, float]]:
    """Read the gain of every judged product by query text: E 100, S 10, C 1, I 0."""
    judged: dict[str, dict[str, float]] = {}
    for row in pq.read_table(DATA / "judgments.parquet").to_pylist():
        judged.setdefault(row["query_text"], {})[row["product_id"]] = float(row["gain"])
    return judged


def product_text(product: dict[str, Any], *, title: bool = True) -> str:
    """Join what is said of a product, the title first; the title alone where nothing is."""
    parts = [product["brand"], product["bullet_points"], product["description"]]
    said = " ".join(" ".join(part.split()) for part in parts if part)
    return f"{product['title']}. {said}" if title or not product["bullet_points"] else said


def pseudo_query(product: dict[str, Any], random: np.random.Generator) -> str:
    """Draw two to five neighbouring words from the beginning of a title, as a shopper types."""
    kept = "".join(c if c.isalnum() or c in "'/.&" else " " for c in product["title"].lower())
    words = kept.split()[:10]
    count = int(random.integers(2, 6))
    first = int(random.integers(0, max(1, len(words) - count + 1)))
    return " ".join(words[first : first + count])


def write_pairs(products: list[dict[str, Any]], seed: int, folder: Path) -> dict[str, str]:
    """Write training and held-out pseudo-pairs of different products; return their paths.

    The seed draws the words; which products are which does not depend on it.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(products))
    random, paths = np.random.default_rng(seed), {}
    parts = np.split(order[: HELD_OUT_PAIRS + TRAIN_PAIRS], [HELD_OUT_PAIRS])
    for name, rows in zip(("validation", "pairs"), parts, strict=True):
        picked = [products[row] for row in rows]
        table = {
            "product_id": [product["asin"] for product in picked],
            "query_text": [pseudo_query(product, random) for product in picked],
            "product_text": [product_text(p, title=random.random() < 0.5) for p in picked],
        }
        paths[name] = str(folder / f"{name}.parquet")
        pq.write_table(pa.table(table), paths[name])
    return paths


def start_spec(folder: Path, length_tokens: int) -> EncoderSpec:
    """Return MiniLM, without a projection, beside the smallest image tower."""
    minilm = minilm_folder()
    towers = {
        "embed_dim": 384,
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 16, "image_size": 16},
        "text_cfg": {
            "hf_model_name": minilm,
            "hf_tokenizer_name": minilm,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": None,
            "context_length": length_tokens,
        },
    }
    architecture = folder / "towers.json"
    architecture.write_text(json.dumps(towers))
    return EncoderSpec(architecture=str(architecture), pretrained="random", text_weights=minilm)


def train(row: str, seed: int, rate: float, folder: Path, *, held_out: bool) -> dict[str, Any]:
    """Train one kind of msr3 on pseudo-pairs; the checkpoint is `folder/best`.

    The seed is that of order, words, dropout and new weights: all seeds start from MiniLM. Where
    the held-out pairs are measured, the step that is best on them is kept, else the last one.
    """
    spec = start_spec(folder, LENGTH_TOKENS)
    create_start(spec, folder / "start", preset="msr3", fusion=FUSIONS[row], seed=seed)
    paths = write_pairs(read_products(), seed, folder)
    if not held_out:
        del paths["validation"]
    config = TrainConfig.model_validate(
        BUDGET
        | paths
        | {"preset": "msr3", "fusion": FUSIONS[row].kind, "image_weight": FUSIONS[row].image_weight}
        | {"seed": seed, "learning_rate": rate, "validate_every": VALIDATE_EVERY}
    )

    def report(figures: dict[str, Any], kept: Path | None) -> None:
        if kept is not None:
            shutil.copytree(kept / BEST_FOLDER, folder / BEST_FOLDER, dirs_exist_ok=True)

    task = TrainTask(config=config, images=ImagesConfig(), start=str(folder / "start"), threads=1)
    history = train_loop(task, report)
    seen = {v["step"]: v["figures"]["text to multimodal"] for v in history.validations}
    return {
        "pairs": history.pairs,
        "kept_step": history.best_step,
        "held_out": seen,
        "losses": [round(step["loss"], 4) for step in history.steps],
    }


def rank_by_vectors(checkpoint: Path, queries: list[str]) -> list[list[str]]:
    """Search all products exactly, by the vectors that a release would hold."""
    products = read_products()
    path = checkpoint.parent / "products.parquet"
    columns = {
        "product_id": [product["asin"] for product in products],
        "product_text": [product_text(product) for product in products],
        "query_text": [""] * len(products),
    }
    pq.write_table(pa.table(columns), path)
    encoder = load_encoder(checkpoint, precision="bf16")
    tokenizers = load_tokenizers(checkpoint)
    data = PairData(str(path), "test", "msr3", read_checkpoint_config(checkpoint), ImagesConfig())
    stored = encode_products(encoder, tokenizers, data, np.arange(len(data)))
    database = fuse_stored(encoder.fusion, stored)
    asked = encoder.encode_queries(None, tokenizers.query(queries), image_weight=0.0)
    best = np.argsort(-(asked @ database.T), axis=1, kind="stable")[:, :RETRIEVED]
    return [[data.names[place] for place in row] for row in best]


def rank_by_words(queries: list[str], *, bullets: bool) -> list[list[str]]:
    """Search all products by BM25: bm25s with its own settings and English stop words."""
    products = read_products()
    texts = [product_text(p) if bullets else f"{p['title']} {p['brand'] or ''}" for p in products]
    words = bm25s.tokenize(texts, stopwords="en", show_progress=False)
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    asked = bm25s.tokenize(queries, stopwords="en", show_progress=False)
    places, scores = index.retrieve(asked, k=RETRIEVED, show_progress=False)
    return [
        [products[place]["asin"] for place, score in zip(*row, strict=True) if score > 0]
        for row in zip(places, scores, strict=True)
    ]


def measure(found: list[list[str]], gains: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return the figures of `FIGURES`, a value a query each."""
    values = [ndcgs_at_k(found, gains, 10)]
    for least in (100, 1):
        relevant = [{p for p, gain in judged.items() if gain >= least} for judged in gains]
        values.append(recalls_at_k(found, relevant, RETRIEVED))
    rounded = [[round(float(value), 6) for value in some] for some in values]
    return dict(zip(FIGURES, rounded, strict=True))


def run(row: str, seed: int) -> None:
    """Make one row's rankings with one seed, measure them, and write the figures."""
    started, judged, shown = time.monotonic(), read_judged(), {}
    queries = list(judged)
    with tempfile.TemporaryDirectory(prefix="vitrine-esci-") as scratch:
        folder = Path(scratch)
        if row in BM25:
            found = rank_by_words(queries, bullets=BM25[row])
        elif row in UNTRAINED:
            create_checkpoint(start_spec(folder, UNTRAINED[row]), folder / BEST_FOLDER)
            found = rank_by_vectors(folder / BEST_FOLDER, queries)
        else:
            shown = train(row, seed, LEARNING_RATE, folder, held_out=False)
            found = rank_by_vectors(folder / BEST_FOLDER, queries)
    figures = measure(found, list(judged.values()))
    result = {"row": row, "seed": seed} | {
        "budget": BUDGET | {"learning_rate": LEARNING_RATE} if row in FUSIONS else {},
        "training": shown,
        "wall_s": round(time.monotonic() - started),
        "queries": queries,
        "figures": figures,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    result_path(row, seed).write_text(json.dumps(result, indent=1) + "\n")
    means = {name: round(float(np.mean(v)), 4) for name, v in figures.items()}
    print(row, seed, result["wall_s"], "s", json.dumps(means), flush=True)


def choose() -> None:
    """Try the learning rates on held-out pseudo-pairs, with a seed of its own."""
    for rate in RATES:
        with tempfile.TemporaryDirectory(prefix="vitrine-esci-") as scratch:
            shown = train("msr3-text", CHOICE_SEED, rate, Path(scratch), held_out=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        tried = {"budget": BUDGET | {"learning_rate": rate}, "training": shown}
        (RESULTS / f"choice-{rate}.json").write_text(json.dumps(tried, indent=1) + "\n")
        print(rate, json.dumps(shown["held_out"]), flush=True)


def table() -> None:
    """Print the rows as Markdown: the mean over seeds, its interval over queries, the seeds."""
    results = {row: _read_results(row) for row in ROWS}
    queries = len(read_judged())
    print(f"{queries} queries, {len(read_products())} products\n")
    names = ("nDCG@10", "recall@100 (E)", "recall@100 (E, S, C)", "nDCG@10 - BM25", "- MiniLM")
    print(f"| | {' | '.join(names)} |\n{'|---' * (1 + len(names))}|")
    for row, some in results.items():
        if not len(some):
            print(f"| {row} |{' not run |' * len(names)}")
            continue
        cells = [_cell(some[:, figure]) for figure in range(len(FIGURES))]
        for other in ("bm25", "minilm"):
            known = results[other]
            told = row != other and len(known)
            cells.append(_difference(some[:, 0], known[:, 0]) if told else "")
        print(f"| {row} | {' | '.join(cells)} |")


def _read_results(row: str) -> PerQuery:
    """Return (seeds, figures, Q) float64."""
    paths = [result_path(row, seed) for seed in SEEDS]
    found = [json.loads(path.read_text())["figures"] for path in paths if path.exists()]
    return np.array([[figures[name] for name in FIGURES] for figures in found], np.float64)


def _cell(seeds: PerQuery) -> str:
    """Show (seeds, Q) figures; the interval is over queries, each averaged over the seeds."""
    low, high = bootstrap_interval(seeds.mean(axis=0))
    cell = f"{seeds.mean():.3f} [{low:.3f}, {high:.3f}]"
    if len(seeds) == 1:
        return cell
    return cell + f" seeds {' '.join(f'{mean:.3f}' for mean in seeds.mean(axis=1))}"


def _difference(seeds: PerQuery, other: PerQuery) -> str:
    """Show how far a row is from another on the same queries: paired, hence narrower."""
    values = seeds.mean(axis=0) - other.mean(axis=0)
    low, high = bootstrap_interval(values)
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def result_path(row: str, seed: int) -> Path:
    """Say where the figures of a row and seed are."""
    return RESULTS / f"{row}-{seed}.json"


def main() -> None:
    """Run one row, choose the rate, run all, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("action", choices=("run", "choose", "all", "table"))
    parser.add_argument("row", nargs="?", choices=ROWS, default="bm25")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.action == "run":
        run(given.row, given.seed)
    elif given.action == "choose":
        choose()
    elif given.action == "all":
        wanted = [(row, 0) for row in (*BM25, *UNTRAINED)] + [
            (r, seed) for seed in SEEDS for r in FUSIONS
        ]
        for row, seed in wanted:
            if not result_path(row, seed).exists():
                run(row, seed)
    if given.action in ("all", "table"):
        table()


if __name__ == "__main__":
    main()
