"""Adapters in the engine: the images that diffusers itself makes with them, shared weights that nobody touches."""

from __future__ import annotations

import concurrent.futures
import gc
import hashlib
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from api.engine import adapters as adapters_module
from api.engine.adapters import Adapters
from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.inversions import read_inversions
from api.engine.lora_files import read_lora
from api.errors import ApiError
from api.schema.generation import Code, GenerationRequest, Inversion, Lora, ModelRef
from tests.adapters import Halves, inversion, lora, random_halves, save_kohya, save_peft
from tests.budgeted import Allocator, Apart, Outside
from tests.generating import a_request
from tests.running import ROOT
from tests.tiny import save_tiny
from tests.unit.test_offload import save_flux, save_sdxl

PROMPT = "a circle and a <x> square"


class Setup:
    """A tiny model, adapters for it, and an engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tiny(folder / "model")
        self.model = ModelRef("tiny/sd", "main", "fp32", str(folder / "model"))
        self.halves = [random_halves(self.pipe().components, seed) for seed in (1, 2)]
        self.a, self.b = (
            save_peft(folder / f"{name}.safetensors", halves) for name, halves in zip("ab", self.halves, strict=True)
        )
        self.words = folder / "words.safetensors"
        save_file({"<x>": torch.randn(3, 32, generator=torch.Generator().manual_seed(3))}, self.words)
        self.engine = Engine(Device("cpu"))

    def pipe(self) -> diffusers.StableDiffusionPipeline:
        found = diffusers.StableDiffusionPipeline.from_pretrained(self.folder / "model")
        found.set_progress_bar_config(disable=True)
        return found

    def request(self, seed: int = 1, **more: Any) -> GenerationRequest:
        inputs = {"prompt": PROMPT, "num_inference_steps": 3, "width": 64, "height": 64, **more.pop("inputs", {})}
        scheduler = "EulerDiscreteScheduler"
        return a_request(str(seed), self.model, "StableDiffusionPipeline", scheduler, inputs, seed=seed, **more)

    def image(self, *loras: Lora, seed: int = 1, engine: Engine | None = None, **more: Any) -> np.ndarray:
        return (engine or self.engine).generate(self.request(seed, loras=loras, **more)).images

    def hashes(self) -> dict[str, str]:
        model = next(iter(self.engine.cache._models.values()))
        return {
            f"{name}.{key}": hashlib.sha256(value.numpy().tobytes()).hexdigest()
            for name, part in model.components.items()
            if isinstance(part, torch.nn.Module)
            for key, value in part.state_dict().items()
        }


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("adapters"))


def by_diffusers(pipe: Any, seed: int = 1, **more: Any) -> np.ndarray:
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(seed)
    size = {"num_inference_steps": 3, "width": 64, "height": 64}
    out = pipe(**{"prompt": PROMPT, **size, "generator": generator, "output_type": "np", **more})
    return np.rint(out.images * 255).astype(np.uint8)


def test_the_same_images_as_diffusers_own(setup: Setup) -> None:
    """With PEFT: one LoRA, two with scales, and what ``cross_attention_kwargs`` says of all of them."""
    plain = setup.image()
    pipe = setup.pipe()
    pipe.load_lora_weights(str(setup.a), adapter_name="a")
    assert np.array_equal(setup.image(lora(setup.a)), by_diffusers(pipe))
    assert not np.array_equal(setup.image(lora(setup.a)), plain)
    half = {"cross_attention_kwargs": {"scale": 0.4}}
    assert np.array_equal(setup.image(lora(setup.a), inputs=half), by_diffusers(pipe, **half))
    assert np.array_equal(setup.image(inputs=half), plain)  # of no LoRAs
    pipe.load_lora_weights(str(setup.b), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.6, -0.3])
    assert np.array_equal(setup.image(lora(setup.a, 0.6), lora(setup.b, -0.3)), by_diffusers(pipe))


def test_the_same_inversions_as_diffusers_own(setup: Setup) -> None:
    pipe = setup.pipe()
    pipe.load_textual_inversion(str(setup.words))
    own = setup.image(inversions=(inversion(setup.words, "<x>"),))
    assert np.array_equal(own, by_diffusers(pipe))
    assert not np.array_equal(own, setup.image())


@pytest.mark.parametrize("kind", ["emb_params", "clip_l", "one vector"])
def test_formats_of_inversions(setup: Setup, kind: str, tmp_path: Path) -> None:
    (rows,) = load_file(setup.words).values()
    rows = rows[0] if kind == "one vector" else rows
    path = tmp_path / "x.safetensors"
    save_file({kind.replace(" ", "-"): rows, **({"clip_g": torch.zeros(3, 1280)} if kind == "clip_l" else {})}, path)
    if kind == "one vector":
        save_file({"<x>": rows[None]}, tmp_path / "y.safetensors")
        expected = setup.image(inversions=(inversion(tmp_path / "y.safetensors", "<x>"),))
    else:
        expected = setup.image(inversions=(inversion(setup.words, "<x>"),))
    assert np.array_equal(setup.image(inversions=(inversion(path, "<x>"),)), expected)


def test_kohyas_format(setup: Setup, tmp_path: Path) -> None:
    """The same weights in both formats, kohya's with an alpha: a scale of alpha / rank."""
    path = save_kohya(tmp_path / "k.safetensors", setup.halves[0], alpha=3.0)
    expected = setup.image(lora(setup.a, 0.75)).astype(int)
    assert np.abs(setup.image(lora(path)).astype(int) - expected).max() <= 1


def test_scale_zero_is_the_plain_model(setup: Setup, tmp_path: Path) -> None:
    """To the bit, and the file is not even read."""
    gone = Lora("gone", str(tmp_path / "gone"), "0" * 64, 0.0)
    assert np.array_equal(setup.image(lora(setup.a, 0.0), gone), setup.image())
    none = {"cross_attention_kwargs": {"scale": 0}}
    assert np.array_equal(setup.image(lora(setup.a), inputs=none), setup.image())


def test_mixed_at_once_each_gets_its_own(setup: Setup) -> None:
    """And the shared weights are afterwards what they were."""
    words = (inversion(setup.words, "<x>"),)
    asked: list[dict[str, Any]] = [
        {},
        {"loras": (lora(setup.a),)},
        {"loras": (lora(setup.a, 0.5),)},
        {"loras": (lora(setup.b),), "inversions": words},
        {"loras": (lora(setup.a), lora(setup.b, 0.7))},
        {"inversions": words},
    ]
    requests = [setup.request(seed, **what) for seed in (1, 2, 3) for what in asked]
    expected = [Engine(Device("cpu")).generate(request).images for request in requests]
    setup.image()
    before = setup.hashes()
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        found = list(pool.map(setup.engine.generate, requests))
    for own, alone in zip(found, expected, strict=True):
        assert np.abs(own.images.astype(int) - alone).max() <= 1
    assert setup.hashes() == before


def test_requests_with_the_same_adapters_are_merged(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that no adapter changes is everybody's; one that the same ones change is theirs together."""
    engine = Engine(Device("cpu"))
    words = (inversion(setup.words, "<x>"),)
    setup.image(engine=engine)
    model = next(iter(engine.cache._models.values()))

    def parts(**what: Any) -> dict[str, Any]:
        return engine.adapters.applied(model, model.components, "sdpa", setup.request(**what))[0]

    plain, one, other = parts(), parts(loras=(lora(setup.a),)), parts(loras=(lora(setup.a), lora(setup.b, 0.0)))
    more, words_only = parts(loras=(lora(setup.a),), inversions=words), parts(inversions=words)
    assert plain is model.components
    assert one["unet"] is other["unet"] is more["unet"] is not model.components["unet"]
    assert one["vae"] is words_only["vae"] is model.components["vae"]
    assert words_only["unet"] is model.components["unet"]
    assert len({id(each["text_encoder"]) for each in (plain, one, more, words_only)}) == 4
    assert parts(loras=(lora(setup.a, 0.5),))["unet"] is not one["unet"]
    weights = {id(parameter) for parameter in model.components["unet"].parameters()}
    assert {id(parameter) for parameter in one["unet"].parameters()} == weights


def test_the_shared_tokenizer_learns_nothing(setup: Setup) -> None:
    setup.image(inversions=(inversion(setup.words, "<x>"),))
    model = next(iter(setup.engine.cache._models.values()))
    assert "<x>" not in model.components["tokenizer"].get_vocab()


def test_what_adapters_take_is_bounded(setup: Setup) -> None:
    """Unused ones go, least recently used first; all of them when memory is short, and with the model."""
    engine = Engine(Device("cpu"))
    setup.image(engine=engine)
    model = next(iter(engine.cache._models.values()))
    adapters = Adapters(torch.device("cpu"), 0)
    adapters.applied(model, model.components, "sdpa", setup.request(loras=(lora(setup.a),)))
    one = adapters.bytes
    assert one == sum(down.nbytes + up.nbytes for down, up in setup.halves[0].values())
    adapters.applied(model, model.components, "sdpa", setup.request(loras=(lora(setup.b),)))
    assert adapters.bytes == one  # the other one has left
    assert len([name for name in model.variants if name.startswith("adapters/")]) == 1
    assert adapters.clear()
    assert (adapters.bytes, model.variants) == (0, {})
    assert not adapters.clear()
    setup.image(lora(setup.a), engine=engine)
    assert engine.adapters.bytes == one
    assert engine.cache.clear_idle()
    assert engine.adapters.bytes == 0
    setup.image(lora(setup.a), engine=engine)
    reference = weakref.ref(next(iter(engine.cache._models.values())))
    del model
    engine.cache.unload(setup.model.key)
    gc.collect()
    assert reference() is None
    assert engine.adapters.bytes == 0


def test_models_are_not_told_apart_by_where_they_lie(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one was, the next one may be, while something still holds what was made for the first."""
    monkeypatch.setattr(adapters_module, "id", lambda _: 7, raising=False)
    adapters, models = Adapters(torch.device("cpu"), 10**9), []
    for _ in range(2):
        engine = Engine(Device("cpu"))
        setup.image(engine=engine)
        models.append(next(iter(engine.cache._models.values())))
    for model in models:
        parts, _ = adapters.applied(model, model.components, "sdpa", setup.request(loras=(lora(setup.a),)))
        assert next(parts["unet"].parameters()) is next(model.components["unet"].parameters())


COMMUNITY = "from diffusers import StableDiffusionPipeline\n\n\nclass OwnPipeline(StableDiffusionPipeline):\n    pass\n"


def test_with_a_community_pipeline(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(COMMUNITY)
    code = Code(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), "OwnPipeline")
    request = setup.request(loras=(lora(setup.a),))
    done = setup.engine.generate(msgspec.structs.replace(request, pipeline="OwnPipeline", code=code))
    assert np.array_equal(done.images, setup.image(lora(setup.a)))


@pytest.mark.parametrize("way", ["model", "sequential"])
def test_offloaded_models(setup: Setup, way: str) -> None:
    """The weights come for each call, what adapters add stays on the device."""
    apart = Apart(Allocator())
    engine = Engine(apart, Budgets(10**9, 10**9, shared=False, capacity=10**9), Outside(apart))
    words = (inversion(setup.words, "<x>"),)
    expected = setup.image(lora(setup.a, 0.8), inversions=words)
    assert np.array_equal(setup.image(lora(setup.a, 0.8), engine=engine, inversions=words, offload=way), expected)
    assert np.array_equal(setup.image(engine=engine, offload=way), setup.image())


def test_keys_that_nothing_answers_to_are_told(setup: Setup, tmp_path: Path) -> None:
    more = ["lora_unet_nowhere.lora_down.weight", "lora_te_text_model_what.hada_w1_a", "strange"]
    path = save_kohya(tmp_path / "more.safetensors", setup.halves[0], 4.0, more)
    done = setup.engine.generate(setup.request(loras=(lora(path),)))
    told = done.meta["unused_adapter_keys"][path.name]
    assert told["count"] == 3
    assert set(told["first"]) == set(more)
    assert "unused_adapter_keys" not in setup.engine.generate(setup.request(loras=(lora(setup.a),))).meta


def other_halves(halves: Halves, change: Callable[[str], str], narrow: bool = False) -> Halves:
    return {change(k): (down[:, :-1].contiguous() if narrow else down, up) for k, (down, up) in halves.items()}


def with_metadata(path: Path, file: Path, said: str) -> Path:
    save_file(load_file(file), path, {"format": "pt", "lora_adapter_metadata": said})
    return path


def test_alphas_in_metadata(setup: Setup, tmp_path: Path) -> None:
    """By the ends of names; regular expressions, which may never end, are not run."""
    layer = next(name for name in setup.halves[0] if name.endswith("attn1.to_q")).removeprefix("unet.")
    said = {"unet.lora_alpha": 2, "unet.alpha_pattern": {f"^{layer}": 8, "^attn1.to_k": 9, r"attn1\.to_k": 6}}
    path = with_metadata(tmp_path / "said.safetensors", setup.a, json.dumps(said))
    found = read_lora(lora(path), diffusers.StableDiffusionPipeline, setup.pipe().components).layers
    ends = {name.rpartition("attn1.")[2]: each.alpha for name, each in found["unet"].items() if name[:-1] == layer[:-1]}
    assert {name: ends[name] for name in ("to_q", "to_k")} == {"to_q": 8, "to_k": 6}
    assert next(each.alpha for name, each in found["unet"].items() if "attn1" not in name) == 2
    assert {each.alpha for each in found["text_encoder"].values()} == {4}
    deep = with_metadata(tmp_path / "deep.safetensors", setup.a, "[" * 100_000)
    assert np.array_equal(setup.image(lora(deep)), setup.image(lora(setup.a)))
    for said in ({"unet.alpha_pattern": {"to_.*": 1}}, {"unet.lora_alpha": "x"}, {"unet.lora_alpha": float("inf")}):
        bad = with_metadata(tmp_path / "bad.safetensors", setup.a, json.dumps(said))
        with pytest.raises(ApiError, match="alpha") as caught:
            setup.image(lora(bad))
        assert caught.value.code == "INVALID_ADAPTER"


def test_what_does_not_fit_is_refused(setup: Setup, tmp_path: Path) -> None:
    halves = setup.halves[0]
    nothing = save_peft(tmp_path / "nothing.safetensors", other_halves(halves, lambda name: f"{name}_not"))
    narrow = save_peft(tmp_path / "narrow.safetensors", other_halves(halves, lambda name: name, narrow=True))
    empty = save_peft(
        tmp_path / "empty.safetensors", {k: (a[:0].clone(), b[:, :0].clone()) for k, (a, b) in halves.items()}
    )
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"no header at all")
    wrong = {nothing: "nothing that fits", noise: "cannot be read"}
    for path, said in {**wrong, **dict.fromkeys((narrow, empty), "another architecture")}.items():
        with pytest.raises(ApiError, match=said) as caught:
            setup.image(lora(path))
        assert caught.value.code == "INVALID_ADAPTER"
    wide = tmp_path / "wide.safetensors"
    save_file({"<w>": torch.zeros(1, 768)}, wide)
    with pytest.raises(ApiError, match="vectors of 32"):
        setup.image(inversions=(inversion(wide, "<w>"),))
    with pytest.raises(ApiError, match="stands for something already"):
        setup.image(inversions=(Inversion("w", str(setup.words), "1" * 64, "circle</w>"),))
    with pytest.raises(ApiError, match="Must be a number"):
        setup.image(lora(setup.a), inputs={"cross_attention_kwargs": {"scale": "much"}})


def test_sdxl_with_both_text_encoders(tmp_path: Path) -> None:
    """LoRAs of UNet and two encoders, and an inversion with vectors for each, as diffusers draws them."""
    save_sdxl(tmp_path / "model")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    halves = random_halves(pipe.components, 1) | random_halves({"text_encoder": pipe.text_encoder}, 2)
    second = random_halves({"text_encoder": pipe.text_encoder_2}, 3)
    halves |= {name.replace("text_encoder.", "text_encoder_2."): half for name, half in second.items()}
    path, words = save_peft(tmp_path / "xl.safetensors", halves), tmp_path / "words.safetensors"
    rows = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1))
    save_file({"clip_l": rows[0], "clip_g": rows[1]}, words)
    model = ModelRef("tiny/xl", "main", "fp32", str(tmp_path / "model"))
    inputs = {"prompt": PROMPT, "num_inference_steps": 3, "width": 64, "height": 64}
    more = {"loras": (lora(path, 0.7),), "inversions": (inversion(words, "<x>"),)}
    names = "StableDiffusionXLPipeline", "EulerDiscreteScheduler"
    own = Engine(Device("cpu")).generate(a_request("1", model, *names, inputs, **more)).images
    plain = Engine(Device("cpu")).generate(a_request("1", model, *names, inputs)).images
    pipe.load_lora_weights(str(path), adapter_name="a")
    pipe.set_adapters(["a"], [0.7])
    for number, (encoder, tokenizer) in enumerate(
        ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
    ):
        word = {"token": "<x>", "text_encoder": encoder, "tokenizer": tokenizer}
        pipe.load_textual_inversion({"<x>": rows[number]}, **word)
    assert np.array_equal(own, by_diffusers(pipe))
    assert not np.array_equal(own, plain)


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_flux(form: str, tmp_path: Path) -> None:
    """Of a transformer, by the converters that its pipeline has."""
    save_flux(tmp_path / "model")
    pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    if form == "peft":
        path = save_peft(tmp_path / "flux.safetensors", random_halves({"transformer": pipe.transformer}, 1))
    else:
        path = tmp_path / "flux.safetensors"
        generator = torch.Generator().manual_seed(1)
        tensors = {"lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2.0)}
        tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"] = torch.randn(4, 32, generator=generator)
        tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] = torch.randn(96, 4, generator=generator)
        save_file(tensors, path)
    model = ModelRef("tiny/flux", "main", "fp32", str(tmp_path / "model"))
    inputs = {"prompt": PROMPT, "num_inference_steps": 3, "width": 64, "height": 64}
    inputs["joint_attention_kwargs"] = {"scale": 0.6}
    names = "FluxPipeline", "FlowMatchEulerDiscreteScheduler"
    own = Engine(Device("cpu")).generate(a_request("1", model, *names, inputs, loras=(lora(path),))).images
    plain = Engine(Device("cpu")).generate(a_request("1", model, *names, inputs)).images
    pipe.load_lora_weights(str(path), adapter_name="a")
    out = pipe(**inputs, generator=torch.Generator().manual_seed(1), output_type="np")
    assert np.array_equal(own, np.rint(out.images * 255).astype(np.uint8))
    assert not np.array_equal(own, plain)


def test_a_worker_does_not_import_peft(setup: Setup) -> None:
    """It takes longer than anything else that it does not need."""
    code = f"""
import sys
from api.worker.__main__ import _without_peft
_without_peft()
from api.engine.device import Device
from api.engine.generate import Engine
from api.schema.generation import ModelRef
from tests.adapters import lora
from tests.generating import a_request
model = ModelRef("tiny/sd", "main", "fp32", {str(setup.folder / "model")!r})
from pathlib import Path
loras = (lora(Path({str(setup.a)!r})),)
inputs = {{"prompt": "a", "num_inference_steps": 1, "width": 64, "height": 64}}
Engine(Device("cpu")).generate(a_request("1", model, "StableDiffusionPipeline", "DDIMScheduler", inputs, loras=loras))
sys.exit("peft" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_pipelines_that_take_none_say_so(setup: Setup) -> None:
    class Takes:
        pass

    for read, what in ((read_lora, lora(setup.a)), (read_inversions, [inversion(setup.words, "<x>")])):
        with pytest.raises(ApiError, match="takes no") as caught:
            read(what, Takes, {})
        assert caught.value.code == "NOT_SUPPORTED"
