"""Parts of models: what makes two the same, how they come onto a device, and what takes over what."""

from __future__ import annotations

import json
import os
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from api.engine.cloning import clone
from api.engine.device import Device
from api.engine.loader import PartLoader, load, module_bytes
from api.engine.parts import Loader
from api.engine.spent import Spent, measuring
from api.errors import ApiError
from api.models.manifest import FileEntry, Manifest, sha256_of, write_manifest
from api.schema.generation import ModelRef
from tests.tiny import save_tiny
from tests.unit.test_skeletons import AnyDevice, the_same


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate("ab"):
        save_tiny(root / name, seed=number)
    save_tiny(root / "safe", seed=3, nsfw=False)
    return root


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "m")
    return tmp_path / "m"


def ref_to(folder: Path, precision: str = "fp32") -> ModelRef:
    return ModelRef(f"tiny/{folder.name}", "1", precision, str(folder))


def install(folder: Path) -> None:
    """As the installer leaves a model."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    entries = tuple(FileEntry(p.relative_to(folder).as_posix(), p.stat().st_size, sha256_of(p)) for p in files)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_manifest(folder, Manifest("x", "x", "x", "", entries, True, now))


def keys(folder: Path, precision: str = "fp32") -> dict[str, str]:
    return {spec.name: spec.key for spec in PartLoader(AnyDevice()).parts(ref_to(folder, precision))}


def whole(loader: PartLoader, ref: ModelRef) -> dict[str, nn.Module]:
    return {spec.name: loader.place(spec, loader.read(spec), None) for spec in loader.parts(ref)}


def test_it_is_what_the_cache_expects() -> None:
    loader: Loader = PartLoader(Device("cpu"))
    assert loader


# --- identity ---


def test_the_same_content_in_two_installed_models_is_the_same_part(models: Path) -> None:
    shutil.rmtree(models / "b" / "vae")
    shutil.copytree(models / "a" / "vae", models / "b" / "vae")
    config = models / "b" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "x", "_diffusers_version": "9"}))
    assert keys(models / "a")["vae"] != keys(models / "b")["vae"]
    for name in ("a", "b"):
        install(models / name)
    a, b = keys(models / "a"), keys(models / "b")
    assert a["vae"] == b["vae"]
    assert a["unet"] != b["unet"]
    assert keys(models / "a", "bf16")["vae"] != a["vae"]


def test_another_configuration_is_another_part(models: Path) -> None:
    install(models / "a")
    before = keys(models / "a")
    config = models / "a" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.5}))
    assert keys(models / "a")["vae"] != before["vae"]


def test_a_file_that_was_changed_is_not_what_the_manifest_says(models: Path) -> None:
    install(models / "a")
    before = keys(models / "a")
    file = models / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    manifest = models / "a" / ".manifest.json"
    held = load_file(file)
    save_file({name: tensor + 1 for name, tensor in held.items()}, file, metadata={"format": "pt"})
    later = manifest.stat().st_mtime + 2
    os.utime(file, (later, later))
    os.utime(manifest, (later + 2, later + 2))  # as every use of the model does it
    after = keys(models / "a")
    assert after["unet"] != before["unet"]
    assert after["vae"] == before["vae"]


def test_models_of_one_architecture_say_so(models: Path) -> None:
    loader = PartLoader(AnyDevice())
    a, b = ({spec.name: spec for spec in loader.parts(ref_to(models / name))} for name in "ab")
    assert all(a[name].architecture == b[name].architecture for name in a)
    assert a["unet"].architecture != a["vae"].architecture
    half = {spec.name: spec for spec in loader.parts(ref_to(models / "a", "bf16"))}
    assert half["unet"].architecture != a["unet"].architecture
    assert half["unet"].bytes * 2 == a["unet"].bytes


# --- moving ---


@pytest.mark.parametrize("name", ["a", "safe"])
@pytest.mark.parametrize("shares", [True, False])
def test_a_model_is_what_diffusers_loads(name: str, shares: bool, models: Path) -> None:
    ref = ref_to(models / name)
    ours = load(ref, AnyDevice(shares))
    theirs = diffusers.DiffusionPipeline.from_pretrained(models / name)
    assert ours.components.keys() == theirs.components.keys()
    total = 0
    for part, value in theirs.components.items():
        if isinstance(value, nn.Module):
            the_same(ours.components[part], value.eval())
            total += module_bytes(value)
        else:
            assert type(ours.components[part]).__name__ == type(value).__name__
    assert ours.bytes == total == sum(spec.bytes for spec in PartLoader(AnyDevice()).parts(ref))
    kept = {k: v for k, v in theirs.config.items() if k not in theirs.components and not k.startswith("_")}
    assert ours.config == kept
    prompt = "a red circle"
    mine, other = (c["tokenizer"](prompt).input_ids for c in (ours.components, theirs.components))
    assert mine == other


def test_on_a_cpu_nothing_is_copied(models: Path) -> None:
    loader = PartLoader(AnyDevice())
    spec = loader.parts(ref_to(models / "a"))[0]
    host = loader.read(spec)
    for _ in range(2):
        module = loader.place(spec, host, None)
        held = {tensor.data_ptr() for tensor in module.state_dict().values()}
        assert held == {tensor.data_ptr() for tensor in host.tensors.values()}


def test_otherwise_the_host_keeps_its_own(models: Path) -> None:
    loader = PartLoader(AnyDevice(shares=False))
    spec = loader.parts(ref_to(models / "a"))[0]
    host = loader.read(spec)
    module = loader.place(spec, host, None)
    before = {name: tensor.clone() for name, tensor in host.tensors.items()}
    for parameter in module.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, host.tensors[name]) for name, tensor in before.items())


@pytest.mark.parametrize("shares", [True, False])
def test_a_module_takes_over(shares: bool, models: Path) -> None:
    loader = PartLoader(AnyDevice(shares))
    a, b = ({spec.name: spec for spec in loader.parts(ref_to(models / name))} for name in "ab")
    resident = whole(loader, ref_to(models / "a"))
    fresh = whole(loader, ref_to(models / "b"))
    for name, module in resident.items():
        parameters, places = list(module.parameters()), [p.data_ptr() for p in module.parameters()]
        assert loader.place(b[name], loader.read(b[name]), module) is module
        the_same(module, fresh[name])
        assert all(p is q for p, q in zip(parameters, module.parameters(), strict=True))
        # compiled code and graphs hold addresses; on a CPU there is nothing to copy instead
        assert ([p.data_ptr() for p in module.parameters()] == places) is not shares
        loader.place(a[name], loader.read(a[name]), module)
        assert not torch.equal(next(module.parameters()), next(fresh[name].parameters()))


def test_a_module_takes_over_what_was_put_elsewhere_since(models: Path) -> None:
    loader = PartLoader(AnyDevice(shares=False))
    spec = next(spec for spec in loader.parts(ref_to(models / "b")) if spec.name == "unet")
    module = whole(loader, ref_to(models / "a"))["unet"]
    moved = next(module.parameters())
    moved.data = moved.data.clone()
    the_same(loader.place(spec, loader.read(spec), module), whole(loader, ref_to(models / "b"))["unet"])


@pytest.mark.parametrize("shares", [True, False])
def test_what_the_host_keeps_stays_what_it_is_when_a_module_is_taken_over(shares: bool, tmp_path: Path) -> None:
    loader = PartLoader(AnyDevice(shares))
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,),
            layers_per_block=1, norm_num_groups=4, latent_channels=4,
        )  # fmt: skip
        vae.bn.running_mean.normal_()  # buffers that are in the files
        vae.save_pretrained(tmp_path / name / "vae")
        index = {"_class_name": "Flux2Pipeline", "vae": ["diffusers", "AutoencoderKLFlux2"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    a, b = (loader.parts(ref_to(tmp_path / name))[0] for name in "ab")
    assert not a.by_library and a.architecture == b.architecture
    host = loader.read(a)
    before = {name: tensor.clone() for name, tensor in host.tensors.items()}
    loader.place(b, loader.read(b), loader.place(a, host, None))
    assert before and all(torch.equal(tensor, host.tensors[name]) for name, tensor in before.items())
    again = loader.place(a, host, None).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())


def test_clones_of_a_module_go_with_it(models: Path) -> None:
    loader = PartLoader(AnyDevice())
    spec = next(spec for spec in loader.parts(ref_to(models / "b")) if spec.name == "unet")
    module = whole(loader, ref_to(models / "a"))["unet"]
    other = clone(module)
    loader.place(spec, loader.read(spec), module)
    assert torch.equal(next(other.parameters()), next(module.parameters()))


# --- what has no weights ---


def test_tokenizers_are_read_once_and_all_models_take_turns_at_them(models: Path) -> None:
    loader = PartLoader(AnyDevice())
    a, b = (loader.assemble(ref_to(models / name), whole(loader, ref_to(models / name))) for name in "ab")
    assert a.components["tokenizer"]._tokenizer is b.components["tokenizer"]._tokenizer
    assert type(a.components["tokenizer"]) is type(b.components["tokenizer"])  # which has the lock
    config = models / "b" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_end": 0.5}))
    b = loader.assemble(ref_to(models / "b"), whole(loader, ref_to(models / "b")))
    assert b.components["scheduler"].config.beta_end == 0.5
    assert a.components["scheduler"].config.beta_end == 0.012


# --- faults and threads ---


@pytest.mark.parametrize("damage", ["cut", "config", "index", "gone", "nothing", "outside"])
def test_damage_is_said(damage: str, models: Path) -> None:
    unet = models / "a" / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "config":
        (unet / "config.json").write_text("{")
    elif damage == "index":
        (models / "a" / "model_index.json").write_text("[]")
    elif damage == "gone":
        shutil.rmtree(unet)
    elif damage == "nothing":
        weights.unlink()
    else:
        weights.unlink()
        index = {"weight_map": {"x": "../vae/diffusion_pytorch_model.safetensors"}}
        (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ApiError) as caught:
        load(ref_to(models / "a"), AnyDevice())
    assert caught.value.code == "MODEL_BROKEN"
    assert caught.value.field == "callInputs.MODEL_ID"
    assert caught.value.requested == "tiny/a"
    assert str(models) not in caught.value.message


def test_a_configuration_that_the_weights_do_not_fit_is_said(models: Path) -> None:
    config = models / "a" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "cross_attention_dim": 48}))
    with pytest.raises(ApiError) as caught:
        load(ref_to(models / "a"), AnyDevice())
    assert caught.value.code == "MODEL_BROKEN"


def test_a_model_that_is_replaced_is_read_anew(models: Path) -> None:
    device = AnyDevice()
    before = load(ref_to(models / "a"), device)
    shutil.rmtree(models / "a")
    shutil.copytree(models / "b", models / "a")
    after = load(ref_to(models / "a"), device)
    for now, expected in ((before, "b"), (after, "a")):
        same = torch.equal(
            next(now.components["unet"].parameters()),
            next(load(ref_to(models / "b"), device).components["unet"].parameters()),
        )
        assert same == (expected == "a")


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_other_weights_are_never_read_under_a_key(when: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = PartLoader(AnyDevice())
    spec = next(spec for spec in loader.parts(ref_to(models / "a")) if spec.name == "unet")

    def replace() -> None:
        shutil.copy(models / "b" / "unet" / spec.files[0].name, models / "new")
        (models / "new").replace(spec.files[0])

    def reading(spec: Any) -> Any:
        replace()
        return read(spec)

    read = loader._read
    if when == "before":
        replace()
    else:
        monkeypatch.setattr(loader, "_read", reading)
    with pytest.raises(ApiError, match="changed while they were used") as caught:
        loader.read(spec)
    assert caught.value.code == "MODEL_BROKEN" and str(models) not in caught.value.message
    monkeypatch.undo()
    anew = next(spec for spec in loader.parts(ref_to(models / "a")) if spec.name == "unet")
    assert anew.key != spec.key and loader.read(anew)


def test_parts_come_in_many_threads_while_modules_are_made(models: Path) -> None:
    loader = PartLoader(AnyDevice(shares=False))
    right = {name: whole(PartLoader(AnyDevice()), ref_to(models / name)) for name in ("a", "b", "safe")}
    faults: list[Any] = []

    def come(name: str) -> None:
        try:
            for _ in range(5):
                for part, module in whole(loader, ref_to(models / name)).items():
                    the_same(module, right[name][part])
        except BaseException as fault:
            faults.append(fault)

    def make() -> None:
        for _ in range(200):
            layer = nn.Linear(4, 4)
            if layer.weight.is_meta or layer.weight.dtype != torch.float32 or not layer.weight.requires_grad:
                faults.append("another thread's module was built otherwise")

    threads = [threading.Thread(target=come, args=(name,)) for name in right for _ in range(2)]
    threads.append(threading.Thread(target=make))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_what_it_took_is_told_by_what_it_was_spent_on(models: Path) -> None:
    spent = Spent()
    with measuring(spent):
        load(ref_to(models / "a"), AnyDevice(shares=False))
    assert min(spent.read, spent.build, spent.copy) > 0
    before = Spent(**vars(spent))
    load(ref_to(models / "a"), AnyDevice())
    assert spent == before
