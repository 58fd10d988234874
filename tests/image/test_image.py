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
from tests.hub import HubStandIn
from tests.running import ROOT, free_port, images_of
from tests.runpod_platform import Platform

BASE = "docker.io/library/python:3.11-slim-bookworm"
ENV = {**os.environ, "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot", "BUILDER": "buildah"}
MEGABYTES = 3000
"""The image's budget with a CPU build of torch; measured 1.83 GB."""
TOKEN = "hf_of-the-build-only-4711"  # noqa: S105

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
def build_options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a build on this machine needs."""
    if os.environ.get("IMAGE_TEST") != "1" or not shutil.which("buildah") or not shutil.which("debootstrap"):
        pytest.skip("set IMAGE_TEST=1, with buildah and debootstrap installed")
    folder = tmp_path_factory.mktemp("image")
    debian_base(folder / "root")
    return ["--pull-never", "--network", "host", *pip_as_here(folder)]


@pytest.fixture(scope="module")
def image(build_options: list[str]) -> str:
    sh("./build", "-t", "diffusers-api:test", *build_options)
    return "localhost/diffusers-api:test"


@contextlib.contextmanager
def started(image: str, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """The image's own start command, as its own user."""
    container = sh("buildah", "from", "--pull-never", image)
    config = json.loads(sh("buildah", "inspect", container))["Docker"]["config"]
    command = [*config["Entrypoint"], *config["Cmd"]]
    run = ["buildah", "run", "--network", "host", "--env", f"PORT={port}", *options, container, "--", *command]
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


def test_its_size_is_told_by_layer(image: str) -> None:
    """buildah makes one layer over the base, unless it is told otherwise."""
    out = sh(sys.executable, ROOT / "scripts" / "image-size", image, "--budget", f"{MEGABYTES}MB")
    print(out)
    assert "torch" in out
    assert out.splitlines()[-1].endswith("in all")


def test_it_is_a_serverless_worker_where_the_platform_hands_out_jobs(image: str, tmp_path: Path) -> None:
    with Platform() as platform:
        job = platform.send({"prompt": "a red circle", "seed": 1})
        port = free_port()
        options = [part for item in platform.environ("w1").items() for part in ("--env", "=".join(item))]
        with started(image, port, *options):
            platform.wait_final(job)
    assert job.output["image"]


def server_pid(port: int) -> int:
    """The process that the image's start command became, told from others by its PORT."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environ = (folder / "environ").read_bytes().split(b"\0")
            if words[1:4] == [b"-m", b"api", b"start"] and f"PORT={port}".encode() in environ:
                return int(folder.name)
    raise AssertionError("the server's process is not there")


def wait_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health/ready").status_code == 200:
                return
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def draws_what_is_asked(client: httpx.Client) -> dict[str, Any]:
    inputs = {"prompt": "a red circle on a blue background", "num_inference_steps": 20, "seed": 1}
    answer = client.post("/", json={"modelInputs": inputs}).json()
    drawn: np.ndarray = images_of(answer)[0]
    assert check(drawn, Scene("one", (Thing("red", "circle"),), "blue")).right
    return answer


def test_it_starts_draws_and_stops_at_sigterm(image: str) -> None:
    port = free_port()
    with started(image, port) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        wait_ready(client, process)
        draws_what_is_asked(client)
        pid = server_pid(port)
        assert Path(f"/proc/{pid}").stat().st_uid == 1000
        os.kill(pid, signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn(
        {"org/shapes": {"main": ROOT / "models" / "shapes"}}, tokens={TOKEN: ["org/shapes"]}, gated=["org/shapes"]
    ) as started_hub:
        yield started_hub


def baking(hub: HubStandIn) -> list[str]:
    return ["--build-arg", "MODEL_ID=org/shapes", "--build-arg", f"HF_ENDPOINT={hub.url}"]


@pytest.fixture(scope="module")
def baked(build_options: list[str], hub: HubStandIn) -> Iterator[str]:
    command = ["./build", "-t", "diffusers-api:baked", *build_options, *baking(hub)]
    command += ["--build-arg", "RUNTIME_DOWNLOADS=0"]
    out = subprocess.run(
        command, env={**ENV, "HF_AUTH_TOKEN": TOKEN}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert TOKEN not in out.stdout + out.stderr
    yield "localhost/diffusers-api:baked"
    sh("buildah", "rmi", "localhost/diffusers-api:baked")


def test_a_baked_model_is_served_from_the_image_alone(baked: str, hub: HubStandIn, tmp_path: Path) -> None:
    empty = tmp_path / "volume"
    empty.mkdir()
    empty.chmod(0o777)
    hub.forget()
    port = free_port()
    # an address that would answer: what is asked there would be seen
    options = ["-v", f"{empty}:/home/api/.cache/diffusers-api/models", "--env", f"HF_ENDPOINT={hub.url}"]
    with (
        started(baked, port, *options) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):
        wait_ready(client, process)
        meta = draws_what_is_asked(client)["$meta"]
        assert (meta["MODEL_ID"], meta["MODEL_REVISION"]) == ("org/shapes", hub.commit("org/shapes"))
        other = client.post("/", json={"modelInputs": {"prompt": "x"}, "callInputs": {"MODEL_ID": "org/other"}})
        assert (other.status_code, other.json()["$error"]["code"]) == (404, "MODEL_MISMATCH")
        assert "org/shapes" in other.json()["$error"]["available"]
    assert list(hub.requests) == []
    assert [path for path in empty.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_the_token_of_a_build_is_nowhere_in_the_image(baked: str, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    sh("buildah", "push", "-q", baked, f"docker-archive:{archive}")  # layers as they are, configuration and history
    assert occurs(b"org/shapes", archive), "the search finds nothing at all"
    assert occurs(b"MODEL_ID=org/shapes", archive)
    assert not occurs(TOKEN.encode(), archive)
    archive.unlink()


def occurs(text: bytes, path: Path) -> bool:
    """Whether a text is anywhere in a file, which may be larger than memory."""
    tail = b""
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            if text in tail + chunk:
                return True
            tail = chunk[-len(text) :]
    return False


def test_a_build_that_may_not_have_the_model_says_so(build_options: list[str], hub: HubStandIn) -> None:
    environ = {name: value for name, value in ENV.items() if name not in ("HF_TOKEN", "HF_AUTH_TOKEN")}
    command = ["./build", "-t", "diffusers-api:refused", *build_options, *baking(hub)]
    out = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.returncode != 0
    assert "HF_TOKEN" in out.stdout + out.stderr
    assert "Traceback" not in out.stdout + out.stderr


@pytest.mark.parametrize(
    "argument",
    [
        "HF_AUTH_TOKEN=abcdef",
        "AWS_SESSION_TOKEN=abcdef",
        "MODEL_URL=https://me:abcdef@example.com/x.tar",
        "CHECKPOINT_URL=https://example.com/x.safetensors?X-Amz-Signature=abcdef",
    ],
)
def test_a_secret_as_build_argument_is_refused(argument: str) -> None:
    out = subprocess.run(
        ["./build", "-t", "x", "--build-arg", argument],
        cwd=ROOT,
        env={**ENV, "BUILDER": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 2
    assert "abcdef" not in out.stderr


def test_a_source_without_a_name_is_refused() -> None:
    command = ["./build", "-t", "x", "--build-arg", "MODEL_URL=s3://"]
    environ = {**ENV, "BUILDER": "false"}
    out = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert out.returncode == 2
    assert "MODEL_ID" in out.stderr


@pytest.mark.parametrize("builder", ["docker", "podman", "buildah"])
def test_secrets_go_in_as_build_secrets(builder: str, tmp_path: Path) -> None:
    """With a stand-in for the builder that writes down how it was called."""
    stand_in = tmp_path / builder
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nprintenv HF_AUTH_TOKEN AWS_SECRET_ACCESS_KEY >&2\nexit 3\n')
    stand_in.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "BUILDER": builder}
    environ |= {"HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "aws_secret", "AWS_ACCESS_KEY_ID": ""}
    environ.pop("PIP_CONF", None)
    out = subprocess.run(["./build", "-t", "x"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert out.returncode == 3, out.stderr
    arguments = out.stdout.split()
    assert [a for a in arguments if a.startswith("id=")] == [
        f"id={name},env={name}" for name in ("HF_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY")
    ]
    assert "secret" not in out.stdout.replace("--secret", "")
    assert out.stderr.split() == ["hf_secret", "aws_secret"]
