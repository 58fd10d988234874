from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from api.engine.extras import Extras
from api.errors import ApiError


def asked(*output: str) -> Any:
    return SimpleNamespace(output=output, meta={}, image_metadata=True)


def test_the_latents_of_all_steps_have_a_limit() -> None:
    extras, latents = Extras(object(), asked("intermediate_latents")), torch.zeros(2**20)
    with pytest.raises(ApiError, match="more than 32 MiB") as caught:
        for step in range(1, 10):
            extras.after(step, latents)
    assert (caught.value.code, caught.value.field, step) == ("LIMIT_EXCEEDED", "callInputs.output", 9)


def test_latents_are_as_they_were_when_the_step_was_done() -> None:
    from safetensors.torch import load

    extras, latents = Extras(object(), asked("latents", "intermediate_latents")), torch.zeros(4)
    for step in (1, 2):
        latents += 1
        extras.after(step, latents)
    latents.zero_()
    found = load(extras.encoded(object())["latents"])
    assert {name: value[0].item() for name, value in found.items()} == {"latents": 2, "step_1": 1, "step_2": 2}


def test_latents_are_kept_in_whatever_order_they_lie_in_memory() -> None:
    extras, latents = Extras(object(), asked("intermediate_latents")), torch.zeros(1, 4, 2, 2)
    extras.after(1, latents.to(memory_format=torch.channels_last))
    assert extras.encoded(object())


def test_nothing_is_kept_that_is_not_asked_for() -> None:
    extras = Extras(object(), asked())
    extras.after(1, torch.zeros(4))
    assert extras.encoded(object()) == {}


@pytest.mark.parametrize(("output", "says"), [("latents", "shows no latents"), ("mask", "a way of its own")])
def test_pipelines_that_show_none_say_so(output: str, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        Extras(object(), asked(output)).encoded(object())
    assert caught.value.status == 422
