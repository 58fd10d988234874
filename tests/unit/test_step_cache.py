"""Steps that are skipped: as diffusers' own hooks do it, for the job that asks for it and no other."""

from __future__ import annotations

import concurrent.futures
import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

from api.engine.calls import Ticket
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.step_cache import StepCaching
from api.engine.views import view
from api.errors import ApiError
from api.schema.catalogue import catalogue
from api.schema.generation import GenerationRequest, ModelRef, StepCache
from api.service.options import check_options
from api.service.step_cache import PIPELINES, check_step_cache
from tests.families import save_family
from tests.generating import a_request
from tests.unit.test_offload import Setup, save_flux

FIRST = StepCache("first_block", 0.2)
SEER = StepCache("taylorseer", 3)
CONFIGS = {
    FIRST: diffusers.FirstBlockCacheConfig(threshold=0.2),
    SEER: diffusers.TaylorSeerCacheConfig(cache_interval=3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in ("flux", "flux2-klein", "sd")}
    save_flux(found["flux"])
    save_family("flux2-klein", found["flux2-klein"])
    save_family("sd", found["sd"])
    return found


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(Device("cpu"), embeddings_limit=0)
    yield made
    made.close()


PIPES = {"flux": "FluxPipeline", "flux2-klein": "Flux2KleinPipeline", "sd": "StableDiffusionPipeline"}
MORE: dict[str, Any] = {"flux2-klein": {"max_sequence_length": 32, "text_encoder_out_layers": [1]}}
"""Arguments for text encoders of few layers."""


def a_job(folders: dict[str, Path], cache: StepCache | None, family: str = "flux", **more: Any) -> GenerationRequest:
    guidance = 4.0 if family == "flux2-klein" else 3.5
    inputs = {"prompt": "a circle", "num_inference_steps": 8, "width": 64, "height": 64, "guidance_scale": guidance}
    inputs |= MORE.get(family, {})
    scheduler = "EulerDiscreteScheduler" if family == "sd" else "FlowMatchEulerDiscreteScheduler"
    model = ModelRef(f"tiny/{family}", "main", "fp32", str(folders[family]))
    return a_request(f"{cache}", model, PIPES[family], scheduler, inputs, step_cache=cache, **more)


def by_diffusers(folder: Path, family: str, config: Any) -> np.ndarray:
    pipe = getattr(diffusers, PIPES[family]).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if config is not None:
        pipe.transformer.enable_cache(config)
    guidance = 4.0 if family == "flux2-klein" else 3.5
    out = pipe(
        prompt="a circle", num_inference_steps=8, width=64, height=64, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(1), output_type="np",
        **MORE.get(family, {}),
    )  # fmt: skip
    return np.rint(out.images * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("family", "cache"),
    [("flux", FIRST), ("flux", SEER), ("flux2-klein", SEER)],
    ids=["flux", "flux seer", "klein seer"],
)
def test_the_same_image_as_diffusers_own(
    family: str, cache: StepCache, folders: dict[str, Path], engine: Engine
) -> None:
    """With guidance, too: what is kept with the prompt is not what is kept without."""
    done = engine.generate(a_job(folders, cache, family))
    assert np.array_equal(done.images, by_diffusers(folders[family], family, CONFIGS[cache]))
    plain = engine.generate(a_job(folders, None, family))
    assert np.array_equal(plain.images, by_diffusers(folders[family], family, None))
    told = {
        "first_block": {"kind": "first_block", "threshold": 0.2},
        "taylorseer": {"kind": "taylorseer", "interval": 3},
    }
    assert (done.meta["step_cache"], done.meta["lossy"]) == (told[cache.kind], ["step_cache"])
    assert done.meta["numerics"] == f"{plain.meta['numerics']}/{cache.word}"
    assert not {"lossy", "step_cache"} & set(plain.meta)


class Blocks:
    """Counts the runs of FLUX's last block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        forward = FluxSingleTransformerBlock.forward

        def counting(block: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return forward(block, *args, **kwargs)

        counting.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(FluxSingleTransformerBlock, "forward", counting)


def test_steps_are_skipped(folders: dict[str, Path], engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, counts = Blocks(monkeypatch), {}
    images = {}
    for threshold in (0.0, 0.2, 1.0):
        blocks.count = 0
        images[threshold] = engine.generate(a_job(folders, StepCache("first_block", threshold))).images
        counts[threshold] = blocks.count
    assert counts[1.0] == 3 < counts[0.2] < counts[0.0] == 3 * 8  # three such blocks, eight steps
    assert np.array_equal(images[0.0], engine.generate(a_job(folders, None)).images)
    again = engine.generate(a_job(folders, StepCache("first_block", 1.0))).images  # nothing is left from the last one
    assert np.array_equal(again, images[1.0])


@pytest.mark.slow
def test_others_hear_nothing_of_it(folders: dict[str, Path], engine: Engine) -> None:
    asked = [(cache, seed) for seed in (1, 2) for cache in (None, FIRST, None, SEER, StepCache("first_block", 1.0))]
    jobs = [a_job(folders, cache, seed=seed) for cache, seed in asked]
    alone = [engine.generate(job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        done = list(pool.map(engine.generate, jobs))
    for one, expected in zip(done, alone, strict=True):
        # in batches sums have another order
        assert np.abs(one.images.astype(int) - expected.images).max() <= 1
        assert one.meta["numerics"] == expected.meta["numerics"]


def test_nothing_of_it_is_left(folders: dict[str, Path], engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks and modules hold each other, and what they keep is activations: it goes with the job, not with a collection."""
    seen: list[weakref.ref[Any]] = []
    applied = StepCaching.applied

    def watched(self: StepCaching, components: Any) -> dict[str, Any]:
        own = applied(self, components)
        seen.extend(weakref.ref(part) for part in own["transformer"].modules() if part is not components["transformer"])
        return own

    monkeypatch.setattr(StepCaching, "applied", watched)
    gc.collect()
    gc.disable()
    try:
        engine.generate(a_job(folders, FIRST))
        assert len(seen) > 20
        assert not [reference for reference in seen if reference() is not None]
    finally:
        gc.enable()
    shared = next(iter(engine.cache._models.values())).components["transformer"]
    assert not shared.is_cache_enabled
    assert not any("_diffusers_hook" in vars(part) for part in shared.modules())


@pytest.mark.parametrize("way", ["model", "sequential"])
def test_of_an_offloaded_model(way: str, folders: dict[str, Path]) -> None:
    it = Setup()
    try:
        expected = it.engine.generate(a_job(folders, FIRST)).images
        done = it.engine.generate(a_job(folders, FIRST, offload=way))
        assert done.meta["placement"] == way
        assert np.array_equal(done.images, expected)
    finally:
        it.engine.close()


def test_what_it_cannot_be_had_for(folders: dict[str, Path], engine: Engine) -> None:
    with pytest.raises(ApiError, match="step_cache cannot be had") as error:
        engine.generate(a_job(folders, FIRST, "sd"))
    assert (error.value.code, error.value.field) == ("NOT_SUPPORTED", "callInputs.step_cache")
    for pipeline in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"):
        with pytest.raises(ApiError, match="for no UNet") as error:
            check_step_cache({"step_cache": FIRST}, pipeline)
        assert error.value.code == "NOT_SUPPORTED"
        check_step_cache({}, pipeline)
    check_step_cache({"step_cache": FIRST}, "FluxPipeline")
    with pytest.raises(ApiError, match="taylorseer does") as error:
        check_step_cache({"step_cache": FIRST}, "Flux2KleinPipeline")
    assert error.value.available == ["taylorseer"]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (True, StepCache("first_block", 0.08)),
        ({}, StepCache("first_block", 0.08)),
        ({"threshold": 0}, StepCache("first_block", 0.0)),
        ({"kind": "first_block", "threshold": 0.3}, StepCache("first_block", 0.3)),
        ({"kind": "taylorseer"}, StepCache("taylorseer", 5)),
        ({"kind": "taylorseer", "interval": 2}, StepCache("taylorseer", 2)),
        (False, None),
    ],
)
def test_how_it_is_asked_for(sent: Any, expected: StepCache | None) -> None:
    assert check_options({"step_cache": sent}).get("step_cache") == expected


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ("first_block", "step_cache"),
        (1, "step_cache"),
        ({"kind": "teacache"}, "step_cache.kind"),
        ({"kind": ["first_block"]}, "step_cache.kind"),
        ({"threshold": 2}, "step_cache.threshold"),
        ({"threshold": True}, "step_cache.threshold"),
        ({"threshold": float("nan")}, "step_cache.threshold"),
        ({"interval": 3}, "step_cache.interval"),
        ({"kind": "taylorseer", "interval": 0}, "step_cache.interval"),
        ({"kind": "taylorseer", "interval": 1.5}, "step_cache.interval"),
        ({"kind": "taylorseer", "threshold": 0.1}, "step_cache.threshold"),
    ],
)
def test_how_it_is_not(sent: Any, field: str) -> None:
    with pytest.raises(ApiError) as error:
        check_options({"step_cache": sent})
    assert (error.value.status, error.value.field) == (400, f"callInputs.{field}")


def test_the_pipelines_are_those_of_the_installed_version() -> None:
    TransformerBlockRegistry._register()
    known = {cls.__module__ for cls in TransformerBlockRegistry._registry}
    assert set(PIPELINES) <= set(catalogue().pipelines)
    for name in PIPELINES:
        cls = getattr(diffusers, name)
        assert "cache_context(" in inspect.getsource(cls.__call__), name
        annotation = inspect.signature(cls).parameters["transformer"].annotation
        denoiser: Callable[..., Any] = annotation if isinstance(annotation, type) else getattr(diffusers, annotation)
        assert hasattr(denoiser, "enable_cache"), name
        assert denoiser.__module__ in known, name


def image(step: int, *shape: int) -> torch.Tensor:
    """What changes little from step to step."""
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, step)]
    return drawn[0] + 0.05 * drawn[1]


ONE = torch.ones(1)
DENOISERS: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]]]] = {
    "CogView4Pipeline": (
        lambda: diffusers.CogView4Transformer2DModel(
            patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, out_channels=4,
            text_embed_dim=8, time_embed_dim=8, condition_dim=4, sample_size=8,
        ),
        lambda step: {
            "hidden_states": image(step, 1, 4, 8, 8), "encoder_hidden_states": torch.ones(1, 5, 8), "timestep": 500 * ONE,
            "original_size": torch.ones(1, 2), "target_size": torch.ones(1, 2), "crop_coords": torch.ones(1, 2),
        },
    ),
    "Flux2KleinPipeline": (
        lambda: diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        lambda step: {
            "hidden_states": image(step, 1, 16, 16), "encoder_hidden_states": torch.ones(1, 5, 16), "timestep": ONE / 2,
            "img_ids": torch.zeros(16, 4), "txt_ids": torch.zeros(5, 4),
        },
    ),
    "HunyuanImagePipeline": (
        lambda: diffusers.HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=8, text_embed_2_dim=None,
            rope_axes_dim=(4, 4), guidance_embeds=False,
        ),
        lambda step: {
            "hidden_states": image(step, 1, 4, 8, 8), "encoder_hidden_states": torch.ones(1, 5, 8), "timestep": 500 * ONE,
            "encoder_attention_mask": torch.ones(1, 5),
        },
    ),
    "QwenImagePipeline": (
        lambda: diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=3,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        lambda step: {
            "hidden_states": image(step, 1, 16, 16), "encoder_hidden_states": torch.ones(1, 5, 16), "timestep": ONE / 2,
            "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool), "img_shapes": [[(1, 4, 4)]],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("pipeline", DENOISERS)
@pytest.mark.parametrize("cache", [StepCache("first_block", 0.5), SEER], ids=lambda cache: cache.kind)
def test_denoisers_of_other_families(pipeline: str, cache: StepCache) -> None:
    """What the table of pipelines says works does, and skips; what it does not say does not."""
    torch.manual_seed(0)
    make, call = DENOISERS[pipeline]
    denoiser = make().eval()
    with torch.no_grad(), StepCaching(cache) as stepping:
        exact = [denoiser(**call(step), return_dict=False)[0] for step in range(5)]
        if cache.kind not in PIPELINES[pipeline]:
            with pytest.raises((ApiError, TypeError)):
                run(stepping, denoiser, call)
            return
        found = run(stepping, denoiser, call)
    assert torch.equal(found[0], exact[0])
    assert any(not torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def run(stepping: StepCaching, denoiser: Any, call: Callable[[int], dict[str, Any]]) -> list[torch.Tensor]:
    own = stepping.applied({"transformer": denoiser})["transformer"]
    found = []
    for step in range(5):
        for name in ("cond", "uncond"):
            with own.cache_context(name):
                out = own(**call(step), return_dict=False)[0]
        found.append(out)
    return found


def test_its_calls_are_never_divided_or_merged(folders: dict[str, Path], engine: Engine) -> None:
    """A call in halves would compare one half with what was kept of the other."""
    engine.generate(a_job(folders, None))
    shared = next(iter(engine.cache._models.values())).components["transformer"]
    with StepCaching(FIRST) as stepping:
        own = stepping.applied({"transformer": shared})["transformer"]
        for part, alone in ((own, True), (shared, False)):
            seen = view(part, engine.executor, Ticket())
            method = vars(seen)["_view_tree"].method("forward")
            assert getattr(method, "runs_alone", False) is alone
            with seen.cache_context("cond"):
                assert part.is_cache_enabled is alone
