"""Every source, layout, precision and revision: the server fetches the model and draws the right picture with it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from scripts.demo_model.checker import check
from scripts.demo_model.grammar import Scene, Thing, caption
from tests import shapes
from tests.hub import HubStandIn
from tests.running import Server, images_of, running
from tests.site import Site
from tests.sources import (
    BUCKET,
    PROMPT,
    TOKEN,
    Bucket,
    draw,
    environ,
    installed,
    is_same,
    manifest_of,
    moto,
    refused,
)


@dataclass
class World:
    server: Server
    hub: HubStandIn
    bucket: Bucket
    site: Site
    models_dir: Path
    pictures: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def s3(self) -> str:
        return self.bucket.address


def cache_of(hub: HubStandIn, repo: str, folder: Path) -> None:
    """As the real library leaves it."""
    code = f"from huggingface_hub import snapshot_download; snapshot_download({repo!r}, cache_dir={str(folder)!r})"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One of each for all tests here: they ask for different models, or for the same on purpose."""
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("volume")
    plain, other = shapes.plain(made / "plain"), shapes.other(made / "other")
    both, half = shapes.half(made / "both", keep_plain=True), shapes.half(made / "half", keep_plain=False)
    pickled, models_dir = shapes.pickled(made / "pickled"), root / "models"
    repos = {
        "hub/plain": {"main": plain, "dev": other, "refs/tags/v1": other},
        "hub/both": {"main": both},
        "hub/half": {"main": half},
        "hub/sharded": {"main": shapes.sharded(made / "sharded")},
        "hub/pickled": {"main": pickled},
        "hub/gated": {"main": plain},
        "hub/private": {"main": plain},
        "hub/cached": {"main": plain},
    }
    doors = {"gated": ["hub/gated"], "private": ["hub/private"], "tokens": {TOKEN: ["hub/gated", "hub/private"]}}
    shapes.other(models_dir / "plain--other")
    shapes.plain(models_dir / "models--old--plain")
    shapes.pickled(models_dir / "models--old--pickled")
    shapes.plain(made / "local" / "local" / "nested")
    shapes.plain(made / "local" / "local--flat")
    with HubStandIn(repos, **doors) as hub, moto() as s3, Site() as site:
        cache_of(hub, "hub/cached", made / "cache")
        bucket = Bucket(s3)
        fill(bucket, site, made)
        log = root / "server.log"
        more = {"LOCAL_MODELS": str(made / "local"), "HUB_CACHES": str(made / "cache")}
        with running(environ(models_dir, hub, s3, **more), log) as server:
            here = World(server, hub, bucket, site, models_dir)
            here.pictures["plain"] = draw(server)[0]
            here.pictures["other"] = draw(server, MODEL_ID="plain/other")[0]
            assert not is_same(here.pictures["plain"], here.pictures["other"])
            yield here
        text = log.read_text()
        assert TOKEN not in text
        assert "Traceback" not in text


def fill(bucket: Bucket, site: Site, made: Path) -> None:
    plain, zst = made / "plain", shapes.zst(made / "plain")
    bucket.put_folder("folder", plain)
    bucket.put_folder("both", made / "both")
    bucket.put("packed.tar.zst", zst)
    bucket.put("models--s3--default.tar.zst", zst)
    bucket.put("models--s3--default--v1.tar.zst", shapes.zst(made / "other"))
    bucket.put("deep/packed.tar", shapes.tar(plain))
    bucket.put("packed.tar.gz", shapes.tar(plain, "w:gz", top="some-folder"))
    one = shapes.checkpoint(made / "one.safetensors").read_bytes()
    ckpt = shapes.checkpoint(made / "one.ckpt").read_bytes()
    bucket.put("one.safetensors", one)
    bucket.put("one.ckpt", ckpt)
    for path, content in {"/a.tar.zst": zst, "/b.tar.zst": zst, "/download": zst, "/private.tar.zst": zst}.items():
        site.put(path, content)
    site.put("/c.tgz", shapes.tar(plain, "w:gz"))
    site.put("/one.safetensors", one)
    site.put("/one.ckpt", ckpt)
    site.redirects["/moved.tar.zst"] = "/a.tar.zst"
    site.users["/private.tar.zst"] = "me:pa55word"


@dataclass(frozen=True)
class Case:
    """What is asked for, and what must be said of the answer."""

    name: str
    call: Callable[[World], dict[str, str]]
    source: Callable[[World], str] | None
    phases: tuple[str, ...] = ("download",)
    picture: str = "plain"
    verified: bool = True
    slow: bool = False
    shared: bool = False
    """An earlier case may have brought the same files."""


FETCHED, UNPACKED, CONVERTED = ("download",), ("download", "extract"), ("download", "convert")
SHAPES = {"CHECKPOINT_CONFIG_URL": "demo/shapes"}


def hub(
    name: str, phases: tuple[str, ...] = FETCHED, picture: str = "plain", shared: bool = False, **call: str
) -> Case:
    repo = f"hub/{name}"
    id_ = "hub-" + "-".join([name, *call.values()])
    return Case(
        id_, lambda w: {"MODEL_ID": repo, **call}, lambda w: f"{w.hub.url}/{repo}", phases, picture, shared=shared
    )


def s3(name: str, url: str, key: str, phases: tuple[str, ...] = UNPACKED, **more: Any) -> Case:
    call = more.pop("call", {})

    def asked(w: World) -> dict[str, str]:
        return {"MODEL_URL": url.format(s3=w.s3), **call}

    return Case(f"s3-{name}", asked, lambda w: f"http+s3://{w.s3}/{BUCKET}/{key}", phases, **more)


def http(name: str, path: str, phases: tuple[str, ...] = UNPACKED, fragment: str = "", **more: Any) -> Case:
    call, where, before = more.pop("call", {}), more.pop("where", "MODEL_URL"), more.pop("before", "")

    def asked(w: World) -> dict[str, str]:
        content = w.site.files.get(path, b"")
        url = w.site.url.replace("://", f"://{before}") + path
        return {where: url + fragment.format(sha256=hashlib.sha256(content).hexdigest()), **call}

    more.setdefault("verified", False)
    return Case(f"http-{name}", asked, lambda w: w.site.url + path, phases, **more)


def local(name: str, model_id: str, **more: Any) -> Case:
    return Case(f"local-{name}", lambda w: {"MODEL_ID": model_id}, None, (), **more)


CASES = [
    hub("plain"),
    hub("plain", shared=True, MODEL_PRECISION="fp32"),
    hub("plain", shared=True, MODEL_PRECISION="fp16"),
    hub("plain", shared=True, MODEL_REVISION="main"),
    hub("plain", MODEL_REVISION="dev", picture="other"),
    hub("plain", picture="other", shared=True, MODEL_REVISION="v1"),
    hub("both"),
    hub("sharded"),
    hub("pickled", CONVERTED),
    hub("gated"),
    hub("private"),
    Case("hub-by-HF_MODEL_ID", lambda w: {"MODEL_ID": "mine/name", "HF_MODEL_ID": "hub/sharded"}, lambda w: f"{w.hub.url}/hub/sharded", shared=True),
    s3("folder", "s3:///models/folder/", "folder/", FETCHED),
    s3("folder-without-slash", "s3:///models/folder", "folder/", FETCHED, shared=True),
    s3("tar.zst", "s3:///models/packed.tar.zst", "packed.tar.zst"),
    s3("tar.gz-with-a-top-folder", "s3:///models/packed.tar.gz", "packed.tar.gz"),
    s3("no-bucket", "s3:////deep/packed.tar", "deep/packed.tar"),
    s3("nothing-but-the-id", "s3://", "models--s3--default.tar.zst", call={"MODEL_ID": "s3/default"}),
    s3("the-id-and-a-revision", "s3://", "models--s3--default--v1.tar.zst", picture="other", call={"MODEL_ID": "s3/default", "MODEL_REVISION": "v1"}),
    s3("no-key", "s3:///models/", "models--s3--default.tar.zst", shared=True, call={"MODEL_ID": "s3/default"}),
    s3("endpoint", "http+s3://{s3}/models/packed.tar.zst", "packed.tar.zst", shared=True),
    s3("checkpoint", "s3:///models/one.safetensors", "one.safetensors", CONVERTED, call=SHAPES, slow=True),
    s3("ckpt", "s3:///models/one.ckpt", "one.ckpt", CONVERTED, call=SHAPES, slow=True),
    http("tar.zst", "/a.tar.zst"),
    http("tar.zst-with-sha256", "/b.tar.zst", fragment="#sha256={sha256}", verified=True),
    http("tgz", "/c.tgz"),
    http("fname", "/download", fragment="#fname=it.tar.zst"),
    http("redirect", "/moved.tar.zst"),
    http("password", "/private.tar.zst", before="me:pa55word@"),
    http("checkpoint", "/one.safetensors", CONVERTED, where="CHECKPOINT_URL", call=SHAPES, slow=True),
    http("checkpoint-with-sha256", "/one.safetensors", CONVERTED, "#sha256={sha256}", where="CHECKPOINT_URL", call=SHAPES, verified=True, slow=True),
    http("checkpoint-as-MODEL_URL", "/one.safetensors", CONVERTED, call=SHAPES, slow=True, shared=True),
    http("ckpt", "/one.ckpt", CONVERTED, where="CHECKPOINT_URL", call=SHAPES, slow=True),
    local("folder-in-MODELS_DIR", "plain/other", picture="other"),
    local("root-org-name", "local/nested"),
    local("root-org--name", "local/flat"),
    local("hub-cache", "hub/cached"),
    Case("local-old-layout", lambda w: {"MODEL_ID": "old/plain"}, lambda w: "models--old--plain", (), verified=False),
    Case("local-old-layout-pickled", lambda w: {"MODEL_ID": "old/pickled"}, lambda w: "models--old--pickled", ("convert",), verified=False),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in CASES]
)
def test_it_draws_the_right_picture(world: World, case: Case) -> None:
    call = case.call(world)
    image, answer = draw(world.server, **call)
    assert is_same(image, world.pictures[case.picture])
    meta, timings = answer["$meta"], answer["$timings"]
    assert meta.get("source") == (case.source(world) if case.source else None)
    moved = {"download", "extract", "convert", "upload"} & timings.keys()
    assert moved == set(case.phases) or (case.shared and not moved)
    if case.source:
        found = manifest_of(world.models_dir, meta["source"], meta["source_version"])
        assert found.verified is case.verified
    # the second time it is simply there
    world.hub.forget()
    world.site.forget()
    again, answer = draw(world.server, **call)
    assert is_same(again, image)
    assert answer["$meta"]["MODEL_REVISION"] == meta["MODEL_REVISION"]
    assert not {"download", "extract", "convert"} & answer["$timings"].keys()
    assert not world.hub.log
    assert not world.site.log


SCENE = Scene("one", (Thing("red", "circle"),), "blue")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param({"MODEL_ID": "hub/both"}, id="hub-variant-beside-plain"),
        pytest.param({"MODEL_ID": "hub/half"}, id="hub-only-the-variant", marks=pytest.mark.slow),
        pytest.param({"MODEL_URL": f"s3:///{BUCKET}/both/"}, id="s3-variant-beside-plain", marks=pytest.mark.slow),
    ],
)
def test_fp16_takes_the_variant_and_draws_what_is_asked(world: World, call: dict[str, str]) -> None:
    call = {"MODEL_PRECISION": "fp16", **call}
    right = 0
    for seed in range(4):
        inputs = {"prompt": caption(SCENE), "seed": seed, "num_inference_steps": 20}
        response = world.server.post(inputs, call)
        assert response.status_code == 200, response.text[:500]
        right += check(images_of(response.json())[0], SCENE).right
    assert right >= 3
    source = response.json()["$meta"]["source"]
    (found,) = [m for m in installed(world.models_dir).values() if m.source == source and m.variant == "fp16"]
    weights = [f.path for f in found.files if f.path.endswith(".safetensors")]
    assert len(weights) == 3
    assert all(name.endswith(".fp16.safetensors") for name in weights)


def test_a_precision_that_is_not_there_is_told(world: World) -> None:
    error = refused(world.server.post(PROMPT, {"MODEL_ID": "hub/half", "MODEL_PRECISION": "fp32"}), "MODEL_BROKEN")
    assert error["available"] == ["fp16"]
    # and it is no revision
    error = refused(world.server.post(PROMPT, {"MODEL_ID": "hub/plain", "MODEL_REVISION": "fp16"}), "MODEL_NOT_FOUND")
    assert "MODEL_PRECISION" in error["message"]
    assert set(error["available"]) == {"main", "dev", "v1"}


def test_what_is_secret_in_an_address_is_not_told(world: World) -> None:
    there = world.site.url.replace("://", "://me:pa55word@")
    world.site.users["/locked.tar.zst"] = "me:another"
    for path, code in {"/nothing": "MODEL_NOT_FOUND", "/locked": "SOURCE_DENIED"}.items():
        url = there + f"{path}.tar.zst?X-Amz-Signature=a1b2"
        error = refused(world.server.post(PROMPT, {"MODEL_URL": url}), code)
        assert f"127.0.0.1:{world.site.port}" in error["message"]
    assert "pa55word" not in (world.models_dir.parent / "server.log").read_text()
    assert not [p for p in world.models_dir.rglob("*.json") if p.is_file() and b"pa55word" in p.read_bytes()]


def test_requests_that_mean_the_same_share_a_folder(world: World) -> None:
    """And those that mean something else do not."""

    def key(**call: str) -> str:
        draw(world.server, **call)
        meta = draw(world.server, **call)[1]["$meta"]
        models = world.server.client.get("/models").json()["models"]
        (found,) = {
            m["key"]
            for m in models
            if (m["source"], m["MODEL_REVISION"])
            == (meta.get("source"), meta.get("source_version", meta["MODEL_REVISION"]))
        }
        return found

    commits = {rev: world.hub.commit("hub/plain", rev) for rev in ("main", "dev")}
    main = key(MODEL_ID="hub/plain")
    assert main == key(MODEL_ID="hub/plain", MODEL_REVISION="main") == key(MODEL_ID="hub/plain", MODEL_PRECISION="fp16")
    assert (
        main
        == key(MODEL_ID="hub/plain", MODEL_REVISION=commits["main"])
        == key(MODEL_ID="a/b", HF_MODEL_ID="hub/plain")
    )
    dev = key(MODEL_ID="hub/plain", MODEL_REVISION="dev")
    assert (
        dev
        == key(MODEL_ID="hub/plain", MODEL_REVISION="v1")
        == key(MODEL_ID="hub/plain", MODEL_REVISION=commits["dev"])
    )
    zst = key(MODEL_URL=f"s3:///{BUCKET}/packed.tar.zst")
    assert zst == key(MODEL_URL=f"http+s3://{world.s3}/{BUCKET}/packed.tar.zst#fname=x.tar.zst")
    assert len({main, dev, zst, key(MODEL_ID="hub/sharded"), key(MODEL_URL=world.site.url + "/a.tar.zst")}) == 5
    assert (
        draw(world.server, MODEL_ID="hub/plain", MODEL_REVISION=commits["dev"])[1]["$meta"]["MODEL_REVISION"]
        == commits["dev"]
    )


def test_the_stream_tells_how_far_it_is(world: World) -> None:
    """And so does ``GET /models``, meanwhile."""
    size = len(world.site.files["/a.tar.zst"])
    world.site.put("/watched.tar.zst", world.site.files["/a.tar.zst"])
    world.site.fault("/watched", "slow", seconds=2.5 / (size / 2**14))
    call = {"MODEL_URL": world.site.url + "/watched.tar.zst", "streamEvents": True}
    seen: list[dict[str, Any]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            seen.extend(world.server.client.get("/models").json()["transfers"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with world.server.client.stream("POST", "/", json={"modelInputs": PROMPT, "callInputs": call}) as response:
            lines = [orjson.loads(line) for line in response.iter_lines()]
    finally:
        over.set()
        watcher.join()
    assert is_same(images_of(lines[-1])[0].astype(int), world.pictures["plain"])
    events = {kind: [e for e in lines[:-1] if e["type"] == kind and "status" in e] for kind in ("download", "extract")}
    for kind, of_kind in events.items():
        assert [e["status"] for e in of_kind][:: len(of_kind) - 1] == ["start", "done"], kind
        assert {e["status"] for e in of_kind[1:-1]} == {"progress"}, kind
        done = [e["payload"]["bytes"] for e in of_kind]
        assert done == sorted(done)
        assert max(e["payload"]["rate"] for e in of_kind) > 0
    last = events["download"][-1]["payload"]
    assert (last["bytes"], last["total"], last["eta"]) == (size, size, 0.0)
    middle = events["download"][1]["payload"]
    assert 0 < middle["bytes"] < size
    assert 0 < middle["eta"] < 10
    order = [e["type"] for e in lines[:-1] if e.get("status") in ("start", "done")]
    assert order.index("inference") > max(i for i, kind in enumerate(order) if kind in ("download", "extract"))
    assert lines[-1]["$timings"]["download"] > 2000
    downloads = [t for t in seen if t["kind"] == "download"]
    assert downloads, seen
    assert all(t["total"] == size and t["status"] == "progress" for t in downloads)
    assert world.server.client.get("/models").json()["transfers"] == []


@pytest.mark.slow
def test_a_conversion_is_an_event_too(world: World) -> None:
    world.site.put("/told.safetensors", world.site.files["/one.safetensors"])
    call = {"CHECKPOINT_URL": world.site.url + "/told.safetensors", **SHAPES, "streamEvents": True}
    with world.server.client.stream("POST", "/", json={"modelInputs": PROMPT, "callInputs": call}) as response:
        lines = [orjson.loads(line) for line in response.iter_lines()]
    told = [(e["type"], e["status"]) for e in lines[:-1] if e.get("status") in ("start", "done")]
    wanted = [(kind, status) for kind in ("download", "convert") for status in ("start", "done")]
    assert told[:4] == wanted
    assert is_same(images_of(lines[-1])[0].astype(int), world.pictures["plain"])
