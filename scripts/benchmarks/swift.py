"""OpenStack Swift with its S3 interface, on 127.0.0.1, one copy of everything.

Sources: Swift's "SAIO" guide and the sample configurations of the Debian packages.
"""

from __future__ import annotations

import contextlib
import getpass
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.benchmarks.serving import free_port, wait_for

PACKAGES = "swift-proxy swift-account swift-container swift-object memcached"
_PROGRAMS = (
    *(f"swift-{name}" for name in ("proxy-server", "account-server", "container-server", "object-server")),
    "swift-ring-builder",
    "memcached",
)
_STORAGE = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {home}
devices = {home}/devices
mount_check = false
workers = 1
user = {user}
[pipeline:main]
pipeline = healthcheck {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
[filter:healthcheck]
use = egg:swift#healthcheck
"""
_PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {home}
workers = 2
user = {user}
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:s3api]
use = egg:swift#s3api
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


class Store:
    """An S3 endpoint with one user."""

    keys = ("test:tester", "testing")

    def __init__(self, port: int) -> None:
        import boto3
        from botocore.config import Config

        self._client: Any = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id=self.keys[0],
            aws_secret_access_key=self.keys[1],
            # Swift 2.30 knows none of the checksums that newer clients send on their own
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
            ),
        )

    def put(self, bucket: str, key: str, file: Path) -> None:
        """Upload a file in one part."""
        self._client.create_bucket(Bucket=bucket)
        with file.open("rb") as body:
            self._client.put_object(Bucket=bucket, Key=key, Body=body)

    def url(self, bucket: str, key: str) -> str:
        """A signed URL for a GET."""
        signed: str = self._client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
        return signed


def missing() -> str:
    """What to do before ``serving`` works; empty where it does."""
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent or not Path("/etc/swift/swift.conf").exists():
        return f"it is not installed: apt-get install --no-install-recommends {PACKAGES}"
    return ""


def _ring(home: Path, kind: str, port: int) -> None:
    builder = str(home / f"{kind}.builder")
    for step in (("create", "1", "1", "1"), ("add", f"r1z1-127.0.0.1:{port}/d1", "1"), ("rebalance",)):
        subprocess.run(["swift-ring-builder", builder, *step], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def serving(home: Path) -> Iterator[Store]:
    """A store whose files are below ``home``."""
    (home / "devices" / "d1").mkdir(parents=True)
    user = getpass.getuser()
    memcached, proxy = free_port(), free_port()
    ports = []
    commands = [["memcached", "-l", "127.0.0.1", "-p", str(memcached), "-u", user]]
    for kind in ("account", "container", "object"):
        ports.append(port := free_port())
        _ring(home, kind, port)
        config = home / f"{kind}.conf"
        config.write_text(_STORAGE.format(port=port, home=home, user=user, kind=kind), encoding="utf-8")
        commands.append([f"swift-{kind}-server", str(config)])
    config = home / "proxy.conf"
    config.write_text(_PROXY.format(port=proxy, home=home, user=user, memcached=memcached), encoding="utf-8")
    commands.append(["swift-proxy-server", str(config)])
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((home / "log").open("wb"))
        for command in commands:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        for port in (*ports, proxy):
            wait_for(port, "/healthcheck", 60)
        yield Store(proxy)
