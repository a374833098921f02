"""A tiny study, run once for all integration tests by the real command line."""

from __future__ import annotations

import fcntl
import os
import shutil

import pytest

from persona_assets_tests.integration.project import Project, make
from persona_assets_tests.integration.webserver import Webserver

#: Secrets that the environment of the run holds: nothing that it makes or says may hold any.
CANARIES = {
    name: f"canary-{name.lower()}-{'5e1f0c9a77' * 4}"  # as long as a key of W&B has to be
    for name in ("HF_TOKEN", "CHAT_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
}


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    """The tiny study, complete. Tests that change it take a copy.

    Several test processes share one: the first that asks makes it, the others wait.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own in it
    project, made = Project(root / "project" / "data"), root / "project" / "made"
    with (root / "project.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(project.data, ignore_errors=True)
            make(project, **CANARIES)
            made.touch()
    return project


@pytest.fixture
def own_project(project, tmp_path) -> Project:
    """A copy of the complete tiny study that a test may change."""
    return project.copy(tmp_path / "data")


@pytest.fixture
def webserver(own_project):
    """``dagster dev`` on the test's own copy."""
    with Webserver(own_project) as server:
        yield server
