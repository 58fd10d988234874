"""The process that converts: it can be stopped, it dies with its parent, and it leaves nothing half."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from api.engine.convert import __main__ as converter
from api.errors import ApiError
from api.models.conversion import convert_checkpoint, convert_pickles
from tests.checkpoints import every_form, nothing
from tests.running import ROOT

DEMO = ROOT / "models" / "shapes"
Progress = list[tuple[str, int, int | None]]


def children() -> list[int]:
    """Converters that this process has started and that still live."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            command = (status.parent / "cmdline").read_bytes()
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if b"api.engine.convert" in command and parent == os.getpid():
            found.append(int(status.parent.name))
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_form(DEMO, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of half a gigabyte, so that there is a middway to be killed at."""
    folder = tmp_path_factory.mktemp("large")
    for name in ("text_encoder", "unet"):
        (folder / name).mkdir()
        torch.save(
            {f"w{number}": torch.zeros(2**23) for number in range(8)}, folder / name / "diffusion_pytorch_model.bin"
        )
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


ORIGINALS = {"text_encoder/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.bin"}


def test_a_converter_that_is_killed_midway_leaves_nothing(large: Path) -> None:
    seen = set()

    def kill(_: str, done: int, total: int | None) -> None:
        if total and done:
            seen.update(names(large))
            for pid in children():
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(ApiError, match=r"was killed \(SIGKILL\); most likely there was not enough memory") as caught:
        convert_pickles(large, kill)
    assert caught.value.code == "MODEL_BROKEN"
    assert any(name.endswith(".converting") for name in seen), "it was not midway"
    assert names(large) == ORIGINALS


def test_raising_from_progress_stops_it_midway(large: Path) -> None:
    class Stop(Exception):
        pass

    def stop(_: str, done: int, total: int | None) -> None:
        if total and done:
            raise Stop

    with pytest.raises(Stop):
        convert_pickles(large, stop)
    assert children() == [] and names(large) == ORIGINALS


def test_raising_while_it_starts_stops_it_within_a_second(checkpoints: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    began = time.monotonic()

    def stop(*_: object) -> None:
        if time.monotonic() - began > 0.3:
            raise Stop

    with pytest.raises(Stop):
        convert_checkpoint(checkpoints / "fp32.safetensors", tmp_path / "out", stop, config=DEMO)
    assert time.monotonic() - began < 2
    assert children() == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["starting", "writing"])
def test_the_converter_dies_with_its_parent(when: str, large: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from api.models.conversion import convert_pickles
def progress(phase, done, total):
    if {when!r} == "starting" or done:
        print("now", flush=True)
        sys.stdin.read()
convert_pickles(Path({str(large)!r}), progress)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None and parent.stdout.readline() == "now\n"
    tasks = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(tasks) == 1
    parent.kill()
    parent.wait()
    until = time.monotonic() + 2
    while alive(int(tasks[0])) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(int(tasks[0]))
    for path in large.rglob("*.converting"):
        path.unlink()
    assert names(large) == ORIGINALS  # the originals are there, whatever it had written


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_process_gets_no_secrets_and_little_else(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    seen: dict[str, str] = {}
    limits = ""
    nice = 0

    def look(*_: object) -> None:
        nonlocal limits, nice
        for pid in children():
            text = Path(f"/proc/{pid}/environ").read_bytes().decode().strip("\0")
            seen.update(line.partition("=")[::2] for line in text.split("\0") if "=" in line)
            limits = Path(f"/proc/{pid}/limits").read_text()
            nice = max(nice, os.getpriority(os.PRIO_PROCESS, pid))

    convert_checkpoint(checkpoints / "fp16.safetensors", tmp_path / "out", look, config=DEMO)
    assert seen["HF_HUB_OFFLINE"] == "1" and seen["HOME"] != os.environ["HOME"]
    assert not any("s3cr3t" in value for value in seen.values())
    assert not Path(seen["HOME"]).exists()
    core = next(line.split() for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core[4:6] == ["0", "0"]
    assert nice >= 10


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "DISK_FULL"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "DISK_FULL"),
        (MemoryError(), "MODEL_BROKEN"),
        (RuntimeError("odd"), "MODEL_BROKEN"),
        (ApiError("MODEL_BROKEN", "x", field="f", available=["a"]), "MODEL_BROKEN"),
    ],
)
def test_faults_as_errors(fault: Exception, code: str, tmp_path: Path) -> None:
    assert converter.error_of(fault, tmp_path)["code"] == code


def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    """A device that is always full stands for the disk, where the weights are to be written."""
    part = tmp_path / "unet"
    part.mkdir()
    torch.save({"w": torch.zeros(2**20)}, part / "diffusion_pytorch_model.bin")
    (part / "diffusion_pytorch_model.safetensors.converting").symlink_to("/dev/full")
    with pytest.raises(ApiError) as caught:
        convert_pickles(tmp_path, nothing)
    assert caught.value.code == "DISK_FULL"
    assert names(tmp_path) == {"unet/diffusion_pytorch_model.bin"}
    assert Path("/dev/full").exists()
