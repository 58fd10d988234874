"""Our own loader against the libraries': every parameter and buffer, what is tied, and what comes out."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

from api.engine.cloning import clone
from api.engine.device import Device
from api.engine.loader import PartLoader, module_bytes
from api.engine.owning import own
from api.engine.parts import PartSpec
from api.engine.specs import Component, computed_in, configuration
from tests.unit.test_merging import CLIP, flux, sd, sd3, sdxl, vae

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
LLM = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def t5() -> Any:
    return T5EncoderModel(T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, vocab_size=50))


def checker() -> Any:
    config = CLIPConfig(
        vision_config={**VISION, "image_size": 32, "patch_size": 8}, text_config=dict(VISION), projection_dim=8
    )
    return StableDiffusionSafetyChecker(config)


def wan() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=8,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


KINDS: dict[str, Callable[[], Any]] = {
    "sd": sd,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "wan": wan,
    "vae": vae,
    "pixart": lambda: diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, cross_attention_dim=16, sample_size=8,
        caption_channels=16, num_layers=1,
    ),
    "taesd": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    ),
    "clip": lambda: CLIPTextModel(CLIPTextConfig(**CLIP)),
    "clip-g": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
    "t5": t5,
    "vision": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, image_size=32, patch_size=8)),
    "checker": checker,
    "llama": lambda: LlamaModel(LlamaConfig(**LLM)),
    "gemma": lambda: Gemma2Model(Gemma2Config(**LLM)),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class AnyDevice(Device):
    """A CPU that computes in what it is told, and can be made to go the way of a GPU."""

    def __init__(self, shares: bool = True) -> None:
        super().__init__("cpu")
        self.shares_host = shares

    def dtype(self, precision: str) -> torch.dtype:
        return DTYPES[precision]


def saved(module: Any, folder: Path, stored: torch.dtype = torch.float32, **options: Any) -> Component:
    """A component on disk, as its library saves it."""
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.randn_like(tensor) * 0.1)
    module.to(stored).save_pretrained(folder, **options)
    cls = type(module)
    library = "stable_diffusion" if "pipelines" in cls.__module__ else cls.__module__.split(".")[0]
    return Component(folder.name, library, cls.__name__, cls, folder)


def spec_of(loader: PartLoader, component: Component, dtype: torch.dtype, variant: str | None = None) -> PartSpec:
    from api.engine.plans import planned

    return loader._plans._spec(planned(component, dtype, variant))


def placed(loader: PartLoader, component: Component, dtype: torch.dtype, variant: str | None = None) -> nn.Module:
    spec = spec_of(loader, component, dtype, variant)
    module = loader.place(spec, loader.read(spec), None)
    assert spec.bytes == module_bytes(module)
    return module


def library(component: Component, dtype: torch.dtype, **options: Any) -> nn.Module:
    cls: Any = component.cls
    return cls.from_pretrained(component.folder, dtype=dtype, use_safetensors=True, **options).eval()


def the_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Same names, types, values; the same tensors tied; nothing that would be trained."""
    for kind in ("named_parameters", "named_buffers"):
        mine, other = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (ours, theirs))
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == other[name].dtype, name
            assert not tensor.is_meta, name
            assert torch.equal(tensor, other[name]), name
            assert not tensor.requires_grad, name
        ties = [{frozenset(n for n in t if t[n] is tensor) for tensor in t.values()} for t in (mine, other)]
        assert ties[0] == ties[1]
    assert isinstance(ours, type(theirs)) and str(type(ours)) == str(type(theirs))
    assert not any(module.training for module in ours.modules())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "copied"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_what_its_library_loads(kind: str, precision: str, shares: bool, tmp_path: Path) -> None:
    component = saved(KINDS[kind](), tmp_path / "part")
    loader = PartLoader(AnyDevice(shares))
    spec = spec_of(loader, component, DTYPES[precision])
    assert not spec.by_library
    the_same(placed(loader, component, DTYPES[precision]), library(component, DTYPES[precision]))


@pytest.mark.parametrize("stored", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["sd", "t5", "clip"])
def test_half_files_are_cast_as_the_library_casts_them(kind: str, stored: str, tmp_path: Path) -> None:
    component = saved(KINDS[kind](), tmp_path / "part", DTYPES[stored])
    for dtype in DTYPES.values():
        the_same(placed(PartLoader(AnyDevice()), component, dtype), library(component, dtype))


@pytest.mark.parametrize("kind", ["sd", "vae", "clip", "t5", "checker", "llama"])
def test_outputs_are_equal(kind: str, tmp_path: Path) -> None:
    component = saved(KINDS[kind](), tmp_path / "part")
    ours, theirs = placed(PartLoader(AnyDevice()), component, torch.float32), library(component, torch.float32)
    ids = torch.tensor([[1, 5, 7, 2]])
    with torch.no_grad():
        if kind == "sd":
            out = [m(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 3, 16)).sample for m in (ours, theirs)]
        elif kind == "vae":
            out = [m.decode(torch.ones(1, 4, 4, 4)).sample for m in (ours, theirs)]  # type: ignore[operator]
        elif kind == "checker":
            out = [m.vision_model(torch.ones(1, 3, 32, 32)).last_hidden_state for m in (ours, theirs)]
        else:
            out = [m(input_ids=ids).last_hidden_state for m in (ours, theirs)]
    assert torch.equal(*out)


def real_keys(folder: Path, prefix: str) -> None:
    """A text encoder as the checkpoints of years ago hold it."""
    file = folder / "model.safetensors"
    held = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    above = ("text_projection", "visual_projection")
    old = {name if name.startswith(above) else prefix + name: tensor for name, tensor in held.items()}
    old[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["clip", "clip-g"])
def test_keys_of_real_text_encoders_take_the_fast_way(kind: str, tmp_path: Path) -> None:
    component = saved(KINDS[kind](), tmp_path / "part")
    real_keys(component.folder, "text_model.")
    loader = PartLoader(AnyDevice())
    assert not spec_of(loader, component, torch.float16).by_library
    the_same(placed(loader, component, torch.float16), library(component, torch.float16))


def test_keys_of_old_vaes_take_the_fast_way(tmp_path: Path) -> None:
    component = saved(vae(), tmp_path / "part")
    file = component.folder / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    held = load_file(file)
    for new, name in old.items():
        for key in [key for key in held if f".{new}." in key and "mid_block" in key]:
            held[key.replace(new, name)] = held.pop(key)
    save_file(held, file, metadata={"format": "pt"})
    assert any(".query." in key for key in held)
    loader = PartLoader(AnyDevice())
    assert not spec_of(loader, component, torch.float32).by_library
    the_same(placed(loader, component, torch.float32), library(component, torch.float32))


def test_diffusers_finds_the_text_model_of_a_text_encoder(tmp_path: Path) -> None:
    component = saved(KINDS["clip"](), tmp_path / "part")
    first, second = (placed(PartLoader(AnyDevice()), component, torch.float32) for _ in range(2))
    assert first.text_model is first
    assert second.text_model is second
    for copied in (clone(first), copy.deepcopy(first), own(first)):
        assert copied.text_model is copied
    assert type(first) is type(second) and first.base_model is first
    first.config.output_hidden_states = True
    assert len(first(torch.zeros(1, 4, dtype=torch.long)).hidden_states) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_freed_as_soon_as_nobody_holds_it(kind: str, tmp_path: Path) -> None:
    component = saved(KINDS[kind](), tmp_path / "part")
    loader = PartLoader(AnyDevice())
    module = placed(loader, component, torch.float32)
    mine, seen = own(module), weakref.ref(module)
    parameter = weakref.ref(next(module.parameters()))
    gc.disable()  # which would find what hangs in a ring
    try:
        del module, mine
        assert seen() is None and parameter() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("change", ["left over", "missing", "shape", "twice"])
def test_what_does_not_match_exactly_is_left_to_its_library(change: str, tmp_path: Path) -> None:
    component = saved(t5() if change == "twice" else sd(), tmp_path / "part")
    file = next(component.folder.glob("*.safetensors"))
    held = load_file(file)
    name = next(iter(held))
    if change == "left over":
        held["another.weight"] = torch.ones(2)
    elif change == "missing":
        del held[name]
    elif change == "shape":
        held[name] = torch.ones(3, 5)
    else:
        held["encoder.embed_tokens.weight"] = held["shared.weight"].clone()
    save_file(held, file, metadata={"format": "pt"})
    spec = spec_of(PartLoader(AnyDevice()), component, torch.float32)
    assert spec.by_library
    assert spec.architecture == f"library:{spec.key}"


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "copied"])
def test_a_part_left_to_its_library_is_the_same(shares: bool, tmp_path: Path) -> None:
    component = saved(sd(), tmp_path / "part")
    file = next(component.folder.glob("*.safetensors"))
    save_file({**load_file(file), "another.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    loader = PartLoader(AnyDevice(shares))
    spec = spec_of(loader, component, torch.float32)
    host = loader.read(spec)
    module = loader.place(spec, host, None)
    the_same(module, library(component, torch.float32))
    mine, theirs = next(module.parameters()), next(host.module.parameters())  # type: ignore[union-attr]
    assert (mine.data_ptr() == theirs.data_ptr()) == shares


def test_other_settings_for_generation_are_another_part(tmp_path: Path) -> None:
    """A library reads them as well; models that share the rest must not share what they write."""
    components = [saved(LlamaForCausalLM(LlamaConfig(**LLM)), tmp_path / name) for name in ("one", "same", "other")]
    settings = components[2].folder / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "repetition_penalty": 1.5}))
    loader = PartLoader(AnyDevice())
    one, same, other = (spec_of(loader, part, torch.float32) for part in components)
    assert one.by_library
    assert one.key == same.key != other.key
    assert loader.place(other, loader.read(other), None).generation_config.repetition_penalty == 1.5  # type: ignore[union-attr]


def test_shards_and_variants_are_found(tmp_path: Path) -> None:
    component = saved(sd(), tmp_path / "part", max_shard_size="20KB")
    assert len(list(component.folder.glob("*-of-*.safetensors"))) > 2
    spec = spec_of(PartLoader(AnyDevice()), component, torch.float32)
    assert not spec.by_library
    assert len(spec.files) > 2
    the_same(placed(PartLoader(AnyDevice()), component, torch.float32), library(component, torch.float32))
    other = saved(sd(), tmp_path / "other")
    saved(sd(), tmp_path / "other", torch.float16, variant="fp16")
    spec = spec_of(PartLoader(AnyDevice()), other, torch.float16, "fp16")
    assert [path.name for path in spec.files] == ["diffusion_pytorch_model.fp16.safetensors"]
    theirs = library(other, torch.float16, variant="fp16")
    the_same(placed(PartLoader(AnyDevice()), other, torch.float16, "fp16"), theirs)


def test_a_vae_that_overflows_in_fp16_is_held_in_fp32(tmp_path: Path) -> None:
    component = saved(vae(), tmp_path / "vae")
    config = component.folder / "config.json"
    loader = PartLoader(AnyDevice())
    assert spec_of(loader, component, torch.float16).dtype == torch.float32
    assert spec_of(loader, component, torch.bfloat16).dtype == torch.bfloat16
    for pipeline, dtype in (("StableDiffusionPipeline", "float16"), ("StableDiffusionXLPipeline", "float32")):
        of_pipeline = replace(component, pipeline=getattr(diffusers, pipeline))
        assert computed_in(of_pipeline, configuration(component), torch.float16) == getattr(torch, dtype)
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": False}))
    assert spec_of(loader, component, torch.float16).dtype == torch.float16


def test_building_patches_nothing_and_draws_nothing(tmp_path: Path) -> None:
    components = [saved(KINDS[kind](), tmp_path / kind) for kind in ("sd", "clip", "checker")]
    setters = nn.Module.__setattr__, nn.Module.register_parameter, nn.init.normal_, torch.empty
    state = torch.get_rng_state()
    seen: list[Any] = []
    before = CLIPTextModel.__init__

    def watching(self: Any, *args: Any) -> None:
        before(self, *args)
        now = nn.Module.__setattr__, nn.Module.register_parameter, nn.init.normal_, torch.empty
        seen.append(all(inspect.unwrap(a) is inspect.unwrap(b) for a, b in zip(now, setters, strict=True)))
        seen.append(torch.get_default_dtype() == torch.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIPTextModel, "__init__", watching)
        for component in components:
            placed(PartLoader(AnyDevice()), component, torch.bfloat16)
    assert seen == [True, True]
    assert torch.equal(state, torch.get_rng_state())


def test_a_clone_shares_its_tensors_and_nothing_else() -> None:
    module = sd()
    module.extra = {"of": [module.conv_in]}
    module.empty = nn.ModuleList()
    other = clone(module)
    assert all(a is b for a, b in zip(module.parameters(), other.parameters(), strict=True))
    assert not {id(m) for m in module.modules()} & {id(m) for m in other.modules()}
    assert other.extra["of"][0] is other.conv_in
    other.conv_in.register_forward_hook(lambda *_: None)
    other.register_to_config(sample_size=5)
    other.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    assert not module.conv_in._forward_hooks
    assert module.config.sample_size == 8
    assert {type(p).__name__ for p in module.attn_processors.values()} == {"AttnProcessor2_0"}
