"""Which syntax a request's prompts are in, and whether they can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.errors import ApiError
from api.schema.phrases import SyntaxFault
from api.schema.prompts import PROMPTS, read


def syntax_of(options: Mapping[str, Any]) -> str:
    """What ``callInputs`` say: ``plain``, ``compel`` or ``a1111``."""
    return str(options.get("prompt_syntax") or ("compel" if options.get("compel_prompts") else "plain"))


def weighs_prompts(pipeline: str, accepted: Mapping[str, Any]) -> bool:
    """Whether a pipeline can be given weighted prompts: those of SD 1, 2 and SDXL, and of FLUX.1.

    Args:
        pipeline: its class name.
        accepted: its inputs.
    """
    has_clip = "clip_skip" in accepted and "prompt_3" not in accepted
    return has_clip or (pipeline.startswith("Flux") and "prompt_2" in accepted)


def check_syntax(options: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Check that the prompts of a request can be read; the syntax.

    Raises:
        ApiError: INVALID_INPUTS, with the prompt and the character in it.
    """
    syntax = syntax_of(options)
    for name in PROMPTS if syntax != "plain" else ():
        value = inputs.get(name)
        for i, text in enumerate(value if isinstance(value, list) else [value]):
            field = f"modelInputs.{name}[{i}]" if isinstance(value, list) else f"modelInputs.{name}"
            try:
                if isinstance(text, str):
                    read(text, syntax)
            except SyntaxFault as fault:
                message = f"No prompt in the syntax of {syntax}. {fault}"
                raise ApiError("INVALID_INPUTS", message, field=field, requested=text) from None
    return syntax


def check_weighing(syntax: str, options: Mapping[str, Any], pipeline: str, accepted: Mapping[str, Any]) -> None:
    """Check that a pipeline can be given prompts in a syntax.

    Raises:
        ApiError: NOT_SUPPORTED.
    """
    if syntax == "plain" or weighs_prompts(pipeline, accepted):
        return
    name = "prompt_syntax" if "prompt_syntax" in options else "compel_prompts"
    message = (
        f"{pipeline} takes its prompts as they are: weights are for the pipelines of Stable Diffusion 1, 2 and XL, and "
        "of FLUX.1. Leave this out, or choose another model."
    )
    raise ApiError("NOT_SUPPORTED", message, field=f"callInputs.{name}", requested=syntax)
