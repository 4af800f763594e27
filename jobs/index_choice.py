"""Decides which index a field gets, and whether the newest release's may be updated."""

from collections.abc import Iterable
from typing import Any

from indexing.choose import HELD_OUT_SHARE, trainable_rows
from indexing.spec import IndexSpec
from jobs.config import IndexConfig
from jobs.errors import ConfigError
from jobs.index_files import count_partitions

MIB = 2**20
# An index that the configuration names may need nearly all rows of a small catalog to train.
HELD_OUT_SHARES = (HELD_OUT_SHARE, 0.1, 0.05)


def choose_spec(config: IndexConfig, ntotal: int, dim: int) -> tuple[IndexSpec, list[str]]:
    """Choose the index from the catalog's size, or take what the configuration says.

    Raises:
        ConfigError: The configured index is impossible for this dimension or number of rows, or
            takes more memory than its budget.
    """
    budget = None if config.memory_budget_mb is None else _budget(config)
    partitions = count_partitions(ntotal, config.max_partition_vectors)
    try:
        if config.factory is None:
            spec, why = IndexSpec.for_catalog(
                ntotal,
                dim,
                memory_budget_bytes=budget,
                target_intersection=config.target_intersection,
                partitions=partitions,
            )
        else:
            spec = IndexSpec.parse(config.factory, dim)
            why = [f"{spec.factory} is what the configuration says."]
    except ValueError as error:
        raise ConfigError(f"index: {error}") from error
    taken = _memory_bytes(config, spec, ntotal)
    if budget is not None and taken > budget:
        raise ConfigError(
            f"index: {spec.factory} with {ntotal:,} vectors takes {taken / MIB:,.0f} MiB, "
            f"index.memory_budget_mb is {config.memory_budget_mb}: a smaller code, or leave "
            "index.factory out"
        )
    return spec, why


def check_factory(config: IndexConfig, dims: Iterable[int]) -> None:
    """Refuse a configured index that no field's vectors can have, before anything is embedded.

    Args:
        config: The index section.
        dims: D of each field.

    Raises:
        ConfigError: As the first line says.
    """
    if config.factory is None:
        return
    try:
        for dim in dims:
            IndexSpec.parse(config.factory, dim)
    except ValueError as error:
        raise ConfigError(f"index.factory: {error}; docs/indexes.md has them all") from error


def check_trainable(config: IndexConfig, spec: IndexSpec, ntotal: int) -> None:
    """Refuse an index that so many rows can't train, with some of them held out to measure it.

    Raises:
        ConfigError: As the first line says.
    """
    available = min(trainable_rows(ntotal, HELD_OUT_SHARES[-1]), config.train_rows or ntotal)
    if spec.min_training_rows > available:
        raise ConfigError(
            f"index: {spec.factory} needs {spec.min_training_rows} training rows, there are "
            f"{available}: fewer lists, a larger index.train_rows, or leave index.factory out to "
            "have it chosen"
        )


def _budget(config: IndexConfig) -> int:
    return (config.memory_budget_mb or 0) * MIB


def _memory_bytes(config: IndexConfig, spec: IndexSpec, ntotal: int) -> int:
    partitions = count_partitions(ntotal, config.max_partition_vectors)
    return spec.memory_bytes(ntotal, partitions=partitions)


def reasons_to_retrain(
    config: IndexConfig, trained_with: dict[str, Any], base: dict[str, Any], ntotal: int
) -> list[str]:
    """List what forbids an update before anything is measured; empty: nothing does.

    Args:
        config: The index section.
        trained_with: The index section of the release that the base belongs to.
        base: The manifest's entry of the base.
        ntotal: How many vectors the index will hold.
    """
    old = IndexSpec(**base["spec"])
    new, _ = choose_spec(config, ntotal, old.dim)
    names = ("seed", "train_rows", "memory_budget_mb")
    reasons = [
        f"index.{name} was {trained_with.get(name)}, the configuration says {value}."
        for name in names
        if trained_with.get(name) != (value := getattr(config, name))
    ]
    changed = [
        name
        for name in ("factory", "target_intersection")
        if trained_with.get(name) != getattr(config, name)
    ]
    if new != old and (config.factory is not None or changed):
        reasons.append(f"The configuration asks for {new.factory}, the index is {old.factory}.")
    elif bool(new.nlist) != bool(old.nlist):
        reasons.append(f"{ntotal:,} vectors are better held by {new.factory} than {old.factory}.")
    elif config.memory_budget_mb and _memory_bytes(config, old, ntotal) > _budget(config):
        reasons.append(f"{ntotal:,} vectors in {old.factory} take more than the memory budget.")
    return reasons
