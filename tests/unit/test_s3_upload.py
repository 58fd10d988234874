"""Uploads that are there whole, or are not taken for a model."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.errors import ApiError
from api.models import s3_upload
from api.models.locations import parse_location
from api.models.manifest import MANIFEST_NAME, Manifest, OnProgress, list_files, write_manifest
from api.models.s3 import resolve
from api.models.s3_upload import upload
from tests.running import ROOT
from tests.s3 import (
    ACCESS,
    MODEL,
    Store,
    answering,
    fetched,
    make,
    nothing,
    raises,
    sha256,
)

pytest_plugins = ("tests.s3_server",)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("only_our_credentials", "one_loader")]


def pack(folder: Path, out: Any, on_progress: OnProgress) -> None:
    """Stands in for the real one: names and contents one after another."""
    for entry in list_files(folder):
        content = (folder / entry.path).read_bytes()
        out.write(entry.path.encode() + content)
        on_progress("upload", len(content), None)


def packed(folder: Path) -> bytes:
    out = io.BytesIO()
    pack(folder, out, nothing)
    return out.getvalue()


def test_a_folder_goes_there_and_back(store: Store, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    plan = upload(make(tmp_path), store.at("m/"), lambda *event: seen.append(event), ACCESS)
    assert {file.path: file.sha256 for file in plan.files} == {name: sha256(content) for name, content in MODEL.items()}
    assert fetched(plan) == MODEL
    total = sum(map(len, MODEL.values()))
    assert seen[-1] == ("upload", total, total)
    assert {phase for phase, _, _ in seen} == {"upload"}


def test_the_manifest_of_the_volume_goes_with_it(store: Store, tmp_path: Path) -> None:
    files = tuple(msgspec.structs.replace(f, sha256=sha256(MODEL[f.path])) for f in list_files(make(tmp_path)))
    manifest = Manifest("org/name", "hub", "c" * 40, "fp16", files, True, "2026-01-01T00:00:00+00:00")
    write_manifest(tmp_path, manifest)
    (tmp_path / "not listed").write_bytes(b"x")
    upload(tmp_path, store.at("m/"), nothing, ACCESS)
    assert msgspec.json.decode(store.get(f"m/{MANIFEST_NAME}"), type=Manifest) == manifest
    assert store.names() == {f"m/{name}" for name in [*MODEL, MANIFEST_NAME]}
    (tmp_path / "unet/config.json").write_bytes(b"longer")
    with raises("MODEL_CORRUPT"):
        upload(tmp_path, store.at("other/"), nothing, ACCESS)
    assert not any(key.startswith("other/") for key in store.names())


def test_what_an_older_model_left_there_is_no_part_of_the_new_one(store: Store, tmp_path: Path) -> None:
    upload(make(tmp_path / "old", MODEL | {"unet/old.bin": b"old"}), store.at("m/"), nothing, ACCESS)
    plan = upload(make(tmp_path / "new"), store.at("m/"), nothing, ACCESS)
    assert "m/unet/old.bin" in store.names()
    assert {file.path for file in plan.files} == set(MODEL)


@pytest.mark.parametrize("moment", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_half_an_upload_is_no_model_and_the_next_one_is(store: Store, tmp_path: Path, moment: float) -> None:
    """Also where a whole model lay before."""
    upload(make(tmp_path / "old", MODEL | {"unet/config.json": b"[]"}), store.at("m/"), nothing, ACCESS)
    folder = make(tmp_path / "new")

    def stop(phase: str, done: int, total: int | None) -> None:
        assert total
        # the last file is the index: at 1.0 all other files are there
        if done >= moment * (total - len(MODEL["model_index.json"])):
            raise InterruptedError("stopped")

    with pytest.raises(InterruptedError):
        upload(folder, store.at("m/"), stop, ACCESS)
    with raises("MODEL_NOT_FOUND", "incomplete upload"):
        resolve(store.at("m/"), ACCESS)
    assert fetched(upload(folder, store.at("m/"), nothing, ACCESS)) == MODEL


def test_a_killed_upload_is_no_model(store: Store, tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom api.models.locations import parse_location\n"
        "from api.models.s3_client import Access\nfrom api.models.s3_upload import upload\n"
        "def die(phase, done, total):\n    if done > total // 2: os._exit(9)\n"
        "where = parse_location(sys.argv[2], default_endpoint=sys.argv[3])\n"
        "upload(Path(sys.argv[1]), where, die, Access('k', 's'))\n"
    )
    arguments = [str(make(tmp_path)), f"s3:///{store.bucket}/m/", store.endpoint]
    assert subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, check=False).returncode == 9
    with raises("MODEL_NOT_FOUND", "incomplete upload"):
        resolve(store.at("m/"), ACCESS)


def test_a_file_that_went_missing_or_changed_its_size_is_noticed(store: Store, tmp_path: Path) -> None:
    upload(make(tmp_path), store.at("m/"), nothing, ACCESS)
    store.put("m/unet/config.json", b"longer")
    with raises("MODEL_NOT_FOUND", "unet/config.json"):
        resolve(store.at("m/"), ACCESS)
    store.client.delete_object(Bucket=store.bucket, Key="m/unet/config.json")
    with raises("MODEL_NOT_FOUND", "unet/config.json"):
        resolve(store.at("m/"), ACCESS)
    store.put(f"m/{MANIFEST_NAME}", b"{")
    with raises("MODEL_NOT_FOUND", MANIFEST_NAME):
        resolve(store.at("m/"), ACCESS)


def test_a_stop_that_is_no_exception_ends_the_upload_too(store: Store, tmp_path: Path) -> None:
    def stop(phase: str, done: int, total: int | None) -> None:
        raise asyncio.CancelledError

    began = time.monotonic()
    for key in ("m/", "m.tar.zst", "m.safetensors"):
        source = make(tmp_path / "m") if key != "m.safetensors" else tmp_path / "m/model_index.json"
        with pytest.raises(asyncio.CancelledError):
            upload(source, store.at(key), stop, ACCESS, pack=pack)
    assert time.monotonic() - began < 60
    # a file so small that it had been sent may be there, and is whole
    assert store.names() <= {"m.safetensors", *(f"m/{name}" for name in MODEL)}
    assert store.get("m/model_index.json") == b""


def test_a_folder_without_a_model_or_with_links_is_not_uploaded(store: Store, tmp_path: Path) -> None:
    with raises("MODEL_NOT_FOUND", "model_index.json"):
        upload(make(tmp_path / "a", {"x": b""}), store.at("m/"), nothing, ACCESS)
    (make(tmp_path / "b") / "link").symlink_to("/etc/hostname")
    with raises("ARCHIVE_UNSAFE", "link"):
        upload(tmp_path / "b", store.at("m/"), nothing, ACCESS)
    assert store.names() == set()


def test_sources_that_do_not_fit_the_location(store: Store, tmp_path: Path) -> None:
    file = make(tmp_path) / "model_index.json"
    for source, key, packer in [
        (file, "m/", None),
        (tmp_path, "m.tar.zst", None),
        (tmp_path, "m.tar", pack),
        (tmp_path, "m.ckpt", pack),
    ]:
        with pytest.raises(ValueError, match="cannot be uploaded"):
            upload(source, store.at(key), nothing, ACCESS, pack=packer)


def test_a_file_in_parts(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload, "_THRESHOLD", 5 * 2**20)
    monkeypatch.setattr(s3_upload, "_PART", 5 * 2**20)
    content = os.urandom(11 * 2**20)
    (tmp_path / "m.safetensors").write_bytes(content)
    seen: list[int] = []
    plan = upload(tmp_path / "m.safetensors", store.at("m.safetensors"), lambda p, done, t: seen.append(done), ACCESS)
    (file,) = plan.files
    assert file.etag.endswith('-3"')
    assert (file.size, file.sha256, file.md5) == (len(content), sha256(content), None)
    assert seen[-1] == len(content)
    assert fetched(plan) == {"m.safetensors": content}


def test_a_folder_is_packed_while_it_is_uploaded(store: Store, tmp_path: Path) -> None:
    seen: list[str] = []
    plan = upload(make(tmp_path), store.at("m.tar.zst"), lambda phase, d, t: seen.append(phase), ACCESS, pack=pack)
    assert fetched(plan) == {"m.tar.zst": packed(tmp_path)}
    assert seen == ["upload"] * len(MODEL)


@pytest.mark.parametrize("size", [1000, 12 * 2**20])
def test_an_archive_that_could_not_be_finished_does_not_appear(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(s3_upload, "_THRESHOLD", 5 * 2**20)
    monkeypatch.setattr(s3_upload, "_STREAM_PART", 5 * 2**20)
    store.put("m.tar.zst", b"the old one")

    def fails(folder: Path, out: Any, on_progress: OnProgress) -> None:
        out.write(bytes(size))
        raise ApiError("MODEL_CORRUPT", "a file became shorter")

    with raises("MODEL_CORRUPT", "shorter"):
        upload(make(tmp_path), store.at("m.tar.zst"), nothing, ACCESS, pack=fails)
    assert store.get("m.tar.zst") == b"the old one"
    assert store.parts_left() == 0


def test_a_refused_archive_does_not_wait_for_the_packing(impatient: None, tmp_path: Path) -> None:
    written = 0

    def long(folder: Path, out: Any, on_progress: OnProgress) -> None:
        nonlocal written
        for _ in range(400):
            out.write(bytes(2**20))
            written += 1

    with answering(403, "AccessDenied") as endpoint, raises("SOURCE_DENIED"):
        location = parse_location("s3:///bucket/m.tar.zst", default_endpoint=endpoint)
        upload(make(tmp_path), location, nothing, ACCESS, pack=long)
    assert written < 300


@pytest.mark.parametrize(
    ("status", "ours"), [(403, "SOURCE_DENIED"), (404, "MODEL_NOT_FOUND"), (500, "SOURCE_UNREACHABLE")]
)
def test_faults_of_an_upload(impatient: None, tmp_path: Path, status: int, ours: str) -> None:
    make(tmp_path)
    with answering(status, "AccessDenied" if status == 403 else "") as endpoint:
        for key in ("m/", "m.safetensors", "m.tar.zst"):
            location = parse_location(f"s3:///bucket/{key}", default_endpoint=endpoint)
            source = tmp_path if key != "m.safetensors" else tmp_path / "unet/config.json"
            with raises(ours, *(["may write it"] if status == 403 else [])):
                upload(source, location, nothing, ACCESS, pack=pack)
