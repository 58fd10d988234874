"""Who may have a model, and where a request may lead: tokens, private networks, names that climb out of folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import shapes
from tests.hub import HubStandIn
from tests.running import Server
from tests.site import Site
from tests.sources import BUCKET, PROMPT, TOKEN, Bucket, draw, environ, moto, no_secrets, refused


@dataclass
class World:
    server: Server
    hub: HubStandIn
    bucket: Bucket
    site: Site
    root: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server as it is by default: requests may not lead into private networks."""
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("volume")
    plain = shapes.plain(made / "plain")
    names = ["hub/open", "hub/gated", "hub/private"]
    with (
        moto() as s3,
        Site() as site,
        HubStandIn({n: {"main": plain} for n in names}, gated=["hub/gated"], private=["hub/private"]) as hub,
    ):
        bucket = Bucket(s3)
        bucket.put("it.tar.zst", shapes.zst(plain))
        site.put("/it.tar.zst", b"not to be read")
        settings = environ(root / "models", hub, s3, ALLOW_PRIVATE_URLS="0")
        server = Server(settings, root / "log")
        try:
            server.wait_live()  # what is refused needs no worker
            yield World(server, hub, bucket, site, root)
        finally:
            server.stop()
        no_secrets((root / "log").read_text())


@pytest.mark.slow
def test_a_token_that_is_wrong_or_has_no_access(world: World) -> None:
    """The token is not known, then known without access, then it may; the request stays the same."""
    for repo in ("hub/gated", "hub/private"):
        world.hub.tokens.clear()
        error = refused(world.server.post(PROMPT, {"MODEL_ID": repo}), "SOURCE_DENIED", "MODEL_NOT_FOUND")
        assert repo in error["message"] or error["requested"] == repo
        assert "HF_TOKEN" in error["message"]
        world.hub.tokens[TOKEN] = set()
        error = refused(world.server.post(PROMPT, {"MODEL_ID": repo}), "SOURCE_DENIED", "MODEL_NOT_FOUND")
        assert "HF_TOKEN" in error["message"]
        world.hub.tokens[TOKEN] = {repo}
        assert draw(world.server, MODEL_ID=repo)[1]["$meta"]["source"].endswith(repo)


@pytest.mark.slow
def test_the_token_goes_to_the_hub_and_nowhere_else(world: World) -> None:
    world.hub.tokens[TOKEN] = {"hub/gated", "hub/private"}
    draw(world.server, MODEL_ID="hub/open")
    told = [r for r in world.hub.log if r.authorization]
    assert told
    assert not [r for r in told if r.path.startswith("/cdn/")]


PRIVATE = ["127.0.0.1", "localhost", "169.254.169.254", "10.0.0.1", "192.168.0.1", "[::1]", "0.0.0.0", "2130706433", "[::ffff:127.0.0.1]"]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_a_request_does_not_lead_into_private_networks(world: World, host: str) -> None:
    port = world.site.port
    for call in (
        {"MODEL_URL": f"http://{host}:{port}/it.tar.zst"},
        {"MODEL_URL": f"https://{host}:{port}/it.safetensors"},
        {"CHECKPOINT_URL": f"http://{host}:{port}/it.safetensors"},
        {"MODEL_URL": f"http+s3://{host}:{port}/{BUCKET}/it.tar.zst"},
        {"MODEL_URL": f"s3://{host}:{port}/{BUCKET}/folder/"},
    ):
        answer = world.server.post(PROMPT, call)
        refused(answer, "URL_NOT_ALLOWED")
        assert answer.status_code == 400
    assert not world.site.log


@pytest.mark.slow
def test_the_operators_own_storage_may_be_anywhere(world: World) -> None:
    for url in (f"s3:///{BUCKET}/it.tar.zst", f"http+s3://{world.bucket.address}/{BUCKET}/it.tar.zst"):
        assert draw(world.server, MODEL_URL=url)[1]["$meta"]["source"].endswith("/it.tar.zst")


CLIMBING = ["../../etc", "..", "a/../../b", "/etc", "a/b/c", "a\\b", "a/..", ".hidden/x", "a/b\n", "a//b", "%2e%2e/x", "a\0b"]  # fmt: skip


def test_names_do_not_climb(world: World) -> None:
    def tree() -> set[str]:
        return {str(p) for p in world.root.parent.rglob("*")}

    before = tree()
    calls = [{name: value} for value in CLIMBING for name in ("MODEL_ID", "HF_MODEL_ID")]
    calls += [{"MODEL_ID": "hub/open", "MODEL_REVISION": v} for v in ("../../x", "..", "a/../b", "/x", "a//b", "\n")]
    calls += [
        {"MODEL_URL": f"s3:///{BUCKET}/it.tar.zst#fname={name}"}
        for name in ("../x.tar", "/x.tar", "..", ".x.tar", "a/b.tar")
    ]
    calls += [
        {"MODEL_URL": f"s3:///{BUCKET}/a/../../b/"},
        {"MODEL_URL": "s3:///../x.tar"},
        {"MODEL_URL": "file:///etc"},
    ]
    for call in calls:
        answer = world.server.post(PROMPT, call)
        refused(answer, "INVALID_INPUTS")
        assert answer.status_code == 400, call
    new = tree() - before
    assert all("/models/" in path for path in new), new


def test_revisions_of_the_hub_stay_in_its_repository(world: World) -> None:
    world.hub.forget()
    for revision in ("../../other/name", "main/../../../x", "..%2f..%2fx"):
        refused(
            world.server.post(PROMPT, {"MODEL_ID": "hub/open", "MODEL_REVISION": revision}),
            "INVALID_INPUTS",
        )
    assert not world.hub.log


@pytest.mark.slow
def test_without_a_token_it_is_said_what_to_set(tmp_path: Path) -> None:
    plain = shapes.plain(tmp_path / "plain")
    with HubStandIn({"hub/gated": {"main": plain}}, gated=["hub/gated"]) as hub:
        server = Server(environ(tmp_path / "models", hub, HF_AUTH_TOKEN=""), tmp_path / "log")
        try:
            server.wait_live()
            error = refused(server.post(PROMPT, {"MODEL_ID": "hub/gated"}), "SOURCE_DENIED")
            assert "set HF_TOKEN" in error["message"]
            assert f"127.0.0.1:{hub.port}" in error["message"]
            hub.gated.clear()
            assert draw(server, MODEL_ID="hub/gated")[1]["$meta"]["MODEL_ID"] == "hub/gated"
        finally:
            server.stop()
