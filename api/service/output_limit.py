"""How large the output of a job of RunPod's routes may be, and what becomes of one that is larger.

The platform gives 10 MB for ``run`` and 20 MB for ``runsync``: what a client gets here, it gets there as well.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from api.errors import ApiError
from api.models.locations import parse_location
from api.schema.generation import GenerationResult
from api.schema.videos import FILE_FORMATS, kind_of
from api.service.destinations import Destination
from api.service.upload import upload
from api.settings import Settings

RUN_LIMIT = 10 * 2**20
SYNC_LIMIT = 20 * 2**20
"""Bytes of an output, as JSON."""
_FOLDER = "runpod"
"""In the server's own bucket."""
_SMALLER = {
    "image": 'for image_format "JPEG" or "WEBP", or for fewer or smaller images',
    "video": "for mp4, a lower video_quality, or fewer or smaller frames",
}
"""What a client can ask for instead."""


async def within_limit(
    result: GenerationResult, image_format: str, job_id: str, settings: Settings, *, sync: bool
) -> GenerationResult:
    """The same result where it is small enough; else with its images in the server's bucket, where it has one.

    Args:
        result: images, or links.
        image_format: of the images or videos, one of ``FILE_FORMATS``.
        job_id: names a folder for the images.
        settings: the bucket.
        sync: ``runsync``, which may give more.

    Raises:
        ApiError: LIMIT_EXCEEDED, UPLOAD_FAILED.
    """
    limit = SYNC_LIMIT if sync else RUN_LIMIT
    size = size_of(result)
    if size > limit and result.images and settings.aws_s3_default_bucket:
        found = FILE_FORMATS[image_format]
        where = f"s3:///{settings.aws_s3_default_bucket}/{_FOLDER}/{job_id}/"
        folder = parse_location(where, default_endpoint=settings.aws_s3_endpoint_url)
        keys = [f"{folder.key}{number}.{found.extension}" for number in range(len(result.images))]
        destinations = [Destination("", replace(folder, key=key)) for key in keys]
        urls = await upload(destinations, result.images, found.content_type, settings)
        result = msgspec.structs.replace(result, images=[], urls=urls)
        size = size_of(result)
    if size <= limit:
        return result
    less = "for no latents" if result.urls else _SMALLER[kind_of(result.meta)]
    message = (
        f"The output has {size / 2**20:.1f} MB, and {'runsync' if sync else 'run'} gives {limit // 2**20} MB at most. "
        f"Ask {less}; or have the images put elsewhere, with s3Config or output_url, or by a server that has a bucket "
        "(AWS_S3_DEFAULT_BUCKET)."
    )
    raise ApiError("LIMIT_EXCEEDED", message)


def size_of(result: GenerationResult) -> int:
    """Bytes of a result as JSON, its images in base64."""
    encoded = sum(-(-len(part) // 3) * 4 for part in (*result.images, *result.extras.values()))
    return encoded + len(msgspec.json.encode([result.meta, result.timings, result.urls]))
