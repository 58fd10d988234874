"""What a request may say of an upscaler, before anything is looked for."""

from __future__ import annotations

from typing import Any

import pytest

from api.errors import ApiError
from api.models.adapters import adapter_ref
from api.models.upscalers import DEFAULT_TILE, NAMED, read_name, read_upscale
from api.service.options import check_options
from tests.unit.test_inputs import SETTINGS


@pytest.mark.parametrize("name", ["RealESRGAN_x4plus", "realesrgan-x4plus", "realesrgan_x4plus"])
def test_names_that_docker_diffusers_api_had(name: str) -> None:
    asked = read_name(name, "callInputs.MODEL_ID")
    assert asked.address == "https://github.com/xinntao/Real-ESRGAN/releases/download/v0.1.0/RealESRGAN_x4plus.pth"
    assert len(asked.sha256) == 64
    ref = adapter_ref(asked, SETTINGS)
    assert (ref.adapter, ref.trusted) == ("upscaler", False)
    assert ref.checkpoint is not None
    assert ref.checkpoint.sha256 == asked.sha256


def test_every_name_leads_to_a_file_with_a_digest() -> None:
    for name in NAMED:
        asked = read_name(name, "x")
        assert asked.address.startswith("https://github.com/xinntao/Real-ESRGAN/")
        assert len(asked.sha256) == 64


def test_the_same_file_as_an_adapter_is_another() -> None:
    one = read_name("owner/repo/x.safetensors", "x")
    assert adapter_ref(one, SETTINGS).name != adapter_ref(one.__class__("lora", one.address), SETTINGS).name


def test_what_is_not_said_has_defaults() -> None:
    asked = check_options({"upscale": {"model": "owner/repo/x.safetensors#revision=v1", "scale": None}})["upscale"]
    assert (asked.scale, asked.tile, asked.model.revision) == (None, DEFAULT_TILE, "v1")
    assert read_upscale({"model": "owner/repo#fname=x.safetensors", "sha256": "A" * 64}).model.sha256 == "a" * 64
    assert read_upscale({"tile": 64, "scale": 1.5}).model is None


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("RealESRGAN_x4plus", "callInputs.upscale"),
        ({"modle": "x"}, "callInputs.upscale"),
        ({"scale": True}, "callInputs.upscale.scale"),
        ({"scale": float("nan")}, "callInputs.upscale.scale"),
        ({"scale": 0.5}, "callInputs.upscale.scale"),
        ({"scale": "4"}, "callInputs.upscale.scale"),
        ({"tile": 256.0}, "callInputs.upscale.tile"),
        ({"tile": 0}, "callInputs.upscale.tile"),
        ({"tile": 4096}, "callInputs.upscale.tile"),
        ({"model": 4}, "callInputs.upscale.model"),
        ({"model": ["a/b/c.safetensors"]}, "callInputs.upscale.model"),
        ({"model": "owner/repo"}, "callInputs.upscale.model"),
        ({"model": "no-such-name"}, "callInputs.upscale.model"),
        ({"model": "a/b/c.safetensors#scale=2"}, "callInputs.upscale.model"),
        ({"model": "a/b/c.safetensors", "sha256": "x"}, "callInputs.upscale.sha256"),
        ({"sha256": "0" * 64}, "callInputs.upscale.sha256"),
    ],
)
def test_what_cannot_be(value: Any, field: str) -> None:
    with pytest.raises(ApiError) as refused:
        check_options({"upscale": value})
    assert (refused.value.code, refused.value.field) == ("INVALID_INPUTS", field)


def test_a_path_out_of_the_repository_is_refused() -> None:
    with pytest.raises(ApiError) as refused:
        adapter_ref(read_name("owner/repo/../../x.safetensors", "x"), SETTINGS)
    assert refused.value.code == "INVALID_INPUTS"
