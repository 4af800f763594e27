import errno
import os
import sys
from pathlib import Path

import pytest

from jobs import fetch
from jobs.fetch import fetch_images, read_etags
from jobs.images import ImageRejected, ImagesConfig, RejectReason

CONFIG = ImagesConfig(max_bytes=1000, retries=0, concurrency=4)


def one(reference, root="/nowhere"):
    (found,) = fetch_images([reference], str(root), CONFIG)
    return found.reason if isinstance(found, ImageRejected) else found


def test_local_references(tmp_path):
    root = tmp_path / "catalog"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "a" / "q?v=1#x%20.jpg").write_bytes(b"literal")
    (root / "a b").write_bytes(b"space")
    (root / "empty").touch()
    (root / "big").write_bytes(b"x" * 1001)
    (root / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(root / "pipe")
    expected = {
        "a/q?v=1#x%20.jpg": b"literal",
        "a/../a b": b"space",
        (root / "a b").as_uri(): b"space",
        str(tmp_path / "secret"): b"secret",
        "../secret": RejectReason.OUTSIDE_CATALOG,
        "a/../../secret": RejectReason.OUTSIDE_CATALOG,
        "%2e%2e/secret": RejectReason.OUTSIDE_CATALOG,
        "%2e%2e%2fsecret": RejectReason.OUTSIDE_CATALOG,
        "link": RejectReason.OUTSIDE_CATALOG,
        "none.jpg": RejectReason.NOT_FOUND,
        "a b/below": RejectReason.NOT_FOUND,
        "empty": RejectReason.EMPTY_FILE,
        "big": RejectReason.TOO_MANY_BYTES,
        "pipe": RejectReason.BAD_URI,
        "a": RejectReason.BAD_URI,
        "x" * 300: RejectReason.BAD_URI,
        "a\0b": RejectReason.BAD_URI,
        "\ud800": RejectReason.BAD_URI,
        "ftp://host/x": RejectReason.BAD_URI,
        "data:image/png;base64,xx": RejectReason.BAD_URI,
        "file://other/x": RejectReason.BAD_URI,
        "s3://bucket": RejectReason.BAD_URI,
        "": RejectReason.MISSING_IMAGE,
        None: RejectReason.MISSING_IMAGE,
        b"given": b"given",
        b"": RejectReason.EMPTY_FILE,
        b"x" * 1001: RejectReason.TOO_MANY_BYTES,
    }
    found = fetch_images(list(expected), str(root), CONFIG)
    got = [item.reason if isinstance(item, ImageRejected) else item for item in found]
    assert dict(zip(expected, got, strict=True)) == expected


def test_root(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    assert one("x", tmp_path.as_uri()) == b"x"
    assert fetch_images([], str(tmp_path), CONFIG) == []
    with pytest.raises(ValueError, match="catalog root"):
        fetch_images(["x"], "http://host/", CONFIG)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EIO, RejectReason.UNREACHABLE),
        (errno.ENOSPC, RejectReason.UNREACHABLE),
        (errno.ESTALE, RejectReason.UNREACHABLE),
        (errno.EMFILE, RejectReason.UNREACHABLE),
        (errno.ENOMEM, RejectReason.UNREACHABLE),
        (errno.ENOENT, RejectReason.NOT_FOUND),
        (errno.EACCES, RejectReason.ACCESS_DENIED),
        (errno.EPERM, RejectReason.ACCESS_DENIED),
        (errno.ELOOP, RejectReason.BAD_URI),
        (errno.ENXIO, RejectReason.BAD_URI),
    ],
)
def test_local_faults(number, reason):
    fault = OSError(number, os.strerror(number))
    assert fetch._explain_local(fault, Path("/x")).reason == reason


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_failing_read_passes():
    """The first page of memory is never mapped: reading this regular file gives a real EIO."""
    assert one("/proc/self/mem") == RejectReason.UNREACHABLE


def test_local_etags(tmp_path):
    root = tmp_path / "catalog"
    root.mkdir()
    path = root / "a?b.jpg"
    path.write_bytes(b"one")
    (tmp_path / "secret").write_bytes(b"x")
    (root / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(root / "pipe")
    unknown = ["", None, b"bytes", "none.jpg", "../secret", "link", "pipe", ".", "ftp://a/b"]
    references = ["a?b.jpg", str(path), path.as_uri(), *unknown]
    first = read_etags(references, str(root), CONFIG)
    assert first[0]
    assert first == [first[0]] * 3 + [""] * len(unknown)
    assert read_etags(references, root.as_uri(), CONFIG) == first
    status = path.stat()
    path.write_bytes(b"two")  # as long as before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    second = read_etags(references[:1], str(root), CONFIG)
    assert second != first[:1]
    path.write_bytes(b"three")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read_etags(references[:1], str(root), CONFIG) not in (first[:1], second)
    assert read_etags([], str(root), CONFIG) == []
    with pytest.raises(ValueError, match="catalog root"):
        read_etags(["x"], "http://host/", CONFIG)
