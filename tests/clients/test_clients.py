"""The clients that RunPod's users have, as they are installed from their registries, against a real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT, Server, running

HERE = Path(__file__).resolve().parent
KEY = "a-key-of-these-clients-alone"
STEPS = 25

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs one job at a time, so that what comes meanwhile waits."""
    environ = {
        "API_KEYS": f"clients:{KEY}",
        "WRONG_KEYS": "0",
        "MAX_CONCURRENCY": "1",
        "RUNTIME_DOWNLOADS": "0",
        "ALLOW_PRIVATE_URLS": "1",
    }
    with running(environ, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


def steps_of(command: list[str | Path], environ: dict[str, str]) -> list[dict[str, Any]]:
    """What a scenario prints, one line a step."""
    out = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=500
    )
    told = [json.loads(line) for line in out.stdout.splitlines() if line.startswith('{"step":')]
    for one in told:
        print(f"{one['step']:>3} {'ok ' if one['ok'] else 'NOT'} {one['seconds']:6.2f} s  {one['what']}")
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-4000:]
    return told


def check(told: list[dict[str, Any]]) -> None:
    failed = [f"{one['step']}: {one['what']}\n{one['error']}" for one in told if not one["ok"]]
    assert not failed, "\n\n".join(failed)
    assert [one["step"] for one in told] == list(range(1, STEPS + 1))


def test_the_client_for_python(endpoint: Server) -> None:
    pytest.importorskip("runpod", reason="RunPod's client is not installed: pip install runpod")
    check(steps_of([sys.executable, HERE / "scenario.py", KEY], {"RUNPOD_ENDPOINT_BASE_URL": f"{endpoint.url}/v2"}))


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """The packages of package-lock.json, installed once into a folder that git ignores."""
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed: the client for JavaScript needs Node.js 20")
    folder = ROOT / "node_modules" / ".cache" / "clients"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        if (folder / name).exists() and (folder / name).read_bytes() == (HERE / "js" / name).read_bytes():
            continue
        shutil.copy(HERE / "js" / name, folder)
        shutil.rmtree(folder / "node_modules", ignore_errors=True)
    if not (folder / "node_modules").exists():
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        out = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
        if out.returncode:
            shutil.rmtree(folder / "node_modules", ignore_errors=True)
            pytest.skip(f"npm ci failed, there may be no network: {out.stderr[-500:]}")
    return folder


def test_the_client_for_javascript(endpoint: Server, node_modules: Path) -> None:
    shutil.copy(HERE / "js" / "scenario.mjs", node_modules)  # imports are looked for beside the file
    check(steps_of(["node", node_modules / "scenario.mjs", f"{endpoint.url}/v2", KEY], {}))


def test_the_lock_file_names_no_registry() -> None:
    """Each package is checked by its digest, wherever it is fetched from."""
    lock = json.loads((HERE / "js" / "package-lock.json").read_text())
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert packages
    for name, package in packages.items():
        assert package["integrity"].startswith("sha512-"), name
        assert package.get("resolved", "https://registry.npmjs.org/").startswith("https://registry.npmjs.org/"), name
