"""Upscaling over HTTP: the right colour in the right place, from every source, beside other jobs; refused with reasons."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from api.models.manifest import sha256_of
from scripts.demo_model.checker import check
from scripts.demo_model.grammar import Scene, Thing, caption
from tests import upscalers
from tests.hub import HubStandIn
from tests.running import Server, as_base64, images_of, running
from tests.site import Site
from tests.sources import TOKEN, Bucket, environ, installed, moto, refused
from tests.upscalers import a_picture, plainly

SCENE = Scene("one", (Thing("orange", "circle"),), "black", place="left")
INPUTS = {"prompt": caption(SCENE), "num_inference_steps": 20, "guidance_scale": 7.5, "seed": 1}


@dataclass
class World:
    server: Server
    hub: HubStandIn
    bucket: Bucket
    site: Site
    models_dir: Path
    made: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("volume")
    repo, local = made / "repo", made / "local" / "by--hand"
    one = upscalers.save(upscalers.compact(), repo / "deep" / "one.safetensors")
    upscalers.save(upscalers.repeating(), local / "repeating.safetensors")
    upscalers.save(upscalers.esrgan(), local / "esrgan.safetensors")
    save_file({"some.weight": torch.zeros(3, 3)}, local / "other.safetensors")
    (local / "cut.safetensors").write_bytes(one.read_bytes()[:-100])
    torch.save({"params": {"x": torch.zeros(1)}, "params_ema": load_file(one)}, made / "one.pth")
    doors: dict[str, Any] = {"tokens": {TOKEN: []}}
    with HubStandIn({"some/upscalers": {"main": repo}}, **doors) as hub, moto() as s3, Site() as site:
        bucket = Bucket(s3)
        bucket.put("upscalers/one.safetensors", one.read_bytes())
        site.put("/one.safetensors", one.read_bytes())
        site.put("/one.pth", (made / "one.pth").read_bytes())
        log = root / "server.log"
        settings = environ(root / "models", hub, s3, LOCAL_MODELS=str(made / "local"), MAX_UPSCALED_PIXELS="1000000")
        with running(settings, log) as server:
            yield World(server, hub, bucket, site, root / "models", made)
        assert "Traceback" not in log.read_text()


def larger(server: Server, picture: np.ndarray, **call: Any) -> tuple[np.ndarray, dict[str, Any]]:
    response = server.post({"image": as_base64(picture)}, {"use_extra": "upsample", **call})
    assert response.status_code == 200, response.text[:500]
    return images_of(response.json())[0], response.json()


SOURCES = {
    "https": "{site}/one.safetensors",
    "a pickle": "{site}/one.pth",
    "s3": "s3:///models/upscalers/one.safetensors",
    "hub": "some/upscalers/deep/one.safetensors",
    "hub at a revision": "some/upscalers/deep/one.safetensors#revision=main",
}


@pytest.mark.parametrize("address", SOURCES.values(), ids=SOURCES)
def test_every_source(world: World, address: str) -> None:
    """The same from each; the second time nobody is asked, and what ``$meta`` says can be sent again."""
    picture, one = a_picture(40, 60), world.made / "repo" / "deep" / "one.safetensors"
    made, answer = larger(world.server, picture, upscale={"model": address.format(site=world.site.url)})
    assert np.array_equal(made, plainly(one, picture))
    meta = answer["$meta"]
    if not address.endswith(".pth"):
        assert meta["upscale"]["sha256"] == sha256_of(one)
    assert meta["upscale"] | {"model": "", "sha256": ""} == {"model": "", "sha256": "", "scale": 2, "tile": 256}
    world.site.forget()
    world.hub.forget()
    again, _ = larger(world.server, picture, upscale=meta["upscale"])
    assert np.array_equal(again, made)
    assert not world.site.log
    assert not world.hub.log
    manifests = installed(world.models_dir)
    assert {manifest.adapter for manifest in manifests.values()} == {"upscaler"}
    listed = world.server.client.get("/models").json()
    (found,) = [each for each in listed["upscalers"] if each["model"] == meta["upscale"]["model"].partition("#")[0]]
    assert found["tier"] == "device"
    assert found["sha256"] == meta["upscale"]["sha256"]
    assert all("upscaler" not in str(each["MODEL_ID"]) and each["installed"] for each in listed["models"])


def test_the_right_colour_in_the_right_place(world: World) -> None:
    plain = images_of(world.server.post(INPUTS, {}).json())[0]
    assert check(plain, SCENE).right
    call = {"upscale": {"model": "by/hand/repeating.safetensors", "tile": 64}}
    response = world.server.post(INPUTS, call)
    assert response.status_code == 200, response.text[:500]
    body = response.json()
    image = Image.open(io.BytesIO(base64.b64decode(body["image_base64"])))
    assert (image.format, image.size) == ("PNG", (256, 256))
    made = np.asarray(image.convert("RGB"))
    assert np.array_equal(made, plain.repeat(4, 0).repeat(4, 1))
    assert check(np.asarray(image.resize((64, 64), Image.Resampling.BOX).convert("RGB")), SCENE).right
    meta = body["$meta"]
    assert meta["upscale"]["scale"] == 4
    assert meta["upscaler"] == {
        "architecture": "Compact", "scale": 4, "dtype": "float32", "pieces": [1, 1], "resized": None,
    }  # fmt: skip
    assert (meta["modelInputs"]["width"], meta["modelInputs"]["height"]) == (64, 64)
    assert body["$timings"]["upscale"] >= 0
    # the same again, by what $meta says
    inputs, again = meta["modelInputs"], {name: meta[name] for name in ("MODEL_ID", "SCHEDULER", "upscale")}
    assert np.array_equal(images_of(world.server.post(inputs, again).json())[0], made)


def test_as_docker_diffusers_api_had_it(world: World) -> None:
    picture = a_picture(50, 70)
    body = {"input_image": as_base64(picture), "face_enhance": False}
    call = {"MODEL_ID": "by/hand/esrgan.safetensors", "use_extra": "upsample"}
    response = world.server.post(body, call)
    assert response.status_code == 200, response.text[:500]
    plain = plainly(world.made / "local" / "by--hand" / "esrgan.safetensors", picture)
    assert np.array_equal(images_of(response.json())[0], plain)
    events = world.server.post(body, {**call, "streamEvents": True, "upscale": {"tile": 64}}).text.splitlines()
    assert sum('"type":"inference"' in line.replace(" ", "") for line in events) >= 2
    assert "image_base64" in events[-1]
    job = world.server.client.post("/jobs", json={"modelInputs": body, "callInputs": call}).json()
    with world.server.client.stream("GET", f"/jobs/{job['id']}/events") as reader:
        assert reader.status_code == 200
        list(reader.iter_lines())
    done = world.server.client.get(f"/jobs/{job['id']}").json()
    assert done["state"] == "COMPLETED"
    assert np.array_equal(images_of(done["result"])[0], plain)


def test_a_picture_keeps_its_opacity(world: World) -> None:
    picture = np.concatenate([a_picture(30, 40), a_picture(30, 40, 1, seed=5)], 2)
    call = {"use_extra": "upsample", "upscale": {"model": "by/hand/repeating.safetensors"}}
    body = world.server.post({"image": as_base64(picture)}, call).json()
    made = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["image_base64"]))))
    assert made.shape == (120, 160, 4)
    assert np.array_equal(made[:, :, :3], picture[:, :, :3].repeat(4, 0).repeat(4, 1))
    jpeg = world.server.post({"image": as_base64(picture)}, {**call, "image_format": "JPEG"})
    assert Image.open(io.BytesIO(base64.b64decode(jpeg.json()["image_base64"]))).mode == "RGB"


@pytest.mark.slow
def test_beside_image_jobs(world: World) -> None:
    """Eight at once: each as alone."""
    pictures = [a_picture(90, 120, seed=n) for n in range(4)]
    esrgan = {"model": "by/hand/esrgan.safetensors", "tile": 64}
    repeating = {"model": "by/hand/repeating.safetensors"}

    def upsample(picture: np.ndarray) -> np.ndarray:
        return larger(world.server, picture, upscale=esrgan)[0]

    def generate(seed: int) -> np.ndarray:
        call = {"upscale": repeating} if seed % 2 else {}
        return images_of(world.server.post({**INPUTS, "seed": seed}, call).json())[0]

    alone = [generate(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        images = [pool.submit(generate, seed) for seed in range(4)]
        enlarged = [pool.submit(upsample, picture) for picture in pictures]
        for one, image in zip(alone, images, strict=True):
            assert np.abs(one.astype(int) - image.result().astype(int)).max() <= 1
        path = world.made / "local" / "by--hand" / "esrgan.safetensors"
        for picture, made in zip(pictures, enlarged, strict=True):
            assert np.abs(plainly(path, picture).astype(int) - made.result().astype(int)).max() <= 1


HAND = "by/hand/repeating.safetensors"
PICTURE = as_base64(a_picture(64, 64))
UPSAMPLE = {"use_extra": "upsample", "MODEL_ID": HAND}
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "no such extra": ({"image": PICTURE}, {**UPSAMPLE, "use_extra": "upsmple"}, "NO_SUCH_EXTRA", "callInputs.use_extra"),
    "no upscaler": ({"image": PICTURE}, {"use_extra": "upsample"}, "NO_MODEL_ID", "callInputs.MODEL_ID"),
    "two upscalers": (
        {"image": PICTURE}, {**UPSAMPLE, "upscale": {"model": HAND}}, "INVALID_INPUTS", "callInputs.MODEL_ID",
    ),
    "no picture": ({}, UPSAMPLE, "MISSING_INPUT", "modelInputs.image"),
    "no picture at all": ({"image": "AAAA"}, UPSAMPLE, "INVALID_IMAGE", "modelInputs.image"),
    "two pictures": ({"image": PICTURE, "init_image": PICTURE}, UPSAMPLE, "INVALID_INPUTS", "modelInputs.init_image"),
    "a prompt": ({"image": PICTURE, "prompt": "x"}, UPSAMPLE, "UNKNOWN_INPUT", "modelInputs.prompt"),
    "faces": ({"image": PICTURE, "face_enhance": True}, UPSAMPLE, "NOT_SUPPORTED", "modelInputs.face_enhance"),
    "a scheduler": (
        {"image": PICTURE}, {**UPSAMPLE, "SCHEDULER": "DDIMScheduler"}, "INVALID_INPUTS", "callInputs.SCHEDULER",
    ),
    "a model of another kind": (
        {"image": PICTURE}, {**UPSAMPLE, "MODEL_ID": "demo/shapes"}, "INVALID_INPUTS", "callInputs.MODEL_ID",
    ),
    "weights of another kind": (
        {"image": PICTURE}, {**UPSAMPLE, "MODEL_ID": "by/hand/other.safetensors"}, "INVALID_UPSCALER",
        "callInputs.upscale.model",
    ),
    "a file that was cut": (
        {"image": PICTURE}, {**UPSAMPLE, "MODEL_ID": "by/hand/cut.safetensors"}, "MODEL_BROKEN", "callInputs.MODEL_ID",
    ),
    "a huge scale": (INPUTS, {"upscale": {"model": HAND, "scale": 17}}, "INVALID_INPUTS", "callInputs.upscale.scale"),
    "too large": (INPUTS, {"upscale": {"model": HAND, "scale": 16}}, "LIMIT_EXCEEDED", "callInputs.upscale.scale"),
    "too large by itself": (
        {"image": as_base64(a_picture(256, 256))}, UPSAMPLE, "LIMIT_EXCEEDED", "callInputs.upscale",
    ),
    "a small tile": (INPUTS, {"upscale": {"model": HAND, "tile": 63}}, "INVALID_INPUTS", "callInputs.upscale.tile"),
    "another part": (INPUTS, {"upscale": {"model": HAND, "size": 2}}, "INVALID_INPUTS", "callInputs.upscale"),
    "no model": (INPUTS, {"upscale": {"scale": 2}}, "INVALID_INPUTS", "callInputs.upscale.model"),
    "an address that is none": (
        INPUTS, {"upscale": {"model": "owner/repository"}}, "INVALID_INPUTS", "callInputs.upscale.model",
    ),
    "another digest": (
        INPUTS, {"upscale": {"model": HAND, "sha256": "0" * 64}}, "MODEL_CORRUPT", "callInputs.upscale.model",
    ),
    "weights of another kind after a generation": (
        INPUTS, {"upscale": {"model": "by/hand/other.safetensors"}}, "INVALID_UPSCALER", "callInputs.upscale.model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(world: World, case: tuple[dict[str, Any], dict[str, Any], str, str]) -> None:
    inputs, call, code, field = case
    error = refused(world.server.post(inputs, call), code)
    assert error["field"] == field


def test_a_plan_is_of_a_generation(world: World) -> None:
    said = {"modelInputs": {"image": PICTURE}, "callInputs": UPSAMPLE}
    assert refused(world.server.client.post("/plan", json=said), "NOT_SUPPORTED")["field"] == "callInputs.use_extra"
