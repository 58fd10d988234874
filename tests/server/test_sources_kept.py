"""What was fetched once stays: on the volume, and in S3 for the next container."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import shapes
from tests.hub import HubStandIn
from tests.running import Server, running
from tests.site import Site
from tests.sources import BUCKET, TOKEN, Bucket, draw, environ, is_same, manifest_of, moto

pytestmark = pytest.mark.slow

SHAPES = {"CHECKPOINT_CONFIG_URL": "demo/shapes"}


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("url", ["s3://", f"s3:///{BUCKET}/kept/"], ids=["archive", "folder"])
def test_a_miss_in_s3_is_fetched_elsewhere_and_kept_there(tmp_path: Path, url: str) -> None:
    """The next container gets it from S3, with the hub gone; the same one serves it with everything gone."""
    repo = {"org/name": {"main": shapes.plain(tmp_path / "plain")}}
    call = {"MODEL_ID": "org/name", "MODEL_URL": url}
    first, second = tmp_path / "first" / "models", tmp_path / "second" / "models"
    with moto() as s3:
        bucket = Bucket(s3)
        with HubStandIn(repo) as stand_in:
            stand_in.tokens = {TOKEN: set()}
            settings = environ(first, stand_in, s3)
            with running(settings, tmp_path / "log") as server:
                picture, _ = draw(server)
                image, answer = draw(server, **call)
                assert is_same(image, picture)
                assert answer["$meta"]["source"] == f"{stand_in.url}/org/name"
                assert "upload" not in answer["$timings"]
                complete = ".tar.zst" if url == "s3://" else "model_index.json"
                wait_for(lambda: any(n.endswith(complete) for n in bucket.names()) and not transfers(server))
                plainly, _ = draw(server, MODEL_ID="org/name")
                assert is_same(plainly, picture)
            stand_in.forget()
        with running(environ(second, None, s3), tmp_path / "log2") as server:
            image, answer = draw(server, **call)
            assert is_same(image, picture)
            assert answer["$meta"]["source"].startswith(f"http+s3://{s3}/")
            assert manifest_of(second, answer["$meta"]["source"]).verified
    # neither hub nor S3 are there any more
    with running(settings, tmp_path / "log3") as server:
        for again in (call, {"MODEL_ID": "org/name"}):
            image, answer = draw(server, **again)
            assert is_same(image, picture)
            assert not {"download", "extract"} & answer["$timings"].keys()


def transfers(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.client.get("/models").json()["transfers"]
    return found


def test_a_converted_checkpoint_is_kept_in_s3(tmp_path: Path) -> None:
    with moto() as s3, Site() as site:
        bucket = Bucket(s3)
        site.put("/one.safetensors", shapes.checkpoint(tmp_path / "one.safetensors").read_bytes())
        call = {"CHECKPOINT_URL": site.url + "/one.safetensors", **SHAPES, "MODEL_URL": f"s3:///{BUCKET}/one.tar.zst"}
        with running(environ(tmp_path / "a" / "models", None, s3), tmp_path / "log") as server:
            picture, _ = draw(server)
            image, answer = draw(server, **call)
            assert is_same(image, picture)
            assert "convert" in answer["$timings"]
            wait_for(lambda: "one.tar.zst" in bucket.names() and not transfers(server))
        site.files.clear()
        with running(environ(tmp_path / "b" / "models", None, s3), tmp_path / "log2") as server:
            image, answer = draw(server, **call)
            assert is_same(image, picture)
            assert "convert" not in answer["$timings"]


def test_with_the_model_on_the_volume_nothing_is_asked(tmp_path: Path) -> None:
    """A fresh process on the same volume; the stand-ins would hear of every request."""
    plain, other = shapes.plain(tmp_path / "plain"), shapes.other(tmp_path / "other")
    repos = {"hub/plain": {"main": plain, "dev": other}, "hub/gated": {"main": other}}
    with HubStandIn(repos, gated=["hub/gated"], tokens={TOKEN: ["hub/gated"]}) as hub, Site() as site:
        calls = [
            {"MODEL_ID": "hub/plain"},
            {"MODEL_ID": "hub/plain", "MODEL_REVISION": "dev"},
            {"MODEL_ID": "hub/gated"},
        ]
        calls.append({"MODEL_ID": "hub/plain", "MODEL_REVISION": hub.commit("hub/plain")})
        calls.append({"MODEL_URL": site.put("/a.tar.zst", shapes.zst(plain))})
        settings = environ(tmp_path / "models", hub)
        with running(settings, tmp_path / "log") as server:
            before = [draw(server, **call)[0] for call in calls]
        assert hub.log
        assert site.log
        hub.forget()
        site.forget()
        with running(settings, tmp_path / "log2") as server:
            for call, picture in zip(calls, before, strict=True):
                assert is_same(draw(server, **call)[0], picture)
        assert not hub.log
        assert not site.log
