"""Attention kernels by name: the same images, for whoever asked, and torch's own where there are none."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

from api.engine import attention
from api.engine.attention import components_with, same_as, switch
from api.engine.cloning import clone
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.loader import LoadedModel, load
from api.schema.attention import ATTENTIONS, FORCED, NATIVE, PACKAGES, asked
from api.schema.generation import GenerationRequest, ModelRef
from api.settings import Settings
from tests.adapters import lora, random_halves, save_peft
from tests.budgeted import Apart
from tests.controlled import save_image_encoder, save_ip_adapter
from tests.generating import a_request
from tests.tiny import save_tiny
from tests.unit.test_ip_adapters import Made
from tests.unit.test_offload import save_flux

TOLERANCE = 2e-6


class Kernel:
    """A backend of the registry that is in a package that is not installed.

    Attributes:
        calls: shapes of queries.
        away: what it is wrong by.
        largest: size of a head.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.away = 0.0
        self.largest = 256

    def __call__(self, query: Any, key: Any, value: Any, attn_mask: Any = None, scale: Any = None) -> Any:
        if attn_mask is not None:
            raise ValueError("`attn_mask` is not supported")
        if query.shape[-1] > self.largest:
            raise RuntimeError(f"heads of {query.shape[-1]} are too large")
        self.calls.append(tuple(query.shape))
        turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*turned, scale=scale).transpose(1, 2) * (1 + self.away)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """For ``flash`` and ``sage``."""
    made = Kernel()
    names = {"query", "key", "value", "attn_mask", "scale"}
    for name in (AttentionBackendName.FLASH, AttentionBackendName.SAGE):
        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, made)
        monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, names)
        monkeypatch.setitem(_AttentionBackendRegistry._constraints, name, [])
    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN", True)
    monkeypatch.setattr(dispatch, "_CAN_USE_SAGE_ATTN", True)
    return made


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, empty in (("_faults", {}), ("_refused", {}), ("_told", set())):
        monkeypatch.setattr(attention, name, empty)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    found = {}
    for name, save in (("sd", save_tiny), ("flux", save_flux)):
        folder: Path = tmp_path_factory.mktemp(name)
        save(folder)  # type: ignore[operator]
        found[name] = ModelRef(f"tiny/{name}", "main", "fp32", str(folder))
    return found


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(Device("cpu"), embeddings_limit=0)
    yield made
    made.close()


def asking(model: ModelRef, kernels: str, seed: int = 1, **more: Any) -> GenerationRequest:
    flux = model.model_id == "tiny/flux"
    inputs = {"prompt": f"a circle {seed}", "num_inference_steps": 3, "width": 64, "height": 64}
    pipeline = "FluxPipeline" if flux else "StableDiffusionPipeline"
    scheduler = "FlowMatchEulerDiscreteScheduler" if flux else "EulerDiscreteScheduler"
    return a_request(f"{kernels}-{seed}", model, pipeline, scheduler, inputs, seed=seed, attention=kernels, **more)


def here(function: Any) -> Any:
    return function()


def denoiser(model: LoadedModel) -> Any:
    return model.components.get("unet") or model.components["transformer"]


def call(part: Any) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=drawn)

    with torch.no_grad():
        if isinstance(part, diffusers.UNet2DConditionModel):
            return part(draw(2, 4, 32, 32), torch.tensor(3), draw(2, 7, 32)).sample  # type: ignore[no-any-return]
        ids = torch.zeros(16, 3), torch.zeros(7, 3)
        given = {"hidden_states": draw(2, 16, 16), "encoder_hidden_states": draw(2, 7, 16)}
        more = {"pooled_projections": draw(2, 16), "guidance": torch.ones(2), "timestep": torch.ones(2)}
        return part(**given, **more, img_ids=ids[0], txt_ids=ids[1]).sample  # type: ignore[no-any-return]


# --- what is computed ---


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_torchs_own_through_the_registry_is_what_diffusers_computes(kind: str, models: dict[str, ModelRef]) -> None:
    part = denoiser(load(models[kind], Device("cpu")))
    own = clone(part)
    switch(own, NATIVE)
    expected = call(part)
    assert (call(own) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert not any(hasattr(type(p), attention._BACKEND) for p in part.attn_processors.values())
    assert all(hasattr(type(p), attention._BACKEND) for p in own.attn_processors.values())


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_every_attention_of_a_denoiser_goes_to_the_kernel(
    kind: str, models: dict[str, ModelRef], kernel: Kernel
) -> None:
    model = load(models[kind], Device("cpu"))
    parts, used = components_with(model, "flash", {}, here)
    assert used == "flash"
    kernel.calls.clear()
    own, shared = parts["unet" if kind == "sd" else "transformer"], denoiser(model)
    expected = call(shared)
    assert not kernel.calls
    given = call(own)
    assert len(kernel.calls) == len(shared.attn_processors)
    assert (given - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert parts["vae"] is model.components["vae"]
    assert own.state_dict(keep_vars=True).keys() == shared.state_dict().keys()
    assert {id(p) for p in own.parameters()} == {id(p) for p in shared.parameters()}


def test_nothing_of_the_process_is_switched(models: dict[str, ModelRef], kernel: Kernel) -> None:
    before = _AttentionBackendRegistry.get_active_backend()
    parts, _ = components_with(load(models["flux"], Device("cpu")), "flash", {}, here)
    call(parts["transformer"])
    assert _AttentionBackendRegistry.get_active_backend() == before


def test_all_names_are_known_to_diffusers_and_to_the_settings() -> None:
    known = {name.value for name in AttentionBackendName}
    assert {*PACKAGES, *FORCED, "native"} <= known
    assert not any("hub" in name for name in ATTENTIONS)
    assert {Settings.from_env({"ATTENTION": name}).attention for name in ATTENTIONS} == set(ATTENTIONS)


def test_what_a_request_says_wins() -> None:
    assert asked(None, None, "flash") == "flash"
    assert asked("native", None, "flash") == NATIVE
    assert asked(None, True, "auto") == "xformers"
    assert asked(None, False, "xformers") == NATIVE
    assert asked(None, False, "flash") == "flash"
    assert asked("auto", False, "flash") == "auto"


# --- several at once ---


@pytest.mark.parametrize("kind", ["sd", pytest.param("flux", marks=pytest.mark.slow)])
def test_jobs_with_different_kernels_do_not_disturb_each_other(
    kind: str, models: dict[str, ModelRef], engine: Engine, kernel: Kernel
) -> None:
    kernel.away = 0.015  # seen in the images, and near enough not to be refused
    names = [NATIVE, "_native_math", "flash"]
    wanted = [asking(models[kind], name, seed) for seed in (1, 2) for name in names]
    alone = {request.id: engine.generate(request) for request in wanted}
    for request in wanted:
        assert alone[request.id].meta["numerics"] == f"cpu/float32/{request.attention}/eager"
    assert not np.array_equal(alone["flash-1"].images, alone["sdpa-1"].images)
    together = threading.Barrier(len(wanted))

    def run(request: GenerationRequest) -> np.ndarray:
        together.wait()
        return engine.generate(request).images

    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
        for request, images in zip(wanted, pool.map(run, wanted), strict=True):
            away = np.abs(images.astype(int) - alone[request.id].images.astype(int)).max()
            assert away <= 1, f"{request.id}: {away}"  # sums in another order


def test_jobs_with_the_same_kernels_are_merged(models: dict[str, ModelRef], engine: Engine, kernel: Kernel) -> None:
    engine.generate(asking(models["sd"], "flash"))
    kernel.calls.clear()
    together = threading.Barrier(3)

    def run(seed: int) -> None:
        together.wait()
        engine.generate(asking(models["sd"], "flash", seed))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    assert max(shape[0] for shape in kernel.calls) > 2  # more than one request with guidance


@pytest.mark.parametrize("kind", ["flux", pytest.param("sd", marks=pytest.mark.slow)])
def test_weights_that_come_and_go_have_the_kernels_too(kind: str, models: dict[str, ModelRef], kernel: Kernel) -> None:
    engine = Engine(Apart(), embeddings_limit=0)
    expected = engine.generate(asking(models[kind], "flash")).images
    for way in ("model", "sequential"):
        done = engine.generate(asking(models[kind], "flash", offload=way))
        assert (done.meta["attention"], done.meta["placement"]) == ("flash", way)
        assert np.array_equal(done.images, expected)
    engine.close()


@pytest.mark.slow
def test_adapters_go_with_the_kernels(tmp_path: Path, engine: Engine, kernel: Kernel) -> None:
    save_tiny(tmp_path / "model")
    save_image_encoder(tmp_path / "image_encoder", 3)
    save_ip_adapter(tmp_path / "one.safetensors", tmp_path / "model", 0)
    model = ModelRef("tiny/sd", "main", "fp32", str(tmp_path / "model"))
    file = save_peft(tmp_path / "lora.safetensors", random_halves(load(model, Device("cpu")).components, 1))
    made = Made("StableDiffusion", tmp_path / "model", tmp_path, engine)
    looked_at = made.request([("one", 0.6, [1])], loras=[lora(file)])
    for request in (asking(model, NATIVE, loras=(lora(file),)), looked_at):
        expected = engine.generate(msgspec.structs.replace(request, attention=NATIVE))
        kernel.calls.clear()
        done = engine.generate(msgspec.structs.replace(request, attention="flash"))
        assert done.meta["attention"] == "flash"
        assert np.abs(done.images.astype(int) - expected.images.astype(int)).max() <= 1
        # eight layers; attention to pictures is one more in each of the four that look at the prompt
        steps = [shape for shape in kernel.calls if shape[0] == 2]  # what is tried first is one row
        assert len(steps) == 3 * (12 if request is looked_at else 8)
        assert not np.array_equal(done.images, engine.generate(asking(model, "flash")).images)


def test_tiles_have_the_kernels_too(models: dict[str, ModelRef], engine: Engine) -> None:
    done = engine.generate(asking(models["sd"], "_native_math", low_vram=True))
    assert done.meta["attention"] == "_native_math"


def test_new_processors_attend_as_those_before(models: dict[str, ModelRef], kernel: Kernel) -> None:
    """What diffusers does to a denoiser that gets an IP-Adapter."""
    unet = denoiser(load(models["sd"], Device("cpu")))
    own = clone(unet)
    switch(own, "flash")
    new = clone(own)
    size = {"hidden_size": 16, "cross_attention_dim": 32}
    new.set_attn_processor(
        {
            name: IPAdapterAttnProcessor2_0(**size) if name.endswith("attn2.processor") else type(processor)()
            for name, processor in own.attn_processors.items()
        }
    )
    same_as(own, new)
    kinds = {name: type(processor) for name, processor in new.attn_processors.items()}
    assert {getattr(kind, attention._BACKEND) for kind in kinds.values()} == {"flash"}
    for name, kind in kinds.items():
        assert issubclass(kind, IPAdapterAttnProcessor2_0 if "attn2" in name else AttnProcessor2_0)
    same_as(unet, plain := clone(unet))
    assert not any(hasattr(type(p), attention._BACKEND) for p in plain.attn_processors.values())


# --- what cannot be had ---


@pytest.mark.parametrize("name", ["xformers", "flash", "sage", "_native_cudnn"])
def test_what_is_not_there_is_torchs_own_and_logged_once(
    name: str, models: dict[str, ModelRef], engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    plain = engine.generate(asking(models["sd"], NATIVE)).images
    with caplog.at_level(logging.WARNING, "api.engine"):
        for kind in ("sd", "sd", "flux"):
            done = engine.generate(asking(models[kind], name))
            assert (done.meta["attention"], done.meta["numerics"]) == ("sdpa", "cpu/float32/sdpa/eager")
            if kind == "sd":
                assert np.array_equal(done.images, plain)
    told = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert len(told) == (1 if name in PACKAGES else 2), told  # an operator is looked for at each size of a head
    assert all("sdpa instead" in line for line in told)


def test_a_kernel_that_computes_something_else_is_refused(models: dict[str, ModelRef], kernel: Kernel) -> None:
    model = load(models["sd"], Device("cpu"))
    kernel.away = 0.05
    assert components_with(model, "flash", {}, here)[1] == NATIVE
    assert components_with(model, "sage", {}, here)[1] == "sage"  # as near as 8 bit come


def test_lossy_kernels_are_told_to_be(models: dict[str, ModelRef], engine: Engine, kernel: Kernel) -> None:
    done = engine.generate(asking(models["sd"], "sage"))
    assert done.meta["numerics"] == "cpu/float32/sage/eager/lossy"
    assert done.meta["lossy"] == ["attention"]


def test_calls_without_an_operator_are_torchs_own(
    models: dict[str, ModelRef], kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    unet = denoiser(load(models["sd"], Device("cpu")))
    own = clone(unet)
    switch(own, "flash")
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2)
    given = {"sample": torch.randn(2, 4, 32, 32), "timestep": 3, "encoder_hidden_states": torch.randn(2, 7, 32)}
    with caplog.at_level(logging.WARNING, "api.engine"), torch.no_grad():
        for _ in range(2):
            right = unet(**given, encoder_attention_mask=mask).sample
            assert (own(**given, encoder_attention_mask=mask).sample - right).abs().max() <= 1e-5
    assert kernel.calls, "the calls without a mask are its own"
    assert len([record for record in caplog.records if "attn_mask" in record.getMessage()]) == 1


def test_a_head_that_is_too_large_leaves_the_others(kernel: Kernel, models: dict[str, ModelRef]) -> None:
    model = load(models["sd"], Device("cpu"))
    sizes = {size for _, _, size in attention._sizes(model.components["unet"])}
    assert sizes == {4}
    kernel.largest = 3
    assert components_with(model, "flash", {}, here) == (model.components, NATIVE)


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("none left"), RuntimeError("CUDA error: an illegal access")])
def test_faults_of_the_device_are_not_taken_for_a_missing_operator(
    fault: Exception, models: dict[str, ModelRef], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(models["sd"], Device("cpu"))
    parts, _ = components_with(model, "flash", {}, here)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise fault

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.FLASH, fail)
    with pytest.raises(type(fault), match=str(fault)):
        call(parts["unet"])


def test_auto_is_what_was_settled_for_the_dtype(models: dict[str, ModelRef], kernel: Kernel) -> None:
    model = load(models["sd"], Device("cpu"))
    assert components_with(model, "auto", {torch.float16: "flash"}, here) == (model.components, NATIVE)
    assert components_with(model, "auto", {torch.float32: "flash"}, here)[1] == "flash"
