"""What constructors of pipelines write to a model's parts counts for that model alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPProcessor

from api.engine.loader import LoadedModel, PartLoader
from api.engine.owning import own, shared_unless_changed
from api.engine.tokenizers import taking_turns
from tests.running import ROOT
from tests.tiny import save_tiny
from tests.unit.test_loader import ref_to, whole
from tests.unit.test_merging import rand
from tests.unit.test_skeletons import AnyDevice
from tests.unit.test_tokenizers import Slow, wrong_lengths

_UPSCALED = 0.08333


@pytest.fixture
def components() -> dict[str, Any]:
    tokenizer = Slow.from_pretrained(ROOT / "models" / "shapes" / "tokenizer")
    return {"tokenizer": tokenizer, "processor": CLIPProcessor(CLIPImageProcessor(), tokenizer)}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A model; an upscaler of the same parts, whose constructor mends the settings of its autoencoder."""
    save_tiny(tmp_path / "sd")
    shutil.copytree(tmp_path / "sd", tmp_path / "upscaler")
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionUpscalePipeline", "low_res_scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "upscaler" / "model_index.json").write_text(json.dumps({**index, "max_noise_level": 350}))
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "upscaler" / "low_res_scheduler")
    return tmp_path


def assembled(loader: PartLoader, modules: dict[str, nn.Module], folder: Path) -> LoadedModel:
    return loader.assemble(ref_to(folder), modules)


def test_settings_of_modules_are_a_models_own(models: Path) -> None:
    loader = PartLoader(AnyDevice())
    modules = whole(loader, ref_to(models / "sd"))
    upscaler = assembled(loader, modules, models / "upscaler")
    assert upscaler.components["vae"].config.scaling_factor == _UPSCALED
    assert modules["vae"].config.scaling_factor == 0.18215  # whoever takes its place over finds it so
    plain = assembled(loader, modules, models / "sd")
    assert plain.components["vae"].config.scaling_factor == 0.18215
    # one set of weights, and one module wherever nothing was written: the calls of both models are merged
    assert next(upscaler.components["vae"].parameters()) is next(plain.components["vae"].parameters())
    assert upscaler.bytes == plain.bytes
    for name in ("unet", "text_encoder"):
        assert upscaler.components[name] is plain.components[name] is modules[name]
    assert plain.components["vae"] is modules["vae"]


def test_settings_of_schedulers_are_a_models_own(models: Path) -> None:
    config = models / "sd" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "steps_offset": 0, "clip_sample": True}))
    shutil.copytree(models / "sd", models / "other")
    index = models / "other" / "model_index.json"
    index.write_text(
        json.dumps({**json.loads(index.read_text()), "_class_name": "StableDiffusionAttendAndExcitePipeline"})
    )
    loader = PartLoader(AnyDevice())
    modules = whole(loader, ref_to(models / "sd"))
    plain, other = (assembled(loader, modules, models / name) for name in ("sd", "other"))
    assert plain.components["scheduler"].config.steps_offset == 1  # diffusers mends what it finds outdated
    assert other.components["scheduler"].config.steps_offset == 0


def test_settings_of_tokenizers_are_a_models_own(models: Path) -> None:
    loader = PartLoader(AnyDevice())
    modules = whole(loader, ref_to(models / "sd"))
    one, other = (assembled(loader, modules, models / "sd").components["tokenizer"] for _ in range(2))
    before = other.padding_side, other.pad_token, other.eos_token
    one.padding_side = "left" if before[0] == "right" else "right"
    for token in ("pad_token", "eos_token"):
        setattr(one, token, "<other>")
    assert (other.padding_side, other.pad_token, other.eos_token) == before
    assert one._tokenizer is other._tokenizer


def test_models_of_one_tokenizer_take_turns_at_it(components: dict[str, Any]) -> None:
    turned = taking_turns(components)
    for name in ("tokenizer", "processor"):
        one, other = own(turned[name]), own(turned[name])
        assert one is not other and type(one) is type(turned[name])
        assert not wrong_lengths([one, other, turned["tokenizer"]])


def test_a_processors_tokenizer_is_its_own_over_the_same_backend(components: dict[str, Any]) -> None:
    shared: Any = taking_turns({"processor": CLIPProcessor(CLIPImageProcessor(), components["tokenizer"])})["processor"]
    mine = own(shared)
    assert isinstance(mine.tokenizer, Slow) and mine.tokenizer is not shared.tokenizer
    assert mine.tokenizer._tokenizer is shared.tokenizer._tokenizer
    assert mine.image_processor is not shared.image_processor


def written(name: str, mine: Any) -> None:
    if name == "attribute":
        mine.tile_sample_min_size = 7
    elif name == "setting":
        mine.register_to_config(scaling_factor=0.5)
    elif name == "setting in place":
        mine.config["scaling_factor"] = 0.5
    elif name == "child":
        mine.encoder = nn.Identity()
    elif name == "hook":
        mine.register_forward_hook(lambda *args: None)
    elif name == "mode":
        mine.train()


@pytest.mark.parametrize("name", ["attribute", "setting", "setting in place", "child", "hook", "mode"])
def test_what_is_written_to_a_root_is_seen_and_kept_from_the_others(name: str, models: Path) -> None:
    shared = whole(PartLoader(AnyDevice()), ref_to(models / "sd"))["vae"]
    assert shared_unless_changed(own(shared), shared) is shared
    state, config = dict(vars(shared)), dict(shared.config)  # type: ignore[call-overload]
    mine = own(shared)
    written(name, mine)
    assert shared_unless_changed(mine, shared) is mine
    assert vars(shared) == state and dict(shared.config) == config  # type: ignore[call-overload]


def test_it_computes_the_same(models: Path) -> None:
    modules: dict[str, Any] = dict(whole(PartLoader(AnyDevice()), ref_to(models / "sd")))
    mine = own(modules["vae"])
    latents = rand(1, 4, 8, 8).float()
    with torch.no_grad():
        assert torch.equal(mine.decode(latents).sample, modules["vae"].decode(latents).sample)
        text = own(modules["text_encoder"])
        assert text.text_model is text
        other = next(modules["text_encoder"].parameters())
    assert next(text.parameters()) is other
