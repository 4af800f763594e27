"""Makes small JPEGs of catalog pictures, for reports and for the page."""

import io

from jobs.images import ImagesConfig, decode_image

JPEG_QUALITY = 80


def thumbnail_jpeg(data: bytes, images: ImagesConfig, px: int) -> bytes:
    """Decode a picture and encode it again as a JPEG that fits a square, without its metadata.

    Args:
        data: The encoded file.
        images: Limits.
        px: The longest side; a smaller picture keeps its size.

    Raises:
        ImageRejected: As `jobs.images.decode_image`.
    """
    image = decode_image(data, images, min_side_px=px)
    image.thumbnail((px, px))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
