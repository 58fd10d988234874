"""Textual inversions: words that a text encoder was never taught, for the jobs that ask for them.

Each needs a row of the encoder's table for each of its vectors, and a token of its own in the tokenizer. The table is
not copied: a clone of the encoder looks up what is beyond its end elsewhere.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from api.engine.tokenizers import taking_turns
from api.errors import ApiError
from api.schema.generation import Inversion

FIELD = "callInputs.textual_inversions"

_ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
"""Whose vectors are saved under a name of their own: files for SDXL."""
_ROWS = "_inverted_rows"

Vectors = dict[str, tuple[list[str], torch.Tensor]]
"""By the name of the text encoder: tokens, and a row for each."""


def read_inversions(inversions: Sequence[Inversion], pipeline: type, components: Mapping[str, Any]) -> Vectors:
    """Read files, and find the text encoders that they are for.

    Args:
        inversions: which.
        pipeline: a diffusers pipeline class.
        components: of the model.

    Raises:
        ApiError: NOT_SUPPORTED: the pipeline takes none; INVALID_ADAPTER, INVALID_INPUTS: a token that is a word
            already.
    """
    if inversions and not hasattr(pipeline, "maybe_convert_prompt"):
        message = f"{pipeline.__name__} takes no textual inversions: diffusers cannot load any for it."
        raise ApiError("NOT_SUPPORTED", message, field=FIELD)
    widths = {name: width for name in dict.fromkeys(_ENCODERS.values()) if (width := _width(components, name))}
    found: dict[str, tuple[list[str], list[torch.Tensor]]] = {}
    for inversion in inversions:
        for name, rows in _read(inversion, widths).items():
            tokens, all_rows = found.setdefault(name, ([], []))
            tokens += [inversion.token] + [f"{inversion.token}_{number}" for number in range(1, len(rows))]
            all_rows.append(rows)
    for name, (tokens, _) in found.items():
        _check_new(components[tokenizer_of(name)], tokens)
    return {name: (tokens, torch.cat(rows)) for name, (tokens, rows) in found.items()}


def tokenizer_of(encoder: str) -> str:
    """The name of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")


def with_tokens(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """A tokenizer of its own that knows more tokens; the shared one is not changed.

    Args:
        tokenizer: of a model: one that jobs take turns at.
        tokens: get the next ids.
    """
    with tokenizer.turn:
        own = copy.deepcopy(tokenizer)
    own.__class__ = type(tokenizer).__mro__[1]
    own.add_tokens(list(tokens))
    return taking_turns({"": own})[""]


def put_rows(encoder: nn.Module, first: int, rows: torch.Tensor) -> None:
    """Have a text encoder, a clone, look up tokens from an id on elsewhere.

    Args:
        encoder: whose table of embeddings is others' as well.
        first: id of the first of the tokens.
        rows: (tokens, width), on the device.
    """
    table = encoder.get_input_embeddings()
    vars(table)[_ROWS] = (first, rows)
    table.__class__ = _class_with_rows(type(table))  # type: ignore[arg-type]


@functools.cache
def _class_with_rows(cls: type[nn.Module]) -> type[nn.Module]:
    forward = cls.forward

    @functools.wraps(forward)
    def call(self: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        first, rows = vars(self)[_ROWS]
        known = forward(self, ids.clamp(max=first - 1))
        added = F.embedding((ids - first).clamp(0, len(rows) - 1), rows)
        return torch.where((ids >= first)[..., None], added.to(known.dtype), known)

    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": call})


def _width(components: Mapping[str, Any], encoder: str) -> int:
    """Of a text encoder's embeddings, where the model has it and its tokenizer."""
    part, tokenizer = components.get(encoder), components.get(tokenizer_of(encoder))
    if not isinstance(part, nn.Module) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return 0
    return int(part.get_input_embeddings().weight.shape[1])


def _read(inversion: Inversion, widths: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The rows for each text encoder."""
    try:
        with safe_open(inversion.path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as fault:
        raise _invalid(inversion, f"cannot be read: {str(fault)[:200]}") from fault
    found: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor[None] if tensor.dim() == 1 else tensor
        if tensor.dim() != 2:
            continue
        meant = [_ENCODERS[key]] if key in _ENCODERS else list(widths)
        for encoder in meant:
            if widths.get(encoder) == tensor.shape[1]:
                found.setdefault(encoder, tensor)
    if not found:
        has = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in list(tensors.items())[:3])
        takes = " and ".join(map(str, widths.values())) or "none"
        raise _invalid(inversion, f"does not fit this model: it holds {has}, the text encoders take vectors of {takes}")
    return found


def _check_new(tokenizer: Any, tokens: Sequence[str]) -> None:
    with tokenizer.turn:
        words = tokenizer.get_vocab()
    for token in tokens:
        if token in words or tokens.count(token) > 1:
            message = f'"{token}" stands for something already; give another word with #token=.'
            raise ApiError("INVALID_INPUTS", message, field=FIELD, requested=token)


def _invalid(inversion: Inversion, problem: str) -> ApiError:
    message = f"{inversion.name} {problem}. Use an embedding that was trained for this model's family."
    return ApiError("INVALID_ADAPTER", message, field=FIELD, requested=inversion.name)
