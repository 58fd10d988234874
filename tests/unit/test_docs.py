"""The documents say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from api.errors import CODES
from api.http.app import build_app
from api.service.options import KNOWN, OPTIONS, check_options
from api.service.service import Service
from api.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def test_errors_are_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.+) \|$", (ROOT / "docs" / "errors.md").read_text(), re.M)
    assert {code: (int(status), meaning) for code, status, meaning in rows} == CODES


def test_every_error_code_is_raised_somewhere() -> None:
    sources = "\n".join(p.read_text() for p in (ROOT / "api").rglob("*.py") if p.name != "errors.py")
    sources += (ROOT / "api" / "http" / "errors.py").read_text()
    assert [code for code in CODES if f'"{code}"' not in sources] == []


def test_the_readme_lists_call_inputs_that_there_are() -> None:
    table = (ROOT / "README.md").read_text().split("`callInputs`, of which")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.M)) <= set(KNOWN)


def test_what_a_request_can_say_is_documented() -> None:
    made = [sys.executable, ROOT / "scripts" / "make-docs", "--check"]
    check = subprocess.run(made, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr[-300:] + " run scripts/make-docs"


def test_every_example_is_a_value() -> None:
    for name, option in OPTIONS.items():
        assert check_options({name: option.example}) != {}, name


def test_every_route_is_listed() -> None:
    app = build_app(Service(Settings.from_env({})), "docs-test")
    routes = [(re.sub(r"<(\w+)(:\w+)?>", r"{\1}", "/" + route.path), route.methods) for route in app.router.routes]
    served = {f"{method} {path}" for path, methods in routes for method in methods - {"HEAD", "OPTIONS"}}
    told = re.findall(
        r"`((?:GET|POST|PUT|DELETE) /[\w/{}.]*)`", (ROOT / "README.md").read_text().split("## Other routes")[1]
    )
    as_runpod = {route for route in served if re.match(r"\w+ /v[12]/\{endpoint\}/", route)}
    assert served - as_runpod - {"POST /"} == set(told)
    table = (
        (ROOT / "docs" / "jobs.md")
        .read_text()
        .split("| --- |")[1]
        .split("\n\n")[0]
        .replace("`GET`, `POST", "`GET|POST")
    )
    cells = re.findall(r"`((?:GET|POST|PUT)(?:\|POST)?) /v2(/[\w/{}-]*)`", table)
    rows = {f"{method} {path}" for methods, path in cells for method in methods.split("|")}
    for version in ("v1", "v2"):
        assert {route.replace(f"/{version}/", "/") for route in as_runpod if f" /{version}/" in route} == rows


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
