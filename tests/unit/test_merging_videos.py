"""The merge rule for what makes videos, in float64: merged calls equal those made alone, or there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from api.engine.merging import analyse, merge, rejoin, split, take
from tests.unit.test_merging import analysed, mask, rand, worst
from tests.video_families import MAKERS

Arguments = Callable[[int, int], dict[str, Any]]


def denoising(channels: int, frames: int = 3, height: int = 2, width: int = 4, **more: Any) -> Arguments:
    """Arguments of a transformer over (B, C, F, H, W)."""
    return lambda rows, step: {
        "hidden_states": rand(rows, channels, frames, height, width), "encoder_hidden_states": rand(rows, 7, 32),
        "timestep": torch.full((rows,), step), "return_dict": False, **{k: v(rows) for k, v in more.items()},
    }  # fmt: skip


def ltx_call(rows: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": rand(rows, 3 * 2 * 4, 8), "encoder_hidden_states": rand(rows, 7, 32),
        "timestep": torch.full((rows,), step), "encoder_attention_mask": mask(rows, 7), "num_frames": 3, "height": 2,
        "width": 4, "rope_interpolation_scale": (0.32, 32, 32), "return_dict": False,
    }  # fmt: skip


def cog_call(rows: int, step: int) -> dict[str, Any]:
    angles = torch.arange(3 * 16.0, dtype=torch.float64).reshape(3, 16)
    return {
        "hidden_states": rand(rows, 3, 4, 2, 2), "encoder_hidden_states": rand(rows, 16, 32),
        "timestep": torch.full((rows,), step), "image_rotary_emb": (angles.cos(), angles.sin()), "return_dict": False,
    }  # fmt: skip


def unet_call(rows: int, step: int) -> dict[str, Any]:
    return {
        "sample": rand(rows, 4, 3, 8, 8),
        "timestep": torch.tensor(step),
        "encoder_hidden_states": rand(rows, 7, 32),
    }


def svd_call(rows: int, step: int) -> dict[str, Any]:
    return {
        "sample": rand(rows, 3, 8, 8, 8), "timestep": torch.tensor(step), "encoder_hidden_states": rand(rows, 1, 32),
        "added_time_ids": rand(rows, 3), "return_dict": False,
    }  # fmt: skip


def decoding(channels: int, frames: int = 2) -> Arguments:
    return lambda rows, step: {"z": rand(rows, channels, frames, 2, 4), "return_dict": False}


CASES: dict[str, tuple[str, str, str, Arguments]] = {
    "Wan": ("wan", "transformer", "forward", denoising(16)),
    "LTX": ("ltx", "transformer", "forward", ltx_call),
    "CogVideoX": ("cogvideox", "transformer", "forward", cog_call),
    "HunyuanVideo": (
        "hunyuan", "transformer", "forward",
        denoising(
            4, encoder_attention_mask=lambda rows: mask(rows, 7), pooled_projections=lambda rows: rand(rows, 32),
            guidance=lambda rows: torch.full((rows,), 6000.0, dtype=torch.float64),
        ),
    ),
    "Mochi": ("mochi", "transformer", "forward", denoising(12, encoder_attention_mask=lambda rows: mask(rows, 7).bool())),
    "Latte": ("latte", "transformer", "forward", denoising(4, frames=2, height=8, width=8)),
    "TextToVideoSD": ("text-to-video", "unet", "forward", unet_call),
    "SVD": ("svd", "unet", "forward", svd_call),
    "Wan's VAE": ("wan", "vae", "decode", decoding(16)),
    "LTX's VAE": ("ltx", "vae", "decode", decoding(8)),
    "CogVideoX's VAE": ("cogvideox", "vae", "decode", decoding(4)),
    "HunyuanVideo's VAE": ("hunyuan", "vae", "decode", decoding(4)),
    "Mochi's VAE": ("mochi", "vae", "decode", decoding(12)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_merged_calls_equal_those_made_alone(name: str) -> None:
    family, part, method, arguments = CASES[name]
    torch.manual_seed(0)
    module = getattr(MAKERS[family](), part).double().eval()
    kwargs = [arguments(rows, step) for rows, step in ((2, 981), (1, 40), (3, 500))]
    calls = [analysed(module, method, each) for each in kwargs]
    assert len({call.key for call in calls}) == 1
    with torch.no_grad():
        together = split(getattr(module, method)(**merge(calls)), [call.rows for call in calls])
        alone = [getattr(module, method)(**each) for each in kwargs]
        halves = [getattr(module, method)(**take(calls[2], *part).arguments) for part in ((0, 1), (1, 3))]
    scale = max(1.0, float(alone[0][0].abs().max()))
    assert max(worst(a, b) for a, b in zip(together, alone, strict=True)) < 1e-12 * scale
    assert worst(rejoin(halves), alone[2]) < 1e-12 * scale


@pytest.mark.parametrize(
    ("owner", "one", "other"),
    [
        ("LTXVideoTransformer3DModel", ltx_call(1, 5), {**ltx_call(1, 5), "rope_interpolation_scale": (0.4, 32, 32)}),
        ("LTXVideoTransformer3DModel", ltx_call(1, 5), {**ltx_call(1, 5), "num_frames": 4}),
        (
            "CogVideoXTransformer3DModel", cog_call(1, 5),
            {**cog_call(1, 5), "image_rotary_emb": (torch.ones(3, 16).double(), cog_call(1, 5)["image_rotary_emb"][1])},
        ),
    ],
)  # fmt: skip
def test_videos_of_another_form_are_not_merged(owner: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    def anything(**arguments: Any) -> None: ...

    keys = [analyse(anything, owner, (), each) for each in (one, dict(one), other)]
    assert all(keys)
    assert keys[0].key == keys[1].key != keys[2].key  # type: ignore[union-attr]


def test_frames_that_look_at_each_other_run_alone() -> None:
    """The decoder of SVD has a video's frames for rows; AnimateDiff's prompts have a row for each frame."""

    def decode(z: Any, num_frames: int = 1) -> None: ...
    def forward(sample: Any, timestep: Any, encoder_hidden_states: Any) -> None: ...

    frames = {"z": rand(3, 4, 8, 8), "num_frames": 3}
    assert analyse(decode, "AutoencoderKLTemporalDecoder", (), frames) is None
    assert analyse(decode, "AutoencoderKL", (), frames) is not None
    prompts = {**unet_call(2, 5), "encoder_hidden_states": rand(6, 7, 32)}
    assert analyse(forward, "UNetMotionModel", (), prompts) is None
