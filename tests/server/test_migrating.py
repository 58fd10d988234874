"""What docs/migrating.md tells those who come from docker-diffusers-api, on a server."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.running import Server, as_base64, images_of, running

INPUTS = {"prompt": "a cat", "num_inference_steps": 2, "seed": 1}
PICTURE = as_base64(np.full((64, 64, 3), 90, np.uint8))


@pytest.mark.parametrize(
    ("model_inputs", "call_inputs", "status", "code"),
    [
        ({}, {"SHEDULER": "DDIMScheduler"}, 400, "UNKNOWN_INPUT"),
        ({}, {"attn_procs": "https://example.com/x.bin"}, 400, "UNKNOWN_INPUT"),
        ({"num_inference_steps": "20"}, {}, 400, "INVALID_INPUTS"),
        ({"seed": -1}, {}, 400, "INVALID_INPUTS"),
        ({}, {"SCHEDULER": "PNDM"}, 404, "NO_SUCH_SCHEDULER"),
        ({}, {"PIPELINE": "lpw_stable_diffusion"}, 403, "REMOTE_CODE_NOT_ALLOWED"),
        ({}, {"custom_pipeline_method": "text2img"}, 400, "INVALID_INPUTS"),
        ({}, {"use_extra": "upscale"}, 404, "NO_SUCH_EXTRA"),
        ({}, {"train": "dreambooth"}, 422, "NOT_SUPPORTED"),
        ({}, {"FILL_MODE": "patchmatch"}, 422, "NOT_SUPPORTED"),
        ({"image": "http://127.0.0.1:9/x.png"}, {"is_url": True}, 400, "URL_NOT_ALLOWED"),
    ],
)
def test_what_is_refused(
    server: Server, model_inputs: dict[str, Any], call_inputs: dict[str, Any], status: int, code: str
) -> None:
    answer = server.post({**INPUTS, **model_inputs}, {"MODEL_ID": "tiny/a", **call_inputs})
    assert (answer.status_code, answer.json()["$error"]["code"]) == (status, code)
    assert "name" not in answer.json()["$error"]


@pytest.mark.parametrize(
    ("model_inputs", "call_inputs"),
    [
        ({}, {"SCHEDULER": "LMS"}),
        ({}, {"SCHEDULER": "DDIM"}),
        ({}, {"PIPELINE": "ALL"}),
        ({"init_image": PICTURE, "strength": 0.9}, {}),
        ({"input_image": PICTURE, "strength": 0.9}, {}),
        ({"cross_attention_kwargs": '{"scale": 0.5}'}, {}),
        ({}, {"lora_weights": [], "textual_inversions": [], "train": "", "use_extra": None}),
        ({}, {"MODEL_PRECISION": "", "safety_checker": 0, "xformers_memory_efficient_attention": 0}),
    ],
)
def test_what_is_taken_as_it_was(server: Server, model_inputs: dict[str, Any], call_inputs: dict[str, Any]) -> None:
    answer = server.post({**INPUTS, **model_inputs}, {"MODEL_ID": "tiny/a", **call_inputs})
    assert answer.status_code == 200, answer.text


def test_webp_loses_unless_it_is_told_not_to(server: Server) -> None:
    def encoded(**options: Any) -> bytes:
        body = server.post(INPUTS, {"MODEL_ID": "tiny/a", "image_metadata": False, **options}).json()
        return base64.b64decode(body["image_base64"])

    assert b"VP8L" in encoded(image_format="WEBP", lossless=True)[:32]
    assert b"VP8L" not in encoded(image_format="WEBP")[:32]


def test_an_integer_seed_is_one_generator_and_a_list_is_one_for_each(server: Server) -> None:
    def images(seed: Any) -> list[np.ndarray]:
        return images_of(
            server.post({**INPUTS, "seed": seed, "num_images_per_prompt": 2}, {"MODEL_ID": "tiny/a"}).json()
        )

    one, each = images(5), images([5, 5])
    assert not np.array_equal(one[0], one[1])
    assert np.array_equal(each[0], each[1])


def test_the_meta_tells_the_seed_that_was_drawn(server: Server) -> None:
    inputs = {key: value for key, value in INPUTS.items() if key != "seed"}
    first = server.post(inputs, {"MODEL_ID": "tiny/a"}).json()
    again = server.post({**inputs, "seed": first["$meta"]["modelInputs"]["seed"]}, {"MODEL_ID": "tiny/a"}).json()
    assert np.array_equal(images_of(first)[0], images_of(again)[0])


@pytest.mark.slow
def test_legacy_statuses_are_for_the_old_route_alone(models_dir: Path, tmp_path: Path) -> None:
    environ = {"MODELS_DIR": str(models_dir), "RUNTIME_DOWNLOADS": "0", "LEGACY_STATUS": "1"}
    with running(environ, tmp_path / "server.log") as server:
        bad = {"modelInputs": {"prompt": 1}, "callInputs": {}}
        old = server.client.post("/", json=bad)
        assert (old.status_code, old.json()["$error"]["code"]) == (200, "INVALID_INPUTS")
        assert server.client.post("/jobs", json=bad).status_code == 400
