"""Quantization through a server: the product's own rule, its environment variable, and requests that say otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from tests.running import Server, images_of, running
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow
SENT = {"prompt": "a circle", "num_inference_steps": 2, "width": 64, "height": 64, "seed": 1}


def save_wide(folder: Path) -> None:
    """A tiny model whose attention is as wide as the rule wants it."""
    save_tiny(folder)
    torch.manual_seed(1)
    diffusers.UNet2DConditionModel(
        block_out_channels=(8, 512), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=4, attention_head_dim=8,
    ).save_pretrained(folder / "unet")  # fmt: skip


@pytest.fixture(scope="module")
def quantizing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("models")
    save_wide(root / "wide--sd")
    environ = {"MODELS_DIR": str(root), "MODEL_ID": "wide/sd", "QUANTIZE": "int8", "RUNTIME_DOWNLOADS": "0"}
    with running(environ, tmp_path_factory.mktemp("log") / "server.log") as started:
        yield started


def test_the_server_quantizes_and_a_request_may_say_otherwise(quantizing: Server) -> None:
    found, images = {}, {}
    for kind in ("", "none", "int8", "fp8", "nf4"):
        answer = quantizing.post(SENT, {"QUANTIZE": kind} if kind else {})
        assert answer.status_code == 200, answer.text[:500]
        found[kind], images[kind] = answer.json()["$meta"], images_of(answer.json())[0].astype(int)
    words = {kind: meta["numerics"].rpartition("/")[2] for kind, meta in found.items()}
    assert words == {"": "int8", "none": "eager", "int8": "int8", "fp8": "fp8", "nf4": "nf4"}
    assert {kind: meta.get("quantize") for kind, meta in found.items()} == {
        "": "int8", "none": None, "int8": "int8", "fp8": "fp8", "nf4": "nf4",
    }  # fmt: skip
    assert np.array_equal(images[""], images["int8"])
    assert all(meta["quantized"] == ["unet"] for kind, meta in found.items() if kind != "none")
    far = {kind: np.abs(images[kind] - images["none"]).mean() for kind in ("int8", "fp8", "nf4")}
    assert all(distance < 20 for distance in far.values())


def test_what_has_nothing_to_quantize_is_served_as_it_is(quantizing: Server) -> None:
    answer = quantizing.post({"prompt": "a red circle", "num_inference_steps": 2}, {"MODEL_ID": "demo/shapes"})
    assert answer.status_code == 200, answer.text[:500]
    assert "quantize" not in answer.json()["$meta"]
    for route in ("/", "/plan"):
        sent = {"modelInputs": {"prompt": "x"}, "callInputs": {"MODEL_ID": "demo/shapes", "QUANTIZE": "nf4"}}
        refused = quantizing.client.post(route, json=sent)
        assert refused.status_code == 422
        assert refused.json()["$error"]["field"] == "callInputs.QUANTIZE"
