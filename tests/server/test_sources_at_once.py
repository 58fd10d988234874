"""Many requests for models that are not here yet: each is fetched once, side by side, and nobody else waits."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from tests import shapes
from tests.hub import HubStandIn
from tests.running import Server, running
from tests.sources import PROMPT, TOKEN, draw, environ, installed, is_same, refused

WEIGHTS = 8_000_000
"""Bytes, about, of the largest file of the demo model."""
FOUR = [f"hub/number-{number}" for number in range(4)]


@dataclass
class World:
    server: Server
    hub: HubStandIn
    models_dir: Path
    picture: np.ndarray

    def slow(self, repo: str, seconds: float) -> str:
        """The largest file of a repository takes this long from now on; where its bytes are."""
        path = self.hub.cdn_path(repo, "unet/diffusion_pytorch_model.safetensors")
        self.hub.fault(path, "slow", seconds=seconds / (WEIGHTS / 2**14))
        return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("volume")
    names = ["hub/shared", "hub/left", "hub/invalid", *FOUR]
    # each with weights of its own: the stand-in counts by content
    repos = {name: {"main": shapes.other(made / name, number)} for number, name in enumerate(names)}
    with HubStandIn(repos, tokens={TOKEN: []}) as hub:
        models_dir = root / "models"
        with running(environ(models_dir, hub, MAX_QUEUE="40"), root / "log") as server:
            yield World(server, hub, models_dir, draw(server)[0])


@pytest.fixture(autouse=True)
def forgotten(world: World) -> None:
    world.hub.forget()


def test_sixteen_first_requests_make_one_download(world: World) -> None:
    path = world.slow("hub/shared", 1.5)
    with ThreadPoolExecutor(17) as pool:
        began = time.monotonic()
        answers = [pool.submit(draw, world.server, MODEL_ID="hub/shared") for _ in range(16)]
        # what is here is served meanwhile
        time.sleep(0.5)
        quick = time.monotonic()
        assert is_same(draw(world.server)[0], world.picture)
        quick = time.monotonic() - quick
        assert not any(answer.done() for answer in answers)
        pictures = [answer.result()[0] for answer in answers]
    assert quick < (time.monotonic() - began) / 2
    assert all(is_same(picture, pictures[0]) for picture in pictures)
    # the index is read twice: to choose the files, and as one of them
    asked = {path: count - path.endswith("model_index.json") for path, count in world.hub.requests.items()}
    assert set(asked.values()) == {1}, asked
    (manifest,) = [m for m in installed(world.models_dir).values() if m.model_id == "hub/shared"]
    (weights,) = [f for f in manifest.files if f.path.startswith("unet/diffusion")]
    assert world.hub.sent[path] == weights.size


def test_four_models_are_fetched_side_by_side(world: World) -> None:
    paths = [world.slow(repo, 2.5) for repo in FOUR]
    together = 0
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(draw, world.server, MODEL_ID=repo) for repo in FOUR]
        before = [0] * 4
        while not all(answer.done() for answer in answers):
            time.sleep(0.1)
            now = [world.hub.sent[path] for path in paths]
            together += all(new > old for new, old in zip(now, before, strict=True))
            before = now
        pictures = [answer.result()[0] for answer in answers]
    assert together >= 5, "all four grew at the same time"
    assert not any(is_same(a, b) for a, b in itertools.pairwise(pictures))


@pytest.mark.parametrize(
    ("inputs", "call", "code"),
    [
        ({"width": 65}, {}, "INVALID_INPUTS"),
        ({}, {"SCHEDULER": "FlowMatchEulerDiscreteScheduler"}, "INVALID_SCHEDULER"),
    ],
    ids=["width", "scheduler"],
)
def test_what_is_wrong_with_a_request_is_told_before_weights_are_fetched(
    world: World, inputs: dict[str, Any], call: dict[str, str], code: str
) -> None:
    refused(world.server.post({**PROMPT, **inputs}, {"MODEL_ID": "hub/invalid", **call}), code)
    assert world.hub.log, "its configuration was"
    time.sleep(0.5)  # what was begun in spite of that would show by now
    assert not [path for path in world.hub.sent if "/cdn/" in path]


def test_a_client_that_leaves_does_not_end_the_download(world: World) -> None:
    path = world.slow("hub/left", 2)
    body = orjson.dumps({"modelInputs": PROMPT, "callInputs": {"MODEL_ID": "hub/left"}})
    with socket.create_connection(("127.0.0.1", world.server.port)) as client:
        head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        while world.hub.sent[path] < WEIGHTS / 10:
            time.sleep(0.02)
    there = world.hub.sent[path]
    assert there < WEIGHTS / 2
    end = time.monotonic() + 30
    while not any(m.model_id == "hub/left" for m in installed(world.models_dir).values()):
        assert time.monotonic() < end
        time.sleep(0.1)
    world.hub.forget()
    _, answer = draw(world.server, MODEL_ID="hub/left")
    assert not world.hub.log
    assert "download" not in answer["$timings"]


@pytest.mark.slow
def test_two_servers_on_one_volume_make_one_download(tmp_path: Path) -> None:
    models_dir = tmp_path / "models"
    with HubStandIn({"org/name": {"main": shapes.plain(tmp_path / "plain")}}, tokens={TOKEN: []}) as hub:
        settings = environ(models_dir, hub)
        with running(settings, tmp_path / "a.log") as a, running(settings, tmp_path / "b.log") as b:
            picture = draw(a)[0]
            path = hub.cdn_path("org/name", "unet/diffusion_pytorch_model.safetensors")
            hub.fault(path, "slow", seconds=2 / (WEIGHTS / 2**14))
            with ThreadPoolExecutor(8) as pool:
                answers = [pool.submit(draw, server, MODEL_ID="org/name") for server in (a, b) * 4]
                assert all(is_same(answer.result()[0], picture) for answer in answers)
            gets = {path: n for path, n in hub.requests.items() if path.startswith("GET /cdn/")}
            assert len(gets) == 3
            assert set(gets.values()) == {1}
    assert len(installed(models_dir)) == 1
