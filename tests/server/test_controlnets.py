"""ControlNets by request: from every source, over the wire, and what is said when something is wrong with them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch

from tests import shapes
from tests.controlled import SIZE, as_pil, as_sent, control_picture, save_controlnet
from tests.hub import HubStandIn
from tests.running import Server, images_of, running
from tests.site import Site
from tests.sources import TOKEN, Bucket, environ, installed, is_same, moto, refused
from tests.tiny import save_tiny
from tests.unit.test_precisions import save_flux, save_sdxl

INPUTS = {"prompt": "a circle", "num_inference_steps": 3, "seed": 4, "guidance_scale": 4.0}
CALL = {"SCHEDULER": "DDIMScheduler"}


class World(NamedTuple):
    server: Server
    hub: HubStandIn
    made: Path
    models_dir: Path
    s3: str
    archive: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("volume")
    models_dir, log = root / "models", root / "server.log"
    torch.manual_seed(0)
    save_tiny(models_dir / "tiny--sd", seed=1)
    save_sdxl(models_dir / "tiny--xl")
    save_flux(models_dir / "tiny--flux")
    base = models_dir / "tiny--sd"
    canny, depth = save_controlnet(made / "canny", base, 1), save_controlnet(made / "depth", base, 2)
    save_controlnet(made / "canny", base, 1, variant="fp16")
    (made / "canny" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle that is not wanted")
    save_controlnet(made / "many" / "inner" / "folder", base, 3)
    save_controlnet(made / "xl", models_dir / "tiny--xl", 4)
    save_controlnet(made / "flux", models_dir / "tiny--flux", 5)
    save_controlnet(made / "empty", base, 6)
    (made / "empty" / "diffusion_pytorch_model.safetensors").unlink()
    save_controlnet(models_dir / "nets--local", base, 2)
    torch.manual_seed(8)
    wide = diffusers.ControlNetModel.from_config(
        {**diffusers.ControlNetModel.load_config(canny), "block_out_channels": [8, 24]}
    )
    wide.save_pretrained(made / "wide")
    save_controlnet(made / "union", models_dir / "tiny--xl", 7, union=True)
    save_controlnet(made / "pickled", base, 2, safe_serialization=False)
    folders = {
        name: made / name for name in ("canny", "depth", "many", "xl", "flux", "empty", "union", "pickled", "wide")
    }
    repos = {f"nets/{name}": {"main": folder} for name, folder in folders.items()}
    repos["nets/unet"] = {"main": base / "unet"}
    repos["nets/whole"] = {"main": base}
    repos["nets/moving"] = {"main": canny, "dev": depth}
    with HubStandIn(repos, tokens={TOKEN: []}) as hub, moto() as s3, Site() as site:
        address = Bucket(s3).put_folder("depth", depth)
        archive = site.put("/depth.tar.zst", shapes.zst(depth))
        with running(environ(models_dir, hub, s3, MODEL_ID="tiny/sd"), log) as server:
            yield World(server, hub, made, models_dir, address, archive)
        assert "Traceback" not in log.read_text()


def draw(world: World, nets: Any, model_inputs: dict[str, Any] | None = None, **call: Any) -> Any:
    control = {"control_image": as_sent(control_picture(1))}
    response = world.server.post(INPUTS | control | (model_inputs or {}), {**CALL, "controlnets": nets, **call})
    assert response.status_code == 200, response.text[:800]
    return images_of(response.json())[0].astype(int), response.json()


def plain(world: World, nets: list[Path], pictures: list[int], cls: str = "", **more: Any) -> np.ndarray:
    loaded = [diffusers.ControlNetModel.from_pretrained(net) for net in nets]
    pipeline = getattr(diffusers, cls or "StableDiffusionControlNetPipeline")
    pipe = pipeline.from_pretrained(
        world.models_dir / "tiny--sd", controlnet=loaded if len(loaded) > 1 else loaded[0], safety_checker=None
    )
    images = [as_pil(control_picture(number)) for number in pictures]
    seeded = torch.Generator().manual_seed(4)
    given = {name: value for name, value in INPUTS.items() if name != "seed"}
    given["control_image" if cls else "image"] = images if len(images) > 1 else images[0]
    out = pipe(**{**given, **more}, generator=seeded, output_type="np")
    return (out.images[0] * 255).round().astype(int)


def test_from_the_hub_once_and_only_what_is_needed(world: World) -> None:
    image, answer = draw(world, "nets/canny")
    assert is_same(image, plain(world, [world.made / "canny"], [1]))
    meta = answer["$meta"]
    commit = world.hub.commit("nets/canny")
    assert meta["controlnets"] == [f"nets/canny#revision={commit}"]
    assert meta["controlnet_versions"] == [commit]
    assert meta["pipeline"] == "StableDiffusionControlNetPipeline"
    assert meta["modelInputs"]["control_image"][0].startswith("sha256:")
    assert not is_same(image, draw_plainly(world))
    (manifest,) = [m for m in installed(world.models_dir).values() if m.source.endswith("nets/canny")]
    assert {entry.path for entry in manifest.files} == {"config.json", "diffusion_pytorch_model.safetensors"}
    asked = sum(world.hub.requests.values())
    again, answer = draw(world, meta["controlnets"])
    assert is_same(again, image) and "download" not in answer["$timings"]
    assert sum(world.hub.requests.values()) == asked


def draw_plainly(world: World) -> np.ndarray:
    response = world.server.post(INPUTS, CALL)
    return images_of(response.json())[0].astype(int)


def test_from_everywhere_else(world: World) -> None:
    """A folder of a repository, another revision, S3, an archive, a folder on the volume."""
    depth = plain(world, [world.made / "depth"], [1])
    for name in (world.s3, world.archive, "nets/local", "nets/moving#revision=dev"):
        image, answer = draw(world, name)
        assert is_same(image, depth), name
        assert is_same(draw(world, answer["$meta"]["controlnets"])[0], depth), name
    inner = plain(world, [world.made / "many" / "inner" / "folder"], [1])
    assert is_same(draw(world, "nets/many/inner/folder")[0], inner)


def test_the_variant_of_the_precision_is_fetched(world: World) -> None:
    draw(world, "nets/canny", MODEL_PRECISION="fp16")
    found = [m for m in installed(world.models_dir).values() if m.source.endswith("nets/canny") and m.variant]
    names = {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    assert [{entry.path for entry in m.files} for m in found] == [names]


def test_several_and_over_a_picture(world: World) -> None:
    nets = [world.made / "canny", world.made / "depth"]
    sent = {"control_image": [as_sent(control_picture(n)) for n in (1, 2)], "controlnet_conditioning_scale": [0.4, 0.8]}
    image, _ = draw(world, ["nets/canny", "nets/depth"], sent)
    assert is_same(image, plain(world, nets, [1, 2], controlnet_conditioning_scale=[0.4, 0.8]))
    over = {"image": as_sent(control_picture(5)), "strength": 0.7}
    image, answer = draw(world, "nets/canny", over)
    assert answer["$meta"]["pipeline"] == "StableDiffusionControlNetImg2ImgPipeline"
    expected = plain(
        world, nets[:1], [1], "StableDiffusionControlNetImg2ImgPipeline", image=as_pil(control_picture(5)), strength=0.7
    )
    assert is_same(image, expected)
    image, _ = draw(world, ["nets/depth"], {"control_image": None, "image": as_sent(control_picture(1))},
                    PIPELINE="StableDiffusionControlNetPipeline")  # fmt: skip
    assert is_same(image, plain(world, nets[1:], [1]))


def test_one_that_knows_several_kinds_of_pictures(world: World) -> None:
    sent = {"control_image": [as_sent(control_picture(n)) for n in (1, 2)], "width": SIZE, "height": SIZE}
    call = {"MODEL_ID": "tiny/xl"}
    image, answer = draw(world, "nets/union", {**sent, "control_mode": [1, 0]}, **call)
    assert answer["$meta"]["pipeline"] == "StableDiffusionXLControlNetUnionPipeline"
    one, _ = draw(world, "nets/union", {**sent, "control_image": sent["control_image"][0], "control_mode": 1}, **call)
    assert not is_same(image, one)
    for modes, code in (({}, "MISSING_INPUT"), ({"control_mode": [1]}, "INVALID_INPUTS")):
        answered = world.server.post(INPUTS | sent | modes, {"controlnets": "nets/union", **call})
        assert "control_mode" in refused(answered, code)["message"] + str(answered.json())
    mixed = world.server.post(INPUTS | sent, {"controlnets": ["nets/union", "nets/xl"], **call})
    assert "different kinds" in refused(mixed, "INVALID_INPUTS")["message"]


def test_as_a_job_for_later(world: World) -> None:
    inputs = INPUTS | {"control_image": as_sent(control_picture(1))}
    asked = world.server.post(inputs, {**CALL, "controlnets": "nets/canny", "async": True})
    assert asked.status_code == 202, asked.text
    path = f"/jobs/{asked.json()['id']}"
    while (job := world.server.client.get(path).json())["state"] not in ("COMPLETED", "FAILED"):
        time.sleep(0.1)
    assert job["state"] == "COMPLETED", job
    image = images_of(job["result"])[0].astype(int)
    assert is_same(image, draw(world, "nets/canny")[0]), job
    wrong = world.server.post(INPUTS, {**CALL, "controlnets": "nets/canny", "async": True})
    assert refused(wrong, "MISSING_INPUT")["field"] == "modelInputs.control_image"


def test_what_is_in_memory_is_told_once(world: World) -> None:
    draw_plainly(world)
    draw(world, "nets/canny")
    models = {model["MODEL_ID"]: model for model in world.server.client.get("/models").json()["models"]}
    assert models["nets/canny"]["part"] == "." and models["nets/canny"]["class"] == "ControlNetModel"
    base = sum(f.stat().st_size for f in (world.models_dir / "tiny--sd").rglob("*.safetensors"))
    net = (world.made / "canny" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert base < models["tiny/sd"]["bytes"]["device"] < base + 3 * net
    left = world.server.client.post("/models/unload", json={"MODEL_ID": "tiny/sd"}).json()
    assert left["bytes"] == {"host": 0, "device": 0}, left


def test_weights_that_are_pickles_are_converted(world: World) -> None:
    assert is_same(draw(world, "nets/pickled")[0], plain(world, [world.made / "depth"], [1]))


def test_side_by_side(world: World) -> None:
    scales = (0.2, 0.5, 0.9, 1.3)
    expected = {
        scale: plain(world, [world.made / "canny"], [1], controlnet_conditioning_scale=scale) for scale in scales
    }
    without = draw_plainly(world)
    with ThreadPoolExecutor(8) as pool:
        drawn = [
            (scale, pool.submit(draw, world, "nets/canny", {"controlnet_conditioning_scale": scale}))
            for scale in scales * 2
        ]
        others = [pool.submit(draw_plainly, world) for _ in scales]
        for scale, job in drawn:
            assert is_same(job.result()[0], expected[scale]), scale
        for job in others:
            assert is_same(job.result(), without)


@pytest.mark.parametrize(
    ("nets", "inputs", "call", "code", "field", "said"),
    [
        ("nets/xl", {}, {}, "INVALID_INPUTS", "callInputs.controlnets[0]", "cross_attention_dim is 64"),
        ("nets/flux", {}, {}, "INVALID_INPUTS", "callInputs.controlnets[0]", "FluxControlNetModel"),
        (["nets/wide", "nets/canny"], {}, {}, "INVALID_INPUTS", "callInputs.controlnets[0]", "block_out_channels is"),
        (["nets/canny", "nets/unet"], {}, {}, "INVALID_INPUTS", "callInputs.controlnets[1]", "not a ControlNet"),
        ("nets/whole", {}, {}, "MODEL_BROKEN", "callInputs.controlnets[0]", "MODEL_ID"),
        ("nets/empty", {}, {}, "MODEL_BROKEN", "callInputs.controlnets[0]", "no safetensors"),
        ("nets/none", {}, {}, "MODEL_NOT_FOUND", "callInputs.controlnets[0]", "no such model"),
        ("../etc", {}, {}, "INVALID_INPUTS", "callInputs.controlnets[0]", "org/name"),
        ("nets/canny#scale=1", {}, {}, "INVALID_INPUTS", "callInputs.controlnets[0]", "revision="),
        ("https://host/file.safetensors", {}, {}, "INVALID_INPUTS", "callInputs.controlnets[0]", "archive"),
        (7, {}, {}, "INVALID_INPUTS", "callInputs.controlnets", "string"),
        ("nets/canny", {"control_image": None}, {}, "MISSING_INPUT", "modelInputs.control_image", "picture"),
        ("nets/canny", {"control_image": "%%"}, {}, "INVALID_IMAGE", "modelInputs.control_image", "base64"),
        (["nets/canny", "nets/depth"], {}, {}, "INVALID_INPUTS", "modelInputs.control_image", "2, not 1"),
        ("nets/canny", {"controlnet_conditioning_scale": [1.0, 2.0]}, {}, "INVALID_INPUTS",
         "modelInputs.controlnet_conditioning_scale", "1, not 2"),
        ("nets/canny", {"control_guidance_start": 0.7, "control_guidance_end": 0.3}, {}, "INVALID_INPUTS",
         "modelInputs.control_guidance_start", "before"),
        ("nets/canny", {}, {"PIPELINE": "StableDiffusionPipeline"}, "PIPELINE_NOT_SUPPORTED", "callInputs.PIPELINE",
         "takes no ControlNets"),
        ("nets/canny", {}, {"PIPELINE": "StableDiffusionControlPipeline"}, "NO_SUCH_PIPELINE", "callInputs.PIPELINE",
         "Did you mean"),
        ("nets/canny", {"guess_mod": True}, {}, "UNKNOWN_INPUT", "modelInputs.guess_mod", "guess_mode"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    world: World, nets: Any, inputs: dict[str, Any], call: dict[str, Any], code: str, field: str, said: str
) -> None:
    control = {"control_image": as_sent(control_picture(1))}
    error = refused(world.server.post(INPUTS | control | inputs, {"controlnets": nets, **call}), code)
    assert error["field"] == field and said in error["message"], error


def test_a_controlnet_is_no_model_and_a_picture_needs_one(world: World) -> None:
    error = refused(world.server.post(INPUTS, {"MODEL_ID": "nets/canny"}), "MODEL_BROKEN")
    assert "callInputs.controlnets" in error["message"]
    sent = {"control_image": as_sent(control_picture(1))}
    assert refused(world.server.post(INPUTS | sent, {}), "UNKNOWN_INPUT")["field"] == "modelInputs.control_image"


def test_the_weights_are_not_fetched_for_a_request_that_is_wrong(world: World) -> None:
    for name in ("wide", "flux"):
        weights = world.hub.cdn_path(f"nets/{name}", "diffusion_pytorch_model.safetensors")
        assert world.hub.requests[f"GET {weights}"] == 0
        assert not [m for m in installed(world.models_dir).values() if m.source.endswith(f"nets/{name}")]


def test_a_plan_says_what_the_controlnet_adds(world: World) -> None:
    draw(world, "nets/canny")
    body = {"modelInputs": INPUTS | {"control_image": as_sent(control_picture(1))}, "callInputs": {}}
    without = world.server.client.post("/plan", json={"modelInputs": INPUTS, "callInputs": {}}).json()
    both = world.server.client.post("/plan", json={**body, "callInputs": {"controlnets": "nets/canny"}}).json()
    assert both["bytes"]["model"] > without["bytes"]["model"] > 0, (both, without)


def test_the_size_is_the_pictures(world: World) -> None:
    wide = np.tile(control_picture(1), (1, 2, 1))
    image, _ = draw(world, "nets/canny", {"control_image": as_sent(wide)})
    assert image.shape == (SIZE, 2 * SIZE, 3)
