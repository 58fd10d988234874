"""The bundled configurations, and how a checkpoint finds its own."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from api.engine.convert import checkpoint as conversion
from api.engine.convert import components, families, original
from api.errors import ApiError
from api.models.conversion import FAMILIES
from tests.checkpoints import clip_keys, open_clip_keys, unet_keys, vae_keys
from tests.running import ROOT

UNET = "model.diffusion_model."
# millions: the UNets' and encoders' published sizes. The refiner's UNet is what is left of its file on the Hub
# (6.08 GB in half precision) without the other two.
PARAMETERS = {
    "sd1": {"unet": 859.5, "vae": 83.65, "text_encoder": 123.06},
    "sd2": {"unet": 865.9, "vae": 83.65, "text_encoder": 340.4},
    "sd2-v": {"unet": 865.9, "vae": 83.65, "text_encoder": 340.4},
    "sdxl": {"unet": 2567.5, "vae": 83.65, "text_encoder": 123.06, "text_encoder_2": 694.7},
    "sdxl-refiner": {"unet": 2259.5, "vae": 83.65, "text_encoder_2": 694.7},
}
PROMPT = "a photo of an astronaut riding a horse on mars"
PROMPT_IDS = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]


def models_of(family: str, folder: Path) -> dict[str, torch.nn.Module]:
    index = families.lay_out(family, folder)
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and value[0]}
    built = {name: components.build(folder / name, *value) for name, value in pairs.items()}
    return {name: model for name, model in built.items() if model is not None}


def checkpoint_of(family: str, models: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """A checkpoint of full size, without data."""
    state = {name: dict(model.state_dict()) for name, model in models.items()}
    out = unet_keys(state["unet"], 2) | vae_keys(state["vae"])
    if family == "sd1":
        return out | clip_keys(state["text_encoder"])
    if family.startswith("sd2"):
        last = {"cond_stage_model.model.transformer.resblocks.23.ln_1.weight": torch.zeros(1024)}
        return out | open_clip_keys(state["text_encoder"], "cond_stage_model.model.") | last
    if family == "sdxl":
        out |= clip_keys(state["text_encoder"], "conditioner.embedders.0.transformer.")
        return out | open_clip_keys(state["text_encoder_2"], "conditioner.embedders.1.model.")
    return out | open_clip_keys(state["text_encoder_2"], "conditioner.embedders.0.model.")


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_the_known_sizes_that_the_original_layout_fills(family: str, tmp_path: Path) -> None:
    """Names and shapes: built without data, turned into the original layout, recognised, and found again whole."""
    models = models_of(family, tmp_path)
    counts = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}
    assert counts == {name: pytest.approx(count, rel=5e-4) for name, count in PARAMETERS[family].items()}
    checkpoint = checkpoint_of(family, models)
    found = families.recognise(checkpoint)
    assert found is not None and found.family == family.removesuffix("-v")
    for name, model in models.items():
        expected = model.state_dict()
        weights = components.weights(name, model, checkpoint)
        assert {key: value.shape for key, value in weights.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_configuration_is_one_that_diffusers_takes_whole(family: str) -> None:
    index = json.loads((families.CONFIGS / family / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"])
    named = {key for key in index if not key.startswith("_")}
    expected, optional = pipeline._get_signature_keys(pipeline)
    assert named <= set(expected) | set(optional)
    assert set(expected) - set(pipeline._optional_components) <= named
    scheduler = json.loads((families.CONFIGS / family / "scheduler" / "scheduler_config.json").read_text())
    cls = getattr(diffusers, scheduler["_class_name"])
    assert index["scheduler"] == ["diffusers", scheduler["_class_name"]]
    made = cls.from_config(scheduler)
    assert made.alphas_cumprod[-1].item() == pytest.approx(0.00466, abs=1e-5)
    assert made.config.prediction_type == ("v_prediction" if family == "sd2-v" else "epsilon")


def test_the_families_are_those_that_are_bundled() -> None:
    assert {path.name for path in families.CONFIGS.iterdir() if path.is_dir()} == set(FAMILIES)


@pytest.mark.parametrize(("family", "name", "pad"), [("sd1", "tokenizer", 49407), ("sdxl", "tokenizer_2", 0)])
def test_the_tokenizer_is_clips(family: str, name: str, pad: int, tmp_path: Path) -> None:
    families.lay_out(family, tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / name)
    assert tokenizer(PROMPT).input_ids == PROMPT_IDS
    assert tokenizer(PROMPT.upper()).input_ids == PROMPT_IDS
    padded = tokenizer(PROMPT, padding="max_length", max_length=77).input_ids
    assert padded == PROMPT_IDS + [pad] * (77 - len(PROMPT_IDS))
    assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)
    assert tokenizer.unk_token_id == 49407


def telling(context: int, channels: int, text: str, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"{UNET}input_blocks.0.0.weight": torch.empty(320, channels, 3, 3, device="meta"),
        f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.empty(1280, context, device="meta"),
        text: torch.empty(1, device="meta"),
        **more,
    }


SD1, SD2 = "cond_stage_model.transformer.text_model.x", "cond_stage_model.model.ln_final.weight"
XL, REFINER = "conditioner.embedders.1.model.ln_final.weight", "conditioner.embedders.0.model.ln_final.weight"


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        (telling(768, 4, SD1), ("sd1", 4, None, False)),
        (telling(768, 4, "cond_stage_model.transformer.embeddings.x"), ("sd1", 4, None, False)),
        (telling(768, 9, SD1), ("sd1", 9, "StableDiffusionInpaintPipeline", False)),
        (telling(768, 8, SD1), ("sd1", 8, "StableDiffusionInstructPix2PixPipeline", False)),
        (telling(1024, 4, SD2), ("sd2", 4, None, None)),
        (telling(1024, 4, SD2, global_step=torch.tensor(875_000)), ("sd2", 4, None, False)),
        (telling(1024, 4, SD2, global_step=torch.tensor(110_000)), ("sd2", 4, None, True)),
        (telling(1024, 4, SD2, v_pred=torch.empty(0)), ("sd2", 4, None, True)),
        (telling(1024, 9, SD2), ("sd2", 9, "StableDiffusionInpaintPipeline", False)),
        (telling(2048, 4, XL), ("sdxl", 4, None, False)),
        (telling(2048, 4, XL, v_pred=torch.empty(0)), ("sdxl", 4, None, True)),
        (telling(2048, 9, XL), ("sdxl", 9, "StableDiffusionXLInpaintPipeline", False)),
        (telling(1280, 4, REFINER), ("sdxl-refiner", 4, None, False)),
    ],
)
def test_a_checkpoint_is_recognised(checkpoint: dict[str, torch.Tensor], expected: tuple[object, ...]) -> None:
    found = families.recognise(checkpoint)
    assert found is not None
    assert (found.family, found.in_channels, found.pipeline, found.velocity) == expected


@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        {"double_blocks.0.img_attn.norm.key_norm.scale": torch.empty(1)},
        telling(768, 5, SD1),  # depth
        telling(1280, 9, REFINER),
        telling(512, 4, SD1),
        telling(768, 4, "first_stage_model.x"),  # a UNet without its text encoder
    ],
)
def test_what_is_none_of_them_is_not_taken_for_one(checkpoint: dict[str, torch.Tensor]) -> None:
    assert families.recognise(checkpoint) is None


def test_one_call_tells_velocity_from_noise() -> None:
    """The demo model was trained on velocity; turned into noise by the definition, it is seen as that."""
    unet = UNet2DConditionModel.from_pretrained(ROOT / "models" / "shapes" / "unet").float()
    pipe_config = json.loads((ROOT / "models" / "shapes" / "scheduler" / "scheduler_config.json").read_text())
    kept = DDIMScheduler.from_config(pipe_config).alphas_cumprod[999].sqrt()
    lost = (1 - kept**2).sqrt()

    def velocity(latents: torch.Tensor, step: int, states: torch.Tensor) -> torch.Tensor:
        return unet(latents, step, states).sample

    def noise(latents: torch.Tensor, step: int, states: torch.Tensor) -> torch.Tensor:
        return kept * velocity(latents, step, states) + lost * latents

    with torch.inference_mode():
        assert families.predicts_velocity(velocity, 128)
        assert not families.predicts_velocity(noise, 128)


def weights_case(tmp_path: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    unet = components.build(ROOT / "models" / "shapes" / "unet", "diffusers", "UNet2DConditionModel")
    assert unet is not None
    return unet, unet_keys(unet.state_dict(), 1)


def test_missing_left_over_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    unet, checkpoint = weights_case(tmp_path)
    key = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    assert key in checkpoint
    ours = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    lacking = {name: value for name, value in checkpoint.items() if name != key}
    with pytest.raises(ApiError, match=f"lacks these weights of unet: {ours}") as caught:
        components.weights("unet", unet, lacking)
    assert caught.value.code == "MODEL_BROKEN"
    with pytest.raises(ApiError, match=r"has other shapes for these weights of unet: .*to_k"):
        components.weights("unet", unet, checkpoint | {key: torch.empty(128, 64, device="meta")})
    more = {key.replace("blocks.0", "blocks.1"): checkpoint[key]}
    with pytest.raises(ApiError, match=r"has no place for these weights of unet: .*blocks\.1"):
        components.weights("unet", unet, checkpoint | more)


ORIGINAL = """
model:
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    {extra}
    scale_factor: 0.18215
    unet_config:
      params:
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: [1, 2, 4, 4]
        num_head_channels: 64
        use_linear_in_transformer: True
        transformer_depth: 1
        context_dim: 1024
    first_stage_config:
      params:
        ddconfig: {{z_channels: 4, in_channels: 3, out_ch: 3, ch: 128, ch_mult: [1, 2, 4, 4], num_res_blocks: 2}}
"""


@pytest.mark.parametrize(("extra", "velocity"), [("parameterization: v", True), ("", False)])
def test_an_original_configuration_says_what_the_bundled_one_says(extra: str, velocity: bool, tmp_path: Path) -> None:
    path = tmp_path / "v2-inference.yaml"
    path.write_text(ORIGINAL.format(extra=extra))
    read = original.read(path)
    assert original.predicts_velocity(read) is velocity
    family = "sd2-v" if velocity else "sd2"
    said = original.changes(path, read, telling(1024, 4, SD2))
    for name, file in (("unet", "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        bundled = json.loads((families.CONFIGS / family / name / file).read_text())
        assert {key: bundled[key] for key in said[name] if key in bundled} == {
            key: value for key, value in said[name].items() if key in bundled
        }
        assert all(value in (None, 1) for key, value in said[name].items() if key not in bundled)


V_YAML = ORIGINAL.format(extra="parameterization: v")
NARROW = V_YAML.replace("linear_end: 0.0120", "linear_end: 0.02").replace("scale_factor: 0.18215", "scale_factor: 0.5")


@pytest.mark.parametrize(
    ("checkpoint", "config", "expected"),
    [
        (telling(768, 4, SD1), "", {"pipeline": "StableDiffusionPipeline", "prediction_type": "epsilon"}),
        (telling(768, 9, SD1), "", {"pipeline": "StableDiffusionInpaintPipeline", "in_channels": 9}),
        (telling(768, 9, SD1), "sd1", {"pipeline": "StableDiffusionInpaintPipeline", "in_channels": 9}),
        (telling(1024, 4, SD2, v_pred=torch.empty(0)), "", {"prediction_type": "v_prediction", "sample_size": 96}),
        (telling(1024, 4, SD2), "sd2-v", {"prediction_type": "v_prediction", "sample_size": 96}),
        (telling(1024, 4, SD2, v_pred=torch.empty(0)), "sd2", {"prediction_type": "epsilon", "sample_size": 64}),
        (telling(1024, 4, SD2), V_YAML, {"prediction_type": "v_prediction", "sample_size": 96, "beta_end": 0.012}),
        (telling(1024, 4, SD2), NARROW, {"beta_end": 0.02, "scaling_factor": 0.5}),
        (telling(2048, 4, XL), "", {"prediction_type": "epsilon", "rescale_betas_zero_snr": None}),
        (
            telling(2048, 4, XL, v_pred=torch.empty(0), ztsnr=torch.empty(0)),
            "",
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ),
    ],
)
def test_what_is_written_follows_the_checkpoint_and_what_was_asked(
    checkpoint: dict[str, torch.Tensor], config: str, expected: dict[str, object], tmp_path: Path
) -> None:
    if "\n" in config:
        (tmp_path / "given.yaml").write_text(config)
        config = str(tmp_path / "given.yaml")
    folder = tmp_path / "out"
    folder.mkdir()
    index = conversion.configuration(checkpoint, folder, config)
    written = {"pipeline": index["_class_name"]}
    for name in ("vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"):
        written |= {key: value for key, value in json.loads((folder / name).read_text()).items() if key[0] != "_"}
        if name.startswith("vae"):
            written = {key: written[key] for key in ("pipeline", "scaling_factor")}
    assert {key: written.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "model: {params: []}",
        "model: {params: {}}",
        "a: [",
        "<html>",
        "!!python/object/apply:os.system ['true']",
    ],
)
def test_what_is_no_original_configuration_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ApiError, match=r"x\.yaml is not an original configuration") as caught:
        original.changes(path, original.read(path), telling(768, 4, SD1))
    assert (caught.value.code, caught.value.field) == ("MODEL_BROKEN", "callInputs.CHECKPOINT_CONFIG_URL")


def test_an_original_configuration_of_sdxl_says_velocity_by_its_scaling(tmp_path: Path) -> None:
    path = tmp_path / "sdxl.yaml"
    for scaling, velocity in (("VScaling", True), ("EpsScaling", False)):
        target = f"sgm.modules.diffusionmodules.denoiser_scaling.{scaling}"
        said = {"denoiser_config": {"params": {"scaling_config": {"target": target}}}}
        path.write_text(json.dumps({"model": {"params": said}}))
        assert original.predicts_velocity(original.read(path)) is velocity


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"_class_name": "X", "../x": ["diffusers", "UNet2DConditionModel"]}']
)
def test_a_folder_that_is_no_model_is_no_configuration(index: str, tmp_path: Path) -> None:
    config, folder = tmp_path / "config", tmp_path / "out"
    config.mkdir()
    folder.mkdir()
    (config / "model_index.json").write_text(index)
    with pytest.raises(ApiError, match=r"model_index\.json") as caught:
        conversion.configuration({}, folder, str(config))
    assert (caught.value.code, caught.value.field) == ("MODEL_BROKEN", "callInputs.CHECKPOINT_CONFIG_URL")
    assert {path.name for path in tmp_path.iterdir()} == {"config", "out"} and not list(folder.iterdir())


def test_pipelines_that_are_chosen_by_channels_exist() -> None:
    for by_family in families._BY_CHANNELS.values():
        assert all(hasattr(diffusers, name) for name in by_family.values())


def tiny(text: str) -> dict[str, torch.nn.Module]:
    """Small models with every kind of layer that the families have, and random weights."""
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 99,
    }
    clip = CLIPTextModel if text == "CLIPTextModel" else CLIPTextModelWithProjection
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 3],
        attention_head_dim=[1, 2, 2],
        cross_attention_dim=32,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        norm_num_groups=4,
    )
    return {"unet": unet, "vae": vae, "text": clip(CLIPTextConfig(projection_dim=32, **sizes))}


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("CLIPTextModel", "cond_stage_model.transformer."),
        ("CLIPTextModel", "conditioner.embedders.0.transformer."),
        ("CLIPTextModel", "cond_stage_model.model."),
        ("CLIPTextModelWithProjection", "conditioner.embedders.1.model."),
        ("CLIPTextModelWithProjection", "conditioner.embedders.0.model."),
        ("CLIPTextModel", "without text_model"),
    ],
)
def test_every_value_finds_its_place(text: str, layout: str) -> None:
    """Not names and shapes only: a projection that is transposed, or queries in the place of keys, have both right."""
    models = tiny(text)
    state = {name: model.state_dict() for name, model in models.items()}
    checkpoint = unet_keys(state["unet"], 2) | vae_keys(state["vae"])
    if layout == "without text_model":  # as some early merges have it
        checkpoint |= {key.replace("text_model.", ""): value for key, value in clip_keys(state["text"]).items()}
    else:
        checkpoint |= (open_clip_keys if layout.endswith(".model.") else clip_keys)(state["text"], layout)
    if layout == "conditioner.embedders.1.model.":  # SDXL has another one beside it, of another width
        other = {"embeddings.position_embedding.weight": torch.zeros(77, 16)}
        checkpoint |= clip_keys(other, "conditioner.embedders.0.transformer.")
    for name, model in models.items():
        found = components.weights(name, model, checkpoint)
        assert found.keys() == state[name].keys()
        for key, value in state[name].items():
            assert torch.equal(found[key], value), f"{name} {key}"
