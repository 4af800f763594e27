"""Image references to bytes or ETags: local files, S3 and http(s), in parallel, within limits.

A catalog is written by others, so a reference is not trusted: a relative one can't leave the
catalog's folder, and http(s) reaches only the hosts that the operator lists, at addresses that
are checked when connecting. Absolute paths, `file://` and `s3://` are read as they stand, with
this process's own rights: run catalogs of strangers under an account that may read little.
"""

import errno
import os
import posixpath
import re
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import unquote

import tenacity

from jobs.fetch_http import DEFAULT_PORTS, HttpFetcher
from jobs.fetch_s3 import read_s3, read_s3_etag
from jobs.images import ImageRejected, ImagesConfig, RejectReason, check_size

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_NO_FILE_ERRNO: Final = (
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENXIO,
    errno.ENODEV,
)
_Reference = str | bytes | None
_Place = Path | str
_Found = TypeVar("_Found")


def fetch_images(
    references: Sequence[str | bytes | None], root: str, config: ImagesConfig
) -> list[bytes | ImageRejected]:
    """Fetch a batch, in the order of the references.

    Memory: up to len(references) * max_bytes; the caller bounds the batch.

    Args:
        references: URIs, the encoded image itself, or None. A URI is relative to root, an
            absolute path, file:// (percent-decoded), s3:// or http(s)://. Elsewhere than in
            file:// and http(s):// every character is literal, `?`, `#` and `%` too.
        root: The catalog's folder, a local path or `s3://bucket/prefix`. A relative reference
            that leads out of it, by `..` or by a symbolic link, is rejected.
        config: Limits.

    Returns:
        For each reference its bytes (1..max_bytes of them), or why there are none.

    Raises:
        ValueError: root is neither local nor s3://.
    """
    return _map_references(_fetch_or_reject, references, root, config)


def read_etags(
    references: Sequence[str | bytes | None], root: str, config: ImagesConfig
) -> list[str]:
    """Read what identifies each reference's present content, without reading the content.

    That is the ETag of a HEAD request (over http(s), where there is none, Last-Modified and
    Content-Length), or a local file's size and time of change in nanoseconds. Compare it only
    with what the same reference gave before.

    Args:
        references: As for `fetch_images`.
        root: As for `fetch_images`.
        config: Limits; the same hosts, addresses, deadline and retries hold.

    Returns:
        For each reference such a text; "" where nothing is known: after any fault, for None, and
        for bytes, which are their own identity.

    Raises:
        ValueError: root is neither local nor s3://.
    """
    return _map_references(_etag_or_unknown, references, root, config)


def _map_references(
    answer: Callable[[_Reference, str, ImagesConfig, HttpFetcher], _Found],
    references: Sequence[_Reference],
    root: str,
    config: ImagesConfig,
) -> list[_Found]:
    if _scheme_of(root) not in ("", "file", "s3"):
        raise ValueError(f"catalog root must be a local path or s3://, found {root!r}")
    if not references:
        return []
    with (
        HttpFetcher(config) as http,
        ThreadPoolExecutor(min(config.concurrency, len(references))) as threads,
    ):
        return list(threads.map(lambda one: answer(one, root, config, http), references))


def _attempts(config: ImagesConfig) -> tenacity.Retrying:
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(config.retries + 1),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, ImageRejected) and error.reason.transient
        ),
        reraise=True,
    )


def _fetch_or_reject(
    reference: _Reference, root: str, config: ImagesConfig, http: HttpFetcher
) -> bytes | ImageRejected:
    try:
        if reference is None or reference == "":
            raise ImageRejected(RejectReason.MISSING_IMAGE, "no image given")
        if isinstance(reference, str):
            reference = _attempts(config)(_read_place, _locate(reference, root), config, http)
        if not reference:
            raise ImageRejected(RejectReason.EMPTY_FILE, "0 bytes")
        check_size(len(reference), config)
    except ImageRejected as rejected:
        return rejected
    return reference


def _etag_or_unknown(
    reference: _Reference, root: str, config: ImagesConfig, http: HttpFetcher
) -> str:
    if not isinstance(reference, str) or not reference:
        return ""
    try:
        return _attempts(config)(_read_etag, _locate(reference, root), config, http)
    except ImageRejected:  # the fault is reported when the image itself is read
        return ""


def _read_place(place: _Place, config: ImagesConfig, http: HttpFetcher) -> bytes:
    if isinstance(place, Path):
        return _read_local(place, config)
    if _scheme_of(place) == "s3":
        return read_s3(place, config)
    return http.read(place)


def _read_etag(place: _Place, config: ImagesConfig, http: HttpFetcher) -> str:
    if isinstance(place, Path):
        return _read_local_etag(place)
    if _scheme_of(place) == "s3":
        return read_s3_etag(place, config)
    return http.read_etag(place)


def _locate(uri: str, root: str) -> _Place:
    """Return the local path, or the s3:// or http(s):// URI, that a reference names."""
    if any(ord(letter) < 32 or "\ud800" <= letter <= "\udfff" for letter in uri):
        raise ImageRejected(RejectReason.BAD_URI, f"{uri!r} holds a control character")
    scheme = _scheme_of(uri)
    if scheme in DEFAULT_PORTS or scheme == "s3":
        return uri
    if scheme == "file":
        return _path_of_file_uri(uri)
    if scheme or uri.startswith("data:"):
        raise ImageRejected(RejectReason.BAD_URI, f"scheme of {uri[:80]!r} is not read")
    if uri.startswith("/"):
        return Path(uri)
    # The name is literal, but one that would climb out once decoded is up to no good.
    if any(_climbs(name) for name in (uri, unquote(uri))):
        raise ImageRejected(RejectReason.OUTSIDE_CATALOG, f"{uri!r} leaves the catalog's folder")
    if _scheme_of(root) == "s3":
        return f"{root.rstrip('/')}/{posixpath.normpath(uri)}"
    folder = _path_of_file_uri(root) if _scheme_of(root) else Path(root)
    return _path_below(folder, uri)


def _scheme_of(uri: str) -> str:
    found = _SCHEME.match(uri)
    return found[1].lower() if found else ""


def _climbs(name: str) -> bool:
    normal = posixpath.normpath(name)
    return normal == ".." or normal.startswith(("../", "/"))


def _path_of_file_uri(uri: str) -> Path:
    host, _, path = uri[len("file://") :].partition("/")
    path = unquote(path)
    if host not in ("", "localhost") or not path or "\0" in path:
        raise ImageRejected(RejectReason.BAD_URI, f"{uri!r} names no local file")
    return Path("/" + path)


def _path_below(folder: Path, name: str) -> Path:
    try:
        base, path = folder.resolve(), (folder / name).resolve()
    except OSError as error:
        raise _explain_local(error, folder / name) from error
    except RuntimeError as error:  # a loop of links, before Python 3.13
        raise ImageRejected(RejectReason.BAD_URI, f"{name!r}: {error}") from error
    if not path.is_relative_to(base):
        raise ImageRejected(RejectReason.OUTSIDE_CATALOG, f"{name!r} is a link out of the catalog")
    return path


def _read_local(path: Path, config: ImagesConfig) -> bytes:
    try:
        # O_NONBLOCK: opening a named pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageRejected(RejectReason.BAD_URI, f"{path} is not a regular file")
            check_size(status.st_size, config)
            return file.read(config.max_bytes + 1)
    except OSError as error:
        raise _explain_local(error, path) from error


def _read_local_etag(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise _explain_local(error, path) from error
    return f"{status.st_size} {status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else ""


def _explain_local(error: OSError, path: Path) -> ImageRejected:
    """Tell what no later run will read from a fault of the disk or of the machine, which passes."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ImageRejected(RejectReason.NOT_FOUND, f"no file {path}")
    if isinstance(error, PermissionError):
        return ImageRejected(RejectReason.ACCESS_DENIED, f"{path}: {error.strerror}")
    never = error.errno in _NO_FILE_ERRNO
    reason = RejectReason.BAD_URI if never else RejectReason.UNREACHABLE
    return ImageRejected(reason, f"{path}: {error.strerror}")
