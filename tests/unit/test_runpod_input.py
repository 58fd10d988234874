"""RunPod's two forms of ``input``, and what comes back in each."""

from __future__ import annotations

from typing import Any

import pytest

from api.errors import ApiError
from api.schema.generation import GenerationResult
from api.service.bodies import result_body
from api.service.runpod_input import field_in_input, read_input, write_error, write_output

META = {"MODEL_ID": "demo/shapes", "modelInputs": {"prompt": "x", "seed": 7}}


def body(images: int = 1, **more: Any) -> dict[str, Any]:
    return result_body(GenerationResult([b"png"] * images, META, {"inference": 5}, 0.5, **more))


def test_the_native_form_is_taken_as_it_is() -> None:
    read = read_input({"modelInputs": {"prompt": "x"}, "callInputs": {"MODEL_ID": "a/b", "streamEvents": True}})
    assert read == ({"prompt": "x"}, {"MODEL_ID": "a/b"}, False)
    assert read_input({"modelInputs": {"prompt": "x"}}) == ({"prompt": "x"}, {}, False)


def test_the_simple_form_is_taken_apart_by_the_names_of_options() -> None:
    read = read_input({"prompt": "x", "seed": 1, "SCHEDULER": "Euler a", "image_format": "JPEG", "async": True})
    assert read == ({"prompt": "x", "seed": 1}, {"SCHEDULER": "Euler a", "image_format": "JPEG"}, True)


@pytest.mark.parametrize(
    ("sent", "code", "field"),
    [
        (None, "MISSING_INPUT", "input"),
        ({}, "MISSING_INPUT", "input"),
        ("a prompt", "INVALID_INPUTS", "input"),
        ([], "INVALID_INPUTS", "input"),
        ({"input": {"prompt": "x"}}, "INVALID_INPUTS", "input.input"),
        ({"prompt": "x", "scheduler": "DDIM"}, "UNKNOWN_INPUT", "input.scheduler"),
        ({"callInputs": {}}, "MISSING_INPUT", "input.modelInputs"),
        ({"modelInputs": []}, "INVALID_INPUTS", "input.modelInputs"),
        ({"modelInputs": {}, "prompt": "x"}, "UNKNOWN_INPUT", "input.prompt"),
    ],
)
def test_what_is_no_input(sent: object, code: str, field: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_input(sent)
    assert (caught.value.code, caught.value.field) == (code, field)


def test_outputs() -> None:
    assert write_output(body(), simple=False) == body()
    assert write_output(body(), simple=True) == {"image": "cG5n", "seed": 7, "meta": META, "timings": {"inference": 5}}
    several = write_output(body(2, nsfw=[False, True], extras={"mask": b"m"}), simple=True)
    assert list(several) == ["images", "mask_base64", "nsfw_content_detected", "seed", "meta", "timings"]
    links = write_output(body(0, urls=["https://a", "https://b"]), simple=True)
    assert links["image_urls"] == ["https://a", "https://b"]


def test_errors_name_the_fields_that_the_client_knows() -> None:
    error = ApiError("INVALID_INPUTS", "Must be a number.", field="modelInputs.width").body()
    assert write_error(error, simple=True) == "INVALID_INPUTS: input.width: Must be a number."
    assert write_error(error, simple=False) == "INVALID_INPUTS: input.modelInputs.width: Must be a number."
    assert write_error({"code": "TIMED_OUT", "message": "Too long."}, simple=True) == "TIMED_OUT: Too long."
    assert field_in_input("policy.ttl", simple=True) == "policy.ttl"
