"""What each answer of an S3 server means: a real local server that gives any answer."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jobs import fetch_s3
from jobs.fetch import fetch_images, read_etags
from jobs.images import ImageRejected, ImagesConfig, RejectReason


class Bucket(BaseHTTPRequestHandler):
    """Answers by the key: `503-SlowDown` with that status and code, `cut` breaks off."""

    protocol_version = "HTTP/1.1"
    calls: list[tuple[str, str]] = []  # noqa: RUF012 - one server a test module

    def do_GET(self):
        self.calls.append((self.command, self.path))
        status, _, code = self.path.rpartition("/")[2].partition("-")
        body, length = b"object", None
        if status == "cut":
            length, self.close_connection = 1000, True
        elif status.isdecimal():
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response(int(status) if status.isdecimal() else 200)
        self.send_header("ETag", '"of the object"')
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{httpd.server_address[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fetch_s3._filesystem.cache_clear()
        Bucket.calls.clear()
        yield Bucket.calls
        fetch_s3._filesystem.cache_clear()
        httpd.shutdown()


def config_for(**options):
    settings = {"max_bytes": 1000, "timeout_s": 5.0, "retries": 0, "concurrency": 4}
    return ImagesConfig(**(settings | options))


def one(reference, config, root="/nowhere"):
    (found,) = fetch_images([reference], str(root), config)
    return found.reason if isinstance(found, ImageRejected) else found


def test_key_is_literal_and_stays_below_the_root(calls):
    assert one("key.jpg?versionId=1", config_for(), "s3://bucket/photos/") == b"object"
    assert calls == [("GET", "/bucket/photos/key.jpg%3FversionId%3D1")]
    assert one("../x", config_for(), "s3://bucket/photos") == RejectReason.OUTSIDE_CATALOG
    assert one("s3://bucket/x", config_for(max_bytes=3)) == RejectReason.TOO_MANY_BYTES


def test_answers():
    """A code can speak of the object, which stays, or of this run, which passes."""
    passing = ["500-InternalError", "502-", "503-", "504-", "429-TooManyRequests", "408-", "425-"]
    passing += ["400-ExpiredToken", "403-InvalidAccessKeyId", "403-RequestTimeTooSkewed", "cut"]
    expected = dict.fromkeys(passing, RejectReason.UNREACHABLE) | {
        "404-NoSuchKey": RejectReason.NOT_FOUND,
        "404-NoSuchBucket": RejectReason.NOT_FOUND,
        "403-AccessDenied": RejectReason.ACCESS_DENIED,
        "400-InvalidRequest": RejectReason.HTTP_ERROR,
        "405-MethodNotAllowed": RejectReason.HTTP_ERROR,
    }
    uris = [f"s3://bucket/{name}" for name in expected]
    found = fetch_images(uris, "/nowhere", config_for(timeout_s=30.0))
    got = [item.reason if isinstance(item, ImageRejected) else item for item in found]
    assert dict(zip(expected, got, strict=True)) == expected


@pytest.mark.parametrize("answer", ["503-SlowDown", "400-RequestTimeout"])
def test_busy_is_asked_again_until_the_deadline(answer, calls):
    assert one(f"s3://bucket/{answer}", config_for(timeout_s=2.0)) == RejectReason.TIMEOUT
    assert len(calls) > 1


def test_no_server(monkeypatch):
    for endpoint in ("http://no-such-host.invalid", "no url"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        fetch_s3._filesystem.cache_clear()
        assert one("s3://bucket/x", config_for()) == RejectReason.UNREACHABLE
    assert read_etags(["s3://bucket/x"], "/nowhere", config_for()) == [""]


def test_etags(calls):
    names = ["key?versionId=1", "404-", "403-", "400-", "405-", "501-"]
    found = read_etags(["s3://bucket", *names], "s3://bucket/photos", config_for())
    assert found == ["", '"of the object"', "", "", "", "", ""]
    assert ("HEAD", "/bucket/photos/key%3FversionId%3D1") in calls
    assert {method for method, _ in calls} == {"HEAD"}
