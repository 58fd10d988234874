"""What text encoders returned is remembered: within its bytes, for the same weights only, and nobody can spoil it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from api.engine.budgets import Budgets
from api.engine.calls import Ticket
from api.engine.cloning import clone
from api.engine.device import Device
from api.engine.embeddings import Embeddings
from api.engine.executor import Executor
from api.engine.generate import Engine
from api.engine.views import view
from api.schema.generation import ModelRef
from tests.budgeted import Apart, Outside
from tests.generating import a_request
from tests.tiny import save_tiny

PLENTY = 10**8
CLIP = CLIPTextConfig(
    hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=3, vocab_size=99, eos_token_id=98
)


def an_encoder(seed: int = 0, cls: type = CLIPTextModel, config: Any = CLIP) -> Any:
    torch.manual_seed(seed)
    return cls(config).eval()


@pytest.fixture
def executor() -> Iterator[Executor]:
    executor = Executor()
    yield executor
    executor.close()


class Asking:
    """A job that calls encoders through views."""

    def __init__(self, executor: Executor, limit: int = PLENTY) -> None:
        self.executor = executor
        self.embeddings = Embeddings(limit)

    def view(self, encoder: Any) -> Any:
        return view(encoder, self.executor, Ticket(), 0, self.embeddings)

    def call(self, encoder: Any, *ids: int, **flags: Any) -> Any:
        with self.executor.job(Ticket()):
            return self.view(encoder)(torch.tensor([ids]), **flags)

    def calls(self) -> int:
        """That were made."""
        return self.executor.calls


@pytest.fixture
def asking(executor: Executor) -> Asking:
    return Asking(executor)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (CLIPTextModel, CLIP),
        (CLIPTextModelWithProjection, CLIP),
        (T5EncoderModel, T5Config(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, vocab_size=99)),
    ],
)
@pytest.mark.parametrize("flags", [{}, {"output_hidden_states": True}, {"attention_mask": torch.tensor([[1, 1, 0]])}])
def test_what_is_answered_is_what_was_returned(asking: Asking, cls: type, config: Any, flags: dict[str, Any]) -> None:
    encoder = an_encoder(0, cls, config)
    first, again = (asking.call(encoder, 1, 2, 98, **flags) for _ in range(2))
    with torch.no_grad():
        expected = encoder(torch.tensor([[1, 2, 98]]), **flags)
    assert asking.calls() == 1 and asking.embeddings.hits == 1
    assert type(first) is type(again) is type(expected) and list(again) == list(expected)
    for name, value in expected.items():
        for one, other in zip(_tensors(value), _tensors(again[name]), strict=True):
            assert torch.equal(one, other)


def _tensors(value: Any) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def test_whatever_differs_is_another_call(asking: Asking) -> None:
    encoder = an_encoder()
    mask = torch.tensor([[1, 1, 0]])
    calls: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((1, 2, 98), {}), ((1, 3, 98), {}), ((1, 2, 98, 98), {}), ((1, 2, 98), {"output_hidden_states": True}),
        ((1, 2, 98), {"attention_mask": mask}), ((1, 2, 98), {"attention_mask": mask.bool()}),
        ((1, 2, 98), {"attention_mask": torch.ones_like(mask)}), ((1, 2, 98), {"position_ids": torch.tensor([[2, 1, 0]])}),
    ]  # fmt: skip
    for ids, flags in calls:
        asking.call(encoder, *ids, **flags)
    assert (asking.calls(), asking.embeddings.hits) == (len(calls), 0)
    asking.call(encoder, 1, 2, 98)
    assert asking.embeddings.hits == 1


def test_other_weights_and_other_trees_are_never_mixed(asking: Asking) -> None:
    """Another model's encoder, a clone with an adapter, and a view that a job has changed."""
    one, other = an_encoder(1), an_encoder(2)
    adapted = clone(one)
    adapted.final_layer_norm.bias = torch.nn.Parameter(torch.ones(16))
    results = [asking.call(encoder, 1, 2, 98)[0] for encoder in (one, other, adapted)]
    assert asking.embeddings.hits == 0
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    with asking.executor.job(Ticket()):
        changed = asking.view(one)
        changed.final_layer_norm = torch.nn.Identity()
        with_change = changed(torch.tensor([[1, 2, 98]]))[0]
    assert not torch.equal(with_change, results[0])
    assert (asking.embeddings.hits, asking.calls()) == (0, 4)
    assert torch.equal(asking.call(one, 1, 2, 98)[0], results[0])
    assert asking.embeddings.hits == 1


def test_what_a_job_does_to_its_result_is_its_own(asking: Asking) -> None:
    encoder = an_encoder()
    first = asking.call(encoder, 1, 2, 98, output_hidden_states=True)
    before = first[0].clone(), first.hidden_states[1].clone()
    for result in (first, asking.call(encoder, 1, 2, 98, output_hidden_states=True)):
        result[0].zero_()
        result.hidden_states[1].add_(1)
    last = asking.call(encoder, 1, 2, 98, output_hidden_states=True)
    assert asking.calls() == 1
    assert torch.equal(last[0], before[0]) and torch.equal(last.hidden_states[1], before[1])


def test_bytes_are_bounded_and_the_last_used_stay(executor: Executor) -> None:
    encoder = an_encoder()
    size = sum(value.nbytes for value in encoder(torch.tensor([[1, 2, 98]])).values())
    asking = Asking(executor, 3 * size)
    for first in (1, 2, 3, 1, 4, 1):  # 2 is the one that is not used again
        asking.call(encoder, first, 2, 98)
        assert asking.embeddings.bytes <= 3 * size
    assert asking.embeddings.hits == 2
    asking.call(encoder, 2, 2, 98)
    assert asking.embeddings.hits == 2
    asking.call(encoder, 1, 2, 98)
    assert asking.embeddings.hits == 3 and asking.embeddings.bytes == 3 * size
    small = Asking(executor, size - 1)
    small.call(encoder, 1, 2, 98)
    assert small.embeddings.bytes == 0
    off = Asking(executor, 0)
    for _ in range(2):
        off.call(encoder, 1, 2, 98)
    assert off.embeddings.hits == off.embeddings.misses == 0


def test_of_hidden_states_those_are_remembered_that_are_wanted(asking: Asking) -> None:
    encoder = an_encoder()
    with torch.no_grad():
        expected = encoder(torch.tensor([[1, 2, 98]]), output_hidden_states=True)
    rest = expected.last_hidden_state.nbytes + expected.pooler_output.nbytes
    layer = expected.hidden_states[0].nbytes
    for at, calls, layers in (
        (-2, 1, 1),
        (-2, 1, 1),
        (0, 2, 2),
        (-4, 2, 2),
        (slice(-2, None), 3, 3),
        (slice(-2, None), 3, 3),
    ):
        found = asking.call(encoder, 1, 2, 98, output_hidden_states=True)
        assert len(found.hidden_states) == 4
        for one, other in zip(_tensors(found[-1][at]), _tensors(expected.hidden_states[at]), strict=True):
            assert torch.equal(one, other)
        assert (asking.calls(), asking.embeddings.bytes) == (calls, rest + layers * layer)
    with pytest.raises(IndexError):
        found.hidden_states[4]


def test_a_module_that_is_gone_takes_its_results_with_it(asking: Asking) -> None:
    encoder, other = an_encoder(), an_encoder(1)
    asking.call(encoder, 1, 2, 98)
    asking.call(other, 1, 2, 98)
    both = asking.embeddings.bytes
    del encoder
    gc.collect()
    asking.call(other, 1, 2, 98)
    assert asking.embeddings.bytes == both / 2
    asking.embeddings.forget(other)
    assert asking.embeddings.bytes == 0
    asking.call(other, 1, 2, 98)
    assert asking.embeddings.hits == 1 and asking.embeddings.clear() and not asking.embeddings.clear()


def test_many_threads_at_once(executor: Executor) -> None:
    encoder = an_encoder()
    expected = {first: encoder(torch.tensor([[first, 2, 98]]))[0] for first in range(6)}
    asking, wrong = Asking(executor, 20_000), []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            first = int(rng.integers(6))
            found = asking.call(encoder, first, 2, 98)[0]
            if not torch.allclose(found, expected[first], atol=1e-6):
                wrong.append(first)
            found.zero_()
            if rng.random() < 0.05:
                asking.embeddings.clear()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and asking.embeddings.hits > 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRef]:
    refs = []
    for seed in (1, 2):
        folder: Path = tmp_path_factory.mktemp(f"model-{seed}")
        save_tiny(folder, seed)
        refs.append(ModelRef(f"tiny/{seed}", "main", "fp32", str(folder)))
    return refs


def a_job(model: ModelRef, prompt: str = "a red circle", seed: int = 1) -> Any:
    inputs = {"prompt": prompt, "num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 4.0}
    return a_request("job", model, "StableDiffusionPipeline", "DDIMScheduler", inputs, seed=seed)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(Device("cpu"))
    yield engine
    engine.close()


def test_a_repeated_prompt_costs_no_encoder_and_gives_the_same_image(engine: Engine, models: list[ModelRef]) -> None:
    off = Engine(Device("cpu"), embeddings_limit=0)
    try:
        for seed in (1, 2):
            before = engine.executor.calls
            assert np.array_equal(
                engine.generate(a_job(models[0], seed=seed)).images, off.generate(a_job(models[0], seed=seed)).images
            )
            # two steps, the decoder, and at first two prompts
            assert engine.executor.calls - before == (5 if seed == 1 else 3)
    finally:
        off.close()


def test_another_model_takes_the_place_with_no_results_of_the_first(models: list[ModelRef]) -> None:
    """Its weights are put into the modules of the one that leaves."""
    fresh = Engine(Device("cpu"), embeddings_limit=0)
    try:
        expected = [fresh.generate(a_job(model)).images for model in models]
        size = fresh.cache.memory().device // 2
    finally:
        fresh.close()
    apart = Apart()
    engine = Engine(apart, Budgets(int(1.5 * size), PLENTY, shared=False), Outside(apart))
    encoders = []
    try:
        for turn in range(4):
            model = models[turn % 2]
            assert np.array_equal(engine.generate(a_job(model)).images, expected[turn % 2])
            assert list(engine.cache.sizes()) == [model.key]
            encoders.append(next(part for part in engine.cache._modules.values() if isinstance(part, CLIPTextModel)))
        assert len({id(encoder) for encoder in encoders}) == 1
        assert (engine.embeddings.hits, engine.embeddings.misses) == (0, 8)
    finally:
        engine.close()


def test_what_leaves_the_device_leaves_nothing(engine: Engine, models: list[ModelRef]) -> None:
    engine.generate(a_job(models[0]))
    assert engine.embeddings.bytes > 0
    engine.cache.unload(models[0].key)
    assert engine.embeddings.bytes == 0
    engine.generate(a_job(models[0]))
    assert engine.cache.clear_idle()
    assert engine.embeddings.bytes == 0
