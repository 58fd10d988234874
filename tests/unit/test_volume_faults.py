"""What is killed, cut off, full, read-only, or done twice at once leaves a model whole or not there."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from api.errors import ApiError
from api.models.manifest import read_manifest
from api.models.volume import Volume
from tests.running import ROOT
from tests.unit.volumes import install, manifest_of, model_files, write

pytestmark = pytest.mark.slow

EXTRA = 23  # with the seven of every model: 30 files


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a process that dies loses nothing that a disk would keep."""
    memory = Path("/dev/shm")  # noqa: S108
    if not os.access(memory, os.W_OK):
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            yield Path(folder)


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def whole_or_not_there(volume: Volume, key: str) -> bool:
    """Asserts it; says which."""
    if volume.find(key) is None:
        assert volume.list() == [] and not (volume.root / key).exists()
        return False
    assert volume.verify(key) == []
    return True


def after_the_fault(volume: Volume, key: str, revision: str, extra: int = 0) -> None:
    """The next installation succeeds, and nothing is left lying about after a sweep."""
    install(volume, key, revision, extra=extra)
    assert volume.verify(key) == []
    manifest = read_manifest(volume.root / key)
    assert manifest and manifest.revision == revision and len(manifest.files) == 7 + extra
    volume.sweep(keep_staging=-1e9)
    assert sorted(p.name for p in volume.root.iterdir()) == [".locks", ".staging", ".trash", key]
    assert not any((volume.root / ".trash").iterdir()) and not any(volume.staging_root.iterdir())


FOREVER = """
import sys, itertools
from pathlib import Path
from api.models.volume import Volume
from tests.unit.volumes import install
volume = Volume(Path(sys.argv[1]), None, keep_free=0)
for n in itertools.count():
    install(volume, "a", str(n), extra=int(sys.argv[2]))
    print(flush=True) if n == 0 else None
    volume.remove("a") if n % 2 else None
"""


def kill_again_and_again(root: Path, times: int) -> None:
    dice = random.Random(1)
    interrupted = 0
    for round_ in range(times):
        volume = Volume(root / str(round_), None, keep_free=0)
        child = start(FOREVER, volume.root, EXTRA)
        assert child.stdout and child.stdout.readline()
        time.sleep(dice.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        whole_or_not_there(volume, "a")
        interrupted += any(volume.staging_root.iterdir()) or any((volume.root / ".trash").iterdir())
        after_the_fault(volume, "a", "another", EXTRA)
    assert interrupted


def test_killed_at_random_moments(in_memory: Path) -> None:
    kill_again_and_again(in_memory, 20)


@pytest.mark.slow
def test_killed_at_many_random_moments(in_memory: Path) -> None:
    kill_again_and_again(in_memory, 200)


def dies_before_step(step: int, act: Callable[[], object]) -> bool:
    """Run it in a child that dies before it touches a file for the n-th time; whether it came that far."""
    child = os.fork()
    if child == 0:
        steps = 0

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal steps
            if event == "open" or event.startswith(("os.", "shutil.", "fcntl.")):
                steps += 1
                if steps == step:
                    os._exit(9)

        sys.addaudithook(count)
        with suppress(BaseException):
            act()
            os._exit(0)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("before", [None, "1"], ids=["first", "replacing"])
def test_killed_before_every_single_step(in_memory: Path, before: str | None) -> None:
    step, seen = 0, set()
    died = True
    while died:
        step += 1
        volume = Volume(in_memory / str(step), None, keep_free=0)
        if before:
            install(volume, "a", before)
        died = dies_before_step(step, lambda: install(volume, "a", "2"))  # noqa: B023
        if volume.root.exists():
            whole_or_not_there(volume, "a")
            manifest = read_manifest(volume.root / "a")
            seen.add(manifest and manifest.revision)
        after_the_fault(volume, "a", "2")
    assert seen == {None, before, "2"}
    assert step > 40


def test_adopting_is_killed_before_every_single_step(in_memory: Path) -> None:
    step, died = 0, True
    while died:
        step += 1
        volume = Volume(in_memory / str(step), None, keep_free=0)
        old = volume.root / "models--org--name"
        write(old, model_files())
        died = dies_before_step(step, lambda: volume.adopt(old, "a", "org/name"))  # noqa: B023
        assert all(volume.verify(entry.key) == [] for entry in volume.list())
        if old.exists():
            volume.adopt(old, "a", "org/name")
        assert [entry.key for entry in volume.list()] == ["a"] and volume.verify("a") == []
    assert step > 20


ONCE = """
import sys, errno, fcntl, time
from pathlib import Path
from api.models.volume import Volume
from tests.unit.volumes import manifest_of, model_files, write
if sys.argv[2] == "nolocks":
    def flock(*args):
        raise OSError(errno.ENOLCK, "no locks available")
    fcntl.flock = flock
print("ready", flush=True)
sys.stdin.readline()
with Volume(Path(sys.argv[1]), None, keep_free=0).install("a") as installation:
    print("found" if installation.installed else "worked", flush=True)
    if not installation.installed:
        for path, content in model_files().items():
            write(installation.staging, {path: content})
            time.sleep(0.05)
        installation.commit(manifest_of(model_files()))
"""


@pytest.mark.parametrize("locks", ["locks", "nolocks"])
def test_several_processes_at_once(tmp_path: Path, locks: str) -> None:
    children = [start(ONCE, tmp_path, locks) for _ in range(3)]
    for child in children:
        assert child.stdout and child.stdout.readline()
    for child in children:
        assert child.stdin
        child.stdin.write("\n")
        child.stdin.flush()
    did = sorted(child.communicate()[0].strip() for child in children)
    assert [child.returncode for child in children] == [0, 0, 0]
    assert did == (["found", "found", "worked"] if locks == "locks" else ["worked"] * 3)
    volume = Volume(tmp_path, None, keep_free=0)
    assert volume.verify("a") == []
    assert not any(volume.staging_root.iterdir()) and not any((tmp_path / ".trash").iterdir())


def test_without_locks_nothing_is_resumed_that_another_may_be_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOTSUP, "")

    monkeypatch.setattr("fcntl.flock", flock)
    volume = Volume(tmp_path, None, keep_free=0)
    with suppress(ConnectionError), volume.install("a") as installation:
        assert installation.staging.name != "a"
        raise ConnectionError
    assert not installation.staging.exists()
    after_the_fault(volume, "a", "1")


def test_doing_it_twice_leaves_the_one_that_is_being_read(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "v", None, keep_free=0)
    twin = install(Volume(tmp_path / "other", None, keep_free=0), "a")
    with volume.install("a") as installation:
        write(installation.staging, model_files())
        shutil.copytree(twin, volume.root / "a")
        inode = (volume.root / "a").stat().st_ino
        assert installation.commit(manifest_of(model_files())).stat().st_ino == inode
    after_the_fault(volume, "a", "1")
    (volume.root / "a" / "unet" / "config.json").write_text("")
    after_the_fault(volume, "a", "1")


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noting_fsync(descriptor: int) -> None:
        happened.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def noting_rename(self: Path, target: Path) -> Path:
        happened.append(f"-> {target}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    volume = Volume(tmp_path, None, keep_free=0)
    install(volume, "a")
    renamed = happened.index(f"-> {tmp_path / 'a'}")
    staging = volume.staging_root / "a"
    files = [str(staging / path) for path in model_files()]
    folders = [str(staging / name) for name in ("scheduler", "text_encoder", "tokenizer", "unet")]
    assert set(happened[:renamed]) >= {*files, *folders, str(staging), str(staging / ".manifest.json.part")}
    assert str(tmp_path) in happened[renamed:]


def test_a_disk_that_is_full_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems notice only when the data is written through."""
    fsync = os.fsync
    for moment in range(1, 14):
        left = moment

        def failing(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(random.choice([errno.ENOSPC, errno.EDQUOT]), "full")
            fsync(descriptor)

        volume = Volume(tmp_path / str(moment), None, keep_free=0)
        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(ApiError) as error:
            install(volume, "a")
        monkeypatch.setattr(os, "fsync", fsync)
        assert error.value.code == "DISK_FULL"
        assert volume.find("a") is None and volume.list() == [] and not any(volume.staging_root.iterdir())
        after_the_fault(volume, "a", "1")


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    mount = subprocess.run(command, check=False, capture_output=True)
    if mount.returncode != 0:
        pytest.skip("no right to mount here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_really_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 400_000):
        volume = Volume(tmp_path / "disk", None, keep_free=0)
        install(volume, "there")
        for _ in range(2):
            with pytest.raises(ApiError) as error:
                install(volume, "a", size=500_000)
            assert error.value.code == "DISK_FULL" and volume.find("a") is None
            assert not any(volume.staging_root.iterdir())
        with pytest.raises(ApiError) as error:
            volume.reserve(500_000, set)
        assert error.value.code == "DISK_FULL" and volume.find("there")
        assert install(volume, "a", size=100_000) and volume.verify("there") == []


def reads_but_does_not_write(volume: Volume) -> None:
    used = volume.list()[0].last_used
    assert volume.find("a") and volume.verify("a") == []
    assert [(e.key, e.last_used) for e in volume.list()] == [("a", used)]
    with volume.install("a") as installation:
        assert installation.installed
    with pytest.raises(ApiError) as error, volume.install("b"):
        pytest.fail("nothing can be written")
    assert error.value.code == "MODEL_NOT_FOUND" and "MODELS_DIR" in error.value.message
    volume.sweep()
    with pytest.raises(OSError):
        volume.remove("a")
    assert volume.verify("a") == []


def test_a_read_only_mount(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 4_000_000):
        volume = Volume(tmp_path / "disk", None, keep_free=0)
        install(volume, "a")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        reads_but_does_not_write(volume)


@pytest.mark.parametrize("own_folders", [True, False], ids=["used", "copied"])
def test_a_volume_of_somebody_else(own_folders: bool) -> None:
    """Without rights, and as not even root is bound by them, as nobody."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        volume = Volume(root, None, keep_free=0)
        install(volume, "a")
        if not own_folders:
            for folder in (".staging", ".trash"):
                (root / folder).rmdir()
        for path in (root, *root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:
            os.seteuid(65534)
            try:
                reads_but_does_not_write(volume)
            finally:
                os.seteuid(0)
        else:
            reads_but_does_not_write(volume)
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
