"""What the S3 tests share: a bucket, a server that only gives wrong answers, a small model to store."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.errors import ApiError
from api.models.locations import Location, parse_location
from api.models.s3 import Plan, urls
from api.models.s3_client import Access, connect

KEY, SECRET = "AKIAEXAMPLE", "s3cr3t-value"
ACCESS = Access(KEY, SECRET)
NOBODY = Access()


class Store:
    """One bucket of the server."""

    def __init__(self, endpoint: str, bucket: str) -> None:
        self.endpoint, self.bucket = endpoint, bucket
        self.client = connect(self.at("any.tar"), ACCESS)
        self.client.create_bucket(Bucket=bucket)

    def at(self, key: str, bucket: str | None = None, fragment: str = "") -> Location:
        return parse_location(f"s3:///{bucket or self.bucket}/{key}{fragment}", default_endpoint=self.endpoint)

    def put(self, key: str, body: bytes = b"x", **more: Any) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=body, **more)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def names(self) -> set[str]:
        return {entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", ())}

    def parts_left(self) -> int:
        return len(self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ()))


@contextlib.contextmanager
def raises(code: str, *words: str) -> Iterator[None]:
    with pytest.raises(ApiError) as error:
        yield
    shown = f"{error.value} {error.value.body()}"
    assert error.value.code == code, shown
    assert all(word in shown for word in words), shown
    assert SECRET not in shown
    assert KEY not in shown


def nothing(phase: str, done: int, total: int | None) -> None:
    pass


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


MODEL = {
    "model_index.json": b'{"_class_name": "X"}',
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": bytes(range(256)) * 4000,
    "vae/diffusion_pytorch_model.safetensors": bytes(range(255, -1, -1)) * 3000,
    "scheduler/empty.txt": b"",
}


def make(folder: Path, files: dict[str, bytes] = MODEL) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def fetched(plan: Plan, access: Access = ACCESS) -> dict[str, bytes]:
    return {path: httpx.get(url).raise_for_status().content for path, url in urls(plan, access).items()}


class Answers(http.server.BaseHTTPRequestHandler):
    """Says the same to everybody."""

    status, code = 200, ""

    def do_GET(self) -> None:
        if self.code == "cut":
            self.connection.close()
            return
        if self.code == "slow":
            time.sleep(1.5)
        text = f"<Error><Code>{self.code}</Code><Message>{KEY} {SECRET}</Message><AWSAccessKeyId>{KEY}</AWSAccessKeyId></Error>"
        body = text.encode() if self.code != "html" else b"<html><body>hello"
        with contextlib.suppress(OSError):
            self.send_response(self.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def answering(status: int, code: str) -> Iterator[str]:
    handler = type("Handler", (Answers,), {"status": status, "code": code})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
