"""What a model can be run as: its own pipeline, and every other that is built from the same components."""

from __future__ import annotations

from collections.abc import Set

from api.models.description import InstalledModel
from api.schema.catalogue import Build, catalogue
from api.service import videos

_SPARE = frozenset({"safety_checker", "feature_extractor", "image_encoder", "controlnet", "adapter"})
"""Parts of a model that another pipeline may leave unused."""
_PLAIN = (
    "StableDiffusion", "LatentConsistency", "SemanticStableDiffusion", "CycleDiffusion", "PaintByExample", "Flux",
    "CogView4", "KandinskyCombined", "KandinskyImg2Img", "KandinskyInpaint", "KandinskyV22",
)  # fmt: skip
"""Families whose plain denoisers give as many channels as they take."""
_BESIDE = frozenset(
    {
        "CogView4ControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlPipeline",
        "FluxFillPipeline",
        "KandinskyInpaintCombinedPipeline",
        "KandinskyV22InpaintCombinedPipeline",
        "PaintByExamplePipeline",
        "StableDiffusionDepth2ImgPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionLatentUpscalePipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
    }
)
"""Pipelines that give the denoiser a picture beside the latents."""


def pipelines_of(model: InstalledModel) -> list[str]:
    """Every class that a model can be run as, its own first."""
    found = [name for name in catalogue().pipelines if misfit(model, name) is None]
    return sorted(found, key=lambda name: (name != model.class_name, name))


def misfit(model: InstalledModel, name: str, given: Set[str] = frozenset()) -> str | None:
    """Why a model cannot be run as a pipeline, in a sentence; None where it can.

    Args:
        model: what its configuration says of it.
        name: a pipeline class.
        given: components that the request brings, such as ``controlnet``.
    """
    known = catalogue()
    if name in known.refused:
        return known.refused[name]
    if name not in known.builds:
        return f"diffusers {known.diffusers} has no such pipeline."
    if reason := videos.misfit(model, name):
        return reason
    if name == model.class_name:
        return None
    build = known.builds[name]
    if name in known.controlnets and unbuildable(model, build, given) and not unbuildable(model, build, {"controlnet"}):
        return "It needs ControlNets, which the request has to name: callInputs.controlnets."
    return unbuildable(model, build, given) or _wrong_channels(model, name)


def unbuildable(model: InstalledModel, build: Build, given: Set[str] = frozenset()) -> str | None:
    """Why a pipeline cannot be built from a model's components, in a sentence; None where it can.

    Args:
        model: what its configuration says of it.
        build: what the pipeline is built from.
        given: components that the request brings.
    """
    own = catalogue().builds.get(model.class_name, Build({}))
    lacking = [part for part in build.required if not _has(model, build, own, part) and part not in given]
    if lacking and set(lacking) <= set(build.needs):
        return f"Its {lacking[0]} cannot be named in a request: it is run with models that were saved with one."
    if absent := [part for part in lacking if not model.parts.get(part)]:
        return f"It needs {', '.join(absent)}, which this model lacks."
    if lacking:
        return f"It needs {', '.join(lacking)} of other classes than this model has."
    if left := _left_out(model, build, own):
        return f"It does not use this model's {', '.join(left)}."
    return None


def _has(model: InstalledModel, build: Build, own: Build, part: str) -> bool:
    if part not in model.parts:
        return False
    found = model.parts[part]
    if not found:
        return part in build.nullable
    classes = build.required[part]
    # a model may hold another class than its own pipeline is written for, where that has the same methods
    return not classes or found in classes or classes == own.required.get(part)


def _left_out(model: InstalledModel, build: Build, own: Build) -> list[str]:
    """Modules that the model's own pipeline needs and another one does not take."""
    modules = [part for part, classes in own.required.items() if classes and model.parts.get(part)]
    return [part for part in modules if part not in build.accepts and part not in _SPARE]


def _wrong_channels(model: InstalledModel, name: str) -> str | None:
    if not name.startswith(_PLAIN) or not model.class_name.startswith(_PLAIN):
        return None
    if name in _BESIDE and not model.takes_picture:
        return "It gives the denoiser a picture beside the latents, and this model's denoiser takes none."
    if name not in _BESIDE and model.takes_picture and "Inpaint" not in name:
        return "This model's denoiser takes a picture beside the latents, and it gives none."
    return None
