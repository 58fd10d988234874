"""How much a model that is not here would be to fetch: asked of its source, without fetching any of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.errors import ApiError
from api.models.installer import Installer
from api.models.library import Library
from api.models.refs import read_ref
from api.service import fetcher as fetchers
from api.service.fetcher import Fetcher
from api.settings import Settings
from tests import shapes
from tests.hub import HubStandIn
from tests.site import Site
from tests.sources import BUCKET, TOKEN, Bucket, environ, moto


def nothing(phase: str, done: int, total: int | None) -> None:
    pass


def bytes_of(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with weights of two precisions, and a file that no pipeline needs."""
    folder = shapes.half(tmp_path_factory.mktemp("made") / "m", keep_plain=True)
    (folder / "all-in-one.ckpt").write_bytes(bytes(12_345))
    return folder


@pytest.fixture(scope="module")
def hub(made: Path) -> Iterator[HubStandIn]:
    repos = {name: {"main": made} for name in ("org/open", "org/gated")}
    with HubStandIn(repos, gated=["org/gated"], tokens={TOKEN: []}) as started:
        yield started


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as started:
        yield started


class Volume:
    """An empty volume, and who fills it."""

    def __init__(self, root: Path, hub: HubStandIn | None = None, s3: str = "", **more: str) -> None:
        self.root = root
        self.settings = Settings.from_env(environ(root, hub, s3, **more))
        self.fetcher = Fetcher(self.settings, Library(self.settings), set)

    async def size(self, **options: str) -> int | None:
        ref = read_ref(options, self.settings)
        assert ref is not None
        found = await self.fetcher.size(ref)
        assert self.fetcher.transfers() == []
        assert not self.root.exists() or [path for path in self.root.rglob("*") if path.is_file()] == []
        return found


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("precision", ["", "fp16"])
async def test_of_a_repository_what_its_pipeline_needs(
    hub: HubStandIn, made: Path, tmp_path: Path, precision: str
) -> None:
    hub.forget()
    found = await Volume(tmp_path / "v", hub).size(MODEL_ID="org/open", MODEL_PRECISION=precision)
    halves = bytes_of(made, "*.fp16.safetensors")
    fulls = bytes_of(made, "*.safetensors") - halves
    assert halves < fulls
    assert found == bytes_of(made) - 12_345 - (fulls if precision else halves)
    assert not any("safetensors" in path or "cdn" in path for path in hub.requests)


async def test_what_the_hub_does_not_give_out_is_told(hub: HubStandIn, tmp_path: Path) -> None:
    volume = Volume(tmp_path / "v", hub)
    for name, code in (("org/gated", "SOURCE_DENIED"), ("org/none", "MODEL_NOT_FOUND")):
        with pytest.raises(ApiError) as error:
            await volume.size(MODEL_ID=name)
        assert error.value.code == code


async def test_what_is_here_under_another_name_is_not_fetched(hub: HubStandIn, tmp_path: Path) -> None:
    volume = Volume(tmp_path / "v", hub)
    ref = read_ref({"MODEL_ID": "my/own", "HF_MODEL_ID": "org/open"}, volume.settings)
    assert ref is not None
    await asyncio.to_thread(Installer(volume.settings, volume.fetcher._library.volume).install, ref, nothing)
    plain = read_ref({"MODEL_ID": "org/open"}, volume.settings)
    assert plain is not None
    assert await volume.fetcher.size(plain) == 0


async def test_what_another_server_left_on_the_volume_is_not_fetched(
    hub: HubStandIn, made: Path, tmp_path: Path
) -> None:
    volume = Volume(tmp_path / "v", hub)
    old = shapes.plain(tmp_path / "v" / "models--org--open")
    hub.forget()
    ref = read_ref({"MODEL_ID": "org/open"}, volume.settings)
    assert ref is not None
    assert await volume.fetcher.size(ref) == 0
    assert old.is_dir()  # not taken over either
    assert list(hub.requests) == []


async def test_of_a_folder_and_an_archive_in_a_bucket(made: Path, tmp_path: Path) -> None:
    with moto() as s3:
        bucket, volume = Bucket(s3), Volume(tmp_path / "v", None, s3)
        plain = shapes.plain(tmp_path / "plain")
        archive = shapes.zst(plain)
        bucket.put("it.tar.zst", archive)
        bucket.put_folder("it", made)
        assert await volume.size(MODEL_URL=f"s3:///{BUCKET}/it.tar.zst") == len(archive)
        # as of a repository: of two precisions one
        found = await volume.size(MODEL_ID="x/y", MODEL_URL=f"s3:///{BUCKET}/it/")
        assert found == bytes_of(made) - 12_345 - bytes_of(made, "*.fp16.safetensors")


@pytest.mark.parametrize("head", [True, False])
async def test_of_a_file_behind_http(site: Site, tmp_path: Path, head: bool) -> None:
    archive = site.put("/it.tar.zst", bytes(700_000))
    checkpoint = site.put("/it.safetensors", bytes(800_000))
    if not head:
        site.fault("/", "status", status=405, method="HEAD")
    volume = Volume(tmp_path / "v")
    assert await volume.size(MODEL_URL=archive) == 700_000
    assert await volume.size(CHECKPOINT_URL=checkpoint) == 800_000
    assert site.gets("/it.tar.zst") == (0 if head else 1)


async def test_a_private_network_is_not_asked(site: Site, tmp_path: Path) -> None:
    volume = Volume(tmp_path / "v", ALLOW_PRIVATE_URLS="0")
    with pytest.raises(ApiError) as error:
        await volume.size(MODEL_URL=site.put("/it.tar.zst", b"x"))
    assert error.value.code == "URL_NOT_ALLOWED"
    assert site.log == []


async def test_a_source_that_does_not_answer_is_not_waited_for(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it keeps none of those waiting that have another."""
    monkeypatch.setattr(fetchers, "_PATIENCE", 0.3)
    volume = Volume(tmp_path / "v")
    volume.fetcher._asking, volume.fetcher._asking_strangers = asyncio.Semaphore(1), asyncio.Semaphore(1)
    url = site.put("/it.tar.zst", bytes(1000))
    site.fault("/", "stall", method="HEAD", seconds=2.0, times=1)

    for _ in range(2):
        with pytest.raises(ApiError) as error:
            await volume.size(MODEL_URL=url)
        assert error.value.code == "TIMED_OUT"
    async with asyncio.timeout(20):  # a busy machine may need longer than that patience to get as far as asking
        while not site.log:
            await asyncio.sleep(0.01)
    assert len(site.log) == 1  # the thread that may ask is still at the first
    assert not volume.fetcher._asking.locked()
    monkeypatch.setattr(fetchers, "_PATIENCE", 30)
    assert await volume.size(MODEL_URL=url) == 1000
