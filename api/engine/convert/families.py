"""The bundled configurations, and which of them a checkpoint wants.

The files under ``configs/`` are written by ``scripts/make-families``, which names their sources. All
families share one vocabulary: the tokenizer's files are made from its merges when they are needed.
"""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).with_name("configs")

_UNET = "model.diffusion_model."
_CONTEXT = f"{_UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
_FIRST = f"{_UNET}input_blocks.0.0.weight"
# by the width of the text that the UNet attends to: the family, and a key of its (largest) text encoder
_BY_CONTEXT = {
    768: ("sd1", ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")),
    1024: ("sd2", ("cond_stage_model.model.",)),
    2048: ("sdxl", ("conditioner.embedders.1.model.",)),
    1280: ("sdxl-refiner", ("conditioner.embedders.0.model.",)),
}
# channels that the UNet takes in -> pipeline by family: the rest are a mask and a masked image, or an image
_BY_CHANNELS = {
    4: {},
    8: {"sd1": "StableDiffusionInstructPix2PixPipeline", "sdxl": "StableDiffusionXLInstructPix2PixPipeline"},
    9: {"sd1": "StableDiffusionInpaintPipeline", "sd2": "StableDiffusionInpaintPipeline"}
    | {"sdxl": "StableDiffusionXLInpaintPipeline"},
}
# Training steps that the original files of SD 2.0 (512, predicts noise) and SD 2.1 (768, velocity) give. Source:
# diffusers, loaders/single_file_utils.py and scripts/convert_original_stable_diffusion_to_diffusers.py.
_STEPS = {875_000: False, 110_000: True}
_NOISIEST = 999


@dataclass(frozen=True)
class Recognised:
    """What the keys and shapes of a checkpoint say.

    Attributes:
        family: one of ``api.models.conversion.FAMILIES``; ``sd2`` also where it may be ``sd2-v``.
        in_channels: of the UNet.
        pipeline: class to use instead of the family's, or None.
        velocity: it predicts velocity; None: the keys do not say.
        zero_snr: it was trained down to a signal-to-noise ratio of zero.
    """

    family: str
    in_channels: int
    pipeline: str | None
    velocity: bool | None
    zero_snr: bool


def recognise(checkpoint: Mapping[str, torch.Tensor]) -> Recognised | None:
    """The family that a checkpoint in the original layout belongs to, or None.

    ``v_pred`` and ``ztsnr`` are empty tensors that authors add to say how a model was trained.
    """
    context, first = checkpoint.get(_CONTEXT), checkpoint.get(_FIRST)
    if context is None or first is None:
        return None
    family, prefixes = _BY_CONTEXT.get(context.shape[-1], (None, ()))
    channels = first.shape[1]
    if family is None or channels not in _BY_CHANNELS:
        return None
    if not any(key.startswith(prefixes) for key in checkpoint):
        return None
    pipeline = _BY_CHANNELS[channels].get(family)
    if channels != 4 and pipeline is None:
        return None
    velocity: bool | None = "v_pred" in checkpoint
    if family == "sd2" and not velocity and channels == 4:
        step = checkpoint.get("global_step")
        velocity = _STEPS.get(int(step)) if step is not None and step.numel() == 1 else None
    return Recognised(family, channels, pipeline, velocity, "ztsnr" in checkpoint)


def predicts_velocity(unet: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor], context: int) -> bool:
    """Whether a UNet predicts velocity rather than noise, from one call.

    At the noisiest step the input is noise, so that a model that predicts noise returns it: its output
    has a slope of 1 over its input. Velocity (alpha * noise - sigma * image, with alpha 0.07) has hardly
    any. Source of the definition: Salimans and Ho, arXiv 2202.00512.

    Args:
        unet: called with latents, the step, and the text's states.
        context: width of the text's states.
    """
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    out = unet(noise, _NOISIEST, torch.zeros(1, 77, context)).float()
    slope = float((out * noise).mean() / (noise * noise).mean())
    return slope < 0.5


def lay_out(family: str, folder: Path) -> dict[str, Any]:
    """Write a family's configuration into a folder, but for ``model_index.json``, which is returned."""
    source = CONFIGS / family
    for path in sorted(source.rglob("*.json")):
        if path.parent != source:
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    for tokenizer in sorted(folder.glob("tokenizer*")):
        write_vocabulary(tokenizer)
    index: dict[str, Any] = json.loads((source / "model_index.json").read_text())
    return index


def write_vocabulary(folder: Path) -> None:
    """Write ``merges.txt`` and ``vocab.json`` of CLIP's byte-pair encoding.

    The vocabulary follows from the merges: the 256 bytes as characters, the same at the end of a word,
    what each merge makes, and the two marks. Source: Radford et al., https://github.com/openai/CLIP.
    """
    text = lzma.decompress((CONFIGS / "merges.txt.xz").read_bytes()).decode()
    merges = text.splitlines()[1:]
    letters = list(_byte_letters())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")


def _byte_letters() -> str:
    """A visible character for each byte, in the vocabulary's order: printable ones first, as themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return "".join(map(chr, printable)) + "".join(chr(256 + number) for number, _ in enumerate(others))
