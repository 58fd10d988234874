"""IP-Adapters by request: files from the hub, S3 and a site, over the wire, and what is said when something is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.controlled import as_pil, as_sent, control_picture, save_controlnet, save_image_encoder, save_ip_adapter
from tests.hub import HubStandIn
from tests.running import Server, images_of, running
from tests.site import Site
from tests.sources import TOKEN, Bucket, environ, installed, is_same, moto, refused
from tests.tiny import save_tiny
from tests.unit.test_precisions import save_flux, save_sdxl

INPUTS = {"prompt": "a circle", "num_inference_steps": 3, "seed": 4, "guidance_scale": 4.0}
CALL = {"SCHEDULER": "DDIMScheduler"}
ONE = "nets/ip/models/one.safetensors"


class World(NamedTuple):
    server: Server
    hub: HubStandIn
    repo: Path
    models_dir: Path
    s3: str
    site: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("volume")
    models_dir, log = root / "models", root / "server.log"
    torch.manual_seed(0)
    base = models_dir / "tiny--sd"
    save_tiny(base, seed=1)
    save_sdxl(models_dir / "tiny--xl")
    save_flux(models_dir / "tiny--flux")
    repo = made / "ip"
    save_image_encoder(repo / "models" / "image_encoder", 1)
    save_image_encoder(repo / "other" / "image_encoder", 2, projection=40)
    one = save_ip_adapter(repo / "models" / "one.safetensors", base, 1)
    save_ip_adapter(repo / "models" / "two.safetensors", base, 2)
    save_ip_adapter(repo / "other" / "three.safetensors", base, 3)
    save_ip_adapter(repo / "sdxl_models" / "four_vit-h.safetensors", models_dir / "tiny--xl", 4)
    save_ip_adapter(repo / "bare" / "five.safetensors", base, 5)
    face = {name: value for name, value in load_file(one).items() if "proj.proj" not in name}
    save_file(face, repo / "models" / "face.safetensors")
    save_file({"x": torch.zeros(2)}, repo / "models" / "none.safetensors")
    save_controlnet(made / "canny", base, 6)
    repos = {"nets/ip": {"main": repo}, "nets/canny": {"main": made / "canny"}, "nets/sd": {"main": base}}
    with HubStandIn(repos, tokens={TOKEN: []}) as hub, moto() as s3, Site() as site:
        s3_address = Bucket(s3).put("two.safetensors", (repo / "models" / "two.safetensors").read_bytes())
        site_address = site.put("/download", (repo / "models" / "two.safetensors").read_bytes())
        with running(environ(models_dir, hub, s3, MODEL_ID="tiny/sd"), log) as server:
            yield World(server, hub, repo, models_dir, s3_address, site_address)
        assert "Traceback" not in log.read_text()


def draw(world: World, adapters: Any, pictures: Any, **more: Any) -> tuple[np.ndarray, dict[str, Any]]:
    inputs, call = more.pop("inputs", {}), more
    sent = {"ip_adapter_image": pictures} if adapters else {}
    response = world.server.post(INPUTS | sent | inputs, {**CALL, "ip_adapters": adapters, **call})
    assert response.status_code == 200, response.text[:800]
    return images_of(response.json())[0].astype(int), response.json()


def plain(
    world: World, files: list[str], scales: list[float], pictures: list[list[int]], model: str = "tiny--sd"
) -> np.ndarray:
    cls = diffusers.StableDiffusionXLPipeline if model == "tiny--xl" else diffusers.StableDiffusionPipeline
    pipe = cls.from_pretrained(world.models_dir / model)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    given = {name: value for name, value in INPUTS.items() if name != "seed"}
    if files:
        pipe.load_ip_adapter(
            str(world.repo), subfolder="", weight_name=files, image_encoder_folder="models/image_encoder"
        )
        pipe.set_ip_adapter_scale(scales)
        given["ip_adapter_image"] = [[as_pil(control_picture(number)) for number in some] for some in pictures]
    out = pipe(**given, generator=torch.Generator().manual_seed(4), output_type="np")
    return (out.images[0] * 255).round().astype(int)


def sent(number: int) -> str:
    return as_sent(control_picture(number))


def test_from_the_hub_with_its_encoder(world: World) -> None:
    image, answer = draw(world, f"{ONE}#scale=0.6", sent(1))
    assert is_same(image, plain(world, ["models/one.safetensors"], [0.6], [[1]]))
    assert not is_same(image, draw(world, None, None)[0])
    commit = world.hub.commit("nets/ip")
    meta = answer["$meta"]
    encoder = quote(f"nets/ip/models/image_encoder#revision={commit}", safe="/:")
    assert meta["ip_adapters"] == [f"{ONE}#revision={commit}&scale=0.6&encoder={encoder}"]
    assert meta["ip_adapter_versions"] == [commit]
    assert len(meta["modelInputs"]["ip_adapter_image"]) == 1
    files = sorted(tuple(e.path for e in m.files) for m in installed(world.models_dir).values())
    folder = "models/image_encoder"
    assert files == [(f"{folder}/config.json", f"{folder}/model.safetensors"), ("models/one.safetensors",)]
    asked = sum(world.hub.requests.values())
    again, answer = draw(world, meta["ip_adapters"], [sent(1)])
    assert is_same(again, image) and "download" not in answer["$timings"]
    assert sum(world.hub.requests.values()) == asked


def test_several_with_several_pictures_from_everywhere(world: World) -> None:
    encoder = "encoder=nets/ip/models/image_encoder"
    expected = plain(world, ["models/one.safetensors", "models/two.safetensors"], [0.5, 0.9], [[1], [2, 3]])
    pictures = [sent(1), [sent(2), sent(3)]]
    for two in (
        "nets/ip/models/two.safetensors#scale=0.9",
        f"{world.s3}#scale=0.9&{encoder}",
        f"{world.site}#fname=two.safetensors&scale=0.9&{encoder}",
    ):
        image, answer = draw(world, [f"{ONE}#scale=0.5", two], pictures)
        assert is_same(image, expected), two
        assert is_same(draw(world, answer["$meta"]["ip_adapters"], pictures)[0], expected), two


def test_one_with_several_pictures_and_none_for_the_other_requests(world: World) -> None:
    scales = (0.2, 0.6, 1.0)
    expected = {scale: plain(world, ["models/one.safetensors"], [scale], [[1, 2]]) for scale in scales}
    without = plain(world, [], [], [])
    with ThreadPoolExecutor(8) as pool:
        jobs = [(s, pool.submit(draw, world, f"{ONE}#scale={s}", [sent(1), sent(2)])) for s in scales * 2]
        others = [pool.submit(draw, world, None, None) for _ in scales]
        for scale, job in jobs:
            assert is_same(job.result()[0], expected[scale]), scale
        for job in others:
            assert is_same(job.result()[0], without)


def test_for_sdxl_through_the_encoder_of_the_others(world: World) -> None:
    name = "sdxl_models/four_vit-h.safetensors"
    inputs = {"width": 64, "height": 64}
    image, _ = draw(world, f"nets/ip/{name}", sent(1), MODEL_ID="tiny/xl", inputs=inputs)
    assert is_same(image, plain(world, [name], [1.0], [[1]], "tiny--xl"))


def test_with_a_controlnet(world: World) -> None:
    """Both at once: neither is left out."""
    control = {"control_image": sent(5), "controlnet_conditioning_scale": 0.3}
    both, answer = draw(world, ONE, sent(1), controlnets="nets/canny", inputs=control)
    alone, _ = draw(world, None, None, controlnets="nets/canny", inputs=control)
    looked, _ = draw(world, ONE, sent(1))
    assert not is_same(both, alone) and not is_same(both, looked)
    assert answer["$meta"]["controlnets"] and answer["$meta"]["ip_adapters"]
    fetched, answer = draw(world, ONE, sent(1), controlnets="nets/canny", inputs=control, MODEL_ID="nets/sd")
    assert is_same(fetched, both) and answer["$timings"]["download"] > 0


@pytest.mark.parametrize(
    ("adapters", "pictures", "call", "code", "field", "said"),
    [
        (ONE, None, {}, "MISSING_INPUT", "modelInputs.ip_adapter_image", "picture"),
        ([ONE, "nets/ip/models/two.safetensors"], ["x"], {}, "INVALID_INPUTS", "modelInputs.ip_adapter_image", "2, not 1"),
        (ONE, "%%", {}, "INVALID_IMAGE", "modelInputs.ip_adapter_image", "base64"),
        (ONE, [[7]], {}, "INVALID_INPUTS", "modelInputs.ip_adapter_image", "list"),
        (f"{ONE}#scale=much", "x", {}, "INVALID_INPUTS", "callInputs.ip_adapters[0]", "number"),
        (f"{ONE}#weight=1", "x", {}, "INVALID_INPUTS", "callInputs.ip_adapters[0]", "scale="),
        ("nets/ip/models", "x", {}, "INVALID_INPUTS", "callInputs.ip_adapters[0]", ".safetensors"),
        ("nets/ip/models/gone.safetensors", "x", {}, "MODEL_BROKEN", "callInputs.ip_adapters[0]", "no file"),
        ("nets/ip/bare/five.safetensors", "x", {}, "MODEL_BROKEN", "callInputs.ip_adapters[0]", "bare/image_encoder"),
        ("nets/ip/models/none.safetensors", "x", {}, "INVALID_INPUTS", "callInputs.ip_adapters[0]", "no IP-Adapter"),
        ("nets/ip/models/face.safetensors", "x", {}, "NOT_SUPPORTED", "callInputs.ip_adapters[0]", "face"),
        ("nets/ip/other/three.safetensors", "x", {}, "INVALID_INPUTS", "callInputs.ip_adapters[0]", "24 values, that gives 40"),
        ([ONE, "nets/ip/other/three.safetensors"], ["x", "x"], {}, "INVALID_INPUTS", "callInputs.ip_adapters", "one image"),
        ("nets/ip/sdxl_models/four_vit-h.safetensors", "x", {}, "INVALID_INPUTS", "callInputs.ip_adapters[0]",
         "another kind of model"),
        (ONE, "x", {"MODEL_ID": "tiny/flux"}, "PIPELINE_NOT_SUPPORTED", "callInputs.ip_adapters", "FluxPipeline"),
        ("https://host/a.safetensors", "x", {}, "INVALID_INPUTS", "callInputs.ip_adapters[0]", "#encoder="),
        ("https://host/a.bin#encoder=nets/ip", "x", {}, "INVALID_INPUTS", "callInputs.ip_adapters[0]", ".safetensors"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    world: World, adapters: Any, pictures: Any, call: dict[str, Any], code: str, field: str, said: str
) -> None:
    real = sent(1)
    if isinstance(pictures, list):
        pictures = [real if item == "x" else item for item in pictures]
    inputs = INPUTS | {"ip_adapter_image": real if pictures == "x" else pictures}
    error = refused(world.server.post(inputs, {"ip_adapters": adapters, **call}), code)
    assert error["field"] == field and said in error["message"], error


def test_a_picture_needs_an_adapter(world: World) -> None:
    error = refused(world.server.post(INPUTS | {"ip_adapter_image": sent(1)}, CALL), "UNKNOWN_INPUT")
    assert error["field"] == "modelInputs.ip_adapter_image"
