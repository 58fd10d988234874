"""The container image, really built and started, without a Docker engine: buildah on a Debian base.

Needs root, buildah and debootstrap, and minutes: IMAGE_TEST=1 scripts/test --all tests/image
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from scripts.demo_model.checker import check
from scripts.demo_model.grammar import Scene, Thing
from tests.running import ROOT, free_port, images_of

BASE = "docker.io/library/python:3.11-slim-bookworm"
ENV = {**os.environ, "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot", "BUILDER": "buildah"}
MEGABYTES = 3000
"""The image's budget with a CPU build of torch; measured 1.73 GB."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def sh(*command: str | Path, **more: Any) -> str:
    out = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, check=False, **more)
    assert out.returncode == 0, f"{command}\n{out.stdout[-3000:]}\n{out.stderr[-3000:]}"
    return out.stdout.strip()


def test_the_dockerfile_lints() -> None:
    sh(Path(sys.executable).with_name("hadolint"), "Dockerfile")


def debian_base(folder: Path) -> None:
    """Commit a Debian with Python under the name of the Dockerfile's base, unless it is there."""
    if BASE in sh("buildah", "images", "--format", "{{.Name}}:{{.Tag}}"):
        return
    packages = "--include=python3,python3-venv,ca-certificates"
    sh("debootstrap", "--variant=minbase", packages, "bookworm", folder)
    container = sh("buildah", "from", "scratch")
    sh("buildah", "add", "-q", container, folder, "/")
    sh("buildah", "config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
    sh("buildah", "commit", "-q", container, BASE)
    sh("buildah", "rm", container)


def pip_as_here(folder: Path) -> list[str]:
    """This machine's pip settings for the build, and mounts for the local folders that they name."""
    settings = {}
    for line in sh(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = value.strip("'\"").encode().decode("unicode_escape")
    text = "[global]\n" + "".join(f"{k} = {v.replace(chr(10), ' ')}\n" for k, v in settings.items())
    (folder / "pip.conf").write_text(text)
    ENV["PIP_CONF"] = str(folder / "pip.conf")
    paths = [part.removeprefix("file://") for value in settings.values() for part in value.split()]
    folders = {path if Path(path).is_dir() else str(Path(path).parent) for path in paths if path.startswith("/")}
    tops = {str(Path(*Path(f).parts[:3])) for f in folders if Path(f).exists()}
    return [part for f in sorted(tops) for part in ("-v", f"{f}:{f}:ro")]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    if os.environ.get("IMAGE_TEST") != "1" or not shutil.which("buildah") or not shutil.which("debootstrap"):
        pytest.skip("set IMAGE_TEST=1, with buildah and debootstrap installed")
    folder = tmp_path_factory.mktemp("image")
    debian_base(folder / "root")
    mounts = pip_as_here(folder)
    sh("./build", "-t", "diffusers-api:test", "--pull-never", "--network", "host", *mounts)
    return "localhost/diffusers-api:test"


@contextlib.contextmanager
def started(image: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The image's own start command, as its own user."""
    container = sh("buildah", "from", "--pull-never", image)
    config = json.loads(sh("buildah", "inspect", container))["Docker"]["config"]
    command = [*config["Entrypoint"], *config["Cmd"]]
    run = ["buildah", "run", "--network", "host", "--env", f"PORT={port}", container, "--", *command]
    process = subprocess.Popen(run, env=ENV, cwd=ROOT)
    try:
        yield process
    finally:
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(server_pid(port), signal.SIGKILL)  # killing buildah would leave it running
        process.wait(10)
        sh("buildah", "rm", container)


def test_the_image_is_small_unprivileged_and_holds_no_secret(image: str) -> None:
    inspected = json.loads(sh("buildah", "inspect", "--type", "image", image))
    config = inspected["Docker"]["config"]
    assert config["User"] == "1000"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["StopSignal"] == "SIGTERM"
    sizes = sh("buildah", "images", "--json", image)
    text = json.loads(sizes)[0]["size"]
    number, unit = text.split()
    assert float(number) * {"MB": 1, "GB": 1000}[unit] < MEGABYTES
    print("image size:", text)
    container = sh("buildah", "from", "--pull-never", image)
    try:
        found = sh(
            "buildah", "run", container, "--", "sh", "-c", "ls -A /app; id -u; cat /etc/pip.conf 2>/dev/null | wc -c"
        )
    finally:
        sh("buildah", "rm", container)
    assert found.split() == ["LICENSE", "api", "models", "1000", "0"]


def server_pid(port: int) -> int:
    """The process that the image's start command became, told from others by its PORT."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environ = (folder / "environ").read_bytes().split(b"\0")
            if words[1:4] == [b"-m", b"api", b"serve"] and f"PORT={port}".encode() in environ:
                return int(folder.name)
    raise AssertionError("the server's process is not there")


def test_it_starts_draws_and_stops_at_sigterm(image: str) -> None:
    port = free_port()
    with started(image, port) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health/ready").status_code == 200:
                    break
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        inputs = {"prompt": "a red circle on a blue background", "num_inference_steps": 20, "seed": 1}
        answer = client.post("/", json={"modelInputs": inputs}).json()
        drawn: np.ndarray = images_of(answer)[0]
        assert check(drawn, Scene("one", (Thing("red", "circle"),), "blue")).right
        pid = server_pid(port)
        assert Path(f"/proc/{pid}").stat().st_uid == 1000
        os.kill(pid, signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_secret_as_build_argument_is_refused() -> None:
    out = subprocess.run(
        ["./build", "-t", "x", "--build-arg", "HF_AUTH_TOKEN=abc"],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 2
    assert "abc" not in out.stderr
