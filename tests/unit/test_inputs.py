"""Validation without a server: types, ranges, limits, and random requests (property-based)."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from api.errors import CODES, ApiError
from api.models.library import Library
from api.schema.catalogue import catalogue
from api.schema.messages import Generate, frame
from api.service.admission import Admission
from api.service.fetcher import Fetcher
from api.service.options import KNOWN, LATER
from api.service.pictures import decode, from_base64
from api.settings import Settings
from tests.running import as_base64

SETTINGS = Settings.from_env({"MODELS_DIR": "/nonexistent", "RUNTIME_DOWNLOADS": "0"})


def admission(settings: Settings, *, has_gpu: bool) -> Admission:
    library = Library(settings)
    return Admission(settings, library, Fetcher(settings, library, set), has_gpu=has_gpu)


ADMISSION = admission(SETTINGS, has_gpu=True)


def admit(model_inputs: dict[str, Any], call_inputs: dict[str, Any] | None = None) -> Any:
    return asyncio.run(ADMISSION.admit("test", model_inputs, call_inputs or {})).request


def test_defaults_are_filled_in() -> None:
    request = admit({"prompt": "a red circle"})
    assert request.pipeline == "StableDiffusionPipeline"
    assert request.scheduler == "DPMSolverMultistepScheduler"
    assert request.inputs["num_inference_steps"] == 50
    assert (request.inputs["width"], request.inputs["height"]) == (64, 64)
    assert 0 <= request.seed < 2**32
    assert request.meta["modelInputs"]["seed"] == request.seed


def test_two_requests_without_a_seed_differ() -> None:
    assert admit({"prompt": "x"}).seed != admit({"prompt": "x"}).seed


def test_inpainting_keeps_the_size_of_the_picture() -> None:
    picture = as_base64(np.zeros((75, 130, 3), np.uint8))
    request = admit({"prompt": "x", "image": picture, "mask_image": picture})
    assert (request.inputs["width"], request.inputs["height"]) == (128, 72)


def test_custom_timesteps_count_as_steps() -> None:
    assert admit({"prompt": "x", "timesteps": [900, 500, 100]}).meta["modelInputs"]["num_inference_steps"] == 3


def test_a_cpu_has_one_precision() -> None:
    on_cpu = admission(SETTINGS, has_gpu=False)
    refs = {
        asyncio.run(on_cpu.admit("t", {"prompt": "x"}, {"MODEL_PRECISION": p})).request.model
        for p in ("", "fp16", "bf16")
    }
    assert len(refs) == 1


def test_null_means_not_sent() -> None:
    assert admit({"prompt": "x", "image": None, "mask_image": None}).pipeline == "StableDiffusionPipeline"
    assert admit({"prompt": "x", "width": None, "negative_prompt": None}, {"PIPELINE": None}).inputs["width"] == 64


def test_numbers_may_come_as_floats_and_whole_numbers_as_either() -> None:
    request = admit({"prompt": "x", "num_inference_steps": 20.0, "guidance_scale": 7})
    assert request.inputs["num_inference_steps"] == 20
    assert isinstance(request.inputs["num_inference_steps"], int)


PICTURE = as_base64(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("model_inputs", "pipeline"),
    [
        ({}, "StableDiffusionPipeline"),
        ({"image": PICTURE}, "StableDiffusionImg2ImgPipeline"),
        ({"init_image": PICTURE}, "StableDiffusionImg2ImgPipeline"),
        ({"image": PICTURE, "mask_image": PICTURE}, "StableDiffusionInpaintPipeline"),
    ],
)
@pytest.mark.parametrize("named", [{}, {"PIPELINE": "ALL"}])
def test_the_default_pipeline_follows_what_the_request_holds(
    model_inputs: dict[str, Any], pipeline: str, named: dict[str, str]
) -> None:
    assert admit({"prompt": "x", **model_inputs}, named).pipeline == pipeline


def test_one_negative_prompt_for_many_prompts_is_meant_for_each() -> None:
    assert admit({"prompt": ["a", "b"], "negative_prompt": "c"}).inputs["negative_prompt"] == ["c", "c"]


def test_a_default_scheduler_that_does_not_fit_gives_way(models_dir: Path) -> None:
    config = Settings.from_env({"MODELS_DIR": str(models_dir), "SCHEDULER": "FlowMatchEulerDiscreteScheduler"})
    admitted = asyncio.run(
        admission(config, has_gpu=False).admit(
            "test", {"prompt": "x", "width": 64, "height": 64}, {"MODEL_ID": "tiny/a"}
        )
    )
    assert admitted.request.scheduler == "DDIMScheduler"


def test_options_of_the_old_system_are_refused_rather_than_ignored() -> None:
    for name in LATER:
        with pytest.raises(ApiError) as error:
            admit({"prompt": "x"}, {name: "something"})
        assert error.value.code == "NOT_SUPPORTED"
        admit({"prompt": "x"}, {name: ""})


def test_what_changes_pixels_is_in_meta_to_be_sent_again() -> None:
    assert admit({"prompt": "x"}, {"QUANTIZE": "none"}).meta["QUANTIZE"] == "none"
    assert admit({"prompt": "x"}, {"compile": False}).meta["compile"] is False
    assert "compile" not in admit({"prompt": "x"}, {"compile": True}).meta


def test_how_a_model_is_held_can_be_asked_for() -> None:
    def asked(call_inputs: dict[str, Any]) -> tuple[str, bool, bool]:
        request = admit({"prompt": "x"}, call_inputs)
        return request.offload, request.low_vram, request.meta.get("low_vram", False)

    assert asked({}) == ("auto", False, False)
    assert asked({"OFFLOAD": "none"}) == ("none", False, False)
    assert asked({"low_vram": True, "OFFLOAD": "auto"}) == ("auto", True, True)
    config = Settings.from_env({"MODELS_DIR": "/nonexistent", "RUNTIME_DOWNLOADS": "0", "OFFLOAD": "none"})
    told = admission(config, has_gpu=True)
    for call_inputs, offload in (({}, "none"), ({"OFFLOAD": "auto"}, "auto"), ({"low_vram": True}, "auto")):
        assert asyncio.run(told.admit("test", {"prompt": "x"}, call_inputs)).request.offload == offload
    config = Settings.from_env({"MODELS_DIR": "/nonexistent", "RUNTIME_DOWNLOADS": "0", "OFFLOAD": "model"})
    for has_gpu, call_inputs, offload in (
        (True, {}, "model"),
        (True, {"OFFLOAD": "sequential", "low_vram": True}, "sequential"),
        (True, {"low_vram": True}, "model"),
        (False, {}, "auto"),  # nobody asked for it in this request, and it would change nothing
        (False, {"OFFLOAD": "none"}, "none"),
    ):
        told = admission(config, has_gpu=has_gpu)
        assert asyncio.run(told.admit("test", {"prompt": "x"}, call_inputs)).request.offload == offload


def test_attention_can_be_asked_for() -> None:
    assert admit({"prompt": "x"}, {}).attention == "auto"
    assert admit({"prompt": "x"}, {"attention": "sage"}).attention == "sage"
    assert admit({"prompt": "x"}, {"attention": "native"}).attention == "sdpa"
    assert admit({"prompt": "x"}, {"xformers_memory_efficient_attention": True}).attention == "xformers"


@pytest.mark.parametrize(
    ("call_inputs", "field", "code"),
    [
        ({"OFFLOAD": "all"}, "OFFLOAD", "INVALID_INPUTS"),
        ({"OFFLOAD": True}, "OFFLOAD", "INVALID_INPUTS"),
        ({"low_vram": "yes"}, "low_vram", "INVALID_INPUTS"),
        ({"low_vram": True, "OFFLOAD": "none"}, "low_vram", "INVALID_INPUTS"),
        ({"attention": "flash_hub"}, "attention", "INVALID_INPUTS"),
        ({"attention": True}, "attention", "INVALID_INPUTS"),
        (
            {"attention": "flash", "xformers_memory_efficient_attention": True},
            "xformers_memory_efficient_attention",
            "INVALID_INPUTS",
        ),
        (
            {"attention": "xformers", "xformers_memory_efficient_attention": False},
            "xformers_memory_efficient_attention",
            "INVALID_INPUTS",
        ),
    ],
)
def test_how_a_model_cannot_be_held(call_inputs: dict[str, Any], field: str, code: str) -> None:
    with pytest.raises(ApiError) as error:
        admit({"prompt": "x"}, call_inputs)
    assert (error.value.code, error.value.field) == (code, f"callInputs.{field}")


@pytest.mark.parametrize("way", ["model", "sequential"])
def test_a_cpu_has_nothing_to_offload_from(way: str) -> None:
    told = admission(SETTINGS, has_gpu=False)
    with pytest.raises(ApiError, match="saves no memory on a CPU") as error:
        asyncio.run(told.admit("test", {"prompt": "x"}, {"OFFLOAD": way}))
    assert (error.value.code, error.value.field) == ("NOT_SUPPORTED", "callInputs.OFFLOAD")


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height), 7).save(out, "PNG")
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""
    data = bytearray(png(8, 8))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"not an image", "INVALID_IMAGE"),
        (png(64, 64)[:60], "INVALID_IMAGE"),
        (png(64, 64).replace(b"IDAT", b"JUNK"), "INVALID_IMAGE"),
        (png(4, 4), "INVALID_IMAGE"),
        (png(1000, 9), "INVALID_IMAGE"),
        (png(3000, 3000), "IMAGE_TOO_LARGE"),
        (bomb(100_000, 100_000), "IMAGE_TOO_LARGE"),
        (bomb(2**31 - 1, 2**31 - 1), "IMAGE_TOO_LARGE"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "INVALID_IMAGE"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "INVALID_IMAGE"),
    ],
)
def test_pictures_that_cannot_be_used(data: bytes, code: str) -> None:
    with pytest.raises(ApiError) as error:
        decode(data, "f", "RGB", SETTINGS.max_pixels)
    assert error.value.code == code


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_pictures_of_every_mode_become_rgb(mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (16, 16), 0).save(out, "TIFF" if mode == "CMYK" else "PNG")
    picture = decode(out.getvalue(), "f", "RGB", 1000)
    assert (picture.mode, picture.width, len(picture.pixels)) == ("RGB", 16, 16 * 16 * 3)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(image_format: str) -> None:
    out = io.BytesIO()
    grey = np.array([[0, 257, 300, 32768, 65535] * 2] * 10, np.uint16)
    Image.fromarray(grey).save(out, image_format)
    picture = decode(out.getvalue(), "f", "L", 1000)
    assert list(picture.pixels[:5]) == [0, 1, 1, 127, 255]


def test_what_is_transparent_becomes_white() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(out, "PNG")
    assert decode(out.getvalue(), "f", "RGB", 1000).pixels[:3] == b"\xff\xff\xff"


@pytest.mark.parametrize("text", ["AAAA", "AAA", "AA==", "data:image/png;base64,AAAA", " AA\nAA "])
def test_base64_in_the_forms_that_clients_send(text: str) -> None:
    assert from_base64(text, "f")


@pytest.mark.parametrize("text", ["", "data:image/png;base64,", "http://x/y.png", "ä", "AA*A", "="])
def test_what_is_no_base64(text: str) -> None:
    with pytest.raises(ApiError) as error:
        from_base64(text, "f")
    assert error.value.code == "INVALID_IMAGE"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
input_names = st.sampled_from([*catalogue().pipelines["StableDiffusionInpaintPipeline"], "seed", "callback_steps"])
option_names = st.sampled_from([*KNOWN, *LATER])
likely = st.sampled_from(
    [
        0,
        1,
        1e300,
        -1e30,
        2**80,
        '{"a": 1}',
        {"a": [[[[[[[[[1]]]]]]]]]},
        -1,
        8,
        63,
        64,
        10**9,
        2**64,
        0.5,
        7.5,
        "",
        "a",
        "fp16",
        "PNG",
        "DDIMScheduler",
        ["a", "b"],
    ]
)


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model_inputs=st.dictionaries(input_names | st.text(max_size=10), likely | json_values, max_size=6),
    call_inputs=st.dictionaries(option_names | st.text(max_size=10), likely | json_values, max_size=4),
)
def test_any_request_is_admitted_or_told_what_is_wrong(
    model_inputs: dict[str, Any], call_inputs: dict[str, Any]
) -> None:
    """No request makes validation fail in any other way, and what is admitted is within the limits."""
    call_inputs.pop("is_url", None)
    try:
        request = admit(model_inputs, call_inputs)
        frame(Generate(request, events=False))  # what is admitted can be handed to a worker
    except ApiError as error:
        orjson.dumps(error.body(), default=str)
        assert 400 <= CODES[error.code][0] < 500
        assert error.message
        assert error.field or error.code in ("QUEUE_FULL",)
        return
    assert request.inputs["num_inference_steps"] <= SETTINGS.max_steps
    assert request.images <= SETTINGS.max_images
    assert request.inputs.get("width", 8) % 8 == 0
