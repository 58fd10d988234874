"""One component's weights, out of a checkpoint in the original layout.

Which key of the original layout is which of diffusers' is for diffusers to say: its conversions are
used. What they return is compared with the component itself, built without weights, so that nothing
is missing, left over or of another shape: a component with random weights draws noise and no error.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

from api.errors import ApiError

Tensors = Mapping[str, torch.Tensor]

_TRANSFORMERS_CLIP = (
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.",
)
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.", "conditioner.embedders.0.model.")
# In text encoders, and in no component: row numbers, which are made when it is built, and what belongs to the
# image side of CLIP. A projection is left over where the component is the plain encoder.
_LEFT_OVER = re.compile(r".*position_ids|.*logit_scale|text_projection(\.weight)?")
_SHOWN = 3


def build(folder: Path, library: str, class_name: str) -> torch.nn.Module | None:
    """A component from its configuration, on the ``meta`` device; None for what has no weights.

    Raises:
        ApiError: MODEL_BROKEN for a class that cannot be converted, or a configuration that does not fit it.
    """
    cls: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), class_name, None)
    has_weights = inspect.isclass(cls) and issubclass(cls, torch.nn.Module)
    if not has_weights:
        return None
    try:
        with torch.device("meta"):
            if library == "transformers":
                built: torch.nn.Module = cls(cls.config_class.from_pretrained(folder, local_files_only=True))
            else:
                built = cls.from_config(cls.load_config(folder, local_files_only=True))
            return built
    except Exception as fault:  # whatever an odd configuration makes the libraries raise
        raise ApiError(
            "MODEL_BROKEN", f"The configuration of {folder.name} cannot be used ({type(fault).__name__}: {fault})."
        ) from fault


def weights(name: str, model: torch.nn.Module, checkpoint: Tensors) -> dict[str, torch.Tensor]:
    """The weights of a component, named and shaped as diffusers or transformers has them.

    Args:
        name: of the component, for messages.
        model: the component as ``build`` returns it.
        checkpoint: everything that the file holds, in the original layout.

    Raises:
        ApiError: MODEL_BROKEN, with the names of what is missing, left over or of another shape.
    """
    expected = model.state_dict()
    found = _mapped(name, model, checkpoint)
    missing = [key for key in expected if found.get(key) is None]
    extra = [key for key in found if key not in expected and not _LEFT_OVER.fullmatch(key)]
    shapes = [
        f"{key} ({list(found[key].shape)} instead of {list(expected[key].shape)})"
        for key in expected
        if key not in missing and found[key].shape != expected[key].shape
    ]
    for what, keys in (("lacks", missing), ("has other shapes for", shapes), ("has no place for", extra)):
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            subject = "The configuration" if keys is extra else "The checkpoint"
            raise ApiError(
                "MODEL_BROKEN", f"{subject} {what} these weights of {name}: {', '.join(keys[:_SHOWN])}{more}."
            )
    return {key: found[key] for key in expected}


def _mapped(name: str, model: torch.nn.Module, checkpoint: Tensors) -> dict[str, torch.Tensor]:
    if isinstance(model, transformers.CLIPTextModel | transformers.CLIPTextModelWithProjection):
        return _clip(model, checkpoint)
    convert = _conversion(type(model))
    if convert is None:
        raise ApiError("MODEL_BROKEN", f"A {type(model).__name__} ({name}) cannot be read from a single file.")
    try:
        converted = convert(checkpoint=dict(checkpoint), config=dict(getattr(model, "config", {})))
    except (KeyError, AttributeError, IndexError, RuntimeError, ValueError) as fault:
        raise ApiError(
            "MODEL_BROKEN", f"The checkpoint lacks weights of {name} ({type(fault).__name__}: {fault})."
        ) from fault
    return {key: value for key, value in converted.items() if value is not None}


def _conversion(cls: type) -> Callable[..., dict[str, torch.Tensor | None]] | None:
    names = (name for name in SINGLE_FILE_LOADABLE_CLASSES if issubclass(cls, getattr(diffusers, name)))
    found = next(names, None)
    if found is None:
        return None
    convert: Callable[..., dict[str, torch.Tensor | None]] = SINGLE_FILE_LOADABLE_CLASSES[found][
        "checkpoint_mapping_fn"
    ]
    return convert


def _clip(model: Any, checkpoint: Tensors) -> dict[str, torch.Tensor]:
    width = model.config.hidden_size
    for prefix in _TRANSFORMERS_CLIP:
        for inner in ("text_model.", ""):
            position = checkpoint.get(f"{prefix}{inner}embeddings.position_embedding.weight")
            if position is not None and position.shape[-1] == width:
                own = {key: value for key, value in checkpoint.items() if key.startswith(prefix)}
                return _prefixed(model, convert_ldm_clip_checkpoint(own))
    for prefix in _OPEN_CLIP:
        position = checkpoint.get(f"{prefix}positional_embedding")
        if position is not None and position.shape[-1] == width:
            return _prefixed(model, convert_open_clip_checkpoint(model, dict(checkpoint), prefix=prefix))
    return {}


def _prefixed(model: torch.nn.Module, converted: Tensors) -> dict[str, torch.Tensor]:
    """The keys as this version of transformers has them: with ``text_model.`` or, since 5, without."""
    inner = "text_model." if any(key.startswith("text_model.") for key in model.state_dict()) else ""
    plain = {key.removeprefix("text_model."): value for key, value in converted.items()}
    return {key if key.startswith("text_projection") else inner + key: value for key, value in plain.items()}
