"""Weights in the host's memory: the same images in less of the device's, right books, and every byte comes back."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from api.engine import blocks
from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine, Generated
from api.engine.offload import Offloaded, held_as
from api.engine.rooms import Bound, Carrier, Guest
from api.errors import ApiError
from api.schema.generation import GenerationRequest, ModelRef
from tests.budgeted import Allocator, Apart, Counting, Outside
from tests.running import ROOT
from tests.tiny import save_tiny

PLENTY = 10**9
WAYS = [
    ("sd", "model"), ("other", "none"), ("sd", "sequential"), ("flux", "model"), ("other", "model"), ("sd", "none"),
    ("flux", "sequential"),
]  # fmt: skip


def save_sdxl(folder: Path) -> None:
    torch.manual_seed(2)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models" / "shapes" / "tokenizer")
    text: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2,
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=4, attention_head_dim=4, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 16, transformer_layers_per_block=2,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=small_vae(), text_encoder=CLIPTextModel(CLIPTextConfig(**text)), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text, projection_dim=16)), tokenizer_2=tokenizer,
        unet=unet, scheduler=diffusers.EulerDiscreteScheduler(),
    ).save_pretrained(folder)  # fmt: skip


def save_flux(folder: Path) -> None:
    torch.manual_seed(3)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models" / "shapes" / "tokenizer")
    clip = CLIPTextConfig(
        hidden_size=16, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=3, vocab_size=len(tokenizer), pad_token_id=0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    diffusers.FluxPipeline(
        vae=small_vae(), text_encoder=CLIPTextModel(clip), tokenizer=tokenizer, text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer, transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)  # fmt: skip


def small_vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, latent_channels=4,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1,
    )  # fmt: skip


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "sd": (save_tiny, "StableDiffusionPipeline"),
    "sdxl": (save_sdxl, "StableDiffusionXLPipeline"),
    "flux": (save_flux, "FluxPipeline"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    found = {}
    for name, (save, _) in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        save(folder)
        found[name] = ModelRef(f"tiny/{name}", "main", "fp32", str(folder))
    folder = tmp_path_factory.mktemp("sd-1")
    save_tiny(folder, 1)
    return found | {"other": ModelRef("tiny/other", "main", "fp32", str(folder))}


def a_request(model: ModelRef, seed: int = 1, side: int = 64, images: int = 1, **more: Any) -> GenerationRequest:
    pipeline = KINDS.get(model.model_id.removeprefix("tiny/"), KINDS["sd"])[1]
    inputs = {"prompt": f"a circle {seed}", "num_inference_steps": 2, "num_images_per_prompt": images}
    inputs |= {"width": side, "height": side}
    scheduler = "FlowMatchEulerDiscreteScheduler" if pipeline == "FluxPipeline" else "EulerDiscreteScheduler"
    return GenerationRequest(
        id=str(seed), request_id=str(seed), model=model, pipeline=pipeline, scheduler=scheduler, inputs=inputs,
        pictures={}, seed=seed, images=images, image_format="PNG", image_quality=95, attention="sdpa",
        safety_checker=False, meta={}, **more,
    )  # fmt: skip


class Setup:
    """An engine on a device with memory of its own."""

    def __init__(self, device: int = PLENTY, host: int = PLENTY, capacity: int = PLENTY, strict: bool = False) -> None:
        self.allocator = Allocator()
        apart = Apart(self.allocator)
        limits = Budgets(device, host, shared=False, capacity=capacity, strict=strict)
        # a prompt that comes again would run no encoder, and what is remembered is not in the books
        self.engine = Engine(apart, limits, Outside(apart), embeddings_limit=0)

    def generate(self, request: GenerationRequest) -> Generated:
        with Counting(self.allocator):
            return self.engine.generate(request)

    def settled(self) -> int:
        """Bytes there are when every model has left."""
        for key in self.engine.cache.held():
            self.engine.cache.unload(key)
        self.engine.executor.on_device(gc.collect)
        return self.allocator.live

    def rooms(self, model: ModelRef) -> dict[str, int]:
        """Bytes on the device by the way that a model is held."""
        loader, specs = self.engine.cache.loader, self.engine.cache.parts(model)
        rooms = {way: loader.offloading.room(specs, way) for way in ("model", "sequential")}
        return {"full": sum(spec.bytes for spec in specs), **rooms}


@pytest.fixture
def make() -> Iterator[Callable[..., Setup]]:
    with contextlib.ExitStack() as stack:

        def build(**limits: Any) -> Setup:
            it = Setup(**limits)
            stack.callback(it.engine.close)
            stack.enter_context(it.allocator.inside(it.engine))
            return it

        yield build


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_in_less_memory(kind: str, models: dict[str, ModelRef], make: Callable[..., Setup]) -> None:
    model = models[kind]
    alone = Engine(Device("cpu")).generate(a_request(model)).images
    peaks, rooms = {}, {}
    for way in ("none", "model", "sequential"):
        it = make()
        request = a_request(model, offload=way)
        it.generate(request)  # what is made once
        gc.collect()
        it.allocator.peak = it.allocator.live
        before = it.allocator.live
        done = it.generate(request)
        peaks[way], rooms = it.allocator.peak, it.rooms(model)
        expected = "full" if way == "none" else way
        assert (done.meta["placement"], np.array_equal(done.images, alone)) == (expected, True)
        assert not done.meta["numerics"].endswith(way)
        assert it.engine.cache.memory().device == rooms[expected]
        # what the books say is what there is, but for alignment and the tables of schedulers
        assert rooms[expected] <= before < rooms[expected] + 130_000
        assert it.settled() < 100_000
        assert it.engine.cache.memory().host == 0
    activations = peaks["none"] - rooms["full"]
    assert peaks["model"] < rooms["model"] + activations + 20_000
    assert peaks["sequential"] < peaks["model"] < peaks["none"]


def test_what_the_device_has_no_room_for_is_offloaded(models: dict[str, ModelRef], make: Callable[..., Setup]) -> None:
    for kind in ("sd", "flux"):
        rooms = make().rooms(models[kind])
        full = Engine(Device("cpu")).generate(a_request(models[kind])).images
        for way, budget in (("model", rooms["full"] - 1), ("sequential", rooms["model"] - 1)):
            for limits in ({"capacity": budget}, {"strict": True}):
                it = make(device=budget, **limits)
                assert it.engine.plan(a_request(models[kind])).placement == way
                done = it.generate(a_request(models[kind]))
                assert done.meta["placement"] == way
                assert np.array_equal(done.images, full)
                assert it.engine.cache.tiers.peak <= budget
        it = make(device=rooms["sequential"] - 1, capacity=rooms["sequential"] - 1)
        plan = it.engine.plan(a_request(models[kind]))
        with pytest.raises(ApiError, match="fits in no way") as error:
            it.generate(a_request(models[kind]))
        assert (error.value.code, plan.fits, plan.why) == ("OUT_OF_MEMORY", False, error.value.message)
        with pytest.raises(ApiError, match="GB for models"):
            it.generate(a_request(models[kind], offload="none"))


def test_the_host_has_to_have_room_for_all_of_it(models: dict[str, ModelRef], make: Callable[..., Setup]) -> None:
    size = make().rooms(models["sd"])["full"]
    it = make(host=size - 1)
    assert it.generate(a_request(models["sd"])).meta["placement"] == "full"  # one part is read after the other
    with pytest.raises(ApiError, match="memory of the host"):
        it.generate(a_request(models["sd"], offload="sequential"))
    it = make(host=size)
    assert it.generate(a_request(models["sd"], offload="sequential")).meta["placement"] == "sequential"


def test_a_cpu_has_nothing_to_offload_from(models: dict[str, ModelRef]) -> None:
    engine = Engine(Device("cpu"))
    for way in ("model", "sequential"):
        with pytest.raises(ApiError, match="saves no memory on a CPU") as error:
            engine.generate(a_request(models["sd"], offload=way))
        assert (error.value.code, error.value.field) == ("NOT_SUPPORTED", "callInputs.OFFLOAD")
    done = engine.generate(a_request(models["sd"], low_vram=True))
    assert done.meta["placement"] == "tiled"
    engine.close()


def test_little_memory_is_both(models: dict[str, ModelRef], make: Callable[..., Setup]) -> None:
    it = make()
    tiled = Engine(Device("cpu")).generate(a_request(models["sd"], low_vram=True)).images
    done = it.generate(a_request(models["sd"], low_vram=True))
    assert (done.meta["placement"], done.meta["numerics"][-6:]) == ("model+tiled", "/tiled")
    assert np.array_equal(done.images, tiled)
    assert it.generate(a_request(models["sd"], low_vram=True, offload="sequential")).meta["placement"] == (
        "sequential+tiled"
    )


def test_jobs_of_offloaded_and_other_models_at_once(models: dict[str, ModelRef], make: Callable[..., Setup]) -> None:
    it = make()
    requests = [a_request(models[name], seed, offload=way) for seed in range(3) for name, way in WAYS]
    alone = Engine(Device("cpu"))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = list(pool.map(it.generate, requests))
    for request, one in zip(requests, done, strict=True):
        expected = alone.generate(a_request(request.model, request.seed)).images
        assert int(np.abs(one.images.astype(int) - expected).max()) <= 1  # sums in another order
        assert one.meta["placement"] == {"none": "full"}.get(request.offload, request.offload)
    del done, one
    assert it.settled() < 50_000


def test_switching_between_ways_in_little_room(models: dict[str, ModelRef], make: Callable[..., Setup]) -> None:
    rooms = make().rooms(models["sd"])
    it = make(device=rooms["full"], host=rooms["full"] * 2)
    expected = {name: Engine(Device("cpu")).generate(a_request(models[name])).images for name in ("sd", "other")}
    for name, way in [
        ("sd", "none"),
        ("sd", "model"),
        ("other", "sequential"),
        ("sd", "sequential"),
        ("other", "none"),
    ] * 2:
        done = it.generate(a_request(models[name], offload=way))
        assert np.array_equal(done.images, expected[name])
        memory = it.engine.cache.memory()
        assert memory.device <= rooms["full"]
        assert memory.host <= rooms["full"] * 2
    held = it.engine.cache.held()
    assert set(held) == {models["sd"].key, models["other"].key}
    assert {type(each.ref) for each in held.values()} == {ModelRef}
    it.engine.cache.unload(models["other"].key)
    assert set(it.engine.cache.held()) == {models["sd"].key}


def test_what_runs_short_elsewhere_is_offloaded(
    models: dict[str, ModelRef], make: Callable[..., Setup], caplog: pytest.LogCaptureFixture
) -> None:
    it = make()
    expected = it.generate(a_request(models["flux"], side=128)).images
    gc.collect()
    it.allocator.budget = it.allocator.peak - 20_000
    with caplog.at_level(logging.INFO, "api.engine"):
        done = it.generate(a_request(models["flux"], side=128))
    assert done.meta["placement"] in ("model", "sequential")
    assert np.array_equal(done.images, expected)
    assert "does not fit as full: model from now on" in caplog.text
    refused = it.allocator.refused
    again = it.generate(a_request(models["flux"], side=128))
    assert (again.meta["placement"], it.allocator.refused) == (done.meta["placement"], refused)
    with pytest.raises(ApiError) as error:
        it.generate(a_request(models["flux"], side=128, offload="none"))
    assert error.value.available["placements"] == ["full"]


def test_a_model_that_cannot_be_loaded_whole_is_offloaded(
    models: dict[str, ModelRef], make: Callable[..., Setup], caplog: pytest.LogCaptureFixture
) -> None:
    """The budget says that there is room, and there is not."""
    it = make()
    rooms = it.rooms(models["sd"])
    it.allocator.budget = rooms["full"] - 50_000
    it.engine.load(models["sd"])
    assert it.engine.cache.held()[models["sd"].key].tier == "host"
    done = it.generate(a_request(models["sd"], side=16))
    assert done.meta["placement"] in ("model", "sequential")
    assert "does not load as full: model from now on" in caplog.text
    refused = it.allocator.refused
    assert it.generate(a_request(models["sd"], side=16)).meta["placement"] == done.meta["placement"]
    assert it.allocator.refused == refused


# --- blocks ---


class Stack(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(count))
        self.attention = nn.MultiheadAttention(64, 2)
        self.head = nn.Linear(64, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_and_those_used_by_others_come_with_the_part() -> None:
    stack = Stack()
    layout = blocks.of_module(stack, sum(p.numel() * 4 for p in stack.parameters()))
    assert set(layout.blocks) == {f"layers.{n}" for n in range(4)}
    names = {name for weight in layout.rest.weights for name in weight.names}
    assert names == {"embed.weight", "head.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert layout.block() == 64 * 64 * 4
    assert layout.whole.size == layout.rest.size + 4 * layout.block()
    assert layout.small == sum(p.numel() * 4 for p in stack.parameters() if p.dim() == 1)


def test_clones_share_the_room_and_a_ref_knows_its_model(
    models: dict[str, ModelRef], make: Callable[..., Setup]
) -> None:
    it, ref = make(), held_as(models["sd"], "model")
    assert isinstance(ref, Offloaded)
    assert (ref.full, ref.plain, held_as(models["sd"], "full")) == (models["sd"].key, models["sd"], models["sd"])
    with it.engine.line.lease(ref, lambda: False) as model:
        unet = model.components["unet"]
        assert unet.device == torch.device("cpu")
        assert type(unet).__name__ == "UNet2DConditionModel"
        guest = vars(unet)["_offload_guest"]
        assert copy.deepcopy(guest) is guest
        assert vars(model.components["vae"])["_offload_guest"].room is guest.room
        with guest.present():
            assert unet.conv_in.weight.untyped_storage().data_ptr() == guest.room.flat.untyped_storage().data_ptr()
            weight = guest.room.apart((unet.conv_in.weight, [unet.conv_in.bias]))
            assert weight[0].untyped_storage().data_ptr() != guest.room.flat.untyped_storage().data_ptr()
            assert weight[1][0] is unet.conv_in.bias


def leave_nothing(bound: Bound) -> None:
    """What is not there is not a number, and so is every image made of it."""
    for parameter, here in bound._pairs:
        parameter.data = torch.full_like(here, float("nan"))


def test_a_part_is_never_taken_from_under_its_own_call(models: dict[str, ModelRef], make: Callable[..., Setup]) -> None:
    it, ref = make(), held_as(models["sd"], "model")
    with it.engine.line.lease(ref, lambda: False) as model:
        unet, text = (vars(model.components[name])["_offload_guest"] for name in ("unet", "text_encoder"))
        with unet.present():
            with pytest.raises(RuntimeError, match="called by another"), text.present():
                pass
            assert unet.room.guest is unet


@pytest.mark.parametrize("ahead", [False, True])
def test_a_part_whose_copy_fails_is_not_taken_for_there(
    ahead: bool, models: dict[str, ModelRef], make: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bound, "leave", leave_nothing)
    it = make()
    it.engine.cache.loader.offloading._carrier.ahead = ahead  # type: ignore[attr-defined]
    request = a_request(models["sd"], offload="sequential")
    expected = it.generate(request).images
    start, left = Carrier.start, [5]

    def failing(self: Carrier, *copies: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("injected")
        return start(self, *copies)

    monkeypatch.setattr(Carrier, "start", failing)
    for count in range(1, 12):
        left[0] = count
        with contextlib.suppress(ApiError):  # a batch is run in halves after it
            it.generate(request)
        assert left[0] <= 0
        again = it.generate(request).images
        assert int(np.abs(again.astype(int) - expected).max()) <= 1  # sums in another order


def test_the_next_block_is_brought_while_one_runs(
    models: dict[str, ModelRef], make: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, with two places."""
    monkeypatch.setattr(Bound, "leave", leave_nothing)
    it, fetched = make(), list[bool]()
    offloading = it.engine.cache.loader.offloading
    offloading._carrier.ahead = True  # type: ignore[attr-defined]
    fetch = Guest._fetch
    monkeypatch.setattr(
        Guest, "_fetch", lambda self, block, *running: (fetched.append(bool(running)), fetch(self, block, *running))
    )
    alone = Engine(Device("cpu"))
    for kind in KINDS:
        expected = alone.generate(a_request(models[kind])).images
        fetched.clear()
        for _ in range(2):
            assert np.array_equal(it.generate(a_request(models[kind], offload="sequential")).images, expected)
        assert sum(fetched) > len(fetched) // 2, "most blocks are there before they are called"
    alone.close()
