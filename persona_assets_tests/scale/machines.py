"""Machines that share nothing but an object store: a data folder each, and Dagster's own in it."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from persona_assets.object_store import ObjectStore
from persona_assets.store import Ref, Store
from persona_assets_tests.integration.project import Project
from persona_assets_tests.object_storage import URL, ObjectStorage


@dataclass(frozen=True)
class Machine(Project):
    """A project whose store is on object storage."""

    storage: ObjectStorage | None = None

    @property
    def store(self) -> Store:
        """The store as this machine sees it; the environment must lead to it."""
        return ObjectStore(URL, self.data / "mirror-of-the-test", self.name)

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | self.storage.environment


def machine(data: Path, study: str, storage: ObjectStorage) -> Machine:
    """A machine that has a study file and nothing else."""
    (data / "studies").mkdir(parents=True)
    (data / "studies" / "tiny.yaml").write_text(study, "utf-8")
    return Machine(data, "tiny", storage)


def upload(project: Project, storage: ObjectStorage, but: Collection[Ref] = ()) -> None:
    """Put what has landed in a folder where a store on object storage looks for it.

    Args:
        but: Partitions that are left out.
    """
    kept_back = [project.store.folder(ref) for ref in but]
    for folder, _, names in os.walk(project.store.root):
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and not any(map(path.is_relative_to, kept_back)):
                storage.write(
                    f"{project.name}/{path.relative_to(project.store.root)}", path.read_bytes()
                )
