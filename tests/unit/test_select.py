"""Which files of a repository a pipeline needs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import ApiError
from api.models.select import Selection, select_files

WEIGHTLESS = {
    "scheduler": ["scheduler_config.json"],
    "tokenizer": ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"],
    "t5_tokenizer": ["special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"],
    "feature_extractor": ["preprocessor_config.json"],
}
ROOT_JUNK = [".gitattributes", "README.md", "LICENSE.md", "comfy.png", "teaser.jpg", "sample/a.png"]


def index(class_name: str, **parts: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": "0.30.0", "requires_safety_checker": True}
    for name, kind in parts.items():
        found[name] = [None, None] if kind is None else kind.split(".")
    return found


def under(folder: str, *names: str) -> list[str]:
    return [f"{folder}/{name}" for name in names]


def dm(*kinds: str) -> list[str]:
    return [f"diffusion_pytorch_model.{kind}" for kind in kinds]


SD15_INDEX = index(
    "StableDiffusionPipeline",
    feature_extractor="transformers.CLIPImageProcessor",
    safety_checker="stable_diffusion.StableDiffusionSafetyChecker",
    scheduler="diffusers.PNDMScheduler",
    text_encoder="transformers.CLIPTextModel",
    tokenizer="transformers.CLIPTokenizer",
    unet="diffusers.UNet2DConditionModel",
    vae="diffusers.AutoencoderKL",
)
FOUR = ("bin", "fp16.bin", "fp16.safetensors", "safetensors")
SD15 = [
    *ROOT_JUNK,
    "model_index.json",
    "v1-inference.yaml",
    "v1-5-pruned-emaonly.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    *under("feature_extractor", "preprocessor_config.json"),
    *under("safety_checker", "config.json", "model.safetensors", "model.fp16.safetensors"),
    *under("safety_checker", "pytorch_model.bin", "pytorch_model.fp16.bin", "flax_model.msgpack"),
    *under("scheduler", "scheduler_config.json"),
    *under("text_encoder", "config.json", "model.safetensors", "model.fp16.safetensors"),
    *under("text_encoder", "pytorch_model.bin", "pytorch_model.fp16.bin", "openvino_model.bin", "openvino_model.xml"),
    *under("tokenizer", *WEIGHTLESS["tokenizer"]),
    *under("unet", "config.json", *dm(*FOUR, "non_ema.bin", "non_ema.safetensors"), "model.onnx", "weights.pb"),
    *under("vae", "config.json", *dm(*FOUR)),
    *under("vae_decoder", "model.onnx", "model.onnx_data"),
]
SD15_CONFIGS = [
    "feature_extractor/preprocessor_config.json",
    "model_index.json",
    "safety_checker/config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    *under("tokenizer", *WEIGHTLESS["tokenizer"]),
    "unet/config.json",
    "vae/config.json",
]


@pytest.mark.parametrize("precision", ["", "fp32", "fp16", "bf16"])
def test_sd15(precision: str) -> None:
    chosen = select_files(SD15, SD15_INDEX, precision)
    middle = ".fp16" if precision == "fp16" else ""
    weights = [
        *(f"{part}/model{middle}.safetensors" for part in ("safety_checker", "text_encoder")),
        *(f"{part}/diffusion_pytorch_model{middle}.safetensors" for part in ("unet", "vae")),
    ]
    assert sorted(chosen.files) == sorted(SD15_CONFIGS + weights)
    assert chosen.variant == ("fp16" if precision == "fp16" else "")
    assert not chosen.needs_conversion
    # asked for bf16, there is none: all of them are cast on load
    assert chosen.plain == (("safety_checker", "text_encoder", "unet", "vae") if precision == "bf16" else ())


def test_parts_saved_as_null_are_left_out() -> None:
    without = {**SD15_INDEX, "safety_checker": [None, None], "feature_extractor": [None, None]}
    chosen = select_files(SD15, without, "")
    assert not any(name.startswith(("safety_checker/", "feature_extractor/")) for name in chosen.files)
    assert "unet/diffusion_pytorch_model.safetensors" in chosen.files


def test_sdxl_base() -> None:
    parts = index(
        "StableDiffusionXLPipeline",
        scheduler="diffusers.EulerDiscreteScheduler",
        text_encoder="transformers.CLIPTextModel",
        text_encoder_2="transformers.CLIPTextModelWithProjection",
        tokenizer="transformers.CLIPTokenizer",
        tokenizer_2="transformers.CLIPTokenizer",
        unet="diffusers.UNet2DConditionModel",
        vae="diffusers.AutoencoderKL",
        image_encoder=None,
    )
    clip = ("config.json", "flax_model.msgpack", "model.fp16.safetensors", "model.onnx", "model.safetensors")
    names = [
        *ROOT_JUNK,
        "01.png",
        "model_index.json",
        "sd_xl_base_1.0.safetensors",
        "sd_xl_base_1.0_0.9vae.safetensors",
        "sd_xl_offset_example-lora_1.0.safetensors",
        "scheduler/scheduler_config.json",
        *under("text_encoder", *clip, "openvino_model.bin", "openvino_model.xml"),
        *under("text_encoder_2", *clip, "model.onnx_data"),
        *under("tokenizer", *WEIGHTLESS["tokenizer"]),
        *under("tokenizer_2", *WEIGHTLESS["tokenizer"]),
        *under("unet", "config.json", *dm("fp16.safetensors", "safetensors", "msgpack"), "model.onnx"),
        *under("vae", "config.json", *dm("fp16.safetensors", "safetensors", "msgpack")),
        *under("vae_1_0", "config.json", *dm("fp16.safetensors", "safetensors")),
        *under("vae_encoder", "config.json", "model.onnx"),
    ]
    chosen = select_files(names, parts, "fp16")
    assert [n for n in chosen.files if n.endswith(".safetensors")] == [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert set(under("tokenizer_2", *WEIGHTLESS["tokenizer"])) <= set(chosen.files)
    assert not any(n.endswith((".onnx", ".xml", ".msgpack", ".png", ".bin")) for n in chosen.files)
    assert not any(n.startswith("vae_") for n in chosen.files)
    assert (chosen.variant, chosen.plain, chosen.needs_conversion) == ("fp16", (), False)


def shards(base: str, count: int, variant: str = "", old: bool = False) -> list[str]:
    front, back = (f".{variant}", "") if variant and not old else ("", f".{variant}" if variant else "")
    return [f"{base}{front}-{i:05}-of-{count:05}{back}.safetensors" for i in range(1, count + 1)]


def test_flux_dev() -> None:
    parts = index(
        "FluxPipeline",
        scheduler="diffusers.FlowMatchEulerDiscreteScheduler",
        text_encoder="transformers.CLIPTextModel",
        text_encoder_2="transformers.T5EncoderModel",
        tokenizer="transformers.CLIPTokenizer",
        tokenizer_2="transformers.T5TokenizerFast",
        transformer="diffusers.FluxTransformer2DModel",
        vae="diffusers.AutoencoderKL",
    )
    needed = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        *under("text_encoder", "config.json", "model.safetensors"),
        *under("text_encoder_2", "config.json", *shards("model", 2), "model.safetensors.index.json"),
        *under("tokenizer", *WEIGHTLESS["tokenizer"]),
        *under("tokenizer_2", *WEIGHTLESS["t5_tokenizer"]),
        *under("transformer", "config.json", *shards("diffusion_pytorch_model", 3)),
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        *under("vae", "config.json", *dm("safetensors")),
    ]
    junk = [*ROOT_JUNK, "dev_grid.jpg", "flux1-dev.safetensors", "ae.safetensors"]
    for precision in ("", "bf16", "fp16"):
        chosen = select_files(needed + junk, parts, precision)
        assert chosen.files == tuple(sorted(needed))
        assert chosen.variant == ""
    assert select_files(needed, parts, "bf16").plain == ("text_encoder", "text_encoder_2", "transformer", "vae")


SD3_INDEX = index(
    "StableDiffusion3Pipeline",
    scheduler="diffusers.FlowMatchEulerDiscreteScheduler",
    text_encoder="transformers.CLIPTextModelWithProjection",
    text_encoder_2="transformers.CLIPTextModelWithProjection",
    text_encoder_3="transformers.T5EncoderModel",
    tokenizer="transformers.CLIPTokenizer",
    tokenizer_2="transformers.CLIPTokenizer",
    tokenizer_3="transformers.T5TokenizerFast",
    transformer="diffusers.SD3Transformer2DModel",
    vae="diffusers.AutoencoderKL",
)
SD3_T5_PLAIN = under("text_encoder_3", *shards("model", 2), "model.safetensors.index.json")
SD3_T5_FP16 = under("text_encoder_3", *shards("model", 2, "fp16"), "model.safetensors.index.fp16.json")
SD3 = [
    *ROOT_JUNK,
    "model_index.json",
    "sd3_medium.safetensors",
    "sd3_medium_incl_clips_t5xxlfp16.safetensors",
    "text_encoders/clip_g.safetensors",
    "scheduler/scheduler_config.json",
    *under("text_encoder", "config.json", "model.safetensors", "model.fp16.safetensors"),
    *under("text_encoder_2", "config.json", "model.safetensors", "model.fp16.safetensors"),
    "text_encoder_3/config.json",
    *SD3_T5_PLAIN,
    *SD3_T5_FP16,
    *under("tokenizer", *WEIGHTLESS["tokenizer"]),
    *under("tokenizer_2", *WEIGHTLESS["tokenizer"]),
    *under("tokenizer_3", *WEIGHTLESS["t5_tokenizer"]),
    *under("transformer", "config.json", *dm("safetensors")),
    *under("vae", "config.json", *dm("safetensors")),
]


def test_sd3_takes_the_variant_where_it_is_and_says_where_it_is_not() -> None:
    plain = select_files(SD3, SD3_INDEX, "")
    assert set(SD3_T5_PLAIN) <= set(plain.files)
    assert not set(SD3_T5_FP16) & set(plain.files)
    assert not any("fp16" in name for name in plain.files)
    half = select_files(SD3, SD3_INDEX, "fp16")
    assert set(SD3_T5_FP16) <= set(half.files)
    assert not set(SD3_T5_PLAIN) & set(half.files)
    assert "transformer/diffusion_pytorch_model.safetensors" in half.files
    assert half.variant == "fp16"
    assert half.plain == ("transformer", "vae")
    assert not any(name.startswith("text_encoders/") for name in half.files)


def test_pixart_with_a_sharded_encoder_and_a_sentencepiece_tokenizer() -> None:
    parts = index(
        "PixArtAlphaPipeline",
        scheduler="diffusers.DPMSolverMultistepScheduler",
        text_encoder="transformers.T5EncoderModel",
        tokenizer="transformers.T5Tokenizer",
        transformer="diffusers.Transformer2DModel",
        vae="diffusers.AutoencoderKL",
    )
    needed = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        *under("text_encoder", "config.json", *shards("model", 2), "model.safetensors.index.json"),
        *under("tokenizer", "added_tokens.json", "special_tokens_map.json", "spiece.model", "tokenizer_config.json"),
        *under("transformer", "config.json", *dm("safetensors")),
        *under("vae", "config.json", *dm("safetensors")),
    ]
    twins = [
        *under("text_encoder", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        "text_encoder/pytorch_model.bin.index.json",
        *under("transformer", *dm("bin")),
    ]
    chosen = select_files(needed + twins + ROOT_JUNK, parts, "")
    assert chosen.files == tuple(sorted(needed))
    assert not chosen.needs_conversion


def test_kandinsky_with_parts_of_its_own_names() -> None:
    parts = index(
        "KandinskyV22PriorPipeline",
        image_encoder="transformers.CLIPVisionModelWithProjection",
        image_processor="transformers.CLIPImageProcessor",
        prior="diffusers.PriorTransformer",
        scheduler="diffusers.UnCLIPScheduler",
        text_encoder="transformers.CLIPTextModelWithProjection",
        tokenizer="transformers.CLIPTokenizer",
    )
    needed = [
        "model_index.json",
        *under("image_encoder", "config.json", "model.safetensors"),
        "image_processor/preprocessor_config.json",
        *under("prior", "config.json", *dm("safetensors")),
        "scheduler/scheduler_config.json",
        *under("text_encoder", "config.json", "model.safetensors"),
        *under("tokenizer", *WEIGHTLESS["tokenizer"], "nested/extra/rules.txt"),
    ]
    twins = [*under("prior", *dm("bin")), "image_encoder/pytorch_model.bin", "text_encoder/pytorch_model.bin"]
    assert select_files(needed + twins, parts, "").files == tuple(sorted(needed))


def test_only_bin_is_taken_and_marked() -> None:
    only = [n for n in SD15 if not n.endswith(".safetensors")]
    chosen = select_files(only, SD15_INDEX, "")
    assert chosen.needs_conversion
    assert [n for n in chosen.files if n.endswith(".bin")] == [
        "safety_checker/pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
    ]
    half = select_files(only, SD15_INDEX, "fp16")
    assert "unet/diffusion_pytorch_model.fp16.bin" in half.files
    assert (half.variant, half.needs_conversion, half.plain) == ("fp16", True, ())


def test_bin_of_one_part_alone() -> None:
    names = [n for n in SD15 if not (n.startswith("safety_checker/") and n.endswith(".safetensors"))]
    chosen = select_files(names, SD15_INDEX, "")
    assert [n for n in chosen.files if n.endswith(".bin")] == ["safety_checker/pytorch_model.bin"]
    assert chosen.needs_conversion


def test_sharded_bin() -> None:
    pieces = under("text_encoder", *(f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)))
    names = ["model_index.json", "text_encoder/config.json", *pieces, "text_encoder/pytorch_model.bin.index.json"]
    chosen = select_files([*names, "text_encoder/training_args.bin"], ENCODER, "")
    assert chosen.files == tuple(sorted(names))


ENCODER = index("SomePipeline", text_encoder="transformers.T5EncoderModel")


def encoder(*names: str) -> list[str]:
    return ["model_index.json", "text_encoder/config.json", *under("text_encoder", *names)]


@pytest.mark.parametrize(
    ("variant_shards", "variant_index"),
    [
        (shards("model", 2, "fp16"), "model.safetensors.index.fp16.json"),
        (shards("model", 2, "fp16"), "model.fp16.safetensors.index.json"),
        (shards("model", 2, "fp16", old=True), "model.safetensors.index.fp16.json"),
        (shards("model", 2, "fp16", old=True), "model.safetensors.fp16.index.json"),
    ],
)
def test_shards_of_a_variant_in_every_style(variant_shards: list[str], variant_index: str) -> None:
    plain = [*shards("model", 3), "model.safetensors.index.json"]
    names = encoder(*plain, *variant_shards, variant_index)
    assert select_files(names, ENCODER, "fp16").files == tuple(sorted(encoder(*variant_shards, variant_index)))
    assert select_files(names, ENCODER, "").files == tuple(sorted(encoder(*plain)))


def test_half_a_set_of_a_variant_is_not_taken() -> None:
    plain = [*shards("model", 2), "model.safetensors.index.json"]
    for half in ([shards("model", 2, "fp16")[0], "model.safetensors.index.fp16.json"], shards("model", 2, "fp16")):
        chosen = select_files(encoder(*plain, *half), ENCODER, "fp16")
        assert chosen == Selection(tuple(sorted(encoder(*plain))), "", False, ("text_encoder",))


def test_half_a_plain_set_is_an_error() -> None:
    for half in ([shards("model", 2)[1], "model.safetensors.index.json"], shards("model", 2)):
        with pytest.raises(ApiError, match=r"text_encoder.*not all of them or no index") as told:
            select_files(encoder(*half), ENCODER, "")
        assert told.value.code == "MODEL_BROKEN"


def test_a_plain_precision_never_takes_a_variant() -> None:
    names = encoder("model.fp16.safetensors")
    with pytest.raises(ApiError, match="MODEL_PRECISION") as told:
        select_files(names, ENCODER, "")
    assert told.value.body()["available"] == ["fp16"]
    assert told.value.field == "callInputs.MODEL_PRECISION"
    with pytest.raises(ApiError):
        select_files(names, ENCODER, "bf16")
    assert select_files(names, ENCODER, "fp16").variant == "fp16"
    # beside a plain .bin the variant is still not what was asked for
    chosen = select_files([*names, "text_encoder/pytorch_model.bin"], ENCODER, "")
    assert chosen.needs_conversion
    assert "text_encoder/model.fp16.safetensors" not in chosen.files


def test_a_single_file_checkpoint_names_the_way_in() -> None:
    names = ["README.md", "dreamshaper_8.safetensors", "old.ckpt", "preview.png"]
    with pytest.raises(ApiError, match="CHECKPOINT_URL") as told:
        select_files(names, {}, "fp16")
    assert told.value.code == "MODEL_BROKEN"
    assert told.value.available == ["dreamshaper_8.safetensors", "old.ckpt"]
    with pytest.raises(ApiError, match="not a diffusers pipeline"):
        select_files(["config.json", "pytorch_model.bin.index.json"], {}, "")


def test_other_frameworks_only() -> None:
    with pytest.raises(ApiError, match=r"no safetensors or \.bin weights, only \.msgpack, \.onnx"):
        select_files(encoder("flax_model.msgpack", "model.onnx"), ENCODER, "")
    with pytest.raises(ApiError, match="has no safetensors"):
        select_files(encoder("elsewhere/model.safetensors"), ENCODER, "")
    with pytest.raises(ApiError, match=r'"unet" .*is missing'):
        select_files([*SD15_CONFIGS[:1], "model_index.json"], {"_class_name": "X", "unet": ["diffusers", "U"]}, "")


def test_a_part_without_its_configuration_is_an_error() -> None:
    names = [*SD15, "scheduler/notes.txt"]
    for lost in ("text_encoder/config.json", "scheduler/scheduler_config.json"):
        with pytest.raises(ApiError, match=f"has no {lost.rpartition('/')[2]}"):
            select_files([n for n in names if n != lost], SD15_INDEX, "")


@pytest.mark.parametrize(
    "name", ["CLIPImageProcessorPil", "TokenizersBackend", "T5TokenizerFast", "CLIPFeatureExtractor"]
)
def test_what_has_no_weights_is_known_by_its_class(name: str) -> None:
    chosen = select_files(["model_index.json", "part/x.json"], index("P", part=f"transformers.{name}"), "fp16")
    assert chosen == Selection(("model_index.json", "part/x.json"), "", False)


@pytest.mark.parametrize("name", ["text_encoder/../../x/model.safetensors", "text_encoder//model.safetensors"])
def test_a_name_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(ApiError) as told:
        select_files([*encoder(), name], ENCODER, "")
    assert told.value.code == "MODEL_BROKEN"
    with pytest.raises(ApiError, match="unsafe"):
        select_files(["model_index.json", "../a.json"], {"_class_name": "X", "..": ["custom", "X"]}, "")


def test_several_controlnets_lie_beside_each_other() -> None:
    parts = index("StableDiffusionControlNetPipeline", controlnet="x.MultiControlNetModel")
    names = ["model_index.json"]
    for folder in ("controlnet", "controlnet_1", "controlnet_2"):
        names += under(folder, "config.json", *dm("safetensors"))
    assert select_files([*names, "controlnet_old/config.json"], parts, "").files == tuple(sorted(names))


# -- made-up repositories ------------------------------------------------------------------------------------

FORMATS = ("safetensors", "bin")
VARIANTS = ("", "fp16", "bf16", "non_ema")


@st.composite
def repositories(draw: st.DrawFn) -> tuple[list[str], dict[str, Any], dict[str, set[tuple[str, str]]]]:
    """Names, model_index.json, and for each component the (format, variant) sets that are whole."""
    names = ["model_index.json", "README.md", "checkpoint.safetensors"]
    parts: dict[str, Any] = {"_class_name": "MadeUpPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    names.append("scheduler/scheduler_config.json")
    whole: dict[str, set[tuple[str, str]]] = {}
    for part in draw(st.lists(st.sampled_from(["unet", "vae", "text_encoder", "prior"]), unique=True, min_size=1)):
        parts[part] = ["diffusers", "SomeModel"]
        names.append(f"{part}/config.json")
        whole[part] = set()
        for format_ in FORMATS:
            base = "diffusion_pytorch_model"
            for variant in draw(st.sets(st.sampled_from(VARIANTS))):
                middle = f".{variant}" if variant else ""
                count = draw(st.integers(0, 3))
                if count == 0:
                    names.append(f"{part}/{base}{middle}.{format_}")
                    whole[part].add((format_, variant))
                    continue
                missing = draw(st.sampled_from([None, None, "shard", "index"]))
                pieces = [f"{part}/{base}{middle}-{i:05}-of-{count:05}.{format_}" for i in range(1, count + 1)]
                names += pieces[1:] if missing == "shard" else pieces
                if missing != "index":
                    names.append(f"{part}/{base}.{format_}.index{middle}.json")
                if missing is None:
                    whole[part].add((format_, variant))
    if draw(st.booleans()):
        parts["safety_checker"] = [None, None]
        names += ["safety_checker/config.json", "safety_checker/model.safetensors"]
    return draw(st.permutations(names)), parts, whole


@settings(max_examples=200, deadline=None)
@given(repositories(), st.sampled_from(["", "fp32", "fp16", "bf16"]))
def test_any_repository(
    repository: tuple[list[str], dict[str, Any], dict[str, set[tuple[str, str]]]], precision: str
) -> None:
    names, parts, whole = repository
    wanted = precision if precision in ("fp16", "bf16") else ""
    order = [(f, v) for f in FORMATS for v in dict.fromkeys((wanted, ""))]
    best = {part: next((kind for kind in order if kind in kinds), None) for part, kinds in whole.items()}
    if None in best.values():
        with pytest.raises(ApiError) as told:
            select_files(names, parts, precision)
        assert told.value.code == "MODEL_BROKEN"
        return
    chosen = select_files(names, parts, precision)
    assert set(chosen.files) <= set(names)
    assert list(chosen.files) == sorted(set(chosen.files))
    assert "README.md" not in chosen.files
    assert "checkpoint.safetensors" not in chosen.files
    assert not any(name.startswith("safety_checker/") for name in chosen.files)
    for part, kind in best.items():
        assert kind is not None
        format_, variant = kind
        mine = [n for n in chosen.files if n.startswith(f"{part}/") and n.endswith(f".{format_}")]
        assert f"{part}/config.json" in chosen.files
        assert mine
        assert all(((f".{variant}." in n) or (f".{variant}-" in n)) if variant else n.count(".") == 1 for n in mine)
        other = FORMATS[1 - FORMATS.index(format_)]
        assert not any(n.startswith(f"{part}/") and n.endswith(f".{other}") for n in chosen.files)
        sharded = any("-of-" in n for n in mine)
        assert sharded == any(n.startswith(f"{part}/") and ".index" in n for n in chosen.files)
        assert not sharded or len(mine) == int(mine[0].split("-of-")[1][:5])
    assert chosen.needs_conversion == any(kind and kind[0] == "bin" for kind in best.values())
    assert chosen.variant == (wanted if wanted and any(k and k[1] == wanted for k in best.values()) else "")
    assert chosen.plain == tuple(sorted(p for p, k in best.items() if wanted and k and k[1] == ""))
