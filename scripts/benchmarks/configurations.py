"""Configurations of architectures that no checkpoint is converted with, and smaller ones of all.

Sources: the configuration files of the published models (FLUX.1-schnell, stable-diffusion-3.5-large and -medium,
t5-v1_1-xxl, clip-vit-large-patch14, CLIP-ViT-bigG-14), whose values are mostly the defaults of their classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import T5Tokenizer

from api.engine.convert.families import CONFIGS, write_vocabulary

Config = dict[str, Any]

CLIP_L: Config = json.loads((CONFIGS / "sdxl" / "text_encoder" / "config.json").read_text())
CLIP_G: Config = json.loads((CONFIGS / "sdxl" / "text_encoder_2" / "config.json").read_text())
T5_XXL: Config = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64,
    "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new",
    "is_gated_act": True, "is_encoder_decoder": False, "use_cache": False, "pad_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
VAE_16: Config = {
    **json.loads((CONFIGS / "sdxl" / "vae" / "config.json").read_text()),
    "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True,
    "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
FLUX: Config = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 19,
    "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": False, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
SD35_LARGE: Config = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 38,
    "attention_head_dim": 64, "num_attention_heads": 38, "joint_attention_dim": 4096, "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
}  # fmt: skip
SD35_MEDIUM: Config = {
    **SD35_LARGE, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
    "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)),
}  # fmt: skip

_FLUX_INDEX: Config = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_CLIP: Config = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
_VAE: Config = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
_UNET: Config = {"layers_per_block": 1, "norm_num_groups": 8}
_RESIZED: dict[tuple[str, str], dict[str, Config]] = {
    ("sd1", "tiny"): {
        "unet": {**_UNET, "block_out_channels": [16, 32, 32, 32], "attention_head_dim": 4, "cross_attention_dim": 32},
        "text_encoder": {**_CLIP, "projection_dim": 32},
        "vae": {**_VAE, "sample_size": 64},
    },
    ("sdxl", "tiny"): {
        "unet": {
            **_UNET, "block_out_channels": [16, 32, 32], "attention_head_dim": [2, 4, 4], "sample_size": 8,
            "transformer_layers_per_block": [1, 1, 2], "cross_attention_dim": 64,
            "projection_class_embeddings_input_dim": 6 * 256 + 32,
        },
        "text_encoder": {**_CLIP, "projection_dim": 32},
        "text_encoder_2": {**_CLIP, "projection_dim": 32},
        "vae": {**_VAE, "sample_size": 64},
    },
    ("flux", "tiny"): {
        "transformer": {
            "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
        },
        "text_encoder": {**_CLIP, "projection_dim": 32},
        "text_encoder_2": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "vae": {**_VAE, "sample_size": 64},
    },
    ("flux", "cut"): {
        "transformer": {"num_layers": 5, "num_single_layers": 10},
        "text_encoder_2": {"num_layers": 6},
    },
}  # fmt: skip


def lay_out_flux(folder: Path) -> Config:
    """Write the configuration of FLUX.1-schnell into a folder, but for ``model_index.json``, which is returned.

    Its second tokenizer knows letters only: how many tokens a prompt has changes nothing, they are filled up.
    """
    parts = {"transformer": FLUX, "vae": VAE_16, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL}
    shift = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    for name, config in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(shift, indent=1))
    (folder / "tokenizer").mkdir()
    for file in (CONFIGS / "sdxl" / "tokenizer").glob("*.json"):
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    write_vocabulary(folder / "tokenizer")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{letter}" for letter in letters), *letters]
    scores = [(piece, 0.0 if piece.startswith("<") else -2.0) for piece in pieces]
    T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512).save_pretrained(folder / "tokenizer_2")
    return dict(_FLUX_INDEX)


def resize(family: str, size: str, folder: Path) -> None:
    """Change the configurations in a folder to those of another size.

    Raises:
        KeyError: the family has none of that size.
    """
    if size == "real":
        return
    for name, changed in _RESIZED[family, size].items():
        file = folder / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}, indent=1))
