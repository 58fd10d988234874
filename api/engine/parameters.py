"""The ``parameters`` text of a PNG, in the form that image tools read (AUTOMATIC1111's)."""

from __future__ import annotations

from typing import Any


def parameters(meta: dict[str, Any], index: int, images: int) -> str:
    """Describe one image of a request.

    Args:
        meta: the request's ``$meta``.
        index: which image.
        images: how many there are.
    """
    inputs, upscale = meta["modelInputs"], meta.get("upscale", {})

    def of_image(value: Any) -> Any:
        """The image's own, where there is one for each prompt or each image."""
        return value[index * len(value) // images] if isinstance(value, list) else value

    lines = [of_image(inputs.get("prompt")) or ""]
    if inputs.get("negative_prompt"):
        lines.append(f"Negative prompt: {of_image(inputs['negative_prompt'])}")
    hires, refiner = meta.get("hires") or {}, meta.get("refiner") or {}
    known = {
        "Steps": inputs.get("num_inference_steps"),
        "Sampler": meta.get("scheduler_alias", meta.get("SCHEDULER")),
        "CFG scale": inputs.get("guidance_scale"),
        "Seed": of_image(inputs.get("seed")),
        "Denoising strength": inputs.get("strength", hires.get("strength")),
        "Model": meta.get("MODEL_ID"),
        "Model hash": meta.get("MODEL_REVISION"),
        "Hires resize": f"{hires['width']}x{hires['height']}" if hires else None,
        "Hires steps": hires.get("num_inference_steps"),
        "Hires upscaler": hires.get("upscaler"),
        "Refiner": refiner.get("MODEL_ID"),
        "Refiner switch at": refiner.get("switch_at"),
        "Postprocess upscale by": upscale.get("scale"),
        "Postprocess upscaler": str(upscale["model"]).rpartition("/")[2] if upscale else None,
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in known.items() if value is not None))
    return "\n".join(lines)
