"""Where the images of a request are to be put, instead of into the answer: ``output_url``."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from api.errors import ApiError
from api.models.addresses import Reach, not_allowed
from api.models.locations import Location, parse_location, redacted
from api.schema.videos import FILE_FORMATS
from api.service.fetch import check_scheme
from api.service.lookups import look_up
from api.settings import Settings

FIELD = "callInputs.output_url"
NUMBER = "{n}"
"""Stands for the number of an image, from 0."""
_S3 = re.compile(r"(?:https?\+)?s3://", re.IGNORECASE)
_EXTENSIONS = {f".{found.extension}" for found in FILE_FORMATS.values()} | {".jpeg"}


class Destination(NamedTuple):
    """Where one image goes: an address that takes a PUT, or an object of the server's own bucket.

    Attributes:
        url: the address.
        location: the object.
        link: where what was PUT can be read, if that is another address; may hold a signature.
    """

    url: str
    location: Location | None = None
    link: str = ""

    def __repr__(self) -> str:  # the address may hold a signature
        return f"Destination({self.location or self.host})"

    @property
    def host(self) -> str:
        """What may be told of it."""
        return str(self.location) if self.location else urlsplit(self.url).netloc.rpartition("@")[2]


def choose_destinations(
    options: dict[str, Any], images: int, image_format: str, job_id: str, settings: Settings
) -> tuple[Destination, ...]:
    """One for each image; none where the answer holds them.

    Args:
        options: checked ``callInputs``.
        images: how many there are.
        image_format: whose extension names in the bucket get.
        job_id: names the images in a folder.
        settings: the bucket.

    Raises:
        ApiError: INVALID_INPUTS, URL_NOT_ALLOWED.
    """
    asked: tuple[str, ...] = options.get("output_url", ())
    if not asked:
        return ()
    if len(asked) == 1 and (images > 1 or NUMBER in asked[0]):
        asked = _numbered(asked[0], images)
    if len(asked) != images:
        message = f"The request makes {images} images: send as many URLs, or one with {NUMBER} in it."
        raise ApiError("INVALID_INPUTS", message, field=FIELD, requested=len(asked))
    found = tuple(_destination(url, number, image_format, job_id, settings) for number, url in enumerate(asked))
    if len({destination.location or destination.url for destination in found}) < images:
        raise ApiError("INVALID_INPUTS", "Two images would get the same address.", field=FIELD)
    return found


def _numbered(url: str, images: int) -> tuple[str, ...]:
    if NUMBER in url:
        return tuple(url.replace(NUMBER, str(number)) for number in range(images))
    if not _S3.match(url):
        message = (
            f"{images} images do not fit at one address: send a list of URLs, one for each, or write {NUMBER} for the "
            "number where the address takes any name."
        )
        raise ApiError("INVALID_INPUTS", message, field=FIELD)
    if url.endswith("/"):
        return (url,) * images
    folder, slash, name = url.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    stem, end = (stem, dot + extension) if dot and f".{extension.lower()}" in _EXTENSIONS else (name, "")
    return tuple(f"{folder}{slash}{stem}-{number}{end}" for number in range(images))


def _destination(url: str, number: int, image_format: str, job_id: str, settings: Settings) -> Destination:
    if not _S3.match(url):
        check_scheme(url, FIELD)
        if "@" in urlsplit(url).netloc:
            message = "No user name or password is sent with an upload; use a presigned URL."
            raise ApiError("INVALID_INPUTS", message, field=FIELD, requested=redacted(url))
        return Destination(url)
    if url.endswith("/") and url.count("/") > 3:
        url += f"{job_id}-{number}"
    if not settings.aws_s3_default_bucket:
        message = "Images go to the server's own bucket, and it has none: AWS_S3_DEFAULT_BUCKET is not set."
        raise ApiError("URL_NOT_ALLOWED", message, field=FIELD)
    bucket = settings.aws_s3_default_bucket
    location = parse_location(url, default_endpoint=settings.aws_s3_endpoint_url, default_bucket=bucket, field=FIELD)
    if not location.endpoint_is_default or location.bucket != bucket:
        message = f"Images go to the server's own bucket: s3:///{bucket}/… on its own endpoint, or a presigned URL."
        raise ApiError("URL_NOT_ALLOWED", message, field=FIELD, requested=str(location))
    if location.fname or location.sha256:
        raise ApiError("INVALID_INPUTS", "There is nothing to say after # of a place to upload to.", field=FIELD)
    return Destination("", replace(location, key=_image_key(location.key.rstrip("/"), image_format)))


def _image_key(key: str, image_format: str) -> str:
    """The key with the format's own extension: whatever a client asks for, it overwrites no model."""
    extension = f".{FILE_FORMATS[image_format].extension}"
    if key.lower().endswith(extension) or (image_format == "JPEG" and key.lower().endswith(".jpeg")):
        return key
    return key + extension


async def check_destinations(destinations: tuple[Destination, ...], settings: Settings, field: str = FIELD) -> None:
    """Say before anything is generated that an address is not allowed, which is looked at again on connecting.

    Raises:
        ApiError: URL_NOT_ALLOWED.
    """
    reach = Reach.of(settings)
    parts = [urlsplit(found.url) for found in destinations if found.url and not reach.everywhere]
    for host in {(part.hostname or "", part.port or (443 if part.scheme == "https" else 80)) for part in parts}:
        try:
            async with asyncio.timeout(settings.fetch_timeout):
                addresses = await look_up(*host)
        except (OSError, UnicodeError):
            message = f"The name {host[0]} cannot be resolved."
            raise ApiError("URL_NOT_ALLOWED", message, field=field, requested=host[0]) from None
        if not reach.permits(*host, addresses):
            raise not_allowed(host[0], field)
