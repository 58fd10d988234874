from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from api.errors import ApiError
from api.models.manifest import MANIFEST_NAME, FileEntry, examine, is_safe_path, missing_parts, read_manifest
from api.models.volume import Volume
from tests.running import ROOT
from tests.unit.volumes import INDEX, Clock, install, manifest_of, model_files, safetensors, size_of, write


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "v", None, Clock(), keep_free=0)


def contents(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found.pop(MANIFEST_NAME)
    return found


def test_a_model_is_not_there_then_there_whole(volume: Volume) -> None:
    assert volume.find("a") is None and volume.list() == [] and volume.verify("a")
    with volume.install("a") as installation:
        assert installation.installed is None
        write(installation.staging, model_files())
        assert volume.find("a") is None
        folder = installation.commit(manifest_of(model_files()))
    assert volume.find("a") == folder == volume.root / "a"
    assert volume.verify("a") == []
    assert contents(folder) == model_files()
    assert [(e.key, e.bytes, e.manifest.revision) for e in volume.list()] == [("a", size_of(), "1")]
    assert not list(volume.staging_root.iterdir())
    with volume.install("a") as again:
        assert again.installed == folder
    assert volume.remove("a") and volume.find("a") is None and not volume.remove("a")
    assert not list((volume.root / ".trash").iterdir())


def test_the_bundled_model_is_whole(volume: Volume) -> None:
    """The rules fit what diffusers really saves."""
    source = ROOT / "models" / "shapes"
    files = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    with volume.install("shapes") as installation:
        write(installation.staging, files)
        installation.commit(manifest_of(files))
    assert volume.verify("shapes") == []


def test_every_file_gets_a_hash_and_a_given_one_is_compared(volume: Volume) -> None:
    files = model_files()
    with volume.install("a") as installation:
        write(installation.staging, files)
        installation.commit(manifest_of(files, hashes=False))
    manifest = read_manifest(volume.root / "a")
    assert manifest and not manifest.verified
    assert {e.path: e.sha256 for e in manifest.files} == {e.path: e.sha256 for e in manifest_of(files).files}
    with pytest.raises(ApiError) as error, volume.install("b") as installation:
        write(installation.staging, files | {"unet/config.json": files["unet/config.json"].swapcase()})
        installation.commit(manifest_of(files))
    assert error.value.code == "MODEL_CORRUPT" and "unet/config.json has the SHA-256" in error.value.message
    assert volume.find("b") is None and not (volume.staging_root / "b").exists(), "or it would be resumed"
    assert install(volume, "b") == volume.find("b")


def test_what_was_hashed_while_writing_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"x.bin": b"x"})
    monkeypatch.setattr("api.models.manifest.sha256_of", lambda path: pytest.fail("read again"))
    entries, problems = examine(tmp_path, [FileEntry("x.bin", 1, "AB" * 32)], {"x.bin": "ab" * 32}, sync=False)
    assert problems == [] and entries[0].sha256 == "ab" * 32
    _, problems = examine(tmp_path, [FileEntry("x.bin", 1, "ab" * 32)], {"x.bin": "cd" * 32}, sync=False)
    assert problems


def without(*paths: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda files: {path: content for path, content in files.items() if path not in paths}


def instead(path: str, content: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda files: files | {path: content}


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SHARDS = {f"unet/d-0000{n}-of-00002.safetensors": safetensors(b"s") for n in (1, 2)}
SHARD_MAP = json.dumps({"weight_map": {"a": "d-00001-of-00002.safetensors", "b": "d-00002-of-00002.safetensors"}})
SHARDED = {**SHARDS, "unet/d.safetensors.index.fp16.json": SHARD_MAP.encode()}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (without("model_index.json"), "model_index.json is missing"),
        (instead("model_index.json", b"{"), "model_index.json cannot be read"),
        (instead("model_index.json", b"{}"), "no pipeline class"),
        (instead("model_index.json", json.dumps(INDEX | {"../x": ["diffusers", "X"]}).encode()), "'../x'"),
        (without("scheduler/scheduler_config.json"), "scheduler (DDIMScheduler) is missing"),
        (lambda f: without("scheduler/scheduler_config.json")(f) | {"scheduler/x": b""}, "no scheduler_config.json"),
        (without("tokenizer/vocab.json"), "tokenizer (CLIPTokenizer) is missing"),
        (without("unet/config.json"), "unet (UNet2DConditionModel) has no config.json"),
        (without(WEIGHTS), "unet (UNet2DConditionModel) has no weights"),
        (lambda f: without(WEIGHTS)(f) | SHARDS, "no weights"),
        (lambda f: without(WEIGHTS)(f | without(list(SHARDS)[1])(SHARDED)), "lacks d-00002-of-00002.safetensors"),
        (instead(WEIGHTS, safetensors(b"1234")[:-1]), "holds 3 bytes of data instead of 4"),
    ],
)
def test_a_model_that_lacks_something_is_not_installed(volume: Volume, change, word: str) -> None:
    files = change(model_files())
    with pytest.raises(ApiError) as error, volume.install("a") as installation:
        write(installation.staging, files)
        installation.commit(manifest_of(files))
    assert error.value.code == "MODEL_CORRUPT" and word in error.value.message
    assert volume.find("a") is None
    assert install(volume, "a")


def test_sharded_weights_are_weights(tmp_path: Path) -> None:
    write(tmp_path, without(WEIGHTS)(model_files()) | SHARDED)
    assert missing_parts(tmp_path) == []


@pytest.mark.parametrize("class_name", ["CLIPImageProcessorPil", "TokenizersBackend", "T5TokenizerFast"])
def test_what_is_saved_as_configuration_only_needs_no_weights(tmp_path: Path, class_name: str) -> None:
    """Whatever follows in the name of the class: transformers 5 saves ``Pil`` and ``Backend``."""
    index = json.dumps(INDEX | {"tokenizer": ["transformers", class_name]}).encode()
    write(tmp_path, instead("model_index.json", index)(model_files()))
    assert missing_parts(tmp_path) == []


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a//b", "", ".", "a\\b", "a\0", "x" * 300, "a/"])
def test_no_file_lies_outside(volume: Volume, path: str) -> None:
    assert not is_safe_path(path)
    manifest = manifest_of(model_files() | {path: b"x"})
    with pytest.raises(ApiError) as error, volume.install("a") as installation:
        write(installation.staging, model_files())
        installation.commit(manifest)
    assert error.value.code == "MODEL_CORRUPT" and "is not a safe name" in error.value.message
    folder = install(volume, "a")
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
    assert volume.find("a") is None


def test_files_and_folders_through_links_are_refused(volume: Volume, tmp_path: Path) -> None:
    files = model_files()
    write(tmp_path / "elsewhere", files)
    for link in ("unet", "model_index.json"):
        with pytest.raises(ApiError) as error, volume.install("a") as installation:
            write(installation.staging, {p: c for p, c in files.items() if not p.startswith(link)})
            (installation.staging / link).symlink_to(tmp_path / "elsewhere" / link)
            installation.commit(manifest_of(files))
        assert error.value.code == "MODEL_CORRUPT"
    assert contents_of_elsewhere(tmp_path) == files
    install(volume, "b")
    (volume.root / "c").symlink_to(volume.root / "b")
    assert volume.find("c") is None and [e.key for e in volume.list()] == ["b"]


def contents_of_elsewhere(tmp_path: Path) -> dict[str, bytes]:
    return {p: (tmp_path / "elsewhere" / p).read_bytes() for p in model_files()}


def test_what_the_manifest_does_not_list_is_removed(volume: Volume, tmp_path: Path) -> None:
    write(tmp_path / "kept", {"x": b"x"})
    with volume.install("a") as installation:
        write(
            installation.staging,
            model_files() | {"a.part": b"", ".cache/h/x": b"", "unet/evil.bin": b"", MANIFEST_NAME: b"{}"},
        )
        (installation.staging / "link").symlink_to(tmp_path / "kept")
        (installation.staging / "empty").mkdir()
        installation.commit(manifest_of(model_files() | {MANIFEST_NAME: b"{}"}))
    assert contents(volume.root / "a") == model_files() and (tmp_path / "kept" / "x").exists()
    assert {p.name for p in (volume.root / "a").iterdir() if p.is_dir()} == {
        "scheduler",
        "text_encoder",
        "tokenizer",
        "unet",
    }


def test_find_sees_truncation_and_verify_a_flipped_byte(volume: Volume) -> None:
    weights = install(volume, "a", size=1000) / WEIGHTS
    whole = weights.read_bytes()
    for tenth in range(10):
        weights.write_bytes(whole[: len(whole) * tenth // 10])
        assert volume.find("a") is None and volume.list() == [] and "bytes instead of" in volume.verify("a")[0]
    weights.unlink()
    assert volume.find("a") is None and volume.verify("a") == [f"{WEIGHTS} is missing"]
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert volume.find("a") is not None
    assert len(problems := volume.verify("a")) == 1 and WEIGHTS in problems[0] and "SHA-256" in problems[0]
    weights.write_bytes(whole)
    (weights.parent / "more.bin").write_bytes(b"")
    assert volume.verify("a") == ["unet/more.bin is not in the manifest"]


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b"{}", b"\xff", b'{"format": 1}'])
def test_a_folder_without_a_readable_manifest_is_not_a_model(volume: Volume, manifest: bytes) -> None:
    folder = install(volume, "a")
    (folder / MANIFEST_NAME).write_bytes(manifest)
    assert volume.find("a") is None and volume.list() == [] and volume.verify("a")
    assert install(volume, "a") == volume.find("a")


def test_a_manifest_of_a_later_format_is_not_guessed_at(volume: Volume) -> None:
    path = install(volume, "a") / MANIFEST_NAME
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    assert volume.find("a") is None


def test_another_version_replaces_the_one_there(volume: Volume) -> None:
    install(volume, "a", "1")
    with volume.install("a") as installation:
        assert installation.installed, "whoever does not ask takes what is there"
    folder = install(volume, "a", "2")
    assert contents(folder) == model_files("2") and volume.verify("a") == []
    assert not list((volume.root / ".trash").iterdir())
    (volume.root / "b").write_text("in the way")
    assert install(volume, "b") == volume.find("b")


@pytest.mark.parametrize("key", ["", ".", "..", ".staging", "a/b", "../a", "a\n", "a b", "a~b", "ä", "a\0", "x" * 201])
def test_unsafe_keys_are_refused(volume: Volume, key: str) -> None:
    for act in (
        volume.find,
        volume.install,
        volume.remove,
        volume.verify,
        lambda k: volume.adopt(volume.root, k, "a/b"),
    ):
        with pytest.raises(ApiError) as error:
            act(key)
        assert error.value.code == "INVALID_INPUTS"


def test_an_interrupted_installation_is_resumed_unless_the_content_changed(volume: Volume) -> None:
    with pytest.raises(ConnectionError), volume.install("a") as installation:
        assert not installation.expect("1")
        write(installation.staging, {"unet/config.json": b"{}"})
        raise ConnectionError
    assert volume.find("a") is None
    with volume.install("a") as installation:
        assert installation.expect("1") and (installation.staging / "unet/config.json").exists()
    with volume.install("a") as installation:
        assert not installation.expect("2") and not (installation.staging / "unet").exists()
        installation.abandon()
        assert not installation.staging.exists()


def test_one_installation_at_a_time_and_a_wait_can_be_ended(volume: Volume) -> None:
    order: list[str] = []
    waits = 0

    def second() -> None:
        with volume.install("a") as installation:
            order.append("second")
            assert installation.installed

    def stop() -> None:
        nonlocal waits
        waits += 1
        if waits == 2:
            raise TimeoutError

    with volume.install("a") as installation:
        thread = threading.Thread(target=second)
        thread.start()
        with pytest.raises(TimeoutError), volume.install("a", on_wait=stop):
            pytest.fail("two at once")
        with volume.install("b") as other:
            assert other.installed is None, "other keys do not wait"
        write(installation.staging, model_files())
        order.append("first")
        installation.commit(manifest_of(model_files()))
    thread.join(5)
    assert order == ["first", "second"]


def test_adopting_an_old_folder(volume: Volume) -> None:
    old = volume.root / "models--org--name"
    write(old, model_files())
    assert volume.list() == []
    with pytest.raises(ApiError) as error:
        (old / "link").symlink_to(old / "unet")
        volume.adopt(old, "new", "org/name")
    assert error.value.code == "MODEL_CORRUPT" and contents_with(old) == set(model_files()) | {"link"}
    (old / "link").unlink()
    assert volume.adopt(old, "new", "org/name", variant="fp16") == volume.find("new")
    assert not old.exists() and volume.verify("new") == []
    manifest = volume.list()[0].manifest
    assert (manifest.model_id, manifest.verified, manifest.variant) == ("org/name", False, "fp16")
    assert all(entry.sha256 for entry in manifest.files)
    write(volume.root / "here", model_files())
    assert volume.adopt(volume.root / "here", "here", "here") == volume.find("here"), "its own name will do"


def contents_with(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}


@pytest.mark.parametrize(
    "damage", [without(WEIGHTS), instead(WEIGHTS, safetensors(b"12")[:-1]), without("model_index.json")]
)
def test_a_damaged_old_folder_is_left_alone(volume: Volume, damage) -> None:
    old = volume.root / "models--org--name"
    write(old, damage(model_files()))
    with pytest.raises(ApiError) as error:
        volume.adopt(old, "new", "org/name")
    assert error.value.code == "MODEL_CORRUPT"
    assert contents_with(old) == set(damage(model_files())) and volume.list() == []


def test_sweep_empties_the_trash_and_gives_up_old_downloads(tmp_path: Path) -> None:
    volume = Volume(tmp_path, None, keep_free=0)
    for key in ("old", "new", "busy"):
        with volume.install(key) as installation:
            write(installation.staging, {"x/y": b"1"})
            if key != "new":
                for path in (*installation.staging.rglob("*"), installation.staging):
                    os.utime(path, (1, 1))
    write(tmp_path / ".trash" / "1234", {"x": b"1"})
    with volume.install("busy"):
        volume.sweep()
    assert sorted(p.name for p in volume.staging_root.iterdir()) == ["busy", "new"]
    assert not list((tmp_path / ".trash").iterdir())
