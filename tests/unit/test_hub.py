"""The hub source, with the real huggingface_hub against a stand-in that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from api.errors import CODES, ApiError
from api.models import hub, hub_transfer
from tests.hub import HubStandIn
from tests.running import ROOT

pytestmark = pytest.mark.slow

GOOD, OTHER, WRONG = "hf_goodtokengoodtoken", "hf_otherothertoken", "hf_wrongwrongtoken"
UNET = "unet/diffusion_pytorch_model.safetensors"


def quiet(phase: str, done: int, total: int | None) -> None:
    pass


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as authors publish one: fp16 twins, other formats, pictures."""
    folder = tmp_path_factory.mktemp("repo") / "main"
    shutil.copytree(ROOT / "models" / "shapes", folder)
    for weights in list(folder.rglob("*.safetensors")):
        half = {name: tensor.astype(np.float16) for name, tensor in load_file(weights).items()}
        save_file(half, weights.with_name(weights.name.replace(".safetensors", ".fp16.safetensors")))
    (folder / "README.md").write_text("# A model")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / "teaser.png").write_bytes(b"\x89PNG")
    (folder / "shapes.ckpt").write_bytes(b"pickle")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "unet" / "model.onnx").write_bytes(b"onnx")
    return folder


@pytest.fixture(scope="module")
def older(model: Path) -> Path:
    folder = model.parent / "older"
    shutil.copytree(model, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    return folder


@pytest.fixture(scope="module")
def served(model: Path, older: Path) -> Iterator[HubStandIn]:
    plain = {"main": model, "beta": older, "refs/tags/v1.0": older}
    repos = {
        "org/shapes": plain,
        "org/gated": {"main": model},
        "org/private": {"main": model},
        "alone": {"main": model},
    }
    tokens = {GOOD: ["org/gated", "org/private"], OTHER: []}
    with HubStandIn(repos, tokens=tokens, gated=["org/gated"], private=["org/private"]) as server:
        yield server


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library online, without this machine's login, and impatient."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for code, status in (("SOURCE_DENIED", 422), ("MODEL_CORRUPT", 502), ("DISK_FULL", 507)):
        monkeypatch.setitem(CODES, code, CODES.get(code, (status, "")))
    monkeypatch.setattr(hub, "_PAUSE", 0.01)
    monkeypatch.setattr(hub_transfer, "_PAUSE", 0.005)


@pytest.fixture
def server(served: HubStandIn) -> Iterator[HubStandIn]:
    served.forget()
    yield served
    served.forget()


def refused(call: Callable[[], Any]) -> ApiError:
    with pytest.raises(ApiError) as told:
        call()
    # what a log would show, causes included
    shown = "".join(traceback.format_exception(told.value)) + json.dumps(told.value.body())
    for secret in (GOOD, OTHER, WRONG, "signed-and-secret"):
        assert secret not in shown
    return told.value


# -- what there is -------------------------------------------------------------------------------------------


def test_resolve_names_commit_files_sizes_and_hashes(server: HubStandIn, model: Path) -> None:
    plan = hub.resolve("org/shapes", endpoint=server.url)
    assert (plan.model_id, plan.repo, plan.commit) == ("org/shapes", "org/shapes", server.commit("org/shapes"))
    assert plan.source == f"{server.url}/org/shapes"
    assert [f.path for f in plan.files] == list(plan.selection.files)
    for file in plan.files:
        content = (model / file.path).read_bytes()
        assert file.size == len(content)
        assert plan.commit in file.url
        if file.path.endswith(".safetensors"):
            assert file.sha256 == hashlib.sha256(content).hexdigest()
        else:
            blob = b"blob %d\0" % len(content) + content
            assert file.git_oid == hashlib.sha1(blob, usedforsecurity=False).hexdigest()
    assert plan.size == sum((model / f.path).stat().st_size for f in plan.files)
    # a listing, its index, and nothing of the weights
    assert sum(server.requests.values()) == 2


@pytest.mark.parametrize(("revision", "means"), [("", "main"), ("beta", "beta"), ("v1.0", "refs/tags/v1.0")])
def test_revisions(server: HubStandIn, revision: str, means: str) -> None:
    assert hub.resolve("org/shapes", revision, endpoint=server.url).commit == server.commit("org/shapes", means)


def test_a_commit_is_a_revision(server: HubStandIn) -> None:
    commit = server.commit("org/shapes", "beta")
    assert hub.resolve("org/shapes", commit, endpoint=server.url).commit == commit


def test_an_id_of_one_part(server: HubStandIn, tmp_path: Path) -> None:
    plan = hub.resolve("alone", endpoint=server.url)
    assert len(hub.fetch(plan, tmp_path / "m", quiet)) == len(plan.files)


def test_a_mirror_whose_listing_has_no_sizes(model: Path, tmp_path: Path) -> None:
    with HubStandIn({"org/shapes": {"main": model}}, sizes=False) as server:
        plan = hub.resolve("org/shapes", endpoint=server.url)
        assert {f.path: f.size for f in plan.files} == {f.path: (model / f.path).stat().st_size for f in plan.files}
        hub.fetch(plan, tmp_path / "m", quiet)
        assert (tmp_path / "m" / UNET).read_bytes() == (model / UNET).read_bytes()


# -- fetching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["", "fp16", "bf16"])
def test_fetch_brings_the_selection_and_nothing_else(
    server: HubStandIn, model: Path, tmp_path: Path, precision: str
) -> None:
    plan = hub.resolve("org/shapes", "", precision, endpoint=server.url)
    server.forget()
    entries = hub.fetch(plan, tmp_path / "m", quiet)
    got = files_in(tmp_path / "m")
    assert got == {name: (model / name).read_bytes() for name in plan.selection.files}
    assert (f"{UNET[:-12]}.fp16.safetensors" in got) == (precision == "fp16")
    assert {e.path: (e.size, e.sha256) for e in entries} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in got.items()
    }
    asked = {r.path.partition(f"/resolve/{plan.commit}/")[2] for r in server.log if "/resolve/" in r.path}
    assert asked == set(plan.selection.files)
    assert not (tmp_path / "m" / hub_transfer.WORK).exists()


@pytest.mark.slow
def test_what_was_fetched_is_a_pipeline(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from diffusers import DiffusionPipeline

    from tests.tiny import save_tiny

    save_tiny(tmp_path / "repo", seed=1, nsfw=False)
    for weights in list((tmp_path / "repo").rglob("*.safetensors")):
        half = {name: t.astype(np.float16) if t.dtype == np.float32 else t for name, t in load_file(weights).items()}
        save_file(half, weights.with_name(weights.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"})
    with HubStandIn({"tiny/sd": {"main": tmp_path / "repo"}}) as server:
        plan = hub.resolve("tiny/sd", precision="fp16", endpoint=server.url)
        hub.fetch(plan, tmp_path / "m", quiet)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "m", variant="fp16", dtype=torch.float32)
    assert pipe("x", num_inference_steps=1, height=64, width=64, output_type="np").images.shape == (1, 64, 64, 3)


def test_progress_counts_bytes_in_the_calling_thread(server: HubStandIn, tmp_path: Path) -> None:
    import threading

    seen: list[tuple[str, int, int | None, int]] = []
    plan = hub.resolve("org/shapes", endpoint=server.url)
    hub.fetch(plan, tmp_path / "m", lambda *told: seen.append((*told, threading.get_ident())))
    assert seen[-1][:3] == ("download", plan.size, plan.size)
    assert [done for _, done, _, _ in seen] == sorted(done for _, done, _, _ in seen)
    assert {thread for *_, thread in seen} == {threading.get_ident()}


def test_raising_from_progress_stops_and_the_rest_is_resumed(server: HubStandIn, tmp_path: Path) -> None:
    class Enough(ConnectionError, ValueError):
        """Not to be taken for one of the hub's."""

    def stop(phase: str, done: int, total: int | None) -> None:
        if done > 2_000_000:
            raise Enough

    plan = hub.resolve("org/shapes", endpoint=server.url)
    server.fault(r"^/cdn/", "slow", seconds=0.01)
    began = time.monotonic()
    with pytest.raises(Enough):
        hub.fetch(plan, tmp_path / "m", stop)
    assert time.monotonic() - began < 5
    server.forget()
    hub.fetch(plan, tmp_path / "m", quiet)
    assert sum(server.sent.values()) < plan.size - 1_000_000
    assert any(r.range for r in server.log)


def test_many_files_at_once(server: HubStandIn, tmp_path: Path) -> None:
    plan = hub.resolve("org/shapes", endpoint=server.url)
    server.fault(".", "slow", seconds=0.2)
    small = [f for f in plan.files if f.size < 2**14]
    few = hub.Plan(plan.model_id, plan.repo, plan.commit, plan.selection, tuple(small), plan.source)
    began = time.monotonic()
    hub.fetch(few, tmp_path / "m", quiet, workers=len(small))
    assert time.monotonic() - began < 0.2 * len(small) * 0.75


# -- faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "short"])
@pytest.mark.parametrize("round_", range(5))
def test_a_connection_cut_at_a_random_byte_is_resumed(
    server: HubStandIn, model: Path, tmp_path: Path, kind: str, round_: int
) -> None:
    plan = hub.resolve("org/shapes", endpoint=server.url)
    size = (model / UNET).stat().st_size
    at = random.Random(round_).randrange(1, size)
    path = server.cdn_path("org/shapes", UNET)
    server.fault(path, kind, at=at, times=1)
    hub.fetch(plan, tmp_path / "m", quiet)
    assert (tmp_path / "m" / UNET).read_bytes() == (model / UNET).read_bytes()
    ranges = [r.range for r in server.log if r.path == path]
    assert ranges[0] is None
    assert len(ranges) == 2
    # what had come was kept, but for what a closing connection loses on its way
    assert server.sent[path] <= size + 2**20


def test_a_server_that_knows_no_ranges(server: HubStandIn, model: Path, tmp_path: Path) -> None:
    plan = hub.resolve("org/shapes", endpoint=server.url)
    path = server.cdn_path("org/shapes", UNET)
    server.fault(path, "cut", at=3_000_000, times=1)
    server.fault(path, "whole")
    hub.fetch(plan, tmp_path / "m", quiet)
    assert (tmp_path / "m" / UNET).read_bytes() == (model / UNET).read_bytes()
    # the second answer was taken from its beginning: there was no third
    assert server.requests[f"GET {path}"] == 2


def test_a_cut_that_does_not_end_is_told_and_the_next_call_goes_on(
    server: HubStandIn, model: Path, tmp_path: Path
) -> None:
    plan = hub.resolve("org/shapes", endpoint=server.url)
    size, path = (model / UNET).stat().st_size, server.cdn_path("org/shapes", UNET)
    server.fault(path, "cut", at=size // 2)
    error = refused(lambda: hub.fetch(plan, tmp_path / "m", quiet))
    assert (error.code, error.status) == ("SOURCE_UNREACHABLE", 502)
    assert "127.0.0.1" in error.message
    assert not (tmp_path / "m" / UNET).exists()
    server.forget()
    hub.fetch(plan, tmp_path / "m", quiet)
    assert files_in(tmp_path / "m").keys() == set(plan.selection.files)
    assert server.sent[path] <= size // 2 + 2**20
    assert (tmp_path / "m" / UNET).read_bytes() == (model / UNET).read_bytes()


def test_killed_and_resumed(server: HubStandIn, model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from api.models import hub\n"
        "plan = hub.resolve('org/shapes')\n"
        "hub.fetch(plan, Path(sys.argv[1]), lambda *a: print(a[1], flush=True))\n"
    )
    folder = tmp_path / "m"
    environ = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environ["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-c", code, str(folder)]
    server.fault(r"^/cdn/", "slow", seconds=0.01)
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if int(line) > 3_000_000:
                break
        process.send_signal(signal.SIGKILL)
    assert not (folder / UNET).exists()
    server.forget()
    subprocess.run(command, cwd=ROOT, env=environ, check=True, stdout=subprocess.DEVNULL, timeout=60)
    plan = hub.resolve("org/shapes", endpoint=server.url)
    assert files_in(folder) == {name: (model / name).read_bytes() for name in plan.selection.files}
    fetched = sum(count for path, count in server.sent.items() if path.startswith("/cdn/"))
    assert 0 < fetched < plan.size - 1_000_000


@pytest.mark.parametrize(("name", "at"), [(UNET, 4_000_000), ("unet/config.json", 5), ("tokenizer/vocab.json", 99)])
def test_a_flipped_byte_is_found(server: HubStandIn, model: Path, tmp_path: Path, name: str, at: int) -> None:
    plan = hub.resolve("org/shapes", endpoint=server.url)
    path = server.cdn_path("org/shapes", name) if name == UNET else f"{name}$"
    server.fault(path, "wrong", at=at)
    error = refused(lambda: hub.fetch(plan, tmp_path / "m", quiet))
    assert (error.code, error.status) == ("MODEL_CORRUPT", 502)
    assert name in error.message
    assert not (tmp_path / "m" / name).exists()
    server.forget()
    server.fault(path, "wrong", at=at, times=1)
    hub.fetch(plan, tmp_path / "m", quiet)
    assert (tmp_path / "m" / name).read_bytes() == (model / name).read_bytes()


def test_what_lies_there_is_not_trusted(server: HubStandIn, model: Path, tmp_path: Path) -> None:
    plan = hub.resolve("org/shapes", endpoint=server.url)
    hub.fetch(plan, tmp_path / "m", quiet)
    damaged = tmp_path / "m" / UNET
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    server.forget()
    hub.fetch(plan, tmp_path / "m", quiet)
    assert damaged.read_bytes() == (model / UNET).read_bytes()
    assert {r.path.rpartition("/")[2] for r in server.log if "/resolve/" in r.path} == {UNET.rpartition("/")[2]}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(server: HubStandIn, tmp_path: Path, status: int) -> None:
    server.fault("/api/models/", "status", status=status, times=2)
    plan = hub.resolve("org/shapes", endpoint=server.url)
    server.fault("/resolve/|/cdn/", "status", status=status, times=6)
    assert len(hub.fetch(plan, tmp_path / "m", quiet)) == len(plan.files)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_stays_busy_is_told(server: HubStandIn, tmp_path: Path, status: int) -> None:
    plan = hub.resolve("org/shapes", endpoint=server.url)
    server.fault(".", "status", status=status, headers={"Retry-After": "120"})
    for call in (
        lambda: hub.resolve("org/shapes", endpoint=server.url),
        lambda: hub.fetch(plan, tmp_path / "m", quiet),
    ):
        error = refused(call)
        assert (error.code, error.status, error.retry_after) == ("SOURCE_UNREACHABLE", 502, 120)
        assert str(status) in error.message


@pytest.mark.parametrize("status", [403, 404, 503])
def test_a_refusal_of_the_cdn_does_not_tell_the_signed_address(server: HubStandIn, tmp_path: Path, status: int) -> None:
    plan = hub.resolve("org/shapes", endpoint=server.url)
    server.fault("^/cdn/", "status", status=status)
    error = refused(lambda: hub.fetch(plan, tmp_path / "m", quiet))
    assert error.code == {403: "SOURCE_DENIED", 404: "MODEL_NOT_FOUND", 503: "SOURCE_UNREACHABLE"}[status]


def test_no_answer_and_nobody_there(server: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    server.fault("/api/models/", "stall", seconds=0.5)
    error = refused(lambda: hub.resolve("org/shapes", endpoint=server.url))
    assert (error.code, "no answer in time" in error.message) == ("SOURCE_UNREACHABLE", True)
    error = refused(lambda: hub.resolve("org/shapes", endpoint="http://127.0.0.1:1"))
    assert (error.code, "no connection" in error.message) == ("SOURCE_UNREACHABLE", True)


def test_a_server_that_is_no_hub(server: HubStandIn) -> None:
    server.fault("/api/models/", "status", status=200, body=b"<html>welcome</html>")
    assert refused(lambda: hub.resolve("org/shapes", endpoint=server.url)).code == "SOURCE_UNREACHABLE"


def test_offline_no_request_is_made(server: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(lambda: hub.resolve("org/shapes", endpoint=server.url))
    assert (error.code, "HF_HUB_OFFLINE" in error.message) == ("SOURCE_UNREACHABLE", True)
    assert not server.log


def test_a_full_disk(server: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    plan = hub.resolve("org/shapes", endpoint=server.url)
    monkeypatch.setattr(hub_transfer.os, "fsync", full)
    error = refused(lambda: hub.fetch(plan, tmp_path / "m", quiet))
    assert error.code == "DISK_FULL"
    monkeypatch.undo()
    assert not set(files_in(tmp_path / "m")) & set(plan.selection.files)


# -- who may -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo", ["org/gated", "org/private"])
def test_with_a_token(server: HubStandIn, model: Path, tmp_path: Path, repo: str) -> None:
    plan = hub.resolve(repo, token=f" {GOOD}\n", endpoint=server.url)
    hub.fetch(plan, tmp_path / "m", quiet, token=GOOD)
    assert (tmp_path / "m" / UNET).read_bytes() == (model / UNET).read_bytes()
    assert GOOD not in repr(plan)
    assert any(r.authorization == f"Bearer {GOOD}" for r in server.log)
    # the CDN is another host
    assert all(r.authorization is None for r in server.log if r.path.startswith("/cdn/"))


def test_the_token_of_the_environment(server: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", GOOD)
    plan = hub.resolve("org/gated", endpoint=server.url)
    assert hub.fetch(plan, tmp_path / "m", quiet)
    monkeypatch.setenv("HF_TOKEN", OTHER)
    assert "no access" in refused(lambda: hub.resolve("org/gated", endpoint=server.url)).message


def test_gated(server: HubStandIn) -> None:
    error = refused(lambda: hub.resolve("org/gated", endpoint=server.url))
    assert (error.code, error.field) == ("SOURCE_DENIED", "callInputs.MODEL_ID")
    assert "HF_TOKEN" in error.message
    assert f"{server.url}/org/gated" in error.message
    error = refused(lambda: hub.resolve("org/gated", token=OTHER, endpoint=server.url))
    assert error.code == "SOURCE_DENIED"
    assert "its account has no access" in error.message
    # access that ends between the two
    plan = hub.resolve("org/gated", token=GOOD, endpoint=server.url)
    assert refused(lambda: hub.fetch(plan, Path("unused"), quiet, token=OTHER)).code == "SOURCE_DENIED"


@pytest.mark.parametrize("token", [None, OTHER])
@pytest.mark.parametrize("repo", ["org/private", "org/nothing"])
def test_missing_or_private(server: HubStandIn, repo: str, token: str | None) -> None:
    error = refused(lambda: hub.resolve(repo, token=token, endpoint=server.url))
    assert (error.code, error.status, error.requested) == ("MODEL_NOT_FOUND", 404, repo)
    assert "private" in error.message
    assert "HF_TOKEN" in error.message


def test_a_wrong_token(server: HubStandIn) -> None:
    error = refused(lambda: hub.resolve("org/shapes", token=WRONG, endpoint=server.url))
    assert (error.code, "HF_TOKEN" in error.message) == ("SOURCE_DENIED", True)
    error = refused(lambda: hub.resolve("org/shapes", token=f"{WRONG}\r\nX: y", endpoint=server.url))
    assert (error.code, "HF_TOKEN" in error.message) == ("SOURCE_DENIED", True)


def test_no_secret_in_logs(
    server: HubStandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    plan = hub.resolve("org/gated", token=GOOD, endpoint=server.url)
    server.fault(server.cdn_path("org/gated", UNET), "wrong", at=9)
    refused(lambda: hub.fetch(plan, tmp_path / "m", quiet, token=GOOD))
    assert "SHA-256 differs" in caplog.text
    assert GOOD not in caplog.text + "".join(capfd.readouterr())


def test_credentials_in_the_endpoint_are_not_told(server: HubStandIn) -> None:
    endpoint = server.url.replace("http://", "http://me:pass-word@")
    error = refused(lambda: hub.resolve("org/nothing", endpoint=endpoint))
    assert "pass-word" not in error.message


# -- names ---------------------------------------------------------------------------------------------------


def test_a_missing_revision_lists_what_there_is(server: HubStandIn) -> None:
    error = refused(lambda: hub.resolve("org/shapes", "nope", endpoint=server.url))
    assert (error.code, error.status, error.field) == ("MODEL_NOT_FOUND", 404, "callInputs.MODEL_REVISION")
    assert (error.requested, error.available) == ("nope", ["main", "beta", "v1.0"])
    assert "MODEL_PRECISION" not in error.message


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_precision_is_not_a_revision(server: HubStandIn, precision: str) -> None:
    error = refused(lambda: hub.resolve("org/shapes", precision, endpoint=server.url))
    assert "A precision is not a revision: use MODEL_PRECISION." in error.message
    assert error.available == ["main", "beta", "v1.0"]


@pytest.mark.parametrize("revision", ["../../etc", "a/../b", "/abs", "a//b", "a b", "x?y=1", "-x", "a" * 201])
def test_unsafe_names_reach_nobody(server: HubStandIn, revision: str, tmp_path: Path) -> None:
    assert refused(lambda: hub.resolve("org/shapes", revision, endpoint=server.url)).code == "INVALID_INPUTS"
    assert refused(lambda: hub.cached("org/shapes", revision, tmp_path)).code == "INVALID_INPUTS"
    for bad in ("../x", "a/b/c", "http://x"):
        assert refused(lambda bad=bad: hub.resolve(bad, endpoint=server.url)).code == "INVALID_INPUTS"
    assert not server.log


def test_a_repository_without_the_layout(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "dreams.safetensors").write_bytes(b"x")
    with HubStandIn({"org/single": {"main": tmp_path / "repo"}}) as server:
        error = refused(lambda: hub.resolve("org/single", endpoint=server.url))
    assert (error.code, error.available) == ("MODEL_BROKEN", ["dreams.safetensors"])


# -- through the library, for Xet ----------------------------------------------------------------------------


def test_the_library_does_it_where_there_is_xet(
    server: HubStandIn, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_transfer._Transfer, "_on_xet", lambda self, file: True)
    seen: list[int] = []
    plan = hub.resolve("org/gated", token=GOOD, endpoint=server.url)
    entries = hub.fetch(plan, tmp_path / "m", lambda phase, done, total: seen.append(done), token=GOOD)
    assert files_in(tmp_path / "m") == {name: (model / name).read_bytes() for name in plan.selection.files}
    assert {e.path for e in entries} == set(plan.selection.files)
    assert seen[-1] == plan.size
    assert any(r.method == "HEAD" for r in server.log)
    server.fault(server.cdn_path("org/gated", UNET), "wrong", at=9)
    assert refused(lambda: hub.fetch(plan, tmp_path / "n", quiet, token=GOOD)).code == "MODEL_CORRUPT"


def test_xet_that_fails_gives_way_to_plain_http(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    with HubStandIn({"org/shapes": {"main": model}}, xet=True) as server:
        plan = hub.resolve("org/shapes", endpoint=server.url)
        hub.fetch(plan, tmp_path / "m", quiet)
        assert files_in(tmp_path / "m") == {name: (model / name).read_bytes() for name in plan.selection.files}
        assert any("xet-read-token" in path for path in server.requests)


# -- a cache that a platform brings --------------------------------------------------------------------------


@pytest.fixture
def cache(server: HubStandIn, tmp_path: Path) -> Path:
    """Filled by the library itself."""
    folder = tmp_path / "hub"
    huggingface_hub.snapshot_download("org/shapes", cache_dir=folder, endpoint=server.url)
    server.forget()
    return folder


def test_cached_is_found_without_a_request(server: HubStandIn, cache: Path) -> None:
    commit = server.commit("org/shapes")
    snapshot = cache / "models--org--shapes" / "snapshots" / commit
    for revision in ("", "main", commit):
        for precision in ("", "fp16"):
            assert hub.cached("org/shapes", revision, cache, precision) == snapshot
    assert not server.log
    assert hub.cached("org/shapes", "beta", cache) is None
    assert hub.cached("org/other", "", cache) is None
    assert hub.cached("org/shapes", "f" * 40, cache) is None


@pytest.mark.parametrize(
    "gone", [UNET, "unet/config.json", "model_index.json", "scheduler/scheduler_config.json", "unet"]
)
def test_half_a_snapshot_is_none(cache: Path, gone: str) -> None:
    snapshot = hub.cached("org/shapes", "", cache)
    assert snapshot
    lost = snapshot / gone
    if gone == UNET:
        lost.resolve().unlink()  # a link to a blob that is not there; the .bin twin goes too
        (snapshot / "unet" / "diffusion_pytorch_model.bin").unlink()
    elif gone == "unet":
        shutil.rmtree(lost)
    else:
        lost.unlink()
    found = hub.cached("org/shapes", "", cache)
    assert found is None


def test_cached_without_refs(cache: Path) -> None:
    repository = cache / "models--org--shapes"
    shutil.rmtree(repository / "refs")
    assert hub.cached("org/shapes", "", cache) is not None
    assert hub.cached("org/shapes", "main", cache) is None
    (repository / "snapshots" / ("a" * 40)).mkdir()
    assert hub.cached("org/shapes", "", cache) is None


def test_cached_does_not_follow_a_ref_out(server: HubStandIn, cache: Path) -> None:
    repository = cache / "models--org--shapes"
    shutil.copytree(repository / "snapshots" / server.commit("org/shapes"), repository / "elsewhere")
    (repository / "refs" / "main").write_text("../elsewhere")
    assert hub.cached("org/shapes", "", cache) is None
