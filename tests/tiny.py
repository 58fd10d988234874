"""Tiny models with random weights, made on the fly, for tests of mechanics."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.running import ROOT


def save_tiny(folder: Path, seed: int = 0, nsfw: bool | None = None) -> None:
    """A Stable Diffusion of a few hundred KB at 64x64.

    Args:
        nsfw: with a safety checker that flags everything (True) or nothing (False).
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models" / "shapes" / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    checker = extractor = None
    if nsfw is not None:
        vision = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 1}
        config = CLIPConfig(
            vision_config={**vision, "image_size": 32, "patch_size": 8}, text_config=dict(vision), projection_dim=32
        )
        checker = StableDiffusionSafetyChecker(config)
        threshold = -2.0 if nsfw else 2.0
        checker.concept_embeds_weights.data.fill_(threshold)
        checker.special_care_embeds_weights.data.fill_(2.0)
        extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=checker,
        feature_extractor=extractor,
        requires_safety_checker=nsfw is not None,
    )
    pipe.save_pretrained(folder)


def save_wide(folder: Path, seed: int = 0) -> None:
    """The same with an autoencoder that takes more memory than the denoiser, as real ones do."""
    save_tiny(folder, seed)
    AutoencoderKL(
        block_out_channels=[16, 16, 16],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder / "vae")
