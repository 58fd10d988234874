"""Models of a few hundred bytes for tests of the volume; imports nothing heavy, as child processes use it too."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from api.models.manifest import FileEntry, Manifest
from api.models.volume import Volume

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def safetensors(data: bytes) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def model_files(revision: str = "1", size: int = 100, extra: int = 0) -> dict[str, bytes]:
    """The files of a model; ``size`` bytes of weights in the UNet, ``extra`` more configuration files."""
    config = json.dumps({"revision": revision}).encode()
    files = {
        "model_index.json": json.dumps(INDEX).encode(),
        "scheduler/scheduler_config.json": config,
        "text_encoder/config.json": config,
        "text_encoder/model.safetensors": safetensors(b"t" + revision.encode()),
        "tokenizer/vocab.json": config,
        "unet/config.json": config,
        "unet/diffusion_pytorch_model.safetensors": safetensors((revision.encode() * size)[:size]),
    }
    return files | {f"tokenizer/more/{n}.json": config for n in range(extra)}


def size_of(revision: str = "1", size: int = 100) -> int:
    return sum(map(len, model_files(revision, size).values()))


def write(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def manifest_of(files: dict[str, bytes], revision: str = "1", hashes: bool = True) -> Manifest:
    entries = tuple(
        FileEntry(path, len(content), hashlib.sha256(content).hexdigest() if hashes else None)
        for path, content in files.items()
    )
    return Manifest("org/name", "test", revision, "", entries, hashes, "2026-01-01T00:00:00+00:00")


def install(volume: Volume, key: str, revision: str = "1", size: int = 100, extra: int = 0) -> Path:
    """Install a model, resuming what is staged: only files that are not there whole are written."""
    files = model_files(revision, size, extra)
    with volume.install(key, accept=lambda m: m.revision == revision) as installation:
        if installation.installed:
            return installation.installed
        installation.expect(revision)
        for path, content in files.items():
            target = installation.staging / path
            if not target.exists() or target.stat().st_size != len(content):
                write(installation.staging, {path: content})
        return installation.commit(manifest_of(files, revision))
