"""Fixtures for all tests: study files of the project, and real data where a folder names it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import hypothesis
import pytest

from persona_assets import environment
from persona_assets.store import Store
from persona_assets.study import Study, load_study

PROJECT = Path(__file__).resolve().parents[1]

# Several workers share the processors (`make test`): torch's own threads would be in their way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: The file of integration tests that begins, and with it the making of the tiny study.
_FIRST = "test_dagster.py"
#: Others of integration, reliability and scale tests that take long, the longest first.
_LONG = (
    "test_tour.py",
    "test_real_input.py",
    "test_disk.py",
    "test_sample.py",
    "test_longrun.py",
    "test_hub_checkpoints.py",
    "test_concurrency.py",
    "test_spine.py",
    "test_corruption.py",
    "test_publish_wandb.py",
    "test_docs.py",
    "test_hub_round_trip.py",
    "test_kills.py",
    "test_determinism.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Integration tests last, the long files before the short ones, but for a first file.

    That makes the study that all of them share. Other workers run the other tests meanwhile,
    instead of waiting for it; and no worker begins a long file when the others have ended.
    """

    def place(item: pytest.Item) -> int:
        if not {"integration", "reliability", "scale"}.intersection(item.path.parts):
            return 1
        if item.path.name == _FIRST:
            return 0
        return 2 + (_LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))

    items.sort(key=place)


#: Databases and the store sync what they write, some ten thousand times: in memory that is free.
#: Temporary folders are there if they find room, and may hold programs.
_MEMORY, _ROOM = Path("/dev/shm"), 6 << 30
if (
    os.access(_MEMORY, os.W_OK)
    and shutil.disk_usage(_MEMORY).free > _ROOM
    and not os.statvfs(_MEMORY).f_flag & os.ST_NOEXEC
):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

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


@pytest.fixture(scope="session")
def mini_store(tmp_path_factory) -> Store:
    """The mini study, landed as far as the store can tell; who changes it takes a copy."""
    from persona_assets_tests.landed import MINI, land_everything

    store = Store(tmp_path_factory.mktemp("landed"), "mini")
    land_everything(MINI, store)
    return store


@pytest.fixture
def own_mini_store(mini_store, tmp_path) -> Store:
    """A copy of it in ``store`` of the test's folder."""
    shutil.copytree(mini_store.root, tmp_path / "store" / "mini")
    return Store(tmp_path / "store", "mini")


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
