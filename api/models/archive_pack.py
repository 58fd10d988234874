"""Packing a model folder as ``.tar.zst``, for upload.

Sources: POSIX.1-2017 pax (ustar and pax interchange formats), RFC 8878 (Zstandard).
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
from pathlib import Path
from typing import IO

from api.errors import ApiError
from api.models.manifest import FileEntry, OnProgress
from api.models.tar_members import BLOCK, unsafe

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_CHUNK = 2**20


def pack(folder: Path, out: IO[bytes], on_progress: OnProgress, *, level: int = 3) -> tuple[FileEntry, ...]:
    """Write a folder as ``.tar.zst``.

    The same files give the same bytes: sorted, no times, no owners, with a checksum in the frame.

    Args:
        folder: the model.
        out: gets the archive, in order.
        on_progress: called with ``upload`` and the bytes of files packed, of all.
        level: of Zstandard; weights hardly shrink more above 3.

    Returns:
        The files, sorted by path, with their sha256.

    Raises:
        ApiError: ARCHIVE_UNSAFE for what is neither file nor folder, MODEL_CORRUPT if a file changes meanwhile.
    """
    parts = zstd.CompressionParameter
    # with workers, even one, the result does not depend on how many there are
    workers = max(1, min(8, os.cpu_count() or 1))
    options: dict[int, int] = {parts.compression_level: level, parts.checksum_flag: 1, parts.nb_workers: workers}
    compressor = zstd.ZstdCompressor(options=options)

    def put(data: bytes) -> None:
        if compressed := compressor.compress(data):
            out.write(compressed)

    found = sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).parts)
    for path in found:
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise unsafe(path.relative_to(folder).as_posix(), "is neither a file nor a folder")
    total = sum(path.stat().st_size for path in found if path.is_file())
    put(_header("./", 0, is_folder=True))
    entries, packed = [], 0
    for path in found:
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            put(_header(f"./{name}/", 0, is_folder=True))
            continue
        digest = hashlib.sha256()
        with path.open("rb") as file:
            size = left = os.fstat(file.fileno()).st_size
            put(_header(f"./{name}", size, is_folder=False))
            while left:
                chunk = file.read(min(_CHUNK, left))
                if not chunk:
                    raise ApiError("MODEL_CORRUPT", f"{name} became shorter while it was packed.")
                digest.update(chunk)
                put(chunk)
                left -= len(chunk)
                packed += len(chunk)
                on_progress("upload", packed, total)
        put(bytes(-size % BLOCK))
        entries.append(FileEntry(name, size, digest.hexdigest()))
    put(bytes(2 * BLOCK))
    out.write(compressor.flush())
    return tuple(sorted(entries, key=lambda entry: entry.path))


def _header(name: str, size: int, *, is_folder: bool) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.type = tarfile.DIRTYPE if is_folder else tarfile.REGTYPE
    info.mode = 0o755 if is_folder else 0o644
    return info.tobuf(tarfile.PAX_FORMAT)
