"""Group ``analysis``: contrasts, multiplicity, loss matrix."""

from __future__ import annotations

import polars as pl

from persona_assets.assets.base import Made, Task
from persona_assets.assets.metadata import number_links, table_preview
from persona_assets.assets.plots import intervals_plot
from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.questions.bank import from_frame
from persona_assets.stats.comparability import comparable_audit, planned_facts, with_engines
from persona_assets.stats.contrasts import estimate_contrast, multiplicity_table
from persona_assets.stats.contrasts import loss_matrix as losses
from persona_assets.stats.estimands import MACRO
from persona_assets.stats.estimates import HEADLINE_SCHEME, estimate_exploratory
from persona_assets.stats.lexicon import build_lexicon, lexicon_cells
from persona_assets.stats.vocabulary import vocabulary_estimates, vocabulary_scores
from persona_assets.store import Ref

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
    engines = {c.key: task.manifest("cell_outcomes", c.key).summary["engine"] for c in cells}
    facts = with_engines(planned_facts(task.study), engines)
    return Made(
        audits=[comparable_audit(task.study, contrast, facts)],
        summary={"cells": len(cells), "resamples": task.study.inference.resamples},
        metadata=intervals_plot(frame)
        | table_preview(frame.select("scope", "scheme", "estimate", "ci_low", "ci_high"))
        | number_links(task.graph, f"starts_with(number_id, '{_common_prefix(frame)}')"),
    )


def _common_prefix(estimates: pl.DataFrame) -> str:
    """What the ids of one contrast's numbers begin with: all but scope and scheme."""
    (prefix,) = estimates["number_id"].str.replace("[^/]+/[^/]+$", "").unique()
    return prefix


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


def exploratory_estimates(task: Task) -> Made:
    """The estimates that are not registered, under both schemes."""
    frame = estimate_exploratory(
        task.study, _outcomes(task, _COLUMNS), questions=eval_questions(task)
    )
    task.write(frame, "estimates")
    shown = frame.filter(scope=MACRO, scheme=HEADLINE_SCHEME)
    return Made(
        summary={"rows": frame.height},
        metadata=table_preview(shown.select("kind", "contrast", "axis", "estimate", "p_value")),
    )


def vocabulary_leakage(task: Task) -> Made:
    """The sources' lexicons, the rationales' scores, and the increases over the baseline."""
    study, questions = task.study, eval_questions(task)
    lexicon = build_lexicon(
        study,
        {cell.key: task.frame("training_dataset", cell.key) for cell in lexicon_cells(study)},
        from_frame(task.frame("question_bank")),
    )
    outcomes = _outcomes(task, [*_COLUMNS, "rationale"])
    baseline = outcomes.pop(BASELINE)
    scores = vocabulary_scores(study, lexicon, baseline, outcomes, questions=questions)
    estimates = vocabulary_estimates(study, scores, questions=questions)
    task.write(lexicon, "lexicon")
    task.write(scores, "vocabulary_scores")
    task.write(estimates, "vocabulary")
    return Made(
        summary={
            "words": lexicon.height,
            "rationales": scores.height,
            "without_a_word": scores.filter(words=0).height,  # each scores 0
        },
        metadata=table_preview(lexicon.select("source", "rank", "word", "z")),
    )


def loss_matrix(task: Task) -> Made:
    """Mean loss of every arm under every scaffold, on both axes."""
    outcomes = _outcomes(task, _COLUMNS)
    baseline = outcomes.pop(BASELINE)
    frame = losses(
        task.study,
        baseline,
        outcomes,
        questions=eval_questions(task),
    )
    task.write(frame, "losses")
    return Made(summary={"rows": frame.height}, metadata=table_preview(frame))


def _outcomes(task: Task, columns: list[str]) -> dict[str, pl.LazyFrame]:
    """Every evaluation's rows by cell key, the baseline's among them, read when they are needed."""
    refs = {cell.key: Ref("cell_outcomes", cell.key) for cell in task.study.cells}
    refs[BASELINE] = Ref("baseline_outcomes")
    return {
        key: pl.scan_parquet(task.store.path(ref, "outcomes.parquet")).select(columns)
        for key, ref in refs.items()
    }


def eval_questions(task: Task) -> list[str]:
    """The ids of the bank's evaluation questions."""
    bank = task.frame("question_bank", columns=["question_id", "split"])
    return bank.filter(pl.col("split") == "eval")["question_id"].to_list()
