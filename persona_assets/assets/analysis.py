"""Group ``analysis``: contrasts, multiplicity, loss matrix."""

from __future__ import annotations

import polars as pl

from persona_assets.assets.base import Made, Task
from persona_assets.assets.metadata import table_preview
from persona_assets.stats.contrasts import estimate_contrast, multiplicity_table
from persona_assets.stats.contrasts import loss_matrix as losses

_COLUMNS = ["persona", "scaffold", "question_id", "is_correct"]


def contrast_estimate(task: Task) -> Made:
    """One registered macro contrast with its per-source rows, under both schemes."""
    contrast = task.study.contrast(task.key)
    cells = task.study.contrast_cells(contrast)
    frame = estimate_contrast(
        task.study,
        contrast,
        {cell.key: task.frame("cell_outcomes", cell.key, _COLUMNS) for cell in cells},
        questions=eval_questions(task),
    )
    task.write(frame, "estimates")
    return Made(
        summary={"cells": len(cells), "resamples": task.study.inference.resamples},
        metadata=table_preview(frame.select("scope", "scheme", "estimate", "ci_low", "ci_high")),
    )


def multiplicity(task: Task) -> Made:
    """Holm over the family within each scheme, and the equivalence tests."""
    tables = multiplicity_table(
        task.study,
        [task.frame("contrast_estimate", contrast.key) for contrast in task.study.contrast_list],
    )
    task.write(tables.contrasts, "contrasts")
    task.write(tables.equivalence, "equivalence")
    family = tables.contrasts.filter(pl.col("p_holm").is_not_null())
    return Made(
        summary={"family": family.height // family["scheme"].n_unique()},
        metadata=table_preview(family.select("contrast", "axis", "scheme", "p_value", "p_holm")),
    )


def loss_matrix(task: Task) -> Made:
    """Mean loss of every arm under every scaffold, on both axes."""
    frame = losses(
        task.study,
        task.frame("baseline_outcomes", columns=_COLUMNS),
        {c.key: task.frame("cell_outcomes", c.key, _COLUMNS) for c in task.study.cells},
        questions=eval_questions(task),
    )
    task.write(frame, "losses")
    return Made(summary={"rows": frame.height}, metadata=table_preview(frame))


def eval_questions(task: Task) -> list[str]:
    """The ids of the bank's evaluation questions."""
    bank = task.frame("question_bank", columns=["question_id", "split"])
    return bank.filter(pl.col("split") == "eval")["question_id"].to_list()
