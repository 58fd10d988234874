"""A static file server on 127.0.0.1 with ranges, ETags and faults; it can also stand before another server.

Sources: RFC 9110 §14 (ranges), §8.8.3 (ETag), §13.1.1 (If-Match), §13.1.5 (If-Range).
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub import Fault, QuietServer

_BLOCK = 2**14


class Site:
    """Serves what is put into it, or what another server says.

    Args:
        upstream: ``host:port`` of a server that every request is passed on to.
        digests: tell the MD5 of each file (``Content-MD5``), as some servers do.
    """

    def __init__(self, upstream: str | None = None, *, digests: bool = False) -> None:
        self.upstream, self.digests = upstream, digests
        self.files: dict[str, bytes] = {}
        self.users: dict[str, str] = {}
        """Path to the ``user:password`` that it takes."""
        self.redirects: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"site": self})
        self._server = QuietServer(("127.0.0.1", 0), handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Site:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, path: str, content: bytes) -> str:
        """Serve this from now on; its address."""
        with self.lock:
            self.files[path] = content
        return self.url + path

    def fault(self, path: str, kind: str, **more: Any) -> None:
        """Let something go wrong from now on; see ``tests.hub.Fault``."""
        with self.lock:
            self.faults.append(Fault(path, kind, **more))

    def forget(self) -> None:
        """Start counting anew, without faults."""
        with self.lock:
            self.log.clear()
            self.sent.clear()
            self.faults.clear()

    def gets(self, path: str) -> int:
        """How often a path was read."""
        with self.lock:
            return sum(entry == ("GET", path) for entry in self.log)


class _Handler(BaseHTTPRequestHandler):
    site: Site
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.site.lock:
            self.site.log.append((self.command, path))
            match = (
                f for f in self.site.faults if f.times > 0 and f.method == self.command and re.search(f.path, path)
            )
            self.fault = next(match, None)
            if self.fault:
                self.fault.times -= 1
        if self.fault and self.fault.kind == "stall":
            time.sleep(self.fault.seconds)
            self.close_connection = True
        elif self.fault and self.fault.kind == "status":
            self._passed_on_length()
            self._send(self.fault.status, self.fault.headers, self.fault.body, path)
        elif self.site.upstream:
            self._pass_on(path)
        else:
            self._file(path)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _passed_on_length(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _pass_on(self, path: str) -> None:
        body = self._passed_on_length()
        connection = http.client.HTTPConnection(str(self.site.upstream))
        headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        # a digest beside a flipped byte would be that of the right one: leave it, it is the source's word
        drop = ("connection", "transfer-encoding", "date", "server")
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in drop}
        ranged = re.match(r"bytes (\d+)-", kept.get("Content-Range", ""))
        self._send(answer.status, kept, content, path, int(ranged[1]) if ranged else 0)

    def _file(self, path: str) -> None:
        site = self.site
        if path in site.redirects:
            self._send(302, {"Location": site.redirects[path]}, b"", path)
            return
        if path in site.users:
            wanted = "Basic " + base64.b64encode(site.users[path].encode()).decode()
            if self.headers.get("authorization") != wanted:
                self._send(401, {"WWW-Authenticate": "Basic"}, b"who are you", path)
                return
        with site.lock:
            content = site.files.get(path)
        if content is None:
            self._send(404, {}, b"not here", path)
            return
        md5 = hashlib.md5(content, usedforsecurity=False).digest()
        headers = {"ETag": f'"{md5.hex()}"', "Accept-Ranges": "bytes"}
        if site.digests:
            headers["Content-MD5"] = base64.b64encode(md5).decode()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if asked and self.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
            begin, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            if begin >= len(content):
                self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"", path)
                return
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            self._send(206, headers, content[begin : end + 1], path, begin)
            return
        self._send(200, headers, content, path)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes, path: str, begin: int = 0) -> None:
        fault = self.fault if self.fault and status < 300 else None
        until = len(body)
        if fault and fault.kind in ("cut", "short"):
            until = max(0, min(fault.at - begin, len(body)))
        if fault and fault.kind == "wrong" and begin <= fault.at < begin + len(body):
            at = fault.at - begin
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        length = until if fault and fault.kind == "short" else len(body)
        told = {k: v for k, v in headers.items() if k.lower() != "content-length"}
        length_of_head = next((v for k, v in headers.items() if k.lower() == "content-length"), str(length))
        self.send_response(status)
        for name, value in told.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length_of_head if self.command == "HEAD" else str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for start in range(0, until, _BLOCK):
                if fault and fault.kind == "slow":
                    time.sleep(fault.seconds)
                piece = body[start : min(start + _BLOCK, until)]
                self.wfile.write(piece)
                with self.site.lock:
                    self.site.sent[path] += len(piece)
            self.wfile.flush()
        except OSError:
            self.close_connection = True
        if until < length:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
