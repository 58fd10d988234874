"""The demo model's VAE: 64x64 RGB to 16x16x4 and back, latents held within [-1, 1]."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from scripts.demo_model.drawing import draw
from scripts.demo_model.grammar import sample_training_scene
from scripts.demo_model.run import DEVICE, Progress, Run

STEPS = 4000
CROP_STEPS = 3300
BATCH = 16
CROP = 32
NOISE = 0.08
"""Standard deviation of the noise on a latent while the decoder learns."""


def build() -> AutoencoderKL:
    """An untrained VAE of our size (0.6 M parameters)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def pictures(count: int, seed: int) -> np.ndarray:
    """uint8 (count, 64, 64, 3) training pictures."""
    rng = random.Random(seed)
    return np.stack([draw(sample_training_scene(rng), rng) for _ in range(count)])


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1], as the pipelines scale it."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).to(DEVICE)


def _crops(images: np.ndarray, generator: torch.Generator) -> np.ndarray:
    offsets = torch.randint(0, (64 - CROP) // 4 + 1, (len(images), 2), generator=generator) * 4
    return np.stack([im[y : y + CROP, x : x + CROP] for im, (y, x) in zip(images, offsets.tolist(), strict=True)])


def train(run: Run) -> AutoencoderKL:
    """Train the VAE, or take up where a stopped run left it.

    L1 + MSE on the picture. Noise on the latent stands in for the posterior's (Kingma & Welling
    2013) with a fixed width, and a hinge keeps latents within [-1, 1], so that they cannot grow to
    drown the noise.
    """
    torch.manual_seed(run.seed)
    vae = build().to(DEVICE)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    start = 0
    if state := run.load("vae"):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    if start == STEPS:
        return vae.eval()
    data = pictures(12_000, run.seed + 1)
    progress = Progress("autoencoder", STEPS, start)
    for step in range(start, STEPS):
        generator = run.generator(1, step)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        batch = data[torch.randint(0, len(data), (BATCH,), generator=generator).numpy()]
        x = to_tensor(_crops(batch, generator) if step < CROP_STEPS else batch)
        mean = vae.encode(x).latent_dist.mean
        noise = torch.randn(mean.shape, generator=generator).to(DEVICE)
        y = vae.decode(mean + NOISE * noise).sample
        beyond = F.relu(mean.abs() - 0.97).square().mean()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 20 * beyond
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress.step(step + 1, loss=loss.item())
        if (step + 1) % 200 == 0 or step + 1 == STEPS:
            run.log(stage="vae", step=step + 1, loss=round(loss.item(), 5))
            run.save("vae", {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    return vae.eval()


def settle(vae: AutoencoderKL) -> AutoencoderKL:
    """Make the posterior as narrow as the config allows: encoding gives the mean.

    Nothing trained the variance, and img2img samples from it.
    """
    latent = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[latent:].zero_()
        vae.quant_conv.bias[latent:].fill_(-30)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Latent means, float32 (N, 4, 16, 16), of uint8 pictures."""
    return torch.cat(
        [vae.encode(to_tensor(part)).latent_dist.mean for part in np.split(images, range(64, len(images), 64))]
    )
