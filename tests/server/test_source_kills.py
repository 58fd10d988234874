"""``kill -9`` at random moments of fetching: what is on the volume is whole, and the same requests succeed then."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests import shapes
from tests.hub import HubStandIn
from tests.running import Server, running
from tests.site import Site
from tests.sources import PROMPT, TOKEN, Bucket, draw, environ, installed, is_same, moto, refused

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MOMENTS = 20
SHAPES = {"CHECKPOINT_CONFIG_URL": "demo/shapes"}


def ask(server: Server, call: dict[str, str]) -> threading.Thread:
    """Send a request that may be cut by the death of the server."""

    def post() -> None:
        with contextlib.suppress(httpx.HTTPError), httpx.Client(timeout=60) as client:
            client.post(server.url, json={"modelInputs": PROMPT, "callInputs": call})

    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    return thread


def converters(server: Server) -> list[int]:
    found = subprocess.run(
        ["pgrep", "-P", str(server.process.pid), "-f", "api.engine.convert"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [int(pid) for pid in found.stdout.split()]


def wait_installing(models_dir: Path) -> bool:
    """Until something is between its last check and its place; whether that was seen."""
    end = time.monotonic() + 7
    while time.monotonic() < end:
        # not by glob: folders move away while it looks
        with contextlib.suppress(FileNotFoundError):
            for staged in (models_dir / ".staging").iterdir():
                names = [path.name for path in staged.iterdir()]
                if any(name.startswith(".manifest.json") for name in names):
                    return True
    return False


def wait_gone(pids: list[int]) -> None:
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "processes outlive their server"
        time.sleep(0.05)


def test_the_server_is_killed_at_twenty_moments(tmp_path: Path) -> None:
    """In each round all kinds of sources are on their way at once, on one volume that is used on and on."""
    drawn = random.Random(20)
    plain = shapes.plain(tmp_path / "plain")
    models_dir = tmp_path / "models"
    one = shapes.checkpoint(tmp_path / "one.safetensors").read_bytes()
    zst = shapes.zst(plain)
    repos = {f"hub/m{n}": {"main": plain} for n in range(MOMENTS)}
    caught = {"download": 0, "extract": 0, "convert": 0, "install": 0}
    with moto() as s3, Site(s3) as proxy, Site() as site, HubStandIn(repos, tokens={TOKEN: []}) as hub:
        bucket = Bucket(s3)
        settings = environ(models_dir, hub, f"127.0.0.1:{proxy.port}")
        reference: np.ndarray | None = None
        server: Server | None = None
        todo: list[dict[str, str]] = []
        for moment in range(MOMENTS + 1):
            server = Server(settings, tmp_path / f"log-{moment}")
            try:
                server.wait_live()
                # what was asked for when the last one died
                for call in todo:
                    image, _ = draw(server, **call)
                    reference = image if reference is None else reference
                    assert is_same(image, reference), call
                assert len(installed(models_dir)) == 4 * moment
                if moment == MOMENTS:
                    break
                todo = [
                    {"MODEL_ID": f"hub/m{moment}"},
                    {"MODEL_URL": site.put(f"/{moment}.tar.zst", zst)},
                    {"MODEL_URL": bucket.put_folder(f"folder-{moment}", plain)},
                    {"CHECKPOINT_URL": site.put(f"/{moment}.safetensors", one), **SHAPES},
                ]
                hub.fault("/cdn/", "slow", seconds=0.004)
                site.fault(r"\.tar\.zst", "slow", seconds=0.004)
                proxy.fault(f"/folder-{moment}/unet", "slow", seconds=0.003)
                asked = [ask(server, call) for call in todo]
                if moment % 4 == 3:
                    caught["install"] += wait_installing(models_dir)
                else:
                    time.sleep(drawn.uniform(0.05, 7))
                for transfer in server.client.get("/models").json()["transfers"]:
                    caught[transfer["kind"]] += 1
                pids = [*server.worker_pids(), *converters(server)]
                os.kill(server.process.pid, signal.SIGKILL)
                for thread in asked:
                    thread.join(10)
                wait_gone(pids)
                installed(models_dir)  # what is there is whole
            finally:
                server.process.kill()
                server.process.wait()
                server.client.close()
                for source in (hub, site, proxy):
                    source.forget()
        assert len(installed(models_dir, again=True)) == 4 * MOMENTS
        assert not list((models_dir / ".staging").iterdir())
    print(f"killed during {caught}")
    assert all(caught.values()), caught
    with running({"MODELS_DIR": str(tmp_path / "none")}, tmp_path / "log") as server:
        assert reference is not None
        assert is_same(draw(server)[0], reference)


def test_the_conversion_is_killed(tmp_path: Path) -> None:
    """It is told; the server stays, and the same request succeeds."""
    drawn = random.Random(4)
    models_dir = tmp_path / "models"
    one = shapes.checkpoint(tmp_path / "one.safetensors").read_bytes()
    with Site() as site, running(environ(models_dir), tmp_path / "log") as server:
        picture, _ = draw(server)
        for moment in range(5):
            call = {"CHECKPOINT_URL": site.put(f"/{moment}.safetensors", one), **SHAPES}
            answers: list[httpx.Response] = []
            thread = threading.Thread(target=lambda call=call, out=answers: out.append(server.post(PROMPT, call)))  # type: ignore[misc]
            thread.start()
            while not (pids := converters(server)):
                time.sleep(0.01)
            time.sleep(drawn.uniform(0, 2))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)
                thread.join()
                if answers[0].status_code != 200:
                    assert "SIGKILL" in refused(answers[0], "MODEL_BROKEN")["message"]
            thread.join()
            assert is_same(draw(server, **call)[0], picture)
            assert len(installed(models_dir)) == moment + 1
