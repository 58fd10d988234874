"""One large file from a static-file server: our download against what others use, all in turn.

From nginx as fast as this machine can; from nginx behind a link of 20 ms and 50 MB/s for each connection, as
object stores are; from Swift's S3 interface; and a ``tar.zst`` unpacked while it arrives. Ours ends with the
SHA-256 of the whole and an ``fsync``; none of the baselines do either. The figures without the SHA-256 stand
at the end of a line.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from api.models.transfer import download
from scripts.benchmarks import fetch_archive, swift
from scripts.benchmarks.fetch_baselines import BASELINES, Get, boto3_download
from scripts.benchmarks.measure import Figure, median, milliseconds
from scripts.benchmarks.nginx import nginx, program
from scripts.benchmarks.slow_link import slowed

SIZE = 2**29
ROUNDS = 5
SLOW_ROUNDS = 3


def ours(url: str, path: Path, *, digest: bool = True) -> None:
    """Our download with its defaults."""
    download(url, path, digest=digest)


def make(path: Path, size: int) -> str:
    """A file that no compression helps with; returns its SHA-256."""
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for _ in range(size // 2**24):
            block = os.urandom(2**24)
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def check(get: Get, url: str, path: Path, sha256: str) -> None:
    """Make sure that a contender does what it is measured for."""
    path.unlink(missing_ok=True)
    get(url, path)
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == sha256, "it downloaded something else"


def rates(gets: Mapping[str, Get], url: str, folder: Path, rounds: int, *, twice: bool) -> dict[str, float]:
    """GB/s of each at the median of rounds in which each has its turn, another one first in each round.

    ``twice``: each runs twice in a row, and the second counts. On a virtual machine memory that nothing used for a
    moment may belong to the host again: who follows one that writes in larger or smaller blocks pays for that.
    """
    times: dict[str, list[float]] = {name: [] for name in gets}
    names = list(gets)
    for number in range(rounds):
        for at in range(len(names)):
            name = names[(number + at) % len(names)]
            for _ in range(2 if twice else 1):
                path = folder / "file"
                path.unlink(missing_ok=True)
                taken = milliseconds(functools.partial(gets[name], url, path))
            times[name].append(taken)
    return {name: SIZE / 1e6 / median(taken) for name, taken in times.items()}


def compare(name: str, baselines: dict[str, tuple[Get, str]], url: str, folder: Path, *, fast: bool) -> list[Figure]:
    """One figure a baseline."""
    plain = functools.partial(ours, digest=False)
    gets: dict[str, Get] = {"ours": ours, "plain": plain, **{key: get for key, (get, _) in baselines.items()}}
    found = rates(gets, url, folder, ROUNDS if fast else SLOW_ROUNDS, twice=fast)
    return [
        Figure(
            f"fetch-{name}-{key}",
            found["ours"],
            found[key],
            "GB/s",
            against,
            found["ours"] / found[key],
            {
                "without_sha256": f"{found['plain']:.3f}",
                "ratio_without_sha256": f"{found['plain'] / found[key]:.2f}",
                "load": f"{os.getloadavg()[0]:.1f}",
            },
        )
        for key, (_, against) in baselines.items()
    ]


def run() -> list[Figure]:
    """Measure."""
    if program() is None:
        print("fetch: skipped, as nginx is not installed: apt-get install nginx-light", file=sys.stderr)
        return []
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="fetch-") as name:
        home = Path(name)
        root, folder = home / "root", home / "out"
        folder.mkdir()
        sha256 = make(root / "bucket" / "file", SIZE)
        with nginx(root, home, "/bucket/file") as port:
            url = f"http://127.0.0.1:{port}/bucket/file"
            for get in (ours, *(get for get, _ in BASELINES.values())):
                check(get, url, folder / "file", sha256)
            figures += compare("loopback", BASELINES, url, folder, fast=True)
            few = {key: BASELINES[key] for key in ("boto3", "urllib")}
            with slowed(port, rate=50e6, delay=0.02) as slow:
                url = f"http://127.0.0.1:{slow}/bucket/file"
                figures += compare("50MBps-a-connection", few, url, folder, fast=False)
            figures += fetch_archive.run(root, port, folder)
        figures += _from_swift(home, root / "bucket" / "file", folder, few)
    return figures


def _from_swift(home: Path, file: Path, folder: Path, baselines: dict[str, tuple[Get, str]]) -> list[Figure]:
    why = swift.missing()
    if why:
        print(f"fetch: without Swift, as {why}", file=sys.stderr)
        return []
    with swift.serving(home / "swift") as store:
        store.put("bucket", "file", file)
        signed: Callable[[str, Path], object] = functools.partial(boto3_download, keys=store.keys)
        baselines = {**baselines, "boto3": (signed, baselines["boto3"][1])}
        return compare("swift", baselines, store.url("bucket", "file"), folder, fast=False)
