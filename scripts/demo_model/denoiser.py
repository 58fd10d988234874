"""The demo model's UNet: v-prediction on cached latents, made to stay right at high guidance."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from scripts.demo_model import autoencoder
from scripts.demo_model.drawing import draw
from scripts.demo_model.grammar import describe, sample_training_scene
from scripts.demo_model.run import DEVICE, Progress, Run
from scripts.demo_model.text_encoder import WIDTH, tokenize

PICTURES = 40_000
BATCH = 32
PEAK_RATE = 1.2e-3
CAPTION_DROPOUT = 0.1
OVERDRIVEN = 0.25
"""Share of training rows whose latent is pushed away from the mean, as high guidance does."""

NOISE_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def build() -> UNet2DConditionModel:
    """An untrained UNet of our size (4.0 M parameters)."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _dataset(run: Run, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> dict[str, torch.Tensor]:
    """Latents (N, 4, 16, 16) float16 and token ids (N, 77) int16 of the training pictures, cached."""
    if cached := run.load("latents"):
        return cached
    progress = Progress("latents", PICTURES)
    latents, ids = [], []
    for first in range(0, PICTURES, 1000):
        rng = random.Random(f"{run.seed}-pictures-{first}")
        scenes = [sample_training_scene(rng) for _ in range(1000)]
        images = np.stack([draw(scene, rng) for scene in scenes])
        latents.append(autoencoder.encode(vae, images).half().cpu())
        ids.append(tokenize(tokenizer, [describe(scene, rng)[0] for scene in scenes]).short())
        progress.step(first + 1000)
    data = {"latents": torch.cat(latents), "ids": torch.cat(ids)}
    run.save("latents", data)
    return data


def _timesteps(count: int, log_snr: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half uniform in the noise level of a cosine schedule, half logit-normal(0.4, 0.8) in it."""
    level = torch.rand(count, generator=generator)
    normal = torch.sigmoid(0.4 + 0.8 * torch.randn(count, generator=generator))
    level = torch.where(torch.rand(count, generator=generator) < 0.5, level, normal)
    wanted = -2 * torch.log(torch.tan(level.clamp(0.005, 0.995) * math.pi / 2))
    return torch.searchsorted(-log_snr, -wanted).clamp(0, len(log_snr) - 1)


class Batches:
    """Draws training rows.

    A guided sampler overshoots: its latent lies further from the mean than any picture's. Some
    rows are overdriven in the same way and asked for the true picture all the same, so that the
    model pulls back what guidance pushed out.
    """

    def __init__(self, data: dict[str, torch.Tensor], tokenizer: CLIPTokenizer) -> None:
        self._latents, self._ids = data["latents"], data["ids"]
        self._centre = self._latents[:4000].float().mean(0)
        self._nothing = tokenize(tokenizer, [""]).short()[0]
        self._alphas = DDPMScheduler(**NOISE_SCHEDULE).alphas_cumprod
        self._log_snr = torch.log(self._alphas / (1 - self._alphas))

    def __call__(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Noisy latents, timesteps, token ids and the v to predict, of one batch."""
        rows = torch.randint(0, len(self._latents), (BATCH,), generator=generator)
        clean = self._latents[rows].float()
        dropped = torch.rand(BATCH, 1, generator=generator) < CAPTION_DROPOUT
        tokens = torch.where(dropped, self._nothing, self._ids[rows])
        t = _timesteps(BATCH, self._log_snr, generator)
        a, b = self._alphas[t].sqrt().view(-1, 1, 1, 1), (1 - self._alphas[t]).sqrt().view(-1, 1, 1, 1)
        overdriven = (torch.rand(BATCH, 1, 1, 1, generator=generator) < OVERDRIVEN) & (b > 0.3)
        push = 4 * b.square() * torch.rand(BATCH, 1, 1, 1, generator=generator).square()
        pushed = torch.where(overdriven, self._centre + (1 + push) * (clean - self._centre), clean)
        noisy = a * pushed + b * torch.randn(clean.shape, generator=generator)
        return noisy, t, tokens, (a * noisy - clean) / b


def train(
    run: Run,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    steps: int,
    look: Callable[[UNet2DConditionModel, int], None],
) -> UNet2DConditionModel:
    """Train the UNet, or take up where a stopped run left it; returns its moving average.

    v-prediction (Salimans & Ho 2022), classifier-free guidance (Ho & Salimans 2022), timesteps
    drawn by noise level.

    Args:
        steps: optimizer steps in all.
        look: called with the averaged model now and then, to draw sample grids.
    """
    batch = Batches(_dataset(run, vae, tokenizer), tokenizer)
    torch.manual_seed(run.seed + 3)
    model = build().to(DEVICE)
    average = build().to(DEVICE).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=1e-2, fused=True)
    start = 0
    if state := run.load("unet"):
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    progress = Progress("denoiser", steps, start)
    smooth = math.nan
    attention = sdpa_kernel(SDPBackend.MATH) if DEVICE.type == "cpu" else contextlib.nullcontext()
    with attention:
        for step in range(start, steps):
            decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * min(1, (step + 1) / 200) * decay
            noisy, t, tokens, target = (part.to(DEVICE) for part in batch(run.generator(3, step)))
            with torch.autocast(DEVICE.type, torch.bfloat16):
                with torch.no_grad():
                    text = text_encoder(tokens.long()).last_hidden_state
                predicted = model(noisy, t, text).sample
            loss = F.mse_loss(predicted.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            keep = min(0.999, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
            smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
            done = step + 1
            progress.step(done, loss=smooth)
            if done % 100 == 0:
                run.log(stage="unet", step=done, loss=round(smooth, 5))
            if done % 250 == 0 or done == steps:
                state = {"model": model.state_dict(), "average": average.state_dict(), "step": done}
                run.save("unet", {**state, "optimizer": optimizer.state_dict()})
            if done % 1500 == 0 or done == steps:
                look(average.eval(), done)
    return average.eval()
