from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.running import Server, running

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hypothesis.settings.register_profile("whatever-else-runs", deadline=None)
hypothesis.settings.load_profile("whatever-else-runs")


@pytest.fixture(scope="session", autouse=True)
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever a test starts keeps its state away from the user's."""
    before = os.environ.get("STATE_DIR")
    os.environ["STATE_DIR"] = str(tmp_path_factory.mktemp("state"))
    yield
    if before is None:
        del os.environ["STATE_DIR"]
    else:
        os.environ["STATE_DIR"] = before


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MODELS_DIR with tiny random models: tiny/a, tiny/b, tiny/safe, tiny/nsfw, and broken ones."""
    from tests.tiny import save_tiny

    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "tiny--a", seed=1)
    save_tiny(root / "tiny--b", seed=2)
    save_tiny(root / "tiny--safe", seed=3, nsfw=False)
    save_tiny(root / "tiny--nsfw", seed=3, nsfw=True)
    save_tiny(root / "tiny--cut", seed=4)
    weights = root / "tiny--cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    save_tiny(root / "tiny--partless", seed=5)
    for file in (root / "tiny--partless" / "unet").iterdir():
        file.unlink()
    (root / "tiny--partless" / "unet").rmdir()
    return root


@pytest.fixture(scope="session")
def server(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for every test that only sends requests."""
    environ = {
        "MODELS_DIR": str(models_dir),
        "MAX_BODY": "8MiB",
        "FETCH_TIMEOUT": "2",
        "RUNTIME_DOWNLOADS": "0",
        "SECRET_TOKEN": "s3cr3t-value",
    }
    with running(environ, tmp_path_factory.mktemp("log") / "server.log") as started:
        yield started


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory):
    """The demo model through plain diffusers, as the reference."""
    from scripts.demo_model.__main__ import load
    from tests.running import ROOT

    return load(ROOT / "models" / "shapes")
