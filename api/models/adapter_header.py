"""What an adapter's file is, from its header alone: whether it fits a model is known before a worker is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from api.models.parts import config_in
from api.models.safetensors_check import MAX_HEADER

_PAIR = re.compile(r"\blora|_lora|lora_|\.lora")
_OTHERS = {"hada_w1": "a LoHa", "lokr_w1": "a LoKr", "lokr_w2": "a LoKr", "oft_blocks": "an OFT", "glora": "a GLoRA"}
_CROSS, _READS = re.compile(r"attn2[._]"), re.compile(r"to[._][kv]")
_DOWN = ("lora_A.weight", "lora_down.weight", "lora.down.weight")
_NAMED = ("emb_params", "clip_l", "clip_g", "text_encoders_0", "text_encoders_1")
"""Keys of vectors that are no token."""
_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}

_MOST_TENSORS, _LONGEST_NAME = 50_000, 500
_MOST_VECTORS = 256
"""Of one word: CLIP reads 75 at once."""

Shapes = dict[str, tuple[int, ...]]


class _Tensor(msgspec.Struct):
    shape: tuple[int, ...]


def read_shapes(path: Path, most: int = MAX_HEADER) -> Shapes:
    """The shapes of a safetensors file's tensors, by name.

    Args:
        path: of the file.
        most: bytes that its header may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file, or has more tensors or longer names than any adapter.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > most:
            raise ValueError("its header is too long")
        header = file.read(length)
    try:
        parts = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        shapes = {k: msgspec.json.decode(v, type=_Tensor).shape for k, v in parts.items() if k != "__metadata__"}
    except (msgspec.DecodeError, RecursionError) as fault:
        raise ValueError("its header is not that of a safetensors file") from fault
    if len(shapes) > _MOST_TENSORS or any(len(name) > _LONGEST_NAME for name in shapes):
        raise ValueError(f"it has more than {_MOST_TENSORS} tensors, or names of more than {_LONGEST_NAME} characters")
    return shapes


def lora_problem(shapes: Shapes, folder: Path) -> str | None:
    """Why a file is no LoRA for a model, in words; None where its header does not say so.

    Args:
        shapes: of its tensors.
        folder: of the model.
    """
    names = list(shapes)
    if not any(_PAIR.search(name) for name in names):
        for mark, what in _OTHERS.items():
            if any(mark in name for name in names):
                return f"is {what}, and only LoRAs are applied"
        if token_of(shapes) is not None or any(name in _NAMED for name in names):
            return "is a textual inversion: name it in textual_inversions"
        return f"is no LoRA: it holds {_some(names)}"
    unet = config_in(folder / "unet")
    width = unet.get("cross_attention_dim")
    if unet and not any("unet" in name or "text_encoder" in name or "lora_te" in name for name in names):
        return f"is for another family of models: it holds {_some(names)}, and this model has a UNet"
    for name in names:
        other = shapes[name][1] if len(shapes[name]) > 1 else width
        if isinstance(width, int) and other != width and _reads_text(name):
            of = f", as {_FAMILIES[other]} does" if other in _FAMILIES else ""
            return f"is for a model that reads text as vectors of {other}{of}; this model's are of {width}"
    return None


def inversion_problem(shapes: Shapes, folder: Path) -> str | None:
    """Why a file is no textual inversion for a model, in words; None where its header does not say so.

    Args:
        shapes: of its tensors.
        folder: of the model.
    """
    widths = sorted(set(_text_widths(folder)))
    vectors = {name: shape for name, shape in shapes.items() if len(shape) in (1, 2)}
    if any(_PAIR.search(name) for name in shapes):
        return "is a LoRA: name it in lora_weights"
    if not vectors:
        return f"is no textual inversion: it holds {_some(list(shapes))}"
    most = max((shape[0] for shape in vectors.values() if len(shape) == 2), default=1)
    if most > _MOST_VECTORS:
        return f"has {most} vectors for one word, and there may be {_MOST_VECTORS}"
    if widths and not any(shape[-1] in widths for shape in vectors.values()):
        has = sorted({shape[-1] for shape in vectors.values()})
        told = " and ".join(map(str, widths))
        return f"has vectors of {', '.join(map(str, has[:5]))}; this model's text encoders take {told}"
    return None


def token_of(shapes: Shapes) -> str | None:
    """The token that a file in diffusers' format names; None for others."""
    names = [name for name in shapes if name not in _NAMED]
    return names[0] if len(shapes) == 1 and names and len(shapes[names[0]]) in (1, 2) else None


def _reads_text(name: str) -> bool:
    """Whether a tensor is the half of a layer that reads the text. In steps: names are as long as strangers like."""
    cross = _CROSS.search(name) if name.endswith(_DOWN) else None
    return cross is not None and _READS.search(name, cross.end()) is not None


def _text_widths(folder: Path) -> Iterator[int]:
    for path in sorted(folder.glob("text_encoder*")):
        config = config_in(path)
        width = config.get("hidden_size") or config.get("d_model")
        if isinstance(width, int):
            yield width


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "nothing"
