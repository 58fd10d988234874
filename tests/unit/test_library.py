from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from api.errors import ApiError
from api.models.description import InstalledModel
from api.models.keys import HubFiles, model_key
from api.models.library import Library, _files_of
from api.models.locations import parse_location
from api.models.manifest import MANIFEST_NAME, Manifest, list_files
from api.models.records import Records
from api.models.refs import SourceRef
from api.models.volume import Volume
from api.settings import Settings
from tests.running import ROOT


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "models" / "shapes", tmp_path / "org--good")
    return tmp_path


def library(root: Path, **environ: str) -> Library:
    return Library(Settings.from_env({"MODELS_DIR": str(root), **environ}))


def find(root: Path, model_id: str, **environ: str) -> InstalledModel:
    model = library(root, **environ).find(SourceRef(model_id, model_id))
    assert model is not None
    return model


def break_index(folder: Path, **parts: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **parts}))


def test_bundled_and_installed_models_are_found(root: Path) -> None:
    assert library(root).names() == ["demo/shapes", "org/good"]
    good = find(root, "org/good")
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
        find(root, "org/bad")
    assert error.value.code == "MODEL_BROKEN"
    assert [m.model_id for m in library(root).all()] == ["demo/shapes", "org/good"]


def test_an_index_that_is_no_json(root: Path) -> None:
    (root / "org--good" / "model_index.json").write_text("{")
    with pytest.raises(ApiError) as error:
        find(root, "org/good")
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
    before = find(root, "org/good").revision
    assert find(root, "org/good").revision == before == find(root, "demo/shapes").revision
    weights = root / "org--good" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert find(root, "org/good").revision != before


def replace(file: Path, at: int) -> None:
    """By one of the same size."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.with_suffix(".new").write_bytes(data)
    file.with_suffix(".new").replace(file)


@pytest.mark.parametrize("roots", [False, True])
@pytest.mark.parametrize(
    ("file", "at"), [("unet/diffusion_pytorch_model.safetensors", -2), ("scheduler/scheduler_config.json", 8)]
)
def test_a_components_file_that_was_replaced_is_another_revision(root: Path, file: str, at: int, roots: bool) -> None:
    here = library(root / "none", LOCAL_MODELS=str(root)) if roots else library(root)
    before = here.find(SourceRef("org/good", "org/good"))
    replace(root / "org--good" / file, at)
    after = here.find(SourceRef("org/good", "org/good"))
    assert before and after and before.revision != after.revision
    assert [model.revision for model in here.all() if model.model_id == "org/good"] == [after.revision]


def test_a_large_file_that_differs_only_in_its_middle_is_another_revision(root: Path) -> None:
    weights = root / "org--good" / "vae" / "large.safetensors"
    weights.write_bytes(bytes(17 * 2**20))
    here = library(root)
    before = here.find(SourceRef("org/good", "org/good"))
    replace(weights, (weights.stat().st_size - 64 * 2**10) * 8 // 15)
    after = here.find(SourceRef("org/good", "org/good"))
    assert before and after and before.revision != after.revision


def test_past_a_bound_files_count_by_their_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no model of diffusers', such as a clone with its history, is not to make every request slow."""
    monkeypatch.setattr("api.models.library._LOOKED_AT", 3)
    looked = _files_of(root / "org--good")
    assert len(looked) > 10
    assert [times for _, _, times in looked[3:]] == [0] * (len(looked) - 3)
    (root / "org--good" / "vae" / "new.json").write_text("{}")
    assert len(_files_of(root / "org--good")) == len(looked) + 1


def installed(root: Path, key: str, ref: SourceRef, trusted: bool = False, **parts: str) -> Volume:
    """The demo model as an installation leaves it, with the record that leads to it."""
    volume = Volume(root, None)
    with volume.install(key) as installation:
        shutil.copytree(ROOT / "models" / "shapes", installation.staging, dirs_exist_ok=True)
        known = {"model_id": ref.model_id, "source": "https://hub/x", "revision": "c" * 40, "variant": "", **parts}
        files = list_files(installation.staging)
        installation.commit(Manifest(files=files, verified=True, installed="2026-01-01", trusted=trusted, **known))  # type: ignore[arg-type]
    Records(root).write(ref, key, "https://hub/x")
    return volume


KEY = "org--x@" + "0" * 20
REF = SourceRef("org/x", "org/x", "main")


def test_an_installed_model_answers_the_ref_that_it_was_installed_for(tmp_path: Path) -> None:
    installed(tmp_path, KEY, REF)
    model = library(tmp_path).find(REF)
    assert model is not None
    assert (model.model_id, model.revision, model.key, model.source) == ("org/x", "c" * 40, KEY, "https://hub/x")
    assert library(tmp_path).find(SourceRef("org/x", "org/x", "dev")) is None
    assert library(tmp_path).find(SourceRef("org/x", "org/x", "main", "fp16")) is None
    assert [m.key for m in library(tmp_path).all()] == ["", KEY]


def test_a_commit_needs_no_record(tmp_path: Path) -> None:
    key = model_key(HubFiles("org/x", "c" * 40))
    installed(tmp_path, key, REF)
    found = library(tmp_path).find(SourceRef("org/x", "org/x", "c" * 40))
    assert found is not None
    assert found.key == key


def test_models_in_the_image_are_found_beside_those_on_the_volume(tmp_path: Path) -> None:
    installed(tmp_path / "image", KEY, REF)
    (tmp_path / "volume").mkdir()
    model = library(tmp_path / "volume", BAKED_MODELS_DIR=str(tmp_path / "image")).find(REF)
    assert model is not None
    assert model.folder.parent == tmp_path / "image"


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": "../../etc"}', b'{"key": 1}'])
def test_a_record_that_was_tampered_with_leads_nowhere(tmp_path: Path, content: bytes) -> None:
    installed(tmp_path, KEY, REF)
    (record,) = (tmp_path / ".refs").glob("*.json")
    whole = json.loads(record.read_bytes())
    record.write_bytes(json.dumps({**whole, **json.loads(content)}).encode() if content.endswith(b"}") else content)
    assert library(tmp_path).find(REF) is None


def test_half_a_model_is_none(tmp_path: Path) -> None:
    volume = installed(tmp_path, KEY, REF)
    weights = volume.root / KEY / "unet" / "diffusion_pytorch_model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(1000)
    assert library(tmp_path).find(REF) is None


def test_what_was_found_is_recalled_until_it_is_gone(tmp_path: Path) -> None:
    volume = installed(tmp_path, KEY, REF)
    here = library(tmp_path)
    assert here.recall(REF) is None
    found = here.find(REF)
    assert here.recall(REF) == found
    volume.remove(KEY)
    assert here.recall(REF) is None
    assert here.find(REF) is None


def test_what_another_process_pulls_is_seen_a_moment_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, KEY, REF)
    here = library(tmp_path)
    here.find(REF)
    newer = "org--x@" + "1" * 20
    installed(tmp_path, newer, REF, revision="d" * 40)
    monkeypatch.setattr("api.models.library._MOMENT", 0.0)
    assert here.recall(REF) is not None
    found = here.find(REF)
    assert found is not None
    assert found.key == newer
    assert here.recall(REF) is None


def test_recalling_a_model_is_a_use_of_it(tmp_path: Path) -> None:
    volume = installed(tmp_path, KEY, REF)
    here = library(tmp_path)
    here.find(REF)
    os.utime(volume.root / KEY / MANIFEST_NAME, (1, 1))
    here.recall(REF)
    assert volume.list()[0].last_used > 1


def test_local_roots(root: Path, tmp_path: Path) -> None:
    (tmp_path / "roots" / "team").mkdir(parents=True)
    (root / "org--good").rename(tmp_path / "roots" / "team" / "shapes")
    environ = {"LOCAL_MODELS": str(tmp_path / "roots")}
    assert find(root, "team/shapes", **environ).model_id == "team/shapes"
    assert "team/shapes" in library(root, **environ).names()
    assert library(root).find(SourceRef("team/shapes", "team/shapes")) is None


def test_the_platforms_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--x" / "snapshots" / ("d" * 40)
    shutil.copytree(ROOT / "models" / "shapes", snapshot)
    (tmp_path / "hub" / "models--org--x" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--x" / "refs" / "main").write_text("d" * 40)
    here = library(tmp_path / "volume", HUB_CACHES=str(tmp_path / "hub"))
    model = here.find(SourceRef("org/x", "org/x"))
    assert model is not None
    assert (model.folder, model.revision) == (snapshot, "d" * 40)
    weights = snapshot / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert library(tmp_path / "volume", HUB_CACHES=str(tmp_path / "hub")).find(SourceRef("org/x", "org/x")) is None


def test_by_name_only_when_one_model_has_it(tmp_path: Path) -> None:
    installed(tmp_path, model_key(HubFiles("org/x", "c" * 40)), REF)
    plain = SourceRef("org/x", "org/x")
    found = library(tmp_path).find_by_name(plain)
    assert found is not None
    assert library(tmp_path).find_by_name(SourceRef("org/x", "org/x", "v2")) is None
    installed(tmp_path, model_key(HubFiles("org/x", "d" * 40)), REF, revision="d" * 40)
    assert library(tmp_path).find_by_name(plain) is None


def test_a_name_that_a_request_gave_proves_nothing(tmp_path: Path) -> None:
    """Whoever installs something from an address of their own may call it what they like."""
    plain = SourceRef("org/x", "org/x")
    installed(tmp_path, KEY, SourceRef("org/x", "org/x", url=parse_location("https://h/x.tar")))
    assert library(tmp_path).find(plain) is None
    assert library(tmp_path).find_by_name(plain) is None
    Volume(tmp_path, None).remove(KEY)
    installed(tmp_path, KEY, REF, trusted=True)
    assert library(tmp_path).find_by_name(plain) is not None
    assert library(tmp_path).find_by_name(SourceRef("org/x", "hub/other")) is None


def test_a_folder_answers_for_its_own_name_only(root: Path) -> None:
    here = library(root)
    assert here.find(SourceRef("org/good", "hub/other")) is None
    assert here.find(SourceRef("org/good", "org/good", url=parse_location("https://h/x.tar"))) is None
    assert here.find(SourceRef("org/good", "org/good")) is not None
    assert here.recall(SourceRef("org/good", "hub/other")) is None


@pytest.mark.parametrize(
    "config",
    ['{"block_out_channels": ' + "[" * 100_000 + "]" * 100_000 + "}", json.dumps({"block_out_channels": [1] * 20_000})],
    ids=["bottomless", "endless"],
)
def test_a_hostile_configuration_is_broken_and_hides_no_other_model(root: Path, config: str) -> None:
    shutil.copytree(root / "org--good", root / "org--bad")
    (root / "org--bad" / "vae" / "config.json").write_text(config)
    with pytest.raises(ApiError) as error:
        find(root, "org/bad")
    assert error.value.code == "MODEL_BROKEN"
    assert [m.model_id for m in library(root).all()] == ["demo/shapes", "org/good"]


def test_the_volumes_limit_may_be_a_share(tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    assert library(tmp_path / "not" / "yet", VOLUME_LIMIT="50%").volume.limit == total // 2
    assert library(tmp_path, VOLUME_LIMIT="2GiB").volume.limit == 2 * 2**30
    assert library(tmp_path).volume.limit is None
