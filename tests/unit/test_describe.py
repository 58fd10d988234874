"""What a model accepts, as it is told, is what requests are checked against."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from api.errors import ApiError
from api.schema.catalogue import catalogue
from api.service import inputs as checks
from api.service.describe import DIALECT, description, schema_of
from api.settings import Settings
from tests.running import Server, as_base64
from tests.unit.test_fitting import saved_as
from tests.unit.test_inputs import ADMISSION, SETTINGS

PICTURE = as_base64(np.zeros((64, 64, 3), np.uint8))


def demo(pipeline: str) -> dict[str, Any]:
    ref = ADMISSION.source_ref({})
    model = ADMISSION._library.find(ref)
    assert model is not None
    return description(model, {"PIPELINE": pipeline}, SETTINGS)


def admits(pipeline: str, model_inputs: dict[str, Any]) -> bool:
    try:
        asyncio.run(ADMISSION.admit("test", model_inputs, {"PIPELINE": pipeline}))
    except ApiError as error:
        assert error.status == 400, error.message
        return False
    return True


def example(form: dict[str, Any]) -> Any:
    """A value that a property's schema allows."""
    if "anyOf" in form:
        return example(form["anyOf"][0])
    if "default" in form:
        return form["default"]
    if form.get("contentEncoding") == "base64":
        return PICTURE
    kinds = {"string": "a word", "boolean": True, "object": {}, "number": 0.5, "integer": 2}
    if form["type"] == "array":
        return [example(form["items"])] * 3
    value = kinds[form["type"]]
    if form["type"] in ("number", "integer"):
        value = min(max(value, form.get("minimum", value)), form.get("maximum", value))
    return value


CASES = ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"]
ALONE = {"timesteps": "sigmas", "init_image": "image", "input_image": "image", "image": "init_image"}


@pytest.mark.parametrize("pipeline", CASES)
def test_what_is_told_is_admitted(pipeline: str) -> None:
    schema = demo(pipeline)["modelInputs"]
    base = {name: example(schema["properties"][name]) for name in schema["required"]}
    if "anyOf" in schema:
        base["image"] = PICTURE
    assert admits(pipeline, base)
    for name in schema["required"]:
        assert not admits(pipeline, {key: value for key, value in base.items() if key != name})
    for name, form in schema["properties"].items():
        sent = {key: value for key, value in base.items() if ALONE.get(name) != key}
        assert admits(pipeline, {**sent, name: example(form)}), name
    assert not admits(pipeline, {**base, "no_such_input": 1})


@pytest.mark.parametrize("pipeline", CASES)
def test_ranges_that_are_told_are_those_that_hold(pipeline: str) -> None:
    schema = demo(pipeline)["modelInputs"]
    base = {name: example(schema["properties"][name]) for name in schema["required"]}
    base |= {"image": PICTURE} if "anyOf" in schema else {}
    checked = 0
    for name, form in schema["properties"].items():
        if name == "seed":
            form = form["anyOf"][0]
        step = form.get("multipleOf", 1)
        if "minimum" in form:
            assert not admits(pipeline, {**base, name: form["minimum"] - step}), name
            checked += 1
        if "maximum" in form:
            assert not admits(pipeline, {**base, name: form["maximum"] + step}), name
            if name not in ("width", "height"):  # which are limited together
                assert admits(pipeline, {**base, name: form["maximum"]}), name
            checked += 1
    assert checked > 10


def test_the_longest_side_is_one_that_is_admitted() -> None:
    sides = demo(CASES[0])["modelInputs"]["properties"]["width"]
    longest = sides["maximum"]
    short = max(64, -(-longest // 32 // 64) * 64)
    assert admits(CASES[0], {"prompt": "x", "width": longest - longest % 64, "height": short}) == (
        longest * short <= SETTINGS.max_pixels
    )
    assert sides["multipleOf"] == 8 and sides["default"] == 64


def test_every_pipeline_has_a_schema_with_its_own_inputs() -> None:
    for name, accepted in catalogue().pipelines.items():
        schema = schema_of(name, accepted, saved_as(name), SETTINGS)
        assert schema["$schema"] == DIALECT
        assert schema["properties"].keys() >= accepted.keys() | {"seed", "callback_steps"}
        assert schema["properties"].keys() - accepted.keys() <= {*checks.OURS, *checks.ALIASES}
        assert set(schema["required"]) <= schema["properties"].keys()
        Draft202012Validator.check_schema(schema)
        for argument, form in schema["properties"].items():
            if "default" in form:
                assert Draft202012Validator(form).is_valid(form["default"]), (name, argument)


def test_the_schema_itself_refuses_what_is_refused() -> None:
    validator = Draft202012Validator(demo(CASES[2])["modelInputs"])
    good = {"prompt": "x", "image": PICTURE, "mask_image": PICTURE, "seed": [1, 2], "strength": 0.5}
    assert validator.is_valid(good)
    assert validator.is_valid({**{k: v for k, v in good.items() if k != "image"}, "init_image": PICTURE})
    for wrong in ({"strength": 2}, {"seed": -1}, {"width": 65}, {"prompt": 3}, {"nothing": 1}, {"eta": "0"}):
        assert not validator.is_valid({**good, **wrong}), wrong
    assert not validator.is_valid({"prompt": "x", "mask_image": PICTURE})


def test_limits_are_the_servers() -> None:
    settings = Settings.from_env({"MAX_STEPS": "7", "MAX_IMAGES": "2"})
    properties = description(saved_as("StableDiffusionPipeline"), {}, settings)["modelInputs"]["properties"]
    assert properties["num_inference_steps"]["maximum"] == 7
    assert properties["num_images_per_prompt"]["maximum"] == 2
    assert properties["clip_skip"] == {"type": "integer", "minimum": 0, "maximum": 1}


def test_the_route(server: Server) -> None:
    for path in ("demo/shapes", "demo%2Fshapes"):
        answer = server.client.get(f"/models/{path}/schema")
        assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["pipeline"] == body["pipelines"][0] == "StableDiffusionPipeline"
    assert body["auto"]["AutoPipelineForInpainting"] == "StableDiffusionInpaintPipeline"
    assert "EulerDiscreteScheduler" in body["schedulers"]
    assert body["size"] == {"multiple": 8, "default": 64, "max_pixels": 4194304}
    other = server.client.get("/models/tiny/a/schema", params={"PIPELINE": "StableDiffusionPAGPipeline"}).json()
    assert "pag_scale" in other["modelInputs"]["properties"]
    for path, params, status, code in (
        ("nobody/nothing", {}, 404, "MODEL_MISMATCH"),
        ("tiny/a", {"PIPELINE": "FluxPipeline"}, 422, "PIPELINE_NOT_SUPPORTED"),
        ("tiny/a", {"PIPLINE": "x"}, 400, "UNKNOWN_INPUT"),
    ):
        answer = server.client.get(f"/models/{path}/schema", params=params)
        assert (answer.status_code, answer.json()["$error"]["code"]) == (status, code)
