"""What a model can be run as, told by its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.errors import ApiError
from api.models.description import InstalledModel
from api.schema.catalogue import catalogue
from api.service.choices import check_early, choose_pipeline
from api.service.fitting import misfit, pipelines_of
from api.service.schedulers import choose_scheduler, suitable


def saved_as(name: str, takes_picture: bool = False, **changed: str) -> InstalledModel:
    """A model as a pipeline class would save it."""
    build = catalogue().builds[name]
    parts = {part: (classes or ("Any",))[0] for part, classes in build.required.items()}
    parts |= dict.fromkeys(build.optional, "") | changed
    return InstalledModel(
        model_id="org/name", folder=Path("/x"), revision="1", class_name=name, components=frozenset(parts),
        scheduler="EulerDiscreteScheduler", size_multiple=8, text_layers=2, default_size=64, bytes=1, parts=parts,
        takes_picture=takes_picture,
    )  # fmt: skip


SD = saved_as("StableDiffusionPipeline")
XL = saved_as("StableDiffusionXLPipeline")


def test_a_model_is_run_as_every_class_of_the_same_components() -> None:
    found = pipelines_of(SD)
    assert found[0] == "StableDiffusionPipeline"
    for kind in ("Img2Img", "Inpaint", "PAG", "PAGImg2Img", "Panorama", "SAG"):
        assert f"StableDiffusion{kind}Pipeline" in found
    assert "LatentConsistencyModelPipeline" in found
    assert not [name for name in found if "XL" in name or "3" in name or "ControlNet" in name or "Upscale" in name]
    assert {"StableDiffusionXLInpaintPipeline", "StableDiffusionXLPAGPipeline"} <= set(pipelines_of(XL))


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        (SD, "StableDiffusionXLPipeline", "text_encoder_2, tokenizer_2, which this model lacks"),
        (XL, "StableDiffusionPipeline", "does not use this model's text_encoder_2"),
        (SD, "StableDiffusionInstructPix2PixPipeline", "this model's denoiser takes none"),
        (SD, "StableDiffusionUpscalePipeline", "needs low_res_scheduler"),
        (SD, "StableDiffusionDepth2ImgPipeline", "needs depth_estimator"),
        (SD, "StableDiffusionControlNetPipeline", "has to name: callInputs.controlnets"),
        (SD, "StableDiffusionControlNetXSPipeline", "saved with one"),
        (SD, "StableDiffusionAdapterPipeline", "saved with one"),
        (
            saved_as("StableDiffusionInpaintPipeline", True, vae="AutoencoderKL"),
            "StableDiffusionPipeline",
            "takes a picture beside",
        ),
        (SD, "StableDiffusionGLIGENPipeline", "boxes"),
        (saved_as("KandinskyV22CombinedPipeline"), "KandinskyV22InpaintCombinedPipeline", "denoiser takes none"),
        (saved_as("FluxPipeline"), "FluxFillPipeline", "this model's denoiser takes none"),
        (saved_as("FluxFillPipeline", True), "FluxPipeline", "takes a picture beside"),
        (saved_as("QwenImagePipeline"), "QwenImageEditPipeline", "needs processor"),
        (saved_as("SanaPipeline"), "LuminaPipeline", "of other classes"),
        (SD, "WanPipeline", "saved as such"),
        (saved_as("LTXPipeline"), "CogVideoXPipeline", "saved as such"),
        (saved_as("CogVideoXPipeline"), "CogVideoXImageToVideoPipeline", "saved as such"),
        (saved_as("WanPipeline"), "WanImageToVideoPipeline", "ftfy"),
        (saved_as("AnimateDiffPipeline", unet="UNet2DConditionModel"), "AnimateDiffPipeline", "save it, which joins"),
        (SD, "EasyAnimatePipeline", "makes video"),
        (SD, "WanVACEPipeline", "takes a video"),
        (SD, "LTX2Pipeline", "more than pictures that move"),
        (SD, "StableAudioPipeline", "makes audio"),
        (SD, "KandinskyV22Pipeline", "image_embeds"),
        (SD, "QwenImageModularPipeline", "assembled from blocks"),
        (SD, "NoSuchPipeline", "has no such pipeline"),
    ],
)
def test_why_a_model_is_not_run_as_a_class(model: InstalledModel, name: str, why: str) -> None:
    assert why in str(misfit(model, name))


def test_what_a_request_brings_counts() -> None:
    assert misfit(SD, "StableDiffusionControlNetPipeline", {"controlnet"}) is None
    assert misfit(XL, "StableDiffusionControlNetPipeline", {"controlnet"}) is not None
    for name, entry in catalogue().controlnets.items():
        classes = {part: known[0] for part, known in catalogue().builds[name].required.items() if known}
        classes.pop("controlnet")
        assert misfit(saved_as(entry.plain, **classes), name, {"controlnet"}) is None, name
        assert entry.image in catalogue().pipelines[name]
    own = saved_as("StableDiffusionControlNetPipeline")
    assert misfit(own, "StableDiffusionControlNetPipeline") is None
    assert misfit(own, "StableDiffusionPipeline") is None


def test_another_class_in_the_same_place_is_no_obstacle_where_the_model_was_saved_with_it() -> None:
    tiny = saved_as("StableDiffusionPipeline", vae="AutoencoderTiny")
    assert misfit(tiny, "StableDiffusionImg2ImgPipeline") is None


PICTURE: dict[str, Any] = {"image": "x"}
MASK: dict[str, Any] = {"image": "x", "mask_image": "y"}


@pytest.mark.parametrize(
    ("name", "sent", "chosen"),
    [
        ("ChromaPipeline", {}, "ChromaPipeline"),
        ("ChromaPipeline", PICTURE, "ChromaImg2ImgPipeline"),
        ("ChromaPipeline", MASK, "ChromaInpaintPipeline"),
        ("ZImagePipeline", PICTURE, "ZImageImg2ImgPipeline"),
        ("QwenImagePipeline", MASK, "QwenImageInpaintPipeline"),
        ("QwenImageEditPipeline", PICTURE, "QwenImageEditPipeline"),
        ("QwenImageEditPipeline", {}, "QwenImageEditPipeline"),  # which says that it needs a picture
        ("FluxKontextPipeline", MASK, "FluxKontextInpaintPipeline"),
        ("Flux2KleinPipeline", PICTURE, "Flux2KleinPipeline"),
        ("OmniGenPipeline", {}, "OmniGenPipeline"),
        ("StableDiffusionInstructPix2PixPipeline", PICTURE, "StableDiffusionInstructPix2PixPipeline"),
        ("StableDiffusionUpscalePipeline", PICTURE, "StableDiffusionUpscalePipeline"),
        ("FluxFillPipeline", MASK, "FluxFillPipeline"),
        ("KandinskyV22CombinedPipeline", PICTURE, "KandinskyV22Img2ImgCombinedPipeline"),
        ("SanaSprintPipeline", {"init_image": "x"}, "SanaSprintImg2ImgPipeline"),
    ],
)
def test_what_the_request_holds_chooses(name: str, sent: dict[str, Any], chosen: str) -> None:
    model = saved_as(name, takes_picture=name in ("FluxFillPipeline", "StableDiffusionInstructPix2PixPipeline"))
    assert choose_pipeline({}, sent, model, "AutoPipelineForText2Image")[1] == chosen


@pytest.mark.parametrize("sent", [PICTURE, MASK])
def test_a_picture_that_no_pipeline_takes_is_refused(sent: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="PixArt") as error:
        choose_pipeline({}, sent, saved_as("PixArtSigmaPipeline"), "AutoPipelineForText2Image")
    assert error.value.code == "PIPELINE_NOT_SUPPORTED"
    assert "PixArtSigmaPipeline" in error.value.available


def test_what_is_never_run_is_told_before_a_model_is_fetched() -> None:
    with pytest.raises(ApiError, match="takes a video") as error:
        check_early({"PIPELINE": "WanVACEPipeline"}, {})
    assert error.value.code == "PIPELINE_NOT_SUPPORTED"


def test_no_input_is_a_clients_that_is_not_to_be() -> None:
    """Callbacks, tensors, and what names files of the server's."""
    names = {name for accepted in catalogue().pipelines.values() for name in accepted}
    assert not [name for name in names if name.startswith("_") or "callback" in name or name.endswith("_embeds")]
    assert not names & {"generator", "latents", "masked_image_latents", "fonts", "output_type", "video", "return_dict"}
    assert {"image", "mask_image", "control_image", "image_reference", "input_images"} <= names
    assert "images" in catalogue().pipelines["QwenImageEditPlusPipeline"]["image"].types
    assert "images" in catalogue().pipelines["Flux2Pipeline"]["image"].types


def test_every_runnable_class_can_be_chosen_for_a_model_of_its_own() -> None:
    for name in catalogue().pipelines:
        assert choose_pipeline({"PIPELINE": name}, {}, saved_as(name), "ALL") == (name, name)
        assert catalogue().tasks_of(name) or name in catalogue().videos, name


def test_the_servers_scheduler_gives_way_to_one_that_the_model_needs() -> None:
    usual = "DPMSolverMultistepScheduler"

    def chosen(name: str, scheduler: str, **more: Any) -> str:
        return choose_scheduler({}, msgspec.structs.replace(saved_as(name), scheduler=scheduler, **more), usual).name

    assert chosen("StableDiffusionPipeline", "EulerDiscreteScheduler") == usual
    assert chosen("LatentConsistencyModelPipeline", "LCMScheduler") == "LCMScheduler"
    assert chosen("KandinskyV22CombinedPipeline", "DDPMScheduler", learns_variance=True) == "DDPMScheduler"
    model = msgspec.structs.replace(
        saved_as("KandinskyV22CombinedPipeline"), scheduler="DDPMScheduler", learns_variance=True
    )
    assert "DDIMScheduler" in suitable(model)
    with pytest.raises(ApiError) as error:
        choose_scheduler({"SCHEDULER": usual}, model, usual)
    assert error.value.code == "INVALID_SCHEDULER"
