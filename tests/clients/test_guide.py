"""docs/runpod.md, followed word by word in a clean copy, with a server of this machine in RunPod's place."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from tests.running import ROOT, running
from tests.unit.test_deploy import ENDPOINT, POD, TEMPLATE

KEY = "a-key-of-this-guide-alone"
GUIDE = (ROOT / "docs" / "runpod.md").read_text()
BOXES = re.findall(r"^ *```(\w+)(?: +(\w+))?\n(.*?)^ *```$", GUIDE, re.M | re.S)

pytestmark = pytest.mark.timeout(600)


class Rest(BaseHTTPRequestHandler):
    """RunPod's REST API as far as the guide goes: what is made gets an id, what has unknown names is refused."""

    made: list[tuple[str, dict[str, Any]]]
    known: ClassVar = {"/templates": TEMPLATE, "/pods": POD, "/endpoints": ENDPOINT}
    ids: ClassVar = {"/templates": "template-1", "/pods": "pod-1", "/endpoints": "any"}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        good = (
            self.path in self.known
            and set(body) <= set(self.known[self.path])
            and self.headers["Authorization"] == f"Bearer {KEY}"
            and self.headers["Content-Type"] == "application/json"
            and body.get("templateId", "template-1") == "template-1"
        )
        type(self).made.append((self.path, body))
        answer = json.dumps({"id": self.ids[self.path]} if good else {"error": "no"}).encode()
        self.send_response(200 if good else 400)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def rest() -> Iterator[tuple[type[Rest], str]]:
    handler = type("Fresh", (Rest,), {"made": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def clean_copy(folder: Path) -> None:
    """What a clone of the repository has, as it is here now."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("models/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def test_every_box_says_who_can_run_it() -> None:
    marks = {(language, mark) for language, mark, _ in BOXES}
    assert marks <= {("bash", "run"), ("bash", "account"), ("bash", "serve")}
    for _, mark, body in BOXES:
        assert (mark == "account") == body.lstrip().startswith("# needs "), body


def test_what_the_guide_names_is_there() -> None:
    settings = set(re.findall(r"^# (\w+)=", (ROOT / ".env.example").read_text(), re.M))
    named = set(re.findall(r"`([A-Z][A-Z_]+)(?:=[^`]*)?`", GUIDE))
    elsewhere = {
        "RUNPOD_API_KEY", "RUNPOD_API_URL", "RUNPOD_MODEL_KEY", "RUN_AS", "TIMED_OUT", "FAILED", "IN_QUEUE", "MODEL_NOT_FOUND",
        "MODEL_MISMATCH", "SOURCE_DENIED",
    }  # fmt: skip
    assert named <= settings | elsewhere
    assert named & settings


@pytest.mark.slow
def test_the_guide_is_followed(tmp_path: Path, rest: tuple[type[Rest], str]) -> None:
    if missing := [name for name in ("curl", "openssl", "bash") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: the guide's boxes use them")
    handler, rest_url = rest
    copy = tmp_path / "clone"
    copy.mkdir()
    clean_copy(copy)
    with running({"API_KEYS": f"guide:{KEY}", "RUNTIME_DOWNLOADS": "0"}, tmp_path / "server.log") as server:
        # what the boxes that need an account set, and the guide's own server
        environ = {
            "API_KEY": KEY, "RUNPOD_REST_URL": rest_url, "TEST_URL": f"{server.url}/",
            "HOME": str(tmp_path), "PATH": os.environ["PATH"],
        }  # fmt: skip
        text = "".join(body for _, mark, body in BOXES if mark == "run").replace("http://localhost:8000", server.url)
        out = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=copy, env=environ, capture_output=True, text=True, check=False
        )
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    assert [path for path, _ in handler.made] == ["/templates", "/pods", "/templates", "/endpoints"]
    assert [body.get("isServerless") for _, body in handler.made] == [False, None, True, None]
    for name in ("first.png", "second.png", "tests/output/txt2img.png"):
        assert Image.open(copy / name).size == (64, 64)
    assert '"inQueue":0' in out.stdout.replace(" ", "")
    assert out.stdout.count("1 of 1 passed") == 4
    assert "401" in out.stdout.splitlines(), "the pod was open to everybody"
