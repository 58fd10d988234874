"""Solvers on a tiny FLUX, which predicts a flow: those that are said to suit it solve the same equation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from api.engine.device import Device
from api.engine.generate import Engine
from api.errors import ApiError
from api.models.description import InstalledModel, describe
from api.schema.generation import ModelRef
from api.schema.schedulers import scheduler_classes
from api.service.schedulers import choose_scheduler, verdict
from tests.generating import a_request
from tests.unit.test_offload import save_flux


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> InstalledModel:
    folder = tmp_path_factory.mktemp("flux")
    save_flux(folder)
    return describe("tiny/flux", folder)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    started = Engine(Device("cpu"))
    yield started
    started.close()


def draw(engine: Engine, model: InstalledModel, name: str, steps: int) -> np.ndarray:
    chosen = choose_scheduler({"SCHEDULER": name}, model, "")
    inputs = {"prompt": "a", "num_inference_steps": steps, "width": 32, "height": 32, "guidance_scale": 3.5}
    ref = ModelRef("tiny/flux", "", "fp32", str(Path(model.folder)))
    request = a_request(name, ref, "FluxPipeline", chosen.name, inputs, scheduler_args=chosen.args)
    return engine.generate(request).images[0].astype(float)


def test_solvers_that_suit_come_to_the_same_image(engine: Engine, flux: InstalledModel) -> None:
    assert flux.predicts == "flow_prediction"
    names = [name for name in scheduler_classes() if verdict(name, flux).state == "suits"]
    assert {"FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"} <= set(names)
    reference = draw(engine, flux, "FlowMatchEulerDiscreteScheduler", 200)
    for name in names:
        assert np.abs(draw(engine, flux, name, 50) - reference).mean() < 3, name


def test_others_run_or_say_why_not(engine: Engine, flux: InstalledModel) -> None:
    for name in scheduler_classes():
        if verdict(name, flux).state == "unsuited":
            try:
                draw(engine, flux, name, 3)
            except ApiError as error:
                assert (error.code, error.status) == ("INVALID_SCHEDULER", 422), error.message
