"""Every family with other kernels than torch's choice and with its convolutions turned round: as diffusers draws it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from api.engine import run
from api.engine.budgets import Budgets
from api.engine.generate import Engine
from tests.unit.test_layout import Turning
from tests.unit.test_matrix import PIPELINES, Matrix, as_floats, model_inputs

pytestmark = pytest.mark.slow


@pytest.fixture
def matrix(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Matrix]:
    monkeypatch.setattr(run, "to_uint8", as_floats)
    limits = Budgets(2**40, 2**40, shared=False)
    engine = Engine(Turning(), limits, attention={torch.float32: "_native_math"})
    yield Matrix(tmp_path_factory.mktemp("families"), engine)
    engine.close()


@pytest.mark.parametrize("family", PIPELINES)
def test_a_family_is_drawn_as_ever(family: str, matrix: Matrix) -> None:
    task = next(iter(PIPELINES[family]))
    for mode in ("alone", "company"):
        matrix.compare(family, task, mode)
    done = matrix.engine.generate(matrix.request(family, task, model_inputs(family, task, 1, 1)))
    assert done.meta["numerics"] == "cpu/float32/_native_math/eager/channels_last"
