"""Write files that are whole or not there, and prove that they haven't changed."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, write: Callable[[Path], None]) -> str:
    """Write a file so that the path never shows a half-written one.

    Args:
        path: Where to write; an existing file is replaced. Its folder must exist.
        write: Writes the content to the path that it is given.

    Returns:
        The sha256 (hex) of the file, for `check_file`.

    Raises:
        OSError: The folder is missing or the file can't be written or renamed.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        _fsync(partial)
        digest = _sha256(partial)
        partial.replace(path)
        _fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def check_file(path: Path, *, sha256: str) -> None:
    """Refuse a file whose bytes have changed; all of them are read.

    Raises:
        ValueError: The file's checksum is another one.
        OSError: The file is missing or unreadable.
    """
    found = _sha256(path)
    if found != sha256:
        raise ValueError(f"index file {path} is corrupted: sha256 {found} expected {sha256}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
