"""A single-file checkpoint, as a diffusers folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from api.engine.convert import components, families, original
from api.engine.convert.reading import read_tensors
from api.engine.convert.writing import bytes_of, write
from api.errors import ApiError
from api.models.conversion import FAMILIES
from api.models.manifest import is_safe_path

_FIELD = "callInputs.CHECKPOINT_URL"
_CONFIG_FIELD = "callInputs.CHECKPOINT_CONFIG_URL"
_OTHERWISE = (
    f"Set callInputs.CHECKPOINT_CONFIG_URL to one of {', '.join(FAMILIES)}, or to a diffusers model or an original "
    ".yaml with its configuration"
)
_CONFIGURATION = (".json", ".txt", ".model")
_NEVER_INSIDE = ("safety_checker", "feature_extractor", "image_encoder")
_ASK = "_predicts"
"""In a family's index while only the UNet can say whether it predicts noise or velocity."""
_SAVED_AS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Part:
    name: str
    library: str
    model: torch.nn.Module
    weights: dict[str, torch.Tensor]


def convert(checkpoint: Path, folder: Path, config: str, report: Callable[[int, int], None]) -> None:
    """Write the folder; see ``api.models.conversion.convert_checkpoint``.

    Raises:
        ApiError: MODEL_BROKEN.
        OSError: the checkpoint cannot be read, or the folder not written.
    """
    tensors = read_tensors(checkpoint, checkpoint.name, _FIELD)
    index = configuration(tensors, folder, config)
    parts = _parts(folder, index, tensors)
    if index.pop(_ASK, False) and _asked(next(part for part in parts if part.name == "unet")):
        index = families.lay_out("sd2-v", folder)
    for name in _NEVER_INSIDE:
        if name in index:
            index[name] = [None, None]
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    index["_diffusers_version"] = diffusers.__version__
    total, done = sum(bytes_of(part.weights.values()) for part in parts), 0
    report(done, total)

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    for part in parts:
        write(folder / part.name / _SAVED_AS[part.library], part.weights, wrote)
        if part.library == "transformers":
            dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in part.weights.values()}
            _update(folder / part.name / "config.json", {"dtype": sorted(dtypes)[0]})
        part.weights.clear()
    _write_json(folder / "model_index.json", index)


def configuration(tensors: Tensors, folder: Path, config: str) -> dict[str, Any]:
    """Write the configuration of every component, and return what ``model_index.json`` is to hold.

    It is another model's, or a bundled family's with what the checkpoint or the original configuration
    says otherwise.

    Args:
        tensors: of the checkpoint.
        folder: where to.
        config: the folder of a model, an original configuration, a family, or empty.

    Raises:
        ApiError: MODEL_BROKEN.
        OSError: the configuration cannot be read, or the folder not written.
    """
    if config and config not in FAMILIES and Path(config).is_dir():
        return _copied(Path(config), folder)
    found = families.recognise(tensors)
    yaml = original.read(Path(config)) if config and config not in FAMILIES else None
    if found is None and config not in FAMILIES:
        raise _not_recognised(tensors)
    family = config if config in FAMILIES else found.family if found else ""
    if yaml:
        velocity: bool | None = original.predicts_velocity(yaml)
    else:  # who names one of the two knows which
        velocity = found.velocity if found and config not in ("sd2", "sd2-v") else None
    if family == "sd2" and velocity:
        family = "sd2-v"
    index = families.lay_out(family, folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if found and found.pipeline:
        index["_class_name"] = found.pipeline
        _update(folder / "unet" / "config.json", {"in_channels": found.in_channels})
    if velocity:
        _update(scheduler, {"prediction_type": "v_prediction"})
        if found and found.zero_snr:
            _update(scheduler, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    if yaml:
        for name, settings in original.changes(Path(config), yaml, tensors).items():
            _update(folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json"), settings)
    if family == "sd2" and velocity is None and not config:
        index[_ASK] = True
    return index


def _asked(unet: _Part) -> bool:
    """Whether the UNet itself says that it predicts velocity. In bfloat16: half the memory, and exact enough."""
    unet.model.load_state_dict({key: value.to(torch.bfloat16) for key, value in unet.weights.items()}, assign=True)
    model: Any = unet.model.eval()

    def call(latents: torch.Tensor, step: int, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(latents.bfloat16(), step, states.bfloat16()).sample
        return out

    velocity = families.predicts_velocity(call, model.config.cross_attention_dim)
    model.to("meta")
    return velocity


def _parts(folder: Path, index: Mapping[str, Any], tensors: Tensors) -> list[_Part]:
    """Every component that has weights, with all of them."""
    parts = []
    for name, value in index.items():
        if name in _NEVER_INSIDE or not (isinstance(value, list) and len(value) == 2 and value[0]):
            continue
        library, class_name = value
        model = components.build(folder / name, library, class_name)
        if model is None:
            continue
        try:
            weights = components.weights(name, model, tensors)
        except ApiError as fault:
            raise ApiError(
                "MODEL_BROKEN", f"{fault.message} {_OTHERWISE}, that fits it.", field=_FIELD, available=list(FAMILIES)
            ) from fault
        parts.append(_Part(name, library, model, weights))
    if not parts:
        raise ApiError("MODEL_BROKEN", "The configuration names no component with weights.", field=_CONFIG_FIELD)
    return parts


def _copied(source: Path, folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((source / "model_index.json").read_bytes())
        assert isinstance(index["_class_name"], str)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as fault:
        raise ApiError(
            "MODEL_BROKEN", f"{source.name} has no model_index.json of a diffusers model.", field=_CONFIG_FIELD
        ) from fault
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or name in _NEVER_INSIDE:
            continue
        if not is_safe_path(name) or "/" in name:
            raise ApiError("MODEL_BROKEN", f"model_index.json names a component {name!r}.", field=_CONFIG_FIELD)
        if not (source / name).is_dir():
            continue
        (folder / name).mkdir()
        for path in sorted((source / name).iterdir()):
            if path.suffix in _CONFIGURATION and not path.name.endswith(".index.json") and path.is_file():
                shutil.copyfile(path, folder / name / path.name)
    found: dict[str, Any] = index
    return found


def _scheduler_of(family: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((families.CONFIGS / family / "scheduler" / "scheduler_config.json").read_text())
    return found


def _update(path: Path, settings: Mapping[str, Any]) -> None:
    _write_json(path, {**json.loads(path.read_text()), **settings})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
    path.chmod(0o644)


def _not_recognised(tensors: Tensors) -> ApiError:
    if any("lora" in key for key in tensors):
        what = "is a LoRA, not a whole model; name it in callInputs.lora_weights"
    else:
        keys = ", ".join(sorted(tensors)[:2])
        what = f"is none of the families that are recognised (its weights begin with {keys}). {_OTHERWISE}"
    return ApiError("MODEL_BROKEN", f"The checkpoint {what}.", field=_FIELD, available=list(FAMILIES))
