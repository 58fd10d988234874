"""Which scheduler a request runs with: names, arguments, whether it suits, and that no job sees another's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from api.engine.schedulers import make_scheduler
from api.errors import ApiError
from api.models.description import InstalledModel
from api.schema.schedulers import scheduler_classes
from api.service.samplers import SPACINGS, sampler, samplers
from api.service.schedulers import check_args, choose_scheduler, listing, verdict

DEFAULT = "DPMSolverMultistepScheduler"


def a_model(scheduler: str = DEFAULT, predicts: str = "v_prediction") -> InstalledModel:
    return InstalledModel(
        model_id="a/b", folder=Path(), revision="1", class_name="StableDiffusionPipeline", components=frozenset(),
        scheduler=scheduler, size_multiple=8, text_layers=1, default_size=64, bytes=1, predicts=predicts,
    )  # fmt: skip


def loaded(**settings: Any) -> Any:
    """What the engine knows of a model, as far as schedulers go."""
    own = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction", use_karras_sigmas=True, **settings)
    return SimpleNamespace(schedulers={}, components={"scheduler": own}, ref=SimpleNamespace(model_id="a/b"))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize(
    ("asked", "name", "some"),
    [
        ("DPM++ 2M Karras", DEFAULT, {"use_karras_sigmas": True, "algorithm_type": "dpmsolver++"}),
        ("dpm++ 2m  karras", DEFAULT, {"use_karras_sigmas": True}),
        ("DPM++ 2M", DEFAULT, {"use_karras_sigmas": False, "use_beta_sigmas": False}),
        ("DPM++ 2M SDE Exponential", DEFAULT, {"use_exponential_sigmas": True, "algorithm_type": "sde-dpmsolver++"}),
        ("DPM++ SDE Karras", "DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("EULER A", "EulerAncestralDiscreteScheduler", {}),
        ("Euler SGM Uniform", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
        ("unipc", "UniPCMultistepScheduler", {}),
        ("LMS Karras", "LMSDiscreteScheduler", {"use_karras_sigmas": True}),
        ("Heun", "HeunDiscreteScheduler", {}),
    ],
)  # fmt: skip
def test_a1111_names(asked: str, name: str, some: dict[str, Any]) -> None:
    found = choose_scheduler({"SCHEDULER": asked}, a_model(), DEFAULT)
    assert found.name == name
    assert some.items() <= found.args.items()
    assert choose_scheduler({}, a_model(), asked).name == name  # as the server's own default


def test_every_name_can_be_made_and_its_arguments_are_the_class_s() -> None:
    model = loaded()
    for found in samplers().values():
        assert set(found.args) <= set(scheduler_classes()[found.scheduler].args)
        assert check_args(found.scheduler, found.args) == found.args or any(found.args.get(one) for one in SPACINGS)
        config = make_scheduler(model, found.scheduler, generator(), found.args).config
        assert found.args.items() <= dict(config).items(), found.name
        assert config.prediction_type == "v_prediction"


def test_a_name_without_its_class_s_switch_is_not_made_up() -> None:
    assert sampler("DDIM Karras") is None
    assert sampler("Euler a Karras") is None


@pytest.mark.parametrize(
    ("args", "field", "says"),
    [
        ({"use_karas_sigmas": True}, "use_karas_sigmas", 'Did you mean "use_karras_sigmas"?'),
        ({"use_karras_sigmas": "yes"}, "use_karras_sigmas", "true or false"),
        ({"timestep_spacing": "trailling"}, "timestep_spacing", 'Did you mean "trailing"?'),
        ({"timestep_spacing": 3}, "timestep_spacing", "one of linspace, leading, trailing"),
        ({"solver_order": 4_000_000}, "solver_order", "from 1 to 3"),
        ({"solver_order": 2.5}, "solver_order", "a whole number"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps", "from 1 to 10000"),
        ({"flow_shift": True}, "flow_shift", "a number"),
        ({"trained_betas": [0.1]}, "trained_betas", "no such argument"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_beta_sigmas", "cannot both be true"),
    ],
)
def test_what_is_wrong_with_arguments_is_said_before_any_worker(args: dict, field: str, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        choose_scheduler({"scheduler_args": args}, a_model(), DEFAULT)
    assert caught.value.status == 400
    assert caught.value.field == f"callInputs.scheduler_args.{field}"
    assert says in caught.value.message


def test_arguments_that_are_sent_win_and_one_spacing_turns_off_the_others() -> None:
    asked = {"SCHEDULER": "DPM++ 2M Karras", "scheduler_args": {"use_beta_sigmas": True, "solver_order": 3.0}}
    args = choose_scheduler(asked, a_model(), DEFAULT).args
    assert args["use_beta_sigmas"] is True and args["use_karras_sigmas"] is False
    assert args["solver_order"] == 3 and isinstance(args["solver_order"], int)
    config = make_scheduler(loaded(), DEFAULT, generator(), args).config
    assert config.use_beta_sigmas and not config.use_karras_sigmas


def test_schedulers_with_other_arguments_are_other_schedulers() -> None:
    model = loaded()
    plain = make_scheduler(model, DEFAULT, generator())
    trailing = make_scheduler(model, DEFAULT, generator(), {"timestep_spacing": "trailing"})
    again = make_scheduler(model, DEFAULT, generator())
    assert plain.config.timestep_spacing == again.config.timestep_spacing == "linspace"
    assert trailing.config.timestep_spacing == "trailing"
    assert len({id(each.config) for each in (plain, trailing, again)}) == 3
    for number in range(100):
        make_scheduler(model, DEFAULT, generator(), {"flow_shift": 1 + number / 100})
    assert len(model.schedulers) <= 32
    assert make_scheduler(model, DEFAULT, generator(), {"flow_shift": 9.5}).config.flow_shift == 9.5


def test_words_of_another_class_give_way_to_the_class_s_own() -> None:
    made = make_scheduler(loaded(), "SASolverScheduler", generator())
    assert made.config.algorithm_type == "data_prediction"
    with pytest.raises(ApiError) as caught:  # how the weights were trained never does
        make_scheduler(loaded(beta_schedule="scaled_linear"), "UnCLIPScheduler", generator())
    assert (caught.value.status, caught.value.code) == (422, "INVALID_SCHEDULER")


@pytest.mark.parametrize(
    ("name", "own", "predicts", "state", "says"),
    [
        ("DDIMScheduler", DEFAULT, "v_prediction", "suits", ""),
        ("SASolverScheduler", DEFAULT, "v_prediction", "suits", ""),
        ("LCMScheduler", "PNDMScheduler", "epsilon", "unsuited", "distilled"),
        ("DDIMScheduler", "LCMScheduler", "epsilon", "unsuited", "distilled"),
        ("LCMScheduler", "LCMScheduler", "epsilon", "suits", ""),
        ("EDMEulerScheduler", DEFAULT, "epsilon", "unsuited", "EDM"),
        ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "epsilon", "suits", ""),
        ("IPNDMScheduler", DEFAULT, "v_prediction", "unsuited", "prediction_type"),
        ("UnCLIPScheduler", DEFAULT, "epsilon", "refused", "order"),
        ("EulerAncestralDiscreteScheduler", DEFAULT, "sample", "refused", "predicts sample"),
        ("FlowMatchEulerDiscreteScheduler", DEFAULT, "epsilon", "refused", "flow"),
        ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "flow_prediction", "suits", ""),
        ("FlowMatchHeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "flow_prediction", "unsuited", "refused by"),
        ("SASolverScheduler", "FlowMatchEulerDiscreteScheduler", "flow_prediction", "unsuited", "image's size"),
        ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "flow_prediction", "suits", ""),
        ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "flow_prediction", "refused", "cannot sample a flow"),
        ("DPMSolverSDEScheduler", DEFAULT, "epsilon", "refused", "pip install torchsde"),
    ],
)  # fmt: skip
def test_verdicts(name: str, own: str, predicts: str, state: str, says: str) -> None:
    found = verdict(name, a_model(own, predicts))
    assert found.state == state
    assert says in found.reason


def test_a_model_that_predicts_a_flow_is_told_of_it_and_keeps_its_own_by_default() -> None:
    flux = a_model("FlowMatchEulerDiscreteScheduler", "flow_prediction")
    assert choose_scheduler({}, flux, DEFAULT) == ("FlowMatchEulerDiscreteScheduler", {}, "", "")
    asked = choose_scheduler({"SCHEDULER": "UniPC"}, flux, DEFAULT)
    assert asked.args["use_flow_sigmas"] is True and asked.args["prediction_type"] == "flow_prediction"


def test_a_solver_for_flows_takes_over_the_model_s_shift() -> None:
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, max_shift=0.9)
    model: Any = SimpleNamespace(schedulers={}, components={"scheduler": own}, ref=SimpleNamespace(model_id="a/b"))
    args = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    made = make_scheduler(model, "UniPCMultistepScheduler", generator(), args)
    made.set_timesteps(10, mu=1.0)  # which FLUX's pipeline hands to all
    assert made.config.max_shift == 0.9  # pipelines look there
    even = torch.linspace(1, 1 / 1000, 11)[:-1]
    assert torch.allclose(made.sigmas[:-1], 3 * even / (1 + 2 * even), atol=1e-3)
    assert (
        make_scheduler(model, "UniPCMultistepScheduler", generator(), {**args, "flow_shift": 1.0}).config.flow_shift
        == 1
    )


def test_the_default_gives_way_where_it_only_runs() -> None:
    assert choose_scheduler({}, a_model("LCMScheduler", "epsilon"), DEFAULT).name == "LCMScheduler"
    assert choose_scheduler({}, a_model("DDIMScheduler"), "LCM").name == "DDIMScheduler"


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ApiError, match=r'Did you mean "DPM\+\+ 2M Karras"') as caught:
        choose_scheduler({"SCHEDULER": "DPM+ 2M Karras"}, a_model(), DEFAULT)
    assert (caught.value.status, caught.value.code) == (404, "NO_SUCH_SCHEDULER")


def test_the_listing_has_every_class_once() -> None:
    entries = {entry["name"]: entry for entry in listing(a_model())}
    assert set(entries) == set(scheduler_classes())
    assert entries["DPMSolverSDEScheduler"]["library"] == "torchsde"
    assert not entries["DPMSolverSDEScheduler"]["compatible"]
    assert "Euler a" in entries["EulerAncestralDiscreteScheduler"]["aliases"]
    assert entries["LCMScheduler"]["compatible"] and not entries["LCMScheduler"]["suits"]
    assert entries["UniPCMultistepScheduler"]["args"]["solver_type"]["choices"] == ["bh1", "bh2"]
