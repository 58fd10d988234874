"""The import rule of docs/architecture.md: dependencies point downward only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# room -> rooms of ours that it may import, besides itself
ALLOWED = {
    "__init__": set(),
    "__main__": {"cli"},
    "cli": {"http", "serverless", "service", "models", "schema", "settings", "errors", "logs", "__init__"},
    "http": {"service", "models", "schema", "settings", "errors", "__init__"},
    "serverless": {"service", "schema", "settings", "errors"},
    "service": {"models", "schema", "settings", "errors", "order"},
    "models": {"schema", "settings", "errors"},
    "worker": {"engine", "schema", "settings", "errors", "logs"},
    "engine": {"models", "schema", "settings", "errors", "order"},
    "schema": set(),
    "settings": set(),
    "errors": set(),
    "order": set(),
    "logs": set(),
}
HEAVY = {"torch", "diffusers", "transformers"}
LIGHT_ROOMS = {"cli", "http", "serverless", "service", "models", "schema", "settings", "errors", "order", "logs"}


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT / "api").parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


FILES = sorted((ROOT / "api").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "api" and len(parts) > 1:
            target = "__init__" if parts[1].startswith("__") else parts[1]
            assert target == room or target in ALLOWED[room], f"{room} must not import {name}"
        if parts[0] in HEAVY:
            assert room not in LIGHT_ROOMS, f"{room} must not import {name}"
        if parts[0] == "sanic":
            assert room == "http" or path.name == "serve.py", f"{room} must not import {name}"


def test_serving_imports_nothing_heavy() -> None:
    """Directly or through others: the whole HTTP side in a fresh interpreter."""
    code = (
        "import sys, api.cli.serve, api.cli.download, api.cli.models, api.http.app, api.service.service;"
        "import api.service.pictures, api.serverless.run, api.serverless.handler, runpod;"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_rule_covers_every_room() -> None:
    assert {room_of(path) for path in FILES} == set(ALLOWED)


def test_the_commands_for_models_need_no_server() -> None:
    """The image's bake step has neither http nor service, so that their changes do not fetch the model again."""
    for path in (ROOT / "api" / "cli").glob("*.py"):
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("api.")}
        runs = path.name in ("serve.py", "runpod.py")
        assert runs or not rooms & {"http", "serverless", "service", "worker"}, path
