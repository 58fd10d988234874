"""Every precision on every way into a model: image-to-image and inpainting encode first, in the autoencoder's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from api.engine.device import Device
from api.engine.generate import Engine
from api.schema.generation import ModelRef, Picture
from tests.generating import a_request
from tests.running import ROOT
from tests.tiny import save_tiny

SIZE = 64


class Forced(Device):
    """A CPU that computes in what is asked for, as a GPU does."""

    def dtype(self, precision: str) -> torch.dtype:
        return {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(ROOT / "models" / "shapes" / "tokenizer")


def clip(cls: Any, projection: int) -> Any:
    words = tokenizer()
    return cls(
        CLIPTextConfig(
            hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=len(words),
            eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id, pad_token_id=words.pad_token_id,
            projection_dim=projection,
        )
    )  # fmt: skip


def t5(width: int = 32) -> Any:
    vocabulary = len(tokenizer())
    return T5EncoderModel(T5Config(d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=vocabulary))


def vae(channels: int, shift: float | None = None) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=channels,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, shift_factor=shift, scaling_factor=1.5,
    )  # fmt: skip


def save_sdxl(folder: Path) -> None:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, norm_num_groups=4, attention_head_dim=4, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=vae(4), text_encoder=clip(CLIPTextModel, 32), text_encoder_2=clip(CLIPTextModelWithProjection, 32),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(), unet=unet, scheduler=diffusers.EulerDiscreteScheduler(),
    ).save_pretrained(folder)  # fmt: skip


def save_sd3(folder: Path) -> None:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=16,
    )  # fmt: skip
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(16, 0.1),
        text_encoder=clip(CLIPTextModelWithProjection, 32), tokenizer=tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 32), tokenizer_2=tokenizer(),
        text_encoder_3=t5(64), tokenizer_3=tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


def save_flux(folder: Path) -> None:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    diffusers.FluxPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(4, 0.1),
        text_encoder=clip(CLIPTextModel, 32), tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


FAMILIES = {
    "StableDiffusion": save_tiny,
    "StableDiffusionXL": save_sdxl,
    "StableDiffusion3": save_sd3,
    "Flux": save_flux,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](folder)
    return request.param, folder


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_task_in_half_precision(family: tuple[str, Path], precision: str) -> None:
    name, folder = family
    engine = Engine(Forced("cpu"))
    pictures = {
        "image": Picture("RGB", SIZE, SIZE, bytes(range(256)) * (SIZE * SIZE * 3 // 256), "x"),
        "mask_image": Picture("L", SIZE, SIZE, bytes([0, 255]) * (SIZE * SIZE // 2), "x"),
    }
    flow = name in ("StableDiffusion3", "Flux")
    for task, given in (("", ()), ("Img2Img", ("image",)), ("Inpaint", ("image", "mask_image"))):
        inputs: dict[str, Any] = {"prompt": "a circle", "num_inference_steps": 4}
        if task != "Img2Img" or flow:
            inputs |= {"width": SIZE, "height": SIZE}
        if task:
            inputs["strength"] = 0.6
        if flow:
            inputs["max_sequence_length"] = 16
        ref, mine = ModelRef(name, "main", precision, str(folder)), {key: pictures[key] for key in given}
        scheduler = "FlowMatchEulerDiscreteScheduler" if flow else "EulerDiscreteScheduler"
        request = a_request(task, ref, f"{name}{task}Pipeline", scheduler, inputs, pictures=mine)
        assert engine.generate(request).images.shape == (1, SIZE, SIZE, 3), task
