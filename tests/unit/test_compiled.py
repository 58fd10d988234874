"""Compiled blocks: who gets them, what they give, and what happens where there are none."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from api.engine.budgets import Budgets
from api.engine.compiled import blocks as blocks_module
from api.engine.compiled import preparer as preparer_module
from api.engine.compiled.artifacts import Code, assembled
from api.engine.compiled.blocks import Blocks
from api.engine.compiled.kinds import Unsuited, build, look, structure
from api.engine.device import Device
from api.engine.generate import Engine, Generated
from api.schema.generation import GenerationRequest, ModelRef
from tests.families import save_family
from tests.tiny import save_tiny

GIB = 2**30


def a_request(model: ModelRef, seed: int = 1, side: int = 64, **more: Any) -> GenerationRequest:
    inputs = {"prompt": f"a circle {seed}", "num_inference_steps": 3, "width": side, "height": side}
    fields = {"pipeline": "StableDiffusionPipeline", "scheduler": "DDIMScheduler", "inputs": inputs, **more}
    return GenerationRequest(
        id=str(seed), request_id=str(seed), model=model, pictures={}, seed=seed, images=1, image_format="PNG",
        image_quality=95, attention="sdpa", safety_checker=False, meta={}, output=("latents",), **fields,
    )  # fmt: skip


def an_engine(folder: Path | None) -> Engine:
    return Engine(Device("cpu"), Budgets(GIB, GIB, True), compiled="blocks" if folder else "off", compile_cache=folder)


def word(done: Generated) -> str:
    return str(done.meta["numerics"].split("/")[3])


def latents(done: Generated) -> torch.Tensor:
    from safetensors.torch import load

    return load(done.extras["latents"])["latents"].float()


def settle(engine: Engine) -> None:
    """Wait until nothing is being prepared."""
    assert engine.blocks is not None
    while engine.blocks.counts()["preparing"]:
        time.sleep(0.05)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRef]:
    folders = [tmp_path_factory.mktemp(f"tiny{seed}") for seed in range(2)]
    for seed, folder in enumerate(folders):
        save_tiny(folder, seed)
    return [ModelRef(folder.name, "main", "fp32", str(folder)) for folder in folders]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the tests of this file compile."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def engines() -> Iterator[Callable[[Path | None], Engine]]:
    made: list[Engine] = []

    def make(folder: Path | None) -> Engine:
        made.append(an_engine(folder))
        if made[-1].blocks:
            made[-1].blocks.preparer.niceness = 0  # a test waits for it
        return made[-1]

    yield make
    for engine in made:
        engine.close()


# --- what code depends on ---


def block(seed: int = 0, heads: int = 2) -> Any:
    torch.manual_seed(seed)
    made = diffusers.models.attention.BasicTransformerBlock(8, heads, 8 // heads, cross_attention_dim=6)
    return made.eval().requires_grad_(False)


def test_a_structure_is_all_but_the_weights() -> None:
    assert structure(block(0)) == structure(block(1))
    assert structure(block(0)) != structure(block(0, heads=4))  # with weights of the same shapes
    other = block(0)
    other.norm1.eps = 0.1
    assert structure(other) != structure(block(0))
    switched = block(0)
    switched.attn1.set_processor(diffusers.models.attention_processor.AttnProcessor())
    assert structure(switched) != structure(block(0))


def test_what_has_hooks_or_holds_a_tensor_is_not_compiled() -> None:
    hooked = block()
    hooked.attn1.register_forward_hook(lambda *_: None)
    held = block()
    held.attn1.mask = [torch.ones(1)]
    for each in (hooked, held, block().train()):
        with pytest.raises(Unsuited):
            structure(each)


def test_a_call_is_taken_apart_and_put_together() -> None:
    forward = type(block()).forward
    arguments = {"hidden_states": torch.ones(3, 4, 8), "timestep": None, "encoder_hidden_states": torch.ones(3, 5, 6)}
    seen = look(forward, (), arguments)
    assert (seen.rows, seen.dynamic) == (3, [True, True])
    positional = look(forward, (arguments["hidden_states"],), {k: arguments[k] for k in ("timestep",)})
    assert positional.spec != seen.spec
    again = build(seen.spec, lambda name, shape, dtype, rows: torch.ones((7, *shape) if rows else shape, dtype=dtype))
    assert look(forward, (), again).spec == seen.spec  # whatever the number of rows
    with pytest.raises(Unsuited):
        look(forward, (), {**arguments, "cross_attention_kwargs": {"unknown": torch.ones(3)}})
    with pytest.raises(Unsuited):
        look(forward, (), {**arguments, "timestep": torch.ones(2)})


def test_more_rows_than_code_takes_are_several_calls(tmp_path: Path) -> None:
    blocks = Blocks(torch.device("cpu"), tmp_path, {}, lambda run: run())
    blocks.close()
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        cross_attention_dim=6, attention_head_dim=2, norm_num_groups=4, layers_per_block=1,
    ).eval().requires_grad_(False)  # fmt: skip
    tree = blocks._planted({"unet": unet})
    assert tree is not None
    own = next(
        module for module in tree.components["unet"].modules() if type(module).__name__ == "BasicTransformerBlock"
    )
    rows: list[int] = []

    def run(hidden: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
        rows.append(len(hidden))
        return [hidden * 2]

    hidden, text = torch.randn(7, 4, 8), torch.randn(7, 5, 6)
    shape = look(type(own).__mro__[1].forward, (), {"hidden_states": hidden, "encoder_hidden_states": text})  # type: ignore[attr-defined]
    digest = vars(own)["_compiled_code"].structure
    order = lambda one, two: run(two, one)  # noqa: E731  sorted by name: the text comes first
    blocks._calls[digest, shape.spec, True] = Code(order, (), 3, 0)
    blocks._calls[digest, shape.spec, False] = Code(order, (), 1, 0)
    assert torch.equal(own(hidden_states=hidden, encoder_hidden_states=text), hidden * 2)
    assert rows == [3, 3, 1]


def test_what_a_block_returns_is_put_together() -> None:
    assert assembled(["tuple", [1, None, ["list", [0]]]], ["a", "b"]) == ("b", None, ["a"])


# --- in an engine ---


@pytest.mark.slow
@pytest.mark.timeout(1800)  # inductor compiles C++
def test_from_eager_to_compiled_and_what_is_kept(
    engines: Callable[[Path | None], Engine], models: list[ModelRef], kept: Path
) -> None:
    plain, first = engines(None), engines(kept)
    requests = [a_request(models[i % 2], i) for i in range(6)]
    requests += [a_request(models[0], i, 32, compile=False) for i in (6, 7)]
    alone = [plain.generate(request) for request in requests]
    assert word(first.generate(requests[0])) == "eager"

    # eight at a time, two checkpoints, two sizes, while it is prepared
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        meanwhile = list(pool.map(first.generate, requests))
    for one, other in zip(alone, meanwhile, strict=True):
        assert (latents(one) - latents(other)).abs().max() <= 1e-4
        assert word(other) == "eager"
    settle(first)
    assert first.blocks is not None
    assert first.blocks.preparer.failed == {}
    made = first.blocks.preparer.compiled
    assert made == 2  # for one row and for more

    # from now on it is another word, for the other checkpoint as well, and nothing is compiled anew
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        after = list(pool.map(first.generate, requests))
    assert [word(each) for each in after] == ["compiled"] * 6 + ["eager"] * 2
    for one, other in zip(alone, after, strict=True):
        assert (latents(one) - latents(other)).abs().max() <= 1e-4
    assert any(not torch.equal(latents(one), latents(other)) for one, other in zip(alone, after, strict=True))
    assert first.blocks.preparer.compiled == made
    asked = first.generate(a_request(models[0], 0, compile=False))
    assert word(asked) == "eager"
    assert np.array_equal(asked.images, alone[0].images)

    # a second server
    counters.clear()
    second = engines(kept)
    assert word(second.generate(requests[0])) == "eager"
    settle(second)
    assert word(second.generate(requests[0])) == "compiled"
    assert second.blocks is not None
    assert (second.blocks.preparer.compiled, second.blocks.preparer.loaded) == (0, 2)
    assert not counters["inductor"]["fxgraph_cache_miss"]
    assert counters["inductor"]["fxgraph_cache_hit"] == 2

    # a call without code: the whole job runs without
    found = dict(second.blocks._calls)
    second.blocks._calls.clear()
    missed = second.generate(requests[0])
    assert word(missed) == "eager"
    assert np.array_equal(missed.images, alone[0].images)
    second.blocks._calls.update(found)
    assert word(second.generate(requests[0])) == "eager"  # it notes its calls again
    settle(second)
    assert word(second.generate(requests[0])) == "compiled"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_transformer(engines: Callable[[Path | None], Engine], tmp_path: Path, kept: Path) -> None:
    save_family("flux", tmp_path)
    flux = {"pipeline": "FluxPipeline", "scheduler": "FlowMatchEulerDiscreteScheduler"}
    request = a_request(ModelRef("flux", "main", "fp32", str(tmp_path)), **flux)
    plain, engine = engines(None), engines(kept)
    alone = plain.generate(request)
    engine.generate(request)
    settle(engine)
    assert engine.blocks is not None
    assert engine.blocks.preparer.failed == {}
    done = engine.generate(request)
    assert word(done) == "compiled"
    assert (latents(done) - latents(alone)).abs().max() <= 1e-4


def sleeper(folder: Path, text: str) -> str:
    """A program in place of Python's."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_preparation_that_is_killed_hangs_or_is_refused(
    engines: Callable[[Path | None], Engine], models: list[ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(tmp_path / "cache")
    assert engine.blocks is not None
    monkeypatch.setattr(preparer_module.sys, "executable", sleeper(tmp_path, "exec sleep 1000"))
    alone = engine.generate(a_request(models[0]))
    while engine.blocks.preparer._process is None:
        time.sleep(0.01)
    assert word(engine.generate(a_request(models[0]))) == "eager"  # while it is at it
    first = engine.blocks.preparer._process
    os.killpg(first.pid, signal.SIGKILL)
    while (second := engine.blocks.preparer._process) in (first, None):
        time.sleep(0.01)
    assert second is not None
    os.killpg(second.pid, signal.SIGKILL)
    while len(engine.blocks.preparer.failed) < 2:
        time.sleep(0.01)
    assert engine.blocks.counts()["eager"] == 1
    assert engine.tally.counts().compiled == {"failed": 2}
    done = engine.generate(a_request(models[0]))
    assert word(done) == "eager"
    assert np.array_equal(done.images, alone.images)
    engine.generate(a_request(models[0], side=32))
    while len(engine.blocks.preparer.failed) < 4:
        time.sleep(0.01)
    assert all("are not tried again" in why for why in list(engine.blocks.preparer.failed.values())[2:])


def test_a_preparation_that_takes_too_long(
    engines: Callable[[Path | None], Engine], models: list[ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(tmp_path / "cache")
    assert engine.blocks is not None
    engine.blocks.preparer._longest = 0.1
    monkeypatch.setattr(preparer_module.sys, "executable", sleeper(tmp_path, "exec sleep 1000"))
    engine.generate(a_request(models[0]))
    settle(engine)
    assert all("more than" in why for why in engine.blocks.preparer.failed.values())
    assert word(engine.generate(a_request(models[0]))) == "eager"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_a_compiler(
    engines: Callable[[Path | None], Engine], models: list[ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    engine = engines(tmp_path / "cache")
    engine.generate(a_request(models[0]))
    assert engine.blocks is not None
    while len(engine.blocks.preparer.failed) < 2:
        time.sleep(0.01)
    assert word(engine.generate(a_request(models[0]))) == "eager"


def test_a_pipeline_that_changes_its_denoiser_is_not_compiled(
    engines: Callable[[Path | None], Engine], models: list[ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(tmp_path / "cache")
    assert engine.blocks is not None
    orders: list[Any] = []
    monkeypatch.setattr(engine.blocks.preparer, "order", orders.append)
    changed = {"pipeline": "StableDiffusionPAGPipeline"}
    inputs = {**a_request(models[0]).inputs, "pag_scale": 3.0}
    engine.generate(a_request(models[0], inputs=inputs, **changed))
    assert engine.blocks.counts()["eager"] == 1
    assert orders == []


def test_another_attention_is_not_compiled_as_torchs_own(
    engines: Callable[[Path | None], Engine], models: list[ModelRef], tmp_path: Path
) -> None:
    engine = engines(tmp_path / "cache")
    assert engine.blocks is not None
    request = msgspec.structs.replace(a_request(models[0]), attention="_native_math")
    done = engine.generate(request)
    assert (done.meta["attention"], word(done)) == ("_native_math", "eager")
    assert not any(engine.blocks.counts().values())


def test_sizes_are_the_clients_choice_and_not_all_are_compiled(
    engines: Callable[[Path | None], Engine], models: list[ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(tmp_path / "cache")
    assert engine.blocks is not None
    orders: list[Any] = []
    monkeypatch.setattr(engine.blocks.preparer, "order", orders.append)
    monkeypatch.setattr(blocks_module, "_ORDERS", 2)
    for side in (64, 32, 48):
        engine.generate(a_request(models[0], side=side))
    assert len(orders) == 2


def test_a_cancelled_job_leaves_the_noting_to_the_next(
    engines: Callable[[Path | None], Engine], models: list[ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(tmp_path / "cache")
    assert engine.blocks is not None
    monkeypatch.setattr(engine.blocks.preparer, "order", lambda order: None)

    def stop(step: int, total: int) -> None:
        raise RuntimeError("the client is gone")

    with pytest.raises(RuntimeError):
        engine.generate(a_request(models[0]), on_step=stop)
    assert engine.blocks.counts() == {"noting": 0, "preparing": 0, "ready": 0, "eager": 0}
    engine.generate(a_request(models[0]))
    assert engine.blocks.counts()["preparing"] == 1
