"""What goes to Weights & Biases: a cell as a run, a bundle as an artifact. Plain data, no client.

A record's data version is of what it says, not of which Dagster run said it: what is made again
with the same content is no new version.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.graph import Graph
from persona_assets.hashing import as_json, sha256_json
from persona_assets.stats.losses import AXES, Answers, axis_size
from persona_assets.store import Manifest, Ref, Store
from persona_assets.study import Cell

_ACCURACY_COLUMNS = ["persona", "scaffold", "question_id", "is_correct"]
#: The files of a cell's own artifact: what is small. Its rows and its adapter are in a bundle.
_CELL_FILES = {"checkpoint": ("training_log.json",), "cell_diagnostics": None}
#: The checkpoint files that are published: an adapter's, never a whole model's.
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "training_log.json")


@dataclass(frozen=True)
class Record:
    """One W&B run and the one artifact that it logs.

    Attributes:
        name: The run's name; unique for each kind of run of a study.
        group: The run's group.
        job_type: ``cell`` or ``bundle``.
        tags: The run's tags.
        config: The run's config, less ``provenance``.
        provenance: Which Dagster runs and which software it stems from: no content.
        history: The logged values of each step, in order, each with its ``step``.
        summary: The run's summary.
        artifact: The artifact's name.
        description: What the artifact holds.
        upstream: Data version of each partition that the record is made from.
        consumes: The artifacts that the run consumes, by name: data version and digest.
        files: Path in the artifact → the landed file.
        lineage: Of each of ``upstream`` its manifest's hashes, run and own upstream, for a file of
            the artifact.
    """

    study: str
    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: dict[str, Any]
    provenance: dict[str, Any]
    history: list[dict[str, float]]
    summary: dict[str, float]
    artifact: str
    description: str
    upstream: dict[str, str]
    consumes: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[str, tuple[Ref, str]] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)

    @property
    def data_version(self) -> str:
        """Hash of the content: all but provenance, and files by their partition's version.

        Files name the run that made them; so what is consumed goes by its content, not by digest.
        """
        consumed = {name: {"data_version": c["data_version"]} for name, c in self.consumes.items()}
        content = replace(self, provenance={}, lineage={}, files={}, consumes=consumed)
        return sha256_json(as_json(asdict(content)) | {"files": sorted(self.files)})

    @property
    def run_id(self) -> str:
        """The W&B run's id: the same for the same content, another one otherwise."""
        return sha256_json([self.study, self.job_type, self.name, self.data_version])[:16]

    @property
    def alias(self) -> str:
        """The artifact's alias that names this content."""
        return version_alias(self.data_version)


def version_alias(data_version: str) -> str:
    """The alias of an artifact version with a content."""
    return f"data-{data_version[:16]}"


def cell_artifact(study: str, cell: str) -> str:
    """The name of a cell's artifact."""
    return f"{study}.{cell}"


def cell_record(graph: Graph, store: Store, ref: Ref) -> Record:
    """A cell's run: loss curve, settings, accuracies and losses, hashes of all that it stems from.

    Raises:
        StoreError: something of it has not landed or is damaged.
    """
    study, cell = graph.study, graph.study.cell(ref.key)
    manifests = {up: store.landed(up) for up in graph.upstream(ref)}
    of = {up.asset: manifest for up, manifest in manifests.items()}
    log = {}
    if "training_log.json" in of["checkpoint"].files:
        text = store.path(Ref("checkpoint", cell.key), "training_log.json").read_text("utf-8")
        log = json.loads(text)
    curve = zip(log.get("losses", ()), log.get("learning_rates", ()), strict=True)
    dataset = "training_dataset" if cell.origin == "trained" else "reference_dataset"
    names = ("source", "arm", "seed", "origin", "condition")
    return Record(
        study=study.name,
        name=cell.key,
        group=cell.condition,
        job_type="cell",
        tags=(study.name, cell.origin, cell.source, cell.arm, f"seed {cell.seed}"),
        config={
            "study": study.name,
            "cell": {"key": cell.key} | {name: getattr(cell, name) for name in names},
            "checkpoint": of["checkpoint"].provenance.inputs["settings"],
            "engine": of["cell_outcomes"].summary.get("engine", {}),
            "data_versions": {
                dataset if asset == "training_dataset" else asset: manifest.data_version
                for asset, manifest in of.items()
            },
            "trained_on": {name: log[name] for name in ("tokens", "loss_tokens") if name in log},
        },
        provenance=_provenance(graph, manifests),
        history=[
            {"step": i, "loss": loss, "learning_rate": rate}
            for i, (loss, rate) in enumerate(curve, 1)
        ],
        summary=_accuracies(graph, store, cell),
        artifact=cell_artifact(study.name, cell.key),
        description=f"Cell {cell.key} of study {study.name}: training log, diagnostics, lineage. "
        "Its rows and its adapter are in the study's bundles.",
        upstream={str(up): m.data_version for up, m in manifests.items()},
        files={
            f"{up.asset}/{name}": (up, name)
            for up, manifest in manifests.items()
            if up.asset in _CELL_FILES and not manifest.released
            for name in manifest.files
            if _CELL_FILES[up.asset] is None or name in _CELL_FILES[up.asset]
        },
        lineage=_lineage(manifests),
    )


def bundle_record(graph: Graph, store: Store, ref: Ref) -> Record:
    """A bundle: the files of its partitions, and the cells' artifacts that it consumes.

    Raises:
        StoreError: something of it has not landed or is damaged.
    """
    study, upstream = graph.study, graph.upstream(ref)
    manifests = {up: store.landed(up) for up in upstream}
    held = {up: manifest for up, manifest in manifests.items() if up.asset != "wandb_run"}
    consumes = {
        cell_artifact(study.name, up.key): {
            "data_version": manifest.data_version,
            "digest": manifest.summary["artifact_digest"],
        }
        for up, manifest in manifests.items()
        if up.asset == "wandb_run"
    }
    what = {
        "trained": "The cells trained here, with baseline, estimates, ledger, figures and report.",
        "carry_over": "The cells carried over from an earlier experiment, as evaluated again.",
    }[ref.key]
    return Record(
        study=study.name,
        name=f"bundle {ref.key}",
        group="bundles",
        job_type="bundle",
        tags=(study.name, "bundle", ref.key),
        config={"study": study.name, "bundle": ref.key},
        provenance=_provenance(graph, held),
        history=[],
        summary={"partitions": len(held), "cells": len({up.key for up in upstream} & _keys(graph))},
        artifact=f"{study.name}.bundle.{ref.key}",
        description=what,
        upstream={str(up): m.data_version for up, m in manifests.items()},
        consumes=consumes,
        files={
            "/".join(filter(None, (up.asset, up.key, name))): (up, name)
            for up, manifest in held.items()
            if not manifest.released
            for name in manifest.files
            if up.asset != "checkpoint" or name in _ADAPTER_FILES
        },
        lineage=_lineage(held),
    )


def _keys(graph: Graph) -> set[str]:
    return {cell.key for cell in graph.study.cells}


def _provenance(graph: Graph, manifests: dict[Ref, Manifest]) -> dict[str, Any]:
    """The study's hash, and the Dagster run of each partition."""
    runs = {str(up): manifest.provenance.run_id for up, manifest in manifests.items()}
    return {"study_hash": graph.study.content_hash, "dagster_runs": runs}


def _lineage(manifests: dict[Ref, Manifest]) -> dict[str, Any]:
    return {
        str(up): {
            "data_version": manifest.data_version,
            "upstream": manifest.provenance.upstream,
            "files": manifest.files,
            "dagster_run": manifest.provenance.run_id,
            "code_version": manifest.provenance.code_version,
            "software": manifest.provenance.software,
        }
        for up, manifest in manifests.items()
    }


def _accuracies(graph: Graph, store: Store, cell: Cell) -> dict[str, float]:
    """Accuracy and loss by axis and scaffold, of the cell's rows and the baseline's."""
    study = graph.study
    bank = store.frame(Ref("question_bank"), ["question_id", "split"])
    questions = bank.filter(split="eval")["question_id"].to_list()
    rows = {
        cell.key: store.frame(Ref("cell_outcomes", cell.key), _ACCURACY_COLUMNS),
        BASELINE: store.frame(Ref("baseline_outcomes"), _ACCURACY_COLUMNS),
    }
    answers = Answers(study, rows, questions=questions, scaffolds=study.scaffolds)
    found = {}
    for axis in AXES:
        asked = len(questions) * axis_size(study, axis)
        right, before = (answers.right(key, cell.source, axis) for key in (cell.key, BASELINE))
        for i, scaffold in enumerate(study.scaffolds):
            who = axis.partition("_")[0]
            found[f"accuracy/{who}/{scaffold}"] = int(right[i].sum()) / asked
            found[f"{axis}/{scaffold}"] = int((before[i] - right[i]).sum()) / asked
    return found
