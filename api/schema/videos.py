"""The formats of the files that a generation ends in: of images, and of videos."""

from __future__ import annotations

from typing import Any

from api.schema.images import IMAGE_FORMATS, ImageFormat

VIDEO_FORMATS = {
    "MP4": ImageFormat("video/mp4", "mp4", lossless=False),
    "GIF": ImageFormat("image/gif", "gif", lossless=False),
    "WEBP": IMAGE_FORMATS["WEBP"],
}
FILE_FORMATS = {**IMAGE_FORMATS, **VIDEO_FORMATS}
"""All of them, by the names that ``GenerationRequest.image_format`` has."""
MOST_FPS = 120
GIF_FPS = 50
"""A GIF counts in hundredths of a second, and players slow down what is shown for one of them only."""


def kind_of(meta: dict[str, Any]) -> str:
    """What the files of a result are, by its ``$meta``: ``image`` or ``video``; keys of answers are made of it."""
    return "video" if "video_format" in meta else "image"


def format_of(meta: dict[str, Any]) -> ImageFormat | None:
    """The format of a result's files, by its ``$meta``."""
    return FILE_FORMATS.get(str(meta.get("video_format") or meta.get("image_format")).upper())
