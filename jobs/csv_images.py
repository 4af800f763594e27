"""Reads the image references of a CSV's cells: several in one cell, relative to a folder."""

import functools
import ipaddress
import posixpath
import re
from urllib.parse import unquote, urlsplit

_SCHEMES = r"(?:https?|s3|gs|ftp|file)://"
# Only before another address: a `,` or `|` inside of one is its own.
_BETWEEN = re.compile(rf"[\s|;,]+(?={_SCHEMES}|//)", re.IGNORECASE)
_SEPARATOR = re.compile(r"[\s|;,\"']")
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
_PICTURE = re.compile(r"\S+\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|heic|jfif)", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


def split_images(cell: str) -> list[str]:
    """Split a cell into its image references, each once, in order.

    Addresses are split where the next begins; paths at `|`, `;`, `,` or blanks, if all pieces
    end like a picture. A list as JSON or Python write it loses its brackets and quotes.

    Args:
        cell: As written; may be empty.
    """
    text = cell.strip()
    if not text or (text.startswith(("http://", "https://")) and not _SEPARATOR.search(text)):
        return [text] if text else []
    if text.startswith("[") and text.endswith("]"):
        text = re.sub(r"[\[\]'\"]", " ", text).replace("\\/", "/").strip()
    has_address = "://" in text or text.startswith("//")
    pieces = _BETWEEN.split(text) if has_address else _split_paths(text)
    found = (piece.strip(" \t\r\n|;,\"'") for piece in pieces)
    # A page's address without its scheme would be read as an absolute path.
    return list(dict.fromkeys(f"https:{p}" if p.startswith("//") else p for p in found if p))


def _split_paths(text: str) -> list[str]:
    for separator in ("|", ";", ",", None):
        pieces = [piece.strip() for piece in text.split(separator) if piece.strip()]
        if len(pieces) > 1 and all(_PICTURE.fullmatch(piece.replace(" ", "_")) for piece in pieces):
            return pieces
    return [text]


def place_image(reference: str, root: str, *, given: bool) -> str:
    """Put the root before a relative reference; one that climbs stays, to be refused later.

    Args:
        reference: A URI or a path.
        root: A folder, `s3://bucket/prefix` or `https://host/prefix`.
        given: Whether the user named the root; then a path from `/` starts there too.
    """
    if _ABSOLUTE.match(reference) or (reference.startswith("/") and not given):
        return reference
    inner = reference.lstrip("/")
    for name in (inner, unquote(inner)):
        if posixpath.normpath(name).startswith(("../", "/")) or posixpath.normpath(name) == "..":
            return reference
    return f"{root.rstrip('/')}/{inner}"


def http_host(reference: str) -> str | None:
    """Return the host that an http(s) reference names, as `images.http_hosts` lists it.

    An IP literal is none: listed, it would open private addresses, and a CSV is written by others.

    Args:
        reference: A URI or a path.
    """
    if not reference.lower().startswith(("http://", "https://")):
        return None
    return _listed_host("/".join(reference.split("/", 3)[:3]))


@functools.lru_cache(maxsize=1024)
def _listed_host(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
        host, port = (parts.hostname or "").encode("idna").decode("ascii"), parts.port
    except (ValueError, UnicodeError):
        return None
    if not _HOST.fullmatch(host) or _is_address(host):
        return None
    standard = {"http": 80, "https": 443}[parts.scheme]
    return host if port in (None, standard) else f"{host}:{port}"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # 127.1 and 0x7f000001 are addresses to a resolver.
        return bool(re.fullmatch(r"[0-9.]+|0x[0-9a-f.x]+", host))
    return True
