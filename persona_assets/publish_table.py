"""The rows of group ``publish``: what of a study is published, where its file names a place.

``persona-assets run`` makes none of them, ``persona-assets publish`` nothing else; nothing is made
from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from persona_assets.asset_row import Asset, Job
from persona_assets.code_sources import code_sources
from persona_assets.publishing.hub_content import KINDS, held
from persona_assets.store import Ref
from persona_assets.study import Study

PUBLISH_JOBS: Mapping[str, Job] = {
    "wandb_runs": Job(("wandb_run",), "One cell's Weights & Biases run."),
    "wandb_bundles": Job(("wandb_bundle",), "A bundle of the study as Weights & Biases artifact."),
    "hub_uploads": Job(("hub_upload",), "A repository of the study on the Hugging Face hub."),
}

#: The jobs that publish to a place (a field of the study file's ``publish``), in their order.
PLACES: Mapping[str, tuple[str, ...]] = {
    "wandb": ("wandb_runs", "wandb_bundles"),
    "hub": ("hub_uploads",),
}

_CELL = ("training_dataset", "checkpoint", "cell_outcomes", "cell_diagnostics")
_AGGREGATES = (
    *("contrast_estimate", "multiplicity", "loss_matrix", "exploratory_estimates"),
    *("vocabulary_leakage", "number_ledger", "forest_plot", "loss_heatmap", "report"),
)


def publish_table(study: Study, made: Sequence[Asset]) -> list[Asset]:
    """The publish assets of a study; ``made`` are its other assets."""
    return [
        *(_wandb(study, {asset.name: asset for asset in made}) if study.publish.wandb else []),
        *([_hub(study)] if study.publish.hub else []),
    ]


def _wandb(study: Study, made: Mapping[str, Asset]) -> list[Asset]:
    cells, bank = tuple(cell.key for cell in study.cells), Ref("question_bank")
    of = {
        origin: tuple(cell.key for cell in study.cells_of(origin))
        for origin in ("trained", "carry_over")
    }

    def bundled(key: str | None) -> tuple[Ref, ...]:
        """What a bundle holds the files of."""
        if key == "carry_over":
            held = ("cell_outcomes", "cell_diagnostics")
            earlier = ("prior_accuracies",) if "prior_accuracies" in made else ()
            return (bank, *(Ref(name, cell) for cell in of[key] for name in (*held, *earlier)))
        aggregates = [ref for name in _AGGREGATES if name in made for ref in made[name].refs()]
        trained = (Ref(name, cell) for cell in of["trained"] for name in _CELL)
        return (bank, Ref("baseline_outcomes"), *trained, *aggregates)

    def consumed(key: str | None) -> tuple[Ref, ...]:
        """The runs that a bundle's content comes from: its aggregates are made from every cell."""
        return tuple(Ref("wandb_run", c) for c in (of[key] if key == "carry_over" else cells))

    settings = {"wandb": study.publish.wandb.model_dump(mode="json")}
    return [
        Asset(
            "wandb_run",
            "publish",
            frozenset({"wandb"}),
            "One cell as a Weights & Biases run: its loss curve, settings, accuracies, and the "
            "hashes of what it was made from. Logged offline, synced where there is a key.",
            cells,
            lambda key: (bank, Ref("baseline_outcomes"), *(Ref(name, key) for name in _CELL)),
            lambda key: settings,
            lambda key: code_sources("wandb_run"),
        ),
        Asset(
            "wandb_bundle",
            "publish",
            frozenset({"wandb"}),
            "A versioned Weights & Biases artifact that consumes its cells' runs: the trained "
            "cells with baseline, aggregates, ledger, figures and report; the carry-over cells as "
            "evaluated again.",
            ("trained", "carry_over") if of["carry_over"] else ("trained",),
            lambda key: (*bundled(key), *consumed(key)),
            lambda key: settings,
            lambda key: code_sources("wandb_bundle"),
        ),
    ]


def _hub(study: Study) -> Asset:
    hub = study.publish.hub.model_dump(mode="json")
    return Asset(
        "hub_upload",
        "publish",
        frozenset({"huggingface"}),
        "The commit of a repository on the Hugging Face hub that holds what has landed: training "
        "rows, questions, warehouse and report in the dataset repository, the study's own adapters "
        "in the model repository. Other studies pin it to import from.",
        KINDS,
        lambda key: held(study, key),
        lambda key: {"hub": hub, "study": study.content},
        lambda key: code_sources("hub_upload"),
    )
