"""The tiny study of the integration tests, a Postgres server and an S3-protocol server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from persona_assets_tests.integration.conftest import project
from persona_assets_tests.object_storage import ObjectStorage, forget_servers, object_storage
from persona_assets_tests.scale.postgres import BINARIES, Postgres

__all__ = ["project"]


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """A server that holds nothing."""
    if BINARIES is None:
        pytest.skip("no Postgres here: Debian has it in the package postgresql")
    with Postgres() as server:
        yield server


@pytest.fixture
def storage(monkeypatch) -> Iterator[ObjectStorage]:
    """An S3-protocol server with an empty bucket, and this process's way to it."""
    with object_storage() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        forget_servers()
        yield server
        forget_servers()
