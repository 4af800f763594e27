"""Reads bytes and ETags over http(s): listed hosts only, each address and redirect checked."""

import functools
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import httpcore
import httpx

from jobs.images import ImageRejected, ImagesConfig, RejectReason, check_size

MAX_REDIRECTS: Final = 5
DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
# Cloud metadata that is not link-local: AWS over IPv6, Alibaba Cloud.
_METADATA: Final = (
    ipaddress.ip_address("fd00:ec2::254"),
    ipaddress.ip_address("100.100.100.200"),
)
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
# "Too early", "too many requests" and "request timeout" ask for another try.
_BUSY_STATUS: Final = (408, 425, 429)
# "Method not allowed" and "not implemented": what a server says that knows no HEAD.
_NO_HEAD_STATUS: Final = (405, 501)
_Found = TypeVar("_Found", bytes, str)


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
    if url.scheme not in DEFAULT_PORTS or not url.host or url.userinfo:
        raise ImageRejected(RejectReason.BAD_URI, "no host, credentials, or not http(s)")
    host = url.raw_host.decode("ascii").lower()
    address = _as_address(host)
    if address is not None:
        _check_address(address, named=True)  # link-local: refused even where it is listed
    default = DEFAULT_PORTS[url.scheme]
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
        except UnicodeError as error:  # no server will ever know such a name
            detail = f"{host!r} is not a host: {error}"
            raise ImageRejected(RejectReason.BAD_URI, detail) from error
        except OSError as error:
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


class HttpFetcher:
    """A pool of checked connections, for one batch."""

    def __init__(self, config: ImagesConfig) -> None:
        self._config = config
        self._clock = _Clock()
        self._pool = httpcore.ConnectionPool(
            ssl_context=_ssl_context() if config.http_hosts else None,
            max_connections=config.concurrency,
            network_backend=_CheckedBackend(self._clock),
        )

    def __enter__(self) -> "HttpFetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def read(self, uri: str) -> bytes:
        """Read one URI, following redirects that stay on allowed hosts.

        Raises:
            ImageRejected: With the reason; unreachable and timeout are worth another try.
        """
        return self._follow(uri, "GET", self._read_body)

    def read_etag(self, uri: str) -> str:
        """Ask by HEAD what identifies the present content, following redirects as `read` does.

        Returns:
            The ETag, strong or weak; else Last-Modified and Content-Length; empty if the server
            sends neither or knows no HEAD.

        Raises:
            ImageRejected: As `read`.
        """
        return self._follow(uri, "HEAD", _read_etag)

    def _follow(
        self, uri: str, method: str, take: Callable[[httpx.URL, httpcore.Response], _Found]
    ) -> _Found:
        try:
            self._clock.start(self._config.timeout_s)
            url = httpx.URL(uri)
            for _ in range(MAX_REDIRECTS + 1):
                found = self._request(url, method, take)
                if not isinstance(found, httpx.URL):
                    return found
                url = found
        except (httpx.InvalidURL, UnicodeError, httpcore.LocalProtocolError) as error:
            raise ImageRejected(RejectReason.BAD_URI, f"not a URL: {error}") from error
        except httpcore.TimeoutException as error:
            detail = f"{url.host}: over {self._config.timeout_s} s"
            raise ImageRejected(RejectReason.TIMEOUT, detail) from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise ImageRejected(RejectReason.UNREACHABLE, f"{url.host}: {error}") from error
        raise ImageRejected(RejectReason.HTTP_ERROR, f"over {MAX_REDIRECTS} redirects")

    def _request(
        self,
        url: httpx.URL,
        method: str,
        take: Callable[[httpx.URL, httpcore.Response], _Found],
    ) -> _Found | httpx.URL:
        """Return what `take` makes of the answer, or where the server sends us."""
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
        with self._pool.stream(method, target, headers=headers, extensions=extensions) as reply:
            fields = httpx.Headers(reply.headers)
            if reply.status in (301, 302, 303, 307, 308) and "location" in fields:
                return url.join(fields["location"])
            return take(url, reply)

    def _read_body(self, url: httpx.URL, reply: httpcore.Response) -> bytes:
        _check_status(reply.status, url.host)
        fields = httpx.Headers(reply.headers)
        encoding = fields.get("content-encoding", "identity")
        if encoding != "identity":  # never asked for; unpacking it could fill the memory
            raise ImageRejected(RejectReason.HTTP_ERROR, f"Content-Encoding {encoding}")
        length = fields.get("content-length", "")
        if length.isdecimal():
            check_size(int(length), self._config)
        body = bytearray()
        for part in reply.iter_stream():
            body += part
            check_size(len(body), self._config)
        return bytes(body)


def _read_etag(url: httpx.URL, reply: httpcore.Response) -> str:
    if reply.status in _NO_HEAD_STATUS:  # 501 is a 5xx, but asking again will not help
        return ""
    _check_status(reply.status, url.host)
    fields = httpx.Headers(reply.headers)
    etag: str = fields.get("etag", "")
    if etag.removeprefix("W/").strip('"'):
        return etag
    modified = fields.get("last-modified", "")
    return f"{modified} {fields.get('content-length', '')}" if modified else ""


def _check_status(status: int, host: str) -> None:
    if not 200 <= status < 300:
        raise ImageRejected(reason_of_status(status), f"{host} answered {status}")


def reason_of_status(status: int) -> RejectReason:
    """Return why there is no image, from an HTTP status that is no success."""
    if status in (404, 410):
        return RejectReason.NOT_FOUND
    if status in (401, 403):
        return RejectReason.ACCESS_DENIED
    if status >= 500 or status in _BUSY_STATUS:
        return RejectReason.UNREACHABLE
    return RejectReason.HTTP_ERROR


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()
