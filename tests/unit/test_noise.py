"""A seeded job gets its own random numbers, whatever else draws meanwhile."""

from __future__ import annotations

import inspect
import threading
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from api.engine.calls import Ticket
from api.engine.executor import Executor
from api.engine.noise import Seeded
from api.engine.pipelines import make_pipeline
from api.engine.schedulers import make_scheduler, seeded
from api.engine.views import view
from api.schema.schedulers import scheduler_classes
from api.service.schedulers import is_missing
from tests.unit.test_merging import sd, vae


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampled(scheduler: Any, disturbed: bool, per_image: bool = False) -> torch.Tensor:
    """A few steps as pipelines of flow-matching models make them: no generator is handed over."""
    given = [generator(1), generator(2)] if per_image else generator()
    scheduler = seeded(scheduler, given)
    scheduler.set_timesteps(4)
    sample = torch.ones(2, 4, 8, 8)
    if hasattr(scheduler, "scale_model_input"):
        sample = scheduler.scale_model_input(sample, scheduler.timesteps[0])
    for t in scheduler.timesteps:
        if disturbed:
            torch.randn(3)  # another job, on the global generator
        sample = scheduler.step(sample * 0.1, t, sample, return_dict=False)[0]
    return sample


STOCHASTIC: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": True},
    "FlowMatchLCMScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "DDPMScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"},
    "EDMDPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "SASolverScheduler": {},
    "UnCLIPScheduler": {},
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_schedulers_draw_from_the_jobs_generator_also_when_the_pipeline_hands_them_none(name: str) -> None:
    def fresh() -> Any:
        return getattr(diffusers, name)(**STOCHASTIC[name])

    alone = sampled(fresh(), disturbed=False)
    assert torch.equal(sampled(fresh(), disturbed=True), alone)
    assert torch.equal(sampled(fresh(), disturbed=True, per_image=True), sampled(fresh(), False, per_image=True))
    # and it is noise: another seed gives another image
    other = seeded(fresh(), generator(8))
    other.set_timesteps(4)
    own = seeded(fresh(), generator(7))
    own.set_timesteps(4)
    t, sample = own.timesteps[1], torch.ones(2, 4, 8, 8)
    for scheduler in (own, other):
        scheduler.step(sample * 0.1, scheduler.timesteps[0], sample)
    assert not torch.equal(
        own.step(sample * 0.1, t, sample, return_dict=False)[0],
        other.step(sample * 0.1, t, sample, return_dict=False)[0],
    )


def test_what_a_pipeline_hands_over_is_what_is_drawn_from() -> None:
    scheduler = seeded(diffusers.DDPMScheduler(), generator(1))
    plain = diffusers.DDPMScheduler()
    sample = torch.ones(1, 4, 8, 8)
    ours = scheduler.step(sample, 500, sample, generator=generator(5)).prev_sample
    assert torch.equal(ours, plain.step(sample, 500, sample, generator=generator(5)).prev_sample)
    assert "generator" in inspect.signature(scheduler.step).parameters  # pipelines ask


def test_no_scheduler_draws_without_a_generator_and_a_seed() -> None:
    """One that diffusers adds and that takes neither is seen here."""
    known = {"AmusedScheduler", "VQDiffusionScheduler", "ScoreSdeVeScheduler"}  # not for images from noise
    for name, found in scheduler_classes().items():
        if is_missing(found) or name in known:
            continue
        cls = getattr(diffusers, name)
        source = inspect.getsource(cls.step)
        draws = any(word in source for word in ("randn", "rand(", "noise_sampler"))
        assert not draws or "generator" in inspect.signature(cls.step).parameters, name


def test_a_noise_sampler_is_seeded_with_the_jobs_seed() -> None:
    """DPMSolverSDEScheduler, which needs torchsde and is refused where it is not installed."""
    for given, expected in ((generator(3), 3), ([generator(3), generator(4)], [3, 4])):
        scheduler = SimpleNamespace(noise_sampler_seed=None, step=lambda model_output, timestep, sample: None)
        assert seeded(scheduler, given).noise_sampler_seed == expected


def test_a_language_model_draws_its_tokens_from_the_jobs_seed_and_keeps_its_state_to_itself() -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    shared = Qwen2ForCausalLM(config).eval()
    ids = torch.tensor([[3, 4, 5]])
    executor = Executor(1)
    try:

        def written(seed: int) -> list[int]:
            own = view(shared, executor, ticket := Ticket(), seed)
            with executor.job(ticket), torch.no_grad():
                return own.generate(input_ids=ids, do_sample=True, max_new_tokens=12)[0].tolist()  # type: ignore[no-any-return]

        alone = {seed: written(seed) for seed in range(4)}
        assert len({tuple(tokens) for tokens in alone.values()}) == 4
        assert written(2) == alone[2]
        calls = executor.calls
        found: dict[int, list[int]] = {}
        threads = [threading.Thread(target=lambda s=seed: found.update({s: written(s)})) for seed in alone]  # type: ignore[misc]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == alone
        assert executor.calls - calls == 4 * 12  # other jobs go on between two tokens
    finally:
        executor.close()


def test_the_generator_of_a_draw_is_the_callers_where_it_gives_one() -> None:
    chances = torch.ones(1, 1000)
    with Seeded(1):
        given = torch.multinomial(chances, 5, generator=generator(9))
        ours = torch.multinomial(chances, 5)
    assert torch.equal(given, torch.multinomial(chances, 5, generator=generator(9)))
    assert torch.equal(ours, torch.multinomial(chances, 5, generator=generator(1)))


def test_make_scheduler_gives_each_job_its_own() -> None:
    pristine = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    model: Any = SimpleNamespace(schedulers={"FlowMatchEulerDiscreteScheduler": pristine})
    one, other = (make_scheduler(model, "FlowMatchEulerDiscreteScheduler", generator(seed)) for seed in (1, 2))
    assert one is not other and one is not pristine
    assert "step" not in vars(pristine)


@pytest.mark.parametrize("return_dict", [True, False])
def test_latents_drawn_without_a_generator_are_the_jobs_own(return_dict: bool) -> None:
    part, picture = vae().eval(), torch.ones(1, 3, 16, 16)
    executor = Executor(1)
    try:

        def drawn(seed: int) -> torch.Tensor:
            torch.randn(1)  # another job
            found = view(part, executor, Ticket(), seed).encode(picture, return_dict=return_dict)
            return (found.latent_dist if return_dict else found[0]).sample()  # type: ignore[no-any-return]

        with torch.no_grad():
            assert torch.equal(drawn(1), drawn(1))
            assert not torch.equal(drawn(1), drawn(2))
            given = view(part, executor, Ticket(), 1).encode(picture).latent_dist.sample(generator(5))
            assert torch.equal(given, part.encode(picture).latent_dist.sample(generator(5)))
    finally:
        executor.close()


class TwoSchedulersPipeline(diffusers.DiffusionPipeline):
    """As combined pipelines are: a prior with a scheduler of its own."""

    def __init__(self, unet: Any, scheduler: Any, prior_scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, prior_scheduler=prior_scheduler)


def test_a_priors_scheduler_is_the_jobs_own_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "TwoSchedulersPipeline", TwoSchedulersPipeline, raising=False)
    shared = diffusers.DDPMScheduler()
    components = {"unet": sd(), "scheduler": diffusers.DDIMScheduler(), "prior_scheduler": shared}
    model: Any = SimpleNamespace(schedulers={}, components=components, config={})
    request: Any = SimpleNamespace(
        pipeline="TwoSchedulersPipeline", scheduler="DDIMScheduler", scheduler_args={}, safety_checker=True, code=None
    )
    pipes = [make_pipeline(model, components, request, generator(seed)) for seed in (1, 2)]
    pipes[0].prior_scheduler.set_timesteps(4)
    pipes[1].prior_scheduler.set_timesteps(9)
    assert len(pipes[0].prior_scheduler.timesteps) == 4
    assert shared.num_inference_steps is None
    assert [type(pipe).__name__ for pipe in pipes] == ["TwoSchedulersPipeline"] * 2
    assert pipes[0].device == pipes[0]._execution_device == torch.device("cpu")
