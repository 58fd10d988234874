"""What others use to download one file, with their defaults."""

from __future__ import annotations

import functools
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Get = Callable[[str, Path], object]


def plain_urllib(url: str, path: Path) -> None:
    """The standard library's way: one GET, 64 KiB at a time."""
    with urllib.request.urlopen(url) as answer, path.open("wb") as file:
        shutil.copyfileobj(answer, file)


def plain_httpx(url: str, path: Path) -> None:
    """One GET as huggingface_hub does it over plain HTTP: httpx, written in blocks of 10 MiB."""
    import httpx

    with httpx.stream("GET", url, timeout=60) as answer, path.open("wb") as file:
        for block in answer.iter_bytes(10 * 2**20):
            file.write(block)


def plain_curl(url: str, path: Path) -> None:
    """One GET with curl."""
    subprocess.run(["curl", "--silent", "--fail", "--output", str(path), url], check=True)


@functools.cache
def _client(endpoint: str, keys: tuple[str, str] | None) -> Any:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    style = {"addressing_style": "path"}
    if keys:
        return boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=keys[0],
            aws_secret_access_key=keys[1],
            config=Config(s3=style),
        )
    config = Config(s3=style, signature_version=UNSIGNED)
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config)


def boto3_download(url: str, path: Path, keys: tuple[str, str] | None = None) -> None:
    """``download_file`` with its defaults: 10 threads, parts of 8 MiB."""
    parts = urlsplit(url)
    bucket, _, key = parts.path.lstrip("/").partition("/")
    _client(f"{parts.scheme}://{parts.netloc}", keys).download_file(bucket, key, str(path))


BASELINES: dict[str, tuple[Get, str]] = {
    "boto3": (boto3_download, "boto3 download_file with its defaults"),
    "urllib": (plain_urllib, "one GET with urllib and shutil.copyfileobj"),
    "httpx": (plain_httpx, "one GET with httpx in 10 MiB blocks as in huggingface_hub"),
    **({"curl": (plain_curl, "one GET with curl")} if shutil.which("curl") else {}),
}
