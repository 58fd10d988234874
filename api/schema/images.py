"""The image formats that this server writes: names, content types, extensions, what they can."""

from __future__ import annotations

from typing import NamedTuple


class ImageFormat(NamedTuple):
    """One format.

    Attributes:
        content_type: its media type.
        extension: of file names.
        lossless: whether it can keep every pixel.
        module: that has to be installed for it, beyond Pillow.
    """

    content_type: str
    extension: str
    lossless: bool
    module: str = ""


IMAGE_FORMATS = {
    "PNG": ImageFormat("image/png", "png", lossless=True),
    "WEBP": ImageFormat("image/webp", "webp", lossless=True),
    "JPEG": ImageFormat("image/jpeg", "jpg", lossless=False),
    "AVIF": ImageFormat("image/avif", "avif", lossless=False),  # Pillow's goes through YUV of eight bits
    "JXL": ImageFormat("image/jxl", "jxl", lossless=True, module="pillow_jxl"),
}
_OTHER_NAMES = {"JPG": "JPEG", "JPEGXL": "JXL", "JPEG-XL": "JXL"}


def format_name(text: str) -> str:
    """The name of a format, however it is written; of an unknown one as it is."""
    return _OTHER_NAMES.get(text.upper(), text.upper())
