"""The size of an image by layer, of an image that is made here."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.running import ROOT


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    libraries = {"opt/venv/lib/python3.11/site-packages/torch/x.so": bytes(12_000_000)}
    libraries["opt/venv/lib/python3.11/site-packages/torch-2.13.0.dist-info/METADATA"] = b"x" * 1000
    layers = {"a/layer.tar": tar_of({"bin/sh": b"x" * 2_000_000}), "b/layer.tar": gzip.compress(tar_of(libraries))}
    history = [
        {"created_by": "/bin/sh -c #(nop) ADD file:1 in / "},
        {"created_by": "ENV A=B", "empty_layer": True},
        {"created_by": "COPY --from=dependencies /opt/venv /opt/venv"},
    ]
    files = {"config.json": json.dumps({"history": history}).encode(), **layers}
    files["manifest.json"] = json.dumps([{"Config": "config.json", "Layers": list(layers)}]).encode()
    path = tmp_path / "image.tar"
    path.write_bytes(tar_of(files))
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "image-size", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_each_layer_with_what_made_it_and_the_packages_in_it(archive: Path) -> None:
    out = run(archive)
    assert out.returncode == 0, out.stderr
    _, base, venv, packages, total = out.stdout.splitlines()
    assert base.split()[:2] == ["2.0", "MB"]
    assert base.endswith("ADD file:1 in /")
    assert venv.split()[:4] == ["12.0", "MB", "0.0", "MB"], "a layer that is compressed in the archive"
    assert venv.endswith("COPY --from=dependencies /opt/venv /opt/venv")
    assert packages.split() == ["torch", "12.0", "MB"]
    assert total.split()[:2] == ["14.0", "MB"]


def test_a_budget_that_is_exceeded_fails(archive: Path) -> None:
    assert run(archive, "--budget", "15MB").returncode == 0
    over = run(archive, "--budget", "10MB")
    assert over.returncode == 1
    assert "over its budget of 10.0 MB" in over.stderr
    assert run(archive, "--budget", "much").returncode == 2
