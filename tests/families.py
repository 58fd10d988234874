"""Tiny models with random weights of the families of pipelines, saved as their own pipelines save them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from sentencepiece import SentencePieceTrainer
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.running import ROOT
from tests.tiny import save_tiny

WIDTH = 32
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(ROOT / "models" / "shapes" / "tokenizer")


def clip(cls: Any = CLIPTextModel) -> Any:
    tokenizer = clip_tokenizer()
    return cls(
        CLIPTextConfig(
            hidden_size=WIDTH, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, projection_dim=WIDTH,
            vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def t5() -> tuple[Any, Any]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    pieces += list("abcdefghijklmnopqrstuvwxyz")
    scores = [(piece, 0.0 if piece.startswith("<") else -2.0) for piece in pieces]
    tokenizer = T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=64)
    config = T5Config(
        d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=len(tokenizer), dense_act_fn="gelu"
    )
    return T5EncoderModel(config), tokenizer


def qwen(cls: Any, layers: int) -> tuple[Any, Any]:
    folder = ROOT / "models" / "shapes" / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text().split("\n")[1:]
    merges: Any = [tuple(line.split(" ")) for line in lines if line]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, chat_template=CHAT)
    config = Qwen3Config(
        hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return cls(config), tokenizer


def vae(channels: int, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, latent_channels=channels, **more,
    )  # fmt: skip


def sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time", norm_num_groups=4,
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), cross_attention_dim=2 * WIDTH,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, steps_offset=1, beta_schedule="scaled_linear", timestep_spacing="leading"
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(4), unet=unet, scheduler=scheduler, text_encoder=clip(), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
    )  # fmt: skip


_TRAINED = tempfile.TemporaryDirectory()  # its tokenizer copies its file when it is saved


def kolors() -> Any:
    """Its text encoder is diffusers' own, and has rows in the second dimension of what it gives."""
    prefix, lines = f"{_TRAINED.name}/tokenizer", ["abcdefghijklmnopqrstuvwxyz", "a red circle, blue"] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=prefix, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = ChatGLMTokenizer(f"{prefix}.model")
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=100, hidden_size=WIDTH, ffn_hidden_size=37, kv_channels=8,
        num_attention_heads=4, seq_length=64, multi_query_attention=True, add_qkv_bias=True, original_rope=True,
    )  # fmt: skip
    encoder = ChatGLMModel(config).float()
    for weight in encoder.parameters():  # it leaves them as memory was
        torch.nn.init.normal_(weight, std=0.05)
    denoiser = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time", norm_num_groups=4,
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj", projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear")
    return diffusers.KolorsPipeline(
        vae=vae(4), unet=denoiser, scheduler=scheduler, text_encoder=encoder, tokenizer=tokenizer
    )


def unet(channels: int, **more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=32, in_channels=channels, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, norm_num_groups=4, attention_head_dim=4, **more,
    )  # fmt: skip


def instruct() -> Any:
    """InstructPix2Pix: its denoiser takes a picture beside the latents."""
    return diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=vae(4), unet=unet(8), text_encoder=clip(), tokenizer=clip_tokenizer(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
        scheduler=diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )  # fmt: skip


def upscale() -> Any:
    """An upscaler: the same, with noise on the picture, at a level that the denoiser is told."""
    return diffusers.StableDiffusionUpscalePipeline(
        vae=vae(4), unet=unet(7, num_class_embeds=1000), text_encoder=clip(), tokenizer=clip_tokenizer(),
        low_res_scheduler=diffusers.DDPMScheduler(), max_noise_level=350,
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    )  # fmt: skip


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, out_channels=16, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=WIDTH, joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
    )  # fmt: skip
    encoder, tokenizer = t5()
    encoder = T5EncoderModel(
        T5Config(d_model=2 * WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4, vocab_size=len(tokenizer))
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(16, shift_factor=0.06),
        text_encoder=clip(CLIPTextModelWithProjection), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoder, tokenizer_3=tokenizer,
    )  # fmt: skip


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    encoder, tokenizer = t5()
    return diffusers.FluxPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(1, shift_factor=0.0),
        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=encoder, tokenizer_2=tokenizer,
    )  # fmt: skip


def pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=WIDTH,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    encoder, tokenizer = t5()
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer, scheduler=diffusers.DPMSolverMultistepScheduler(), vae=vae(4), text_encoder=encoder,
        tokenizer=tokenizer,
    )  # fmt: skip


def kandinsky(channels: int = 4) -> Any:
    """Kandinsky 2.2: a prior and a decoder in one.

    Args:
        channels: that the decoder takes: 9 where it is made for inpainting.
    """
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_layers=1)
    torch.nn.init.ones_(prior.clip_std)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, image_size=56, projection_dim=WIDTH, intermediate_size=37, num_attention_heads=4,
        num_channels=3, num_hidden_layers=1, patch_size=14,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        in_channels=channels, out_channels=8, addition_embed_type="image", layers_per_block=1, encoder_hid_dim=WIDTH,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), block_out_channels=(8, 16),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), norm_num_groups=4,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim_type="image_proj", cross_attention_dim=WIDTH,
        attention_head_dim=4, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    # four levels: its pipelines count on latents that are eight times smaller than images
    movq = diffusers.VQModel(
        block_out_channels=(32, 32, 32, 32), down_block_types=["DownEncoderBlock2D"] * 4, latent_channels=4,
        layers_per_block=1, norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    return diffusers.KandinskyV22CombinedPipeline(
        unet=unet, movq=movq,
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", prediction_type="epsilon", clip_sample=False,
            variance_type="learned_range", thresholding=False,
        ),
        prior_prior=prior, prior_image_encoder=CLIPVisionModelWithProjection(vision),
        prior_text_encoder=clip(CLIPTextModelWithProjection), prior_tokenizer=clip_tokenizer(),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample=True,
            clip_sample_range=10.0,
        ),
        prior_image_processor=CLIPImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_center_crop=True
        ),
    )  # fmt: skip


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=WIDTH, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    torch.nn.init.normal_(transformer.x_pad_token, std=0.02)
    torch.nn.init.normal_(transformer.cap_pad_token, std=0.02)
    encoder, tokenizer = qwen(Qwen3Model, 2)
    return diffusers.ZImagePipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=encoder,
        tokenizer=tokenizer, vae=vae(4, shift_factor=0.0),
    )  # fmt: skip


def flux2_klein() -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    encoder, tokenizer = qwen(Qwen3ForCausalLM, 2)
    codec = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    return diffusers.Flux2KleinPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=encoder,
        tokenizer=tokenizer, vae=codec, is_distilled=False,
    )  # fmt: skip


MAKERS: dict[str, Callable[[], Any]] = {
    "sd-instruct": instruct,
    "sd-upscale": upscale,
    "sdxl": sdxl,
    "kolors": kolors,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "kandinsky": kandinsky,
    "kandinsky-inpaint": lambda: kandinsky(channels=9),
    "z-image": z_image,
    "flux2-klein": flux2_klein,
}
FAMILIES = ("sd", *MAKERS)


def save_family(name: str, folder: Path) -> None:
    """Write a model of a family of ``FAMILIES``."""
    if name == "sd":
        save_tiny(folder)
        return
    torch.manual_seed(sum(name.encode()))
    pipe = MAKERS[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.save_pretrained(folder)


def save_refiner(folder: Path, **codec: Any) -> None:
    """A refiner of SDXL: one text encoder, the second, and a score among what its denoiser is told.

    Args:
        codec: settings of its autoencoder.
    """
    torch.manual_seed(7)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time", norm_num_groups=4,
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), cross_attention_dim=WIDTH,
        projection_class_embeddings_input_dim=5 * 8 + WIDTH,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, steps_offset=1, beta_schedule="scaled_linear", timestep_spacing="leading"
    )
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae(4, **codec), unet=unet, scheduler=scheduler, text_encoder=None, tokenizer=None,
        text_encoder_2=clip(CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
