"""Repositories whose weights are pickles become safetensors, or stay as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from api.engine.convert.pickles import renamed
from api.errors import ApiError
from api.models.conversion import convert_pickles
from api.models.manifest import missing_parts
from tests.checkpoints import Evil, files_of, nothing, weights_of
from tests.running import ROOT

DEMO = ROOT / "models" / "shapes"
Progress = list[tuple[str, int, int | None]]


def test_a_malicious_repository_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "vae").mkdir()
    torch.save({"w": torch.ones(3)}, folder / "unet" / "diffusion_pytorch_model.bin")
    torch.save({"w": torch.ones(3), "x": Evil(f"touch {mark}")}, folder / "vae" / "diffusion_pytorch_model.bin")
    before = files_of(folder)
    with pytest.raises(ApiError, match=r"vae/diffusion_pytorch_model\.bin is a pickle that holds more than weights"):
        convert_pickles(folder, nothing)
    assert files_of(folder) == before and not mark.exists()


@pytest.fixture(scope="module", params=["whole", "sharded"])
def pickled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("pickled") / "model"
    pipe = StableDiffusionPipeline.from_pretrained(DEMO, dtype=torch.float16, local_files_only=True)
    more = {"max_shard_size": "2MB"} if request.param == "sharded" else {}
    pipe.save_pretrained(folder, safe_serialization=False, **more)
    # transformers 5 writes no pickles any more, the hub is full of them
    text = folder / "text_encoder" / "model.safetensors"
    if text.exists():
        old = {f"text_model.{key}": value for key, value in load_file(text).items()}
        torch.save(
            old | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, text.with_name("pytorch_model.bin")
        )
        text.unlink()
    assert (request.param == "sharded") == bool(list(folder.rglob("*.bin.index.json")))
    assert not list(folder.rglob("*.safetensors"))
    return folder


def test_pickled_weights_become_safetensors(pickled: Path) -> None:
    from diffusers import StableDiffusionPipeline

    progress: Progress = []
    convert_pickles(pickled, lambda *a: progress.append(a))
    assert not list(pickled.rglob("*.bin*")) and not list(pickled.rglob("*.converting"))
    assert missing_parts(pickled) == []
    pipe = StableDiffusionPipeline.from_pretrained(
        pickled, dtype=torch.float16, use_safetensors=True, local_files_only=True
    )
    for name, want in weights_of(DEMO).items():
        got = getattr(pipe, name).state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], value) for key, value in want.items())
    assert progress[-1][1] == progress[-1][2] > 0
    before = files_of(pickled)
    convert_pickles(pickled, nothing)
    assert files_of(pickled) == before


def test_safetensors_that_are_there_and_other_files_stay(tmp_path: Path) -> None:
    part = tmp_path / "unet"
    part.mkdir()
    save_file({"w": torch.zeros(2)}, part / "diffusion_pytorch_model.safetensors")
    torch.save({"w": torch.ones(2)}, part / "diffusion_pytorch_model.bin")
    torch.save({"w": torch.ones(2)}, part / "training_args.bin")
    torch.save({"w": torch.ones(2)}, part / "diffusion_pytorch_model.fp16.bin")
    convert_pickles(tmp_path, nothing)
    assert {path.name for path in part.iterdir()} == {
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "training_args.bin",
    }
    assert torch.equal(load_file(part / "diffusion_pytorch_model.safetensors")["w"], torch.zeros(2))


def test_a_conversion_that_was_killed_while_it_put_things_in_place_can_be_done_again(tmp_path: Path) -> None:
    part = tmp_path / "unet"
    part.mkdir()
    shards = {name: f"diffusion_pytorch_model-0000{number}-of-00002.bin" for number, name in ((1, "a"), (2, "b"))}
    for name, file in shards.items():
        torch.save({name: torch.ones(2)}, part / file)
    (part / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    save_file({"a": torch.ones(2)}, part / renamed(shards["a"]))
    convert_pickles(tmp_path, nothing)
    index = json.loads((part / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: renamed(file) for name, file in shards.items()}
    assert {path.name for path in part.iterdir()} == {
        *index["weight_map"].values(),
        "diffusion_pytorch_model.safetensors.index.json",
    }


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "unet"
    part.mkdir()
    torch.save({"w": torch.ones(2)}, part / "diffusion_pytorch_model-00001-of-00002.bin")
    shards = {"w": "diffusion_pytorch_model-00001-of-00002.bin", "v": "diffusion_pytorch_model-00002-of-00002.bin"}
    (part / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    before = files_of(tmp_path)
    with pytest.raises(ApiError, match="00002-of-00002") as caught:
        convert_pickles(tmp_path, nothing)
    assert caught.value.code == "MODEL_BROKEN" and files_of(tmp_path) == before


def test_forbidden_pickles_of_a_repository(pickled: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ApiError) as caught:
        convert_pickles(tmp_path, nothing, allow_pickle=False)
    assert caught.value.code == "PICKLE_NOT_ALLOWED"
    convert_pickles(DEMO, nothing, allow_pickle=False)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("pytorch_model.bin.index.json", "model.safetensors.index.json"),
        ("pytorch_model.bin.index.fp16.json", "model.safetensors.index.fp16.json"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.bin", "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"),
        ("diffusion_pytorch_model.fp16.bin.index.json", "diffusion_pytorch_model.fp16.safetensors.index.json"),
    ],
)
def test_names(old: str, new: str) -> None:
    assert renamed(old) == new
