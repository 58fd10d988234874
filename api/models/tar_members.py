"""The members of a tar archive: their headers, and whether each may be unpacked.

Headers are parsed with ``tarfile.TarInfo.frombuf``; the walk from member to member is ours, because
``TarFile.next`` takes a damaged or missing header after the first member for the end of the archive,
copies bodies several times, and reads extended headers of any size into memory.

Sources: POSIX.1-2017 pax (ustar and pax interchange formats), GNU tar manual appendix "Basic Tar Format".
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

from api.errors import ApiError

BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER = 2**20  # bytes of one extended header; real ones hold a path
_MAX_EXTENDED = 8  # extended headers before one member

_EXTENDED = b"xXgLK"  # types of headers that say more about the next member


class ByteReader:
    """Chunks as one run of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")
        self.position = 0

    def take(self, size: int) -> Iterator[memoryview]:
        """Exactly ``size`` bytes, in pieces that are not copied."""
        while size:
            if not self._rest:
                self._rest = memoryview(next(self._chunks, b""))
                if not self._rest:
                    raise corrupt(f"it ends after {self.position} bytes, in the middle")
            piece, self._rest = self._rest[:size], self._rest[size:]
            self.position += len(piece)
            size -= len(piece)
            yield piece

    def whole(self, size: int) -> bytes:
        """Exactly ``size`` bytes as one."""
        return b"".join(self.take(size))

    def drain(self, limit: int) -> None:
        """Read to the end, which must be near."""
        for chunk in self._chunks:
            limit -= len(chunk)
            if limit < 0:
                raise ApiError("ARCHIVE_UNSAFE", "The archive goes on long after its end marker.")


def read_members(data: ByteReader) -> Iterator[tarfile.TarInfo]:
    """Every member's header; the caller reads the body, padding included, before it goes on."""
    extra: dict[str, str] = {}
    extended = 0
    while any(block := data.whole(BLOCK)):
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except tarfile.HeaderError as fault:
            raise corrupt(f"{fault} {data.position - BLOCK} bytes in") from None
        except UnicodeDecodeError:
            raise unsafe(ascii(block[:100].rstrip(b"\0")), "has a name that is not UTF-8") from None
        if info.size < 0:
            raise unsafe(info.name, "has a negative size")
        if info.type in _EXTENDED:
            extended += 1
            if info.size > _MAX_HEADER or extended > _MAX_EXTENDED:
                raise unsafe(info.name, "has more extended headers than any real one")
            extra |= _extended(info, data.whole(info.size + -info.size % BLOCK)[: info.size])
            continue
        info.name = extra.get("path", info.name)
        if "size" in extra:
            if not (extra["size"].isascii() and extra["size"].isdigit() and len(extra["size"]) < 19):
                raise unsafe(info.name, "has a size that is no number")
            info.size = int(extra["size"])
        info.pax_headers = extra
        extra, extended = {}, 0
        yield info
    if extended:
        raise corrupt("a header is followed by nothing")


def _extended(info: tarfile.TarInfo, body: bytes) -> dict[str, str]:
    """What an extended header says about the next member."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(body.split(b"\0", 1)[0])}
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    records = _pax(body)
    if info.type != tarfile.XGLTYPE:
        return records
    if {"path", "size"} & set(records):
        raise unsafe(info.name, "changes the path or size of all others")
    return {}  # git writes its commit here


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise unsafe(ascii(raw[:100]), "has a name that is not UTF-8") from None


def _pax(body: bytes) -> dict[str, str]:
    """The records of a pax header, ``<length> <key>=<value>``; values of no interest are dropped."""
    records = {}
    while body and body[0]:
        length, space, _ = body.partition(b" ")
        count = int(length) if length.isdigit() and len(length) < 8 else 0
        record, body = body[:count], body[count:]
        key, equals, value = record[len(length) + 1 :].partition(b"=")
        if not (space and equals and value.endswith(b"\n")):
            raise corrupt("a pax header cannot be read")
        name = key.decode("utf-8", "replace")
        records[name] = _text(value[:-1]) if name in ("path", "size") else ""
    return records


def safe_name(info: tarfile.TarInfo) -> str:
    """The member's path below the folder, empty for the root itself; raises ARCHIVE_UNSAFE."""
    name = info.name
    if info.issparse() or any(key.startswith("GNU.sparse") for key in info.pax_headers):
        raise unsafe(name, "is sparse")
    if info.issym() or info.islnk():
        raise unsafe(name, "is a link")
    if not (info.type in tarfile.REGULAR_TYPES or info.isdir()) or info.type == tarfile.CONTTYPE:
        raise unsafe(name, "is neither a file nor a folder")
    if name.startswith("/"):
        raise unsafe(name, "has an absolute path")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise unsafe(name, 'has ".." in its path')
    if not name.isprintable() or "\\" in name or len(name) > 1000 or any(len(p.encode()) > 255 for p in parts):
        raise unsafe(name, "has a name that is not valid")
    if not parts and not info.isdir():
        raise unsafe(name, "has no name")
    if info.isdir() and info.size:
        raise unsafe(name, "is a folder with content")
    return "/".join(parts)


def unsafe(name: str, why: str) -> ApiError:
    """ARCHIVE_UNSAFE, about one member."""
    return ApiError("ARCHIVE_UNSAFE", f"The archive's member {name[:200]!r} {why}.", requested=name[:200])


def corrupt(why: str) -> ApiError:
    """MODEL_CORRUPT, about the archive."""
    return ApiError("MODEL_CORRUPT", f"The archive is damaged: {why}.")
