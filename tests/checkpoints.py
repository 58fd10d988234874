"""Single-file checkpoints in the original layout of latent diffusion, made from diffusers components.

The names are those of the original code: CompVis/latent-diffusion (``openaimodel.py``, ``model.py``),
openai/CLIP and open_clip (``transformer.py``). Written the other way round than any converter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_keys(weights: Mapping[str, torch.Tensor], layers: int) -> Tensors:
    """A UNet's weights, with ``layers`` of its configuration's ``layers_per_block``."""
    attentive = {match[1] for key in weights if (match := re.match(r"(up_blocks\.\d+)\.attentions", key))}
    out: Tensors = {}
    for key, value in weights.items():
        stem, _, leaf = key.rpartition(".")
        if stem in _TOP:
            out[f"model.diffusion_model.{_TOP[stem]}.{leaf}"] = value
            continue
        match = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", key)
        assert match, key
        where, block, kind, layer, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if kind == "resnets":
            part, _, last = rest.rpartition(".")
            rest = f"{_RESNET[part]}.{last}"
        side = int(kind == "attentions")
        if where is None:
            name = f"middle_block.{1 if side else 2 * layer}.{rest}"
        elif where == "down":
            number = 1 + block * (layers + 1) + layer
            name = f"input_blocks.{number}.{side}.{rest}"
            if kind == "downsamplers":
                name = f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{leaf}"
        else:
            name = f"output_blocks.{block * (layers + 1) + layer}.{side}.{rest}"
            if kind == "upsamplers":
                last_layer = block * (layers + 1) + layers
                name = f"output_blocks.{last_layer}.{2 if f'up_blocks.{block}' in attentive else 1}.conv.{leaf}"
        out[f"model.diffusion_model.{name}"] = value
    return out


def vae_keys(weights: Mapping[str, torch.Tensor]) -> Tensors:
    ups = 1 + max(int(match[1]) for key in weights if (match := re.search(r"up_blocks\.(\d+)", key)))
    out: Tensors = {}
    for key, value in weights.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{ups - 1 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{ups - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            name = f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
            if value.ndim == 2:
                value = value[:, :, None, None]
        out[f"first_stage_model.{name}"] = value
    return out


def clip_keys(weights: Mapping[str, torch.Tensor], prefix: str = "cond_stage_model.transformer.") -> Tensors:
    out = {f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in weights.items()}
    out[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return out


def open_clip_keys(weights: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    plain = {key.removeprefix("text_model."): value for key, value in weights.items()}
    out: Tensors = {f"{prefix}logit_scale": torch.ones(())}
    for key, value in plain.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", key):
            parts = [plain[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            out[f"{prefix}transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key):
            if match[2] in _OPEN_CLIP:
                out[f"{prefix}transformer.resblocks.{match[1]}.{_OPEN_CLIP[match[2]]}.{match[3]}"] = value
        else:
            names = {
                "embeddings.token_embedding.weight": "token_embedding.weight",
                "embeddings.position_embedding.weight": "positional_embedding",
                "final_layer_norm.weight": "ln_final.weight",
                "final_layer_norm.bias": "ln_final.bias",
                "text_projection.weight": "text_projection",
            }
            out[f"{prefix}{names[key]}"] = value.T if key == "text_projection.weight" else value
    return out


def weights_of(model: Path) -> dict[str, Tensors]:
    """A diffusers folder's weights, by component."""
    return {file.parent.name: load_file(file) for file in sorted(model.glob("*/*.safetensors"))}


def demo_checkpoint(model: Path, dtype: torch.dtype) -> Tensors:
    """The demo model, as one state dict."""
    parts = weights_of(model)
    whole = unet_keys(parts["unet"], 1) | vae_keys(parts["vae"]) | clip_keys(parts["text_encoder"])
    return {key: value.to(dtype).contiguous() if value.is_floating_point() else value for key, value in whole.items()}


def save(tensors: Tensors, path: Path) -> Path:
    """As ``.safetensors``, or as a trainer's ``.ckpt``: nested, and beside other things."""
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "global_step": 1000, "epoch": 3, "optimizer_states": []}, path)
    return path


def nothing(*_: object) -> None:
    pass


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Evil:
    """A pickle that runs a command where it is unpickled freely."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (self.command,)


def every_form(model: Path, folder: Path) -> Path:
    """A model as one file in either precision, as a pickle, and under a name that is wrong."""
    full, half = demo_checkpoint(model, torch.float32), demo_checkpoint(model, torch.float16)
    save(full, folder / "fp32.safetensors")
    save(half, folder / "fp16.safetensors")
    save(full, folder / "fp32.ckpt")
    # named wrongly on purpose: the content counts
    (folder / "renamed.ckpt").write_bytes((folder / "fp16.safetensors").read_bytes())
    return folder
