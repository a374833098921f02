"""The tiny study of the integration tests, a Postgres server and a Ray cluster of two nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from persona_assets_tests.integration.conftest import project
from persona_assets_tests.scale.postgres import BINARIES, Postgres

__all__ = ["project"]


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """A server that holds nothing."""
    if BINARIES is None:
        pytest.skip("no Postgres here: Debian has it in the package postgresql")
    with Postgres() as server:
        yield server
