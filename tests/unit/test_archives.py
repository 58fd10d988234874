"""Archives: what is unpacked is what was packed, and nothing else is ever written."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import random
import stat
import tarfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.errors import ApiError
from api.models.archive_pack import pack
from api.models.archives import KINDS, extract, kind_of, zstd

pytestmark = pytest.mark.slow

LIMITS = (2**30, 1000)


def quiet(phase: str, done: int, total: int | None) -> None:
    pass


def tar_of(*members: tuple[str | tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if isinstance(member, str) and member.endswith("/"):
                info.type = tarfile.DIRTYPE
            if info.type == tarfile.REGTYPE:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def special(name: str, kind: bytes, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


def unpack(data: bytes, folder: Path, kind: str = "tar", limits: tuple[int, int] = LIMITS) -> dict[str, bytes]:
    entries = extract(io.BytesIO(data), kind, folder, quiet, *limits)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert [e.path for e in entries] == sorted(found)
    for entry in entries:
        assert (entry.size, entry.sha256) == (len(found[entry.path]), hashlib.sha256(found[entry.path]).hexdigest())
    return found


def refused(data: bytes, folder: Path, kind: str = "tar", limits: tuple[int, int] = LIMITS) -> ApiError:
    with pytest.raises(ApiError) as error:
        unpack(data, folder, kind, limits)
    assert not folder.exists(), "something was left behind"
    return error.value


COMPRESS = {"tar": bytes, "tar.gz": gzip.compress, "tar.zst": zstd.compress}
FILES = {"model_index.json": b"{}", "unet/w.safetensors": random.Random(1).randbytes(3_000_001), "vae/empty": b""}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("below", ["", "./", "model/", "./a/"])
def test_every_kind_and_layout(tmp_path: Path, kind: str, below: str, form: int) -> None:
    members = [(below + name, data) for name, data in FILES.items()]
    assert unpack(COMPRESS[kind](tar_of(*members, form=form)), tmp_path / "m", kind) == FILES


def test_an_archive_with_a_root_entry_keeps_its_only_folder(tmp_path: Path) -> None:
    assert unpack(tar_of(("./", b""), ("./unet/a", b"1")), tmp_path / "m") == {"unet/a": b"1"}


def test_a_top_folder_that_holds_one_of_its_own_name(tmp_path: Path) -> None:
    assert unpack(tar_of(("a/a/b", b"1"), ("a/c", b"2")), tmp_path / "m") == {"a/b": b"1", "c": b"2"}


def test_modes_are_ours(tmp_path: Path) -> None:
    folder, file = tarfile.TarInfo("d"), tarfile.TarInfo("d/f")
    folder.type, folder.mode, file.mode = tarfile.DIRTYPE, 0o7777, 0o6777
    before = os.umask(0o077)
    try:
        unpack(tar_of((folder, b""), (file, b"x"), ("g", b"")), tmp_path / "m")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m/d").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "m/d/f").stat().st_mode) == 0o644


LONG = "x" * 200 + "/" + "y" * 200


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", [LONG, "größe/模型.json"])
def test_long_and_foreign_names(tmp_path: Path, name: str, form: int) -> None:
    assert unpack(tar_of((name, b"1"), ("z", b""), form=form), tmp_path / "m") == {name: b"1", "z": b""}


def sparse() -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo("s")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s"}
    return info, b"0\n"


def pax_size(value: str) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo("p")
    info.pax_headers = {"size": value}
    return info, b""


UNSAFE = {
    "absolute": ("/etc/x", b""),
    "parent": ("../x", b""),
    "parent inside": ("a/../../x", b""),
    "parent harmless": ("a/../x", b""),
    "symlink": special("l", tarfile.SYMTYPE, "/etc/passwd"),
    "symlink inside": special("l", tarfile.SYMTYPE, "a"),
    "hard link": special("l", tarfile.LNKTYPE, "ok"),
    "character device": special("c", tarfile.CHRTYPE),
    "block device": special("b", tarfile.BLKTYPE),
    "fifo": special("f", tarfile.FIFOTYPE),
    "contiguous": special("t", tarfile.CONTTYPE),
    "unknown type": special("u", b"Z"),
    "sparse": sparse(),
    "newline": ("a\nb", b""),
    "backslash": ("..\\x", b""),
    "too long": ("x" * 300, b""),
    "no name": (".", b"x"),
    "twice": ("ok", b"2"),
    "file as folder": ("ok/x", b""),
    "negative pax size": pax_size("-1"),
    "senseless pax size": pax_size("٣"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_members_are_refused_and_named(tmp_path: Path, case: str) -> None:
    member = UNSAFE[case]
    error = refused(tar_of(("ok", b"1"), member), tmp_path / "in" / "m")
    assert error.code == "ARCHIVE_UNSAFE"
    name = member[0] if isinstance(member[0], str) else member[0].name
    assert repr(name[:200].rstrip("/")) in error.message
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert not any((tmp_path / "in").iterdir())


def test_a_folder_where_a_file_is(tmp_path: Path) -> None:
    assert refused(tar_of(("d/", b""), ("d", b"x")), tmp_path / "m").code == "ARCHIVE_UNSAFE"


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    data = bytearray(tar_of(("aaaa", b"1"), form=tarfile.USTAR_FORMAT))
    data[0:4] = b"\xff\xfe\xfda"
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    assert refused(bytes(data), tmp_path / "m").code == "ARCHIVE_UNSAFE"


def test_a_global_header_must_not_rename(tmp_path: Path) -> None:
    def with_global(records: dict[str, str]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers=records) as tar:
            tar.addfile(tarfile.TarInfo("a"))
        return out.getvalue()

    assert refused(with_global({"path": "/etc/x"}), tmp_path / "m").code == "ARCHIVE_UNSAFE"
    assert unpack(with_global({"comment": "a commit"}), tmp_path / "m") == {"a": b""}


def test_headers_do_not_fill_the_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**31
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert refused(header + bytes(2**20), tmp_path / "m").code == "ARCHIVE_UNSAFE"
    info.size = 0
    assert refused(info.tobuf(tarfile.GNU_FORMAT) * 1000 + bytes(1024), tmp_path / "m").code == "ARCHIVE_UNSAFE"


def test_limits(tmp_path: Path) -> None:
    data = tar_of(*((f"f{i}", b"12345") for i in range(10)))
    assert len(unpack(data, tmp_path / "whole", limits=(50, 10))) == 10
    assert "limit of 49 bytes" in refused(data, tmp_path / "m", limits=(49, 10)).message
    assert "at most 9" in refused(data, tmp_path / "m", limits=(50, 9)).message


@pytest.mark.parametrize("kind", ["tar.gz", "tar.zst"])
@pytest.mark.parametrize("where", ["member", "padding"])
def test_bombs(tmp_path: Path, kind: str, where: str) -> None:
    zeros = bytes(200 * 2**20)
    data = COMPRESS[kind](tar_of(("a", zeros)) if where == "member" else tar_of(("a", b"")) + zeros)
    assert len(data) < 2**20
    assert refused(data, tmp_path / "m", kind).code == "ARCHIVE_UNSAFE"


def test_a_window_of_2_gib_is_refused(tmp_path: Path) -> None:
    options = {zstd.CompressionParameter.window_log: 30, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    data = compressor.compress(tar_of(("a", b"x"))) + compressor.flush()
    assert refused(data, tmp_path / "m", "tar.zst").code == "MODEL_CORRUPT"


WHOLE = tar_of(*FILES.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tenth", range(10))
def test_truncation_is_found(tmp_path: Path, kind: str, tenth: int) -> None:
    data = COMPRESS[kind](WHOLE)
    assert refused(data[: len(data) * tenth // 10], tmp_path / "m", kind).code == "MODEL_CORRUPT"


@pytest.mark.parametrize("kind", ["tar.gz", "tar.zst"])
def test_a_cut_off_checksum_is_found(tmp_path: Path, kind: str) -> None:
    (tmp_path / "src").mkdir()
    out = io.BytesIO()
    pack(tmp_path / "src", out, quiet)
    data = out.getvalue() if kind == "tar.zst" else gzip.compress(WHOLE)
    assert refused(data[:-2], tmp_path / "m", kind).code == "MODEL_CORRUPT"


def test_truncation_between_members_is_found(tmp_path: Path) -> None:
    one_member = tar_of(("a", b"1"), ("b", b"2"))[:1024]  # its header and its block
    assert refused(one_member, tmp_path / "m").code == "MODEL_CORRUPT"


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    data = bytearray(tar_of(("a", b"1"), ("b", b"2"), form=tarfile.USTAR_FORMAT))
    data[1024 + 3] ^= 1
    assert refused(bytes(data), tmp_path / "m").code == "MODEL_CORRUPT"


@pytest.mark.parametrize("kind", ["tar.gz", "tar.zst"])
def test_a_flipped_byte_is_found_by_the_checksum_of_the_frame(tmp_path: Path, kind: str) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "w").write_bytes(FILES["unet/w.safetensors"])
    out = io.BytesIO()
    pack(tmp_path / "src", out, quiet)
    data = bytearray(out.getvalue() if kind == "tar.zst" else gzip.compress(WHOLE))
    for position in (len(data) // 3, len(data) // 2, len(data) - 3):
        broken = bytearray(data)
        broken[position] ^= 4
        assert refused(bytes(broken), tmp_path / "m", kind).code == "MODEL_CORRUPT"


def test_several_frames_and_padding(tmp_path: Path) -> None:
    half = len(WHOLE) // 2
    for kind in ("tar.gz", "tar.zst"):
        data = COMPRESS[kind](WHOLE[:half]) + COMPRESS[kind](WHOLE[half:]) + bytes(512)
        assert unpack(data, tmp_path / kind, kind) == FILES


def test_what_progress_raises_ends_it(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def on_progress(phase: str, done: int, total: int | None) -> None:
        if phase == "extract" and done > 2**20:
            raise Stop

    before = threading.active_count()
    with pytest.raises(Stop):
        extract(io.BytesIO(WHOLE), "tar", tmp_path / "m", on_progress, *LIMITS)
    assert not (tmp_path / "m").exists()
    for _ in range(400):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before, "a thread was left running"


def test_a_failing_stream_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 2**20:
                raise ApiError("SOURCE_UNREACHABLE", "host: gone.")
            return super().read(size)

    with pytest.raises(ApiError, match="host: gone"):
        extract(Broken(WHOLE), "tar", tmp_path / "m", quiet, *LIMITS)
    assert not (tmp_path / "m").exists()


def test_the_stream_is_read_to_its_end(tmp_path: Path) -> None:
    """A stream compares its digest when it has ended: what follows the archive must be read too."""
    stream = io.BytesIO(WHOLE + bytes(3 * 2**20))
    extract(stream, "tar", tmp_path / "m", quiet, *LIMITS)
    assert stream.tell() == len(stream.getvalue())


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(fd: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    assert refused(WHOLE, tmp_path / "m").code == "DISK_FULL"


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        extract(io.BytesIO(WHOLE), "tar", tmp_path, quiet, *LIMITS)
    assert (tmp_path / "mine").read_text() == "x"


def test_reading_goes_on_while_writing_waits(tmp_path: Path) -> None:
    """Reading is not in the thread that writes: it gets far ahead while that one stands still."""
    stream = io.BytesIO(tar_of(("w", random.Random(2).randbytes(16 * 2**20))))
    ahead = []

    def on_progress(phase: str, done: int, total: int | None) -> None:
        if phase == "extract" and not ahead:
            deadline = time.monotonic() + 10
            while stream.tell() < 12 * 2**20 and time.monotonic() < deadline:
                time.sleep(0.01)
            ahead.append(stream.tell() - done)

    extract(stream, "tar", tmp_path / "m", on_progress, *LIMITS)
    assert ahead[0] >= 10 * 2**20


def test_packing_is_deterministic_and_anonymous(tmp_path: Path) -> None:
    packed = []
    for which in ("a", "b"):
        folder = tmp_path / which
        for name, data in sorted(FILES.items(), reverse=which == "b"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
            (folder / name).chmod(0o600 if which == "b" else 0o644)
            os.utime(folder / name, (len(packed) + 1, 5))
        out = io.BytesIO()
        entries = pack(folder, out, quiet)
        assert {e.path: e.sha256 for e in entries} == {n: hashlib.sha256(d).hexdigest() for n, d in FILES.items()}
        packed.append(out.getvalue())
    assert packed[0] == packed[1]
    with tarfile.open(fileobj=io.BytesIO(zstd.decompress(packed[0]))) as tar:
        assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in tar} == {(0, 0, "", "", 0)}


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("/etc/passwd"), os.mkfifo])
def test_packing_refuses_what_extracting_would(tmp_path: Path, make) -> None:
    make(tmp_path / "odd")
    with pytest.raises(ApiError) as error:
        pack(tmp_path, io.BytesIO(), quiet)
    assert error.value.code == "ARCHIVE_UNSAFE"


def test_kinds_of_names() -> None:
    names = ["m.tar", "a/m.tar.gz", "m.tgz", "M.TAR.ZST", "m.tar.zstd", "m.safetensors", "tar", "m.zst", "tgz"]
    assert [kind_of(n) for n in names] == ["tar", "tar.gz", "tar.gz", "tar.zst", "tar.zst", None, None, None, None]


part = st.text(st.characters(exclude_characters="/\\", exclude_categories=["C", "Z"]), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..") and name.isprintable()
)
tree = st.recursive(
    st.binary(max_size=2000), lambda inner: st.dictionaries(part, inner, max_size=4), max_leaves=12
).filter(lambda found: isinstance(found, dict))


def lay(folder: Path, found: dict) -> None:
    folder.mkdir()
    for name, inner in found.items():
        if isinstance(inner, dict):
            lay(folder / name, inner)
        else:
            (folder / name).write_bytes(inner)


def look(folder: Path) -> dict:
    return {p.name: look(p) if p.is_dir() else p.read_bytes() for p in folder.iterdir()}


BUSY = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # the machine may be


@settings(max_examples=60, deadline=None, suppress_health_check=BUSY)
@given(found=tree, chunk=st.integers(1, 5000))
def test_any_tree_packs_and_extracts_to_the_same(
    tmp_path_factory: pytest.TempPathFactory, found: dict, chunk: int
) -> None:
    root = tmp_path_factory.mktemp("tree")
    lay(root / "in", found)
    out = io.BytesIO()
    packed = pack(root / "in", out, quiet)

    class Drips(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, chunk))

    assert extract(Drips(out.getvalue()), "tar.zst", root / "out", quiet, *LIMITS) == packed
    assert look(root / "out") == found


@settings(max_examples=150, deadline=None, suppress_health_check=BUSY)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=30),
    near=st.booleans(),
)
def test_a_damaged_tar_never_writes_outside(tmp_path_factory: pytest.TempPathFactory, edits: list, near: bool) -> None:
    """Headers with any damage: extracted, or refused with one of our codes, never anything else."""
    data = bytearray(tar_of(("a/b", b"1"), ("a/c", b"22"), ("d", b"333")))
    for position, value in edits:
        data[position % (2048 if near else len(data))] = value
    root = tmp_path_factory.mktemp("fuzz")
    with contextlib.suppress(ApiError):
        extract(io.BytesIO(bytes(data)), "tar", root / "m", quiet, *LIMITS)
    assert [p.name for p in root.iterdir()] in ([], ["m"])
