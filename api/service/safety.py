"""Whether a model's safety checker sees the images of a request, and what may not be shown before it has."""

from __future__ import annotations

from typing import Any

from api.errors import ApiError
from api.models.description import InstalledModel


def choose_safety(options: dict[str, Any], model: InstalledModel, mode: str) -> bool:
    """Whether the safety checker is to run, where the model has one.

    Args:
        options: checked ``callInputs``.
        model: what is run.
        mode: SAFETY_CHECKER: ``auto``, it runs unless a request says otherwise; ``required``, always; ``off``, where a
            request asks for it.

    Raises:
        ApiError: SAFETY_REQUIRED; INVALID_INPUTS: something would show what the checker hides.
    """
    wanted = bool(options.get("safety_checker", mode != "off"))
    required = mode == "required"
    if required and not wanted:
        message = "This server's safety checker cannot be switched off; leave safety_checker out."
        raise ApiError("SAFETY_REQUIRED", message, field="callInputs.safety_checker", requested=False)
    has_one = "safety_checker" in model.components
    if required and not has_one:
        message = f"{model.model_id} has no safety checker, and this server runs only models that have one."
        raise ApiError("SAFETY_REQUIRED", message, field="callInputs.MODEL_ID", requested=model.model_id)
    if wanted and has_one:
        _check_unseen(options, model, required)
    return wanted


def _check_unseen(options: dict[str, Any], model: InstalledModel, required: bool) -> None:
    """What a safety checker does not see: it is given finished images only."""
    if "preview" in options:
        shown, what = "preview", "previews"
    elif {"latents", "intermediate_latents"} & set(options.get("output", ())):
        shown, what = "output", "latents"
    else:
        return
    way_out = "." if required else ", or send safety_checker: false."
    message = (
        f"{model.model_id} has a safety checker, which sees finished images only: {what} would show what it hides. "
        f"Leave {shown} out{way_out}"
    )
    code = "SAFETY_REQUIRED" if required else "INVALID_INPUTS"
    raise ApiError(code, message, field=f"callInputs.{shown}")
