"""Fixtures for all tests: study files of the project, and real data where a folder names it."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

from persona_assets import environment
from persona_assets.study import Study, load_study

PROJECT = Path(__file__).resolve().parents[1]

# Two workers share the processors (`make test`): torch's own threads would only get in their way.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Integration tests last but for a first file: it makes the study that all of them share.

    Another worker runs the other tests meanwhile, instead of waiting for it.
    """
    integration = [item for item in items if "integration" in item.path.parts]
    if integration:
        first = integration[0].path
        items.sort(key=lambda item: (item.path != first, "integration" in item.path.parts))


# Time limits of single examples say how busy the machine is, not whether the code is right.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="session")
def study_texts() -> dict[str, str]:
    """The text of each study file of the project, by name."""
    return {p.stem: p.read_text("utf-8") for p in (PROJECT / "data" / "studies").glob("*.yaml")}


@pytest.fixture(scope="session")
def mini() -> Study:
    return load_study(PROJECT / "data" / "studies" / "mini.yaml")


@pytest.fixture(scope="session")
def length_matched() -> Study:
    return load_study(PROJECT / "data" / "studies" / "length_matched.yaml")


def _real_data(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set: no real data here")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def arc_dir() -> Path:
    """The folder with the published ARC-Challenge files."""
    return _real_data(environment.ARC_DIR)


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    """The folder of the Qwen2.5 tokenizer."""
    return _real_data(environment.TOKENIZER_DIR)
