"""A validated request, for tests that go past admission."""

from __future__ import annotations

from typing import Any

from api.schema.generation import GenerationRequest, ModelRef


def a_request(
    name: str, model: ModelRef, pipeline: str, scheduler: str, inputs: dict[str, Any], **more: Any
) -> GenerationRequest:
    """For one image of seed 1 without a safety checker, where ``more`` does not say otherwise."""
    usual = {"pictures": {}, "seed": 1, "images": 1, "image_format": "PNG", "image_quality": 95, "attention": "sdpa"}
    fields = {**usual, "safety_checker": False, "meta": {}, **more}
    return GenerationRequest(
        id=name, request_id=name, model=model, pipeline=pipeline, scheduler=scheduler, inputs=inputs, **fields
    )
