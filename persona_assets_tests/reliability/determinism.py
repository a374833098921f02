"""Makes a study twice from scratch, in two folders, and compares all that landed.

Run ids and times aside, everything has to be equal: adapters, outcomes, estimates and report.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from persona_assets.store import Ref
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.project import Project
from persona_assets_tests.reliability.content import content_of
from persona_assets_tests.reliability.table import Row

#: What each row of the table compares.
KINDS = {
    "adapters": ("prior_checkpoint", "checkpoint"),
    "outcomes": (
        *("baseline_outcomes", "cell_outcomes", "prior_accuracies", "cell_diagnostics"),
        "forced_rationales",
    ),
    "estimates": (
        *("contrast_estimate", "multiplicity", "loss_matrix", "exploratory_estimates"),
        *("vocabulary_leakage", "number_ledger", "warehouse"),
    ),
    "report": ("forest_plot", "loss_heatmap", "report"),
    "inputs": ("tokenizer", "question_bank", "base_model", "rationales", "training_dataset"),
}
#: How many processes share the work, in turn: what runs beside and before a cell changes nothing.
_WORKERS = (2, 3)


def rows(folder: Path, seed: int) -> list[Row]:
    """The mini study, twice; its own seeds decide what is made, ``seed`` nothing."""
    made = []
    for i, workers in enumerate(_WORKERS):
        project = Project(folder / str(i), "mini")
        (project.data / "studies").mkdir(parents=True)
        shutil.copy(PROJECT / "data" / "studies" / "mini.yaml", project.data / "studies")
        done = project.run("run", "--study", "mini", "--workers", str(workers), timeout=7200)
        if done.returncode:
            raise RuntimeError(f"the study was not made:\n{done.stdout[-4000:]}{done.stderr}")
        made.append(project)
    return compared(*made)


def compared(ours: Project, theirs: Project) -> list[Row]:
    """A row a kind: partitions that both projects were to have landed, and those that differ."""
    found = {
        kind: Row(
            f"the study made again from scratch: {kind}",
            recovered_by="nothing to recover: equal to the last bit, run ids and times aside",
        )
        for kind in KINDS
    }
    kinds = {asset: kind for kind, assets in KINDS.items() for asset in assets}
    for ref in ours.graph.refs:
        if ours.graph.assets[ref.asset].group != "publish":  # `run` makes none of those
            found[kinds[ref.asset]].count(difference(ours, theirs, ref))
    return list(found.values())


def difference(ours: Project, theirs: Project, ref: Ref) -> str | None:
    """In which file a partition differs between two projects, and how; None if it does not."""
    mine, yours = (project.store.manifest(ref) for project in (ours, theirs))
    if mine is None or yours is None:
        return f"{ref} has not landed twice"
    if mine.files.keys() != yours.files.keys():
        return f"{ref} has the files {sorted(mine.files)} and {sorted(yours.files)}"
    for name in mine.files:
        a, b = (content_of(project.store.path(ref, name)) for project in (ours, theirs))
        if a != b:
            parts = [part for part in a.keys() | b.keys() if a.get(part) != b.get(part)]
            return f"{ref}: {name} differs in {', '.join(sorted(parts))}"
    return None
