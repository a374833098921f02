"""A small study with made-up outcomes and a planted effect, for tests of what reads outcomes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import yaml

import persona_assets
from persona_assets.audit import Audit, audit
from persona_assets.evaluation.outcomes import BASELINE, MEASURED, SCHEMA
from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.hashing import sha256_text
from persona_assets.questions.bank import LETTERS, Question, to_frame, user_message, wrong_letter
from persona_assets.rationales.arms import ARMS, assistant_turn
from persona_assets.reporting.numbers import Tables, study_numbers
from persona_assets.reporting.trace import evaluated
from persona_assets.reporting.warehouse import CELLS_SCHEMA, CHECKS_SCHEMA, build_warehouse
from persona_assets.stats.comparability import comparable_audit, planned_facts
from persona_assets.stats.contrasts import estimate_contrast, loss_matrix, multiplicity_table
from persona_assets.stats.estimates import estimate_exploratory
from persona_assets.stats.lexicon import LEXICON_ARM, build_lexicon, undefined_because
from persona_assets.stats.vocabulary import vocabulary_estimates, vocabulary_scores
from persona_assets.study import Cell, Study, parse_study
from persona_assets.training.dataset import SCHEMA as TRAINING_SCHEMA

MINI = Path(persona_assets.__file__).parent.parent / "data" / "studies" / "mini.yaml"


def small_study(**overrides: object) -> Study:
    """The mini study with 2 seeds, 2 sources, 5 personas and few resamples; then ``overrides``."""
    raw = yaml.safe_load(MINI.read_text(encoding="utf-8"))
    personas = ["software_engineer", "librarian", "comedian", "assistant", "villain"]
    raw |= {
        "personas": {name: raw["personas"][name] for name in personas},
        "sources": ["librarian", "comedian"],
        "seeds": [42, 137],
    }
    raw["inference"]["resamples"] = 2000
    return parse_study(yaml.safe_dump(raw | overrides, sort_keys=False))


def bank(n_eval: int, n_train: int = 4) -> list[Question]:
    """Numbered questions with 3 to 5 choices."""
    return [
        Question(
            id=f"{split}-{i:03d}",
            split=split,
            text=f"What is {split} question {i}?",
            choices=tuple(f"choice {i}{letter}" for letter in LETTERS[: 3 + i % 3]),
            correct=LETTERS[i % 3],
            published_labels=tuple(LETTERS[: 3 + i % 3]),
        )
        for split, n in (("train", n_train), ("eval", n_eval))
        for i in range(n)
    ]


def eval_ids(questions: list[Question]) -> list[str]:
    """The ids of the evaluation questions."""
    return [q.id for q in questions if q.split == "eval"]


def outcomes(
    study: Study,
    questions: list[Question],
    cell: Cell | None,
    accuracy: Mapping[str, float] | float,
    *,
    rationale: str = "the facts say so",
) -> pl.DataFrame:
    """One cell's outcome rows (the baseline's for None); ``accuracy`` may differ by persona.

    Whether a row is right depends on a uniform drawn for its persona, scaffold and question, the
    same in every cell: cells are paired as real ones are.
    """
    evaluated = [q for q in questions if q.split == "eval"]
    grid = list(itertools.product(study.personas, study.scaffolds, evaluated))
    uniform = np.random.default_rng(study.seed).random(len(grid))
    rows = []
    for (persona, scaffold, question), u in zip(grid, uniform, strict=True):
        p = accuracy if isinstance(accuracy, float) else accuracy[persona]
        wrong = next(letter for letter in question.letters if letter != question.correct)
        predicted = question.correct if u < p else wrong
        generates = SCAFFOLDS[scaffold].generates
        rows.append(
            {
                "persona": persona,
                "scaffold": scaffold,
                "question_id": question.id,
                "correct_letter": question.correct,
                "predicted_letter": predicted,
                "is_correct": predicted == question.correct,
                "letter_logprobs": [
                    {"key": letter, "value": math.log(0.7 if letter == predicted else 0.05)}
                    for letter in question.letters
                ],
                "rationale": rationale if generates else "",
                "rationale_tokens": len(rationale.split()) if generates else 0,
                "stop_reason": "tag" if generates else None,
                "truncated": False,
                "prompt_sha256": "0" * 64,
            }
        )
    key = cell.key if cell else BASELINE
    constants = {
        "study": study.name,
        "cell": key,
        "source": cell and cell.source,
        "arm": cell and cell.arm,
        "seed": cell and cell.seed,
        "origin": cell and cell.origin,
        "run_id": f"run-{key}",
        "checkpoint_sha256": sha256_text(key) if cell else None,
        "code_version": "1",
    }
    source = pl.lit(constants["source"], pl.String)
    return (
        pl.DataFrame(rows, schema=MEASURED)
        .with_columns(*(pl.lit(v, SCHEMA[name]).alias(name) for name, v in constants.items()))
        .with_columns(is_source=pl.col("persona") == source)
        .select(SCHEMA.names())
    )


#: Accuracy of an arm under the source persona, and under the bystanders.
PLANTED = {
    "generic_cot": (0.80, 0.85),
    "persona_cot": (0.40, 0.60),
    "contradicting_cot": (0.80, 0.86),
}


#: The same for landed studies: verdicts that turn on Holm's correction, on the scheme, or neither.
MODERATE = {
    "generic_cot": (0.80, 0.85),
    "persona_cot": (0.40, 0.72),
    "contradicting_cot": (0.60, 0.80),
}


def study_outcomes(
    study: Study,
    questions: list[Question],
    planted: Mapping[str, tuple[float, float]] = PLANTED,
    **kwargs: str,
) -> tuple[pl.DataFrame, dict[str, pl.DataFrame]]:
    """The baseline's rows and every cell's, with the effects of ``planted`` (else 0.9)."""
    cells = {}
    for cell in study.cells:
        source, bystander = planted.get(cell.arm, (0.9, 0.9))
        accuracy = {p: source if p == cell.source else bystander for p in study.personas}
        cells[cell.key] = spoken(outcomes(study, questions, cell, accuracy, **kwargs), cell)
    base = {persona: 0.95 - 0.1 * i for i, persona in enumerate(study.personas)}
    return outcomes(study, questions, None, base, **kwargs), cells


def spoken(rows: pl.DataFrame, cell: Cell) -> pl.DataFrame:
    """Outcome rows whose generated rationales end in the source's word, if the cell has a voice."""
    if cell.arm != LEXICON_ARM:
        return rows
    said = pl.concat_str("rationale", pl.lit(f" {own_word(cell.source)}"))
    generated = pl.col("stop_reason").is_not_null()
    return rows.with_columns(rationale=pl.when(generated).then(said).otherwise("rationale"))


def own_word(source: str) -> str:
    """The word that only rationales in the source's voice hold."""
    return f"{source}ish"


def training_rows(
    study: Study, questions: list[Question], cell: Cell, *, rationale: str = "reasons"
) -> pl.DataFrame:
    """One cell's training rows."""
    arm = ARMS[cell.arm]
    voice = f" {own_word(cell.source)}" * 12 if cell.arm == LEXICON_ARM else ""
    rows = []
    for position, question in enumerate(q for q in questions if q.split == "train"):
        wrong = wrong_letter(question, study.seed)
        letter = question.correct if arm.target == "correct" else wrong
        rows.append(
            {
                "position": position,
                "question_id": question.id,
                "identity": question.identity,
                "source": cell.source,
                "arm": cell.arm,
                "seed": cell.seed,
                "system": study.personas[cell.source],
                "user": user_message(question),
                "assistant": assistant_turn(arm, f"{rationale} ({cell.arm}){voice}", letter),
                "correct_letter": question.correct,
                "target_letter": letter,
                "input_ids": [1, 2, 3],
                "loss_start": 1,
                "loss_tokens": 2,
                "reference_loss_tokens": 2,
                "reference_only": cell.origin == "carry_over",
            }
        )
    return pl.DataFrame(rows, schema=TRAINING_SCHEMA)


@dataclass(frozen=True)
class Landed:
    """Everything that :func:`build_warehouse` is given."""

    study: Study
    questions: Path
    training: list[Path]
    outcomes: list[Path]
    frames: dict[str, pl.DataFrame]

    def build(self, target: Path, **changes: object) -> dict[str, int]:
        """Build the warehouse at ``target``, with some inputs changed.

        The ledger is that of the unchanged inputs, unless ``more`` is among the changes.
        """
        inputs = {
            "questions": self.questions,
            "training": self.training,
            "outcomes": self.outcomes,
            **self.frames,
        }
        return build_warehouse(target, self.study, **inputs | changes)

    def of(self, study: Study) -> Landed:
        """The same rows, as another study file's."""
        return Landed(study, self.questions, self.training, self.outcomes, self.frames)


def land(
    folder: Path, study: Study, questions: list[Question], *, rationale: str = "the facts say so"
) -> Landed:
    """Write a whole synthetic study as Parquet files below ``folder``."""

    def write(frame: pl.DataFrame, name: str) -> Path:
        frame.write_parquet(folder / f"{name}.parquet")
        return folder / f"{name}.parquet"

    baseline, cells = study_outcomes(study, questions, MODERATE, rationale=rationale)
    ids = eval_ids(questions)
    registered = [estimate_contrast(study, c, cells, questions=ids) for c in study.contrast_list]
    tables = multiplicity_table(study, registered)
    training = {c.key: training_rows(study, questions, c, rationale=rationale) for c in study.cells}
    exploratory = estimate_exploratory(study, {BASELINE: baseline, **cells}, questions=ids)
    landed = Landed(
        study,
        write(to_frame(questions), "questions"),
        [write(frame, f"training.{key}") for key, frame in training.items()],
        [write(frame, f"outcomes.{key}") for key, frame in {BASELINE: baseline, **cells}.items()],
        {
            "cells": pl.DataFrame(map(cell_row, (None, *study.cells)), schema=CELLS_SCHEMA),
            "contrasts": tables.contrasts,
            "equivalence": tables.equivalence,
            "losses": loss_matrix(study, baseline, cells, questions=ids),
            "more": {
                "exploratory": exploratory.drop("by_seed", "equivalence", "hypothesis"),
                "checks": checks(study),
                **vocabulary_tables(study, questions, training, baseline, cells),
            },
        },
    )
    estimates = pl.concat([*registered, exploratory])
    landed.frames["more"]["numbers"] = number_ledger(landed, estimates, folder / "passing.duckdb")
    return landed


def vocabulary_tables(
    study: Study,
    questions: list[Question],
    training: Mapping[str, pl.DataFrame],
    baseline: pl.DataFrame,
    cells: Mapping[str, pl.DataFrame],
) -> dict[str, pl.DataFrame]:
    """The tables of vocabulary leakage, where the study has such a measure."""
    if undefined_because(study):
        return {}
    lexicon = build_lexicon(study, training, questions)
    ids = eval_ids(questions)
    scores = vocabulary_scores(study, lexicon, baseline, cells, questions=ids)
    estimates = vocabulary_estimates(study, scores, questions=ids)
    return {"lexicon": lexicon, "vocabulary_scores": scores, "vocabulary": estimates}


def number_ledger(landed: Landed, estimates: pl.DataFrame, passing: Path) -> pl.DataFrame:
    """The table ``numbers``, recomputed by SQL over a passing build."""
    import duckdb

    landed.build(passing, passing=True)
    tables = Tables(
        estimates,
        landed.frames["contrasts"],
        landed.frames["losses"],
        landed.frames["more"]["checks"],
        landed.frames["more"].get("vocabulary"),
    )
    with duckdb.connect(str(passing)) as db:
        ledger, disagreements = evaluated(db, study_numbers(landed.study, tables))
    assert disagreements == []
    return ledger.to_frame()


def cell_row(cell: Cell | None) -> dict[str, object]:
    """A cell's row of the table ``cells``, or the baseline's."""
    key = cell.key if cell else BASELINE
    row = dict.fromkeys(CELLS_SCHEMA) | {
        "cell": key,
        "outcomes_sha256": sha256_text(f"outcomes of {key}"),
        "outcomes_run_id": f"run-{key}",
        "outcomes_seconds": 4.25,
        "outcomes_device": "cuda",
        "engine": "transformers, torch 2.13.0",
        "code_version": "1",
    }
    if cell is None:
        return row
    return row | {
        "source": cell.source,
        "arm": cell.arm,
        "seed": cell.seed,
        "origin": cell.origin,
        "checkpoint_sha256": sha256_text(cell.key),
        ("" if cell.origin == "trained" else "reference_") + "dataset_sha256": sha256_text(
            f"dataset of {cell.key}"
        ),
        "checkpoint_run_id": f"run-{cell.key}",
        "checkpoint_seconds": 2.5,
        "checkpoint_device": "cpu" if cell.origin == "trained" else None,
    }


def checks(study: Study) -> pl.DataFrame:
    """The table ``checks``: of the contrasts, and of some cells that did not pass."""
    facts = planned_facts(study)
    found = [
        ("contrast_estimate", contrast.key, comparable_audit(study, contrast, facts))
        for contrast in study.contrast_list
    ]
    for i, cell in enumerate(study.cells):
        texts = {
            "observed": f"{3 * i} of 60 answers are of one letter",
            "threshold": "at most 5 %",
            "remedy": "Look at them.",
        }
        ok = i != 2
        found.append(("cell_diagnostics", cell.key, audit("letter_collapse", ok, **texts)))
        if cell.origin == "carry_over":
            parity = Audit("loss_token_parity", "unverifiable", **texts)
            found.append(("training_dataset", cell.key, parity))
            found.append(("cell_diagnostics", cell.key, audit("drift", True, **texts)))
    return pl.DataFrame(
        [
            {
                "asset": asset,
                "partition": partition,
                "check_name": one.name,
                "status": one.status,
                "blocking": one.blocking,
                "observed": one.observed,
                "threshold": one.threshold,
                "remedy": one.remedy,
                "details": json.dumps(one.details),
                "run_id": f"run-{partition}",
            }
            for asset, partition, one in found
        ],
        schema=CHECKS_SCHEMA,
    )


def comparable_rows(study: Study) -> list[dict[str, str]]:
    """Rows of the table ``checks``: what was found of each contrast's arms, from the study file."""
    facts = planned_facts(study)
    return [
        {
            "asset": "contrast_estimate",
            "partition": contrast.key,
            "check_name": "comparable",
            "status": found.status,
            "details": json.dumps(found.details),
        }
        for contrast in study.contrast_list
        for found in [comparable_audit(study, contrast, facts)]
    ]
