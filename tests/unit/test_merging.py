"""The merge rule in float64: merged calls equal those made alone, over the kinds of module there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from api.engine.merging import CannotSplit, Mergeable, analyse, merge, rejoin, split, take

torch.manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


UNET = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16, "attention_head_dim": 4,
}  # fmt: skip


def sd() -> Any:
    return diffusers.UNet2DConditionModel(**UNET)


def sdxl() -> Any:
    return diffusers.UNet2DConditionModel(
        **UNET,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )


def controlnet() -> Any:
    names = ("block_out_channels", "layers_per_block", "in_channels", "norm_num_groups", "down_block_types")
    more = {name: UNET[name] for name in (*names, "cross_attention_dim", "attention_head_dim")}
    return diffusers.ControlNetModel(**more, conditioning_embedding_out_channels=(4, 8))  # type: ignore[arg-type]


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


def qwen(zero_cond_t: bool = False) -> Any:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4), zero_cond_t=zero_cond_t,
    )  # fmt: skip


def chroma() -> Any:
    return diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip


def flux2() -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def lumina2() -> Any:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16), cap_feat_dim=16,
    )  # fmt: skip


def sana() -> Any:
    return diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
        sample_size=8,
    )  # fmt: skip


def mask(rows: int, length: int) -> torch.Tensor:
    """Prompts of several lengths, padded."""
    lengths = torch.randint(1, length + 1, (rows, 1))
    return (torch.arange(length) < lengths).to(torch.int64)


def qwen_call(rows: int, step: int, height: int = 2, width: int = 8) -> dict[str, Any]:
    return {
        "hidden_states": rand(rows, height * width, 16), "encoder_hidden_states": rand(rows, 7, 16),
        "encoder_hidden_states_mask": mask(rows, 7), "guidance": None, "attention_kwargs": {}, "return_dict": False,
        "timestep": torch.full((rows,), step / 1000, dtype=torch.float64), "img_shapes": [[(1, height, width)]] * rows,
    }  # fmt: skip


def vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip


CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50,
            "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "projection_dim": 8}  # fmt: skip
IDS = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)


def residuals(rows: int) -> dict[str, Any]:
    """What a ControlNet of the UNet's shape gives."""
    net = controlnet().double().eval()
    with torch.no_grad():
        down, mid = net(rand(rows, 4, 8, 8), 5, rand(rows, 7, 16), rand(rows, 3, 16, 16), return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def unet_call(rows: int, step: int) -> dict[str, Any]:
    return {"sample": rand(rows, 4, 8, 8), "timestep": torch.tensor(step), "encoder_hidden_states": rand(rows, 7, 16)}


CASES: dict[str, tuple[Callable[[], Any], str, Callable[[int, int], dict[str, Any]]]] = {
    "SD": (sd, "forward", unet_call),
    "SD with a plain number": (sd, "forward", lambda rows, step: {**unet_call(rows, step), "timestep": step}),
    "SD with scales": (
        sd, "forward", lambda rows, step: {**unet_call(rows, step), "cross_attention_kwargs": {}, "return_dict": False},
    ),
    "SD with a ControlNet": (sd, "forward", lambda rows, step: {**unet_call(rows, step), **residuals(rows)}),
    "SDXL": (
        sdxl, "forward",
        lambda rows, step: {
            **unet_call(rows, step), "added_cond_kwargs": {"text_embeds": rand(rows, 8), "time_ids": rand(rows, 6)},
        },
    ),
    "ControlNet": (
        controlnet, "forward",
        lambda rows, step: {**unet_call(rows, step), "controlnet_cond": rand(rows, 3, 16, 16), "conditioning_scale": 0.5},
    ),
    "SD3": (
        sd3, "forward",
        lambda rows, step: {
            "hidden_states": rand(rows, 4, 8, 8), "encoder_hidden_states": rand(rows, 7, 16),
            "pooled_projections": rand(rows, 8), "timestep": torch.full((rows,), step),
        },
    ),
    "FLUX": (
        flux, "forward",
        lambda rows, step: {
            "hidden_states": rand(rows, 16, 4), "encoder_hidden_states": rand(rows, 2, 16),
            "pooled_projections": rand(rows, 8), "timestep": torch.full((rows,), step / 1000, dtype=torch.float64),
            "guidance": torch.full((rows,), 3.5, dtype=torch.float64), "txt_ids": IDS.clone(),
            "img_ids": torch.arange(48.0, dtype=torch.float64).reshape(16, 3), "return_dict": False,
        },
    ),
    "Qwen-Image": (qwen, "forward", qwen_call),
    "Qwen-Image-Edit 2511": (
        lambda: qwen(zero_cond_t=True), "forward",
        lambda rows, step: {**qwen_call(rows, step), "img_shapes": [[(1, 2, 4), (1, 4, 2)]] * rows},
    ),
    "Chroma": (
        chroma, "forward",
        lambda rows, step: {
            "hidden_states": rand(rows, 16, 4), "encoder_hidden_states": rand(rows, 2, 16),
            "timestep": torch.full((rows,), step / 1000, dtype=torch.float64), "txt_ids": IDS.clone(),
            "img_ids": torch.arange(48.0, dtype=torch.float64).reshape(16, 3), "return_dict": False,
            "attention_mask": torch.ones(rows, 18, dtype=torch.bool),
        },
    ),
    "FLUX.2": (
        flux2, "forward",
        lambda rows, step: {
            "hidden_states": rand(rows, 16, 4), "encoder_hidden_states": rand(rows, 2, 16),
            "timestep": torch.full((rows,), step / 1000, dtype=torch.float64), "return_dict": False,
            "guidance": torch.full((rows,), 3.5, dtype=torch.float64),
            "txt_ids": torch.arange(8.0, dtype=torch.float64).reshape(2, 4),
            "img_ids": torch.arange(64.0, dtype=torch.float64).reshape(16, 4),
        },
    ),
    "Lumina 2": (
        lumina2, "forward",
        lambda rows, step: {
            "hidden_states": rand(rows, 4, 8, 8), "encoder_hidden_states": rand(rows, 7, 16),
            "encoder_attention_mask": mask(rows, 7), "return_dict": False,
            "timestep": torch.full((rows,), step / 1000, dtype=torch.float64),
        },
    ),
    "Sana": (
        sana, "forward",
        lambda rows, step: {
            "hidden_states": rand(rows, 4, 8, 8), "encoder_hidden_states": rand(rows, 7, 16),
            "encoder_attention_mask": mask(rows, 7), "return_dict": False,
            "timestep": torch.full((rows,), step),
        },
    ),
    "VAE decode": (vae, "decode", lambda rows, step: {"z": rand(rows, 4, 8, 8), "generator": torch.Generator()}),
    "VAE encode": (vae, "encode", lambda rows, step: {"x": rand(rows, 3, 16, 16)}),
    "CLIP": (
        lambda: CLIPTextModel(CLIPTextConfig(**CLIP)), "forward",
        lambda rows, step: {"input_ids": torch.randint(3, 50, (rows, 9)), "output_hidden_states": True},
    ),
    "CLIP with a projection": (
        lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)), "forward",
        lambda rows, step: {"input_ids": torch.randint(3, 50, (rows, 9)), "output_hidden_states": True},
    ),
    "T5": (
        lambda: T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=50)), "forward",
        lambda rows, step: {"input_ids": torch.randint(3, 50, (rows, 9)), "output_hidden_states": False},
    ),
}  # fmt: skip


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "parameters") and hasattr(value, "sample"):
        return [value.parameters]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else []


def analysed(module: Any, method: str, kwargs: dict[str, Any]) -> Mergeable:
    found = analyse(getattr(module, method), type(module).__name__, (), kwargs)
    assert found is not None
    return found


def worst(ours: Any, alone: Any) -> float:
    assert type(ours) is type(alone)
    pairs = list(zip(leaves(ours), leaves(alone), strict=True))
    assert pairs
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", CASES)
def test_merged_calls_equal_those_made_alone(name: str) -> None:
    make, method, arguments = CASES[name]
    module = make().double().eval()
    kwargs = [arguments(rows, step) for rows, step in ((2, 981), (1, 40), (3, 500))]
    calls = [analysed(module, method, each) for each in kwargs]
    assert len({call.key for call in calls}) == 1
    with torch.no_grad():
        together = split(getattr(module, method)(**merge(calls)), [call.rows for call in calls])
        alone = [getattr(module, method)(**each) for each in kwargs]
        halves = [getattr(module, method)(**take(calls[2], *part).arguments) for part in ((0, 1), (1, 3))]
    assert max(worst(a, b) for a, b in zip(together, alone, strict=True)) < 1e-12
    assert worst(rejoin(halves), alone[2]) < 1e-12


@pytest.mark.parametrize(
    "change",
    [
        {"sample": rand(2, 4, 16, 8)},
        {"sample": torch.zeros(2, 4, 8, 8)},
        {"encoder_hidden_states": rand(2, 8, 16)},
        {"cross_attention_kwargs": {"scale": 0.5}},
        {"return_dict": False},
        {"class_labels": torch.tensor([1, 2])},
        {"mid_block_additional_residual": rand(2, 16, 4, 4)},
        {"encoder_attention_mask": torch.ones(2, 7)},
    ],
)
def test_calls_that_differ_in_more_than_rows_are_not_merged(change: dict[str, Any]) -> None:
    module = sd()
    one, other = unet_call(2, 5), {**unet_call(2, 5), **change}
    assert analysed(module, "forward", one).key != analysed(module, "forward", other).key


def test_whole_and_broken_timesteps_are_one_call_where_both_become_float32() -> None:
    module = sd().double().eval()
    whole = unet_call(2, 5)
    broken = {**unet_call(1, 5), "timestep": torch.tensor(500.5)}
    calls = [analysed(module, "forward", each) for each in (whole, broken)]
    assert calls[0].key == calls[1].key
    with torch.no_grad():
        together = split(module(**merge(calls)), [2, 1])
        assert max(worst(a, module(**b)) for a, b in zip(together, (whole, broken), strict=True)) < 1e-12
    transformer = sd3()
    of_sd3 = CASES["SD3"][2](1, 5)
    other = {**of_sd3, "timestep": of_sd3["timestep"].float()}
    assert analysed(transformer, "forward", of_sd3).key != analysed(transformer, "forward", other).key


def test_tensors_without_rows_must_be_equal_in_value() -> None:
    module, arguments = flux(), CASES["FLUX"][2]
    one, other = arguments(1, 5), arguments(1, 5)
    assert analysed(module, "forward", one).key == analysed(module, "forward", other).key
    other["txt_ids"][0, 0] += 1  # also in place, after it was looked at
    assert analysed(module, "forward", one).key != analysed(module, "forward", other).key


@pytest.mark.parametrize(
    "unknown",
    [
        {"something_new": rand(2, 3)},
        {"cross_attention_kwargs": {"ip_adapter_masks": [rand(2, 3)]}},
        {"added_cond_kwargs": {"image_hint": rand(2, 3)}},
        {"cross_attention_kwargs": {"gligen": {"boxes": rand(2, 3)}}},
        {"down_block_additional_residuals": (rand(1, 8, 8, 8),)},
        {"timestep": torch.tensor([1, 2, 3])},
        {"sample": torch.tensor(1.0)},
    ],
)
def test_what_the_rule_does_not_know_runs_alone(unknown: dict[str, Any]) -> None:
    assert analyse(sd().forward, "UNet2DConditionModel", (), {**unet_call(2, 5), **unknown}) is None


def test_lists_with_an_item_for_each_row_are_equal_or_the_calls_are_not_merged() -> None:
    """Qwen-Image takes the first item for all: portrait and landscape of as many pixels differ in nothing else."""
    module = qwen()
    landscape, portrait = qwen_call(1, 5, 2, 8), qwen_call(1, 5, 8, 2)
    assert analysed(module, "forward", landscape).key == analysed(module, "forward", qwen_call(2, 7, 2, 8)).key
    assert analysed(module, "forward", landscape).key != analysed(module, "forward", portrait).key
    mixed = {**qwen_call(2, 5, 2, 8), "img_shapes": [[(1, 2, 8)], [(1, 8, 2)]]}
    assert analyse(module.forward, "QwenImageTransformer2DModel", (), mixed) is None
    unknown = {**qwen_call(1, 5), "img_shapes": [object()]}
    assert analyse(module.forward, "QwenImageTransformer2DModel", (), unknown) is None


def test_a_first_dimension_that_happens_to_fit_is_no_row() -> None:
    """FLUX with two rows and two text tokens: txt_ids has two lines and is one for all rows."""
    module, arguments = flux().double().eval(), CASES["FLUX"][2]
    calls = [analysed(module, "forward", arguments(2, step)) for step in (3, 700)]
    assert merge(calls)["txt_ids"].shape == (2, 3)


@pytest.mark.parametrize("output", [object(), (torch.zeros(3), torch.zeros(())), torch.zeros(4, 2), {1, 2}])
def test_outputs_without_rows_are_not_guessed_at(output: Any) -> None:
    with pytest.raises(CannotSplit):
        split(output, [1, 2])


def test_rows_do_not_keep_the_batch_in_memory() -> None:
    first, _ = split(torch.zeros(100, 10), [1, 99])
    assert first.untyped_storage().nbytes() == 10 * 4
