"""The Postman collection and the .http file hold every request of the description, and each of them works as it is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.played import playing
from tests.running import ROOT, running

POSTMAN, HTTP = ROOT / "deploy" / "postman.json", ROOT / "deploy" / "requests.http"
NOT_NOW = {"previews", "retry", "webhooks"}
"""A job that went well has no previews any more, is not run again, and no webhook of it failed."""
NEWMAN = "newman@6.2.2"
KEY = "a-key-of-these-requests-alone"


def test_they_are_made_from_the_description() -> None:
    made = [sys.executable, ROOT / "scripts" / "make-clients", "--check"]
    check = subprocess.run(made, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr[-500:]


class Reader:
    """Sends what a .http file holds, as editors do.

    Args:
        text: the file.
        client: with the address of a server.
    """

    def __init__(self, text: str, client: httpx.Client) -> None:
        self.head, *self.blocks = re.split(r"^### .*\n", text, flags=re.M)
        self.client = client
        self.variables = dict(re.findall(r"^@(\w+) = (.*)$", self.head, re.M))
        self.variables["baseUrl"] = str(client.base_url).rstrip("/")
        self.answers: dict[str, httpx.Response] = {}

    def send(self) -> Iterator[httpx.Response]:
        for block in self.blocks:
            named = re.match(r"# @name (\w+)\n", block)
            head, _, body = block[named.end() if named else 0 :].partition("\n\n")
            first, *headers = head.strip().splitlines()
            method, url = self.filled(first).split(" ")
            said = dict(self.filled(line).split(": ", 1) for line in headers)
            answer = self.client.request(method, url, headers=said, content=self.filled(body).strip())
            if named:
                self.answers[named[1]] = answer
            yield answer

    def filled(self, text: str) -> str:
        return re.sub(r"\{\{([^}]+)\}\}", lambda found: self.value(found[1]), text)

    def value(self, name: str) -> str:
        if name in self.variables:
            return self.variables[name]
        request, _, path = name.partition(".response.body.$.")
        return str(self.answers[request].json()[path])


def test_requests_of_the_http_file_work_one_after_the_other(tmp_path: Path) -> None:
    with playing(tmp_path, API_KEYS=f"editor:{KEY}") as site:
        reader = Reader(HTTP.read_text(), site.client)
        reader.variables["apiKey"] = KEY
        answers = list(reader.send())
        described = site.client.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()["paths"]
    assert_good((f"{a.request.method} {a.request.url.path}", a.status_code) for a in answers)
    operations = [o for methods in described.values() for method, o in methods.items() if method != "head"]
    assert len(answers) >= sum(not operation.get("deprecated") for operation in operations)


def assert_good(told: Iterator[tuple[str, int]]) -> None:
    wrong = {request: status for request, status in told if status >= 400 and not NOT_NOW & {*request.split("/")}}
    assert wrong == {}


def items(folder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for item in folder["item"]:
        yield from items(item) if "item" in item else [item]


def test_the_collection_is_whole() -> None:
    collection = json.loads(POSTMAN.read_text())
    assert collection["info"]["schema"].endswith("/v2.1.0/collection.json")
    known = {variable["key"] for variable in collection["variable"]}
    assert set(re.findall(r"\{\{(\w+)\}\}", POSTMAN.read_text())) == known
    assert collection["auth"]["type"] == "bearer"
    found = list(items(collection))
    for folder in collection["item"]:
        assert len({item["name"] for item in folder["item"]}) == len(folder["item"])
    for item in found:
        url = item["request"]["url"]
        assert url["raw"] == "/".join([*url["host"], *url["path"]])
        assert {part[1:] for part in url["path"] if part.startswith(":")} == {v["key"] for v in url.get("variable", [])}
        if "body" in item["request"]:
            assert json.loads(item["request"]["body"]["raw"])
    sent = HTTP.read_text()
    assert len(found) == sent.count("\n### ")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("npx"), reason="needs Node.js")
def test_postmans_own_runner_sends_the_collection(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    environ = {"MODELS_DIR": str(tmp_path), "RUNTIME_DOWNLOADS": "0", "API_KEYS": f"postman:{KEY}"}
    with running(environ, tmp_path / "server.log") as server:
        command = [
            "npx", "--yes", NEWMAN, "run", POSTMAN, "--env-var", f"baseUrl={server.url}",
            "--env-var", f"apiKey={KEY}",
            "--reporters", "json", "--reporter-json-export", report,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert report.is_file(), done.stderr[-2000:]
    run = json.loads(report.read_text())["run"]
    assert run["failures"] == []
    assert run["stats"]["requests"] == {"total": len(run["executions"]), "pending": 0, "failed": 0}
    assert_good((path_of(one["request"]), one["response"]["code"]) for one in run["executions"])
    assert len(run["executions"]) == len(list(items(json.loads(POSTMAN.read_text()))))


def path_of(request: dict[str, Any]) -> str:
    return request["method"] + " /" + "/".join(request["url"]["path"])
