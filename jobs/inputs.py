"""What a refresh starts from: the catalog, opened for its fields, and the encoder, in the store."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from encoders.checkpoint_files import CONFIG_FILE, fingerprint, read_checkpoint_config
from encoders.fusion import FusionSpec
from encoders.spec import EncoderSpec
from jobs.catalog import IMAGE_COLUMNS, Catalog, read_catalog
from jobs.config import CatalogConfig, JobConfig
from jobs.contract import make_contract, read_contract
from jobs.errors import CatalogError, ConfigError, FingerprintError
from jobs.progress import open_progress
from jobs.schemas import MANIFEST_FORMAT
from jobs.space import VectorSpace, resolve_space
from jobs.storage import (
    PARQUET_ERRORS,
    machine_cache,
    one_line,
    open_filesystem,
    storage_errors,
)
from jobs.store import Store, scratch_folder


def read_fusion(spec: EncoderSpec) -> FusionSpec:
    """Return an encoder's fusion without its weights: what a wrong catalog needs to be told early.

    Raises:
        ConfigError: The checkpoint's config can't be read.
    """
    if spec.checkpoint is None:
        return FusionSpec()
    try:
        return read_checkpoint_config(spec.checkpoint).fusion
    except ValueError as error:
        raise ConfigError(f"encoder: {error}") from error


def open_catalog(config: CatalogConfig, fields: tuple[str, ...]) -> Catalog:
    """Read the catalog's schema; `multimodal` alone does without an image column.

    Raises:
        CatalogError: A column that the fields need is missing, or another fault.
    """
    needs_text, needs_image = set(fields) != {"image"}, "image" in fields
    if not needs_image and "multimodal" in fields:
        bare = read_catalog(config, need_images=False, need_text=False)
        names = [*_read_names(bare), *config.columns]
        needs_image = any(name in names for name in IMAGE_COLUMNS)
    return read_catalog(config, need_images=needs_image, need_text=needs_text)


def _read_names(catalog: Catalog) -> list[str]:
    file = catalog.files[0]
    try:
        with open_filesystem(catalog.root)[0].open(file, "rb") as handle:
            names: list[str] = pq.read_schema(handle).names
    except PARQUET_ERRORS as error:
        raise CatalogError(f"{file}: no readable Parquet file: {one_line(error)}") from error
    return names


def add_encoder(config: JobConfig, store: Store) -> tuple[VectorSpace, dict[str, Any]]:
    """Make the configured encoder's checkpoint and put it into the store.

    Returns:
        What the job makes of it, and the query contract of this run's release.

    Raises:
        ConfigError: The encoder can't be made: an unknown name, weights that don't fit, a field
            or a weight that it doesn't have.
        StoreError: The store can't be written.
    """
    with made_encoder(config, store) as (directory, space):
        contract = find_contract(store, directory, space)
        with storage_errors(f"store {store.root}", "written"):
            store.add_checkpoint(directory, space.encoder)
        return space, contract


def find_contract(store: Store, directory: Path, space: VectorSpace) -> dict[str, Any]:
    """Return the query contract of a release of some space: the newest release's, or a new one.

    Args:
        store: The store.
        directory: The checkpoint.
        space: What the job makes of it.

    Raises:
        ValueError: The checkpoint can't be loaded.
        JobError: The encoder gives a canary no direction, or the newest release can't be read.
    """
    return _published_contract(store, space) or make_contract(directory, space)


def _published_contract(store: Store, space: VectorSpace) -> dict[str, Any] | None:
    """Return the newest release's contract if it is of the same space: its canaries take seconds.

    Raises:
        StoreError: The release can't be read.
    """
    newest = store.current_release()
    if newest is None or newest.encoder != space.encoder:
        return None
    manifest = store.read_json("indexes", newest.indexes, "manifest.json")
    if manifest.get("format_version") != MANIFEST_FORMAT:
        return None
    contract: dict[str, Any] = manifest["query"]
    with suppress(FingerprintError):  # an edited one is made anew
        return contract if read_contract(contract) == space else None
    return None


@contextmanager
def made_encoder(config: JobConfig, store: Store) -> Iterator[tuple[Path, VectorSpace]]:
    """Make the configured encoder's checkpoint in a temporary folder.

    A checkpoint that the store has already was checked before, and is read where it lies; so is
    what the newest release has of the same tag or seed.

    Yields:
        The folder, and what the job makes of the encoder.

    Raises:
        ConfigError: As `add_encoder`.
        StoreError: The store can't be read.
    """
    scratch = scratch_folder("checkpoint")
    open_progress().wait("make the encoder")
    try:
        known = _known_checkpoint if config.encoder.checkpoint else _published_checkpoint
        directory, found = known(config.encoder, store) or (scratch, "")
        found = found or _create(config.encoder, directory)
        made = read_checkpoint_config(directory)
        space = resolve_space(
            config.embed,
            encoder=found,
            dim=made.dim,
            preprocess=made.preprocess,
            fusion=made.fusion,
        )
        yield directory, space
    except ValueError as error:
        raise ConfigError(f"encoder: {error}") from error
    finally:
        shutil.rmtree(scratch)


def _create(spec: EncoderSpec, directory: Path) -> str:
    from encoders.create import create_checkpoint  # torch and open_clip: seconds

    return create_checkpoint(spec, directory)


def _known_checkpoint(spec: EncoderSpec, store: Store) -> tuple[Path, str] | None:
    """Return the folder and the fingerprint of a configured checkpoint that the store has."""
    source = Path(str(spec.checkpoint))
    found = fingerprint(source)
    return (source, found) if _has_checkpoint(store, found) else None


def _published_checkpoint(spec: EncoderSpec, store: Store) -> tuple[Path, str] | None:
    """Return the newest release's checkpoint, if it is whole and made from the same tag or seed."""
    newest = store.current_release()
    if newest is None or spec.names_files:
        return None
    manifest = store.read_json("indexes", newest.indexes, "manifest.json")
    if manifest["config"]["encoder"] != asdict(spec) or not _has_checkpoint(store, newest.encoder):
        return None
    directory = store.local_copy(machine_cache(), "checkpoints", newest.encoder)
    with suppress(ValueError):  # damaged, or of another version: made anew
        if fingerprint(directory) == newest.encoder:
            return directory, newest.encoder
    return None


def _has_checkpoint(store: Store, encoder: str) -> bool:
    mark = store.uri("checkpoints", encoder, CONFIG_FILE)
    with storage_errors(f"store {store.root}", "read"):
        return bool(store.filesystem().exists(mark))
