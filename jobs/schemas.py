"""The Arrow schemas of every table the store holds, and the identifiers in them."""

import hashlib
from collections.abc import Iterable

import pyarrow as pa

EMBEDDING_FIELDS = ("image", "text", "multimodal")
PRECISIONS = ("fp32", "bf16")
UPSERT, DELETE, REJECT = "upsert", "delete", "reject"
IMAGE_BITS = 47
MANIFEST_FORMAT = 5  # of an index version's manifest.json

EMBEDDINGS = pa.schema(
    [
        pa.field("product_id", pa.string()),
        pa.field("image_number", pa.int32()),
        pa.field("vector_id", pa.int64()),
        pa.field("generation", pa.int64()),
        pa.field("operation", pa.string()),
        pa.field("written_at", pa.timestamp("us", "UTC")),
        pa.field("image_hash", pa.int64()),
        pa.field("text_hash", pa.int64()),
        pa.field("etag_hash", pa.int64()),
        pa.field("image_content", pa.int64()),
        pa.field("encoder", pa.string()),
        pa.field("precision", pa.string()),
        pa.field("reject_reason", pa.string()),
        pa.field("reject_detail", pa.string()),
        pa.field("first_seen", pa.timestamp("us", "UTC")),
        pa.field("attempts", pa.int32()),
        pa.field("limits_hash", pa.int64()),
        *(pa.field(f"{name}_embedding", pa.list_(pa.float32())) for name in EMBEDDING_FIELDS),
    ]
)
"""One appended row a (product, image) and generation. The live row of a `vector_id` is the newest
of the release's encoder; an embedding is (D,) float32, unit length, rounded to float16 (half the
bytes on disk). It is null where there is none: in rejects, in fields that are fused when they are
read, and for the image or text that a live row lacks, with the reason beside it.

A row is embedded again when `image_hash` (reference and version), `text_hash` (filled template) or
`etag_hash` (what the image's server says; 0: not asked) differs. `image_content` hashes the image's
bytes. Of a reject, `first_seen` is when the same content was first refused, and `attempts` how many
refreshes have tried it; `limits_hash` names the configured limits that a row was judged by."""

RELEASES = pa.schema(
    [
        pa.field("version", pa.int64()),
        pa.field("parent", pa.int64()),
        pa.field("created_at", pa.string()),
        pa.field("run", pa.string()),
        pa.field("encoder", pa.string()),
        pa.field("embeddings_version", pa.int64()),
        pa.field("indexes", pa.string()),
        pa.field("products", pa.int64()),
        pa.field("vectors", pa.int64()),
        pa.field("rejected", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("config_hash", pa.string()),
        pa.field("command", pa.string()),
        pa.field("quality", pa.string()),
    ]
)
"""One row a release; `quality` is JSON. The newest row is what serving loads."""


def hash63(parts: Iterable[bytes]) -> int:
    """Hash byte strings, each with its length, to an int in [0, 2**63).

    Args:
        parts: What to hash, in order; (b"a", b"bc") and (b"ab", b"c") differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") >> 1


def product_hash(product_id: str) -> int:
    """Return the 63-bit hash of a product's id."""
    return hash63((product_id.encode("utf-8", "surrogatepass"),))


def vector_id(product_id: str, image_number: int) -> int:
    """Return the id of a product's image: a hash, so that shards need no shared counter.

    The upper 16 of its 63 bits are the product's, so that any division of the ids into ranges
    keeps the images of a product together.

    Args:
        product_id: The catalog's id.
        image_number: Position in the product's list of images, from 0.
    """
    name = product_id.encode("utf-8", "surrogatepass")
    own = hash63((name, str(image_number).encode())) & (1 << IMAGE_BITS) - 1
    return product_hash(product_id) >> IMAGE_BITS << IMAGE_BITS | own
