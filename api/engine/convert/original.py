"""Original configurations (``.yaml``) of the latent diffusion code, as changes to a bundled one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.loaders.single_file_utils import (
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
)

from api.errors import ApiError

_FIELD = "callInputs.CHECKPOINT_CONFIG_URL"
_LARGEST = 2**20


def read(path: Path) -> dict[str, Any]:
    """The configuration.

    Raises:
        ApiError: MODEL_BROKEN.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST} bytes")
        original = yaml.safe_load(path.read_text())
        parameters = original["model"]["params"]
        if not isinstance(parameters, dict):
            raise TypeError("model.params is no mapping")
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as fault:
        raise _unusable(path, fault) from fault
    found: dict[str, Any] = original
    return found


def predicts_velocity(original: Mapping[str, Any]) -> bool:
    """Whether it says so: by ``parameterization`` before SDXL, by the denoiser's scaling since."""
    parameters: Any = original["model"]["params"]
    if parameters.get("parameterization") == "v":
        return True
    try:
        return str(parameters["denoiser_config"]["params"]["scaling_config"]["target"]).endswith(".VScaling")
    except (KeyError, TypeError):
        return False


def changes(
    path: Path, original: Mapping[str, Any], checkpoint: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """What it says of each component: settings by the component's name.

    Raises:
        ApiError: MODEL_BROKEN when it lacks what an original configuration has.
    """
    parameters = original["model"]["params"]
    try:
        unet = create_unet_diffusers_config_from_ldm(original, checkpoint)
        vae = create_vae_diffusers_config_from_ldm(original, checkpoint)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as fault:
        raise _unusable(path, fault) from fault
    for part in (unet, vae):
        del part["sample_size"]  # not in it: guessed from the weights, and not better than the family's
    names = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_train_timesteps"}
    scheduler = {ours: parameters[theirs] for theirs, ours in names.items() if theirs in parameters}
    scheduler["prediction_type"] = "v_prediction" if predicts_velocity(original) else "epsilon"
    return {"unet": unet, "vae": vae, "scheduler": scheduler}


def _unusable(path: Path, fault: Exception) -> ApiError:
    return ApiError(
        "MODEL_BROKEN",
        f"{path.name} is not an original configuration of Stable Diffusion "
        f"({type(fault).__name__}).",  # nothing of its text: whoever named the address may not be allowed to read it
        field=_FIELD,
    )
