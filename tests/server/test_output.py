"""What comes out: formats, what is written into the files, and what comes beside the images."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load

from api.schema.images import IMAGE_FORMATS
from tests.running import Server, as_base64, pixels

ASKED = {"prompt": "a red circle on a blue background", "seed": 3, "num_inference_steps": 8, "guidance_scale": 4}
WRITTEN = [name for name, found in IMAGE_FORMATS.items() if not found.module]


def ask(server: Server, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = server.post({**ASKED, **more}, options)
    assert response.status_code == 200, response.text[:500]
    answer: dict[str, Any] = response.json()
    return answer


def image_of(answer: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer["image_base64"])))


def told(image: Image.Image) -> tuple[str, str]:
    """A1111's text and ``$meta``, of any format; empty where there is none."""
    if image.format == "PNG":
        return image.text.get("parameters", ""), image.text.get("meta", "")
    exif = image.getexif()
    comment = exif.get_ifd(0x8769).get(0x9286, b"")
    return comment[8:].decode("utf-16-be"), exif.get(0x010E, "")


@pytest.fixture(scope="module")
def plain(server: Server) -> np.ndarray:
    return pixels(ask(server, {})["image_base64"])


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_shows_the_picture_and_tells_how_it_was_made(server: Server, name: str, plain: np.ndarray) -> None:
    answer = ask(server, {"image_format": name.lower()})
    image = image_of(answer)
    assert image.format == name
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - plain).mean() < 3
    parameters, meta = told(image)
    assert parameters.startswith(ASKED["prompt"]) and "Steps: 8" in parameters and "Seed: 3" in parameters
    meta = json.loads(meta)
    assert meta["modelInputs"] == answer["$meta"]["modelInputs"]
    again = ask(server, {"SCHEDULER": meta["SCHEDULER"]}, **meta["modelInputs"])
    assert np.array_equal(pixels(again["image_base64"]), plain)


@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_is_written_into_the_file_where_that_is_asked(server: Server, name: str) -> None:
    assert told(image_of(ask(server, {"image_format": name, "image_metadata": False}))) == ("", "")


def test_each_of_several_images_says_which_it_is(server: Server) -> None:
    answer = ask(server, {}, num_images_per_prompt=2)
    metas = [json.loads(Image.open(io.BytesIO(base64.b64decode(i))).text["meta"]) for i in answer["images_base64"]]
    assert [meta["image"] for meta in metas] == [0, 1]


def test_lossless_is_the_same_to_the_pixel(server: Server, plain: np.ndarray) -> None:
    answer = ask(server, {"image_format": "WEBP", "lossless": True})
    assert np.array_equal(pixels(answer["image_base64"]), plain)
    assert answer["$meta"]["lossless"] is True


@pytest.mark.parametrize(
    ("options", "status", "code", "field", "says"),
    [
        ({"image_format": "JPEG", "lossless": True}, 400, "INVALID_INPUTS", "lossless", "cannot keep every pixel"),
        ({"image_format": "AVIF", "lossless": True}, 400, "INVALID_INPUTS", "lossless", "cannot keep every pixel"),
        ({"image_format": "AVIFF"}, 400, "INVALID_INPUTS", "image_format", 'Did you mean "AVIF"?'),
        ({"image_format": "AVIF", "image_quality": 101}, 400, "INVALID_INPUTS", "image_quality", "1 to 100"),
        ({"output": "latents"}, 400, "INVALID_INPUTS", "output", "a list"),
        ({"output": ["latent"]}, 400, "INVALID_INPUTS", "output", "a list"),
        ({"output": ["mask"]}, 400, "INVALID_INPUTS", "output", "takes no mask"),
        ({"output": ["latents"], "MODEL_ID": "tiny/nsfw"}, 400, "INVALID_INPUTS", "output", "safety checker"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(
    server: Server, options: dict[str, Any], status: int, code: str, field: str, says: str
) -> None:
    response = server.post(ASKED, options)
    error = response.json()["$error"]
    assert (response.status_code, error["code"], error["field"]) == (status, code, f"callInputs.{field}")
    assert says in error["message"]


def test_jpeg_xl_is_written_or_the_error_says_how_to_get_it(server: Server, plain: np.ndarray) -> None:
    response = server.post(ASKED, {"image_format": "JXL", "lossless": True})
    try:
        import pillow_jxl  # noqa: F401
    except ImportError:
        assert (response.status_code, response.json()["$error"]["code"]) == (422, "NOT_SUPPORTED")
        assert "diffusers-api[jxl]" in response.json()["$error"]["message"]
    else:
        image = image_of(response.json())
        assert np.array_equal(np.asarray(image), plain)
        assert told(image)[0].startswith(ASKED["prompt"])


@pytest.mark.parametrize("name", WRITTEN)
def test_images_by_accept(server: Server, name: str) -> None:
    wanted = IMAGE_FORMATS[name].content_type
    response = server.post(ASKED, {}, headers={"Accept": wanted})
    assert response.headers["content-type"] == wanted
    assert Image.open(io.BytesIO(response.content)).format == name
    refused = server.post(ASKED, {"output": ["latents"]}, headers={"Accept": wanted})
    assert (refused.status_code, refused.json()["$error"]["code"]) == (406, "NOT_ACCEPTABLE")


def test_latents_are_those_that_the_image_is_decoded_from(server: Server, demo: Any, plain: np.ndarray) -> None:
    import torch

    answer = ask(server, {"output": ["images", "latents", "intermediate_latents"]})
    assert np.array_equal(pixels(answer["image_base64"]), plain)
    tensors = load(base64.b64decode(answer["latents_base64"]))
    assert set(tensors) == {"latents", *(f"step_{step}" for step in range(1, 9))}
    assert np.array_equal(tensors["latents"], tensors["step_8"])
    assert not np.array_equal(tensors["step_1"], tensors["step_8"])
    latents = torch.from_numpy(tensors["latents"])
    with torch.no_grad():
        decoded = demo.vae.decode(latents / demo.vae.config.scaling_factor).sample
    image = demo.image_processor.postprocess(decoded, output_type="np")[0]
    assert np.abs(image * 255 - plain).max() <= 1
    assert "latents_base64" not in ask(server, {})


def test_the_mask_is_the_one_that_inpainting_used(server: Server) -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 60:] = 200
    inputs = {"image": as_base64(np.full((64, 64, 3), 200, np.uint8)), "mask_image": as_base64(mask), "strength": 0.9}
    answer = ask(server, {"output": ["mask"]}, **inputs)
    used = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["mask_base64"]))))
    assert used.shape == (64, 64)
    assert set(np.unique(used)) == {0, 255}
    assert used[:, 41:].all() and not used[:, :36].any()


def test_a_job_for_later_keeps_what_comes_beside_its_images(server: Server) -> None:
    now = ask(server, {"output": ["latents"]})
    accepted = server.post(ASKED, {"output": ["latents"], "image_format": "AVIF", "async": True}).json()
    while (job := server.client.get(f"/jobs/{accepted['id']}").json())["state"] not in ("COMPLETED", "FAILED"):
        pass
    kept = load(base64.b64decode(job["result"]["latents_base64"]))["latents"]
    assert np.array_equal(kept, load(base64.b64decode(now["latents_base64"]))["latents"])
    assert server.client.get(f"/jobs/{accepted['id']}/images/0").headers["content-type"] == "image/avif"
