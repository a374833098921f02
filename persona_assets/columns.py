"""The columns of the landed tables as plain data: what each means, and what it comes from.

A table is named by its Parquet file; an asset that lands one table has columns ``column``, one
that lands several (``multiplicity``, ``vocabulary_leakage``, the tables of ``warehouse``) has
columns ``table.column``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from persona_assets.reporting.comments import COLUMNS

#: What the warehouse does not take, or takes from elsewhere; by ``table.column``.
_BESIDE_THE_WAREHOUSE = {
    "rationales.persona": "Persona that the rationale is written for.",
    "rationales.target_letter": "Letter that the row's turn will end in.",
    "rationales.argues_for": "Letter that the rationale argues for; NULL unless it is written.",
    "rationales.rationale": "The text that goes inside the arm's tag.",
    "rationales.reference_rationale": "The generic_cot rationale of the same question and source; "
    "NULL where there is none that can be used.",
    "rationales.problem": "Why the row enters no dataset; NULL where it does.",
    "training_rows.input_ids": "Token ids of the whole row.",
    "training_rows.loss_start": "Index of the first token that bears loss.",
    "accuracies.correct": "Questions answered correctly.",
    "accuracies.questions": "Questions asked.",
    "predicted_letters.answers": "Answers under this persona and scaffold.",
    "predicted_letters.entropy": "Entropy of the predicted letters, in bits.",
    "predicted_letters.letter": "The letter predicted most often; the first of equals.",
    "predicted_letters.share": "Its share of the answers.",
    "estimates.kind": "contrast, matched, mismatch or exploratory.",
    "estimates.by_seed": "The estimate of each seed alone.",
    "estimates.equivalence": "The registered equivalence tests with their intervals.",
    "vocabulary.unit": "10^9 times the pairs of rationales that one of the integers adds up.",
}


def describe(table: str, column: str) -> str | None:
    """What a column of the table means; None if nobody has said so."""
    name = f"{table}.{column}"
    return _BESIDE_THE_WAREHOUSE.get(name) or COLUMNS.get(name) or COLUMNS.get(column)


def _made(columns: str, *sources: str) -> dict[str, tuple[str, ...]]:
    """Each of the ``columns`` comes from all of the ``sources``."""
    return dict.fromkeys(columns.split(), sources)


def _copied(columns: str, *prefixes: str) -> dict[str, tuple[str, ...]]:
    """Each of the ``columns`` comes from the column of the same name behind each prefix."""
    return {name: tuple(prefix + name for prefix in prefixes) for name in columns.split()}


_ASKED = ("question_bank.text", "question_bank.choices")
_PRESCRIBED = ("question_bank.identity", "question_bank.choices", "question_bank.correct_letter")
_TURN = ("rationales.rationale", "rationales.target_letter")
_CELLS, _BASE = "cell_outcomes.", "baseline_outcomes."
_CELL_KEY = ("source", "arm", "seed")
_ROW = "persona scaffold question_id"
_INTERVAL = "estimate ci_low ci_high std_error p_value"
_COMMON_ESTIMATE = "contrast axis hypothesis scope scheme"

_EVALUATED = {
    **_copied("question_id correct_letter", "question_bank."),
    **_made(
        "predicted_letter letter_logprobs rationale rationale_tokens stop_reason truncated "
        "prompt_sha256",
        *_ASKED,
    ),
    **_made("is_correct", *_ASKED, "question_bank.correct_letter"),
}


def _estimated(*prefixes: str) -> dict[str, tuple[str, ...]]:
    """The columns of estimates from outcome rows of ``prefixes``."""
    answers = [p + column for p in prefixes for column in (*_ROW.split(), "is_correct")]
    return {
        **_made(f"{_INTERVAL} se_ratio seed_sd total by_seed equivalence", *answers),
        **_made("evaluations", *(prefix + "cell" for prefix in prefixes)),
    }


#: Asset → column → the upstream columns whose values it is made from, as ``asset.column``. What is
#: made from the study file, from weights or from a column's mere length has no such source.
LINEAGE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "rationales": {
        **_copied("question_id identity correct_letter", "question_bank."),
        **_made("target_letter argues_for", *_PRESCRIBED),
        **_made("rationale reference_rationale problem", *_ASKED, *_PRESCRIBED[::2]),
    },
    "training_dataset": {
        **_copied("question_id identity correct_letter target_letter", "rationales."),
        **_made("user", *_ASKED),
        **_made("assistant", *_TURN),
        **_made("loss_tokens", *_TURN),
        **_made("input_ids loss_start", *_ASKED, *_TURN),
        **_made("reference_loss_tokens", "rationales.reference_rationale", *_PRESCRIBED),
    },
    "forced_rationales": {
        **_copied("question_id", "question_bank."),
        **_made("rationale problem", *_ASKED, *_PRESCRIBED[::2]),
    },
    "prior_accuracies": {"correct": (*_ASKED, "question_bank.correct_letter")},
    "baseline_outcomes": _EVALUATED,
    "cell_outcomes": _EVALUATED,
    "cell_diagnostics": {
        **_copied("persona scaffold", _CELLS),
        **_made("answers entropy letter share", _CELLS + "predicted_letter"),
    },
    "contrast_estimate": _estimated(_CELLS),
    "exploratory_estimates": _estimated(_CELLS, _BASE),
    "loss_matrix": {
        **_copied("arm scaffold", _CELLS),
        **_made("loss loss_sum", _CELLS + "is_correct", _BASE + "is_correct"),
    },
    "multiplicity": {
        **{
            f"contrasts.{column}": source
            for column, source in _copied(
                f"{_COMMON_ESTIMATE} {_INTERVAL} n_pairs n_resamples", "contrast_estimate."
            ).items()
        },
        "contrasts.p_holm": ("contrast_estimate.p_value",),
        **{
            f"equivalence.{column}": source
            for column, source in {
                **_copied(f"{_COMMON_ESTIMATE} estimate", "contrast_estimate."),
                **_made("margin alpha ci_low ci_high equivalent", "contrast_estimate.equivalence"),
            }.items()
        },
    },
    "vocabulary_leakage": {
        **_made(
            "lexicon.word lexicon.z lexicon.log_odds lexicon.rank lexicon.count_source "
            "lexicon.count_others",
            "training_dataset.assistant",
            *_ASKED,
        ),
        **{
            f"vocabulary_scores.{column}": source
            for column, source in _copied(f"cell {_ROW}", _CELLS, _BASE).items()
        },
        **_made(
            "vocabulary_scores.hits vocabulary_scores.score",
            _CELLS + "rationale",
            _BASE + "rationale",
            "training_dataset.assistant",
        ),
        **_made("vocabulary_scores.words", _CELLS + "rationale", _BASE + "rationale"),
        **_made(
            " ".join(f"vocabulary.{column}" for column in (*_INTERVAL.split(), "total")),
            _CELLS + "rationale",
            _BASE + "rationale",
            "training_dataset.assistant",
        ),
    },
    "number_ledger": {
        **_made(
            "numbers.value",
            "contrast_estimate.estimate",
            "exploratory_estimates.estimate",
            "loss_matrix.loss",
            "vocabulary_leakage.vocabulary.estimate",
            _CELLS + "is_correct",
            _BASE + "is_correct",
        ),
        **{
            f"numbers.{column}": (
                f"contrast_estimate.{column}",
                f"exploratory_estimates.{column}",
                f"vocabulary_leakage.vocabulary.{column}",
            )
            for column in ("number_id", "ci_low", "ci_high", "std_error", "p_value")
        },
        "numbers.p_holm": ("multiplicity.contrasts.p_holm",),
        "numbers.cells": (_CELLS + "cell", _BASE + "cell"),
    },
}

#: Warehouse table → where its columns come from under the same name, as a prefix of them.
_WAREHOUSE = {
    "questions": ("question_bank.",),
    "training_rows": ("training_dataset.",),
    "outcomes": (_CELLS, _BASE),
    "contrasts": ("multiplicity.contrasts.",),
    "equivalence": ("multiplicity.equivalence.",),
    "losses": ("loss_matrix.",),
    "numbers": ("number_ledger.numbers.",),
    "cells": ("number_ledger.cells.",),
    "checks": ("number_ledger.checks.",),
    "exploratory": ("exploratory_estimates.",),
    "lexicon": ("vocabulary_leakage.lexicon.",),
    "vocabulary_scores": ("vocabulary_leakage.vocabulary_scores.",),
    "vocabulary": ("vocabulary_leakage.vocabulary.",),
}
#: Columns of the warehouse that come from columns of other names.
_RENAMED = {
    **_made("training_rows.cell", *(f"training_dataset.{part}" for part in _CELL_KEY)),
    **{
        f"question_losses.{name}": (_CELLS + name,)
        for name in ("cell", *_CELL_KEY, "scaffold", "question_id")
    },
    "question_losses.axis": (_CELLS + "is_source",),
    "question_losses.n_personas": (_CELLS + "persona",),
    "question_losses.loss": (_CELLS + "is_correct", _BASE + "is_correct"),
    **{
        f"{view}.{name}": (_CELLS + name, _BASE + name)
        for view, more in (
            ("predicted_letters", "predicted_letter"),
            ("stop_reasons", "stop_reason"),
        )
        for name in ("cell", *_CELL_KEY, "persona", "scaffold", more)
    },
    **{f"predicted_letters.{n}": (_CELLS + "predicted_letter",) for n in ("n", "share")},
    "stop_reasons.n": (_CELLS + "stop_reason",),
    "stop_reasons.tokens": (_CELLS + "rationale_tokens",),
}


def sources(asset: str, columns: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each of an asset's ``columns`` that has upstream columns, with these (``asset.column``)."""
    declared = LINEAGE.get(asset, {})
    for column in columns:
        if asset == "warehouse":
            table, _, name = column.partition(".")
            same = tuple(prefix + name for prefix in _WAREHOUSE.get(table, ()))
            found = _RENAMED.get(column, same)
        else:
            found = declared.get(column, ())
        if found:
            yield column, found
