"""The native dialect against what was captured from docker-diffusers-api: keys, order, types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.running import Server, as_base64, images_of, pixels

CAPTURES = Path(__file__).resolve().parents[1] / "wire"
PICTURE = as_base64(np.full((64, 64, 3), 90, np.uint8))
MASK = as_base64(np.full((64, 64), 255, np.uint8))


def capture(name: str) -> Any:
    return json.loads((CAPTURES / f"{name}.json").read_text())


def send(server: Server, request: dict[str, Any], model: str | None = None) -> Any:
    inputs = dict(request["modelInputs"])
    for name, stand_in in (("image", PICTURE), ("mask_image", MASK)):
        if name in inputs:
            inputs[name] = stand_in  # the captures hold shortened pictures
    ours = {"SEND_URL", "SIGN_KEY"}
    options = {k: v for k, v in request["callInputs"].items() if k not in ours}
    return server.post(inputs, options | ({"MODEL_ID": model} if model else {}))


def same_shape(ours: Any, theirs: Any, where: str = "") -> None:
    """Every captured key is there, in its order, with its type; ours may add keys."""
    if isinstance(theirs, dict):
        assert isinstance(ours, dict), where
        common = [key for key in ours if key in theirs]
        assert common == list(theirs), f"{where}: {list(ours)} does not hold {list(theirs)} in order"
        for key, value in theirs.items():
            same_shape(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list):
        assert isinstance(ours, list), where
        assert len(ours) == len(theirs), where
        for a, b in zip(ours, theirs, strict=True):
            same_shape(a, b, where)
    else:
        number = isinstance(theirs, int | float) and not isinstance(theirs, bool)
        assert isinstance(ours, int | float) if number else type(ours) is type(theirs), where


@pytest.mark.parametrize(
    "name", ["txt2img_explicit", "multi_image", "multi_prompt", "img2img", "inpaint", "txt2img_hot_webhook"]
)
def test_responses(server: Server, name: str) -> None:
    pair = capture(name)
    response = send(server, pair["request"], "tiny/b")
    body = response.json()
    assert response.status_code == pair["response"]["status"]
    theirs = dict(pair["response"]["body"])
    meta = theirs.pop("$meta")
    same_shape(body, theirs)
    assert list(body)[0] == "$meta"
    assert ("image_base64" in body) != ("images_base64" in body)
    assert {k: body["$meta"][k] for k in meta if k != "MODEL_ID"} == {k: v for k, v in meta.items() if k != "MODEL_ID"}


@pytest.mark.parametrize("case", list(capture("nsfw")))
def test_nsfw(server: Server, case: str) -> None:
    pair = capture("nsfw")[case]
    ours = send(server, pair["request"]).json()
    theirs = pair["response"]
    assert ours.get("nsfw_content_detected") == theirs.get("nsfw_content_detected")
    blank = "True" in str(theirs.get("nsfw_content_detected"))
    assert all((image.max() == 0) == blank for image in images_of(ours))


def test_switching_the_checker_off_is_for_one_request_only(server: Server) -> None:
    inputs = {"prompt": "a cat", "num_inference_steps": 2, "seed": 1}
    off = server.post(inputs, {"MODEL_ID": "tiny/nsfw", "safety_checker": False}).json()
    on = server.post(inputs, {"MODEL_ID": "tiny/nsfw"}).json()
    assert "nsfw_content_detected" not in off
    assert images_of(off)[0].max() > 0
    assert on["nsfw_content_detected"] == [True]


def lines_of(server: Server, request: dict[str, Any], model: str) -> list[dict[str, Any]]:
    response = send(server, request, model)
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.parametrize("name", ["stream_short", "stream_callback_steps"])
def test_streams(server: Server, name: str) -> None:
    pair = capture(name)
    theirs = [line["line"] for line in pair["response"]["lines"]]
    ours = lines_of(server, pair["request"], "tiny/a")
    if not any(line.get("type") == "loadModel" for line in ours):
        theirs = [line for line in theirs if line.get("type") != "loadModel"]
        theirs[-1]["$timings"].pop("loadModel", None)
    ours = [line for line in ours if "progress" not in line]  # one a second, by the clock
    assert len(ours) == len(theirs)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        same_shape(a, b)
        assert {k: a[k] for k in ("type", "status")} == {k: b[k] for k in ("type", "status")}
        assert a["payload"].items() >= b["payload"].items()
    assert "image_base64" in ours[-1]


def test_a_long_stream_tells_progress_every_second(server: Server) -> None:
    request = capture("stream_long")["request"]
    request["modelInputs"]["num_inference_steps"] = 500
    lines = [line for line in lines_of(server, request, "tiny/a") if "progress" in line]
    for line in lines:
        assert list(line)[:2] == ["type", "progress"]  # what was there before, and more
        if line["progress"]:
            assert line["progress"] == line["step"] / line["total"]
            assert line["total"] == 500
            assert line["eta"] > 0 or line["step"] in (1, 500)
    progress = [line["progress"] for line in lines]
    assert progress
    assert progress == sorted(progress)
    assert 0 < progress[-1] <= 1


def test_an_error_in_a_stream_is_its_last_line(server: Server) -> None:
    response = server.post({"prompt": "a"}, {"MODEL_ID": "tiny/cut", "streamEvents": True})
    assert json.loads(response.text.splitlines()[-1])["$error"]["code"] == "MODEL_BROKEN"


def test_a_json_string_that_holds_the_json_is_accepted(server: Server) -> None:
    body = json.dumps(json.dumps({"modelInputs": {"prompt": "a", "num_inference_steps": 1}}))
    assert server.client.post("/", content=body).status_code == 200


@pytest.mark.parametrize(
    ("accept", "start"), [("image/png", b"\x89PNG"), ("image/webp", b"RIFF"), ("image/jpeg", b"\xff\xd8")]
)
def test_image_bytes_on_request(server: Server, accept: str, start: bytes) -> None:
    inputs = {"prompt": "ein roter Kreis, größer 赤", "num_inference_steps": 2, "seed": 3}
    response = server.post(inputs, headers={"Accept": accept})
    assert response.headers["content-type"] == accept
    assert response.content.startswith(start)
    assert json.loads(response.headers["x-meta"])["modelInputs"]["prompt"] == inputs["prompt"]
    assert "inference" in json.loads(response.headers["x-timings"])
    if accept == "image/png":
        assert np.array_equal(pixels(response.content), images_of(server.post(inputs).json())[0])


def test_a_very_long_prompt_does_not_break_the_headers(server: Server) -> None:
    inputs = {"prompt": "a " * 9000, "num_inference_steps": 1, "seed": 3}
    response = server.post(inputs, headers={"Accept": "image/png"})
    assert response.status_code == 200
    assert json.loads(response.headers["x-meta"])["modelInputs"] == {"seed": 3}


def test_what_cannot_be_answered_is_not_acceptable(server: Server) -> None:
    two = {"prompt": "a", "num_images_per_prompt": 2}
    assert server.post(two, headers={"Accept": "image/png"}).status_code == 406
    assert server.post({"prompt": "a"}, headers={"Accept": "text/html"}).status_code == 406


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_image_formats_in_json(server: Server, image_format: str) -> None:
    body = server.post({"prompt": "a", "num_inference_steps": 1, "seed": 2}, {"image_format": image_format}).json()
    assert images_of(body)[0].shape == (64, 64, 3)
    assert body["$meta"]["image_format"] == image_format


def test_request_ids(server: Server) -> None:
    given = server.client.get("/health/live", headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    bad = server.client.get("/health/live", headers={"X-Request-Id": "a b<script>"})
    assert bad.headers["x-request-id"] not in ("", "a b<script>")


def test_health_routes(server: Server) -> None:
    assert server.client.get("/healthcheck").json() == {"state": "healthy", "gpu": False}
    assert server.client.get("/ping").status_code == 200
    ready = server.client.get("/health/ready").json()
    assert ready["state"] in ("READY", "BUSY")


def test_models(server: Server) -> None:
    models = {m["MODEL_ID"]: m for m in server.client.get("/models").json()["models"]}
    assert models["demo/shapes"]["tier"] == "device"
    assert models["demo/shapes"]["default"] is True
    assert "tiny/b" in models
    assert "tiny/partless" not in models


def test_meta_says_everything_needed_to_do_it_again(server: Server) -> None:
    first = server.post({"prompt": "a red circle", "num_inference_steps": 3}).json()
    meta = first["$meta"]
    again = server.post(
        meta["modelInputs"], {k: meta[k] for k in ("MODEL_ID", "MODEL_REVISION", "PIPELINE", "SCHEDULER")}
    ).json()
    assert np.array_equal(images_of(first)[0], images_of(again)[0])
    assert again["$meta"] == meta
    assert meta["versions"]["diffusers"]


def test_a_list_of_seeds_gives_each_image_its_own(server: Server) -> None:
    inputs = {"prompt": ["a red circle", "a blue star"], "num_inference_steps": 3}
    both = images_of(server.post({**inputs, "seed": [7, 8]}).json())
    alone = [
        images_of(server.post({"prompt": p, "num_inference_steps": 3, "seed": s}).json())[0]
        for p, s in zip(inputs["prompt"], (7, 8), strict=True)
    ]
    for a, b in zip(both, alone, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 2


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ({"xformers_memory_efficient_attention": True}, "sdpa"),  # is not installed
        ({"attention": "flash"}, "sdpa"),
        ({"attention": "auto"}, "sdpa"),
        ({"attention": "native"}, "sdpa"),
        ({"attention": "_native_math"}, "_native_math"),
    ],
)
def test_attention_is_what_was_asked_for_where_it_can_be_had(server: Server, asked: dict[str, Any], used: str) -> None:
    meta = server.post({"prompt": "a", "num_inference_steps": 1}, asked).json()["$meta"]
    assert (meta["attention"], meta["numerics"]) == (used, f"cpu/float32/{used}/eager")


def test_secrets_and_pictures_stay_out_of_the_log(server: Server) -> None:
    server.client.get("/health/live?token=s3cr3t-value")
    server.post({"prompt": "a", "image": PICTURE})
    log = server.log.read_text()
    assert "s3cr3t-value" not in log
    assert PICTURE[:60] not in log


def test_everything_of_the_signature_that_is_listed_works(server: Server) -> None:
    """Inputs that reach into the text encoder and the crop around a mask."""
    base = {"prompt": "a red circle on blue", "num_inference_steps": 2, "seed": 3}
    plain = images_of(server.post(base).json())[0]
    assert np.array_equal(images_of(server.post({**base, "cross_attention_kwargs": {"scale": 0.5}}).json())[0], plain)
    skipped = images_of(server.post({**base, "clip_skip": 1}).json())[0]
    assert not np.array_equal(skipped, plain)
    assert server.post({**base, "timesteps": [900, 600, 300]}, {"SCHEDULER": "DDPMScheduler"}).status_code == 200
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 255
    cropped = {**base, "image": PICTURE, "mask_image": as_base64(mask), "padding_mask_crop": 4}
    assert images_of(server.post(cropped).json())[0].shape == (64, 64, 3)


def test_a_jpeg_of_low_quality_can_be_made_again_from_meta(server: Server) -> None:
    options = {"image_format": "JPEG", "image_quality": 30}
    first = server.post({"prompt": "a red circle", "num_inference_steps": 2}, options).json()
    meta = first["$meta"]
    again = server.post(
        meta["modelInputs"], {k: meta[k] for k in ("image_format", "image_quality", "safety_checker")}
    ).json()
    assert again["image_base64"] == first["image_base64"]


def test_accept_and_image_format_that_disagree(server: Server) -> None:
    response = server.post({"prompt": "a"}, {"image_format": "JPEG"}, headers={"Accept": "image/png"})
    assert (response.status_code, response.json()["$error"]["field"]) == (400, "callInputs.image_format")


def test_head_and_allow(server: Server) -> None:
    assert server.client.head("/health/live").status_code == 200
    assert "POST" in server.client.put("/").headers["allow"]


def test_the_request_id_leads_to_the_workers_log(server: Server) -> None:
    inputs = {"prompt": "a", "num_inference_steps": 1, "cross_attention_kwargs": {"gligen": 5}}
    server.post(inputs, headers={"X-Request-Id": "find-me-7"})
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if "find-me-7" in line]
    assert {"api.http", "api.dispatch"} <= {line["logger"] for line in lines}
