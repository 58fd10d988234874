"""Quantized models: the libraries' own numbers, other models in the books that share the rest, bytes as predicted."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import importlib.util
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from api.engine import quantization, quantized_layers, quantized_skeletons
from api.engine.budgets import Budgets
from api.engine.cloning import clone
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.loader import PartLoader, module_bytes
from api.engine.parts import PartSpec
from api.engine.placement import about, build_of
from api.engine.quantization import Rule
from api.engine.quantized_layers import QuantizedLinear, quantize
from api.errors import ApiError
from api.schema.generation import QUANTIZED_BY, ModelRef
from api.service.options import check_options
from api.service.quantize import check_installed, choose_quantize
from api.settings import Settings, SettingsError
from scripts.demo_model.checker import check
from scripts.demo_model.grammar import Scene, Thing, caption
from tests.adapters import lora, random_halves, save_peft
from tests.budgeted import Allocator, Apart
from tests.families import save_family
from tests.quantized import DEMO, KINDS, SMALL, Counted, draw, engine_on, shapes
from tests.running import ROOT
from tests.tiny import save_tiny
from tests.unit.test_offload import a_request, save_flux

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in QUANTIZED_BY.values()),
    reason="torchao or bitsandbytes is not installed",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in ("sd", "other", "flux", "sdxl")}
    save_tiny(found["sd"])
    save_tiny(found["other"], 1)
    save_flux(found["flux"])
    save_family("sdxl", found["sdxl"])
    return found


def a_ref(folder: Path, kind: str, name: str = "sd") -> ModelRef:
    return ModelRef(f"tiny/{name}", "main", "fp32", str(folder), quantize=kind)


def a_layer(kind: str, dtype: torch.dtype = torch.float32, rows: int = 96, columns: int = 128) -> tuple[Any, nn.Linear]:
    plain = nn.Linear(columns, rows, dtype=dtype)
    made = quantize(kind, plain.weight.detach())
    layer = QuantizedLinear(kind, plain, dtype, "blocks.0.attn.to_q")
    for name, tensor in made.items():
        assert tensor.shape == getattr(layer, name).shape
        layer._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return layer, plain


def by_libraries(kind: str, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What torchao's and bitsandbytes' own ways to quantize a module give."""
    if kind == "nf4":
        import bitsandbytes

        own = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, compute_dtype=x.dtype, quant_type="nf4", compress_statistics=False
        )
        own.load_state_dict(layer.state_dict())
        return own.to("cpu")(x)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerRow

    own = nn.Sequential(layer)
    quantize_(
        own, Int8WeightOnlyConfig(granularity=PerRow(), version=2) if kind == "int8" else Float8WeightOnlyConfig()
    )
    return own(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_gives_what_its_library_gives(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, plain = a_layer(kind, dtype)
    x = torch.randn(2, 9, 128, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), by_libraries(kind, plain, x))


@pytest.mark.parametrize("kind", KINDS)
def test_who_reads_the_weight_gets_it(kind: str) -> None:
    layer, plain = a_layer(kind)
    x = torch.randn(3, 128)
    assert (layer.weight.shape, layer.weight.dtype) == ((96, 128), torch.float32)
    with torch.no_grad():
        assert torch.allclose(F.linear(x, layer.weight, layer.bias), layer(x), atol=1e-6)
    floats = [p for p in layer.parameters() if p.is_floating_point()]
    assert [id(p) for p in floats] == [id(plain.bias)]  # a module is asked what it computes in by these


def test_sums_that_fp16_cannot_hold() -> None:
    """torchao multiplies whole numbers up to 127 and scales afterwards."""
    layer, plain = a_layer("int8", torch.float16, 16, 4096)
    with torch.no_grad():
        plain.weight.fill_(0.01)
        layer._parameters |= {n: nn.Parameter(t, False) for n, t in quantize("int8", plain.weight).items()}
        x = torch.ones(1, 4096, dtype=torch.float16)
        assert torch.allclose(layer(x), plain(x), rtol=0.01)


@pytest.mark.parametrize("kind", [*KINDS, "fp8+activations"])
def test_rows_do_not_hear_of_each_other(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where activations are quantized, as on cards that compute in fp8: another row may be a thousand times larger."""
    monkeypatch.setattr(quantized_layers, "computes_fp8", lambda device, dtype: kind == "fp8+activations")
    torch.manual_seed(1)
    layer, plain = a_layer(kind.partition("+")[0], torch.bfloat16)
    x = torch.randn(4, 7, 128, dtype=torch.bfloat16)
    x[1] *= 1000
    with torch.no_grad():
        together, exact = layer(x), plain(x)
        for row in range(4):
            # the kernels may sum in another order for another number of rows, which is a step of bf16
            assert torch.allclose(together[row], layer(x[row : row + 1])[0], rtol=2**-7, atol=1e-4)
        far = (together - exact).norm() / exact.norm()
    assert 0 < far < {"int8": 0.01, "fp8": 0.03, "nf4": 0.12, "fp8+activations": 0.05}[kind]


def test_which_layers(folders: dict[str, Path]) -> None:
    loader = PartLoader(Device("cpu"), rule=SMALL)
    specs = {spec.name: spec for spec in loader.parts(a_ref(folders["flux"], "int8"))}
    assert [name for name, spec in specs.items() if spec.quantize] == ["text_encoder", "text_encoder_2", "transformer"]
    found = loader.place(specs["transformer"], loader.read(specs["transformer"]), None)
    linear = {name: type(part) for name, part in found.named_modules() if isinstance(part, nn.Linear)}
    kept = {name for name, cls in linear.items() if cls is nn.Linear}
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= kept
    assert not any(name.startswith("time_text_embed") for name in set(linear) - kept)
    assert "transformer_blocks.0.attn.to_q" in linear.keys() - kept
    assert found.get_submodule("transformer_blocks.0.norm1.linear").steers
    assert not found.get_submodule("transformer_blocks.0.attn.to_q").steers
    # the product's own rule leaves all of a tiny model as it is: the very same parts
    assert PartLoader(Device("cpu")).parts(a_ref(folders["flux"], "int8")) == loader.parts(a_ref(folders["flux"], ""))
    small_text = PartLoader(Device("cpu"), rule=Rule(2**8)).parts(a_ref(folders["flux"], "int8"))
    assert [spec.name for spec in small_text if spec.quantize] == ["transformer"]


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_known_before_they_are_read(folders: dict[str, Path], family: str, kind: str) -> None:
    loader = PartLoader(Device("cpu"), rule=SMALL)
    plain = {spec.name: spec for spec in loader.parts(a_ref(folders[family], ""))}
    for spec in loader.parts(a_ref(folders[family], kind)):
        host = loader.read(spec)
        module = loader.place(spec, host, None)
        assert spec.bytes == module_bytes(module)
        if not spec.quantize:
            assert spec == plain[spec.name]  # shared with the model as it is
            continue
        assert spec.key != plain[spec.name].key
        assert spec.bytes < plain[spec.name].bytes
        assert host.bytes - spec.bytes < 1024 * len(list(module.parameters()))  # what aligns them
        assert module.dtype == torch.float32
    assert any(spec.quantize for spec in loader.parts(a_ref(folders[family], kind)))


def test_a_layer_at_a_time_is_in_memory(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    loader = PartLoader(Device("cpu"), rule=SMALL)
    before: list[weakref.ref[Any]] = []
    left = []

    def watched(kind: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        left.append(sum(reference() is not None for reference in before))
        before.append(weakref.ref(weight.untyped_storage()))
        return quantize(kind, weight)

    monkeypatch.setattr(quantized_skeletons, "quantize", watched)
    spec = next(spec for spec in loader.parts(a_ref(folders["flux"], "int8")) if spec.name == "transformer")
    loader.read(spec)
    assert len(before) > 10
    assert max(left) <= 1


class Setup:
    """An engine on a device with memory of its own, which is counted."""

    def __init__(self, rule: Rule = SMALL) -> None:
        self.allocator = Allocator()
        apart = Apart(self.allocator)
        limits = Budgets(2**30, 2**30, shared=False, capacity=2**30)
        self.engine = Engine(apart, limits, Counted(apart, rule), embeddings_limit=0)


@pytest.fixture
def counted() -> Any:
    made: list[Setup] = []

    def build(rule: Rule = SMALL) -> Setup:
        made.append(Setup(rule))
        return made[-1]

    yield build
    for it in made:
        it.engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", *KINDS])
def test_the_peak_is_what_was_predicted(kind: str, counted: Callable[..., Setup]) -> None:
    """Bytes of weights and of the largest call, against what an allocator counts; the demo model, whose weights count."""
    it = counted(DEMO)
    request = draw(shapes(kind), "a red circle on a blue background", steps=2, guidance=1.0)
    with it.allocator.inside(it.engine):
        it.engine.generate(request)
        gc.collect()
        specs = it.engine.cache.parts(request.model)
        weights = sum(spec.bytes for spec in specs)
        assert it.engine.cache.memory().device == weights
        assert weights <= it.allocator.live < weights * 1.01
        it.allocator.peak = it.allocator.live
        it.engine.generate(request)
    model = next(iter(it.engine.cache._models.values()))
    predicted = weights + it.engine.peaks.most(about(build_of(model), request, "full"))
    assert it.engine.peaks.most(about(build_of(model), request, "full")) > 0
    assert it.allocator.peak == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_takes_over_its_place(kind: str, folders: dict[str, Path], counted: Callable[..., Setup]) -> None:
    loader = counted().engine.cache.loader
    first, second = (
        next(spec for spec in loader.parts(a_ref(folders[name], kind)) if spec.name == "unet")
        for name in ("sd", "other")
    )
    assert (first.architecture, first.key) != (second.architecture, second.key)
    assert first.architecture == second.architecture
    module = loader.place(first, loader.read(first), None)
    places = [parameter.data_ptr() for parameter in module.parameters()]
    assert loader.place(second, loader.read(second), module) is module
    assert [parameter.data_ptr() for parameter in module.parameters()] == places
    fresh = loader.place(second, loader.read(second), None)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), fresh.parameters(), strict=True))
    assert any(isinstance(part, QuantizedLinear) for part in fresh.modules())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_it_draws_the_same(kind: str, folders: dict[str, Path], counted: Callable[..., Setup]) -> None:
    engine, ref = counted().engine, a_ref(folders["flux"], kind, "flux")
    whole = engine.generate(a_request(ref, offload="none"))
    assert whole.meta["quantize"] == kind
    for way in ("model", "sequential"):
        done = engine.generate(a_request(ref, offload=way))
        assert (done.meta["placement"], done.meta["quantize"]) == (way, kind)
        assert np.array_equal(done.images, whole.images)


@pytest.mark.slow
def test_beside_each_other(folders: dict[str, Path]) -> None:
    """Each draws what it draws alone, the books count what they share once, and each says what it is."""
    engine = engine_on(Device("cpu"))
    refs = [a_ref(folders["flux"], kind, "flux") for kind in ("", *KINDS)]
    try:
        alone = [engine.generate(a_request(ref, seed)) for ref in refs for seed in (1, 2)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            done = list(pool.map(engine.generate, [a_request(ref, seed) for ref in refs for seed in (1, 2)]))
        for one, expected in zip(done, alone, strict=True):
            assert np.abs(one.images.astype(int) - expected.images).max() <= 1
            assert one.meta["numerics"] == expected.meta["numerics"]
        words = [one.meta["numerics"].partition("eager")[2] for one in alone[::2]]
        assert words == ["", "/int8", "/fp8", "/nf4"]
        assert [one.meta.get("lossy") for one in alone[::2]] == [None, *[["quantize"]] * 3]
        assert not np.array_equal(alone[0].images, alone[6].images) or not np.array_equal(
            alone[1].images, alone[7].images
        )
        specs = {spec.key: spec for ref in refs for spec in engine.cache.parts(ref)}
        assert len([spec for spec in specs.values() if spec.name == "vae"]) == 1
        assert engine.cache.memory().device == sum(spec.bytes for spec in specs.values())
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_loras_lie_beside_it(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    import diffusers

    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folders["sdxl"])
    path = save_peft(tmp_path / "a.safetensors", random_halves(pipe.components, 1))
    engine, ref = engine_on(Device("cpu")), a_ref(folders["sdxl"], kind, "sdxl")
    try:
        plain = engine.generate(a_request(ref)).images
        done = engine.generate(a_request(ref, loras=(lora(path),)))
        assert done.meta["quantize"] == kind
        assert not np.array_equal(done.images, plain)
        # what the file adds is added to what the quantized layers give: as far as from the model as it is
        whole = a_ref(folders["sdxl"], "", "sdxl")
        expected = engine.generate(a_request(whole, loras=(lora(path),))).images.astype(int)
        far = np.abs(expected - engine.generate(a_request(whole)).images).mean()
        assert np.abs(expected - done.images).mean() < far
        assert np.array_equal(engine.generate(a_request(ref)).images, plain)
    finally:
        engine.close()


def test_a_lora_on_a_layer_adds_its_product() -> None:
    from api.engine.adapters import add_layers
    from api.engine.lora_files import Layer

    for kind in KINDS:
        layer, _ = a_layer(kind)
        own = clone(layer)
        down, up = torch.randn(4, 128), torch.randn(96, 4)
        add_layers(own, [(Layer(down, up, None, 1.0, 1.0), 0.5)])
        x = torch.randn(2, 5, 128)
        with torch.no_grad():
            factor = Layer(down, up, None, 1.0, 1.0).factor(0.5)
            assert torch.equal(own(x), layer(x) + F.linear(F.linear(x, down), up) * factor)


DISTANCES = {"int8": (0.3, 0.01), "fp8": (0.8, 0.025), "nf4": (3.0, 0.05)}
"""Levels of 255 in the mean, and relative error of a call of the denoiser, as docs/quantization.md says them."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_as_far_from_full_precision_as_is_said(kind: str) -> None:
    engine = engine_on(Device("cpu"), DEMO)
    try:
        requests = [draw(shapes(k), "a red circle on a blue background", seed) for seed in (0, 1) for k in ("", kind)]
        images = [engine.generate(request).images.astype(float) for request in requests]
        levels = np.mean([np.abs(a - b).mean() for a, b in zip(images[::2], images[1::2], strict=True)])
        models = {model.ref.quantize: model for model in engine.cache._models.values()}
        torch.manual_seed(0)
        x, text = (
            torch.randn(2, 4, 32, 32),
            torch.randn(2, 77, models[""].components["text_encoder"].config.hidden_size),
        )
        with torch.no_grad():
            exact, own = (models[k].components["unet"](x, 500, text).sample for k in ("", kind))
        error = float((own - exact).norm() / exact.norm())
        print(f"{kind}: {levels:.3f} levels, {error:.5f} of a call")
        assert 0 < levels < DISTANCES[kind][0]
        assert 0 < error < DISTANCES[kind][1]
    finally:
        engine.close()


SCENES = [
    Scene("one", (Thing("red", "circle"),), "blue"),
    Scene("one", (Thing("yellow", "star"),), "black"),
    Scene("one", (Thing("orange", "circle"),), "black", place="left"),
    Scene("one", (Thing("green", "square"),), "red", size="large"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_draws_what_the_prompt_says(kind: str) -> None:
    """The right colour and shape in the right place, of four seeds at least three, as the model as it is does."""
    engine = engine_on(Device("cpu"), DEMO)
    try:
        for scene in SCENES:
            jobs = [draw(shapes(kind), caption(scene), seed, 20) for seed in range(4)]
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                done = list(pool.map(engine.generate, jobs))
            assert all(one.meta["quantized"] == ["unet"] for one in done)
            assert sum(check(one.images[0], scene).right for one in done) >= 3, caption(scene)
    finally:
        engine.close()


# --- what is said before anything is loaded ---


def test_nothing_to_quantize_is_refused_where_it_was_asked_for(folders: dict[str, Path]) -> None:
    engine = engine_on(Device("cpu"), quantization.RULE)
    try:
        request = a_request(a_ref(folders["sd"], "int8"), quantize="int8")
        for ask in (engine.generate, engine.plan):
            with pytest.raises(ApiError, match="no layers that int8 is for") as error:
                ask(request)
            assert (error.value.code, error.value.field) == ("NOT_SUPPORTED", "callInputs.QUANTIZE")
        assert not engine.cache.held()
        done = engine.generate(a_request(a_ref(folders["sd"], "int8")))  # of the server's own configuration
        assert done.meta["numerics"].endswith("eager")
        assert "quantize" not in done.meta
    finally:
        engine.close()


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else object())
    settings = Settings.from_env({"QUANTIZE": "nf4"})
    check_installed(settings)
    assert choose_quantize({}, settings) == "nf4"
    assert choose_quantize({"QUANTIZE": "none"}, settings) == ""
    for kind in ("int8", "fp8"):
        with pytest.raises(ApiError, match="needs torchao") as error:
            choose_quantize({"QUANTIZE": kind}, settings)
        assert (error.value.code, error.value.available) == ("NOT_SUPPORTED", ["none", "nf4"])
        with pytest.raises(SettingsError, match=f"QUANTIZE={kind}"):
            check_installed(Settings.from_env({"QUANTIZE": kind}))
    with pytest.raises(SettingsError):
        Settings.from_env({"QUANTIZE": "int2"})
    with pytest.raises(ApiError, match="Must be one of"):
        check_options({"QUANTIZE": "int2"})


def test_a_package_that_does_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("undefined symbol")

    with pytest.raises(ApiError, match=r"torchao.*undefined symbol") as error:
        quantized_layers._imported("torchao", broken)
    assert error.value.code == "NOT_SUPPORTED"


@pytest.mark.slow
def test_a_worker_that_does_not_quantize_imports_neither() -> None:
    code = (
        "import json, sys\n"
        "from api.worker import __main__ as main\n"
        "main._without_peft(); main._without_quantizers()\n"
        "import api.worker.worker, api.engine.generate, diffusers\n"
        "diffusers.StableDiffusionPipeline, diffusers.FluxPipeline, diffusers.QwenImagePipeline\n"
        "print(json.dumps([name for name in ('torchao', 'bitsandbytes') if name in sys.modules]))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == []


def test_models_are_told_apart(folders: dict[str, Path]) -> None:
    keys = {a_ref(folders["sd"], kind).key for kind in ("", *KINDS)}
    assert len(keys) == 4
    assert {field.name for field in dataclasses.fields(PartSpec)} >= {"quantize"}
