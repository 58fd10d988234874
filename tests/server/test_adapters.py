"""Adapters over HTTP: from every source, in every format, kept like models; refused with reasons, and told in ``$meta``."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from api.models.manifest import sha256_of
from tests import shapes
from tests.adapters import random_halves, save_kohya, save_peft
from tests.hub import HubStandIn
from tests.running import ROOT, Server, images_of, running
from tests.site import Site
from tests.sources import PROMPT, TOKEN, Bucket, draw, environ, installed, is_same, moto, refused

SUN = "demo/adapters/sun.safetensors"


@dataclass
class World:
    server: Server
    hub: HubStandIn
    bucket: Bucket
    site: Site
    models_dir: Path
    made: Path
    lora: np.ndarray
    """The usual picture with the LoRA ``one.safetensors``."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("volume")
    pipe = StableDiffusionPipeline.from_pretrained(shapes.SHAPES)
    halves = random_halves(pipe.components, 5, size=0.05)
    one = save_peft(made / "one.safetensors", halves)
    save_kohya(made / "kohya.safetensors", halves, alpha=4.0, more=["lora_unet_nowhere.lora_down.weight"])
    repo = made / "repo"
    (repo / "deep").mkdir(parents=True)
    for name in ("deep/one.safetensors", "pytorch_lora_weights.safetensors"):
        (repo / name).write_bytes(one.read_bytes())
    local = made / "local" / "by--hand"
    local.mkdir(parents=True)
    (local / "mine.safetensors").write_bytes(one.read_bytes())
    doors: dict[str, Any] = {"private": ["some/private"], "tokens": {TOKEN: ["some/private"]}}
    with (
        HubStandIn({"some/loras": {"main": repo}, "some/private": {"main": repo}}, **doors) as hub,
        moto() as s3,
        Site() as site,
    ):
        bucket = Bucket(s3)
        bucket.put("loras/one.safetensors", one.read_bytes())
        for name in ("one.safetensors", "kohya.safetensors"):
            site.put(f"/{name}", (made / name).read_bytes())
        log = root / "server.log"
        with running(environ(root / "models", hub, s3, LOCAL_MODELS=str(made / "local")), log) as server:
            picture, _ = draw(server, lora_weights=f"{site.url}/one.safetensors")
            assert not is_same(picture, draw(server)[0])
            yield World(server, hub, bucket, site, root / "models", made, picture)
        assert TOKEN not in log.read_text()
        assert "Traceback" not in log.read_text()


SOURCES = {
    "https": "{site}/one.safetensors",
    "https with a name": "{site}/download/123#fname=one.safetensors",
    "s3": "s3:///models/loras/one.safetensors",
    "hub": "some/loras/deep/one.safetensors",
    "hub with a name": "some/loras#fname=deep/one.safetensors",
    "hub by its usual name": "some/loras",
    "hub at a revision": "some/loras/deep/one.safetensors#revision=main",
    "hub with the server's token": "some/private/deep/one.safetensors",
    "by hand": "by/hand/mine.safetensors",
}


@pytest.mark.parametrize("address", SOURCES.values(), ids=SOURCES)
def test_every_source(world: World, address: str) -> None:
    """The same picture from each; the second time nobody is asked."""
    world.site.put("/download/123", (world.made / "one.safetensors").read_bytes())
    text = address.format(site=world.site.url)
    first, answer = draw(world.server, lora_weights=[text])
    assert np.array_equal(first, world.lora)
    (told,) = answer["$meta"]["lora_weights"]
    assert told["sha256"] == sha256_of(world.made / "one.safetensors")
    assert told["scale"] == 1.0
    world.site.forget()
    world.hub.forget()
    assert np.array_equal(draw(world.server, lora_weights=text)[0], world.lora)
    assert not world.site.log
    assert not world.hub.log
    again, _ = draw(world.server, lora_weights=answer["$meta"]["lora_weights"])  # $meta can be sent again
    assert np.array_equal(again, world.lora)
    assert not world.site.log
    assert not world.hub.log
    installed(world.models_dir)


def test_forms_of_asking(world: World) -> None:
    url = f"{world.site.url}/one.safetensors"
    half = draw(world.server, lora_weights=f"{url}#scale=0.5")[0]
    assert not is_same(half, world.lora)
    for said in (
        {"url": url, "scale": 0.5},
        [{"url": url, "scale": "0.5"}],
        [f"{url}#scale=0.25", f"{url}#scale=0.25"],
    ):
        assert is_same(draw(world.server, lora_weights=said)[0], half), said
    response = world.server.post({**PROMPT, "cross_attention_kwargs": {"scale": 0.5}}, {"lora_weights": url})
    assert is_same(images_of(response.json())[0].astype(int), half)
    plain = draw(world.server)[0]
    for said in ([], None, "", f"{url}#scale=0"):
        assert np.array_equal(draw(world.server, lora_weights=said)[0], plain), said


def test_kohyas_format_and_keys_that_nobody_knows(world: World) -> None:
    picture, answer = draw(world.server, lora_weights=f"{world.site.url}/kohya.safetensors")
    assert is_same(picture, world.lora)  # alpha is the rank
    (told,) = answer["$meta"]["unused_adapter_keys"].values()
    assert told == {"count": 1, "first": ["lora_unet_nowhere.lora_down.weight"]}


def pickled(content: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


@pytest.mark.slow
def test_pickles_are_converted(world: World) -> None:
    """By torch's weights-only loader; what holds anything else is refused, and nothing of it stays."""
    site, (rows,) = world.site, load_file(ROOT / "models" / "adapters" / "sun.safetensors").values()
    weights = site.put("/one.bin", pickled(load_file(world.made / "one.safetensors")))
    picture, answer = draw(world.server, lora_weights=weights)
    assert np.array_equal(picture, world.lora)
    (told,) = answer["$meta"]["lora_weights"]
    again = site.put("/again.bin", pickled(load_file(world.made / "one.safetensors")))
    assert np.array_equal(draw(world.server, lora_weights={**told, "url": again})[0], world.lora)  # as where it is not
    wrong = {**told, "url": site.put("/wrong.bin", pickled({"<sun>": rows}))}
    refused(world.server.post(PROMPT, {"lora_weights": wrong}), "MODEL_CORRUPT")
    forms = {"/sun.bin": {"<sun>": rows}, "/sun.pt": {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}}}
    inputs = {"prompt": "a <sun> on black", "seed": 1, "num_inference_steps": 4}
    expected = images_of(world.server.post(inputs, {"textual_inversions": SUN}).json())[0]
    assert not np.array_equal(expected, images_of(world.server.post(inputs).json())[0])
    for path, content in forms.items():
        url = site.put(path, pickled(content))
        own = images_of(world.server.post(inputs, {"textual_inversions": f"{url}#token=<sun>"}).json())[0]
        assert np.array_equal(own, expected), path
    before = set(installed(world.models_dir))
    bad = site.put("/bad.bin", pickled({"run": subprocess.run}))
    error = refused(world.server.post({"prompt": "x"}, {"lora_weights": bad}), "MODEL_BROKEN")
    assert "nothing is ever unpickled freely" in error["message"]
    assert set(installed(world.models_dir)) == before


def test_tokens(world: World) -> None:
    """The one that is asked for, the one that the file names, or the file's own name."""
    rows = load_file(ROOT / "models" / "adapters" / "sun.safetensors")["<sun>"]
    save_file({"emb_params": rows}, world.made / "solar.safetensors")
    url = world.site.put("/solar.safetensors", (world.made / "solar.safetensors").read_bytes())
    pictures = []
    for said, word in (
        (SUN, "<sun>"),
        (f"{SUN}#token=<s>", "<s>"),
        (url, "solar"),
        ({"url": url, "token": "zz"}, "zz"),
    ):
        inputs = {"prompt": f"a {word} on black", "seed": 1, "num_inference_steps": 4}
        answer = world.server.post(inputs, {"textual_inversions": said}).json()
        assert answer["$meta"]["textual_inversions"][0]["token"] == word
        pictures.append(images_of(answer)[0])
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_fetching_is_told_like_a_models(world: World) -> None:
    url = world.site.put("/told.safetensors", (world.made / "one.safetensors").read_bytes())
    call = {"lora_weights": url, "streamEvents": True}
    lines = [
        orjson.loads(line) for line in world.server.post({"prompt": "a", "num_inference_steps": 2}, call).iter_lines()
    ]
    phases = [(line["type"], line.get("status")) for line in lines if line.get("type") == "download"]
    assert ("download", "start") in phases
    assert ("download", "done") in phases
    assert "download" in lines[-1]["$timings"]


def test_jobs_for_later_and_plans(world: World) -> None:
    """A job has them as a request has; a plan reads names only."""
    call = {"lora_weights": f"{world.site.url}/one.safetensors"}
    started = world.server.client.post("/jobs", json={"modelInputs": PROMPT, "callInputs": call})
    assert started.status_code == 202, started.text
    while (job := world.server.client.get(f"/jobs/{started.json()['id']}").json())["state"] in (
        "IN_QUEUE",
        "IN_PROGRESS",
    ):
        time.sleep(0.05)
    assert np.array_equal(images_of(job["result"])[0], world.lora)
    assert job["result"]["$meta"]["lora_weights"][0]["scale"] == 1.0
    assert (
        world.server.client.post("/plan", json={"modelInputs": PROMPT, "callInputs": call}).json()["fits"] is not False
    )
    wrong = {"modelInputs": PROMPT, "callInputs": {"lora_weights": "just-a-name"}}
    for route in ("/jobs", "/plan"):
        refused(world.server.client.post(route, json=wrong), "INVALID_INPUTS")


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "a model": ({"lora_weights": "{site}/unet.safetensors"}, "INVALID_ADAPTER", "is no LoRA"),
    "an inversion": ({"lora_weights": SUN}, "INVALID_ADAPTER", "name it in textual_inversions"),
    "a LoRA": ({"textual_inversions": "{site}/one.safetensors"}, "INVALID_ADAPTER", "name it in lora_weights"),
    "a LoHa": ({"lora_weights": "{site}/loha.safetensors"}, "INVALID_ADAPTER", "is a LoHa"),
    "of FLUX": ({"lora_weights": "{site}/flux.safetensors"}, "INVALID_ADAPTER", "another family"),
    "of SDXL": ({"lora_weights": "{site}/sdxl.safetensors"}, "INVALID_ADAPTER", "as SDXL does; this model's are of 128"),
    "wide": ({"textual_inversions": "{site}/wide.safetensors"}, "INVALID_ADAPTER", "text encoders take 128"),
    "nothing fits": ({"lora_weights": "{site}/nothing.safetensors"}, "INVALID_ADAPTER", "nothing that fits"),
    "a page": ({"lora_weights": "{site}/page.safetensors"}, "MODEL_BROKEN", "neither safetensors nor"),
    "another file": ({"lora_weights": "{site}/one.safetensors#sha256=" + "0" * 64}, "MODEL_CORRUPT", "sha256"),
    "nowhere": ({"lora_weights": "{site}/gone.safetensors"}, "MODEL_NOT_FOUND", ""),
    "not on the hub": ({"lora_weights": "some/loras/gone.safetensors"}, "MODEL_NOT_FOUND", ""),
    "not bundled": ({"lora_weights": "demo/adapters/gone.safetensors"}, "MODEL_NOT_FOUND", "come with this server"),
    "a word": ({"textual_inversions": f"{SUN}#token=circle</w>"}, "INVALID_INPUTS", "stands for something already"),
    "twice": ({"textual_inversions": [SUN, SUN]}, "INVALID_INPUTS", "Two textual inversions"),
    "two words": ({"textual_inversions": f"{SUN}#token=a b"}, "INVALID_INPUTS", "one word"),
    "a number": ({"lora_weights": 5}, "INVALID_INPUTS", "Must be a URL"),
    "scale": ({"lora_weights": f"{SUN}#scale=much"}, "INVALID_INPUTS", "scale must be a number"),
    "of one number": ({"lora_weights": "{site}/scalar.safetensors"}, "INVALID_ADAPTER", "nothing that fits"),
    "misspelt": ({"lora_weights": ["a/b", f"{SUN}#scael=1"]}, "INVALID_INPUTS", "these are known"),
    "no name": ({"lora_weights": "just-a-name"}, "INVALID_INPUTS", "org/name"),
    "out of its folder": ({"lora_weights": "demo/adapters/../shapes/unet.safetensors"}, "INVALID_INPUTS", "not a path"),
    "too many": ({"lora_weights": ["a/b"] * 33}, "INVALID_INPUTS", "At most 32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said(world: World, case: str) -> None:
    call, code, words = BAD[case]
    site = world.site
    lora = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    files = {
        "unet": {"conv_in.weight": torch.zeros(2, 2, 3, 3)},
        "loha": {"lora_unet_x.hada_w1_a".replace("lora_", "lycoris_"): torch.zeros(2, 2)},
        "flux": {"transformer.x.lora_A.weight": torch.zeros(4, 3072)},
        "sdxl": {lora: torch.zeros(4, 2048)},
        "wide": {"<w>": torch.zeros(768)},
        "scalar": {lora: torch.zeros(128)},
        "nothing": {"unet.nowhere.lora_A.weight": torch.zeros(4, 8), "unet.nowhere.lora_B.weight": torch.zeros(8, 4)},
    }
    for name, tensors in files.items():
        save_file(tensors, world.made / "bad.safetensors")
        site.put(f"/{name}.safetensors", (world.made / "bad.safetensors").read_bytes())
    site.put("/page.safetensors", b"<!DOCTYPE html><title>Please log in</title>")
    call = json.loads(json.dumps(call).replace("{site}", site.url))
    error = refused(world.server.post({"prompt": "a circle", "num_inference_steps": 2}, call), code)
    assert words in error["message"], error
    (name,) = call
    assert error["field"].startswith(f"callInputs.{name}"), error


@pytest.mark.slow
def test_nothing_half_stays(world: World) -> None:
    """A download that breaks off is an error, leaves nothing that is taken for whole, and goes on the next time."""
    content = (world.made / "one.safetensors").read_bytes()
    url = world.site.put("/broken.safetensors", content)
    before = set(installed(world.models_dir))
    world.site.fault("/broken.safetensors", "cut", at=len(content) // 2, times=100)
    refused(world.server.post({"prompt": "a"}, {"lora_weights": url}), "SOURCE_UNREACHABLE")
    assert set(installed(world.models_dir)) == before
    world.site.forget()
    assert np.array_equal(draw(world.server, lora_weights=url)[0], world.lora)


def test_models_are_listed_without_them(world: World) -> None:
    """``GET /models`` lists models; ``python -m api models`` all that takes room, and removes it."""
    url = world.site.put("/listed.safetensors", (world.made / "one.safetensors").read_bytes())
    draw(world.server, lora_weights=url)
    names = [model["MODEL_ID"] for model in world.server.client.get("/models").json()["models"]]
    assert "demo/shapes" in names
    assert not [name for name in names if "safetensors" in name]
    env = environ(world.models_dir, world.hub)

    def models(*arguments: str) -> str:
        command = [sys.executable, "-m", "api", "models", *arguments]
        return subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout

    assert url in models("list")
    assert "safetensors" in models("show", url)
    assert "ok" in models("verify", url)
    assert "removed" in models("rm", "--yes", url)
    assert url not in models("list")
    world.site.forget()
    assert np.array_equal(draw(world.server, lora_weights=url)[0], world.lora)
    assert world.site.gets("/listed.safetensors") >= 1


def test_without_downloads_only_what_is_there(server: Server) -> None:
    error = refused(
        server.post({"prompt": "a"}, {"lora_weights": "https://example.com/x.safetensors"}), "MODEL_MISMATCH"
    )
    assert "RUNTIME_DOWNLOADS=0" in error["message"]
    inputs = {"prompt": "a <sun> on black", "num_inference_steps": 2}
    assert server.post(inputs, {"textual_inversions": SUN}).status_code == 200


def test_private_addresses_are_not_asked(tmp_path: Path) -> None:
    with Site() as site, running(environ(tmp_path / "models", ALLOW_PRIVATE_URLS="0"), tmp_path / "log") as server:
        url = site.put("/x.safetensors", b"x")
        refused(server.post({"prompt": "a"}, {"lora_weights": url}), "URL_NOT_ALLOWED")
        assert not site.log
