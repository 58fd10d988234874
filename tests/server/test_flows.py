"""Flows over HTTP, with the demo model: what is asked for is what is drawn, at twice the size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scripts.demo_model.checker import read
from tests.running import Server, images_of

SCENE = {"prompt": "an orange circle at the left on a black background", "num_inference_steps": 20, "guidance_scale": 4}
STRENGTH = 0.2
"""The demo model was trained on 64 pixels only: with more of it, a second pass at 128 loses the shape."""
REFINER = {"MODEL_ID": "demo/shapes", "strength": STRENGTH}


@pytest.mark.parametrize("upscaler", ["lanczos", pytest.param("latent", marks=pytest.mark.slow)])
def test_a_second_pass_draws_the_same_at_twice_the_size(server: Server, upscaler: str) -> None:
    """Of three seeds at least two."""
    hires = {"scale": 2, "strength": STRENGTH, "upscaler": upscaler}
    right = 0
    for seed in range(3):
        response = server.post({**SCENE, "seed": seed}, {"hires": hires})
        assert response.status_code == 200, response.text[:500]
        answer = response.json()
        (image,) = images_of(answer)
        assert image.shape == (128, 128, 3)
        seen = read(image)
        things = [(thing.colour, thing.shape, thing.place) for thing in seen.things]
        right += (seen.background, things) == ("black", [("orange", "circle", "left")])
        assert answer["$meta"]["hires"] == {
            "width": 128, "height": 128, "strength": hires["strength"], "num_inference_steps": 20,
            "guidance_scale": 4.0, "upscaler": upscaler,
        }  # fmt: skip
        assert [stage["name"] for stage in answer["$meta"]["stages"]] == ["base", "hires"]
        assert {"base", "hires", "inference"} <= answer["$timings"].keys()
    assert right >= 2


def test_both_together_as_they_happen(server: Server) -> None:
    options = {"hires": {"strength": STRENGTH}, "refiner": REFINER, "streamEvents": True, "safety_checker": False}
    response = server.post({**SCENE, "seed": 3, "callback_steps": 1}, options)
    events = [json.loads(line) for line in response.text.splitlines()]
    assert "image_base64" in events[-1], events[-1]
    steps = [event["payload"]["step"] for event in events if event.get("status") == "progress"]
    assert steps == list(range(28))  # 20, then 4 of 20, then 4 of 20
    assert {event["payload"]["total"] for event in events if event.get("status") == "progress"} == {28}
    phases = [
        (e["type"], e["status"])
        for e in events
        if e.get("type") == "inference" and e.get("status") in ("start", "done")
    ]
    assert phases == [("inference", "start"), ("inference", "done")]
    meta = events[-1]["$meta"]
    assert meta["refiner"]["MODEL_ID"] == "demo/shapes"
    again = server.post(meta["modelInputs"], {name: meta[name] for name in ("SCHEDULER", "hires", "refiner")})
    assert np.array_equal(images_of(again.json())[0], images_of(events[-1])[0])


@pytest.mark.slow
def test_a_lora_is_in_the_second_pass_too(server: Server) -> None:
    """It draws outlines only: what the first pass left out, the second does not fill in."""
    lora = "demo/adapters/outlined.safetensors"
    sent = {"prompt": "a red circle on a white background", "num_inference_steps": 20, "guidance_scale": 4}
    hollow = 0
    for seed in range(3):
        response = server.post({**sent, "seed": seed}, {"lora_weights": lora, "hires": {"strength": STRENGTH}})
        assert response.status_code == 200, response.text[:500]
        things = read(images_of(response.json())[0]).things
        hollow += bool(things) and things[0].hollow > 0.2
    assert hollow >= 2


def test_what_is_wrong_is_said_at_once(server: Server) -> None:
    response = server.post(SCENE, {"refiner": "demo/nothing"})
    assert response.status_code in (400, 404), response.text
    assert response.json()["$error"]["field"].startswith("callInputs.refiner")
    response = server.post(SCENE, {"hires": {"upscaler": "lancos"}})
    assert response.status_code == 400
    assert response.json()["$error"]["available"] == ["lanczos", "bicubic", "latent"]


def test_a_plan_counts_the_refiner(server: Server) -> None:
    alone, both = (
        server.client.post("/plan", json={"modelInputs": SCENE, "callInputs": options}).json()
        for options in ({}, {"refiner": {"MODEL_ID": "tiny/a", "strength": 0.3}})
    )
    assert both["bytes"]["model"] > alone["bytes"]["model"]
