"""Fixtures: a real S3 server in its own process, and no credentials but those of the tests."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator

import botocore.session
import pytest

from api.models import s3_client
from tests.s3 import Store
from tests.sources import moto


@pytest.fixture
def only_our_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)


@pytest.fixture(scope="module")
def one_loader() -> Iterator[None]:
    """Reads the description of S3 once: most of the time a client takes to be made, and we make hundreds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))
        yield


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto() as address:
        yield f"http://{address}"


@pytest.fixture
def store(endpoint: str, only_our_credentials: None, one_loader: None, request: pytest.FixtureRequest) -> Store:
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    return Store(endpoint, f"bucket-{name}")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "_ATTEMPTS", 1)
    monkeypatch.setattr(s3_client, "_READ_TIMEOUT", 0.5)
