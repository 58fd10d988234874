"""What a request says of a model proves nothing: whose name it is, what it weighs, where its configuration lies."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests import shapes
from tests.hub import HubStandIn
from tests.running import ROOT, Server
from tests.site import Site
from tests.sources import PROMPT, TOKEN, draw, environ, installed, is_same, refused

SHAPES = ROOT / "models" / "shapes"


@dataclass
class World:
    server: Server
    hub: HubStandIn
    site: Site
    models_dir: Path
    made: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("volume")
    other, third = shapes.other(made / "other", 1), shapes.other(made / "third", 2)
    with Site() as site, HubStandIn({"hub/a": {"main": other}, "hub/b": {"main": other}}, tokens={TOKEN: []}) as hub:
        site.put("/third.tar.zst", shapes.zst(third))
        settings = environ(root / "models", hub, VOLUME_LIMIT="200MiB")
        server = Server(settings, root / "log")
        try:
            server.wait_ready()
            yield World(server, hub, site, root / "models", made)
        finally:
            server.stop()


def test_an_alias_of_another_repository_is_not_that_repository(world: World) -> None:
    """Also a moment later, when what was answered last is still remembered."""
    bundled, _ = draw(world.server)
    alias, answer = draw(world.server, MODEL_ID="demo/shapes", HF_MODEL_ID="hub/a")
    plain, plainly = draw(world.server, MODEL_ID="hub/a")
    assert not is_same(alias, bundled)
    assert is_same(alias, plain)
    assert (answer["$meta"]["MODEL_ID"], plainly["$meta"]["MODEL_ID"]) == ("demo/shapes", "hub/a")
    assert is_same(draw(world.server)[0], bundled)


def test_an_old_folder_answers_for_its_own_name_only(world: World) -> None:
    shutil.copytree(SHAPES, world.models_dir / "models--old--name")
    site, _ = draw(world.server, MODEL_ID="old/name", MODEL_URL=f"{world.site.url}/third.tar.zst")
    aliased, _ = draw(world.server, MODEL_ID="old/name", HF_MODEL_ID="hub/b")
    plain, _ = draw(world.server, MODEL_ID="hub/b")
    old, _ = draw(world.server, MODEL_ID="old/name")
    assert is_same(aliased, plain)
    assert is_same(old, draw(world.server)[0])
    assert not is_same(site, old)
    assert not is_same(aliased, old)


def test_a_revision_moves_nothing_into_the_volume(world: World) -> None:
    outside = world.models_dir.parent / "private" / "mine"
    shutil.copytree(SHAPES, outside)
    shutil.copytree(SHAPES, world.models_dir / "models--older--name")
    for revision in ("name/../../private/mine", "../private/mine"):
        for more in ({}, {"MODEL_URL": f"{world.site.url}/third.tar.zst"}):
            refused(
                world.server.post(PROMPT, {"MODEL_ID": "older", "MODEL_REVISION": revision, **more}), "INVALID_INPUTS"
            )
    assert (outside / "model_index.json").is_file()


def test_a_name_that_a_request_gave_is_no_ones(world: World) -> None:
    url = f"{world.site.url}/third.tar.zst"
    draw(world.server, MODEL_ID="hub/coveted", MODEL_URL=url)
    refused(world.server.post(PROMPT, {"MODEL_ID": "hub/coveted"}), "MODEL_NOT_FOUND")
    refused(world.server.post(PROMPT, {"MODEL_ID": "hub/a", "HF_MODEL_ID": "hub/nothere"}), "MODEL_NOT_FOUND")


def test_meta_sent_back_draws_the_same(world: World) -> None:
    for call in ({"MODEL_ID": "hub/a"}, {"MODEL_ID": "my/own", "MODEL_URL": f"{world.site.url}/third.tar.zst"}):
        _, answer = draw(world.server, **call)
        meta = answer["$meta"]
        names = ("MODEL_ID", "MODEL_REVISION", "MODEL_PRECISION", "MODEL_URL", "PIPELINE", "SCHEDULER")
        again = world.server.post(meta["modelInputs"], {name: meta[name] for name in names if name in meta})
        assert again.status_code == 200, again.text
        assert again.json()["image_base64"] == answer["image_base64"]


def test_a_claim_of_size_evicts_nobody(world: World) -> None:
    draw(world.server, MODEL_ID="hub/a")
    before = set(installed(world.models_dir))
    with socket.create_server(("127.0.0.1", 0)) as liar:
        threading.Thread(target=_claim, args=(liar, 150 * 2**20), daemon=True).start()
        with pytest.raises(httpx.TimeoutException):
            world.server.post(PROMPT, {"MODEL_URL": f"http://127.0.0.1:{liar.getsockname()[1]}/x.tar"}, timeout=3)
    assert before <= set(installed(world.models_dir))
    too_large = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_claim, args=(too_large, 2**40), daemon=True).start()
    refused(
        world.server.post(PROMPT, {"MODEL_URL": f"http://127.0.0.1:{too_large.getsockname()[1]}/x.tar"}), "DISK_FULL"
    )
    too_large.close()


def _claim(server: socket.socket, size: int) -> None:
    """Says how long the body is, and sends nothing of it."""
    held = []
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        asked = connection.recv(65536)
        connection.sendall(f'HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nETag: "x"\r\n\r\n'.encode())
        if asked.startswith(b"HEAD"):
            connection.close()
        held.append(connection)


def test_strangers_that_send_nothing_hold_up_no_other_source(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]

        def ask(n: int) -> None:
            with pytest.raises(httpx.TimeoutException):
                httpx.post(
                    world.server.url,
                    json={"modelInputs": PROMPT, "callInputs": {"MODEL_URL": f"http://127.0.0.1:{port}/{n}.tar"}},
                    timeout=1,
                )

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shutil.rmtree(next(path for path in world.models_dir.glob("hub--b@*")))
        began = time.monotonic()
        draw(world.server, MODEL_ID="hub/b")
        assert time.monotonic() - began < 30  # they keep their places for minutes


@pytest.mark.parametrize(
    ("inputs", "call"),
    [
        ({"width": 100_000, "height": 64}, {"MODEL_ID": "hub/new"}),
        ({"image": "bm90IGEgcGljdHVyZQ=="}, {"MODEL_ID": "hub/new"}),
        ({"widht": 64}, {"MODEL_URL": "/new.tar.zst"}),
        ({}, {"MODEL_URL": "/new.tar.zst", "SCHEDULER": "NoScheduler"}),
        ({}, {"MODEL_URL": "/new.tar.zst", "PIPELINE": "NoPipeline"}),
        ({}, {"MODEL_URL": "/new.tar.zst", "image_format": "BMP"}),
    ],
)
def test_what_is_wrong_with_a_request_is_said_before_the_weights_come(
    world: World, inputs: dict[str, object], call: dict[str, str]
) -> None:
    if "MODEL_URL" in call:
        call = {**call, "MODEL_URL": world.site.url + call["MODEL_URL"]}
    world.hub.repos["hub/new"] = world.hub.repos["hub/a"]
    sent = dict(world.hub.sent)
    response = world.server.post({**PROMPT, **inputs}, call)
    assert 400 <= response.status_code < 500, response.text
    assert not response.json()["$error"]["code"].startswith("MODEL_")
    grown = {path: size for path, size in world.hub.sent.items() if size != sent.get(path, 0)}
    assert not [path for path in grown if path.endswith(".safetensors")]


def test_a_download_goes_on_when_whoever_asked_for_an_archive_has_gone(world: World) -> None:
    world.site.put("/slow.tar.zst", shapes.zst(shapes.other(world.made / "slow", 3)))
    world.site.fault("/slow", "slow", seconds=0.005)
    with pytest.raises(httpx.TimeoutException):
        world.server.post(PROMPT, {"MODEL_URL": f"{world.site.url}/slow.tar.zst"}, timeout=1)
    deadline = time.monotonic() + 60
    while not any(m.source.endswith("/slow.tar.zst") for m in installed(world.models_dir).values()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
