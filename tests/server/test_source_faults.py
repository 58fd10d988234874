"""Sources that lie, break off or are full of traps: nothing of it is ever used, and the same request succeeds later."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests import shapes
from tests.hub import HubStandIn
from tests.running import Server, running
from tests.site import Site
from tests.sources import PROMPT, TOKEN, Bucket, draw, environ, installed, is_same, manifest_of, moto, refused

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TENTHS = range(1, 10)
SHAPES = {"CHECKPOINT_CONFIG_URL": "demo/shapes"}
UNET = "unet/diffusion_pytorch_model.safetensors"


@dataclass
class World:
    server: Server
    hub: HubStandIn
    proxy: Site
    """Before the S3 server: what goes wrong there goes wrong here."""
    bucket: Bucket
    site: Site
    models_dir: Path
    made: Path
    picture: np.ndarray

    @property
    def zst(self) -> bytes:
        return (self.made / "it.tar.zst").read_bytes()

    @property
    def one(self) -> bytes:
        return (self.made / "one.safetensors").read_bytes()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("volume")
    plain = shapes.plain(made / "plain")
    (made / "it.tar.zst").write_bytes(shapes.zst(plain))
    shapes.checkpoint(made / "one.safetensors")
    repos = {f"hub/cut-{n}": {"main": shapes.other(made / f"cut{n}", n)} for n in TENTHS}
    repos["hub/flipped"] = {"main": shapes.other(made / "flipped", 20)}
    with moto() as s3, Site(s3) as proxy, Site() as site, HubStandIn(repos, tokens={TOKEN: []}) as hub:
        settings = environ(root / "models", hub, f"127.0.0.1:{proxy.port}")
        with running(settings, root / "log") as server:
            yield World(server, hub, proxy, Bucket(s3), site, root / "models", made, draw(server)[0])
        text = (root / "log").read_text()
        assert "Traceback" not in text, text[text.index("Traceback") - 300 :][:3000]


@pytest.fixture(autouse=True)
def forgotten(request: pytest.FixtureRequest) -> None:
    if "world" in request.fixturenames:
        here = request.getfixturevalue("world")
        for source in (here.hub, here.proxy, here.site):
            source.forget()


def wrong(world: World, call: dict[str, str], *codes: str) -> None:
    """It is refused, and nothing of it is installed."""
    before = set(installed(world.models_dir))
    refused(world.server.post(PROMPT, call), *(codes or BROKEN))
    assert set(installed(world.models_dir)) <= before


BROKEN = ("MODEL_CORRUPT", "MODEL_BROKEN", "SOURCE_UNREACHABLE", "MODEL_NOT_FOUND")


def right(world: World, call: dict[str, str], picture: bool = True) -> None:
    image, answer = draw(world.server, **call)
    if picture:
        assert is_same(image, world.picture)
    assert installed(world.models_dir)
    assert answer["$meta"]["source"]


@dataclass(frozen=True)
class Cut:
    """A kind of source whose object can be put there shortened; ``put`` returns the request."""

    name: str
    content: Callable[[World], bytes]
    put: Callable[[World, str, bytes], dict[str, str]]


def s3_archive(world: World, name: str, content: bytes) -> dict[str, str]:
    return {"MODEL_URL": world.bucket.put(f"{name}.tar.zst", content)}


def s3_folder(world: World, name: str, content: bytes) -> dict[str, str]:
    url = world.bucket.put_folder(name, world.made / "plain")
    world.bucket.put(f"{name}/{UNET}", content)
    return {"MODEL_URL": url}


def http_archive(world: World, name: str, content: bytes) -> dict[str, str]:
    return {"MODEL_URL": world.site.put(f"/{name}.tar.zst", content)}


def http_tar(world: World, name: str, content: bytes) -> dict[str, str]:
    return {"MODEL_URL": world.site.put(f"/{name}.tar", content)}


def http_checkpoint(world: World, name: str, content: bytes) -> dict[str, str]:
    return {"CHECKPOINT_URL": world.site.put(f"/{name}.safetensors", content), **SHAPES}


CUTS = [
    Cut("s3-archive", lambda w: w.zst, s3_archive),
    Cut("s3-folder", lambda w: (w.made / "plain" / UNET).read_bytes(), s3_folder),
    Cut("http-archive", lambda w: w.zst, http_archive),
    Cut("http-tar", lambda w: shapes.tar(w.made / "plain"), http_tar),
    Cut("http-checkpoint", lambda w: w.one, http_checkpoint),
]


@pytest.mark.parametrize("cut", CUTS, ids=lambda c: c.name)
def test_what_was_stored_truncated_is_refused(world: World, cut: Cut) -> None:
    """As after an upload that was broken off: at every tenth."""
    content = cut.content(world)
    for tenth in TENTHS:
        name = f"stored-{cut.name}-{tenth}"
        call = cut.put(world, name, content[: len(content) * tenth // 10])
        wrong(world, call)
        if tenth in (1, 5, 9):
            assert cut.put(world, name, content) == call
            right(world, call)


@pytest.mark.parametrize("cut", CUTS, ids=lambda c: c.name)
def test_a_connection_that_is_cut_is_continued(world: World, cut: Cut) -> None:
    content = cut.content(world)
    for tenth in (1, 5, 9):
        call = cut.put(world, f"dropped-{cut.name}-{tenth}", content)
        source = world.proxy if cut.name.startswith("s3") else world.site
        path = f"dropped-{cut.name}-{tenth}" + (f"/{UNET}" if cut.name == "s3-folder" else "")
        source.fault(path, "cut", at=len(content) * tenth // 10, times=1)
        right(world, call)


def test_files_of_the_hub_that_end_early_are_refused(world: World) -> None:
    """At every tenth, side by side: each is asked for again and again before it is given up."""
    size = (world.made / "plain" / UNET).stat().st_size
    for tenth in TENTHS:
        world.hub.fault(world.hub.cdn_path(f"hub/cut-{tenth}", UNET), "short", at=size * tenth // 10)
    calls = [{"MODEL_ID": f"hub/cut-{tenth}"} for tenth in TENTHS]
    with ThreadPoolExecutor(9) as pool:
        for answer in list(pool.map(lambda call: world.server.post(PROMPT, call), calls)):
            assert refused(answer, "MODEL_CORRUPT", "SOURCE_UNREACHABLE")["requested"].startswith("hub/cut-")
    world.hub.forget()
    # one cut is no fault: what is missing is asked for
    for tenth in TENTHS:
        world.hub.fault(world.hub.cdn_path(f"hub/cut-{tenth}", UNET), "cut", at=size * tenth // 10, times=1)
    for call in calls:
        right(world, call, picture=False)


def flip(content: bytes, at: int | None = None) -> bytes:
    at = len(content) // 2 if at is None else at
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_a_flipped_byte_from_the_hub_is_found(world: World) -> None:
    world.hub.fault(world.hub.cdn_path("hub/flipped", UNET), "wrong", at=4_000_000)
    wrong(world, {"MODEL_ID": "hub/flipped"}, "MODEL_CORRUPT")
    world.hub.forget()
    right(world, {"MODEL_ID": "hub/flipped"}, picture=False)


@pytest.mark.parametrize("kind", ["archive", "tar", "folder", "folder-with-sha256", "checkpoint"])
def test_a_flipped_byte_from_s3_is_found(world: World, kind: str) -> None:
    """By the MD5 that an ETag is, or a checksum of the storage, or what whoever uploaded it noted."""
    name = f"flipped-{kind}"
    path, at = f"/{name}", 1_000_000
    if kind == "archive":
        call = s3_archive(world, name, world.zst)
    elif kind == "tar":
        call = {"MODEL_URL": world.bucket.put(f"{name}.tar", shapes.tar(world.made / "plain"))}
    elif kind == "checkpoint":
        call = {"CHECKPOINT_URL": world.bucket.put(f"{name}.safetensors", world.one), **SHAPES}
    else:
        call = s3_folder(world, name, (world.made / "plain" / UNET).read_bytes())
        path = f"{name}/{UNET}"
        if kind == "folder-with-sha256":
            world.bucket.put(path, (world.made / "plain" / UNET).read_bytes(), ChecksumAlgorithm="SHA256")
    world.proxy.fault(path, "wrong", at=at)
    wrong(world, call, "MODEL_CORRUPT")
    world.proxy.forget()
    right(world, call)
    assert draw(world.server, **call)[1]["$meta"]["source"].startswith("http+s3://")


def test_a_flipped_byte_behind_http(world: World) -> None:
    """Found with ``#sha256=`` and by the archive's own checksum; otherwise the manifest says that nobody can know."""
    tar = shapes.tar(world.made / "plain")
    digest = hashlib.sha256(tar).hexdigest()
    at = tar.index((world.made / "plain" / UNET).read_bytes()) + 4_000_000
    url = world.site.put("/f.tar", flip(tar, at))
    wrong(world, {"MODEL_URL": f"{url}#sha256={digest}"}, "MODEL_CORRUPT")
    draw(world.server, MODEL_URL=url)
    assert not manifest_of(world.models_dir, url).verified
    world.site.put("/f.tar", tar)
    right(world, {"MODEL_URL": f"{url}#sha256={digest}"})
    url = world.site.put("/f.tar.zst", flip(world.zst))
    wrong(world, {"MODEL_URL": url}, "MODEL_CORRUPT")
    world.site.put("/f.tar.zst", world.zst)
    right(world, {"MODEL_URL": url})
    # a server that tells a digest is held to it
    world.site.digests = True
    url = world.site.put("/g.tar", tar)
    world.site.fault("/g.tar", "wrong", at=at)
    wrong(world, {"MODEL_URL": url}, "MODEL_CORRUPT")
    world.site.forget()
    right(world, {"MODEL_URL": url})
    assert manifest_of(world.models_dir, url).verified
    world.site.digests = False


def member(name: str, kind: bytes = tarfile.REGTYPE, to: str = "", size: int = 3) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, to, size
    return info


def with_plain(world: World, info: tarfile.TarInfo, after: tarfile.TarInfo | None = None) -> bytes:
    """A whole model, with one member more that must not be."""
    out = world.made / "trap.tar"
    with tarfile.open(out, "w") as archive:
        archive.add(world.made / "plain", arcname=".")
    inner = out.read_bytes().rstrip(b"\0")
    inner += bytes(-len(inner) % 512)
    for each in (info, after):
        if each is not None:
            body = b"bad" if each.isreg() and each.size == 3 else b""
            inner += each.tobuf(tarfile.PAX_FORMAT) + body + bytes(-len(body) % 512)
    return inner + bytes(1024)


def tree(*roots: Path) -> set[str]:
    return {str(p) for root in roots for p in root.rglob("*")}


ESCAPED = Path("/tmp/escaped-from-an-archive")  # noqa: S108
TRAPS = {
    "parent": (member("../escaped"), None),
    "deep-parent": (member("unet/../../../escaped"), None),
    "absolute": (member(str(ESCAPED)), None),
    "symlink": (member("unet/out", tarfile.SYMTYPE, "/etc"), None),
    "through-a-symlink": (member("out", tarfile.SYMTYPE, str(ESCAPED.parent)), member(f"out/{ESCAPED.name}")),
    "hardlink": (member("passwd", tarfile.LNKTYPE, "/etc/passwd"), None),
    "device": (member("null", tarfile.CHRTYPE), None),
    "fifo": (member("pipe", tarfile.FIFOTYPE), None),
    "larger-than-the-disk": (member("huge.safetensors", size=2**45), None),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps_in_archives_are_not_stepped_into(world: World, name: str) -> None:
    before = tree(world.models_dir.parent.parent) - tree(world.models_dir)
    url = world.site.put(f"/{name}.tar", with_plain(world, *TRAPS[name]))
    wrong(world, {"MODEL_URL": url}, "ARCHIVE_UNSAFE")
    assert not ESCAPED.exists()
    assert not list((world.models_dir / ".staging").iterdir())
    assert tree(world.models_dir.parent.parent) - tree(world.models_dir) - before <= {str(world.made / "trap.tar")}
    world.site.put(f"/{name}.tar", shapes.tar(world.made / "plain"))
    right(world, {"MODEL_URL": url})


def test_a_bomb_is_defused(world: World) -> None:
    bomb = gzip.compress(member("bomb.safetensors", size=2**29).tobuf() + bytes(2**29), 9)
    assert len(bomb) < 2**20
    url = world.site.put("/bomb.tar.gz", bomb)
    began = time.monotonic()
    wrong(world, {"MODEL_URL": url}, "ARCHIVE_UNSAFE")
    assert time.monotonic() - began < 20
    assert not list((world.models_dir / ".staging").iterdir())


@pytest.mark.parametrize(
    ("kind", "more", "codes"),
    [
        ("status", {"status": 500}, ("SOURCE_UNREACHABLE",)),
        ("status", {"status": 503, "headers": {"Retry-After": "0"}}, ("SOURCE_UNREACHABLE",)),
        ("status", {"status": 403}, ("SOURCE_DENIED",)),
        ("cut", {"at": 0}, ("SOURCE_UNREACHABLE",)),
    ],
    ids=["500", "503", "403", "cut"],
)
def test_s3_that_fails_for_a_while(world: World, kind: str, more: dict, codes: tuple[str, ...]) -> None:
    name = f"failing-{kind}-{more.get('status', 0)}"
    call = s3_archive(world, name, world.zst)
    for method in ("GET", "HEAD"):
        world.proxy.fault(name, kind, method=method, **more)
    error = refused(world.server.post(PROMPT, call), *codes)
    assert f"127.0.0.1:{world.proxy.port}" in error["message"]
    world.proxy.forget()
    right(world, call)


def test_s3_that_is_slow_is_waited_for(world: World) -> None:
    call = s3_archive(world, "slow", world.zst)
    world.proxy.fault("slow", "slow", seconds=0.01)
    right(world, call)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 MiB: 256 MiB are always left free, so it takes a few models."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(folder)], check=False)
    if done.returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(world: World, small_disk: Path) -> None:
    """Full before the download begins, and full in the middle of each kind of source."""
    models_dir = small_disk / "models"
    models_dir.mkdir()
    filler = small_disk / "filler"
    calls = {
        "hub": {"MODEL_ID": "hub/flipped"},
        "archive": {"MODEL_URL": world.site.put("/full.tar.zst", world.zst)},
        "checkpoint": {"CHECKPOINT_URL": world.site.put("/full.safetensors", world.one), **SHAPES},
    }
    settings = environ(models_dir, world.hub, VOLUME_LIMIT="", HF_HOME=str(world.made / "hf"))
    with running(settings, world.made / "full.log") as server:
        for kind, call in calls.items():
            filler.write_bytes(bytes(45 * 2**20))
            error = refused(server.post(PROMPT, call), "DISK_FULL")
            assert "MiB" in error["message"]
            assert left_behind(models_dir) == 0, kind
            filler.unlink()
            # there is room when it begins
            world.hub.fault(world.hub.cdn_path("hub/flipped", UNET), "slow", seconds=0.01)
            world.site.fault("/full", "slow", seconds=0.01)
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(server.post, PROMPT, call)
                while left_behind(models_dir) < 2**20:
                    time.sleep(0.01)
                fill(filler)
                refused(answer.result(), "DISK_FULL")
            assert left_behind(models_dir) == 0, kind
            filler.unlink()
            world.hub.forget()
            world.site.forget()
            image, _ = draw(server, **call)
            assert kind == "hub" or is_same(image, world.picture)
            assert len(installed(models_dir)) == 1
            for path in models_dir.iterdir():
                if path.name not in (".locks", ".refs"):
                    subprocess.run(["rm", "-rf", str(path)], check=True)


def fill(path: Path) -> None:
    """To the last byte."""
    with path.open("wb", buffering=0) as file:
        size = 2**20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def left_behind(models_dir: Path) -> int:
    """Bytes in files of models, unfinished ones included."""
    total = 0
    for root, _, names in os.walk(models_dir):
        if ".locks" not in root and ".refs" not in root:
            for name in names:
                try:
                    total += (Path(root) / name).stat().st_blocks * 512
                except FileNotFoundError:
                    continue
    return total
