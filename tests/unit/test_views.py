"""Views: what one job does to its modules is done for nobody else, and merging goes on for those that do nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from api.engine.calls import Ticket
from api.engine.device import Device
from api.engine.executor import Executor
from api.engine.generate import Engine
from api.engine.views import view
from api.schema.generation import GenerationRequest, ModelRef
from tests.generating import a_request
from tests.tiny import save_tiny
from tests.unit.test_merging import UNET, rand, sd, vae

PAG = "StableDiffusionPAGPipeline"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": PAG, "pag_applied_layers": ["mid"]}))
    return ModelRef("tiny", "main", "fp32", str(folder))


def request(model: ModelRef, seed: int, pag: float | None) -> GenerationRequest:
    inputs: dict[str, Any] = {"prompt": f"a circle {seed}", "width": 64, "height": 64, "num_inference_steps": 4}
    pipeline = "StableDiffusionPipeline" if pag is None else PAG
    inputs = inputs if pag is None else {**inputs, "pag_scale": pag}
    return a_request(str(seed), model, pipeline, "EulerDiscreteScheduler", inputs, seed=seed)


def together(engine: Engine, requests: list[GenerationRequest]) -> dict[str, np.ndarray]:
    """Their images by id, of all at once; a job that fails has none."""
    images: dict[str, np.ndarray] = {}

    def one(each: GenerationRequest) -> None:
        images[each.id] = engine.generate(each).images

    threads = [threading.Thread(target=one, args=(each,)) for each in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return images


def far(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def test_perturbed_attention_is_on_for_its_own_job_only(model: ModelRef) -> None:
    requests = [request(model, 0, None), request(model, 1, 9.0), request(model, 2, 9.0), request(model, 3, None)]
    alone = {each.id: Engine(Device("cpu")).generate(each).images for each in requests}
    unperturbed = Engine(Device("cpu")).generate(request(model, 1, 0.0)).images
    assert far(alone["1"], unperturbed) > 2
    # prompts that were encoded together are remembered as they came out then, which may be in another order too
    engine = Engine(Device("cpu"), embeddings_limit=0)
    images = together(engine, requests)
    # text and plain steps are merged, and float32 sums in another order then
    assert max(far(alone[key], images[key]) for key in alone) <= 1
    for each in requests:  # and afterwards, one after another
        assert np.array_equal(engine.generate(each).images, alone[each.id])


@pytest.fixture
def executor() -> Iterator[Executor]:
    executor = Executor(1)
    yield executor
    executor.close()


class Grey(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((2, 8, 8, 8), 0.5, dtype=torch.float64)


class Halves:
    def __call__(self, attn: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states / 2


def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "all processors": lambda unet: unet.set_attn_processor(Halves()),
    "a processor": lambda unet: setattr(
        unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1, "processor", Halves()
    ),
    "a module": lambda unet: setattr(unet, "conv_in", Grey()),
    "a module inside": lambda unet: unet.down_blocks[0].resnets[0]._modules.update(conv1=Grey()),
    "a module of a list": lambda unet: unet.down_blocks[0].resnets.__setitem__(0, Grey()),
    "a parameter": lambda unet: setattr(unet.conv_in, "weight", nn.Parameter(torch.ones_like(unet.conv_in.weight))),
    "a hook": lambda unet: unet.conv_in.register_forward_hook(hook),
    "FreeU": lambda unet: unet.enable_freeu(0.9, 0.2, 1.5, 1.6),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_job_changes_in_a_module_counts_for_itself_and_for_nobody_else(name: str, executor: Executor) -> None:
    torch.manual_seed(0)
    unet = sd_for_freeu().double().eval() if name == "FreeU" else sd().double().eval()
    call = {"sample": rand(2, 4, 8, 8), "timestep": 5, "encoder_hidden_states": rand(2, 7, 16)}
    ticket, own_ticket = Ticket(), Ticket()
    other, own = view(unet, executor, ticket), view(unet, executor, own_ticket)
    with torch.no_grad():
        expected = unet(**call).sample
        CHANGES[name](own)
        changed = own(**call).sample
        assert not torch.equal(changed, expected)
        assert torch.equal(other(**call).sample, expected)
        assert torch.equal(unet(**call).sample, expected)
        assert torch.equal(view(unet, executor, Ticket())(**call).sample, expected)
        reference = sd_for_freeu() if name == "FreeU" else sd()
        reference.load_state_dict(unet.state_dict())
        reference.double().eval()
        CHANGES[name](reference)
        assert torch.equal(changed, reference(**call).sample)


def sd_for_freeu() -> Any:
    """One with the three resolutions that FreeU looks for."""
    return UNet2DConditionModel(
        **{
            **UNET,
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        }
    )


def test_a_job_that_put_everything_back_is_merged_again(executor: Executor) -> None:
    unet = sd().double().eval()
    own = view(unet, executor, Ticket())
    tree = vars(own)["_view_tree"]
    assert tree.method("forward").__self__ is unet
    before = own.attn_processors
    own.set_attn_processor(AttnProcessor())
    assert tree.method("forward").runs_alone
    own.set_attn_processor(before)
    assert tree.method("forward").__self__ is unet


def test_tiling_is_the_jobs_own(executor: Executor) -> None:
    part: AutoencoderKL = vae().double().eval()
    own, other = view(part, executor, Ticket()), view(part, executor, Ticket())
    own.enable_tiling()
    own.tile_latent_min_size = 4
    latents = rand(1, 4, 8, 8)
    with torch.no_grad():
        whole = part.decode(latents).sample
        assert torch.equal(other.decode(latents).sample, whole)
        assert not torch.equal(own.decode(latents).sample, whole)
    assert not part.use_tiling


@pytest.mark.parametrize(
    "cast",
    [
        lambda part: part.to(torch.float16),
        lambda part: part.half(),
        lambda part: part.decoder.to(torch.float16),
        lambda part: part.decoder.mid_block.half(),
    ],
)
def test_weights_that_others_use_are_not_cast(cast: Callable[[Any], Any], executor: Executor) -> None:
    part = vae()
    cast(view(part, executor, Ticket()))
    assert {tensor.dtype for tensor in part.parameters()} == {torch.float32}


def test_a_view_is_what_pipelines_take_it_for(executor: Executor) -> None:
    unet = sd()
    own = view(unet, executor, Ticket())
    assert isinstance(own, UNet2DConditionModel)
    assert type(own).__name__ == "UNet2DConditionModel"
    assert own.config.in_channels == 4 and own.dtype == torch.float32 and own.device.type == "cpu"
    assert [name for name, _ in own.named_modules()] == [name for name, _ in unet.named_modules()]
    assert all(a is b for a, b in zip(own.parameters(), unet.parameters(), strict=True))
    assert not {id(a) for a in own.modules()} & {id(b) for b in unet.modules()}
