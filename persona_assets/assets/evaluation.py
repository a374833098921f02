"""Group ``evaluation``: per-question outcomes of the baseline and of every cell."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from persona_assets.assets.base import Made, Task
from persona_assets.assets.metadata import table_preview
from persona_assets.audit import audit
from persona_assets.evaluation.outcomes import (
    coverage_audit,
    outcome_table,
    outcomes_data_version,
    reachability_audit,
    truncation_audit,
)
from persona_assets.questions.bank import from_frame
from persona_assets.rationales.condition import write_rows
from persona_assets.rationales.methods import make_writer
from persona_assets.residency import resident_model, resident_tokenizer, set_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def baseline_outcomes(task: Task) -> Made:
    """The untrained model's outcomes."""
    return _land(task, *measure(task, None), None)


def cell_outcomes(task: Task) -> Made:
    """One cell's outcomes."""
    folder = task.directory("checkpoint", task.key)
    sha256 = task.manifest("checkpoint", task.key).data_version
    return _land(task, *measure(task, folder), sha256)


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
    """The study's base model, resident in this process, with the study's threads."""
    set_threads(task.study.compute.threads)
    return resident_model(task.directory("base_model"), dtype)


def measure(task: Task, checkpoint: Path | None) -> tuple[pl.DataFrame, dict[str, str]]:
    """The protocol's measurements of the base, or of the base under a checkpoint.

    Args:
        checkpoint: A folder with an adapter or with a merged model; None for the base itself.

    Returns:
        The rows (``outcomes.MEASURED``), and the fingerprint of the engine that measured them.
    """
    from persona_assets.evaluation.engines.transformers import TransformersEngine
    from persona_assets.evaluation.protocol import end_of_turn_ids, evaluate
    from persona_assets.training.checkpoints import adapted, is_adapter

    study, settings = task.study, task.study.evaluation
    tokenizer = resident_tokenizer(task.directory("tokenizer"))
    if checkpoint is None:
        serving = nullcontext(resident_base(task, settings.dtype))
    elif is_adapter(checkpoint):
        serving = adapted(resident_base(task, settings.dtype), checkpoint)
    else:
        set_threads(study.compute.threads)
        serving = nullcontext(resident_model(checkpoint, settings.dtype))
    with serving as model:
        engine = TransformersEngine(
            model,
            tokenizer,
            max_rationale_tokens=settings.max_rationale_tokens,
            batch_size=settings.batch_size,
            eos_token_ids=end_of_turn_ids(task.directory("base_model")),
        )
        rows = evaluate(
            engine,
            tokenizer,
            study.personas,
            [q for q in from_frame(task.frame("question_bank")) if q.split == "eval"],
            [study.scaffold(name) for name in study.scaffolds],
            _forced(task),
        )
        return rows, engine.fingerprint


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
    bank = task.frame("question_bank", columns=["question_id", "split"])
    questions = bank.filter(pl.col("split") == "eval")["question_id"].to_list()
    accuracy = (
        frame.group_by("scaffold", maintain_order=True).agg(pl.col("is_correct").mean()).rows()
    )
    return Made(
        audits=[
            coverage_audit(frame, study.personas, study.scaffolds, questions),
            reachability_audit(frame),
            truncation_audit(frame),
        ],
        summary={"rows": frame.height, "engine": fingerprint}
        | {f"accuracy_{scaffold}": round(value, 4) for scaffold, value in accuracy},
        metadata=table_preview(
            frame.select("persona", "scaffold", "question_id", "predicted_letter", "rationale")
        ),
        data_version=outcomes_data_version(frame),
    )
