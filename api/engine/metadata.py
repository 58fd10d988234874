"""What is written into image files besides the picture: A1111's ``parameters``, and our ``$meta``."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from PIL import Image

from api.engine.parameters import parameters

PARAMETERS, META = "parameters", "meta"
"""Keywords of the text chunks of a PNG."""
_IMAGE_DESCRIPTION, _SOFTWARE, _EXIF, _USER_COMMENT = 0x010E, 0x0131, 0x8769, 0x9286
LONGEST_IN_JPEG = 65_000
"""Bytes of EXIF that fit into a segment of a JPEG, with room for its head."""


class Texts(NamedTuple):
    """What a file tells of its picture: A1111's text, and ``$meta`` as JSON."""

    parameters: str
    meta: str

    def exif(self, longest: int | None = None) -> bytes:
        """As EXIF: A1111's text as the user's comment, where its tools look for it, ``$meta`` as the description.

        A comment that is led by ``UNICODE`` is UTF-16 in the file's byte order (EXIF 2.32, 4.6.5), which readers of
        A1111's take to be the big-endian one.

        Args:
            longest: bytes; where both do not fit, ``$meta`` is left out, then the rest.
        """
        for meta, text in ((self.meta, self.parameters), ("", self.parameters), ("", "")):
            exif = Image.Exif()
            exif.endian = ">"
            exif[_SOFTWARE] = "diffusers-api"
            if meta:
                exif[_IMAGE_DESCRIPTION] = meta
            if text:
                exif.get_ifd(_EXIF)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be", "replace")
            data = exif.tobytes()
            if longest is None or len(data) <= longest:
                return data
        return b""


def texts(meta: dict[str, Any], index: int, images: int) -> Texts:
    """What to write into the file of one image of a request.

    Args:
        meta: the request's ``$meta``.
        index: which image; ``$meta`` in the file says it where there are several.
        images: how many there are.
    """
    told = {**meta, "image": index} if images > 1 else meta
    return Texts(parameters(meta, index, images), json.dumps(told, default=str))
