"""Fetches and shrinks the pictures of a report, within bounds of time and bytes."""

import base64
import io
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final

from PIL import Image, UnidentifiedImageError

from jobs.fetch import fetch_images
from jobs.images import LARGEST_MAX_PIXELS, ImageRejected, ImagesConfig, RejectReason
from jobs.thumbnails import thumbnail_jpeg

THUMBNAIL_PX = 160
SMALL_PX = 96
AT_ONCE = 8  # pictures of images.max_bytes that are held at once
TIMEOUT_S = 3.0
MOST_S = 20.0  # for all pictures of a page, decoding too: a dead server must not hold up a run
MOST_BYTES = 3_000_000  # of all pictures of a page, encoded
DRAFT_SHARE = 64  # a JPEG is decoded at an eighth of its sides
FULL = "left out: the page has its fill of pictures"
STORED = "the catalog holds its pictures itself"
_SERVER: Final = re.compile(r"(?:https?|s3)://[^/?#]+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What stands in the place of a picture.

    Attributes:
        src: A `data:` URI; empty where there is none.
        why: Why there is none.
    """

    src: str = ""
    why: str = ""


@dataclass(kw_only=True)
class Pictures:
    """The pictures of one page: each is fetched once, and a server that is silent asked once.

    Attributes:
        images: Limits for fetching and decoding.
        nowhere: What is said of a row without an address of a picture.
    """

    images: ImagesConfig
    nowhere: str = "no address of a picture"
    _known: dict[tuple[str, str, int], Picture] = field(default_factory=dict, repr=False)
    _silent: set[str] = field(default_factory=set)
    _bytes: int = 0
    _made_bytes: int = 0
    _is_full: bool = False
    _spent_s: float = 0.0

    def show(
        self, references: Sequence[str | None], root: str, px: int = THUMBNAIL_PX
    ) -> list[Picture]:
        """Return a picture, or why there is none, for each reference.

        Args:
            references: URIs, as `jobs.fetch.fetch_images` takes them.
            root: The folder that relative URIs start from.
            px: The longest side.
        """
        self.load(references, root, px)
        none = Picture(why=self.nowhere)
        return [self.count(self._known[root, one, px] if one else none) for one in references]

    def load(self, references: Iterable[str | None], root: str, px: int = THUMBNAIL_PX) -> None:
        """Fetch pictures, some at once, that are to be shown later; see `show`."""
        named = dict.fromkeys(one for one in references if one)
        missing = iter([one for one in named if (root, one, px) not in self._known])
        while chunk := list(islice(missing, AT_ONCE)):
            self._known |= {(root, one, px): self._refuse(one) for one in chunk}
            allowed = [one for one in chunk if not self._known[root, one, px].why]
            for one, data in zip(allowed, self._fetch(allowed, root), strict=True):
                self._known[root, one, px] = self._make(data, px)

    def count(self, picture: Picture) -> Picture:
        """Count a picture as shown; return it, or that the page is full."""
        if self._bytes + len(picture.src) > MOST_BYTES:
            self._is_full = True
            return Picture(why=FULL)
        self._bytes += len(picture.src)
        return picture

    def _refuse(self, uri: str) -> Picture:
        """Say why a picture is not fetched, if it is not."""
        silent = _server(uri) in self._silent
        why = "not fetched: the server did not answer" if silent else ""
        return Picture(why=self._spent() or why)

    def _spent(self) -> str:
        """Say what the page has no more of, if it is so: time, or bytes."""
        if self._spent_s > MOST_S:
            return "left out: the report's time for pictures was over"
        return FULL if self._is_full else ""

    def _make(self, data: bytes | ImageRejected, px: int) -> Picture:
        if why := self._spent():
            return Picture(why=why)
        began = time.monotonic()
        made = make_picture(data, self.images, px)
        self._spent_s += time.monotonic() - began
        self._made_bytes += len(made.src)
        self._is_full |= self._made_bytes >= MOST_BYTES
        return made

    def _fetch(self, uris: Sequence[str], root: str) -> list[bytes | ImageRejected]:
        limits = replace(
            self.images,
            timeout_s=min(self.images.timeout_s, TIMEOUT_S),
            retries=0,
            concurrency=min(self.images.concurrency, AT_ONCE),
        )
        began = time.monotonic()
        fetched = fetch_images(uris, root, limits)
        self._spent_s += time.monotonic() - began
        for uri, found in zip(uris, fetched, strict=True):
            if isinstance(found, ImageRejected) and found.reason.transient:
                self._silent |= {_server(uri)} - {""}
        return fetched


def _server(reference: str) -> str:
    """Name the server that answers for a reference; empty: a local file."""
    found = _SERVER.match(reference)
    return found[0].lower() if found else ""


def make_picture(data: bytes | ImageRejected, images: ImagesConfig, px: int) -> Picture:
    """Return a thumbnail, or why there is none.

    Args:
        data: The encoded image, or why there is none.
        images: Limits.
        px: The longest side.
    """
    try:
        if isinstance(data, ImageRejected):
            raise data
        jpeg = thumbnail_jpeg(data, _limits_for(data, images), px)
    except ImageRejected as rejected:
        return Picture(why=describe_reason(rejected.reason))
    return Picture(src=f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}")


def _limits_for(data: bytes, images: ImagesConfig) -> ImagesConfig:
    """Allow more pixels for a JPEG that isn't progressive: it is decoded at a fraction of them.

    So a row that was refused for its pixels can be seen.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return images
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
            progressive = "progressive" in header.info
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return images  # decoding tells what is wrong
    most = min(LARGEST_MAX_PIXELS, DRAFT_SHARE * images.max_pixels)
    return images if progressive else replace(images, max_pixels=most)


_WORDS = {
    RejectReason.MISSING_IMAGE: "the catalog names no picture",
    RejectReason.NOT_FOUND: "there is no such file",
    RejectReason.UNREACHABLE: "the server can't be reached",
    RejectReason.TIMEOUT: "the server took too long",
    RejectReason.ACCESS_DENIED: "access is denied",
    RejectReason.HTTP_ERROR: "the server answers with an error",
    RejectReason.HTTP_NOT_ALLOWED: "the host is not in images.http_hosts",
    RejectReason.ADDRESS_REFUSED: "the address is not public",
    RejectReason.OUTSIDE_CATALOG: "the path leaves the catalog's folder",
    RejectReason.BAD_URI: "the URI names no picture",
    RejectReason.EMPTY_FILE: "the file is empty",
    RejectReason.TOO_MANY_BYTES: "too many bytes to show",
    RejectReason.TOO_MANY_PIXELS: "too many pixels to show",
    RejectReason.NOT_AN_IMAGE: "the file is no picture",
    RejectReason.TRUNCATED: "the file is cut off",
    RejectReason.UNDECODABLE: "the file can't be decoded",
}


def describe_reason(reason: RejectReason) -> str:
    """Say in a few words what is wrong with a picture."""
    return _WORDS.get(reason, str(reason))
