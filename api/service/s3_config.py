"""RunPod's ``s3Config``: the images of a job go to its client's bucket, with its client's keys.

The keys sign addresses and are sent nowhere: each image is PUT to a signed address, through the guard that every
address of a client passes, and the output has links that are signed to be read.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from api.errors import ApiError
from api.models.locations import Location, parse_location
from api.models.s3_client import Access, connect
from api.schema.videos import FILE_FORMATS
from api.service.destinations import Destination, check_destinations
from api.service.fetch import check_scheme
from api.settings import Settings

FIELD = "s3Config"
_VALID = 7 * 86400
"""Seconds that signed addresses are good for: the longest that a signature can be."""
_LONGEST = 1024


class S3Config(msgspec.Struct, frozen=True, rename="camel"):
    """A bucket and the keys to it."""

    access_id: str
    access_secret: str
    bucket_name: str
    endpoint_url: str
    object_path: str = ""

    def __repr__(self) -> str:  # without the keys
        return f"S3Config({self.endpoint_url}, {self.bucket_name})"


_NAMES = S3Config.__struct_encode_fields__


def read_s3_config(value: Any) -> S3Config:
    """Check its shape.

    Raises:
        ApiError: INVALID_INPUTS, UNKNOWN_INPUT, MISSING_INPUT, URL_NOT_ALLOWED; none of them shows a key.
    """
    if not isinstance(value, dict):
        raise ApiError("INVALID_INPUTS", f"Must be an object with {', '.join(_NAMES[:4])}.", field=FIELD)
    for name in value:
        if name not in _NAMES:
            raise ApiError("UNKNOWN_INPUT", "Unknown key.", field=f"{FIELD}.{name[:200]}", available=list(_NAMES))
    sent = {name: text for name, text in value.items() if text is not None}
    for name in _NAMES[:4]:
        if not sent.get(name):
            message = f"s3Config needs {', '.join(_NAMES[:4])}."
            raise ApiError("MISSING_INPUT", message, field=f"{FIELD}.{name}")
    for name, text in sent.items():
        if not isinstance(text, str) or len(text) > _LONGEST:
            message = f"Must be a string of at most {_LONGEST} characters."
            raise ApiError("INVALID_INPUTS", message, field=f"{FIELD}.{name}")
    config = msgspec.convert(sent, S3Config)
    check_scheme(config.endpoint_url, f"{FIELD}.endpointUrl")
    _folder(config, "j" * 112)  # as long as the id of a job and the name of an image may be
    return config


async def check_s3_config(config: S3Config, settings: Settings) -> None:
    """Say before anything is generated that its endpoint is not allowed; each connection is looked at again.

    Raises:
        ApiError: URL_NOT_ALLOWED.
    """
    try:
        await check_destinations((Destination(_endpoint(config)),), settings)
    except ApiError as error:
        error.field = f"{FIELD}.endpointUrl"
        raise


def s3_destinations(config: S3Config, images: int, image_format: str, job_id: str) -> tuple[Destination, ...]:
    """Where each image goes; makes no connection, but blocks for a tenth of a second.

    Args:
        config: as ``read_s3_config`` gave it.
        images: how many there are.
        image_format: one of ``FILE_FORMATS``.
        job_id: names their folder.
    """
    found = FILE_FORMATS[image_format]
    folder = _folder(config, job_id)
    client = connect(folder, Access(access_key=config.access_id, secret_key=config.access_secret))

    def signed(method: str, number: int, **more: str) -> str:
        where = {"Bucket": folder.bucket, "Key": f"{folder.key}{number}.{found.extension}", **more}
        return str(client.generate_presigned_url(method, Params=where, ExpiresIn=_VALID))

    return tuple(
        Destination(signed("put_object", number, ContentType=found.content_type), link=signed("get_object", number))
        for number in range(images)
    )


def _folder(config: S3Config, job_id: str) -> Location:
    path = "/".join(part for part in (config.bucket_name, config.object_path.strip("/"), job_id) if part)
    try:
        location = parse_location(f"s3:///{path}/", default_endpoint=_endpoint(config), field=FIELD)
    except ApiError as error:
        message = error.message.replace("AWS_S3_ENDPOINT_URL", "endpointUrl")
        raise ApiError("INVALID_INPUTS", message, field=FIELD) from None
    if (location.bucket, location.fname, location.sha256) != (config.bucket_name, None, None):
        message = "bucketName and objectPath must be names, without # and without / at their ends."
        raise ApiError("INVALID_INPUTS", message, field=FIELD)
    return location


def _endpoint(config: S3Config) -> str:
    """The service's address, also where the bucket's was given: ``https://bucket.s3.eu-west-1.amazonaws.com``."""
    parts = urlsplit(config.endpoint_url)
    host = parts.netloc.removeprefix(f"{config.bucket_name}.")
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), parts.query, ""))
