"""Input images: from base64 or a URL to checked pixels, before any worker hears of them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import warnings
from typing import TYPE_CHECKING

import pybase64

from api.errors import ApiError
from api.models.addresses import Reach
from api.schema.generation import Picture
from api.service.fetch import fetch
from api.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def from_base64(text: str, field: str) -> bytes:
    """The bytes of a base64 string, with or without a ``data:`` prefix.

    Raises:
        ApiError: INVALID_IMAGE.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    text = "".join(text.split())
    text += "=" * (-len(text) % 4)
    try:
        data = pybase64.b64decode(text, validate=True)
    except ValueError:
        hint = " To send a URL, set callInputs.is_url." if text[:4].lower() == "http" else ""
        raise ApiError("INVALID_IMAGE", f"The image is not base64.{hint}", field=field) from None
    if not data:
        raise ApiError("INVALID_IMAGE", "The image is empty.", field=field)
    return data


def decode(data: bytes, field: str, mode: str, max_pixels: int) -> Picture:
    """Decode an image file.

    The size is read from the header and checked before a pixel is decoded, so a small file that
    claims a huge picture costs nothing.

    Args:
        mode: ``RGB`` or ``L``; ``RGBA``: as it is, RGB where it has no transparency.

    Raises:
        ApiError: INVALID_IMAGE, IMAGE_TOO_LARGE.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image, field, max_pixels)
        image.load()
        image = ImageOps.exif_transpose(image)
        image = _flatten(image, mode)
    except UnidentifiedImageError:
        raise ApiError("INVALID_IMAGE", f"Not an image in one of {', '.join(FORMATS)}.", field=field) from None
    except Image.DecompressionBombError:
        raise ApiError("IMAGE_TOO_LARGE", "The image claims more pixels than can be.", field=field) from None
    except ApiError:
        raise
    except Exception as fault:  # decoders raise whatever they like on damaged files
        raise ApiError("INVALID_IMAGE", f"The image cannot be decoded: {fault}.", field=field) from fault
    return Picture(image.mode, image.width, image.height, image.tobytes(), hashlib.sha256(data).hexdigest())


def _check_size(image: Image, field: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        message = f"{width}x{height} pixels are over this server's MAX_PIXELS of {max_pixels}."
        raise ApiError("IMAGE_TOO_LARGE", message, field=field, requested=[width, height])
    if width < 8 or height < 8:
        raise ApiError("INVALID_IMAGE", "An image has at least 8x8 pixels.", field=field, requested=[width, height])
    if not 1 / 32 <= width / height <= 32:
        message = "An image may be at most 32 times as long as it is wide."
        raise ApiError("INVALID_IMAGE", message, field=field, requested=[width, height])


def _flatten(image: Image, mode: str) -> Image:
    """RGB or L without transparency: what is transparent becomes white, as browsers show it; or with it, as RGBA."""
    from PIL import Image as images

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = images.fromarray(_eight_bits(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if mode == "RGBA":
            return image
        white = images.new("RGBA", image.size, "white")
        image = images.alpha_composite(white, image)
    return image.convert("RGB" if mode == "RGBA" else mode)


def _eight_bits(image: Image) -> np.ndarray:
    """A grey picture of more than eight bits, scaled down; Pillow's own conversion clips it to white.

    Whole numbers count to 65535. Floats have no agreed range and are refused.
    """
    import numpy as np

    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; send 8 or 16 bits")
    return (np.clip(np.asarray(image).astype(np.int64), 0, 65535) * 255 // 65535).astype(np.uint8)


async def read_picture(value: str, field: str, mode: str, is_url: bool, settings: Settings) -> Picture:
    """An image as a client sent it, fetched if it is a URL, decoded in a thread.

    Raises:
        ApiError: INVALID_IMAGE, IMAGE_TOO_LARGE, URL_NOT_ALLOWED, SOURCE_UNREACHABLE.
    """
    if is_url:
        data = await fetch(
            value,
            field,
            timeout=settings.fetch_timeout,
            max_bytes=settings.max_body,
            reach=Reach.of(settings),
        )
    else:
        data = await asyncio.to_thread(from_base64, value, field)
    return await asyncio.to_thread(decode, data, field, mode, settings.max_pixels)
