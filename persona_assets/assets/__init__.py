"""The Dagster layer: one module a group, thin functions over the core."""

from __future__ import annotations

from collections.abc import Mapping

from persona_assets.assets import (
    analysis,
    checkpoints,
    evaluation,
    inputs,
    publish,
    report,
    training_data,
)
from persona_assets.assets.base import Maker

#: Asset name → the function that makes one partition of it.
MAKERS: Mapping[str, Maker] = {
    "tokenizer": inputs.tokenizer,
    "question_bank": inputs.question_bank,
    "base_model": inputs.base_model,
    "rationales": training_data.rationales,
    "training_dataset": training_data.training_dataset,
    "prior_checkpoint": checkpoints.prior_checkpoint,
    "prior_accuracies": evaluation.prior_accuracies,
    "forced_rationales": evaluation.forced_rationales,
    "checkpoint": checkpoints.checkpoint,
    "baseline_outcomes": evaluation.baseline_outcomes,
    "cell_outcomes": evaluation.cell_outcomes,
    "cell_diagnostics": evaluation.cell_diagnostics,
    "contrast_estimate": analysis.contrast_estimate,
    "multiplicity": analysis.multiplicity,
    "loss_matrix": analysis.loss_matrix,
    "exploratory_estimates": analysis.exploratory_estimates,
    "vocabulary_leakage": analysis.vocabulary_leakage,
    "number_ledger": report.number_ledger,
    "warehouse": report.warehouse,
    "forest_plot": report.forest_plot,
    "loss_heatmap": report.loss_heatmap,
    "report": report.report,
    "wandb_run": publish.wandb_run,
    "wandb_bundle": publish.wandb_bundle,
    "hub_upload": publish.hub_upload,
}
