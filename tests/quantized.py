"""Quantized models for tests: a rule for layers as small as those of tiny models, and a device to count bytes on."""

from __future__ import annotations

from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.loader import PartLoader
from api.engine.quantization import Rule
from api.schema.generation import GenerationRequest, ModelRef
from tests.budgeted import Apart, Outside
from tests.generating import a_request
from tests.running import ROOT

KINDS = ("int8", "fp8", "nf4")
SMALL = Rule(layer=2**8, text=2**8)
"""Of the product's own, no layer of a tiny model is large enough."""
DEMO = Rule(layer=2**12, text=10**9)


class Counted(Outside):
    """Reads into memory that an allocator does not count."""

    def __init__(self, device: Apart, rule: Rule = SMALL) -> None:
        PartLoader.__init__(self, device, 0, rule=rule)
        self._allocator = device.allocator


def engine_on(device: Device, rule: Rule = SMALL) -> Engine:
    return Engine(device, loader=PartLoader(device, 2**30, rule=rule))


def shapes(kind: str = "") -> ModelRef:
    return ModelRef("demo/shapes", "main", "fp32", str(ROOT / "models" / "shapes"), quantize=kind)


def draw(
    model: ModelRef, prompt: str, seed: int = 0, steps: int = 15, guidance: float = 7.5, **more: object
) -> GenerationRequest:
    inputs = {"prompt": prompt, "num_inference_steps": steps, "guidance_scale": guidance, "width": 64, "height": 64}
    return a_request(
        f"{seed}", model, "StableDiffusionPipeline", "DPMSolverMultistepScheduler", inputs, seed=seed, **more
    )
