"""Makes small stores without encoders and images: true tables, stand-ins for what is opaque."""

import hashlib
import json
import os
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.embed_write import write_data_file
from jobs.ids import ROWS
from jobs.schemas import DELETE, EMBEDDINGS, REJECT, UPSERT, vector_id
from jobs.store import Release

ENCODER = "e" * 64


@dataclass(frozen=True)
class Row:
    """A row of the embeddings table."""

    product: int
    generation: int
    operation: str = UPSERT
    encoder: str = ENCODER


def make_table(rows, seed=0, written_at=None):
    """Rows as a table of the embeddings' schema, every column filled as a refresh fills it."""
    rng = np.random.default_rng([seed, len(rows)])
    now = pa.scalar(int((written_at or time.time()) * 1e6)).cast(pa.timestamp("us", "UTC"))
    made = []
    for row in rows:
        one = dict.fromkeys(EMBEDDINGS.names) | {
            "vector_id": vector_id(f"p{row.product}", 0),
            "generation": row.generation,
            "operation": row.operation,
            "written_at": now.as_py(),
            "encoder": row.encoder,
        }
        if row.operation != DELETE:
            one |= {"product_id": f"p{row.product}", "image_number": 0}
            names = ("image_hash", "text_hash", "etag_hash", "image_content")
            one |= {name: int(rng.integers(1, 2**60)) for name in names}
        if row.operation == UPSERT:
            one["image_embedding"] = rng.normal(size=8).astype(np.float16).tolist()
        if row.operation == REJECT:
            one |= {"reject_reason": "timeout", "reject_detail": "slow", "attempts": 2}
            one["first_seen"] = now.as_py()
        made.append(one)
    return pa.Table.from_pylist(made, schema=EMBEDDINGS)


def append(store, rows, seed=0, written_at=None):
    """Commit rows as one data file; return its name."""
    generation = max(row.generation for row in rows)
    store.embeddings()
    file = write_data_file(store, make_table(rows, seed, written_at), generation)
    store.commit_embeddings([file])
    return file.path


def publish(store, run, *, folder=None, encoder=ENCODER, command="refresh"):
    """Publish a release of all data files; its image index may lie in an earlier folder."""
    version = store.embeddings().version()
    files = store.embedding_files(version)
    codes = write_file(store, b"index of " + run.encode(), run, "image.faiss")
    fields = {
        "image": {
            "spec": {"dim": 8},
            "template": write_file(store, b"template", run, "image.template.faiss"),
            "partitions": [{"ntotal": 0, "codes": codes, "refine": None}],
        }
    }
    if folder:
        fields["image"] = read_manifest(store, folder)["fields"]["image"]
    buffer = pa.BufferOutputStream()
    described = ROWS.with_metadata({"files": json.dumps(files)})
    pq.write_table(described.empty_table(), buffer)
    rows = write_file(store, buffer.getvalue().to_pybytes(), run, "rows.parquet")
    ids = write_file(store, b"ids", run, "ids.parquet")
    manifest = {"fields": fields, "ids": ids | {"rows": 0}, "rows": rows | {"rows": 0}}
    store.write_text(json.dumps(manifest), "indexes", run, "manifest.json")
    store.write_text("{}", "runs", run, "report.json")
    for name in ("model.safetensors", "encoder.json"):
        store.write_text("{}", "checkpoints", encoder, name)
    newest = store.current_release()
    release = Release(
        version=newest.version + 1 if newest else 1,
        parent=newest.version if newest else None,
        created_at="2026-01-31T12:00:00+00:00",
        run=run,
        encoder=encoder,
        embeddings_version=version,
        indexes=run,
        products=0,
        vectors=0,
        rejected=0,
        rows=0,
        config_hash="c" * 64,
        command=command,
        quality={},
    )
    store.publish(release)
    return release


def write_file(store, content, run, name):
    """Write an index file; return the manifest's entry of it."""
    filesystem = store.filesystem()
    filesystem.makedirs(store.uri("indexes", run), exist_ok=True)
    filesystem.pipe_file(store.uri("indexes", run, name), content)
    digest = hashlib.sha256(content).hexdigest()
    return {"folder": run, "file": name, "sha256": digest, "size_bytes": len(content)}


def read_manifest(store, run):
    return store.read_json("indexes", run, "manifest.json")


def age(folder, seconds):
    """Make all files below a local folder so much older, and the commits among them too."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            then = os.stat(path).st_mtime - seconds
            os.utime(path, (then, then))
