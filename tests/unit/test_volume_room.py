from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import ApiError
from api.models.volume import Volume
from tests.unit.volumes import Clock, install, manifest_of, model_files, size_of, write

pytestmark = pytest.mark.slow


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "v", None, Clock(), keep_free=0)


def nobody() -> set[str]:
    return set()


def total(volume: Volume) -> int:
    return sum(entry.bytes for entry in volume.list())


def test_eviction_takes_the_least_recently_used_and_no_leased_one(volume: Volume) -> None:
    for key in "abcd":
        install(volume, key)
    volume.find("a")
    volume.list(), volume.verify("b")
    each = size_of()
    volume.limit = 4 * each
    volume.reserve(each, lambda: {"b"})
    assert [e.key for e in volume.list()] == ["a", "b", "d"], "c is the oldest: a was used, b is leased"
    with pytest.raises(ApiError) as error:
        volume.reserve(4 * each, lambda: {"b"})
    assert error.value.code == "DISK_FULL" and "VOLUME_LIMIT" in error.value.message
    assert (error.value.requested, error.value.available) == (4 * each, 3 * each)
    assert [e.key for e in volume.list()] == ["a", "b", "d"], "nothing goes where it would not be enough"
    asked = iter([set(), {"b"}, set()])
    volume.reserve(2 * each, lambda: next(asked))
    assert [e.key for e in volume.list()] == ["a", "b"], "b was leased at the last moment"


def test_an_interrupted_download_goes_before_any_model(tmp_path: Path) -> None:
    volume = Volume(tmp_path, None, lambda: 1.0, keep_free=0)
    install(volume, "old")
    with volume.install("part") as installation:
        write(installation.staging, {"x.part": b"x" * 1000})
    volume.limit = total(volume) + 1500
    volume.reserve(1000, nobody)
    assert volume.find("old") and not any(volume.staging_root.iterdir())


def test_what_a_crashed_installation_had_reserved_is_free_again(volume: Volume) -> None:
    volume.limit = 1000
    volume.prepare()
    volume.lock_path("a").write_text("999")
    volume.reserve(1000, nobody)
    volume.lock_path("a").write_text("999")
    with volume.install("a"):
        volume.reserve(1000, nobody)


def test_what_is_being_installed_is_not_evicted_and_its_bytes_are_taken(volume: Volume) -> None:
    each = size_of()
    volume.limit = 2 * each
    other = Volume(volume.root, volume.limit, keep_free=0)
    with volume.install("a") as installation:
        installation.reserve(each, nobody)
        write(installation.staging, {"unet/config.json": b"x" * 50})
        installation.reserve(each, nobody)
        other.reserve(each, nobody)
        with pytest.raises(ApiError):
            other.reserve(each + 1, nobody)
    other.reserve(2 * each, nobody)
    assert not (volume.staging_root / "a").exists(), "an interrupted download goes first"
    install(volume, "a")
    with volume.install("a", accept=lambda m: False) as installation:
        with pytest.raises(ApiError):
            other.reserve(2 * each, nobody)
        installation.reserve(2 * each, nobody)
        assert volume.find("a") is None, "the version that it replaces may go"


def test_what_another_process_is_installing_stays_as_long_as_it_does(volume: Volume) -> None:
    install(volume, "a")
    volume.limit = size_of()
    descriptor = os.open(volume.lock_path("a"), os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for _ in range(2):
        with pytest.raises(ApiError):
            volume.reserve(size_of(), nobody)
    os.close(descriptor)
    volume.reserve(size_of(), nobody)
    assert volume.find("a") is None


def test_the_real_disk_counts(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    install(volume, "a")
    free = {True: 1000, False: 1000 + size_of()}

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=free[(volume.root / "a").exists()])

    monkeypatch.setattr("api.models.eviction.shutil.disk_usage", usage)
    volume.keep_free = 500
    volume.reserve(500, nobody)
    assert volume.find("a")
    with pytest.raises(ApiError) as error:
        volume.reserve(501, lambda: {"a"})
    assert error.value.code == "DISK_FULL"
    volume.reserve(501, nobody)
    assert volume.find("a") is None


def test_folders_of_others_are_neither_counted_nor_evicted(volume: Volume) -> None:
    write(volume.root / "own--model", model_files())
    volume.limit = size_of()
    volume.reserve(size_of(), nobody)
    with pytest.raises(ApiError):
        volume.reserve(size_of() + 1, nobody)
    assert not volume.remove("own--model")
    assert (volume.root / "own--model" / "model_index.json").exists()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("install"), st.sampled_from("abcdef"), st.integers(0, 3000)),
        st.tuples(st.just("remove"), st.sampled_from("abcdef"), st.just(0)),
        st.tuples(st.just("lease"), st.sampled_from("abcdef"), st.just(0)),
        st.tuples(st.just("interrupt"), st.sampled_from("abcdef"), st.integers(1, 2000)),
        st.tuples(st.just("reserve"), st.just("a"), st.integers(0, 5000)),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(actions=ACTIONS)
def test_never_over_the_limit(actions: list[tuple[str, str, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    volume = Volume(tmp_path_factory.mktemp("v"), 5000, Clock(), keep_free=0)
    leased: set[str] = set()
    for action, key, size in actions:
        held = {k for k in leased if volume.find(k)}
        try:
            if action == "remove":
                volume.remove(key)
                held.discard(key)
            elif action == "lease":
                leased.symmetric_difference_update({key})
            elif action == "reserve":
                volume.reserve(size, leased.copy)
                assert total(volume) + size <= 5000
            else:
                with volume.install(key) as installation:
                    if installation.installed is None:
                        files = model_files(key, size)
                        installation.reserve(sum(map(len, files.values())), leased.copy)
                        write(installation.staging, files if action == "install" else {"x.part": b"x" * (size // 2)})
                        if action == "install":
                            installation.commit(manifest_of(files, key))
        except ApiError as error:
            assert error.code == "DISK_FULL"
        staged = sum(p.stat().st_size for p in volume.staging_root.rglob("*") if p.is_file())
        assert total(volume) + staged <= 5000
        assert all(volume.find(k) for k in held), "a leased model is still there"
        assert all(volume.verify(entry.key) == [] for entry in volume.list())
