"""A small real shop for the page's tests: a trained encoder, two releases, and a candidate.

Release 1 has the first products, release 2 the last ones; the candidate shows release 2's products
by another encoder.
"""

import json
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import uvicorn

from jobs.catalog import read_catalog
from jobs.config_file import read_config
from jobs.demo_app import Page, create_app
from jobs.demo_pictures import Pictures
from jobs.demo_release import open_shown
from jobs.progress import Progress
from jobs.refresh import refresh
from jobs.reindex import reindex
from jobs.sample import write_sample
from jobs.store import Store
from jobs.train import make_start
from jobs.train_loop import BEST_FOLDER, TrainTask, train_loop

PRODUCTS, CHANGED = 24, 3
STEPS = 120
MAX_BYTES, MAX_PIXELS = 300_000, 1_000_000
REPOSITORY = Path(__file__).resolve().parent.parent
NO_GATE = {"min_intersection_at_10": 0, "min_self_retrieval": 0, "min_overlap_at_10": 0}
QUIET = Progress(quiet=True)


class DemoShop:
    """The shop's files.

    Attributes:
        config: The job's configuration file.
        rows: By product id: its row in the catalog.
        queries: Held-out street photos: path and product id, of products that both releases have.
        candidate: The candidate's name.
    """

    def __init__(self, folder, towers):
        self.folder, self.catalog = folder, folder / "catalog"
        write_sample(self.catalog, products=PRODUCTS, seed=1, street_per_product=6, image_px=64)
        table = pq.read_table(self.catalog / "catalog.parquet")
        self.rows = {row["product_id"]: row for row in table.to_pylist()}
        self.ids = [set(self.rows), set()]
        self.config = self._write("job", {"checkpoint": str(folder / "trained")})
        start = self._write("start", {"architecture": str(towers), "pretrained": "random"})
        self._train(read_config(start))
        self.ids = [
            self._refresh(table, slice(0, -CHANGED)),
            self._refresh(table, slice(CHANGED, None)),
        ]
        self.candidate = reindex(read_config(start), QUIET, publish=False).candidate
        both = self.ids[0] & self.ids[1]
        self.queries = [
            (self.catalog / row["query_image_uri"], row["product_id"])
            for row in pq.read_table(self.catalog / "queries.parquet").to_pylist()
            if row["product_id"] in both
        ]

    def _train(self, config):
        """Train in this process, without Ray's workers: a mim3 that knows these products."""

        def keep(figures, reported):
            shutil.copytree(reported / BEST_FOLDER, self.folder / "trained", dirs_exist_ok=True)

        start = self.folder / "start"
        make_start(config, config.train, start)
        train_loop(TrainTask(config=config.train, images=config.images, start=str(start)), keep)

    def _write(self, name, encoder):
        path = self.folder / f"{name}.yaml"
        job = {
            "store": str(self.folder / "store"),
            "catalog": {
                "path": str(self.catalog / "catalog.parquet"),
                "text": "{title}. {description}",
            },
            "encoder": encoder,
            "images": {"max_bytes": MAX_BYTES, "max_pixels": MAX_PIXELS},
            "embed": {"fields": ["image", "text", "multimodal"]},
            "gate": NO_GATE,
            "ray": {"object_store_mb": 128},
            "train": {
                "pairs": str(self.catalog / "pairs-train.parquet"),
                "steps": STEPS,
                "validate_every": STEPS,
                "batch_size": 48,
                "learning_rate": 3e-3,
            },
        }
        path.write_text(json.dumps(job))
        return path

    def _refresh(self, table, rows):
        kept = table.to_pylist()[rows]
        pq.write_table(pa.Table.from_pylist(kept, table.schema), self.catalog / "catalog.parquet")
        assert refresh(read_config(self.config), QUIET).published
        return {row["product_id"] for row in kept}

    def picture(self, product):
        return self.catalog / self.rows[product]["image_uri"]

    def open_page(self, *names, config=None):
        """Open releases by version, or a candidate by name, as the command does."""
        config = config or read_config(self.config)
        store = Store(config.store)
        shown = []
        for name in names:
            found = store.release(name) if isinstance(name, int) else store.candidate(name)
            words = f"release {name}" if isinstance(name, int) else f"candidate {name}"
            beside = shown[0] if shown else None
            shown.append(open_shown(store, found, words, config, beside))
        catalog = read_catalog(config.catalog, need_images=True, need_text=False)
        return Page(
            shown=tuple(shown),
            pictures=Pictures(catalog, config.images),
            images=config.images,
            max_text_chars=1000,
        )

    @contextmanager
    def serve(self, *options):
        """Run the command in a process of its own; gives the page's address and the process."""
        command = [sys.executable, "-m", "jobs", "demo", "-c", str(self.config), "--port", "0"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running = subprocess.Popen([*command, *options], cwd=REPOSITORY, **pipes)
        try:
            line = running.stdout.readline()
            assert " on http://" in line, running.communicate(timeout=60)[1]
            address = line.split(" on ")[1].split()[0]
            yield address.replace("0.0.0.0", "127.0.0.1"), running
        finally:
            running.kill()
            running.wait()


@contextmanager
def serve_page(page, *, loopback=True):
    """Serve a page by a real server in a thread; gives a client of it."""
    app = create_app(page, loopback=loopback)
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def photo_part(path, name=None):
    return {"image": (name or Path(path).name, Path(path).read_bytes(), "image/jpeg")}
