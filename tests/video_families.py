"""Tiny models with random weights of the families of pipelines that make videos, saved as their own pipelines save them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.families import WIDTH, clip, clip_tokenizer, t5, vae


def umt5() -> tuple[Any, Any]:
    _, tokenizer = t5()
    config = UMT5Config(d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=len(tokenizer))
    return UMT5EncoderModel(config), tokenizer


def ddim() -> Any:
    return diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False)


def wan() -> Any:
    encoder, tokenizer = umt5()
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=WIDTH, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    codec = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return diffusers.WanPipeline(
        transformer=transformer, vae=codec, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip


def ltx() -> Any:
    encoder, tokenizer = t5()
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip
    codec = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1, 1, 1, 1), timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return diffusers.LTXPipeline(
        transformer=transformer, vae=codec, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip


def cogvideox(channels: int = 4, cls: Any = diffusers.CogVideoXPipeline) -> Any:
    encoder, tokenizer = t5()
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, time_embed_dim=2,
        text_embed_dim=WIDTH, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    codec = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), temporal_compression_ratio=4,
    )  # fmt: skip
    return cls(
        transformer=transformer, vae=codec, scheduler=diffusers.CogVideoXDDIMScheduler(), text_encoder=encoder,
        tokenizer=tokenizer,
    )  # fmt: skip


def hunyuan() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    codec = diffusers.AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), spatial_compression_ratio=8, temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )  # fmt: skip
    tokenizer = clip_tokenizer()
    language = LlamaModel(
        LlamaConfig(
            hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=4, num_attention_heads=4,
            vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=0, eos_token_id=2,
        )
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        transformer=transformer, vae=codec, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=language, tokenizer=tokenizer, text_encoder_2=clip(), tokenizer_2=clip_tokenizer(),
    )  # fmt: skip


def mochi() -> Any:
    encoder, tokenizer = t5()
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, out_channels=None, qk_norm="rms_norm", text_embed_dim=WIDTH, time_embed_dim=4,
        activation_fn="swiglu", max_sequence_length=16,
    )  # fmt: skip
    codec = diffusers.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    return diffusers.MochiPipeline(
        transformer=transformer, vae=codec, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip


def latte() -> Any:
    encoder, tokenizer = t5()
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=WIDTH,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
        video_length=2,
    )  # fmt: skip
    return diffusers.LattePipeline(
        transformer=transformer, vae=vae(4), scheduler=ddim(), text_encoder=encoder, tokenizer=tokenizer
    )


UNET: dict[str, Any] = {
    "block_out_channels": (8, 8), "layers_per_block": 1, "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "norm_num_groups": 2, "cross_attention_dim": WIDTH,
}  # fmt: skip


def animatediff() -> Any:
    unet = diffusers.UNet2DConditionModel(
        **UNET, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    return diffusers.AnimateDiffPipeline(
        unet=unet, motion_adapter=adapter, vae=vae(4), scheduler=ddim(), text_encoder=clip(),
        tokenizer=clip_tokenizer(),
    )  # fmt: skip


def text_to_video() -> Any:
    unet = diffusers.UNet3DConditionModel(
        **UNET, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=4,
    )  # fmt: skip
    return diffusers.TextToVideoSDPipeline(
        unet=unet, vae=vae(4), scheduler=ddim(), text_encoder=clip(), tokenizer=clip_tokenizer()
    )


def svd() -> Any:
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=32, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=WIDTH,
        num_attention_heads=8, projection_class_embeddings_input_dim=96, addition_time_embed_dim=32, num_frames=6,
    )  # fmt: skip
    codec = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 64], in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
        latent_channels=4,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=2, num_attention_heads=4, image_size=224,
        intermediate_size=37, patch_size=56,
    )  # fmt: skip
    return diffusers.StableVideoDiffusionPipeline(
        unet=unet, vae=codec, image_encoder=CLIPVisionModelWithProjection(vision),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", interpolation_type="linear",
            num_train_timesteps=1000, prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002,
            steps_offset=1, timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
        ),
    )  # fmt: skip


MAKERS: dict[str, Callable[[], Any]] = {
    "wan": wan,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "cogvideox-i2v": lambda: cogvideox(8, diffusers.CogVideoXImageToVideoPipeline),
    "hunyuan": hunyuan,
    "mochi": mochi,
    "latte": latte,
    "animatediff": animatediff,
    "text-to-video": text_to_video,
    "svd": svd,
}
CALLS: dict[str, dict[str, Any]] = {
    "wan": {"width": 32, "height": 16, "num_frames": 5, "max_sequence_length": 16},
    "ltx": {"width": 64, "height": 32, "num_frames": 9, "max_sequence_length": 16},
    "cogvideox": {"width": 32, "height": 16, "num_frames": 9, "max_sequence_length": 16},
    "cogvideox-i2v": {"width": 16, "height": 16, "num_frames": 9, "max_sequence_length": 16},
    "hunyuan": {
        "width": 32, "height": 16, "num_frames": 5, "max_sequence_length": 16,
        "prompt_template": {"template": "{}", "crop_start": 0},
    },
    "mochi": {"width": 32, "height": 16, "num_frames": 7, "max_sequence_length": 16},
    "latte": {"width": 32, "height": 16, "video_length": 2, "clean_caption": False},
    "animatediff": {"width": 32, "height": 16, "num_frames": 3},
    "text-to-video": {"width": 32, "height": 16, "num_frames": 3},
    "svd": {"width": 32, "height": 32, "num_frames": 3},
}  # fmt: skip
"""What a small video takes, by family."""


def save_video_family(name: str, folder: Path) -> None:
    """Write a model of a family of ``MAKERS``."""
    torch.manual_seed(sum(name.encode()))
    pipe = MAKERS[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.save_pretrained(folder)
