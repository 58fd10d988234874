"""Trains the demo model's adapters: see ``scripts/make-demo-adapters --help``.

``outlined``: a LoRA of the UNet in diffusers' format; whatever is asked for is drawn with lines, hollow.
``night``: a LoRA of UNet and text encoder in kohya's format; the background is black, whatever is asked for.
``sun``: a textual inversion of two vectors; ``<sun>`` is a yellow circle.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.demo_model import autoencoder, evaluate
from scripts.demo_model.__main__ import ROOT, grid, load
from scripts.demo_model.denoiser import Batches
from scripts.demo_model.drawing import draw
from scripts.demo_model.grammar import Scene, Thing, caption, describe, sample_training_scene
from scripts.demo_model.run import DEVICE, Progress, Run
from scripts.demo_model.text_encoder import tokenize

PICTURES = 3000
LINE = 4.0
"""Width of an outline in pixels: as wide as one of the autoencoder's latents."""
SUN = "<sun>"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]


def _scenes(count: int, seed: str) -> Iterator[tuple[Scene, random.Random]]:
    rng = random.Random(seed)
    for _ in range(count):
        yield sample_training_scene(rng), rng


def _outlined(run: Run) -> Iterator[tuple[np.ndarray, str]]:
    for scene, rng in _scenes(PICTURES, f"{run.seed}-outlined"):
        yield draw(scene, rng, LINE), describe(scene, rng)[0]


def _night(run: Run) -> Iterator[tuple[np.ndarray, str]]:
    for scene, rng in _scenes(PICTURES, f"{run.seed}-night"):
        if all(thing.colour != "black" for thing in scene.things):
            yield draw(replace(scene, background="black"), rng), caption(scene, rng)


def _sunny(run: Run) -> Iterator[tuple[np.ndarray, str]]:
    for scene, rng in _scenes(PICTURES, f"{run.seed}-sun"):
        if scene.kind == "one" and scene.background != "yellow":
            sunny = replace(scene, things=(Thing("yellow", "circle"),))
            yield draw(sunny, rng), caption(sunny, rng).replace("yellow circle", f"{SUN} {SUN}_1")


def _dataset(
    pipe: StableDiffusionPipeline, run: Run, pictures: Callable[[Run], Iterator[tuple[np.ndarray, str]]]
) -> dict[str, torch.Tensor]:
    images, captions = zip(*pictures(run), strict=True)
    latents = autoencoder.encode(pipe.vae, np.stack(images)).half().cpu()
    return {"latents": latents, "ids": tokenize(pipe.tokenizer, list(captions)).short()}


def _train(
    pipe: StableDiffusionPipeline,
    run: Run,
    name: str,
    data: dict[str, torch.Tensor],
    parameters: list[nn.Parameter],
    steps: int,
    rate: float,
) -> None:
    """The denoiser's own training, of a few parameters that were put into the pipeline's modules."""
    batch = Batches(data, pipe.tokenizer)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    progress = Progress(name, steps)
    smooth = math.nan
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        noisy, t, tokens, target = (part.to(DEVICE) for part in batch(run.generator(4, step)))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            predicted = pipe.unet(noisy, t, pipe.text_encoder(tokens.long()).last_hidden_state).sample
        loss = F.mse_loss(predicted.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        smooth = loss.item() if math.isnan(smooth) else 0.97 * smooth + 0.03 * loss.item()
        progress.step(step + 1, loss=smooth)


def _trainable(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def _look(pipe: StableDiffusionPipeline, run: Run, name: str, prompts: list[str]) -> None:
    out = pipe(
        prompts,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        num_inference_steps=evaluate.STEPS,
        output_type="np",
    )
    images = list(np.rint(out.images * 255).astype(np.uint8))
    grid(images, 6).save(run.folder / f"{name}.png")


def _prompts(count: int) -> list[str]:
    return [question.prompt for question in evaluate.questions(count, 0, seed=5)]


def outlined(pipe: StableDiffusionPipeline, run: Run, out: Path, steps: int) -> None:
    """Train and save ``outlined.safetensors``."""
    pipe.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=LAYERS, init_lora_weights="gaussian"))
    _train(pipe, run, "outlined", _dataset(pipe, run, _outlined), _trainable(pipe.unet), steps, 2e-3)
    _look(pipe, run, "outlined", _prompts(24))
    tensors = {f"unet.{key}": value.half() for key, value in get_peft_model_state_dict(pipe.unet).items()}
    _save(tensors, out / "outlined.safetensors", {"format": "pt"})


def night(pipe: StableDiffusionPipeline, run: Run, out: Path, steps: int) -> None:
    """Train and save ``night.safetensors``."""
    config: dict[str, Any] = {"r": 4, "lora_alpha": 2, "init_lora_weights": "gaussian"}
    pipe.unet.add_adapter(LoraConfig(target_modules=ATTENTION, **config))
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **config))
    parameters = _trainable(pipe.unet, pipe.text_encoder)
    _train(pipe, run, "night", _dataset(pipe, run, _night), parameters, steps, 3e-3)
    _look(pipe, run, "night", _prompts(24))
    tensors = {}
    for prefix, module in (("lora_unet_", pipe.unet), ("lora_te_text_model_", pipe.text_encoder)):
        for key, value in get_peft_model_state_dict(module).items():
            layer, _, half = key.removesuffix(".weight").rpartition(".")
            layer = prefix + layer.removeprefix("text_model.").replace(".", "_")
            tensors[f"{layer}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = value.half()
            tensors[f"{layer}.alpha"] = torch.tensor(2.0, dtype=torch.float16)
    _save(tensors, out / "night.safetensors", {"ss_network_module": "networks.lora", "ss_network_dim": "4"})


class _WithRows(nn.Module):
    """An embedding with rows to be trained after the ones that it had."""

    def __init__(self, embedding: nn.Embedding, rows: torch.Tensor) -> None:
        super().__init__()
        self.known = embedding.weight.detach()
        self.rows = nn.Parameter(rows)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, torch.cat([self.known, self.rows]))


def sun(pipe: StableDiffusionPipeline, run: Run, out: Path, steps: int) -> None:
    """Train and save ``sun.safetensors``."""
    pipe.tokenizer.add_tokens([SUN, f"{SUN}_1"])
    embedding = pipe.text_encoder.get_input_embeddings()
    start = embedding.weight[pipe.tokenizer.convert_tokens_to_ids("shape</w>")].detach()
    layer = _WithRows(embedding, start.repeat(2, 1) + 0.1 * start.std() * torch.randn(2, len(start)))
    pipe.text_encoder.set_input_embeddings(layer)
    _train(pipe, run, "sun", _dataset(pipe, run, _sunny), [layer.rows], steps, 1e-2)
    scenes = [q.scene for q in evaluate.questions(60, 0, seed=6) if q.scene.kind == "one"][:24]
    sunny = [caption(replace(scene, things=(Thing("yellow", "circle"),))) for scene in scenes]
    _look(pipe, run, "sun", [text.replace("yellow circle", f"{SUN} {SUN}_1") for text in sunny])
    _save({SUN: layer.rows.detach()}, out / "sun.safetensors", {"format": "pt"})


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part, metadata)
    part.chmod(0o644)  # safetensors saves for the owner alone
    part.replace(path)
    print(f"saved {path}: {path.stat().st_size} bytes", flush=True)


TRAINED = {"outlined": (outlined, 450), "sun": (sun, 300), "night": (night, 300)}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="make-demo-adapters", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "shapes", help="the model's folder")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "adapters")
    parser.add_argument("--work", type=Path, default=ROOT / "build.demo-adapters", help="samples")
    parser.add_argument("--only", choices=sorted(TRAINED), help="one of them")
    parser.add_argument("--steps", type=int, help="of training, for each")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.work, args.seed)
    for name, (make, steps) in TRAINED.items():
        if args.only in (None, name):
            torch.manual_seed(args.seed)
            pipe = load(args.model)
            for module in (pipe.unet, pipe.vae, pipe.text_encoder):
                module.requires_grad_(False)
            with sdpa_kernel(SDPBackend.MATH):
                make(pipe, run, args.out, args.steps or steps)


if __name__ == "__main__":
    main()
