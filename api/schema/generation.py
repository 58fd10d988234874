"""What is asked for and what comes back: the validated request and its result."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import msgspec

from api.schema.flows import Handover

T = TypeVar("T")

WEIGHTS = ("full", "model", "sequential")
"""Where weights are: on the device; in the host's memory, with one part, or one block, at a time on the device."""
OFFLOADS = ("auto", "none", "model", "sequential")
"""What a client can ask of them."""

OUTPUTS = ("images", "latents", "intermediate_latents", "mask")
"""What a client can ask for; images are always there."""
EXTRAS_LIMIT = 32 * 2**20
"""Bytes of latents in one answer."""


QUANTIZED_BY = {"fp8": "torchao", "int8": "torchao", "nf4": "bitsandbytes"}
"""What weights can be quantized to, and the package that does it."""
STEP_CACHES = ("first_block", "taylorseer")
"""How steps of a denoiser can be skipped."""


class Addition(msgspec.Struct, frozen=True):
    """A part that a request adds to its model, such as a ControlNet.

    Attributes:
        name: of the component in the pipeline: ``controlnet``, the next one ``controlnet_1``; ``image_encoder``.
        revision: as ``ModelRef.revision``.
        folder: absolute path of what it was installed as.
        part: where in that folder its configuration and weights are; ``.``: in the folder itself.
    """

    name: str
    revision: str
    folder: str
    part: str = "."


class ModelRef(msgspec.Struct, frozen=True):
    """What names weights.

    Attributes:
        model_id: e.g. ``demo/shapes``.
        revision: a fingerprint of the installed files, or a commit.
        precision: ``fp32``, ``fp16`` or ``bf16``: what the weights are computed in.
        folder: absolute path of the diffusers layout on disk; of an upscaler, of its one file.
        additions: parts that are no part of it: it is another model with them, which shares its own with it.
        quantize: what its large layers are quantized to, of ``QUANTIZED_BY``: another model, which shares the rest.
    """

    model_id: str
    revision: str
    precision: str
    folder: str
    additions: tuple[Addition, ...] = ()
    quantize: str = ""

    @property
    def key(self) -> str:
        """Two refs with the same key mean the same weights in the same precision."""
        added = (f"+{part.name}={part.folder}/{part.part}@{part.revision}" for part in self.additions)
        quantized = f":{self.quantize}" if self.quantize else ""
        return "".join((f"{self.folder}@{self.revision}:{self.precision}{quantized}", *added))

    @property
    def is_upscaler(self) -> bool:
        """Whether it is no pipeline, but one file of weights that makes images larger."""
        return self.folder.endswith(".safetensors")


class IpAdapter(msgspec.Struct, frozen=True):
    """Weights that let a denoiser look at pictures.

    Attributes:
        file: absolute path, a ``.safetensors``.
        folder: absolute path of what it was installed as.
        revision: as ``ModelRef.revision``.
        scale: how much it is heard.
        pictures: how many of ``ip_adapter_image`` are its; those of the next one follow.
    """

    file: str
    folder: str
    revision: str
    scale: float
    pictures: int = 1


def for_each(adapters: Sequence[IpAdapter], pictures: Iterable[T]) -> list[list[T]]:
    """The pictures of IP-Adapters, a list for each adapter."""
    rest = iter(pictures)
    return [list(itertools.islice(rest, adapter.pictures)) for adapter in adapters]


class Picture(msgspec.Struct, frozen=True):
    """A decoded input image. ``pixels`` are ``mode``'s bytes, row by row, ``width`` x ``height``."""

    mode: str
    width: int
    height: int
    pixels: bytes
    sha256: str


Pictures: TypeAlias = dict[str, Picture | list[Picture]]
"""Input images by the name of the argument."""


_STEP = 16
"""Pipelines that paint over a picture round its sides down, to multiples of this at most."""


def each_picture(pictures: Pictures) -> Iterator[Picture]:
    """All of them, in their order."""
    for found in pictures.values():
        yield from [found] if isinstance(found, Picture) else found


def size_of(inputs: dict[str, Any], pictures: Pictures) -> tuple[int, int] | None:
    """Width and height of the images that a pipeline gives, as far as what it is asked for says them.

    Args:
        inputs: of the pipeline.
        pictures: those that it gets.
    """
    width, height, cropped = inputs.get("width"), inputs.get("height"), inputs.get("padding_mask_crop")
    if isinstance(width, int) and isinstance(height, int) and not cropped:
        return width, height
    picture = next(each_picture({"image": pictures["image"]}), None) if "image" in pictures else None
    if picture and cropped:  # what was made of the part is pasted into the whole
        return picture.width, picture.height
    if picture and (inputs.get("strength") is not None or inputs.get("denoising_start") is not None):
        return picture.width // _STEP * _STEP, picture.height // _STEP * _STEP
    return None


class Lora(msgspec.Struct, frozen=True):
    """A LoRA that a request asks for.

    Attributes:
        name: what messages call it.
        path: of its safetensors file.
        sha256: of that file, in hex.
        scale: how much of it; 0: none.
    """

    name: str
    path: str
    sha256: str
    scale: float


class Inversion(msgspec.Struct, frozen=True):
    """A textual inversion that a request asks for.

    Attributes:
        name: what messages call it.
        path: of its safetensors file.
        sha256: of that file, in hex.
        token: what stands for it in prompts.
    """

    name: str
    path: str
    sha256: str
    token: str


class Code(msgspec.Struct, frozen=True):
    """A pipeline that is not one of diffusers' own.

    Attributes:
        path: absolute, of its file.
        sha256: of what the file held when the request was admitted.
        class_name: the pipeline in it.
    """

    path: str
    sha256: str
    class_name: str


class StepCache(msgspec.Struct, frozen=True):
    """A cache of what blocks of a denoiser gave in earlier steps, which is used in place of computing it again.

    Attributes:
        kind: of ``STEP_CACHES``.
        threshold: how much may have changed, relatively, for a step to be skipped; of ``taylorseer`` every how many
            steps are computed.
    """

    kind: str
    threshold: float

    @property
    def argument(self) -> str:
        """What clients call the threshold."""
        return "interval" if self.kind == "taylorseer" else "threshold"

    @property
    def number(self) -> int | float:
        """The threshold as clients send it."""
        return int(self.threshold) if self.kind == "taylorseer" else self.threshold

    @property
    def word(self) -> str:
        """As ``$meta.numerics`` tells it."""
        return f"step_cache:{self.kind}@{self.number:g}"


class Upscale(msgspec.Struct, frozen=True):
    """What makes the images of a request larger.

    Attributes:
        model: the upscaler.
        scale: how many times wider and higher they become; None: as the upscaler makes them.
        tile: pixels of the longest side of what it is given at once.
        max_pixels: of an image that it makes.
    """

    model: ModelRef
    scale: float | None
    tile: int
    max_pixels: int


class Video(msgspec.Struct, frozen=True):
    """What is to be known of a video that is asked for.

    Attributes:
        fps: frames a second.
        frames: how many were asked for; pipelines round that to what their autoencoders can make. 0: not known.
    """

    fps: float
    frames: int


class GenerationRequest(msgspec.Struct, frozen=True):
    """The validated description of one generation. Every dialect ends in it.

    Attributes:
        id: unique to this job.
        request_id: what the client and the log know the request by.
        model: which weights.
        pipeline: a diffusers pipeline class name.
        scheduler: a diffusers scheduler class name.
        inputs: arguments for the pipeline's ``__call__``, defaults filled in, without pictures.
        pictures: image arguments by name.
        seed: one seed for all images, or one per image.
        images: how many images the request makes.
        image_format: one of ``IMAGE_FORMATS``; of a video, one of ``VIDEO_FORMATS``.
        image_quality: 1-100, for the lossy formats.
        attention: of ``attention.ATTENTIONS``: what was asked for.
        safety_checker: run the model's safety checker, where it has one.
        meta: what is already known of ``$meta``.
        preview: a small picture of each image after every so many steps; 0: about four in all; None: none.
        offload: ``auto``; ``none``: the model is held as it is, whether the request fits so or not; ``model`` or
            ``sequential``: its weights stay in the host's memory, by parts or blocks.
        low_vram: take as little of the device's memory as can be.
        scheduler_args: arguments of the scheduler's class, over the settings of the model's own.
        loras: in the order of the request.
        inversions: in the order of the request.
        prompt_syntax: how the prompts are read: ``plain``, ``compel`` or ``a1111``.
        lossless: keep every pixel when images are encoded.
        image_metadata: write ``$meta`` and A1111's text into the files.
        output: what comes beside the images, of ``OUTPUTS``.
        safety_required: images that no safety checker has seen are not given out.
        method: of the pipeline that generates; the pipeline itself is called unless the request says otherwise.
        code: where the pipeline's class is, when it is not one of diffusers' own.
        ip_adapters: what the denoiser looks at pictures through; their pictures are ``ip_adapter_image``, a list.
        takes: what it gets from the generation before it, as the argument ``image``; a picture without pixels stands in
            ``pictures`` for each.
        then: the generations that follow, each with what the one before gives; the last one's images are answered.
        quantize: what the request itself asks to have weights quantized to; empty: nothing, whatever the server does.
        step_cache: how steps are skipped, lossily; None: not at all.
        upscale: what the finished images are made larger with.
        extra: empty, or what is done to a picture in place of generating one: ``upsample``, by ``upscale``.
        video: of requests for videos; ``images`` says how many there are of these.
        compile: compiled code may be used, where the server has it.
    """

    id: str
    request_id: str
    model: ModelRef
    pipeline: str
    scheduler: str
    inputs: dict[str, Any]
    pictures: Pictures
    seed: int | list[int]
    images: int
    image_format: str
    image_quality: int
    attention: str
    safety_checker: bool
    meta: dict[str, Any]
    preview: int | None = None
    offload: str = "auto"
    low_vram: bool = False
    scheduler_args: dict[str, Any] = {}
    loras: tuple[Lora, ...] = ()
    inversions: tuple[Inversion, ...] = ()
    prompt_syntax: str = "plain"
    lossless: bool = False
    image_metadata: bool = True
    output: tuple[str, ...] = ()
    safety_required: bool = False
    method: str = "__call__"
    code: Code | None = None
    ip_adapters: tuple[IpAdapter, ...] = ()
    takes: Handover | None = None
    then: tuple[GenerationRequest, ...] = ()
    quantize: str = ""
    step_cache: StepCache | None = None
    upscale: Upscale | None = None
    extra: str = ""
    video: Video | None = None
    compile: bool = True

    @property
    def stages(self) -> tuple[GenerationRequest, ...]:
        """All of its generations, in their order."""
        return (self, *self.then)

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of its images, before an upscaler gets them, as far as it says them."""
        last = self.stages[-1]
        taken = last.takes.size if last.takes else None
        return taken or size_of(last.inputs, last.pictures)


class GenerationResult(msgspec.Struct):
    """What a generation gave.

    Attributes:
        images: encoded images, or videos; ``meta`` says which (``schema.videos.kind_of``).
        meta: everything needed to do it again.
        timings: milliseconds by phase.
        mem_usage: allocated / total memory of the device, 0 on a CPU.
        nsfw: per image, where a safety checker ran.
        extras: what was asked for beside the images: ``latents`` as safetensors, ``mask`` as PNG.
        urls: where the images are, where they were uploaded; then ``images`` is empty.
    """

    images: list[bytes]
    meta: dict[str, Any]
    timings: dict[str, int]
    mem_usage: float
    nsfw: list[bool] | None = None
    extras: dict[str, bytes] = {}
    urls: list[str] = []
