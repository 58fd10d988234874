"""What can be said of an adapter before a worker sees it, whatever a stranger has written into its header or its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from api.errors import ApiError
from api.models.adapter_header import inversion_problem, lora_problem, read_shapes
from api.models.adapters import INVERSION, LORA, read_asked

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.{}.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"cross_attention_dim": 768}))
    return tmp_path


@pytest.mark.parametrize(
    "half", ["to_k.lora_A", "to_v.lora_A", "processor.to_k_lora.down", "to.k.lora_down", "to_k.lora.down"]
)
def test_of_another_family(model: Path, half: str) -> None:
    name = LAYER.format(half)
    assert "as SDXL does" in (lora_problem({name: (4, 2048)}, model) or "")
    assert lora_problem({name: (4, 768)}, model) is None
    assert lora_problem({name: (768,)}, model) is None  # the worker says what is wrong with that


@pytest.mark.parametrize(
    "name", [LAYER.format("to_q.lora_A"), LAYER.format("to_k.lora_B"), "unet.attn1.to_k.lora_A.weight"]
)
def test_other_layers_say_nothing(model: Path, name: str) -> None:
    assert lora_problem({name: (4, 2048)}, model) is None


def test_a_name_without_end(model: Path) -> None:
    """It takes as long as it is, not the third power of that."""
    assert lora_problem({"unet.lora_" + "attn2_to_k" * 20_000: (4, 2048)}, model) is None


@pytest.mark.parametrize("names", [["x" * 501], [f"lora_{number}" for number in range(50_001)]])
def test_more_than_any_adapter_has(names: list[str], tmp_path: Path) -> None:
    """It would be told in messages and in ``$meta``, and looked through by converters that count on less."""
    save_file({name: torch.zeros(0) for name in names}, tmp_path / "x")
    with pytest.raises(ValueError, match="more than"):
        read_shapes(tmp_path / "x")
    fewer = [name[1:] for name in names[1:] or names]
    save_file({name: torch.zeros(0) for name in fewer}, tmp_path / "x")
    assert read_shapes(tmp_path / "x") == dict.fromkeys(fewer, (0,))


@pytest.mark.parametrize("header", [b"{", b"[1]", b'{"x": 5}', b'{"x": {"dtype": "F32"}}', b"\xff", b"[" * 100_000])
def test_what_is_no_header(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="header"):
        read_shapes(tmp_path / "x")


def test_words_of_many_vectors(model: Path) -> None:
    assert inversion_problem({"<x>": (256, 768)}, model) is None
    assert "257 vectors" in (inversion_problem({"<x>": (257, 768)}, model) or "")


def test_more_than_there_are_names() -> None:
    with pytest.raises(ApiError, match="each once"):
        read_asked("a/b#" + "&".join("abcdefghij"), LORA, "callInputs.lora_weights")


@pytest.mark.parametrize("kind", [LORA, INVERSION])
@pytest.mark.parametrize("as_object", [False, True])
def test_what_is_refused_shows_no_secret(kind: str, as_object: bool) -> None:
    url = "https://me:secret@host/x.safetensors?X-Amz-Signature=secret"
    with pytest.raises(ApiError) as caught:
        read_asked({"url": url, "scael": 1} if as_object else f"{url}#scael=1", kind, "callInputs.x")
    assert "secret" not in f"{caught.value.message} {caught.value.requested}"
    assert "host/x.safetensors" in str(caught.value.requested)
