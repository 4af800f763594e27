"""Image references to bytes: from local files, S3 and http(s), in parallel, within limits.

A catalog is written by others, so a reference is not trusted: a relative one can't leave the
catalog's folder, and http(s) reaches only the hosts that the operator lists, at addresses that
are checked when connecting. Absolute paths, `file://` and `s3://` are read as they stand, with
this process's own rights: run catalogs of strangers under an account that may read little.
"""

import errno
import functools
import os
import posixpath
import re
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import botocore.exceptions
import fsspec
import tenacity
from fsspec.asyn import sync as run_on_loop

from jobs.fetch_http import DEFAULT_PORTS, HttpFetcher
from jobs.images import ImageRejected, ImagesConfig, RejectReason, check_size

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


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
    if _scheme_of(root) not in ("", "file", "s3"):
        raise ValueError(f"catalog root must be a local path or s3://, found {root!r}")
    if not references:
        return []
    with (
        HttpFetcher(config) as http,
        ThreadPoolExecutor(min(config.concurrency, len(references))) as threads,
    ):
        fetch = functools.partial(_fetch_or_reject, root=root, config=config, http=http)
        return list(threads.map(fetch, references))


def _fetch_or_reject(
    reference: str | bytes | None, *, root: str, config: ImagesConfig, http: "HttpFetcher"
) -> bytes | ImageRejected:
    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(config.retries + 1),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, ImageRejected) and error.reason.transient
        ),
        reraise=True,
    )
    try:
        if reference is None or reference == "":
            raise ImageRejected(RejectReason.MISSING_IMAGE, "no image given")
        if isinstance(reference, str):
            reference = attempts(_read_uri, reference, root, config, http)
        if not reference:
            raise ImageRejected(RejectReason.EMPTY_FILE, "0 bytes")
        check_size(len(reference), config)
    except ImageRejected as rejected:
        return rejected
    return reference


def _read_uri(uri: str, root: str, config: ImagesConfig, http: "HttpFetcher") -> bytes:
    if any(ord(letter) < 32 or "\ud800" <= letter <= "\udfff" for letter in uri):
        raise ImageRejected(RejectReason.BAD_URI, f"{uri!r} holds a control character")
    scheme = _scheme_of(uri)
    if scheme in DEFAULT_PORTS:
        return http.read(uri)
    if scheme == "s3":
        return _read_s3(uri, config)
    if scheme == "file":
        return _read_local(_path_of_file_uri(uri), config)
    if scheme or uri.startswith("data:"):
        raise ImageRejected(RejectReason.BAD_URI, f"scheme of {uri[:80]!r} is not read")
    if uri.startswith("/"):
        return _read_local(Path(uri), config)
    # The name is literal, but one that would climb out once decoded is up to no good.
    if any(_climbs(name) for name in (uri, unquote(uri))):
        raise ImageRejected(RejectReason.OUTSIDE_CATALOG, f"{uri!r} leaves the catalog's folder")
    if _scheme_of(root) == "s3":
        return _read_s3(f"{root.rstrip('/')}/{posixpath.normpath(uri)}", config)
    folder = _path_of_file_uri(root) if _scheme_of(root) else Path(root)
    return _read_below(folder, uri, config)


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


def _read_below(folder: Path, name: str, config: ImagesConfig) -> bytes:
    try:
        base, path = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ImageRejected(RejectReason.BAD_URI, f"{name!r}: {error}") from error
    if not path.is_relative_to(base):
        raise ImageRejected(RejectReason.OUTSIDE_CATALOG, f"{name!r} is a link out of the catalog")
    return _read_local(path, config)


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
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageRejected(RejectReason.NOT_FOUND, f"no file {path}") from error
    except OSError as error:
        never = error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EISDIR)
        reason = RejectReason.BAD_URI if never else RejectReason.UNREACHABLE
        raise ImageRejected(reason, f"{path}: {error.strerror}") from error


@functools.cache
def _s3_filesystem(timeout_s: float, concurrency: int) -> Any:  # noqa: ANN401 - s3fs has no types
    """Build one per setting: fsspec's own cache would make one in every thread."""
    return fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": timeout_s,
            "read_timeout": timeout_s,
            "max_pool_connections": concurrency,
            "retries": {"max_attempts": 2, "mode": "standard"},
        },
    )


async def _get_object(filesystem: Any, bucket: str, key: str, limit: int) -> bytes:  # noqa: ANN401
    """Read at most limit bytes. Not cat_file(): it takes `?versionId=` out of a key."""
    response = await filesystem._call_s3("get_object", Bucket=bucket, Key=key)
    async with response["Body"] as body:
        parts, size = [], 0
        while size < limit and (part := await body.read(min(limit - size, 1 << 20))):
            parts.append(part)
            size += len(part)
        return b"".join(parts)


def _read_s3(uri: str, config: ImagesConfig) -> bytes:
    bucket, _, key = uri[len("s3://") :].partition("/")
    if not bucket or not key:
        raise ImageRejected(RejectReason.BAD_URI, f"{uri!r} names no object")
    files = _s3_filesystem(config.timeout_s, config.concurrency)
    limit = config.max_bytes + 1
    try:
        found: bytes = run_on_loop(
            files.loop, _get_object, files, bucket, key, limit, timeout=config.timeout_s
        )
    except FileNotFoundError as error:
        raise ImageRejected(RejectReason.NOT_FOUND, f"no object {uri}") from error
    except PermissionError as error:  # also a missing object, where listing is not allowed
        raise ImageRejected(RejectReason.HTTP_ERROR, f"{uri}: access denied") from error
    except (botocore.exceptions.ParamValidationError, ValueError) as error:
        raise ImageRejected(RejectReason.BAD_URI, f"{uri}: {error}") from error
    except (
        TimeoutError,  # fsspec's own is one
        botocore.exceptions.ConnectTimeoutError,
        botocore.exceptions.ReadTimeoutError,
    ) as error:
        raise ImageRejected(RejectReason.TIMEOUT, f"{uri}: {config.timeout_s} s") from error
    except (OSError, botocore.exceptions.BotoCoreError) as error:
        raise ImageRejected(RejectReason.UNREACHABLE, f"{uri}: {error}") from error
    return found
