"""Fixtures of the rationale tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona_assets.rationales.replies import Replies
from persona_assets_tests.rationales.chat import CANARY


@pytest.fixture
def replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replies:
    """An empty store of replies, in an environment that has the key that goes with it."""
    monkeypatch.setenv("TEST_CHAT_API_KEY", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Replies(tmp_path / "replies.sqlite")
