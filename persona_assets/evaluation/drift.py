"""The accuracies that an earlier experiment kept of its cells, and ours of the same cells again.

The earlier rig kept averages only, its answer reader knew the letters A to D alone, and its prompt
ended in another anchor. So the comparison is of counts, on the questions it could read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from persona_assets.audit import Audit, Distribution, audit
from persona_assets.evaluation.scaffolds import ANCHOR
from persona_assets.hashing import sha256_file
from persona_assets.questions.bank import Question

#: What an earlier experiment kept: correct answers of ``questions`` asked, one row a cell × persona
#: × scaffold, under this project's names.
PRIOR_ACCURACIES = pl.Schema(
    {
        "cell": pl.String,
        "persona": pl.String,
        "scaffold": pl.String,
        "correct": pl.Int64,
        "questions": pl.Int64,
    }
)

#: The table's names of the scaffolds, and ours.
SCAFFOLD_NAMES = {
    "no-cot": "no_cot",
    "generic-cot": "generic_cot",
    "persona-cot": "persona_cot",
    "empty-persona-cot-eval": "empty_persona_cot",
}
#: What is known to differ between the published table's protocol and ours.
PUBLISHED_CHANGES = (
    f"its prompts ended in {ANCHOR + ' '!r} and scored the bare letter, here they end in "
    f"{ANCHOR!r} and the letter comes with its space",
    "its reader counted every question labelled 1 to 4 as wrong: these are left out",
)

_KEY = "persona / arm / scaffold / source / seed"
#: How far a published accuracy times its questions may be from a whole number: what is left of a
#: double's 16 digits after a mean over some thousand questions, with room to spare.
_ROUNDING = 1e-6
_MOST_QUESTIONS = 1_000_000
_SEED = re.compile(r"0|[1-9][0-9]{0,9}")
_SHOWN = 20


class PriorTableError(ValueError):
    """A table of earlier results that cannot be used; names file, key and remedy."""


def read_prior_table(path: Path, sha256: str | None = None) -> pl.DataFrame:
    """Read the earlier experiment's result table.

    A JSON object; ``accuracy_table`` maps ``"persona / arm / scaffold / source / seed"`` to the
    accuracy over ``baseline_metadata.n_questions`` questions. Other fields are not read.

    Args:
        path: The file.
        sha256: What its content must hash to; None for any.

    Returns:
        Columns :data:`PRIOR_ACCURACIES`, in the file's order, accuracies as whole counts.

    Raises:
        PriorTableError: the file is missing, is another than pinned, or is no such table.
    """
    try:
        found, text = sha256_file(path), path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _error(path, "file", f"cannot be read ({error})", "Name a UTF-8 file.") from error
    if sha256 not in (None, found):
        what = f"has the hash {found}, and the pinned one is {sha256}"
        raise _error(path, "file", what, "Fetch the pinned file, or pin this one.")
    try:
        raw = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise _error(
            path, "file", f"is no JSON ({error})", "Mend it, or fetch it again."
        ) from error
    questions = _field(path, raw, "baseline_metadata", "n_questions")
    if type(questions) is not int or not 1 <= questions <= _MOST_QUESTIONS:
        raise _error(
            path,
            "baseline_metadata.n_questions",
            f"is {questions!r}",
            f"Give the number of questions averaged over, 1 to {_MOST_QUESTIONS}.",
        )
    table = _field(path, raw, "accuracy_table")
    if not isinstance(table, dict) or not table:
        raise _error(path, "accuracy_table", "holds no entries", f"Map {_KEY!r} to accuracies.")
    rows = [
        (*_place(path, key), _whole(path, key, accuracy, questions), questions)
        for key, accuracy in table.items()
    ]
    return pl.DataFrame(rows, schema=PRIOR_ACCURACIES, orient="row")


def letter_labelled(questions: Iterable[Question]) -> list[str]:
    """The ids of the questions that were published with letters, which the earlier reader knew."""
    return [q.id for q in questions if all(label.isalpha() for label in q.published_labels)]


def drift_table(
    frame: pl.DataFrame, prior: pl.DataFrame, readable: Collection[str]
) -> pl.DataFrame:
    """A cell's counts of correct answers now and then, on the same questions.

    Args:
        frame: The cell's outcome rows (``outcomes.SCHEMA``).
        prior: What the earlier experiment kept of it: persona, scaffold, correct (and more).
        readable: Ids of the questions that the earlier reader could count as correct; all its
            correct answers are of these.

    Returns:
        One row a persona × scaffold that both have, in the order of ``frame``: persona, scaffold,
        questions (of ``readable``, asked again), before, now (correct answers to these), and
        difference (now − before, as a share of these questions).
    """
    kept = prior.select("persona", "scaffold", before="correct")
    counts = (
        frame.filter(pl.col("question_id").is_in(list(readable)))
        .group_by("persona", "scaffold", maintain_order=True)
        .agg(
            pl.len().cast(pl.Int64).alias("questions"),
            pl.col("is_correct").sum().cast(pl.Int64).alias("now"),
        )
    )
    return (
        counts.join(kept, on=["persona", "scaffold"], maintain_order="left")
        .select("persona", "scaffold", "questions", "before", "now")
        .with_columns(
            ((pl.col("now") - pl.col("before")) / pl.col("questions")).alias("difference")
        )
    )


def drift_audit(
    frame: pl.DataFrame,
    prior: pl.DataFrame,
    *,
    tolerance: float,
    readable: Collection[str],
    changes: Sequence[str] = (),
) -> Audit:
    """``drift``: whether a carry-over cell, evaluated again, is as right as it was.

    A warning: what moved is the rig or the protocol between the two experiments, and numbers of
    the one must not be set beside numbers of the other without saying so.

    Args:
        frame: The cell's outcome rows.
        prior: The table's rows of this cell (``PRIOR_ACCURACIES``, with or without ``cell``).
        tolerance: Largest difference of accuracies allowed, in any persona × scaffold.
        readable: Ids of the questions that the earlier reader could count as correct
            (:func:`letter_labelled` for the published table).
        changes: What is known to differ between the two protocols.
    """
    cell, asked = frame["cell"][0], frame["question_id"].n_unique()
    threshold = f"at most {tolerance:g} in each persona × scaffold"
    remedy = " ".join(
        [
            "Compare engine versions, prompts and letters of the two evaluations before setting "
            "their numbers side by side.",
            *(f"Known to differ: {change}." for change in changes),
        ]
    )

    def unverifiable(why: str) -> Audit:
        return Audit("drift", "unverifiable", f"{cell}: {why}", threshold, remedy, blocking=False)

    table = drift_table(frame, prior, readable)
    if table.is_empty():
        return unverifiable("the earlier table has none of its personas and scaffolds")
    if others := sorted(set(prior["questions"]) - {asked}):
        return unverifiable(f"asked {asked} questions, the earlier table's are of {others}")
    beyond_all = table.filter(pl.col("before") > pl.col("questions"))
    if not beyond_all.is_empty():
        row = beyond_all.row(0, named=True)
        return unverifiable(
            f"{row['persona']}/{row['scaffold']} had {row['before']} correct answers, and only "
            f"{row['questions']} questions that could be counted as such"
        )
    moved = (pl.col("now") - pl.col("before")).abs()
    off = table.filter(moved > tolerance * pl.col("questions") + _ROUNDING)
    worst_first = table.sort(pl.col("difference").abs(), descending=True, maintain_order=True)
    worst = worst_first.row(0, named=True)
    return audit(
        "drift",
        off.is_empty(),
        observed=f"{cell}: accuracy differs by at most {abs(worst['difference']):.4f} "
        f"({worst['persona']}/{worst['scaffold']}: {worst['now']} correct, {worst['before']} "
        f"before, of {worst['questions']}), by {table['difference'].abs().mean():.4f} in the mean; "
        f"{off.height} of {table.height} persona × scaffolds beyond tolerance",
        threshold=threshold,
        remedy=remedy,
        blocking=False,
        distribution=_differences(table["difference"], tolerance),
        mean_difference=table["difference"].mean(),
        questions_left_out=asked - worst["questions"],
        not_in_the_table=frame.select("persona", "scaffold").n_unique() - table.height,
        worst=worst_first.head(_SHOWN).to_dicts(),
    )


def _differences(values: pl.Series, tolerance: float) -> Distribution:
    """Bins about 0, wide enough for the tolerance and the largest difference."""
    reach = max(1.25 * tolerance, float(values.abs().max()), 0.01)
    edges = np.linspace(-reach, reach, 22)
    return Distribution(
        title="accuracy now less accuracy then, by persona and scaffold",
        axis="difference in accuracy",
        counted="persona × scaffolds",
        bins=edges.tolist(),
        series={"persona × scaffolds": np.histogram(values, edges)[0].tolist()},
        limits=[-tolerance, tolerance] if tolerance else [0.0],
        limits_of="each",
    )


def _place(path: Path, key: str) -> tuple[str, str, str]:
    """(cell, persona, scaffold), under this project's names, of a key of the table."""
    at, parts = f"accuracy_table[{key!r}]", key.split(" / ")
    if len(parts) != 5 or not all(part and part == part.strip() for part in parts):
        raise _error(path, at, "is no such key", f"Write it as {_KEY!r}.")
    persona, arm, scaffold, source, seed = parts
    if scaffold not in SCAFFOLD_NAMES:
        known = ", ".join(SCAFFOLD_NAMES)
        raise _error(path, at, f"has the scaffold {scaffold!r}", f"Use one of {known}.")
    if not _SEED.fullmatch(seed):
        raise _error(
            path, at, f"has the seed {seed!r}", "Write a whole number, without zeros first."
        )
    return f"{source}.{arm}.{seed}", persona, SCAFFOLD_NAMES[scaffold]


def _whole(path: Path, key: str, accuracy: Any, questions: int) -> int:
    """The count of correct answers that an accuracy is the mean of."""
    at = f"accuracy_table[{key!r}]"
    if type(accuracy) not in (int, float) or not 0 <= accuracy <= 1:
        raise _error(path, at, f"is {accuracy!r}", "Give the share of correct answers, 0 to 1.")
    count = round(accuracy * questions)
    if not math.isclose(accuracy * questions, count, abs_tol=_ROUNDING, rel_tol=0):
        raise _error(
            path,
            at,
            f"is {accuracy!r}, {accuracy * questions:.6f} of {questions} questions and so no count",
            "Mend the accuracy, or baseline_metadata.n_questions.",
        )
    return count


def _field(path: Path, raw: Any, *names: str) -> Any:
    for name in names:
        if not isinstance(raw, dict) or name not in raw:
            raise _error(
                path, ".".join(names), "is missing", "Name a table of the earlier experiment."
            )
        raw = raw[name]
    return raw


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        repeated = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the key {repeated!r} occurs twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _error(path: Path, key: str, what: str, remedy: str) -> PriorTableError:
    return PriorTableError(f"{path}: {key}: {what}. {remedy}")
