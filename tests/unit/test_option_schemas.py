"""What callInputs are said to be, as JSON Schema, is what they are checked for."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from api.errors import ApiError
from api.service.describe import schema_of_all
from api.service.options import OPTIONS
from api.settings import Settings
from tests.unit.test_inputs import SETTINGS

LORA: dict[str, Any] = {"url": "org/repo/file.safetensors"}
VALUES: list[Any] = [
    True, False, 0, 1, 2, 100, 101, -1, 0.5, 10**6, 10**6 + 1, "x", "x" * 200, "x" * 201, "x" * 8192, "x" * 8193, "PNG", "webp",
    "plain", "a1111", "auto", "none", "model", "fp16", [], ["images"], ["images", "latents"], ["x"], ["x"] * 4,
    ["x"] * 5, ["x"] * 9, ["x"] * 33, [1], [""], {}, {"a": 1}, {str(n): n for n in range(64)},
    {str(n): n for n in range(65)}, LORA, [LORA], {**LORA, "scale": 2}, {**LORA, "scale": 101}, {**LORA, "token": "w"},
    {**LORA, "fname": "f"}, {**LORA, "fname": 1}, {**LORA, "weight_name": {}}, {**LORA, "fname": None},
    {**LORA, "fname": "", "weight_name": {}}, {**LORA, "fname": "x" * 501}, {**LORA, "other": 1}, {"scale": 1}, {"url": 1},
]  # fmt: skip


def accepts(name: str, value: Any) -> bool:
    option = OPTIONS[name]
    try:
        option.check(value, name, option.meaning)
    except ApiError as error:
        assert error.code == "INVALID_INPUTS", error.message
        return False
    return True


@pytest.mark.parametrize("name", OPTIONS)
def test_a_schema_allows_what_the_check_does(name: str) -> None:
    schema = OPTIONS[name].schema
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert validator.is_valid(OPTIONS[name].example)
    told = {repr(value)[:60]: validator.is_valid(value) for value in VALUES}
    assert told == {repr(value)[:60]: accepts(name, value) for value in VALUES}
    assert {True, False} == set(told.values())


def test_model_inputs_of_all_pipelines_together() -> None:
    schema = schema_of_all(SETTINGS)
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert validator.is_valid(
        {"prompt": "x", "seed": [1, 2], "width": 64, "init_image": "AAAA", "callback_steps": None}
    )
    for wrong in ({"prompt": 1}, {"no_such_input": 1}, {"seed": -1}, {"num_inference_steps": SETTINGS.max_steps + 1}):
        assert not validator.is_valid(wrong), wrong
    lower = Settings.from_env({"MAX_STEPS": "7"})
    assert schema_of_all(lower)["properties"]["num_inference_steps"]["anyOf"][0]["maximum"] == 7
