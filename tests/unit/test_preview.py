"""Small pictures of latents: are they what the image shows, for every kind of autoencoder, and at no cost to the image?"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from api.engine.calls import Cancelled
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.preview import LatentMap, Previews, fit
from api.schema.generation import GenerationRequest, ModelRef
from tests.running import ROOT

SHAPES = ROOT / "models" / "shapes"
RED, BLUE = (220, 40, 40), (50, 80, 220)
TOLERANCE = 1
"""Levels of 255 by which an image made beside others may differ; float32."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    running = Engine(Device("cpu"))
    yield running
    running.executor.close()


def order(prompt: str, seed: int = 1, preview: int | None = 1, folder: Path = SHAPES, **more: Any) -> GenerationRequest:
    given = {"num_inference_steps": 20, "guidance_scale": 7.5, "width": 64, "height": 64, "num_images_per_prompt": 1}
    inputs: dict[str, Any] = {"prompt": prompt, **given, **more}
    return GenerationRequest(
        id=f"{prompt} {seed}",
        request_id="",
        model=ModelRef("m", "", "fp32", str(folder)),
        pipeline="StableDiffusionPipeline",
        scheduler="DPMSolverMultistepScheduler",
        inputs=inputs,
        pictures={},
        seed=seed,
        images=inputs["num_images_per_prompt"],
        image_format="PNG",
        image_quality=95,
        attention="sdpa",
        safety_checker=False,
        meta={},
        preview=preview,
    )


class Seen:
    """What a request told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []
        self.pictures: list[np.ndarray] = []

    def step(self, step: int, total: int) -> None:
        self.told.append(("step", step, total))

    def preview(self, step: int, total: int, pictures: np.ndarray) -> None:
        self.told.append(("preview", step, total))
        self.pictures.append(pictures)


def generate(engine: Engine, request: GenerationRequest) -> tuple[np.ndarray, Seen]:
    seen = Seen()
    return engine.generate(request, on_step=seen.step, on_preview=seen.preview).images, seen


def small(image: np.ndarray, factor: int = 4) -> np.ndarray:
    return np.asarray(Image.fromarray(image).reduce(factor)).astype(int)


def tiny_vae(channels: int = 4, **config: Any) -> Any:
    torch.manual_seed(7)
    made = diffusers.AutoencoderKL(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=channels,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, **config,
    )  # fmt: skip
    return made.eval().requires_grad_(False)


def distance(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(picture.astype(int) - colour).mean(-1)


def test_the_last_preview_shows_the_picture(engine: Engine) -> None:
    """Its colours, where they are: nearer to the right one than to the other, all over the picture."""
    images, seen = generate(engine, order("a red circle on a blue background"))
    last, final = seen.pictures[-1][0], small(images[0])
    assert last.shape == (16, 16, 3)
    truly_red = distance(final, RED) < distance(final, BLUE)
    assert 0.1 < truly_red.mean() < 0.6
    looks_red = distance(last, RED) < distance(last, BLUE)
    assert (looks_red == truly_red).mean() > 0.95
    assert np.abs(last - final).mean() < 40
    # it becomes what it is: noise first, the picture at the end
    differences = [np.abs(pictures[0] - final).mean() for pictures in seen.pictures]
    assert differences[0] > 1.5 * differences[-1]
    assert np.mean(differences[:5]) > np.mean(differences[-5:])


def test_every_picture_of_the_demo_model_is_met(engine: Engine) -> None:
    prompts = ("two green triangles on a white background", "a yellow star on black", "a purple square on orange")
    for prompt in prompts:
        images, seen = generate(engine, order(prompt, preview=20))
        final = small(images[0])
        wrong = np.abs(seen.pictures[-1][0] - final).mean()
        assert wrong < 45, prompt
        assert wrong < 0.6 * np.abs(final.mean((0, 1)) - final).mean() + 25, prompt


@pytest.mark.parametrize(
    ("every", "steps", "wanted"),
    [(1, 3, [1, 2, 3]), (2, 5, [2, 4]), (9, 5, []), (0, 20, [5, 10, 15, 20]), (0, 10, [3, 6, 9]), (0, 2, [1, 2])],
)
def test_previews_come_after_the_steps_that_were_asked_for(
    engine: Engine, every: int, steps: int, wanted: list[int]
) -> None:
    _, seen = generate(engine, order("a", preview=every, num_inference_steps=steps))
    assert [step for kind, step, _ in seen.told if kind == "preview"] == wanted
    assert [step for kind, step, _ in seen.told if kind == "step"] == list(range(1, steps + 1))
    for number, (kind, step, total) in enumerate(seen.told):
        assert total == steps
        assert kind == "step" or seen.told[number - 1] == ("step", step, total)


def test_one_for_each_image_in_their_order(engine: Engine) -> None:
    request = order("a", num_images_per_prompt=3, guidance_scale=1.0)
    images, seen = generate(engine, request)
    assert seen.pictures[-1].shape == (3, 16, 16, 3)
    for number, picture in enumerate(seen.pictures[-1]):
        near = [np.abs(picture - small(image)).mean() for image in images]
        assert int(np.argmin(near)) == number


def test_previews_change_nothing(engine: Engine) -> None:
    fresh = Engine(Device("cpu"))  # fits its map in the midst of a request with noise of its own
    try:
        for request in (order("a red circle", seed=3), order("a red circle", seed=3, num_images_per_prompt=2)):
            with_them, seen = generate(fresh, request)
            without, unseen = generate(engine, order("a red circle", 3, None, **_changed(request)))
            assert len(seen.pictures) == 20
            assert not unseen.pictures
            assert with_them.tobytes() == without.tobytes()
    finally:
        fresh.executor.close()


def _changed(request: GenerationRequest) -> dict[str, Any]:
    return {"num_images_per_prompt": request.images}


def test_nothing_is_made_for_nobody() -> None:
    fresh = Engine(Device("cpu"))
    try:
        fresh.generate(order("a", num_inference_steps=2))
        model = fresh.cache.hold(order("a").model)
        assert model is not None
        assert model.latent_maps == {}
    finally:
        fresh.executor.close()


def test_jobs_at_once_see_what_they_see_alone() -> None:
    orders = [
        order("a red circle", 1, num_inference_steps=12),
        order("a yellow star on black", 2, num_inference_steps=9, num_images_per_prompt=2),
        order("two green triangles", 3, num_inference_steps=15, guidance_scale=3.0),
        order("a white ring on green", 4, 3, num_inference_steps=14),
    ]
    alone_engine, together_engine = Engine(Device("cpu")), Engine(Device("cpu"))
    try:
        alone = [generate(alone_engine, request) for request in orders]
        together: dict[int, tuple[np.ndarray, Seen]] = {}

        def run(number: int) -> None:
            together[number] = generate(together_engine, orders[number])

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(orders))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together_engine.executor.runs < together_engine.executor.calls  # some were merged
        for number, (images, seen) in enumerate(alone):
            others, told = together[number]
            assert np.abs(images.astype(int) - others).max() <= TOLERANCE
            assert seen.told == told.told
            for one, other in zip(seen.pictures, told.pictures, strict=True):
                assert np.abs(one.astype(int) - other).max() <= 2
    finally:
        alone_engine.executor.close()
        together_engine.executor.close()


def test_a_cancelled_job_shows_nothing_more(engine: Engine) -> None:
    seen, stop = Seen(), threading.Event()

    def show(step: int, total: int, pictures: np.ndarray) -> None:
        seen.preview(step, total, pictures)
        if step == 4:
            stop.set()

    with pytest.raises(Cancelled):
        engine.generate(order("a"), on_step=seen.step, on_preview=show, cancelled=stop.is_set)
    assert seen.told[-1] == ("preview", 4, 20)


def test_cancelled_while_it_fits_is_cancelled() -> None:
    model = SimpleNamespace(latent_maps={}, ref=SimpleNamespace(model_id="m"))

    def encode(pictures: torch.Tensor) -> Any:
        raise Cancelled

    vae = SimpleNamespace(device="cpu", dtype=torch.float32, encode=encode, config={})
    with pytest.raises(Cancelled):
        previews(model, SimpleNamespace(vae=vae, vae_scale_factor=2)).prepare()
    assert model.latent_maps == {}  # the next one tries again


def test_the_map_is_the_same_each_time() -> None:
    latents = torch.randn(1, 4, 8, 8)
    vae = tiny_vae()
    global_state = torch.get_rng_state()
    assert np.array_equal(fit(vae, 2)(latents), fit(vae, 2)(latents))
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize(
    "vae",
    [
        tiny_vae(4),
        tiny_vae(16, shift_factor=0.1, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False),
        diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), upsampling_scaling_factor=2).eval(),
        diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=3).eval(),
    ],
    ids=lambda vae: f"{type(vae).__name__} {vae.config.latent_channels}",
)  # fmt: skip
def test_any_autoencoder_has_a_map(vae: Any) -> None:
    with torch.no_grad():
        picture = torch.zeros(1, 3, 32, 32)
        coded = vae.encode(picture)
        latents = coded.latent_dist.mode() if hasattr(coded, "latent_dist") else coded.latents
        found = fit(vae, 32 // latents.shape[-1])
    assert found.channels == latents.shape[1]
    assert found(latents).shape == (1, *latents.shape[2:], 3)
    assert found(latents.half()).dtype == np.uint8


def demo_vae(**config: Any) -> Any:
    """The demo model's, with latents at another scale for the denoiser: one with random weights knows no colours."""
    made = diffusers.AutoencoderKL.from_pretrained(SHAPES / "vae").eval().requires_grad_(False)
    made.register_to_config(**config)
    return made


def encoded(vae: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Latents of a picture, red at the left and blue at the right, and what it looks like at their size."""
    picture = torch.tensor(RED).view(1, 3, 1, 1).expand(1, 3, 64, 96) / 255
    picture[..., 48:] = torch.tensor(BLUE).view(1, 3, 1, 1) / 255
    with torch.no_grad():
        latents = vae.encode(picture * 2 - 1).latent_dist.mode()
    wanted = functional.avg_pool2d(picture, 4).mul(255).permute(0, 2, 3, 1)
    return latents, wanted.numpy()


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 1.0},
        {"scaling_factor": 0.13},
        {"scaling_factor": 0.36, "shift_factor": 0.5},
        {"scaling_factor": 0.5, "latents_mean": [1.0, -2.0, 0.0, 3.0], "latents_std": [2.0, 4.0, 1.0, 8.0]},
    ],
)
def test_latents_are_taken_as_the_denoiser_has_them(config: dict[str, Any]) -> None:
    vae = demo_vae(**config)
    latents, wanted = encoded(vae)
    if "latents_mean" in config:
        mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        latents = (latents - mean) * config["scaling_factor"] / std
    else:
        latents = (latents - config.get("shift_factor", 0.0)) * config["scaling_factor"]
    with torch.no_grad():
        found = fit(vae, 4)
    right = np.abs(found(latents) - wanted).mean()
    mirrored = np.abs(found(latents.flip(-1)) - wanted).mean()
    assert right < 35
    assert mirrored > 3 * right


def test_noise_many_times_as_wide_as_pictures_is_shown_as_noise(engine: Engine) -> None:
    model = engine.cache.hold(order("a").model)
    assert model is not None
    found: LatentMap = model.latent_maps["vae"]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    shown = found(noise * 14)
    assert np.abs(shown.astype(int) - found(noise * 140)).mean() < 2
    assert ((shown > 20) & (shown < 235)).mean() > 0.05  # not all black and white
    assert found(torch.full((1, 4, 16, 16), torch.nan)).shape == (1, 16, 16, 3)


def previews(
    model: Any, pipe: Any, size: tuple[int | None, int | None] = (96, 64), seen: Seen | None = None
) -> Previews:
    return Previews(model, pipe, size, 1, (seen or Seen()).preview)


def flux(vae: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer.eval()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_packed_latents_are_unpacked() -> None:
    vae = demo_vae(shift_factor=0.1, scaling_factor=0.36)
    pipe, model, seen = flux(vae), SimpleNamespace(latent_maps={}, ref=SimpleNamespace(model_id="m")), Seen()
    shown = previews(model, pipe, seen=seen)
    with torch.no_grad():
        shown.prepare()
        latents, wanted = encoded(vae)
        scaled = (latents - 0.1) * 0.36
        shown.after(1, 2, pipe._pack_latents(scaled, *scaled.shape))
        assert np.array_equal(seen.pictures[0], model.latent_maps["vae"](scaled))
        assert np.abs(seen.pictures[0] - wanted).mean() < 35

        def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            shown.after(step + 1, 2, tensors["latents"])
            return {}

        pipe(
            prompt_embeds=torch.randn(2, 3, 16), pooled_prompt_embeds=torch.randn(2, 8), num_inference_steps=2,
            width=96, height=64, callback_on_step_end=after, output_type="latent",
        )  # fmt: skip
    assert [pictures.shape for pictures in seen.pictures[1:]] == [(2, 16, 24, 3)] * 2


@pytest.mark.parametrize(
    ("size", "latents"),
    [
        ((48, 32), torch.zeros(1, 4, 1, 16, 24)),  # frames
        ((48, 32), torch.zeros(1, 9, 16, 24)),  # another number of channels
        ((48, 32), torch.zeros(1, 77, 16)),  # tokens that are not as many as latents
        ((None, None), torch.zeros(1, 96, 16)),  # tokens, and nobody knows their layout
        ((48, 32), None),
    ],
)
def test_latents_of_an_unknown_kind_give_none(
    size: tuple[int | None, int | None], latents: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "api.engine")
    model, seen = SimpleNamespace(latent_maps={}, ref=SimpleNamespace(model_id="m")), Seen()
    shown = previews(model, flux(tiny_vae()), size, seen)
    shown.prepare()
    for step in (1, 2, 3):
        shown.after(step, 3, latents)
    assert seen.pictures == []
    assert len([record for record in caplog.records if "no previews" in record.message]) == 1
    assert model.latent_maps["vae"] is not None  # other requests of the model have theirs


@pytest.mark.parametrize("pipe", [SimpleNamespace(), SimpleNamespace(vae=None, vae_scale_factor=8)])
def test_without_an_autoencoder_there_are_none(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "api.engine")
    model, seen = SimpleNamespace(latent_maps={}, ref=SimpleNamespace(model_id="m")), Seen()
    for _ in range(3):
        shown = previews(model, pipe, seen=seen)
        shown.prepare()
        shown.after(1, 3, torch.zeros(1, 4, 8, 8))
    assert seen.pictures == []
    assert len(caplog.records) == 1


def test_a_moment_without_memory_is_not_for_ever() -> None:
    model, vae = SimpleNamespace(latent_maps={}, ref=SimpleNamespace(model_id="m")), tiny_vae()

    def encode(pictures: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError

    full = SimpleNamespace(device="cpu", dtype=torch.float32, encode=encode, config={})
    previews(model, SimpleNamespace(vae=full, vae_scale_factor=2)).prepare()
    previews(model, SimpleNamespace(vae=vae, vae_scale_factor=2)).prepare()
    assert isinstance(model.latent_maps["vae"], LatentMap)
