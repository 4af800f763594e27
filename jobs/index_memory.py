"""What the tasks of the index stage ask Ray for, so that a machine never runs more than it holds.

`benchmarks/index.py compare` prints each beside what the process took.
"""

from indexing.spec import IndexSpec
from jobs.cluster import largest_node_memory
from jobs.errors import ConfigError

MIB = 2**20
PROCESS_BYTES = 256 * MIB  # Python with Ray, pyarrow and FAISS, before the first vector
DOUBLED = 2  # FAISS's lists double when they are full
COPIES = (
    4  # of a data file's vectors: as Parquet gives them, of the rows that are live, unit, turned
)
BLOCK_BYTES = 192 * MIB  # of `indexing.build.append_vectors`: rotated in float64, and as float32
ID_BYTES = 24  # a vector: ids that are copied and sorted to be compared


def train_memory(spec: IndexSpec, rows: int) -> int:
    """Return what training on so many rows takes, in bytes.

    Raises:
        ConfigError: No machine of the cluster has so much.
    """
    taken = PROCESS_BYTES + spec.training_bytes(rows)
    return _check(taken, f"training {spec.factory} on {rows:,} rows", "a smaller index.train_rows")


def add_memory(spec: IndexSpec, rows: int, file_rows: int, partitions: int) -> int:
    """Return what adding so many rows takes, in bytes.

    Args:
        spec: The index.
        rows: Of the task.
        file_rows: Most rows of a data file: one at a time is read.
        partitions: Of more than one, each is copied out.

    Raises:
        ConfigError: No machine of the cluster has so much.
    """
    vectors = COPIES * min(rows, file_rows) * 4 * spec.dim
    copies = DOUBLED + (partitions > 1)
    taken = PROCESS_BYTES + BLOCK_BYTES + vectors + copies * spec.memory_bytes(rows)
    return _check(taken, f"adding {rows:,} vectors", "a smaller ray.bucket_rows")


def merge_memory(spec: IndexSpec, rows: int) -> int:
    """Return what merging a partition of so many vectors takes, in bytes.

    Raises:
        ConfigError: No machine of the cluster has so much.
    """
    taken = PROCESS_BYTES + DOUBLED * spec.memory_bytes(rows) + ID_BYTES * rows
    return _check(taken, f"merging {rows:,} vectors", "a smaller index.max_partition_vectors")


def _check(taken: int, task: str, advice: str) -> int:
    largest = largest_node_memory()
    if largest is not None and taken > largest:
        raise ConfigError(
            f"index: {task} takes about {taken / MIB:,.0f} MiB, the largest machine of the Ray "
            f"cluster offers {largest / MIB:,.0f}: {advice}, or a larger machine"
        )
    return taken
