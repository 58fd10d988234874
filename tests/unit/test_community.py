"""Community pipelines: fetched by name in the installed version, told apart without running them, and run when allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from api.engine.community import community_class
from api.errors import ApiError
from api.models.community import MIRROR, community, is_community
from api.models.library import Library
from api.schema.catalogue import catalogue
from api.schema.generation import Code
from api.service.admission import Admission
from api.service.fetcher import Fetcher
from api.settings import Settings
from tests.hub import HubStandIn
from tests.running import Server, as_base64, images_of, running
from tests.sources import TOKEN, environ

NEGATIVE = '''
from typing import List, Optional, Union

import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import PipelineImageInput

raise_nothing = open({ran!r}, "a").write("ran ")


class NegativePipeline(StableDiffusionPipeline):
    """Gives the negative of what its base gives."""

    def text2img(
        self,
        prompt: Union[str, List[str]],
        width: int = 64,
        height: Optional[int] = 64,
        num_inference_steps: int = 2,
        shade: float = 1.0,
        generator: Optional[torch.Generator] = None,
        output_type: str = "pil",
        **kwargs,
    ):
        out = self(
            prompt=prompt, width=width, height=height, num_inference_steps=num_inference_steps, generator=generator,
            output_type=output_type,
        )
        out.images = shade - out.images
        return out

    def img2img(self, image: PipelineImageInput, prompt: str, latents: torch.Tensor = None):
        raise ValueError("not here")

    def save_everything(self, path: str = "/"):
        raise AssertionError
'''

FILES = {
    "two_at_once.py": "class APipeline(DiffusionPipeline): ...\nclass BPipeline(DiffusionPipeline): ...",
    "no_python.py": "class Broken(DiffusionPipeline:",
    "no_pipeline.py": "print('hello')",
    "for_flux.py": (
        "class MyPipeline(DiffusionPipeline):\n"
        "    def __init__(self, transformer: X, vae, text_encoder, tokenizer, scheduler, scale: float = 1.0): ...\n"
        "    def __call__(self, prompt: str | list[str], image: 'PIL.Image.Image' = None, *, steps: int = 3): ...\n"
    ),
    "needs_more.py": (
        "import no_such_module_anywhere\nclass MorePipeline(StableDiffusionPipeline):\n"
        "    def __call__(self, prompt: str): ...\n"
    ),
}


class Case:
    """A hub with the mirror, and servers of which one allows code."""

    def __init__(self, hub: HubStandIn, ran: Path, root: Path, models_dir: Path) -> None:
        self.hub, self.ran = hub, ran
        common = {"MODELS_DIR": str(root), "HF_ENDPOINT": hub.url, "LOCAL_MODELS": str(models_dir)}
        self.allowed = Settings.from_env({**common, "ALLOW_REMOTE_CODE": "1"})
        self.refused = Settings.from_env(common)


@pytest.fixture
def case(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    ran = tmp_path / "ran"
    for version in (f"v{catalogue().diffusers}", "v0.1.0"):
        folder = tmp_path / "mirror" / version
        folder.mkdir(parents=True)
        (folder / "negative.py").write_text(NEGATIVE.format(ran=str(ran)))
        for name, text in FILES.items():
            (folder / name).write_text(text)
    (tmp_path / "mirror" / "v0.1.0" / "only_old.py").write_text("")
    with HubStandIn({MIRROR: {"main": tmp_path / "mirror"}}, tokens={TOKEN: []}) as hub:
        yield Case(hub, ran, tmp_path / "volume", models_dir)


def refusal(name: str, settings: Settings) -> ApiError:
    with pytest.raises(ApiError) as error:
        community(name, settings)
    assert error.value.field == "callInputs.PIPELINE"
    return error.value


def test_nothing_is_fetched_where_code_is_not_allowed(case: Case) -> None:
    error = refusal("negative", case.refused)
    assert (error.code, error.status) == ("REMOTE_CODE_NOT_ALLOWED", 403)
    assert "ALLOW_REMOTE_CODE=1" in error.message
    assert not case.hub.log


def test_what_it_takes_is_read_and_not_run(case: Case) -> None:
    found = community("negative", case.allowed)
    assert not case.ran.exists()
    assert found.code.class_name == "NegativePipeline"
    assert set(found.methods) == {"__call__", "text2img", "img2img"}
    assert found.methods["__call__"] == catalogue().pipelines["StableDiffusionPipeline"]
    inputs = {name: (spec.types, spec.default) for name, spec in found.methods["text2img"].items()}
    assert inputs == {
        "prompt": (("string", "strings"), None),
        "width": (("integer",), 64),
        "height": (("integer",), 64),
        "num_inference_steps": (("integer",), 2),
        "shade": (("number",), 1.0),
    }
    assert found.methods["img2img"].keys() == {"image", "prompt"}
    assert found.methods["img2img"]["image"].required
    # pinned to the installed version, fetched once
    path = f"/datasets/{MIRROR}/resolve/main/v{diffusers.__version__}/negative.py"
    assert {request.path for request in case.hub.log} == {path}
    asked = len(case.hub.log)
    assert community("negative", case.allowed) == found
    assert len(case.hub.log) == asked


def test_what_a_class_of_its_own_takes(case: Case) -> None:
    found = community("for_flux", case.allowed)
    assert set(found.build.required) == {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert {name: spec.types for name, spec in found.methods["__call__"].items()} == {
        "prompt": ("string", "strings"),
        "image": ("image",),
        "steps": ("integer",),
    }


@pytest.mark.parametrize(
    ("name", "code", "why"),
    [
        ("only_old", "NO_SUCH_PIPELINE", "nor a community pipeline"),
        ("../secret", "NO_SUCH_PIPELINE", "nor a community pipeline"),
        ("Capital", "NO_SUCH_PIPELINE", "nor a community pipeline"),
        ("two_at_once", "PIPELINE_NOT_SUPPORTED", "holds 2 pipelines"),
        ("no_pipeline", "PIPELINE_NOT_SUPPORTED", "holds 0 pipelines"),
        ("no_python", "PIPELINE_NOT_SUPPORTED", "is no Python"),
    ],
)
def test_what_is_none_is_told(case: Case, name: str, code: str, why: str) -> None:
    error = refusal(name, case.allowed)
    assert error.code == code
    assert why.removeprefix("nor ") in error.message


def test_names_of_classes_are_none_of_the_mirrors() -> None:
    assert not any(map(is_community, [*catalogue().pipeline_names, "ALL", "", "org/name", "a.b"]))


def admit(settings: Settings, model_inputs: dict[str, Any], **call_inputs: Any) -> Any:
    library = Library(settings)
    admission = Admission(settings, library, Fetcher(settings, library, set), has_gpu=False)
    return asyncio.run(admission.admit("test", model_inputs, {"MODEL_ID": "tiny/a", **call_inputs})).request


def test_requests_are_checked_against_the_method_that_they_name(case: Case) -> None:
    request = admit(case.allowed, {"prompt": "x"}, PIPELINE="negative", custom_pipeline_method="text2img")
    assert (request.pipeline, request.method) == ("NegativePipeline", "text2img")
    assert isinstance(request.code, Code)
    assert request.meta["PIPELINE"] == "negative"
    assert request.meta["custom_pipeline_method"] == "text2img"
    assert request.meta["pipeline_code"] == f"sha256:{request.code.sha256}"
    assert "guidance_scale" not in request.inputs
    assert admit(case.allowed, {"prompt": "x"}, PIPELINE="negative").method == "__call__"
    picture = as_base64(np.zeros((64, 64, 3), np.uint8))
    for model_inputs, call_inputs, code in (
        ({"prompt": "x", "eta": 0.5}, {"PIPELINE": "negative", "custom_pipeline_method": "text2img"}, "UNKNOWN_INPUT"),
        ({"prompt": "x"}, {"PIPELINE": "negative", "custom_pipeline_method": "img2img"}, "MISSING_INPUT"),
        ({"prompt": "x"}, {"PIPELINE": "negative", "custom_pipeline_method": "save_everything"}, "INVALID_INPUTS"),
        ({"prompt": "x"}, {"PIPELINE": "negative", "custom_pipeline_method": "__init__"}, "INVALID_INPUTS"),
        ({"prompt": "x"}, {"custom_pipeline_method": "enable_vae_tiling"}, "INVALID_INPUTS"),
        ({"prompt": "x", "image": picture}, {"PIPELINE": "for_flux"}, "PIPELINE_NOT_SUPPORTED"),
    ):
        with pytest.raises(ApiError) as error:
            admit(case.allowed, model_inputs, **call_inputs)
        assert error.value.code == code, call_inputs
    assert not case.ran.exists()


@pytest.fixture
def allowing(case: Case, tmp_path: Path, models_dir: Path) -> Iterator[Server]:
    settings = environ(tmp_path / "volume", hub=case.hub) | {"ALLOW_REMOTE_CODE": "1", "LOCAL_MODELS": str(models_dir)}
    with running(settings, tmp_path / "server.log") as server:
        yield server


def test_it_is_run(case: Case, allowing: Server, models_dir: Path) -> None:
    inputs = {"prompt": "a circle", "seed": 5, "width": 64, "height": 64, "num_inference_steps": 2}
    plain = {"MODEL_ID": "tiny/a", "PIPELINE": "StableDiffusionPipeline"}
    named = {"MODEL_ID": "tiny/a", "PIPELINE": "negative", "custom_pipeline_method": "text2img"}
    for _ in range(2):
        (ours,) = images_of(allowing.post(inputs, named).raise_for_status().json())
    (theirs,) = images_of(allowing.post(inputs, plain).raise_for_status().json())
    assert np.abs(ours.astype(int) - (255 - theirs.astype(int))).max() <= 1
    assert case.ran.read_text() == "ran "  # once in the worker, and never in the server
    (same,) = images_of(allowing.post(inputs, {**named, "custom_pipeline_method": ""}).raise_for_status().json())
    assert np.array_equal(same, theirs)
    query = {"PIPELINE": "negative", "custom_pipeline_method": "text2img"}
    schema = allowing.client.get("/models/tiny/a/schema", params=query).raise_for_status().json()["modelInputs"]
    assert schema["properties"]["shade"] == {"type": "number", "default": 1.0}
    answer = allowing.post({"prompt": "x"}, {"MODEL_ID": "tiny/a", "PIPELINE": "needs_more"})
    assert (answer.status_code, answer.json()["$error"]["code"]) == (422, "PIPELINE_NOT_SUPPORTED")
    assert "no_such_module_anywhere" in answer.json()["$error"]["message"]


def test_code_that_was_changed_since_is_not_run(case: Case) -> None:
    code = community("negative", case.allowed).code
    Path(code.path).write_text("raise SystemExit")
    with pytest.raises(ApiError, match="was changed since the request was admitted"):
        community_class(code)
