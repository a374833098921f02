"""What of a study goes to which repository of the hub, and to which place in it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from persona_assets.hub_client import RepoType
from persona_assets.publishing.hub_card import card
from persona_assets.publishing.hub_upload import STUDY_FOLDER, Repository
from persona_assets.store import Ref, Store
from persona_assets.study import Cell, Study
from persona_assets.study_schema import LocalRegistry

#: The repositories of a study, by kind.
KINDS: tuple[RepoType, ...] = ("dataset", "model")

#: The paths in a repository that are a study's alone.
_OWN = {
    "dataset": re.compile(r"(training_dataset|report)/.+"),
    "model": re.compile(r"[a-z]\w*\.[a-z]\w*\.\d+/.+", re.ASCII),
}


def made_here(study: Study) -> tuple[Cell, ...]:
    """The cells whose adapters are the study's own: trained here, or in its prior study.

    Those of another experiment stay where they are, at the commit that the study file pins.
    """
    local = isinstance(study.carry_over, LocalRegistry)
    return tuple(cell for cell in study.cells if cell.origin == "trained" or local)


def held(study: Study, kind: RepoType) -> tuple[Ref, ...]:
    """The partitions whose files a repository holds."""
    if kind == "model":
        return tuple(Ref("checkpoint", cell.key) for cell in made_here(study))
    datasets = (Ref("training_dataset", cell.key) for cell in study.cells)
    return (Ref("question_bank"), *datasets, Ref("warehouse"), Ref("report"))


def repository(study: Study, kind: RepoType) -> Repository:
    """The repository that the study file names for that kind."""
    hub = study.publish.hub
    assert hub is not None, "there is no upload without `publish.hub`"
    return Repository(getattr(hub, kind), kind, hub.private, _OWN[kind])


def content(study: Study, store: Store, kind: RepoType) -> dict[str, Path | bytes]:
    """What a repository holds, by path there: landed files, the study's definition, the card.

    It depends on nothing but the study file and what has landed: no run id and no time is in it
    that the landed files do not hold.

    Raises:
        StoreError: a partition has not landed, or a file of it is missing or damaged.
    """
    files: dict[str, Path | bytes] = {}
    landed = {ref: store.landed(ref) for ref in held(study, kind)}
    for ref, manifest in landed.items():
        folder = store.directory(ref)
        files |= {_place(ref, name): folder / name for name in manifest.files}
    definition = yaml.safe_dump(study.content, sort_keys=False, allow_unicode=True, width=100)
    files[f"{STUDY_FOLDER}{study.name}.yaml"] = definition.encode()
    files["README.md"] = card(study, kind, landed).encode()
    return files


def _place(ref: Ref, name: str) -> str:
    """The path in the repository of a partition's file."""
    match ref.asset:
        case "checkpoint":
            return f"{ref.key}/{name}"  # FOLDER, in the study file of who imports it
        case "training_dataset":
            return f"training_dataset/{ref.key}.parquet"
        case "report":
            return f"report/{name}"
    return name
