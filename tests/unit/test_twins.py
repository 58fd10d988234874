"""Parts of equal content are found without hashing everything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from api.engine import twins
from api.engine.twins import Twins


def write(path: Path, content: bytes) -> tuple[Path, ...]:
    path.write_bytes(content)
    return (path,)


def name(files: tuple[Path, ...]) -> list[str]:
    return [f"file:{path}" for path in files]


def test_equal_files_are_one_and_a_flipped_byte_anywhere_is_another(tmp_path: Path) -> None:
    seen, content = Twins(), os.urandom(3 * 2**20)
    first, copy = write(tmp_path / "a", content), write(tmp_path / "b", content)
    assert seen.content("x", first, name(first)) == name(first)
    assert seen.content("x", copy, name(copy)) == name(first)
    assert seen.content("y", copy, name(copy)) == name(copy)
    for at in (0, 2**20 + 12345, len(content) - 1):
        other = bytearray(content)
        other[at] ^= 1
        files = write(tmp_path / f"other-{at}", bytes(other))
        assert seen.content("x", files, name(files)) == name(files)
    shorter = write(tmp_path / "shorter", content[:-1])
    assert seen.content("x", shorter, name(shorter)) == name(shorter)


def test_what_has_changed_or_is_gone_is_not_what_was_seen(tmp_path: Path) -> None:
    seen, content = Twins(), os.urandom(2**16)
    first, second = write(tmp_path / "a", content), write(tmp_path / "b", content)
    seen.content("x", first, name(first))
    write(tmp_path / "a", os.urandom(2**16))
    os.utime(first[0], ns=(1, 1))
    assert seen.content("x", second, name(second)) == name(second)
    first[0].unlink()
    third = write(tmp_path / "c", content)
    assert seen.content("x", third, name(third)) == name(second)


def test_files_of_a_manifest_are_told_apart_by_their_hashes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, content = Twins(), os.urandom(2**16)
    paths = [write(tmp_path / each, content) for each in "abc"]
    monkeypatch.setattr(twins, "_is_equal", lambda *_: pytest.fail("read"))
    assert seen.content("x", paths[0], ["sha256:1"]) == ["sha256:1"]
    assert seen.content("x", paths[1], ["sha256:2"]) == ["sha256:2"]
    assert seen.content("x", paths[2], ["sha256:1"]) == ["sha256:1"]
    monkeypatch.undo()
    copy = write(tmp_path / "copy", content)
    assert seen.content("x", copy, name(copy)) in (["sha256:1"], ["sha256:2"])


def test_what_differs_is_told_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(twins.os, "pread", lambda *args: (read.append(args[1]), pread(*args))[1])
    a, b = write(tmp_path / "a", os.urandom(2**22)), write(tmp_path / "b", os.urandom(2**22))
    seen = Twins()
    seen.content("x", a, name(a))
    seen.content("x", b, name(b))
    assert sum(read) <= 2 * 2**16
