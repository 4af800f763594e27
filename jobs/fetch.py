"""Image references to bytes: from local files, S3 and http(s), in parallel, within limits.

A catalog is written by others, so a reference is not trusted: a relative one can't leave the
catalog's folder, and http(s) reaches only the hosts that the operator lists, at addresses that
are checked when connecting. Absolute paths, `file://` and `s3://` are read as they stand, with
this process's own rights: run catalogs of strangers under an account that may read little.
"""

import errno
import functools
import ipaddress
import os
import posixpath
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import botocore.exceptions
import fsspec
import httpcore
import httpx
import tenacity
from fsspec.asyn import sync as run_on_loop

from jobs.images import ImageRejected, ImagesConfig, RejectReason

MAX_REDIRECTS: Final = 5
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
# Cloud metadata that is not link-local: AWS over IPv6, Alibaba Cloud.
_METADATA: Final = (
    ipaddress.ip_address("fd00:ec2::254"),
    ipaddress.ip_address("100.100.100.200"),
)
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
# "Too early", "too many requests" and "request timeout" ask for another try.
_BUSY_STATUS: Final = (408, 425, 429)


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
        _HttpFetcher(config) as http,
        ThreadPoolExecutor(min(config.concurrency, len(references))) as threads,
    ):
        fetch = functools.partial(_fetch_or_reject, root=root, config=config, http=http)
        return list(threads.map(fetch, references))


def _fetch_or_reject(
    reference: str | bytes | None, *, root: str, config: ImagesConfig, http: "_HttpFetcher"
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
        _check_size(len(reference), config)
    except ImageRejected as rejected:
        return rejected
    return reference


def _read_uri(uri: str, root: str, config: ImagesConfig, http: "_HttpFetcher") -> bytes:
    if any(ord(letter) < 32 or "\ud800" <= letter <= "\udfff" for letter in uri):
        raise ImageRejected(RejectReason.BAD_URI, f"{uri!r} holds a control character")
    scheme = _scheme_of(uri)
    if scheme in _DEFAULT_PORTS:
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


def _check_size(count_bytes: int, config: ImagesConfig) -> None:
    if count_bytes > config.max_bytes:
        raise ImageRejected(
            RejectReason.TOO_MANY_BYTES, f"{count_bytes} bytes or more, limit {config.max_bytes}"
        )


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
            _check_size(status.st_size, config)
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


def _check_address(address: _IpAddress, *, named: bool) -> None:
    """Refuse an address that is not public, unless the operator named the literal itself."""
    inner = address
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped or address.sixtofour
        low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
        inner = mapped or low or address
    never = any(one.is_link_local or one in _METADATA for one in (address, inner))
    public = inner.is_global and not inner.is_multicast
    if never or not (public or named):
        raise ImageRejected(RejectReason.ADDRESS_REFUSED, f"{address} is not a public address")


def _as_address(host: str) -> _IpAddress | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _check_host(url: httpx.URL, config: ImagesConfig) -> None:
    """Check scheme, host and port against http_hosts, before any name is resolved."""
    if url.scheme not in _DEFAULT_PORTS or not url.host or url.userinfo:
        raise ImageRejected(RejectReason.BAD_URI, "no host, credentials, or not http(s)")
    host = url.raw_host.decode("ascii").lower()
    address = _as_address(host)
    if address is not None:
        _check_address(address, named=True)  # link-local: refused even where it is listed
    default = _DEFAULT_PORTS[url.scheme]
    port = url.port or default
    if not any(_matches(entry.lower(), host, port, default) for entry in config.http_hosts):
        raise ImageRejected(
            RejectReason.HTTP_NOT_ALLOWED, f"{host}:{port} is not in images.http_hosts"
        )


def _matches(entry: str, host: str, port: int, default_port: int) -> bool:
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(\d+))?", entry)
    name, listed_port = (found[1], found[2]) if found else (entry, None)
    if port != int(listed_port or default_port):
        return False
    if name.startswith("*."):
        return host.endswith(name[1:]) and len(host) > len(name) - 1
    return host == name.strip("[]")


class _DeadlineStream(httpcore.NetworkStream):
    """A connection whose every read and write ends by the current thread's deadline."""

    def __init__(self, stream: httpcore.NetworkStream, clock: "_Clock") -> None:
        self._stream = stream
        self._clock = clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._clock.left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._clock.left_s())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left_s = self._clock.left_s()
        stream = self._stream.start_tls(ssl_context, server_hostname, left_s)
        return _DeadlineStream(stream, self._clock)

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - as httpcore declares it
        return self._stream.get_extra_info(info)


class _Clock(threading.local):
    """One deadline a thread: connections are shared, requests are not."""

    deadline = 0.0

    def start(self, timeout_s: float) -> None:
        self.deadline = time.monotonic() + timeout_s

    def left_s(self) -> float:
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise httpcore.ReadTimeout("deadline passed")
        return left_s


class _CheckedBackend(httpcore.NetworkBackend):
    """Resolve a name once, check every address, and connect to what was checked."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"can't resolve {host}: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        named = _as_address(host) is not None
        for address in addresses:
            _check_address(ipaddress.ip_address(address), named=named)
        for address in addresses[:-1]:
            try:
                return self._connect(address, port, socket_options)
            except httpcore.ConnectError:  # the next address may answer
                continue
        return self._connect(addresses[-1], port, socket_options)

    def _connect(
        self, address: str, port: int, options: Iterable[Any] | None
    ) -> httpcore.NetworkStream:
        left_s = self._clock.left_s()
        stream = self._sockets.connect_tcp(address, port, left_s, None, options)
        return _DeadlineStream(stream, self._clock)


class _HttpFetcher:
    """A pool of checked connections, for one batch."""

    def __init__(self, config: ImagesConfig) -> None:
        self._config = config
        self._clock = _Clock()
        self._pool = httpcore.ConnectionPool(
            ssl_context=_ssl_context() if config.http_hosts else None,
            max_connections=config.concurrency,
            network_backend=_CheckedBackend(self._clock),
        )

    def __enter__(self) -> "_HttpFetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def read(self, uri: str) -> bytes:
        """Read one URI, following redirects that stay on allowed hosts.

        Raises:
            ImageRejected: With the reason; unreachable and timeout are worth another try.
        """
        try:
            self._clock.start(self._config.timeout_s)
            url = httpx.URL(uri)
            for _ in range(MAX_REDIRECTS + 1):
                found = self._request(url)
                if isinstance(found, bytes):
                    return found
                url = found
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ImageRejected(RejectReason.BAD_URI, f"not a URL: {error}") from error
        except httpcore.TimeoutException as error:
            detail = f"{url.host}: over {self._config.timeout_s} s"
            raise ImageRejected(RejectReason.TIMEOUT, detail) from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise ImageRejected(RejectReason.UNREACHABLE, f"{url.host}: {error}") from error
        raise ImageRejected(RejectReason.HTTP_ERROR, f"over {MAX_REDIRECTS} redirects")

    def _request(self, url: httpx.URL) -> bytes | httpx.URL:
        """Return the body, or where the server sends us."""
        _check_host(url, self._config)
        target = httpcore.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        )
        headers: list[tuple[bytes | str, bytes | str]] = [
            ("Host", url.netloc),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
        ]
        extensions = {"timeout": {"pool": self._clock.left_s()}}
        with self._pool.stream("GET", target, headers=headers, extensions=extensions) as reply:
            fields = httpx.Headers(reply.headers)
            if reply.status in (301, 302, 303, 307, 308) and "location" in fields:
                return url.join(fields["location"])
            _check_status(reply.status, url.host)
            return self._read_body(reply, fields)

    def _read_body(self, reply: httpcore.Response, fields: httpx.Headers) -> bytes:
        encoding = fields.get("content-encoding", "identity")
        if encoding != "identity":  # never asked for; unpacking it could fill the memory
            raise ImageRejected(RejectReason.HTTP_ERROR, f"Content-Encoding {encoding}")
        length = fields.get("content-length", "")
        if length.isdecimal():
            _check_size(int(length), self._config)
        body = bytearray()
        for part in reply.iter_stream():
            body += part
            _check_size(len(body), self._config)
        return bytes(body)


def _check_status(status: int, host: str) -> None:
    if 200 <= status < 300:
        return
    if status in (404, 410):
        reason = RejectReason.NOT_FOUND
    elif status >= 500 or status in _BUSY_STATUS:
        reason = RejectReason.UNREACHABLE
    else:
        reason = RejectReason.HTTP_ERROR
    raise ImageRejected(reason, f"{host} answered {status}")


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()
