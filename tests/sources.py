"""Everything that models come from, on 127.0.0.1: a hub, an S3 server, a site; and a server that fetches from them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import httpx
import numpy as np
import pytest

from api.models.manifest import Manifest, read_manifest
from api.models.volume import Volume
from tests.hub import HubStandIn
from tests.running import Server, free_port, images_of

KEY, SECRET = "AKIAEXAMPLE", "s3cr3t-of-the-bucket"
TOKEN = "hf_s3cr3t-of-the-hub"  # noqa: S105
BUCKET = "models"
MOTO = shutil.which("moto_server", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")

PROMPT = {"prompt": "a red circle on a blue background", "seed": 5, "num_inference_steps": 4}


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """An S3 server in a process of its own; ``host:port``."""
    if MOTO is None:
        pytest.skip("moto_server is not installed: pip install 'moto[server]'")
    port = free_port()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([MOTO, "-H", "127.0.0.1", "-p", str(port)], **quiet) as process:  # type: ignore[call-overload]
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert process.poll() is None, "moto_server ended"
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


class Bucket:
    """One bucket of an S3 server."""

    def __init__(self, address: str, name: str = BUCKET) -> None:
        self.address, self.name = address, name
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://{address}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=botocore.config.Config(s3={"addressing_style": "path"}),
        )
        self.client.create_bucket(Bucket=name)

    def put(self, key: str, body: bytes, **more: Any) -> str:
        self.client.put_object(Bucket=self.name, Key=key, Body=body, **more)
        return f"s3:///{self.name}/{key}"

    def put_folder(self, key: str, folder: Path) -> str:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3:///{self.name}/{key}/"

    def names(self) -> set[str]:
        return {entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.name).get("Contents", ())}


def environ(models_dir: Path, hub: HubStandIn | None = None, s3: str = "", **more: str) -> dict[str, str]:
    """Of a server that may fetch from the stand-ins."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    return {
        "MODELS_DIR": str(models_dir),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(models_dir.parent / "hf-home"),
        "HF_ENDPOINT": hub.url if hub else nowhere,
        "HF_AUTH_TOKEN": TOKEN,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_S3_ENDPOINT_URL": f"http://{s3}" if s3 else nowhere,
        "AWS_S3_DEFAULT_BUCKET": BUCKET,
        "ALLOW_PRIVATE_URLS": "1",
        "HUB_CACHES": "",
        "OMP_NUM_THREADS": "1",  # several servers share the machine's cores
        **more,
    }


def draw(server: Server, **call: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """The picture of the usual prompt, and the whole answer."""
    response = server.post(PROMPT, call)
    assert response.status_code == 200, f"{call}: {response.text[:700]}"
    answer = response.json()
    return images_of(answer)[0].astype(int), answer


def refused(response: httpx.Response, *codes: str) -> dict[str, Any]:
    """The error of an answer that is one of these, and tells no secret."""
    error: dict[str, Any] = response.json()["$error"]
    assert error["code"] in codes, error
    assert 400 <= response.status_code < 500 or response.status_code in (502, 507), (response.status_code, error)
    no_secrets(response.text)
    return error


def no_secrets(text: str) -> None:
    for secret in (SECRET, KEY, TOKEN, "signed-and-secret", "X-Amz-Signature", "Traceback", '"stack"', "pa55word"):
        assert secret not in text, f"{secret} is told: {text[:500]}"


def is_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Up to one step of 255."""
    return a.shape == b.shape and int(np.abs(a - b).max()) <= 1


_VERIFIED: set[tuple[Path, str, str]] = set()


def installed(models_dir: Path, *, again: bool = False) -> dict[str, Manifest]:
    """What the volume holds, each read from end to end and found whole: once, or again."""
    volume = Volume(models_dir, None)
    found = {}
    for entry in volume.list():
        this = (models_dir, entry.key, entry.manifest.installed)
        if again or this not in _VERIFIED:
            assert volume.verify(entry.key) == [], entry.key
            _VERIFIED.add(this)
        manifest = read_manifest(models_dir / entry.key)
        assert manifest is not None
        found[entry.key] = manifest
    return found


def manifest_of(models_dir: Path, source: str, revision: str | None = None) -> Manifest:
    """Of the one model that came from there."""
    (found,) = [m for m in installed(models_dir).values() if m.source == source and revision in (None, m.revision)]
    return found
