"""Image bytes to RGB pixels: what an image may be, and every reason why one is refused.

Owns the closed set of reject reasons, the limits (`ImagesConfig`) and the decoding.
Where the bytes come from is `jobs.fetch`.
"""

import dataclasses
import enum
import io
import struct
import warnings
import zlib
from typing import ClassVar, Final, Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features

from jobs.schemas import hash63

# Pillow refuses by itself above twice MAX_IMAGE_PIXELS: a larger limit of ours could not hold.
LARGEST_MAX_PIXELS: Final = 178_956_970
# Closed on purpose: other formats of Pillow start programs (EPS) or are little hardened.
FORMATS: Final = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    *(("AVIF",) if features.check("avif") else ()),
)

# Pillow warns from half its limit on; `max_pixels` is checked right after, from the same header.
# Set once at import: warnings.catch_warnings would change the filters of other threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_MAGIC: Final = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\x00", b"MM\x00*", b"II+\x00")
_TRANSPOSE: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's parsers raise on corrupt bytes. AssertionError, RuntimeError and Warning too:
# some plugins assert, libwebp's wrapper raises RuntimeError, and -W error turns warnings up.
_CORRUPT: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    EOFError,
    MemoryError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
)


class RejectReason(enum.StrEnum):
    """Why a row could not be embedded. Closed: reports and the gate count by it."""

    MISSING_IMAGE = "missing_image"
    NOT_FOUND = "not_found"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    ACCESS_DENIED = "access_denied"
    HTTP_ERROR = "http_error"
    HTTP_NOT_ALLOWED = "http_not_allowed"
    ADDRESS_REFUSED = "address_refused"
    OUTSIDE_CATALOG = "outside_catalog"
    BAD_URI = "bad_uri"
    EMPTY_FILE = "empty_file"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    UNDECODABLE = "undecodable"
    EMPTY_TEXT = "empty_text"
    TEXT_TOO_LONG = "text_too_long"
    BAD_VECTOR = "bad_vector"

    @property
    def transient(self) -> bool:
        """Tell whether the same reference may give an image later: a passing fault."""
        return self in (RejectReason.UNREACHABLE, RejectReason.TIMEOUT)

    @property
    def configured(self) -> bool:
        """Tell whether another configuration of the limits may take the row."""
        return self in (
            RejectReason.HTTP_NOT_ALLOWED,
            RejectReason.ADDRESS_REFUSED,
            RejectReason.TOO_MANY_BYTES,
            RejectReason.TOO_MANY_PIXELS,
            RejectReason.TEXT_TOO_LONG,
        )

    @property
    def surrounding(self) -> bool:
        """Tell whether it may lie at what surrounds the job: a folder not mounted, a wrong key."""
        return self in (RejectReason.NOT_FOUND, RejectReason.ACCESS_DENIED)

    @property
    def kind(self) -> Literal["transient", "permanent"]:
        """Name what `transient` tells, as reports and tables print it."""
        return "transient" if self.transient else "permanent"


class ImageRejected(ValueError):  # noqa: N818 - a verdict on a row, not a fault of the program
    """One image that can't be used. Pickles, so that it can cross processes."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        """Keep the reason, and the detail squeezed into one line of at most 300 characters."""
        self.reason = reason
        self.detail = " ".join(detail.split())[:300]
        super().__init__(reason, self.detail)

    def __str__(self) -> str:
        """Return `reason: detail`."""
        return f"{self.reason}: {self.detail}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Limits for fetching and decoding.

    Attributes:
        max_bytes: Largest encoded image, in bytes.
        max_pixels: Largest decoded image, width * height, checked before decoding.
        timeout_s: Deadline of one attempt, redirects included, in seconds.
        retries: Further attempts after a transient fault.
        max_attempts: Refreshes that try a row with a transient fault, the first one included;
            after them it is left as it is until its image or text changes.
        concurrency: Threads that fetch at once.
        http_hosts: Hosts that http(s) URIs may name; empty turns http(s) off. An entry is a
            host name, or `*.example.com` (its subdomains, not itself), with an optional `:port`
            (without it: 80 for http, 443 for https). Only an IP literal written here
            (`10.0.0.7:8080`, `[::1]:8080`) opens a private or loopback address; a name that
            resolves to one is refused, and so are link-local and metadata addresses, always.
        etags: Ask for each image's ETag (a local file's size and time) at every refresh, so that
            a changed picture behind an unchanged URI is noticed; one request an image.

    Raises:
        ValueError: A limit is out of range, or an entry of http_hosts is not a host.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    max_bytes: int = 20_000_000
    max_pixels: int = 100_000_000
    timeout_s: float = 10.0
    retries: int = 3
    max_attempts: int = 5
    concurrency: int = 16
    http_hosts: tuple[str, ...] = ()
    etags: bool = False

    def __post_init__(self) -> None:
        """Check every limit."""
        if (
            min(self.max_bytes, self.concurrency, self.max_attempts) < 1
            or self.timeout_s <= 0
            or self.retries < 0
        ):
            raise ValueError(
                "images: max_bytes, timeout_s, concurrency and max_attempts must be > 0, "
                f"retries >= 0; found {self}"
            )
        if not 1 <= self.max_pixels <= LARGEST_MAX_PIXELS:
            raise ValueError(
                f"images.max_pixels must be in 1..{LARGEST_MAX_PIXELS}, found {self.max_pixels}"
            )
        for entry in self.http_hosts:
            rest = entry.removeprefix("*.")
            if not rest or set(rest) & set("*/@?# "):
                raise ValueError(f"images.http_hosts: {entry!r} is not a host or *.domain")


def hash_limits(config: ImagesConfig, max_text_chars: int) -> int:
    """Hash the limits that rows are refused by: under others a refused row may pass.

    Args:
        config: Limits of images.
        max_text_chars: Limit of texts.

    Returns:
        An int in [1, 2**63).
    """
    limits = (config.max_bytes, config.max_pixels, sorted(config.http_hosts), max_text_chars)
    return hash63([repr(limits).encode()]) or 1


def check_size(count_bytes: int, config: ImagesConfig) -> None:
    """Raise ImageRejected if an encoded image is larger than the limit."""
    if count_bytes > config.max_bytes:
        raise ImageRejected(
            RejectReason.TOO_MANY_BYTES, f"{count_bytes} bytes or more, limit {config.max_bytes}"
        )


def decode_image(
    data: bytes, config: ImagesConfig, *, min_side_px: int | None = None
) -> Image.Image:
    """Decode one image to RGB, upright (EXIF), on white, first frame only.

    Args:
        data: The encoded file.
        config: Limits; max_pixels is checked from the header, before pixels are decoded.
        min_side_px: Lets JPEG decode at 1/2, 1/4 or 1/8 while both sides stay at least this
            long. Pass twice the target side.

    Returns:
        An RGB image, 8 bits a channel. 16-bit grey is scaled (not clipped) to 8 bits.

    Raises:
        ImageRejected: empty_file, too_many_pixels, not_an_image, truncated or undecodable.
        ValueError: min_side_px is under 1.
    """
    if min_side_px is not None and min_side_px < 1:
        raise ValueError(f"min_side_px must be at least 1, found {min_side_px}")
    if not data:
        raise ImageRejected(RejectReason.EMPTY_FILE, "0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _read_pixels(image, config, min_side_px)
    except ImageRejected:
        raise
    except Image.DecompressionBombError as error:
        raise ImageRejected(RejectReason.TOO_MANY_PIXELS, str(error)) from error
    except _CORRUPT as error:
        raise _explain(data, error) from error


def _read_pixels(
    image: ImageFile.ImageFile, config: ImagesConfig, min_side_px: int | None
) -> Image.Image:
    if image.width * image.height > config.max_pixels:
        raise ImageRejected(
            RejectReason.TOO_MANY_PIXELS,
            f"{image.width} x {image.height} px, limit {config.max_pixels} px",
        )
    if min_side_px is not None:
        image.draft("RGB", (min_side_px, min_side_px))  # does nothing unless JPEG
    image.load()
    rgb = _to_rgb(image)
    method = _TRANSPOSE.get(_read_orientation(image))
    return rgb if method is None else rgb.transpose(method)


def _read_orientation(image: Image.Image) -> int:
    """Read the EXIF orientation after load(): the TIFF plugin has then applied its own."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _CORRUPT:  # broken metadata is no reason to lose a sound picture: it stays as stored
        return 1
    return found if isinstance(found, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I" too: Pillow's container for 16-bit grey
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageRejected(RejectReason.UNDECODABLE, "float pixels have no defined range")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, "white")
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _explain(data: bytes, error: BaseException) -> ImageRejected:
    """Tell a cut file from a corrupt one and from something else altogether."""
    unidentified = isinstance(error, UnidentifiedImageError)
    if unidentified and not _has_magic(data):
        start = data[:16]
        return ImageRejected(
            RejectReason.NOT_AN_IMAGE, f"starts with {start!r}; read are {', '.join(FORMATS)}"
        )
    # Pillow's own message holds a memory address here, which would differ in every run.
    said = "unreadable header" if unidentified else f"{type(error).__name__}: {error}"
    if isinstance(error, EOFError) or "truncated" in str(error).lower() or _is_cut(data):
        return ImageRejected(RejectReason.TRUNCATED, f"{len(data)} bytes; {said}")
    return ImageRejected(RejectReason.UNDECODABLE, said)


def _has_magic(data: bytes) -> bool:
    return (
        data.startswith(_MAGIC)
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or data[4:12] in (b"ftypavif", b"ftypavis")
    )


def _is_cut(data: bytes) -> bool:
    """Tell whether a file that failed to decode lacks its format's end mark."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-1024:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-1024:]
    if data.startswith(b"GIF8"):
        return b";" not in data[-16:]
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return False
