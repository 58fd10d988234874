"""A stand-in for the hub, on 127.0.0.1, that speaks its protocol to the real huggingface_hub.

What it answers follows the Hub API (https://huggingface.co/docs/hub/api) and what the library reads from it:
listings with sizes and LFS hashes, commits, refs, redirects of large files to a CDN on another host that
takes no token, ranges, and the ``X-Error-Code`` of each refusal.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".ckpt", ".msgpack", ".onnx", ".png")
"""What a repository keeps in LFS: by name, as ``.gitattributes`` has it."""


@dataclass
class Fault:
    """Something that goes wrong when a path is asked for.

    Attributes:
        path: pattern that is searched in the path of the request.
        kind: ``status``, ``cut`` (the connection ends after ``at`` bytes of the body), ``short`` (the same,
            but with lengths that claim to be right), ``wrong`` (byte ``at`` is another), ``slow``
            (``seconds`` before each block), ``whole`` (``Range`` is not heeded), ``stall`` (``seconds`` before anything).
        times: how often it happens before it is over.
        method: only for this one.
    """

    path: str
    kind: str
    times: int = 10**9
    status: int = 500
    at: int = 0
    seconds: float = 0.0
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Request:
    """One request that was made."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes()
        self.size = len(content)
        self.large = path.suffix in LARGE
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.oid = hashlib.sha1(b"blob %d\0" % self.size + content).hexdigest()  # noqa: S324

    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


class _Commit:
    def __init__(self, folder: Path) -> None:
        self.files = {p.relative_to(folder).as_posix(): _File(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        told = json.dumps({name: file.sha256 for name, file in self.files.items()})
        self.sha = hashlib.sha1(told.encode()).hexdigest()  # noqa: S324


class QuietServer(ThreadingHTTPServer):
    """Says nothing of clients that go away in the middle: here they do so on purpose."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HubStandIn:
    """Serves repositories from folders.

    Args:
        repos: repository id → revision → folder. A revision ``refs/tags/v1`` is the tag ``v1``, any other a branch.
        tokens: token → the gated and private repositories that its account may read.
        gated: repositories whose listing is public and whose files are not.
        private: repositories that do not exist for others.
        sizes: whether listings hold sizes and hashes; some mirrors' do not.
        xet: tell that large files are in a Xet store, which there is none of.
    """

    def __init__(
        self,
        repos: Mapping[str, Mapping[str, Path]],
        *,
        tokens: Mapping[str, Iterable[str]] | None = None,
        gated: Iterable[str] = (),
        private: Iterable[str] = (),
        sizes: bool = True,
        xet: bool = False,
    ) -> None:
        self.repos = {repo: {rev: _Commit(folder) for rev, folder in revs.items()} for repo, revs in repos.items()}
        self.tokens = {token: set(allowed) for token, allowed in (tokens or {}).items()}
        self.gated, self.private, self.sizes, self.xet = set(gated), set(private), sizes, xet
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.sent: Counter[str] = Counter()
        """Bytes of bodies that went out, by path."""
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = QuietServer(("127.0.0.1", 0), handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubStandIn:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def requests(self) -> Counter[str]:
        """How often each path was asked for, as ``METHOD /path``."""
        with self.lock:
            return Counter(f"{r.method} {r.path}" for r in self.log)

    def forget(self) -> None:
        """Start counting anew, without faults."""
        with self.lock:
            self.log.clear()
            self.sent.clear()
            self.faults.clear()

    def fault(self, path: str, kind: str, **more: Any) -> None:
        """Let something go wrong from now on."""
        with self.lock:
            self.faults.append(Fault(path, kind, **more))

    def commit(self, repo: str, revision: str = "main") -> str:
        """The commit of a revision."""
        return self.repos[repo][revision].sha

    def cdn_path(self, repo: str, name: str, revision: str = "main") -> str:
        """Where the bytes of a large file are."""
        return f"/cdn/{self.repos[repo][revision].files[name].sha256}"


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        split = urlsplit(self.path)
        path = unquote(split.path)
        with hub.lock:
            hub.log.append(
                Request(
                    self.command,
                    path,
                    self.headers.get("range"),
                    self.headers.get("authorization"),
                    self.headers.get("host", ""),
                )
            )
            self.fault = next(
                (f for f in hub.faults if f.times > 0 and f.method == self.command and re.search(f.path, path)), None
            )
            if self.fault:
                self.fault.times -= 1
        if self.fault and self.fault.kind == "stall":
            time.sleep(self.fault.seconds)
            self.close_connection = True
            return
        if self.fault and self.fault.kind == "status":
            self._send(self.fault.status, self.fault.body, self.fault.headers)
            return
        if path.startswith("/cdn/"):
            self._cdn(path.removeprefix("/cdn/"))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"), parse_qs(split.query))
        elif "/resolve/" in path:
            self._resolve(path)
        else:
            self._refuse(404, "", "Not Found")

    # -- who may ------------------------------------------------------------------------------------------

    def _allowed(self, repo: str, *, files: bool) -> bool:
        """Whether the request may see this repository; answers it if not."""
        hub = self.hub
        given = self.headers.get("authorization")
        token = given.removeprefix("Bearer ") if given else None
        if token is not None and token not in hub.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return False
        may = repo in hub.tokens.get(token or "", ())
        if repo not in hub.repos or (repo in hub.private and not may):
            # without a token the hub does not tell missing from private
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return False
        if files and repo in hub.gated and not may:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to model {repo} is restricted.")
            return False
        return True

    def _split(self, rest: str) -> tuple[str, list[str]]:
        """A repository id of one or two parts, and what follows it."""
        parts = rest.split("/")
        for count in (2, 1):
            if "/".join(parts[:count]) in self.hub.repos:
                return "/".join(parts[:count]), parts[count:]
        return "/".join(parts[:2]), parts[2:]

    def _commit(self, repo: str, revision: str) -> _Commit | None:
        for name, commit in self.hub.repos[repo].items():
            if revision in (name, name.removeprefix("refs/tags/"), commit.sha):
                return commit
        self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    # -- what there is ------------------------------------------------------------------------------------

    def _api(self, rest: str, query: dict[str, list[str]]) -> None:
        repo, more = self._split(rest)
        if not self._allowed(repo, files=False):
            return
        if more == ["refs"]:
            self._json(self._refs(repo))
        elif not more or more[0] == "revision":
            if commit := self._commit(repo, "/".join(more[1:]) or "main"):
                self._json(self._info(repo, commit, detailed="blobs" in query and self.hub.sizes))
        elif more[0] == "tree":
            if commit := self._commit(repo, more[1]):
                self._json([self._leaf(name, file) for name, file in commit.files.items()])
        else:
            self._refuse(404, "", "Not Found")

    def _refs(self, repo: str) -> dict[str, Any]:
        refs: dict[str, Any] = {"branches": [], "tags": [], "converts": []}
        for name, commit in self.hub.repos[repo].items():
            kind = "tags" if name.startswith("refs/tags/") else "branches"
            short = name.removeprefix("refs/tags/")
            ref = f"refs/{'tags' if kind == 'tags' else 'heads'}/{short}"
            refs[kind].append({"name": short, "ref": ref, "targetCommit": commit.sha})
        return refs

    def _info(self, repo: str, commit: _Commit, *, detailed: bool) -> dict[str, Any]:
        siblings = []
        for name, file in commit.files.items():
            sibling: dict[str, Any] = {"rfilename": name}
            if detailed:
                sibling |= {"size": file.size, "blobId": file.oid}
                if file.large:
                    sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
            siblings.append(sibling)
        return {
            "_id": "0" * 24,
            "id": repo,
            "modelId": repo,
            "sha": commit.sha,
            "private": repo in self.hub.private,
            "gated": "auto" if repo in self.hub.gated else False,
            "disabled": False,
            "tags": ["diffusers"],
            "siblings": siblings,
        }

    def _leaf(self, name: str, file: _File) -> dict[str, Any]:
        leaf: dict[str, Any] = {"type": "file", "path": name, "size": file.size, "oid": file.oid}
        if file.large:
            leaf["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        return leaf

    def _resolve(self, path: str) -> None:
        before, _, after = path.removeprefix("/").removeprefix("datasets/").partition("/resolve/")
        repo, _ = self._split(before)
        revision, _, name = after.partition("/")
        if not self._allowed(repo, files=True) or not (commit := self._commit(repo, revision)):
            return
        headers = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(name)
        if file is None:
            self._refuse(404, "EntryNotFound", "Entry not found", headers)
            return
        headers |= {"ETag": f'"{file.etag()}"'}
        if not file.large:
            self._content(file, path, headers)
            return
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if self.hub.xet:
            route = f"{self.hub.url}/api/models/{repo}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": "0" * 64, "Link": f'<{route}>; rel="xet-auth"'}
        # by another name it is another host: a client must leave its token behind
        location = f"http://localhost:{self.hub.port}/cdn/{file.sha256}?signature=signed-and-secret"
        self._send(302, b"", {**headers, "Location": location})

    def _cdn(self, sha256: str) -> None:
        if "authorization" in self.headers:
            self._refuse(400, "", "Only one auth mechanism allowed")
            return
        for revisions in self.hub.repos.values():
            for commit in revisions.values():
                for file in commit.files.values():
                    if file.sha256 == sha256:
                        self._content(file, f"/cdn/{sha256}", {"ETag": f'"{file.sha256}"'})
                        return
        self._refuse(404, "", "NoSuchKey")

    # -- how it is sent -----------------------------------------------------------------------------------

    def _content(self, file: _File, path: str, headers: dict[str, str]) -> None:
        content = file.path.read_bytes()
        status = 200
        begin = 0
        asked = self.headers.get("range")
        if self.fault and self.fault.kind == "whole":
            asked = None
        if asked and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", asked)):
            begin, end = int(match[1]), min(int(match[2] or file.size), file.size - 1)
            if begin >= file.size:
                self._send(416, b"", {"Content-Range": f"bytes */{file.size}"})
                return
            status = 206
            headers |= {"Content-Range": f"bytes {begin}-{end}/{file.size}"}
            content = content[begin : end + 1]
        self._send(status, content, {**headers, "Accept-Ranges": "bytes"}, count=path, begin=begin)

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], count: str | None = None, begin: int = 0
    ) -> None:
        fault = self.fault if self.fault and self.fault.kind != "status" else None
        until = len(body)
        if fault and fault.kind in ("cut", "short"):
            until = max(0, min(fault.at - begin, len(body)))
        length = until if fault and fault.kind == "short" else len(body)
        if fault and fault.kind == "wrong" and begin <= fault.at < begin + len(body):
            at = fault.at - begin
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        block = 2**14 if fault and fault.kind == "slow" else 2**16
        try:
            for start in range(0, until, block):
                if fault and fault.kind == "slow":
                    time.sleep(fault.seconds)
                piece = body[start : min(start + block, until)]
                self.wfile.write(piece)
                if count:
                    with self.hub.lock:
                        self.hub.sent[count] += len(piece)
        except OSError:
            self.close_connection = True
        if until < length:
            self.close_connection = True

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {"Content-Type": "application/json", **told})
