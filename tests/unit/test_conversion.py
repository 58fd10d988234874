"""Checkpoints and pickles become safetensors folders, in a process that can do no harm."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from api.engine.convert import reading
from api.errors import ApiError
from api.models.conversion import FAMILIES, convert_checkpoint
from api.models.manifest import missing_parts
from tests.checkpoints import Evil, demo_checkpoint, every_form, files_of, nothing, save, weights_of
from tests.running import ROOT

DEMO = ROOT / "models" / "shapes"
Progress = list[tuple[str, int, int | None]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_form(DEMO, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def converted(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Progress]:
    folder = tmp_path_factory.mktemp("converted") / "model"
    progress: Progress = []
    convert_checkpoint(checkpoints / "fp32.safetensors", folder, lambda *a: progress.append(a), config=DEMO)
    return folder, progress


def assert_weights(folder: Path, dtype: torch.dtype) -> None:
    got, want = weights_of(folder), weights_of(DEMO)
    assert got.keys() == want.keys()
    for component in want:
        assert got[component].keys() == want[component].keys()
        for key, value in want[component].items():
            assert got[component][key].dtype == dtype
            assert torch.equal(got[component][key], value.to(dtype)), f"{component} {key}"


def test_weights_come_back_bit_for_bit(converted: tuple[Path, Progress]) -> None:
    folder, _ = converted
    assert_weights(folder, torch.float32)
    assert missing_parts(folder) == []
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    "name", ["fp16.safetensors", "fp32.ckpt", pytest.param("renamed.ckpt", marks=pytest.mark.slow)]
)
def test_precision_and_container_do_not_matter(name: str, checkpoints: Path, tmp_path: Path) -> None:
    tmp_path.rmdir()  # missing or empty: both will do
    convert_checkpoint(checkpoints / name, tmp_path, nothing, config=DEMO)
    assert_weights(tmp_path, torch.float32 if "32" in name else torch.float16)


def test_the_converted_model_draws_the_same_picture(converted: tuple[Path, Progress]) -> None:
    """Loaded without anything left to chance: a text encoder with random weights would draw something else."""
    from diffusers import StableDiffusionPipeline

    def draw(folder: Path) -> torch.Tensor:
        pipe = StableDiffusionPipeline.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(7)
        prompt, size = "a red circle", {"height": 64, "width": 64}
        out = pipe(prompt, num_inference_steps=6, generator=generator, output_type="pt", **size)
        return out.images

    folder, _ = converted
    first = draw(folder)
    assert first.std() > 0.05
    assert torch.equal(first, draw(DEMO))


def test_progress_goes_from_nothing_to_everything(converted: tuple[Path, Progress]) -> None:
    folder, progress = converted
    assert {phase for phase, _, _ in progress} == {"convert"}
    done = [count for _, count, _ in progress]
    size = sum(t.numel() * 4 for part in weights_of(folder).values() for t in part.values())
    assert done == sorted(done) and progress[-1] == ("convert", size, size)
    assert progress[0] == ("convert", 0, None)  # while torch is imported: a caller can stop it then, too


def test_files_are_readable_by_others_and_hold_no_leftovers(converted: tuple[Path, Progress]) -> None:
    folder, _ = converted
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o755 if path.is_dir() else 0o644), path
    assert {name for name in files_of(folder) if name.endswith((".bin", ".ckpt", ".converting"))} == set()


def test_what_is_not_recognised_says_what_to_do(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="CHECKPOINT_CONFIG_URL to one of sd1, sd2") as caught:
        convert_checkpoint(checkpoints / "fp16.safetensors", tmp_path, nothing)
    assert (caught.value.code, caught.value.field) == ("MODEL_BROKEN", "callInputs.CHECKPOINT_URL")
    assert caught.value.available == list(FAMILIES)
    assert list(tmp_path.iterdir()) == []


def test_a_family_that_does_not_fit_is_no_silent_noise(checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(ApiError, match="these weights of") as caught:
        convert_checkpoint(checkpoints / "fp16.safetensors", folder, nothing, config="sd1")
    assert caught.value.code == "MODEL_BROKEN"
    assert not folder.exists()


@pytest.mark.parametrize("part", ["cond_stage_model.", "first_stage_model."])
def test_a_checkpoint_without_a_component_is_refused(part: str, tmp_path: Path) -> None:
    whole = demo_checkpoint(DEMO, torch.float16)
    file = save({key: value for key, value in whole.items() if not key.startswith(part)}, tmp_path / "part.safetensors")
    name = "text_encoder" if part.startswith("cond") else "vae"
    with pytest.raises(ApiError, match=f"lacks .*{name}") as caught:
        convert_checkpoint(file, tmp_path / "out", nothing, config=DEMO)
    assert caught.value.code == "MODEL_BROKEN"


@pytest.mark.parametrize("beside", ["weights", "nothing"])
def test_a_malicious_checkpoint_is_refused_and_nothing_runs(beside: str, tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "evil.ckpt"
    evil = Evil(f"touch {mark}")
    if beside == "weights":
        torch.save({"state_dict": demo_checkpoint(DEMO, torch.float16), "x": evil}, file)
    else:
        file.write_bytes(pickle.dumps(evil))
    with pytest.raises(ApiError, match="nothing is ever unpickled freely") as caught:
        convert_checkpoint(file, tmp_path / "out", nothing, config=DEMO)
    assert caught.value.code == "MODEL_BROKEN"
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_what_trainers_leave_beside_the_weights_is_ignored(tmp_path: Path) -> None:
    """As in the original files of Stable Diffusion 1: Lightning's callbacks as keys, and numbers of numpy."""
    import numpy as np

    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback
    parents = ["pytorch_lightning", "pytorch_lightning.callbacks"]
    sys.modules.update({name: type(sys)(name) for name in parents} | {module.__name__: module})
    try:
        instance = callback()
        instance.best = np.float64(0.5)
        file = tmp_path / "trained.ckpt"
        torch.save(
            {"state_dict": {"w": torch.arange(4.0)}, "callbacks": {callback: instance}, "global_step": 875_000}, file
        )
    finally:
        for name in [*parents, module.__name__]:
            del sys.modules[name]
    tensors = reading.read_tensors(file, file.name)
    assert tensors.keys() == {"w", "global_step"} and torch.equal(tensors["w"], torch.arange(4.0))
    assert int(tensors["global_step"]) == 875_000


def test_a_pickle_of_the_old_kind_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "old.ckpt"
    torch.save({"w": torch.arange(4.0)}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(reading.read_tensors(file, file.name)["w"], torch.arange(4.0))


def test_a_tensor_that_unfolds_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.ckpt"
    torch.save({"w": torch.ones(1).expand(2**40)}, file)
    with pytest.raises(ApiError, match="larger than its data"):
        reading.read_tensors(file, file.name)


@pytest.mark.parametrize("name", ["fp32.ckpt", "evil"])
def test_pickles_can_be_forbidden(name: str, checkpoints: Path, tmp_path: Path) -> None:
    file = checkpoints / name
    if name == "evil":
        file = tmp_path / "looks.safetensors"
        file.write_bytes(pickle.dumps(Evil("true")))
    with pytest.raises(ApiError) as caught:
        convert_checkpoint(file, tmp_path / "out", nothing, config=DEMO, allow_pickle=False)
    assert (caught.value.code, caught.value.status) == ("PICKLE_NOT_ALLOWED", 422)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>", b"GGUF" + b"\0" * 100, b"version https://git-lfs"])
def test_what_is_no_file_of_weights_is_refused_at_once(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(ApiError, match="neither safetensors nor") as caught:
        convert_checkpoint(file, tmp_path / "out", nothing)
    assert caught.value.code == "MODEL_BROKEN" and time.monotonic() - began < 1


def test_a_file_that_is_cut_off_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    for name in ("fp16.safetensors", "fp32.ckpt"):
        file = tmp_path / name
        file.write_bytes((checkpoints / name).read_bytes()[:-1000])
        with pytest.raises(ApiError) as caught:
            convert_checkpoint(file, tmp_path / "out", nothing, config=DEMO)
        assert caught.value.code == "MODEL_BROKEN"
        assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        convert_checkpoint(checkpoints / "fp16.safetensors", tmp_path, nothing, config=DEMO)
    assert (tmp_path / "mine").exists()


def test_it_makes_no_network_call(checkpoints: Path, tmp_path: Path) -> None:
    """Not even where nothing forbids it: the interpreter ends at the first look-up or connection."""
    arguments = ["checkpoint", str(checkpoints / "fp16.safetensors"), str(tmp_path), str(DEMO)]
    code = f"""
import os, sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        os.write(2, repr((event, arguments)).encode())
        os._exit(77)
sys.addaudithook(hook)
from api.engine.convert.__main__ import main
sys.exit(main({arguments!r}))
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, timeout=120, check=False)
    assert (done.returncode, (tmp_path / "model_index.json").exists()) == (0, True), done.stderr.decode()


def test_a_configuration_that_is_not_there_is_refused_at_once(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="name one of sd1") as caught:
        convert_checkpoint(checkpoints / "fp16.safetensors", tmp_path / "out", nothing, config="sd9")
    assert (caught.value.code, caught.value.field) == ("INVALID_INPUTS", "callInputs.CHECKPOINT_CONFIG_URL")
    assert not (tmp_path / "out").exists()
