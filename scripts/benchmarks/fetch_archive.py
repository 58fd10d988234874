"""A model's ``tar.zst`` unpacked while it arrives, against the longer of downloading and unpacking it.

Over a link of 40 MB/s, where the download is longer, and over one on which both take as long: the hardest case.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
from pathlib import Path

from api.models.archive_pack import pack
from api.models.archives import Readable, extract
from api.models.http_stream import open_stream
from scripts.benchmarks.fetch_baselines import plain_urllib
from scripts.benchmarks.measure import Figure, median, milliseconds
from scripts.benchmarks.slow_link import slowed

WEIGHTS = 224 * 2**20
TEXT = 32 * 2**20
ROUNDS = 3


def make(folder: Path, archive: Path) -> None:
    """A model-like archive: weights that hardly shrink, a tokenizer that does."""
    (folder / "unet").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    with (folder / "unet" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        for _ in range(WEIGHTS // 2**24):
            file.write(os.urandom(2**24))
    words = random.Random(7).choices(["lake", "mountain", "dawn", "photo", "of", "a", "the", "1.5", "\n"], k=2**16)
    text = " ".join(words)
    (folder / "tokenizer" / "vocab.txt").write_text((text * (TEXT // len(text) + 1))[:TEXT], encoding="utf-8")
    with archive.open("wb") as out:
        pack(folder, out, lambda phase, done, total: None)


def unpack(stream: Readable, folder: Path) -> None:
    """Extract, until it is on the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    for entry in extract(stream, "tar.zst", folder, lambda phase, done, total: None, 2**40, 1000):
        with (folder / entry.path).open("rb") as file:
            os.fsync(file.fileno())


def from_disk(archive: Path, folder: Path) -> None:
    """Extract what is there already."""
    with archive.open("rb") as stream:
        unpack(stream, folder)


def install(url: str, folder: Path) -> None:
    """Extract what arrives."""
    with open_stream(url) as stream:
        unpack(stream, folder)  # type: ignore[arg-type]  # RawIOBase.read may give None, this stream's does not


def run(root: Path, port: int, folder: Path) -> list[Figure]:
    """Measure, with the server of ``root`` at ``port``."""
    archive = root / "model.tar.zst"
    make(folder / "model", archive)
    shutil.rmtree(folder / "model")
    size = archive.stat().st_size
    unpacking = functools.partial(from_disk, archive, folder / "unpacked")
    unpacking()
    balanced = size / (median([milliseconds(unpacking) for _ in range(3)]) / 1000)
    figures = []
    for name, rate in (("40MBps", 40e6), ("as-fast-as-unpacking", balanced)):
        with slowed(port, rate=rate, shared=True) as slow:
            url = f"http://127.0.0.1:{slow}/{archive.name}"
            calls = {
                "installed": functools.partial(install, url, folder / "installed"),
                "download": functools.partial(plain_urllib, url, folder / "archive"),
                "unpacking": unpacking,
            }
            taken: dict[str, list[float]] = {key: [] for key in calls}
            for _ in range(ROUNDS):
                for key, call in calls.items():
                    taken[key].append(milliseconds(call) / 1000)
        at = {key: median(values) for key, values in taken.items()}
        longer = max(at["download"], at["unpacking"])
        more = {
            "of_the_longer": f"{at['installed'] / longer:.3f}",
            "download": f"{at['download']:.2f}",
            "unpacking": f"{at['unpacking']:.2f}",
            "link_MBps": f"{rate / 1e6:.0f}",
            "load": f"{os.getloadavg()[0]:.1f}",
        }
        against = "the longer of download and unpacking"
        figures.append(
            Figure(f"fetch-archive-{name}", at["installed"], longer, "s", against, longer / at["installed"], more)
        )
    return figures
