from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from api.errors import ApiError
from api.models.library import Library
from api.settings import Settings
from tests.running import ROOT


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "models" / "shapes", tmp_path / "org--good")
    return tmp_path


def library(root: Path) -> Library:
    return Library(Settings.from_env({"MODELS_DIR": str(root)}))


def break_index(folder: Path, **parts: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **parts}))


def test_bundled_and_installed_models_are_found(root: Path) -> None:
    assert library(root).names() == ["demo/shapes", "org/good"]
    good = library(root).find("org/good")
    assert (good.size_multiple, good.default_size, good.text_layers) == (8, 64, 2)
    assert good.bytes > 1_000_000


@pytest.mark.parametrize(
    "parts",
    [
        {"unet": []},
        {"unet": ["diffusers"]},
        {"scheduler": ["diffusers", ["x"]]},
        {"text_encoder_2": ["transformers", "X"]},
        {"scheduler": [None, None]},
    ],
)
def test_a_broken_index_is_told_and_hides_no_other_model(root: Path, parts: dict[str, object]) -> None:
    shutil.copytree(root / "org--good", root / "org--bad")
    break_index(root / "org--bad", **parts)
    with pytest.raises(ApiError) as error:
        library(root).find("org/bad")
    assert error.value.code == "MODEL_BROKEN"
    assert [m.model_id for m in library(root).all()] == ["demo/shapes", "org/good"]


def test_an_index_that_is_no_json(root: Path) -> None:
    (root / "org--good" / "model_index.json").write_text("{")
    with pytest.raises(ApiError) as error:
        library(root).find("org/good")
    assert error.value.code == "MODEL_BROKEN"


def test_folders_that_may_not_be_read_are_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as lost+found on every ext4 volume."""
    (root / "lost+found").mkdir()
    real = Path.is_file

    def is_file(self: Path) -> bool:
        if "lost+found" in self.parts:
            raise PermissionError
        return real(self)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert library(root).names() == ["demo/shapes", "org/good"]


def test_names_that_cannot_be_asked_for_are_not_listed(root: Path) -> None:
    shutil.copytree(root / "org--good", root / "we ird")
    shutil.copytree(root / "org--good", root / "a--b--c")
    assert library(root).names() == ["demo/shapes", "org/good"]


def test_no_folder_at_all() -> None:
    assert library(Path("/nonexistent")).names() == ["demo/shapes"]


def test_the_fingerprint_follows_the_content(root: Path) -> None:
    before = library(root).find("org/good").revision
    assert library(root).find("org/good").revision == before == library(root).find("demo/shapes").revision
    weights = root / "org--good" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert library(root).find("org/good").revision != before
