"""Requests for videos × alone, beside another one, beside images: what they give is what diffusers gives.

As in ``test_matrix``: through admission and the engine, all but the last step, floats to bytes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from api.engine import run
from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.errors import ApiError
from api.models.library import Library
from api.schema.generation import GenerationRequest
from api.service.admission import Admission
from api.service.fetcher import Fetcher
from api.settings import Settings
from tests.running import as_base64
from tests.tiny import save_tiny
from tests.unit.test_matrix import TOLERANCE, picture
from tests.video_families import CALLS, MAKERS, save_video_family

STEPS = 2
PIPELINES = {
    "wan": "WanPipeline",
    "ltx": "LTXPipeline",
    "cogvideox": "CogVideoXPipeline",
    "cogvideox-i2v": "CogVideoXImageToVideoPipeline",
    "hunyuan": "HunyuanVideoPipeline",
    "mochi": "MochiPipeline",
    "latte": "LattePipeline",
    "animatediff": "AnimateDiffPipeline",
    "text-to-video": "TextToVideoSDPipeline",
    "svd": "StableVideoDiffusionPipeline",
}
OF_PICTURES = ("svd", "cogvideox-i2v")
IMAGES = 4
MODES = ("alone", "two videos", "four images")


def video_inputs(family: str, seed: int, *, with_image: bool = False) -> dict[str, Any]:
    inputs: dict[str, Any] = {"num_inference_steps": STEPS, "seed": seed, **CALLS[family]}
    if family != "svd":
        inputs["prompt"] = f"a film of thing number {seed}"
    if with_image or family in OF_PICTURES:
        colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
        inputs["image"] = as_base64(colours.repeat(inputs["height"] // 2, 0).repeat(inputs["width"] // 2, 1))
    return inputs


def image_inputs(seed: int) -> dict[str, Any]:
    return {"prompt": f"thing number {seed}", "num_inference_steps": 3, "seed": seed, "width": 64, "height": 64}


def as_floats(images: Any) -> np.ndarray:
    """What a pipeline gave, before it becomes bytes, as diffusers' own ``np``."""
    return np.moveaxis(images.numpy(), -3, -1) if isinstance(images, torch.Tensor) else np.asarray(images)


class Films:
    """The models, an engine, and diffusers beside it."""

    def __init__(self, root: Path, engine: Engine) -> None:
        self.root, self.engine = root, engine
        settings = Settings.from_env({"MODELS_DIR": str(root), "RUNTIME_DOWNLOADS": "0"})
        library = Library(settings)
        self.admission = Admission(settings, library, Fetcher(settings, library, set), has_gpu=False)

    def folder(self, family: str) -> Path:
        folder = self.root / f"tiny--{family}"
        if not folder.exists():
            (save_tiny if family == "sd" else lambda to: save_video_family(family, to))(folder)
        return folder

    def request(self, family: str, inputs: dict[str, Any], **options: Any) -> GenerationRequest:
        scheduler = diffusers.DiffusionPipeline.load_config(self.folder(family))["scheduler"][1]
        options = {"MODEL_ID": f"tiny/{family}", "SCHEDULER": scheduler, **options}
        return asyncio.run(self.admission.admit("test", inputs, options)).request

    def plain(self, family: str, inputs: dict[str, Any]) -> np.ndarray:
        """What diffusers gives when it is called plainly."""
        pipe = diffusers.DiffusionPipeline.from_pretrained(self.folder(family))
        if family == "ltx" and "image" in inputs:
            pipe = diffusers.LTXImageToVideoPipeline(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
        arguments = {name: value for name, value in inputs.items() if name != "seed"}
        if "image" in arguments:
            arguments["image"] = picture(arguments["image"])
        out = pipe(**arguments, generator=torch.Generator().manual_seed(inputs["seed"]), output_type="np")
        return np.asarray(out.images if family == "sd" else out.frames)

    def compare(self, sent: list[tuple[str, dict[str, Any]]]) -> None:
        """Run requests at once, and hold each against its plain call."""
        requests = [self.request(family, inputs) for family, inputs in sent]
        expected = [self.plain(family, inputs) for family, inputs in sent]
        found: dict[int, np.ndarray] = {}

        def run(number: int) -> None:
            found[number] = self.engine.generate(requests[number]).images

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == len(expected)
        for number, reference in enumerate(expected):
            assert found[number].shape == reference.shape
            assert np.ptp(reference) > 0.05
            assert float(np.abs(found[number] - reference).max()) <= TOLERANCE, sent[number][0]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Films]:
    before = run.to_uint8
    run.to_uint8 = as_floats  # type: ignore[assignment]
    engine = Engine(Device("cpu"), Budgets(2**40, 2**40, shared=True))
    yield Films(tmp_path_factory.mktemp("films"), engine)
    engine.close()
    run.to_uint8 = before


def company(family: str, mode: str) -> list[tuple[str, dict[str, Any]]]:
    one = [(family, video_inputs(family, 1))]
    if mode == "two videos":
        return [*one, (family, video_inputs(family, 2))]
    return one + [("sd", image_inputs(seed)) for seed in range(IMAGES)] if mode == "four images" else one


def test_every_family_is_in_the_matrix() -> None:
    assert set(PIPELINES) == set(MAKERS) == set(CALLS)


@pytest.mark.parametrize("mode", MODES)
def test_wan_equals_the_plain_call(films: Films, mode: str) -> None:
    films.compare(company("wan", mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [family for family in MAKERS if family != "wan"])
def test_the_matrix_equals_the_plain_calls(films: Films, family: str, mode: str) -> None:
    assert films.request(family, video_inputs(family, 1)).pipeline == PIPELINES[family]
    films.compare(company(family, mode))


@pytest.mark.slow
def test_a_picture_makes_ltx_begin_with_it(films: Films) -> None:
    inputs = video_inputs("ltx", 1, with_image=True)
    assert films.request("ltx", inputs).pipeline == "LTXImageToVideoPipeline"
    films.compare([("ltx", inputs), ("ltx", video_inputs("ltx", 2)), ("ltx", video_inputs("ltx", 3, with_image=True))])


@pytest.mark.slow
def test_tiles_of_a_video_are_those_of_diffusers(films: Films) -> None:
    inputs = {**video_inputs("wan", 1), "width": 288, "height": 272}
    request = films.request("wan", inputs, low_vram=True)
    done = films.engine.generate(request)
    assert done.meta["placement"] == "tiled" and done.meta["numerics"].endswith("/tiled")
    pipe = diffusers.WanPipeline.from_pretrained(films.folder("wan"))
    pipe.vae.enable_tiling()
    arguments = {name: value for name, value in inputs.items() if name != "seed"}
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(1), output_type="np").frames
    assert float(np.abs(done.images - expected).max()) <= TOLERANCE
    assert float(np.abs(films.plain("wan", inputs) - expected).max()) > 10 * TOLERANCE


def test_what_is_said_of_a_video(films: Films) -> None:
    """The frames that came of it, not those that were asked for: Wan makes one more than a multiple of four."""
    request = films.request("wan", {**video_inputs("wan", 1), "num_frames": 7})
    assert request.video is not None
    assert (request.video.fps, request.video.frames, request.image_format) == (16, 7, "MP4")
    done = films.engine.generate(request)
    assert (done.meta["frames"], done.meta["size"]) == (5, [32, 16])
    assert done.images.shape == (1, 5, 16, 32, 3)


def test_an_unknown_family_is_no_reason_to_wait(films: Films) -> None:
    with pytest.raises(ApiError) as caught:
        films.request("wan", video_inputs("wan", 1), PIPELINE="WanVACEPipeline")
    assert (caught.value.code, caught.value.field) == ("PIPELINE_NOT_SUPPORTED", "callInputs.PIPELINE")


def test_an_image_does_not_wait_for_a_video(films: Films, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in calls: from the moment that a call of the image's is in line, the video gets very few."""
    executor = films.engine.executor
    film = films.request("wan", {**video_inputs("wan", 1), "num_inference_steps": 80})
    image = films.request("sd", image_inputs(1))
    films.engine.generate(image)  # its model is in memory from now on
    of_the_film = ("WanTransformer3DModel", "UMT5EncoderModel", "AutoencoderKLWan")
    made, behind, over = [0], list[int](), list[str]()

    class Line(list[Any]):
        """The calls that wait; only the executor adds to them, under its lock."""

        def append(self, call: Any) -> None:
            call.ticket.made_before = made[0]
            super().append(call)

    make = executor._runs.make

    def noted(batch: Any) -> None:
        for call in batch:
            if call.owner in of_the_film:
                made[0] += 1
            else:
                behind.append(made[0] - call.ticket.made_before)
        make(batch)

    monkeypatch.setattr(executor, "_calls", Line())
    monkeypatch.setattr(executor._runs, "make", noted)
    begun = threading.Event()

    def run_film() -> None:
        films.engine.generate(film, on_step=lambda step, total: begun.set() if step > 30 else None)
        over.append("film")

    thread = threading.Thread(target=run_film)
    thread.start()
    assert begun.wait(120)
    films.engine.generate(image)
    over.append("image")
    thread.join()
    assert over == ["image", "film"]
    assert made[0] > 160  # two for each step
    assert len(behind) >= 4
    assert max(behind) <= 3, behind
