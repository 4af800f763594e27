"""Opens a CSV of unknown encoding, plain or gzip."""

import codecs
import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from jobs.errors import JobError

MAX_LINE_CHARS = 1 << 24
READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeError)
"""What reading a damaged or wrongly decoded file raises."""
_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like the one of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def unreadable(path: Path, encoding: str, error: Exception) -> JobError:
    """Return the error for a file that can't be read to its end."""
    is_codec = isinstance(error, UnicodeError)
    what = f"as {encoding}: name another --encoding" if is_codec else "whole"
    return JobError(f"{path} can't be read {what} ({' '.join(str(error).split())})")


def _open_binary(path: Path) -> BinaryIO:
    with path.open("rb") as handle:
        magic = handle.read(4)
    if magic == _ZIP:
        raise JobError(f"{path} is a zip or Excel file: unpack it, or save it as CSV")
    # Named by its bytes: a download is often .csv and packed.
    opened = gzip.open(path, "rb") if magic[:2] == _GZIP else path.open("rb")  # noqa: SIM115
    return cast(BinaryIO, opened)


def open_text(path: Path, encoding: str) -> io.TextIOWrapper:
    """Open a CSV, plain or gzip; bytes that don't decode become lone surrogates.

    Raises:
        JobError: The file can't be opened, or the encoding is unknown.
    """
    try:
        binary = _open_binary(path)
    except OSError as error:
        raise unreadable(path, encoding, error) from error
    try:
        return io.TextIOWrapper(binary, encoding, errors="surrogateescape", newline="")
    except (LookupError, ValueError) as error:
        binary.close()
        raise JobError(
            f"--encoding {encoding!r} is no known text encoding; "
            "try utf-8, utf-16, cp1252, shift_jis or gb18030"
        ) from error


def find_encoding(path: Path) -> str:
    """Name the encoding of a file; reads all of it, since the first `é` may come late.

    Returns:
        That of the byte order mark, UTF-16 where every second byte is 0, UTF-8 where most lines
        with other characters than ASCII are valid in it, else cp1252.

    Raises:
        JobError: The file can't be read.
    """
    try:
        with _open_binary(path) as handle:
            head = handle.read(4096)
            for mark, name in _BOMS:
                if head.startswith(mark):
                    return name
            if head.count(0) > len(head) // 5:
                return "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"
            handle.seek(0)
            valid = invalid = 0
            for line in iter(lambda: handle.readline(MAX_LINE_CHARS), b""):
                if not line.isascii():
                    good = _is_utf8(line)
                    valid, invalid = valid + good, invalid + (not good)
    except (OSError, EOFError, zlib.error) as error:
        raise JobError(f"{path} can't be read whole ({' '.join(str(error).split())})") from error
    return "utf-8" if valid >= invalid else "cp1252"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
