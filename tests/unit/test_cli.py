"""The commands, each as a process of its own, against a hub stand-in and an S3 server."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.cli.main import environment
from api.models.manifest import read_manifest
from tests.hub import HubStandIn
from tests.running import ROOT
from tests.s3 import KEY, SECRET, Store

pytest_plugins = ("tests.s3_server",)
SHAPES = ROOT / "models" / "shapes"
UNET = "unet/diffusion_pytorch_model.safetensors"
SIZE = sum(path.stat().st_size for path in SHAPES.rglob("*") if path.is_file())
POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
TOKEN = "hf_only-for-tests"  # noqa: S105


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as it is after a commit that changes a small file."""
    folder = tmp_path_factory.mktemp("repo") / "moved"
    shutil.copytree(SHAPES, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_name_or_path": "moved"}))
    return folder


@pytest.fixture(scope="module")
def a_hub(moved: Path) -> Iterator[HubStandIn]:
    repos = {
        "org/shapes": {"main": SHAPES, "next": moved},
        "org/closed": {"main": SHAPES},
        "org/moving": {"main": SHAPES, "next": moved},
    }
    with HubStandIn(repos, tokens={TOKEN: ["org/closed"]}, gated=["org/closed"]) as started:
        yield started


@pytest.fixture
def hub(a_hub: HubStandIn) -> HubStandIn:
    a_hub.forget()
    return a_hub


class Commands:
    """Runs ``python -m api`` with an environment of its own."""

    def __init__(self, models_dir: Path, hub: HubStandIn) -> None:
        self.models_dir = models_dir
        theirs = ("AWS_", "HF_", "MODEL", "HUGGING", "CHECKPOINT_", "WARM_", "LOCAL_", "BAKED_", "HUB_", "VOLUME_")
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        self.environ |= {
            "MODELS_DIR": str(models_dir),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(models_dir / "hf-home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "BAKED_MODELS_DIR": str(models_dir / "none"),
            "HUB_CACHES": "",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        environ = {**self.environ, **more.pop("environ", {})}
        command = [*more.pop("prefix", ()), sys.executable, "-m", "api", *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.Popen(command, cwd=ROOT, env=environ, text=True, **pipes)

    def __call__(self, *arguments: str, status: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, **more) as process:
            out, err = process.communicate(timeout=100)
        assert process.returncode == status, f"{arguments}: {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in out + err
        return subprocess.CompletedProcess(arguments, status, out, err)

    def listed(self) -> list[dict[str, Any]]:
        found = json.loads(self("models", "list", "--json").stdout)
        return [model for model in found if model["place"] == "volume"]


@pytest.fixture
def api(tmp_path: Path, hub: HubStandIn) -> Commands:
    return Commands(tmp_path / "models", hub)


def hashes(folder: str | Path) -> dict[str, str | None]:
    manifest = read_manifest(Path(folder))
    assert manifest is not None
    return {entry.path: entry.sha256 for entry in manifest.files}


def until(ready: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def slowly(hub: HubStandIn) -> None:
    """The weights of the UNet take about four seconds."""
    hub.fault(hub.cdn_path("org/shapes", UNET), "slow", seconds=0.008)


# -- one model's life -------------------------------------------------------------------------------------


def test_a_model_comes_is_shown_verified_and_removed(api: Commands, hub: HubStandIn) -> None:
    out = api("download", "org/shapes")
    commit = hub.commit("org/shapes")
    (model,) = api.listed()
    assert model["folder"] in out.stdout and commit[:12] in out.stdout
    assert "Downloading" in out.stderr and "done" in out.stderr and "\r" not in out.stderr
    assert (model["MODEL_ID"], model["MODEL_REVISION"], model["verified"]) == ("org/shapes", commit, True)
    assert model["source"].startswith(hub.url) and model["whole"] is True

    hub.forget()
    assert "already" in api("download", "org/shapes").stdout
    assert list(hub.requests) == []

    bare, listed = api("models").stdout, api("models", "list").stdout
    assert bare == listed
    row = next(line for line in listed.splitlines() if line.startswith("org/shapes"))
    assert model["key"] in row and commit[:12] in row and "yes" in row
    assert "demo/shapes" in listed

    shown = api("models", "show", model["key"]).stdout
    assert shown == api("models", "show", "org/shapes").stdout
    assert commit in shown and UNET in shown and "StableDiffusionPipeline" in shown
    as_json = json.loads(api("models", "show", "org/shapes", "--json").stdout)
    assert {file["path"]: file["sha256"] for file in as_json["files"]} == hashes(model["folder"])

    assert "ok" in api("models", "verify").stdout
    assert "removed" in api("models", "rm", "org/shapes").stdout
    assert api.listed() == [] and not Path(model["folder"]).exists()
    assert list((api.models_dir / ".refs").iterdir()) == []
    assert "not here" in api("models", "show", "org/shapes", status=1).stderr


@pytest.mark.slow
def test_verify_finds_a_flipped_byte_and_says_which_model_and_file(api: Commands) -> None:
    api("download", "org/shapes")
    api("download", "org/shapes", "--revision", "next")
    bad, good = sorted(api.listed(), key=lambda model: model["key"])
    path = Path(bad["folder"]) / UNET
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    out = api("models", "verify", status=1)
    assert f"{bad['key']}  DAMAGED" in out.stdout and UNET in out.stdout
    assert f"{good['key']}  ok" in out.stdout
    api("models", "verify", good["key"])
    api("models", "verify", bad["key"], good["key"], status=1)


def test_a_model_that_lacks_a_file_is_listed_as_damaged_and_can_be_removed(api: Commands) -> None:
    api("download", "org/shapes")
    (model,) = api.listed()
    (Path(model["folder"]) / UNET).unlink()
    assert "DAMAGED" in api("models").stdout
    assert api.listed()[0]["whole"] is False
    assert "missing" in api("models", "verify", status=1).stdout
    api("models", "rm", model["key"])
    assert api.listed() == []


@pytest.mark.slow
def test_an_id_that_means_several_models_lists_their_keys(api: Commands) -> None:
    api("download", "org/shapes")
    api("download", "org/shapes", "--revision", "next")
    keys = [model["key"] for model in api.listed()]
    assert len(keys) == 2
    for command in (["show", "org/shapes"], ["verify", "org/shapes"], ["rm", "-y", keys[0], "org/shapes"]):
        said = api("models", *command, status=2).stderr
        assert all(key in said for key in keys)
    assert len(api.listed()) == 2
    api("models", "rm", keys[0])
    assert [model["key"] for model in api.listed()] == [keys[1]]


@pytest.mark.slow
def test_pull_follows_a_branch_that_moved_and_download_does_not(
    api: Commands, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    api("download", "org/moving")
    old = hub.commit("org/moving")
    assert "up to date" in api("models", "pull", "org/moving").stdout
    revisions = hub.repos["org/moving"]
    monkeypatch.setitem(revisions, "main", revisions["next"])
    new = hub.commit("org/moving")
    assert old[:12] in api("download", "org/moving").stdout
    said = api("models", "pull", "org/moving").stdout
    assert f"{old[:12]} → {new[:12]}" in said
    assert new[:12] in api("download", "org/moving").stdout
    (before,) = [model["key"] for model in api.listed() if model["MODEL_REVISION"] == old]
    assert before in said
    api("models", "rm", before)
    assert new[:12] in api("download", "org/moving").stdout


@pytest.mark.slow
def test_what_comes_from_the_environment(api: Commands, hub: HubStandIn) -> None:
    assert "comes with this server" in api("download").stdout
    environ = {"MODEL_ID": "my/own", "HF_MODEL_ID": "org/shapes", "MODEL_REVISION": "next", "WARM_MODELS": "org/moving"}
    api("download", environ=environ)
    found = {model["MODEL_ID"]: model["MODEL_REVISION"] for model in api.listed()}
    assert found == {"my/own": hub.commit("org/shapes", "next"), "org/moving": hub.commit("org/moving")}
    # WARM_MODELS is for a call without arguments, and the environment's revision is of its own model
    api("download", "org/shapes", environ={**environ, "MODEL_REVISION": "none"})
    assert hub.commit("org/shapes") in [model["MODEL_REVISION"] for model in api.listed()]


@pytest.mark.slow
def test_one_of_several_that_fails_leaves_the_others(api: Commands) -> None:
    said = api("download", environ={"WARM_MODELS": "org/nothing, org/shapes"}, status=1).stderr
    assert "org/nothing" in said
    assert [model["MODEL_ID"] for model in api.listed()] == ["org/shapes"]


@pytest.mark.slow
def test_into_another_folder_what_lies_elsewhere_does_not_count(api: Commands, tmp_path: Path) -> None:
    api("download", "org/shapes")
    out = api("download", "org/shapes", "--into", str(tmp_path / "baked"))
    assert str(tmp_path / "baked") in out.stdout and "already" not in out.stdout
    environ = {"BAKED_MODELS_DIR": str(tmp_path / "baked"), "MODELS_DIR": str(tmp_path / "empty")}
    assert "already" in api("download", "org/shapes", environ=environ).stdout
    said = api("models", "rm", "org/shapes", environ=environ, status=1).stderr
    assert "part of the image" in said


def test_options_and_the_environment() -> None:
    theirs = {"MODEL_ID": "a/b", "MODEL_URL": "s3://", "MODEL_REVISION": "v1", "PATH": "x"}
    assert environment(theirs, {}) == theirs
    same = environment(theirs, {"MODEL_ID": "a/b", "MODEL_REVISION": "v2"})
    assert (same["MODEL_URL"], same["MODEL_REVISION"]) == ("s3://", "v2")
    other = environment(theirs, {"MODEL_ID": "c/d"})
    assert (other["MODEL_URL"], other["MODEL_REVISION"], other["PATH"]) == ("", "", "x")
    # what lies at a URL is not called demo/shapes because that is the default
    assert environment({}, {"MODEL_URL": "https://x/y.tar"})["MODEL_ID"] == ""


# -- faults -----------------------------------------------------------------------------------------------


def test_a_download_that_was_killed_goes_on_where_it_was(api: Commands, hub: HubStandIn) -> None:
    slowly(hub)
    cdn = hub.cdn_path("org/shapes", UNET)
    process = api.start("download", "org/shapes")
    # what is on the disk, and not only on its way: 2.4 MB are of other files
    until(lambda: sum(p.stat().st_blocks * 512 for p in api.models_dir.glob(".staging/**/*")) > 6_000_000)
    process.kill()
    process.communicate()
    assert api.listed() == []
    hub.forget()
    api("download", "org/shapes")
    assert hub.sent[cdn] < (SHAPES / UNET).stat().st_size - 3_000_000
    api("models", "verify")
    assert len(api.listed()) == 1


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(api: Commands, hub: HubStandIn) -> None:
    slowly(hub)
    cdn = hub.cdn_path("org/shapes", UNET)
    process = api.start("download", "org/shapes")
    until(lambda: hub.sent[cdn] > 1_000_000)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - began < 2
    assert "stopped at" in err and "same command" in err and "Traceback" not in out + err
    hub.forget()
    api("download", "org/shapes")


@pytest.mark.slow
def test_two_at_once_download_once(api: Commands, hub: HubStandIn) -> None:
    slowly(hub)
    cdn = hub.cdn_path("org/shapes", UNET)
    first = api.start("download", "org/shapes")
    until(lambda: hub.sent[cdn] > 100_000)
    second = api.start("download", "org/shapes")
    (out, _), (waited_out, waited) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "waiting" in waited
    (model,) = api.listed()
    assert model["folder"] in out and model["folder"] in waited_out
    assert hub.sent[cdn] == (SHAPES / UNET).stat().st_size


@pytest.mark.slow
def test_refusals_are_sentences_without_secrets(api: Commands) -> None:
    wrong = "hf_wrong-and-secret"
    for environ in ({}, {"HF_AUTH_TOKEN": wrong}):
        said = api("download", "org/closed", environ=environ, status=1)
        assert "org/closed" in said.stderr and wrong not in said.stdout + said.stderr
    assert "main" in api("download", "org/shapes", "--revision", "fp16", status=1).stderr
    api("download", "org/closed", environ={"HF_AUTH_TOKEN": TOKEN})


def test_a_hub_that_cannot_be_reached(api: Commands) -> None:
    said = api("download", "org/shapes", environ={"HF_ENDPOINT": "http://127.0.0.1:9"}, status=1).stderr
    assert "127.0.0.1" in said or "hub" in said


@contextlib.contextmanager
def readable_only(api: Commands) -> Iterator[dict[str, Any]]:
    """MODELS_DIR as somebody sees it who may not write there; root may always, but not without its capabilities."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "models"
        if api.models_dir.exists():
            shutil.copytree(api.models_dir, root)
        else:
            root.mkdir()
        paths = [Path(name), root, *root.rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield {"environ": {"MODELS_DIR": str(root), "HF_HOME": f"{name}/hf"}, "prefix": POWERLESS}
        for path in paths:
            path.chmod(0o755)


def test_a_models_folder_that_is_only_read(api: Commands) -> None:
    with readable_only(api) as empty:
        assert "MODELS_DIR" in api("download", "org/shapes", status=1, **empty).stderr
    api("download", "org/shapes")
    with readable_only(api) as there:
        assert "already" in api("download", "org/shapes", **there).stdout
        assert "org/shapes" in api("models", **there).stdout
        api("models", "verify", **there)
        api("models", "rm", "org/shapes", status=1, **there)
        assert "up to date" in api("models", "pull", "org/shapes", **there).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["models", "fly"],
        ["models", "show"],
        ["models", "rm"],
        ["download", "../etc"],
        ["download", "org/shapes", "--precision", "fp17"],
        ["download", "org/shapes", "--url", "nonsense"],
        ["download", "org/shapes", "--url", "ftp://host/x.tar"],
        ["download", "org/shapes", "--checkpoint-url", "https://host/x.png"],
        ["download", "org/shapes", "--checkpoint-config-url", "sdxl"],
        ["download", "org/shapes", "more"],
        ["models", "push", "demo/shapes", "https://host/x.tar.zst"],
        ["models", "push", "demo/shapes", "s3://host/bucket/x.safetensors"],
        ["models", "push", "demo/shapes", "s3://"],
        ["models", "push", "demo/shapes"],
    ],
    ids=" ".join,
)
def test_nonsense_is_answered_with_usage(api: Commands, arguments: list[str]) -> None:
    assert api(*arguments, status=2).stderr.strip()
    assert not api.models_dir.exists()


@pytest.mark.parametrize("arguments", [["rm", "../../x"], ["rm", ".staging"], ["show", "org/none"], ["verify", "x"]])
def test_what_is_not_here_is_said_with_what_is(api: Commands, arguments: list[str]) -> None:
    said = api("models", *arguments, status=1).stderr
    assert "not here" in said and "demo/shapes" in said


@pytest.mark.slow
def test_other_refusals(api: Commands, tmp_path: Path) -> None:
    assert "comes with this server" in api("models", "rm", "demo/shapes", status=1).stderr
    assert "demo/shapes" in api("download", "demo/none", status=1).stderr
    assert "PORT" in api("models", environ={"PORT": "eighty"}, status=2).stderr
    (tmp_path / "file").touch()
    api("download", "org/shapes", "--into", str(tmp_path / "file" / "x"), status=1)
    shutil.copytree(SHAPES, api.models_dir / "by--hand")
    assert "by hand" in api("models", "rm", "by/hand", status=1).stderr
    assert (api.models_dir / "by--hand" / UNET).is_file()
    api("models", "verify", "by/hand")


# -- a terminal -------------------------------------------------------------------------------------------


def on_a_terminal(api: Commands, *arguments: str, typed: str = "") -> tuple[int, str]:
    leader, follower = pty.openpty()
    process = api.start(*arguments, stdin=follower, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    if typed:
        os.write(leader, typed.encode())
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(leader, 65536):
            shown += chunk
    os.close(leader)
    return process.wait(60), shown.decode()


def test_bars_and_questions_on_a_terminal(api: Commands) -> None:
    status, shown = on_a_terminal(api, "download", "org/shapes")
    assert status == 0 and "Downloading" in shown and "100%" in shown and "\r" in shown
    status, shown = on_a_terminal(api, "models", "rm", "org/shapes", typed="n\n")
    assert status == 1 and "Remove?" in shown and len(api.listed()) == 1
    status, _ = on_a_terminal(api, "models", "rm", "--yes", "org/shapes")
    assert status == 0 and api.listed() == []


def test_a_reader_that_ends_early_is_no_fault(api: Commands) -> None:
    command = f"set -o pipefail; {sys.executable} -m api models show demo/shapes | true"
    out = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=api.environ, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in out.stderr and "Exception" not in out.stderr


# -- S3 ---------------------------------------------------------------------------------------------------


@pytest.fixture
def in_s3(api: Commands, store: Store) -> Commands:
    api.environ |= {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_S3_ENDPOINT_URL": store.endpoint,
        "AWS_S3_DEFAULT_BUCKET": store.bucket,
    }
    return api


@pytest.mark.parametrize(
    "key",
    [pytest.param("some/folder/", marks=pytest.mark.slow), pytest.param("a.tar.zst", marks=pytest.mark.slow), ""],
    ids=["folder", "archive", "default"],
)
def test_push_then_pull_elsewhere_gives_equal_files(in_s3: Commands, store: Store, tmp_path: Path, key: str) -> None:
    api, url = in_s3, f"s3:///{store.bucket}/{key}" if key else "s3://"
    api("download", "org/shapes")
    out = api("models", "push", "org/shapes", url)
    assert "Uploading" in out.stderr and SECRET not in out.stdout + out.stderr
    if not key:
        assert store.names() == {"models--org--shapes.tar.zst"}
    elsewhere = {"MODELS_DIR": str(tmp_path / "elsewhere"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    api("models", "pull", "org/shapes", "--url", url, environ=elsewhere)
    (model,) = api.listed()
    (pulled,) = [
        m for m in json.loads(api("models", "list", "--json", environ=elsewhere).stdout) if m["place"] == "volume"
    ]
    assert hashes(pulled["folder"]) == hashes(model["folder"])
    assert pulled["folder"].startswith(elsewhere["MODELS_DIR"]) and SECRET not in json.dumps(pulled)
    api("models", "verify", environ=elsewhere)


@pytest.mark.slow
def test_a_bundled_model_can_be_pushed(in_s3: Commands, store: Store) -> None:
    in_s3("models", "push", "demo/shapes", f"s3:///{store.bucket}/demo/")
    assert f"demo/{UNET}" in store.names()


@pytest.mark.slow
def test_what_is_not_at_model_url_is_fetched_and_kept_there(in_s3: Commands, store: Store) -> None:
    environ = {"MODEL_ID": "org/shapes", "MODEL_URL": "s3://"}
    out = in_s3("download", "--no-upload", environ=environ)
    assert "models push" in out.stdout and store.names() == set()
    in_s3("models", "rm", "org/shapes")
    out = in_s3("download", environ=environ)
    assert "kept at" in out.stdout and store.names() == {"models--org--shapes.tar.zst"}


@pytest.mark.slow
def test_an_upload_that_is_refused_leaves_the_model_here(in_s3: Commands, store: Store) -> None:
    url = "s3:///no-such-bucket-here/x.tar.zst"
    said = in_s3("download", "org/shapes", "--url", url, status=1).stderr
    assert SECRET not in said
    in_s3("download", "org/shapes")
    said = in_s3("models", "push", "org/shapes", url, status=1).stderr
    assert "no-such-bucket-here" in said and SECRET not in said
