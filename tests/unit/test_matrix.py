"""Families × tasks × alone, a batch, in company: what a request gives is what diffusers gives when it is called plainly.

Requests go through admission and the engine, as they would from the wire; only the last step, floats to bytes, is left
out. What is computed in float32 may differ by ``TOLERANCE``, a twentieth of a level of 255: sums in another order, where
calls are merged or other threads add them up.
"""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from api.engine import run
from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.models.library import Library
from api.schema.generation import GenerationRequest
from api.service.admission import Admission
from api.service.fetcher import Fetcher
from api.settings import Settings
from tests.families import FAMILIES, save_family
from tests.running import as_base64

TOLERANCE = 2e-4
WIDER = {"kandinsky": 1e-3, "kandinsky-inpaint": 1e-3}
"""Its decoder predicts a variance, which is exponentiated: with random weights that makes more of a difference."""
SIDE = 64
STEPS = 3

PIPELINES = {
    "sd": {"txt2img": "StableDiffusion", "img2img": "StableDiffusionImg2Img", "inpaint": "StableDiffusionInpaint"},
    "sd-instruct": {"img2img": "StableDiffusionInstructPix2Pix"},
    "sd-upscale": {"img2img": "StableDiffusionUpscale"},
    "sdxl": {
        "txt2img": "StableDiffusionXL", "img2img": "StableDiffusionXLImg2Img", "inpaint": "StableDiffusionXLInpaint",
    },
    "kolors": {"txt2img": "Kolors", "img2img": "KolorsImg2Img"},
    "sd3": {"txt2img": "StableDiffusion3", "img2img": "StableDiffusion3Img2Img", "inpaint": "StableDiffusion3Inpaint"},
    "flux": {"txt2img": "Flux", "img2img": "FluxImg2Img", "inpaint": "FluxInpaint"},
    "pixart": {"txt2img": "PixArtSigma"},
    "kandinsky": {"txt2img": "KandinskyV22Combined", "img2img": "KandinskyV22Img2ImgCombined"},
    "kandinsky-inpaint": {"inpaint": "KandinskyV22InpaintCombined"},
    "z-image": {"txt2img": "ZImage", "img2img": "ZImageImg2Img", "inpaint": "ZImageInpaint"},
    "flux2-klein": {"txt2img": "Flux2Klein", "img2img": "Flux2Klein", "inpaint": "Flux2KleinInpaint"},
}  # fmt: skip
"""What diffusers calls the pipeline of a family for a task."""
MORE: dict[str, dict[str, Any]] = {
    "kolors": {"max_sequence_length": 32},
    "sd3": {"max_sequence_length": 16},
    "flux": {"max_sequence_length": 16},
    "pixart": {"max_sequence_length": 16, "use_resolution_binning": False},
    "kandinsky": {"prior_num_inference_steps": 2},
    "kandinsky-inpaint": {"prior_num_inference_steps": 2},
    "z-image": {"max_sequence_length": 32},
    "flux2-klein": {"max_sequence_length": 32, "text_encoder_out_layers": [1]},
}
WITHOUT_STRENGTH = ("kandinsky-inpaint", "flux2-klein", "sd-instruct", "sd-upscale")
CASES = [(family, task) for family, tasks in PIPELINES.items() for task in tasks]
QUICK = [("sd", "inpaint"), ("sd-instruct", "img2img"), ("kandinsky", "txt2img"), ("z-image", "txt2img")]
MODES = ("alone", "batch", "company")


def drawing(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def mask() -> np.ndarray:
    half = np.zeros((SIDE, SIDE, 3), np.uint8)
    half[:, SIDE // 2 :] = 255
    return half


def model_inputs(family: str, task: str, seed: int, images: int) -> dict[str, Any]:
    """A request's, with pictures in base64."""
    inputs: dict[str, Any] = {
        "prompt": f"a drawing of thing number {seed}", "num_inference_steps": STEPS, "seed": seed, "width": SIDE,
        "height": SIDE, "num_images_per_prompt": images, "guidance_scale": 4.0 + seed % 3, **MORE.get(family, {}),
    }  # fmt: skip
    if task == "img2img" and family in ("sd", "sdxl", "kolors", "sd-instruct", "sd-upscale"):
        del inputs["width"], inputs["height"]  # they take the picture's
    if task != "txt2img":
        inputs["image"] = as_base64(drawing(seed))
    if task == "inpaint":
        inputs["mask_image"] = as_base64(mask())
    if task != "txt2img" and family not in WITHOUT_STRENGTH:
        inputs["strength"] = 0.7
    return inputs


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


class Matrix:
    """The models, an engine, and diffusers beside it."""

    def __init__(self, root: Path, engine: Engine) -> None:
        self.root = root
        self.engine = engine
        settings = Settings.from_env({"MODELS_DIR": str(root), "RUNTIME_DOWNLOADS": "0"})
        library = Library(settings)
        self.admission = Admission(settings, library, Fetcher(settings, library, set), has_gpu=False)
        self._plain: dict[str, Any] = {}
        self.worst: dict[tuple[str, str, str], float] = {}

    def request(self, family: str, task: str, inputs: dict[str, Any]) -> GenerationRequest:
        folder = self.root / f"tiny--{family}"
        if not folder.exists():
            save_family(family, folder)
        scheduler = diffusers.DiffusionPipeline.load_config(folder)["scheduler"][1]
        options = {"MODEL_ID": f"tiny/{family}", "SCHEDULER": scheduler}
        request = asyncio.run(self.admission.admit("test", inputs, options)).request
        # Auto pipelines choose by what the request holds
        assert request.pipeline == f"{PIPELINES[family][task]}Pipeline"
        return request

    def plain(self, family: str, task: str, inputs: dict[str, Any]) -> np.ndarray:
        """What diffusers gives when it is called plainly."""
        if family not in self._plain:
            self._plain[family] = diffusers.DiffusionPipeline.from_pretrained(self.root / f"tiny--{family}")
        pipe = self._plain[family]
        pipe = getattr(diffusers, f"{PIPELINES[family][task]}Pipeline").from_pipe(pipe)
        pipe.set_progress_bar_config(disable=True)
        arguments = {name: value for name, value in inputs.items() if name != "seed"}
        for name, mode in (("image", "RGB"), ("mask_image", "L")):
            if isinstance(arguments.get(name), list):
                arguments[name] = [picture(one).convert(mode) for one in arguments[name]]
            elif name in arguments:
                arguments[name] = picture(arguments[name]).convert(mode)
        generator = torch.Generator().manual_seed(inputs["seed"])
        return np.asarray(pipe(**arguments, generator=generator, output_type="np").images)

    def compare(self, family: str, task: str, mode: str, **more: Any) -> None:
        seeds, images = (range(4) if mode == "company" else range(1)), 3 if mode == "batch" else 1
        sent = [{**model_inputs(family, task, seed, images), **more} for seed in seeds]
        requests = [self.request(family, task, inputs) for inputs in sent]
        expected = [self.plain(family, task, inputs) for inputs in sent]
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
            assert len(reference) == images
            assert np.ptp(reference) > 0.05  # a grey picture equals many
            difference = float(np.abs(found[number] - reference).max())
            key = family, task, mode
            self.worst[key] = max(self.worst.get(key, 0.0), difference)
            assert difference <= WIDER.get(family, TOLERANCE), key
        if mode == "company":
            assert all(np.abs(expected[0] - other).max() > 1000 * TOLERANCE for other in expected[1:])
        if mode == "batch":
            assert np.abs(expected[0][0] - expected[0][1]).max() > 1000 * TOLERANCE


def as_floats(images: Any) -> np.ndarray:
    """What a pipeline gave, before it becomes bytes, as diffusers' own ``np``."""
    return images.permute(0, 2, 3, 1).numpy() if isinstance(images, torch.Tensor) else np.asarray(images)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    before = run.to_uint8
    run.to_uint8 = as_floats  # type: ignore[assignment]
    engine = Engine(Device("cpu"), Budgets(2**40, 2**40, shared=True))
    found = Matrix(tmp_path_factory.mktemp("families"), engine)
    yield found
    engine.close()
    run.to_uint8 = before
    if found.worst:
        print(f"\n{len(found.worst)} cells, largest differences:")
        for family in PIPELINES:
            print(f"{family}: {max((v for key, v in found.worst.items() if key[0] == family), default=0.0):.1e}")


def test_every_family_is_in_the_matrix() -> None:
    assert set(PIPELINES) == set(FAMILIES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "task"), QUICK)
def test_a_slice_equals_the_plain_call(matrix: Matrix, family: str, task: str, mode: str) -> None:
    matrix.compare(family, task, mode)


def test_several_pictures_under_one_name(matrix: Matrix) -> None:
    """FLUX.2 takes each for a reference."""
    pictures = [as_base64(drawing(number)) for number in (1, 2)]
    matrix.compare("flux2-klein", "img2img", "alone", image=pictures)
    matrix.compare("flux2-klein", "img2img", "company", image=pictures)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "task"), CASES)
def test_the_matrix_equals_the_plain_calls(matrix: Matrix, family: str, task: str, mode: str) -> None:
    matrix.compare(family, task, mode)
