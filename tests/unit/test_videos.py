"""What requests for videos can say, and what is said against them before a worker is asked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from api.engine.calling import shape_of, to_uint8
from api.errors import ApiError
from api.models.library import Library
from api.schema.generation import GenerationRequest, GenerationResult
from api.service.admission import Admission
from api.service.bodies import result_body
from api.service.describe import description
from api.service.fetcher import Fetcher
from api.service.runpod_input import write_output
from api.settings import Settings
from tests.tiny import save_tiny
from tests.video_families import save_video_family

PROMPT = {"prompt": "a film"}
SMALL = {**PROMPT, "width": 32, "height": 16, "num_frames": 5}


class Asked:
    """Admission over a few models."""

    def __init__(self, root: Path) -> None:
        self.root = root
        save_tiny(root / "tiny--sd")
        for family in ("wan", "cogvideox", "ltx"):
            save_video_family(family, root / f"tiny--{family}")

    def admission(self, **environ: str) -> Admission:
        settings = Settings.from_env({"MODELS_DIR": str(self.root), "RUNTIME_DOWNLOADS": "0", **environ})
        library = Library(settings)
        return Admission(settings, library, Fetcher(settings, library, set), has_gpu=False)

    def request(
        self, family: str, inputs: dict[str, Any], options: dict[str, Any] | None = None, **environ: str
    ) -> GenerationRequest:
        options = {"MODEL_ID": f"tiny/{family}", **(options or {})}
        return asyncio.run(self.admission(**environ).admit("test", inputs, options)).request


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked(tmp_path_factory.mktemp("videos"))


def test_what_holds_where_nothing_is_asked_for(asked: Asked) -> None:
    """Wan says it in its signature, CogVideoX in its configuration; LTX tells its model of the rate."""
    request = asked.request("wan", PROMPT)
    assert request.video is not None
    assert (request.video.frames, request.video.fps, request.images, request.image_quality) == (81, 16, 1, 75)
    assert (request.meta["video_format"], request.meta["fps"]) == ("mp4", 16)
    assert "image_format" not in request.meta
    assert request.meta["modelInputs"]["num_frames"] == 81
    own = asked.request("cogvideox", PROMPT)
    assert own.video and (own.inputs["width"], own.inputs["height"], own.video.frames) == (16, 16, 9)
    slow = asked.request("ltx", {**PROMPT, "frame_rate": 12, "width": 64, "height": 32})
    assert slow.video and slow.video.fps == 12
    shown = asked.request("ltx", {**PROMPT, "frame_rate": 12, "width": 64, "height": 32}, {"fps": 24})
    assert shown.video and (shown.video.fps, shown.inputs["frame_rate"]) == (24, 12)


def test_meta_sent_back_asks_for_the_same(asked: Asked) -> None:
    first = asked.request("wan", SMALL, {"video_format": "webp", "video_quality": 40, "fps": 12.5})
    options = {name: first.meta[name] for name in ("video_format", "video_quality", "fps", "PIPELINE", "SCHEDULER")}
    again = asked.request("wan", first.meta["modelInputs"], options)
    assert (again.video, again.image_format, again.image_quality) == (first.video, "WEBP", 40)
    assert again.inputs == first.inputs


@pytest.mark.parametrize(
    ("family", "inputs", "options", "code", "field"),
    [
        ("wan", {**SMALL, "num_frames": 258}, {}, "LIMIT_EXCEEDED", "modelInputs.num_frames"),
        (
            "wan",
            {**SMALL, "num_frames": 100, "num_videos_per_prompt": 3},
            {},
            "LIMIT_EXCEEDED",
            "modelInputs.num_frames",
        ),
        ("wan", {**SMALL, "num_frames": 0}, {}, "INVALID_INPUTS", "modelInputs.num_frames"),
        ("wan", {**SMALL, "num_videos_per_prompt": 17}, {}, "LIMIT_EXCEEDED", "modelInputs.num_images_per_prompt"),
        ("wan", {**SMALL, "width": 4096, "height": 4096}, {}, "LIMIT_EXCEEDED", "modelInputs.width"),
        ("wan", {**SMALL, "width": 40}, {}, "INVALID_INPUTS", "modelInputs.width"),
        ("ltx", {**PROMPT, "width": 48, "height": 32}, {}, "INVALID_INPUTS", "modelInputs.width"),
        ("wan", {**SMALL, "image": "x"}, {}, "UNKNOWN_INPUT", "modelInputs.image"),
        ("wan", SMALL, {"image_format": "PNG"}, "INVALID_INPUTS", "callInputs.image_format"),
        ("wan", SMALL, {"image_quality": 5}, "INVALID_INPUTS", "callInputs.image_quality"),
        ("wan", SMALL, {"output": ["latents"]}, "INVALID_INPUTS", "callInputs.output"),
        ("wan", SMALL, {"refiner": {"MODEL_ID": "tiny/sd"}}, "INVALID_INPUTS", "callInputs.refiner"),
        ("wan", SMALL, {"upscale": {"model": "some/upscaler/4x.safetensors"}}, "INVALID_INPUTS", "callInputs.upscale"),
        ("wan", SMALL, {"prompt_syntax": "a1111"}, "NOT_SUPPORTED", "callInputs.prompt_syntax"),
        ("wan", SMALL, {"fps": 10**400}, "INVALID_INPUTS", "callInputs.fps"),
        ("wan", SMALL, {"video_format": "avi"}, "INVALID_INPUTS", "callInputs.video_format"),
        ("wan", SMALL, {"lossless": True}, "INVALID_INPUTS", "callInputs.lossless"),
        ("wan", SMALL, {"fps": 0}, "INVALID_INPUTS", "callInputs.fps"),
        ("wan", SMALL, {"fps": "24"}, "INVALID_INPUTS", "callInputs.fps"),
        ("wan", SMALL, {"video_format": "gif", "fps": 60}, "INVALID_INPUTS", "callInputs.fps"),
        ("wan", SMALL, {"video_format": "gif", "video_quality": 5}, "INVALID_INPUTS", "callInputs.video_quality"),
        ("ltx", {**PROMPT, "width": 64, "height": 32, "frame_rate": 121}, {}, "INVALID_INPUTS", "callInputs.fps"),
        ("sd", PROMPT, {"video_format": "mp4"}, "INVALID_INPUTS", "callInputs.video_format"),
        ("sd", PROMPT, {"fps": 5}, "INVALID_INPUTS", "callInputs.fps"),
        ("sd", PROMPT, {"video_quality": 5}, "INVALID_INPUTS", "callInputs.video_quality"),
    ],
)
def test_what_is_refused(
    asked: Asked, family: str, inputs: dict[str, Any], options: dict[str, Any], code: str, field: str
) -> None:
    with pytest.raises(ApiError) as caught:
        asked.request(family, inputs, options)
    assert (caught.value.code, caught.value.field) == (code, field)


def test_previews_are_of_images(asked: Asked) -> None:
    with pytest.raises(ApiError) as caught:
        options = {"MODEL_ID": "tiny/wan", "preview": True}
        asyncio.run(asked.admission().admit("test", SMALL, options, on_event=lambda event: None))
    assert (caught.value.code, caught.value.field) == ("INVALID_INPUTS", "callInputs.preview")


def test_a_servers_limit_holds_for_the_default_too(asked: Asked) -> None:
    request = asked.request("wan", PROMPT, MAX_FRAMES="33")
    assert request.video and request.video.frames == request.inputs["num_frames"] == 33
    own = asked.request("cogvideox", PROMPT, MAX_FRAMES="5")
    assert own.video and own.video.frames == 5


def test_the_schema_says_the_limits(asked: Asked) -> None:
    settings = Settings.from_env({"MODELS_DIR": str(asked.root), "MAX_FRAMES": "99"})
    found = Library(settings).find(asked.admission().source_ref({"MODEL_ID": "tiny/wan"}))
    assert found is not None
    told = description(found, {}, settings)
    assert told["makes"] == "video"
    assert told["modelInputs"]["properties"]["num_frames"]["maximum"] == 99


def test_frames_become_bytes_as_images_do() -> None:
    """Whatever their number, and in their order."""
    frames = torch.rand(2, 19, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    found = to_uint8(frames)
    assert (found.shape, found.dtype) == ((2, 19, 4, 6, 3), np.uint8)
    assert shape_of(found) == {"frames": 19, "size": [6, 4]}
    assert np.array_equal(found[1, 17], to_uint8(frames[1, 17:18])[0])
    assert np.array_equal(found, to_uint8(np.moveaxis(frames.numpy(), 2, -1)))
    assert shape_of(found[0]) == {}


@pytest.mark.parametrize(("count", "key", "short"), [(1, "video_base64", "video"), (2, "videos_base64", "videos")])
def test_an_answer_calls_a_video_one(count: int, key: str, short: str) -> None:
    meta = {"video_format": "mp4", "fps": 16, "modelInputs": {"seed": 1}}
    result = GenerationResult([b"film"] * count, meta, {}, 0)
    body = result_body(result)
    assert body[key] == ("ZmlsbQ==" if count == 1 else ["ZmlsbQ=="] * 2)
    assert not any(name.startswith("image") for name in body)
    assert write_output(body, simple=True)[short] == body[key]
    assert result_body(result, ["/jobs/x/images/0"])["video_urls"] == ["/jobs/x/images/0"]
    uploaded = result_body(GenerationResult([], meta, {}, 0, urls=["s3://x"]))
    assert uploaded["video_url"] == write_output(uploaded, simple=True)["video_url"] == "s3://x"
