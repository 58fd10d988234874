"""What it gains that a prompt comes again: the same requests with and without remembered embeddings, in one process.

The demo model end to end, another seed each time; and the call of a text encoder of real size with random weights
through a job's view, as SDXL's pipeline makes it: CLIP ViT-L and OpenCLIP ViT-bigG. On CUDA in fp16.
"""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from api.engine.calls import Ticket
from api.engine.convert.families import lay_out
from api.engine.device import Device
from api.engine.embeddings import Embeddings
from api.engine.executor import Executor
from api.engine.generate import Engine
from api.engine.views import view
from api.schema.generation import GenerationRequest, ModelRef
from scripts.benchmarks.measure import Figure, interleaved, median
from scripts.benchmarks.serving import ROOT

_PROMPT, _NEGATIVE = "a red circle on a blue background", "a green square"
_STEPS = (4, 20)
_ENCODERS = {
    "CLIP-L": ("text_encoder", CLIPTextModel),
    "OpenCLIP-bigG": ("text_encoder_2", CLIPTextModelWithProjection),
}
_PLENTY = 2**26


def run() -> list[Figure]:
    """Measure."""
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    return [*_requests(), *_calls(device)]


def _requests() -> list[Figure]:
    demo = ModelRef("demo/shapes", "bench", "fp32", str(ROOT / "models" / "shapes"))
    seeds = itertools.count()

    def request(steps: int) -> GenerationRequest:
        seed = next(seeds)
        inputs = {"prompt": _PROMPT, "negative_prompt": _NEGATIVE, "num_inference_steps": steps, "guidance_scale": 5.0}
        return GenerationRequest(
            id=str(seed),
            request_id=str(seed),
            model=demo,
            pipeline="StableDiffusionPipeline",
            scheduler="DDIMScheduler",
            inputs={**inputs, "width": 64, "height": 64, "num_images_per_prompt": 1},
            pictures={},
            seed=seed,
            images=1,
            image_format="PNG",
            image_quality=95,
            attention="sdpa",
            safety_checker=True,
            meta={},
        )

    with_memory, without = Engine(Device("cpu")), Engine(Device("cpu"), embeddings_limit=0)
    figures = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for steps in _STEPS:

            def generate(engine: Engine, steps: int = steps) -> Callable[[], object]:
                return lambda: pool.submit(engine.generate, request(steps)).result()

            ours, baseline = map(median, interleaved([generate(with_memory), generate(without)], 25))
            figures.append(
                Figure(
                    f"prompts, demo model, {steps} steps, prompt and negative prompt again",
                    ours,
                    baseline,
                    "ms",
                    "the same engine without memory of prompts",
                    baseline / ours,
                    {"hits": with_memory.embeddings.hits},
                )
            )
    with_memory.close()
    without.close()
    return figures


def _calls(device: Device) -> list[Figure]:
    figures = []
    dtype = torch.float16 if device.is_cuda else torch.float32
    threads = None if device.is_cuda else torch.get_num_threads()
    executor = Executor(threads, device.stopwatch())
    with concurrent.futures.ThreadPoolExecutor(1) as pool, TemporaryDirectory() as folder:
        lay_out("sdxl", Path(folder))
        for name, (part, cls) in _ENCODERS.items():
            encoder = _random(cls, CLIPTextConfig.from_pretrained(Path(folder) / part)).to(device.torch, dtype)
            known, unknown = Embeddings(_PLENTY), Embeddings(0)
            ids = torch.randint(1000, 40_000, (1, 77), device=device.torch)

            def call(embeddings: Embeddings, encoder: Any = encoder, ids: torch.Tensor = ids) -> Callable[[], object]:
                def encode() -> None:
                    ticket = Ticket()
                    with executor.job(ticket), torch.no_grad():
                        seen = view(encoder, executor, ticket, 0, embeddings)
                        seen(ids.clone(), output_hidden_states=True).hidden_states[-2]
                        device.synchronize()

                return lambda: pool.submit(encode).result()

            ours, baseline = map(median, interleaved([call(known), call(unknown)], 15))
            figures.append(
                Figure(
                    f"prompts, {name}, the call of a prompt that comes again",
                    ours,
                    baseline,
                    "ms",
                    "the call made",
                    baseline / ours,
                    {"bytes": known.bytes, "hits": known.hits},
                )
            )
    executor.close()
    return figures


def _random(cls: type, config: CLIPTextConfig) -> Any:
    with torch.device("meta"):
        encoder = cls(config).eval()
    encoder.to_empty(device="cpu")
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.normal_(0, 0.02)
        for name, buffer in encoder.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return encoder
