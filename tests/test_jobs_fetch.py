import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jobs import fetch_http
from jobs.fetch import fetch_images, read_etags
from jobs.images import ImageRejected, ImagesConfig, RejectReason


class Pages(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    calls: dict[str, int] = {}  # noqa: RUF012 - one server a test session

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.calls[self.path] = self.calls.get(self.path, 0) + 1
        name = self.path.strip("/").split("?")[0]
        if name == "flaky" and self.calls[self.path] == 1:
            self.answer(503)
        elif name in ("ok", "flaky"):
            self.answer(200, b"picture")
        elif name.isdecimal():
            self.answer(int(name))
        elif name == "slow":
            time.sleep(0.6)
            self.close_connection = True
        elif name == "drip":
            self.drip()
        elif name == "large":
            self.answer(200, b"x" * 2000)
        elif name == "endless":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"x" * 5000)
            self.close_connection = True
        elif name == "gzip":
            self.answer(200, b"x", Content_Encoding="gzip")
        elif name == "reset":
            self.reset()
        elif name == "cut":
            self.answer(200, b"only this", Content_Length="1000")
            self.close_connection = True
        else:
            self.answer(302, Location=self.path.partition("?")[2])

    def drip(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(12):
            try:
                self.wfile.write(b"x")
                self.wfile.flush()
            except OSError:
                break
            time.sleep(0.1)
        self.close_connection = True

    def reset(self):
        """End the connection by a TCP reset instead of a goodbye."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.wfile = self.rfile  # nothing is left to flush
        self.close_connection = True

    def do_HEAD(self):
        self.calls[self.path] = self.calls.get(self.path, 0) + 1
        name = self.path.strip("/").split("?")[0]
        if name in HEAD_FIELDS:
            self.answer(200, **HEAD_FIELDS[name])
        elif name == "flaky" and self.calls[self.path] == 1:
            self.answer(503)
        elif name == "flaky":
            self.answer(200, ETag='"second"')
        elif name == "slow":
            time.sleep(0.6)
            self.close_connection = True
        elif name.isdecimal():
            self.answer(int(name), ETag='"of an error page"')
        else:
            self.answer(302, Location=self.path.partition("?")[2])

    def log_message(self, *_):
        pass


MODIFIED = "Tue, 01 Oct 2024 00:00:00 GMT"
HEAD_FIELDS = {
    "strong": {"ETag": '"a1"', "Last_Modified": MODIFIED},
    "weak": {"ETag": 'W/"a1"'},
    "dated": {"Last_Modified": MODIFIED, "Content_Length": "7"},
    "empty": {"ETag": '""', "Last_Modified": MODIFIED, "Content_Length": "7"},
    "silent": {"Content_Length": "7"},
}


@pytest.fixture(scope="module")
def server():
    Pages.calls.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def config_for(*hosts, **options):
    settings = {"max_bytes": 1000, "timeout_s": 0.3, "retries": 0, "concurrency": 4}
    return ImagesConfig(http_hosts=hosts, **(settings | options))


def one(reference, config, root="/nowhere"):
    (found,) = fetch_images([reference], str(root), config)
    return found.reason if isinstance(found, ImageRejected) else found


def test_http_answers(server):
    config = config_for(server)
    expected = {
        "ok": b"picture",
        "404": RejectReason.NOT_FOUND,
        "410": RejectReason.NOT_FOUND,
        "400": RejectReason.HTTP_ERROR,
        "401": RejectReason.ACCESS_DENIED,
        "403": RejectReason.ACCESS_DENIED,
        "304": RejectReason.HTTP_ERROR,
        "406": RejectReason.HTTP_ERROR,
        "408": RejectReason.UNREACHABLE,
        "425": RejectReason.UNREACHABLE,
        "429": RejectReason.UNREACHABLE,
        "500": RejectReason.UNREACHABLE,
        "502": RejectReason.UNREACHABLE,
        "503": RejectReason.UNREACHABLE,
        "504": RejectReason.UNREACHABLE,
        "520": RejectReason.UNREACHABLE,
        "reset": RejectReason.UNREACHABLE,
        "cut": RejectReason.UNREACHABLE,
        "large": RejectReason.TOO_MANY_BYTES,
        "endless": RejectReason.TOO_MANY_BYTES,
        "gzip": RejectReason.HTTP_ERROR,
        "slow": RejectReason.TIMEOUT,
        "drip": RejectReason.TIMEOUT,
        "r?/ok": b"picture",
        "r?http://elsewhere.example/x": RejectReason.HTTP_NOT_ALLOWED,
        "r?http://169.254.169.254/latest": RejectReason.ADDRESS_REFUSED,
        "r?file:///etc/passwd": RejectReason.BAD_URI,
        "r?/r?/ok": b"picture",
    }
    found = fetch_images([f"http://{server}/{name}" for name in expected], "/nowhere", config)
    got = [item.reason if isinstance(item, ImageRejected) else item for item in found]
    assert dict(zip(expected, got, strict=True)) == expected


def test_retry_only_when_transient(server):
    config = config_for(server, retries=1)
    Pages.calls.clear()
    assert one(f"http://{server}/flaky", config) == b"picture"
    assert one(f"http://{server}/404", config) == RejectReason.NOT_FOUND
    assert Pages.calls == {"/flaky": 2, "/404": 1}


def test_redirect_loop_ends(server, monkeypatch):
    monkeypatch.setattr(fetch_http, "MAX_REDIRECTS", 2)
    config = config_for(server, timeout_s=2.0)
    assert one(f"http://{server}/r?/r?/r?/r?/ok", config) == RejectReason.HTTP_ERROR


def test_hosts(server):
    port = server.partition(":")[2]
    assert one(f"http://{server}/ok", config_for()) == RejectReason.HTTP_NOT_ALLOWED
    assert one(f"http://{server}/ok", config_for("127.0.0.1")) == RejectReason.HTTP_NOT_ALLOWED
    named = config_for(f"localhost:{port}")
    assert one(f"http://localhost:{port}/ok", named) == RejectReason.ADDRESS_REFUSED
    metadata = config_for("169.254.169.254", "[fe80::1]")
    assert one("http://169.254.169.254/", metadata) == RejectReason.ADDRESS_REFUSED
    assert one("http://[fe80::1]/", metadata) == RejectReason.ADDRESS_REFUSED
    assert one("http://[::ffff:169.254.169.254]/", metadata) == RejectReason.ADDRESS_REFUSED
    assert one(f"http://u:p@{server}/ok", config_for(server)) == RejectReason.BAD_URI
    assert one("http://host:port/", config_for(server)) == RejectReason.BAD_URI


@pytest.mark.parametrize(
    ("entry", "host", "matches"),
    [
        ("a.example", "a.example", True),
        ("*.a.example", "b.a.example", True),
        ("*.a.example", "a.example", False),
        ("*.a.example", "bada.example", False),
        ("a.example", "a.example.evil", False),
        ("a.example:81", "a.example", False),
        ("[::1]", "::1", True),
    ],
)
def test_host_patterns(entry, host, matches):
    assert fetch_http._matches(entry, host, 80, 80) is matches


def test_every_resolved_address_is_checked(monkeypatch):
    def resolve(host, port, **_):
        return [(2, 1, 6, "", (ip, port)) for ip in ("93.184.215.14", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    refused = one("http://shop.example/x", config_for("shop.example"))
    assert refused == RejectReason.ADDRESS_REFUSED


@pytest.mark.parametrize(
    "address", ["64:ff9b::a00:1", "2002:a00:1::", "224.0.0.1", "100.64.0.1", "::1", "0.0.0.0"]
)
def test_disguised_addresses_are_refused(address):
    with pytest.raises(ImageRejected):
        fetch_http._check_address(fetch_http._as_address(address), named=False)


def test_unreachable():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
        assert one(f"http://{host}/", config_for(host)) == RejectReason.UNREACHABLE
    unknown = config_for("no-such-host.invalid", timeout_s=5.0)
    assert one("http://no-such-host.invalid/", unknown) == RejectReason.UNREACHABLE
    nameless = "a" * 64 + ".example"  # no name server could hold it
    assert one(f"http://{nameless}/", config_for(nameless)) == RejectReason.BAD_URI


def test_http_etags(server):
    expected = {
        "strong": '"a1"',
        "weak": 'W/"a1"',
        "dated": f"{MODIFIED} 7",
        "empty": f"{MODIFIED} 7",
        "silent": "",
        "flaky": '"second"',
        "r?/strong": '"a1"',
        "r?http://169.254.169.254/": "",
        "404": "",
        "405": "",
        "501": "",
        "slow": "",
    }
    Pages.calls.clear()
    uris = [f"http://{server}/{name}" for name in expected]
    found = read_etags(uris, "/nowhere", config_for(server, retries=1))
    assert dict(zip(expected, found, strict=True)) == expected
    asked = {name: Pages.calls[f"/{name}"] for name in ("404", "405", "501", "flaky", "slow")}
    assert asked == {"404": 1, "405": 1, "501": 1, "flaky": 2, "slow": 2}
    assert read_etags(uris[:1], "/nowhere", config_for()) == [""]
