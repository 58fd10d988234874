"""nginx on 127.0.0.1 with a configuration of its own: a server of files that is not the bottleneck."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from scripts.benchmarks.serving import free_port, wait_for

_CONFIG = """
daemon off;
worker_processes 2;
pid {home}/nginx.pid;
error_log stderr error;
events {{ worker_connections 256; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path {home}/tmp;
    proxy_temp_path {home}/tmp;
    fastcgi_temp_path {home}/tmp;
    uwsgi_temp_path {home}/tmp;
    scgi_temp_path {home}/tmp;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def program() -> str | None:
    """Where nginx is; Debian keeps it out of the PATH of users."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin")


@contextlib.contextmanager
def nginx(root: Path, home: Path, ready: str) -> Iterator[int]:
    """The port that serves the files below ``root``. ``home`` is for its own files, ``ready`` one that is there."""
    port = free_port()
    # its workers may run as another user
    for folder in (root, home):
        folder.chmod(0o755)
    config = home / "nginx.conf"
    config.write_text(_CONFIG.format(home=home, root=root, port=port), encoding="utf-8")
    process = subprocess.Popen([program() or "nginx", "-p", str(home), "-c", str(config), "-e", "stderr"])
    try:
        wait_for(port, ready, 10)
        yield port
    finally:
        process.terminate()
        process.wait(10)
