"""Group ``evaluation``: per-question outcomes of the baseline and of every cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from persona_assets import environment
from persona_assets.assets.base import Made, Task
from persona_assets.assets.metadata import number_links, table_preview
from persona_assets.assets.plots import accuracy_bars, letters_bars
from persona_assets.audit import Audit, audit
from persona_assets.evaluation.diagnostics import (
    adapter_effect_audit,
    answers_parseable_audit,
    letter_collapse_audit,
    letter_mass_audit,
    predicted_letters,
)
from persona_assets.evaluation.drift import (
    PUBLISHED_CHANGES,
    drift_audit,
    letter_labelled,
    read_prior_table,
)
from persona_assets.evaluation.hosts import Host, open_host
from persona_assets.evaluation.outcomes import (
    BASELINE,
    coverage_audit,
    outcome_table,
    outcomes_data_version,
    reachability_audit,
    truncation_audit,
)
from persona_assets.evaluation.probe import base_unchanged_audit, probe_prompts
from persona_assets.evaluation.protocol import evaluate
from persona_assets.hashing import sha256_json
from persona_assets.questions.bank import from_frame
from persona_assets.rationales.condition import write_rows
from persona_assets.rationales.methods import make_writer
from persona_assets.residency import (
    device,
    release,
    resident_model,
    resident_tokenizer,
    set_threads,
)
from persona_assets.study_schema import LocalRegistry
from persona_assets.training.checkpoints import is_adapter
from persona_assets.unavailable import Unavailable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def baseline_outcomes(task: Task) -> Made:
    """The untrained model's outcomes."""
    return _land(task, *measure(task, None), None)


def cell_outcomes(task: Task) -> Made:
    """One cell's outcomes."""
    folder = task.directory("checkpoint", task.key)
    sha256 = task.manifest("checkpoint", task.key).data_version
    shares_base = task.study.evaluation.engine != "transformers" or is_adapter(folder)
    host = _host(task)
    before = host.first_reading(_prompts(task)) if shares_base else None
    made = _land(task, *measure(task, folder), sha256)
    if before is None:
        return made
    unchanged = base_unchanged_audit(before, host.probe(_prompts(task)))
    if unchanged.blocks:  # nothing more is to be measured with what is in memory
        release()
    return replace(made, audits=[*made.audits, unchanged])


def cell_diagnostics(task: Task) -> Made:
    """What a cell's answers look like beside the untrained model's and the earlier experiment's."""
    baseline, outcomes = task.frame("baseline_outcomes"), task.frame("cell_outcomes", task.key)
    letters = predicted_letters(outcomes)
    task.write(letters, "predicted_letters")
    return Made(
        audits=[
            adapter_effect_audit(outcomes, baseline, task.study.evaluation.dtype),
            letter_collapse_audit(outcomes, baseline),
            *_drift(task, outcomes),
        ],
        metadata=letters_bars(outcomes, baseline) | table_preview(letters),
    )


def _drift(task: Task, outcomes: pl.DataFrame) -> list[Audit]:
    """The comparison with the earlier experiment's table, where the cell has a row in one."""
    registry = task.study.carry_over
    if task.cell.origin == "trained" or registry is None:
        return []
    questions = [q for q in from_frame(task.frame("question_bank")) if q.split == "eval"]
    if isinstance(registry, LocalRegistry):
        prior, tolerance = task.frame("prior_accuracies", task.key), registry.drift_tolerance
        readable, changes = [q.id for q in questions], ()
    elif registry.drift is None:
        return []
    else:
        path = environment.prior_table(registry.drift.table)
        table = read_prior_table(path, registry.drift.sha256)
        prior, tolerance = table.filter(cell=task.key), registry.drift.tolerance
        readable, changes = letter_labelled(questions), PUBLISHED_CHANGES
    audit = drift_audit(outcomes, prior, tolerance=tolerance, readable=readable, changes=changes)
    return [audit]


def forced_rationales(task: Task) -> Made:
    """One arm's kind of rationale for every persona and eval question."""
    study, arm, writer = task.study, task.study.arm(task.key), make_writer(task.study)
    questions = from_frame(task.frame("question_bank"))
    asked = [q for q in questions if q.split == "eval"]
    tokenizer = resident_tokenizer(task.directory("tokenizer"))
    frame = pl.concat(
        write_rows(study, persona, arm, asked, questions, tokenizer, writer).select(
            pl.lit(persona).alias("persona"), "question_id", "rationale", "problem"
        )
        for persona in study.personas
    )
    task.write(frame, "rationales")
    unusable = frame.filter(pl.col("problem").is_not_null())
    return Made(
        audits=[
            audit(
                "usable",
                unusable.is_empty(),
                observed=f"{unusable.height} of {frame.height} rationales cannot be used",
                threshold="0 rationales: every persona answers every question",
                remedy="Choose another writer, or see why its rationales cannot be used.",
                rows=unusable.select("persona", "question_id", "problem").head(20).to_dicts(),
            )
        ],
        summary={"rows": frame.height, **writer.accounting},
        metadata=table_preview(frame),
    )


def prior_accuracies(task: Task) -> Made:
    """What an earlier experiment kept of a cell: averages only."""
    measured, _ = measure(task, task.directory("prior_checkpoint", task.key))
    frame = measured.group_by("persona", "scaffold", maintain_order=True).agg(
        pl.col("is_correct").sum().cast(pl.Int64).alias("correct"),
        pl.len().cast(pl.Int64).alias("questions"),
    )
    task.write(frame, "accuracies")
    return Made(summary={"rows": frame.height}, metadata=table_preview(frame))


def resident_base(task: Task, dtype: str) -> PreTrainedModel:
    """The study's base model, resident in this process, with the study's threads.

    Where evaluation uses the same model, its first logits are kept: they must be the same after
    every cell that borrows it.
    """
    set_threads(task.study.compute.threads)
    settings = task.study.evaluation
    if settings.engine == "transformers" and dtype == settings.dtype:
        _host(task).first_reading(_prompts(task))
    return resident_model(task.directory("base_model"), dtype, device(task.study.wants_gpu))


def _host(task: Task) -> Host:
    """What serves the study's checkpoints."""
    return open_host(task.study, task.directory("base_model"), task.directory("tokenizer"))


def _prompts(task: Task) -> tuple[str, ...]:
    """What the base is asked to see that it is unchanged."""
    return probe_prompts(resident_tokenizer(task.directory("tokenizer")), task.study.personas)


def measure(task: Task, checkpoint: Path | None) -> tuple[pl.DataFrame, dict[str, str]]:
    """The protocol's measurements of the base, or of the base under a checkpoint.

    Args:
        checkpoint: A folder with an adapter or with a merged model; None for the base itself.

    Returns:
        The rows (``outcomes.MEASURED``), and the fingerprint of the engine that measured them.
    """
    study = task.study
    tokenizer = resident_tokenizer(task.directory("tokenizer"))
    questions = [q for q in from_frame(task.frame("question_bank")) if q.split == "eval"]
    scaffolds = [study.scaffold(name) for name in study.scaffolds]
    host = _host(task)
    try:
        with host.serving(checkpoint) as engine:
            rows = evaluate(engine, tokenizer, study.personas, questions, scaffolds, _forced(task))
            return rows, engine.fingerprint
    except (ValueError, Unavailable):  # of what was asked, or of where: not of the engine
        raise
    except BaseException:
        release()  # the next cell gets a new one
        raise


def _forced(task: Task) -> dict[tuple[str, str, str], str]:
    """The rationales to put in place of generated ones, by (arm, persona, question id)."""
    return {
        (arm, persona, question): text
        for arm in task.study.forced_arms
        for persona, question, text in task.frame("forced_rationales", arm)
        .select("persona", "question_id", "rationale")
        .iter_rows()
    }


def _land(
    task: Task,
    measured: pl.DataFrame,
    fingerprint: dict[str, str],
    checkpoint_sha256: str | None,
) -> Made:
    study = task.study
    frame = outcome_table(
        measured,
        study=study.name,
        cell=task.cell if checkpoint_sha256 else None,
        run_id=task.run_id,
        checkpoint_sha256=checkpoint_sha256,
        code_version=task.code_version,
    )
    task.write(frame, "outcomes")
    evaluated = [q for q in from_frame(task.frame("question_bank")) if q.split == "eval"]
    questions = [question.id for question in evaluated]
    accuracy = (
        frame.group_by("scaffold", maintain_order=True).agg(pl.col("is_correct").mean()).rows()
    )
    return Made(
        audits=[
            coverage_audit(frame, study.personas, study.scaffolds, questions),
            reachability_audit(frame),
            truncation_audit(frame),
            answers_parseable_audit(frame, evaluated),
            letter_mass_audit(frame),
        ],
        summary={"rows": frame.height, "engine": fingerprint}
        | {f"accuracy_{scaffold}": round(value, 4) for scaffold, value in accuracy},
        metadata=accuracy_bars(frame)
        | table_preview(
            frame.unique("scaffold", keep="first", maintain_order=True).select(
                "persona",
                "scaffold",
                "question_id",
                "correct_letter",
                "predicted_letter",
                "rationale",
            )
        )
        | number_links(task.graph, f"list_contains(cells, '{task.ref.key or BASELINE}')"),
        # With the engine: rows that another one gives alike say something else of a contrast.
        data_version=sha256_json([outcomes_data_version(frame), fingerprint]),
    )
