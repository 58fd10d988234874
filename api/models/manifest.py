"""What an installed model consists of: its files, where they came from, and whether they are all there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from api.models.safetensors_check import safetensors_problem

MANIFEST_NAME = ".manifest.json"
"""The file in a model's folder that holds its ``Manifest``; a folder without one is not an installed model."""

OnProgress = Callable[[str, int, int | None], None]
"""Called with (phase, bytes done, bytes total or None); the phase is download, extract, upload or convert.
A fetch is stopped by raising from it."""

_FORMAT = 1
_HALF_MANIFEST = MANIFEST_NAME + ".part"
_CHUNK = 2**20
_READERS = 4
_WEIGHTS = (".safetensors", ".bin")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
# classes that are saved as configuration only, anywhere in the name: CLIPImageProcessorPil, T5TokenizerFast,
# TokenizersBackend
WEIGHTLESS = re.compile(r"Tokenizer|Scheduler|Processor|Extractor|Guidance|Guider|^Mel$")


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a model.

    Attributes:
        path: relative to the model's folder, with ``/``.
        size: bytes.
        sha256: in hex, where it was known before or was computed.
    """

    path: str
    size: int
    sha256: str | None


class Manifest(msgspec.Struct, frozen=True):
    """What was installed.

    Attributes:
        model_id: the model's name.
        source: where it came from, without credentials.
        revision: commit, ETag or digest: what identifies the content at the source.
        variant: which weight files: empty, ``fp16`` or ``bf16``.
        files: every file, without the manifest itself.
        verified: the hashes were compared with what the source gave.
        installed: ISO 8601, UTC.
        trusted: the operator named the source, not a request.
        format: of this description.
        adapter: ``lora``, ``inversion`` or ``upscaler``, where it is no model.
        part: what of a pipeline this is (``parts``); empty: all of it.
    """

    model_id: str
    source: str
    revision: str
    variant: str
    files: tuple[FileEntry, ...]
    verified: bool
    installed: str
    trusted: bool = False
    format: int = _FORMAT
    adapter: str = ""
    part: str = ""


def is_safe_path(path: str) -> bool:
    """Whether a relative path names something inside the folder it is relative to."""
    return (
        len(path) <= 1000
        and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in path.split("/"))
        and not any(character in path for character in "\\\0")
    )


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None where there is none that can be understood."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    if manifest.format != _FORMAT or not all(is_safe_path(entry.path) for entry in manifest.files):
        return None
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into a folder, whole or not at all, and through to the disk.

    Raises:
        OSError: it could not be written.
    """
    temporary = folder / _HALF_MANIFEST
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    fsync(temporary)
    temporary.replace(folder / MANIFEST_NAME)
    fsync(folder)


def fsync(path: Path) -> None:
    """Write a file or folder through to the disk.

    Raises:
        OSError: the disk failed or is full; some file systems notice that only here.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as fault:
        # some network file systems cannot do it, for folders above all; there is nothing better to do
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def walk(folder: Path, below: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Everything under a folder as (relative path, ``lstat``), a folder after what it holds.

    Links are not followed; what vanishes meanwhile is left out.

    Raises:
        OSError: a folder cannot be read.
    """
    try:
        found = list(os.scandir(folder / below))
    except FileNotFoundError:
        return
    for entry in sorted(found, key=lambda e: e.name):
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from walk(folder, path)
        try:
            yield path, entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """An entry, without hash, for every regular file under a folder, the manifest and a half-written one left out.

    Raises:
        OSError: a folder cannot be read.
    """
    return tuple(
        FileEntry(path, status.st_size, None)
        for path, status in walk(folder)
        if stat.S_ISREG(status.st_mode) and path not in (MANIFEST_NAME, _HALF_MANIFEST)
    )


def sizes_match(folder: Path, files: Sequence[FileEntry]) -> bool:
    """Whether every file is there, is a regular file and has its size."""
    try:
        for entry in files:
            status = (folder / entry.path).lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
                return False
    except OSError:
        return False
    return bool(files)


def size_problems(folder: Path, files: Sequence[FileEntry]) -> list[str]:
    """What ``sizes_match`` misses, in words; reaching a file through a link is a problem too.

    Raises:
        OSError: a folder cannot be read.
    """
    sizes = {entry.path: entry.size for entry in list_files(folder)}
    return [
        f"{entry.path} has {sizes[entry.path]} bytes instead of {entry.size}"
        if entry.path in sizes
        else f"{entry.path} is missing"
        for entry in files
        if sizes.get(entry.path) != entry.size
    ]


def examine(
    folder: Path, files: Sequence[FileEntry], hashes: Mapping[str, str], *, sync: bool
) -> tuple[tuple[FileEntry, ...], list[str]]:
    """Compare hashes and read safetensors headers, a few files at a time.

    Args:
        folder: where the files are; their sizes are right.
        files: what they should be.
        hashes: SHA-256 in hex by path, where it was computed already; such a file is not read again.
        sync: write each file through to the disk.

    Returns:
        The entries with their hashes, and the problems in words.

    Raises:
        OSError: a file could not be written through.
    """

    def one(entry: FileEntry) -> tuple[FileEntry, str | None]:
        path = folder / entry.path
        try:
            computed = (hashes.get(entry.path) or sha256_of(path)).lower()
            problem = safetensors_problem(path) if path.suffix == ".safetensors" else None
        except OSError as fault:
            return entry, f"cannot be read: {fault.strerror}"
        if entry.sha256 is not None and computed != entry.sha256.lower():
            problem = f"has the SHA-256 {computed} instead of {entry.sha256.lower()}"
        if sync:
            fsync(path)
        return msgspec.structs.replace(entry, sha256=computed), problem

    with ThreadPoolExecutor(_READERS, thread_name_prefix="examine") as pool:
        results = list(pool.map(one, files))
    problems = [f"{entry.path} {problem}" for entry, problem in results if problem]
    return tuple(entry for entry, _ in results), problems


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def missing_parts(folder: Path, part: str = "") -> list[str]:
    """What a diffusers folder lacks of what its ``model_index.json`` names, in words.

    A component is a pair [library, class]; one of nulls was left out on purpose. Each has a folder, a
    scheduler its configuration, and what is saved with weights a whole set of them.

    Args:
        folder: to look into.
        part: where not all of a pipeline is to be there, but one part of it.
    """
    if part:
        problem = None if (folder / part).is_file() else _component_problem(folder / part, "diffusers", "")
        return [f"{'it' if part == '.' else part} {problem}"] if problem else []
    try:
        index = msgspec.json.decode((folder / "model_index.json").read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return ["model_index.json is missing"]
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as fault:
        return [f"model_index.json cannot be read: {fault}"]
    problems = [] if isinstance(index.get("_class_name"), str) else ["model_index.json names no pipeline class"]
    for name, value in index.items():
        if name.startswith("_") or not (isinstance(value, list) and len(value) == 2):
            continue
        library, class_name = value
        if isinstance(library, str) and isinstance(class_name, str):
            if not is_safe_path(name):
                problems.append(f"model_index.json names a component {name!r}")
            elif problem := _component_problem(folder / name, library, class_name):
                problems.append(f"{name} ({class_name}) {problem}")
    return problems


def _component_problem(folder: Path, library: str, class_name: str) -> str | None:
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if not names:
        return "is missing"
    if class_name.endswith("Scheduler"):
        return None if "scheduler_config.json" in names else "has no scheduler_config.json"
    if WEIGHTLESS.search(class_name) or not (library in ("diffusers", "transformers") or "config.json" in names):
        return None
    if "config.json" not in names:
        return "has no config.json"
    weights = {name for name in names if name.endswith(_WEIGHTS)}
    if any(not _SHARD.search(name) for name in weights):
        return None
    missing: list[str] = []
    for name in sorted(n for n in names if _INDEX.search(n)):
        missing = sorted(_shards(folder / name) - weights)
        if not missing:
            return None
    return f"lacks {missing[0]}" if missing else "has no weights"


def _shards(index: Path) -> set[str]:
    class Index(msgspec.Struct):
        weight_map: dict[str, str]

    try:
        return set(msgspec.json.decode(index.read_bytes(), type=Index).weight_map.values()) or {"its weights"}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {f"a readable {index.name}"}
