"""Vocabulary leakage: how much more of a source's lexicon a trained model says than the base.

A rationale's score is the share of its words that are in the source's lexicon; one without a word
scores 0 and counts like any other. A cell's rationales are scored with its own source's lexicon,
the baseline's with every source's. On an axis, a question's value is the sum over the axis's
personas, the sources and their seeds, of score(cell) − score(baseline) for the *increase* of an
arm, and of score(cell of a) − score(cell of b) for a *contrast* (the baseline cancels).

Scores are integers, in billionths, rounded half up: (2·10⁹·hits + words) // (2·words). A mean of
differences is then one division of integers, which SQL repeats to the last digit in whatever order
it adds (exact while the sum is below 2⁵³: nine million rationales of nothing but lexicon words),
and which is within 10⁻⁹ of the mean of the unrounded shares.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl

from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.stats.bootstrap import BootstrapMean, random_stream
from persona_assets.stats.estimands import MACRO
from persona_assets.stats.lexicon import generating_scaffolds, word_count
from persona_assets.stats.losses import (
    AXES,
    BadOutcomes,
    Integers,
    MissingCells,
    Outcomes,
    axis_size,
    correct_array,
)
from persona_assets.study import Cell, Study
from persona_assets.study_schema import Axis

#: A score of 1: every word is in the lexicon.
SCALE = 10**9
RESAMPLES = 10_000
#: The only scheme: scores recur over sources and seeds as the questions do.
SCHEME = "question"

#: One row a rationale and lexicon: ``source`` is whose lexicon. The baseline has a row a source.
SCORES_SCHEMA = pl.Schema(
    {
        **dict.fromkeys(("cell", "source", "persona", "scaffold", "question_id"), pl.String),
        "hits": pl.Int32,
        "words": pl.Int32,
        "score": pl.Int64,
    }
)
#: ``quantity`` is ``increase`` (``name`` an arm) or ``contrast`` (``name`` is ``a-b``).
#: ``estimate`` = ``total`` / (``n_values`` · ``unit``), a share of a rationale's words: ``total``
#: sums the ``n_values`` integers that are resampled, one a question, and ``unit`` is 10⁹ times the
#: pairs of rationales that one of them adds up. ``evaluations`` are the cells that define the
#: number, and ``baseline`` where it enters.
VOCABULARY_SCHEMA = pl.Schema(
    {
        **dict.fromkeys(("number_id", "quantity", "name", "scaffold", "axis", "scope"), pl.String),
        **dict.fromkeys(("estimate", "ci_low", "ci_high", "std_error", "p_value"), pl.Float64),
        **dict.fromkeys(("total", "n_values", "unit", "n_resamples"), pl.Int64),
        "evaluations": pl.List(pl.String),
    }
)

#: Draws held at a time, as many as a core's cache holds; the stream does not depend on it.
_CHUNK_ELEMENTS = 1 << 16
_ROW = ("persona", "scaffold", "question_id")


def vocabulary_scores(
    study: Study,
    lexicon: pl.DataFrame,
    baseline: Outcomes,
    outcomes_by_cell: Mapping[str, Outcomes],
    *,
    questions: Sequence[str],
) -> pl.DataFrame:
    """Every rationale's score under the generating scaffolds, cell by cell.

    Args:
        lexicon: ``LEXICON_SCHEMA`` with every source.
        baseline: The untrained model's outcome rows.
        outcomes_by_cell: Outcome rows of every cell by key; scanned ones are read one at a time.
        questions: The ids of the bank's evaluation questions.

    Returns:
        ``SCORES_SCHEMA``: the baseline's rows, then the cells' in grid order.

    Raises:
        MissingCells, BadOutcomes: anything but exactly the grid's rows, each with a rationale.
        ValueError: the lexicon lacks a source.
    """
    _require([cell.key for cell in study.cells], outcomes_by_cell)
    cells: list[tuple[Cell | None, Outcomes]] = [(None, baseline)]
    cells += [(cell, outcomes_by_cell[cell.key]) for cell in study.cells]
    return pl.concat(
        cell_scores(study, lexicon, rows, cell=cell, questions=questions) for cell, rows in cells
    )


def cell_scores(
    study: Study,
    lexicon: pl.DataFrame,
    outcomes: Outcomes,
    *,
    cell: Cell | None,
    questions: Sequence[str],
) -> pl.DataFrame:
    """One cell's part of :func:`vocabulary_scores`; the baseline's for None."""
    key = cell.key if cell else BASELINE
    scaffolds = generating_scaffolds(study)
    # Raises unless the rows are exactly the grid's.
    correct_array(study, outcomes, cell=key, scaffolds=scaffolds, questions=questions)
    said = pl.col("rationale")
    sources = [cell.source] if cell else study.sources
    rows = (
        outcomes.lazy()
        .filter(pl.col("scaffold").is_in(scaffolds))
        .select(
            *_ROW,
            words=word_count(said),
            **{f"hits {s}": word_count(said, _words_of(lexicon, s)) for s in sources},
        )
        .sort(_ROW)
        .collect()
    )
    mute = rows.filter(pl.col("words").is_null())
    if mute.height:
        remedy = "Evaluate the cell again."
        raise BadOutcomes(key, "without a rationale", mute.select(_ROW).rows(), remedy)
    scored = [
        rows.select(
            *_ROW, "words", cell=pl.lit(key), source=pl.lit(source), hits=f"hits {source}"
        ).with_columns(score=score())
        for source in sources
    ]
    return pl.concat(scored).select(SCORES_SCHEMA.names())


def score() -> pl.Expr:
    """The score of a row with ``hits`` and ``words``: their ratio in billionths, 0 of 0 words."""
    hits, n = pl.col("hits").cast(pl.Int64), pl.col("words").cast(pl.Int64)
    return pl.when(n > 0).then((2 * SCALE * hits + n) // (2 * n)).otherwise(0)


def _words_of(lexicon: pl.DataFrame, source: str) -> list[str]:
    found = lexicon.filter(source=source)["word"].to_list()
    if not found:
        raise ValueError(f"the lexicon holds no word of {source}: make it for every source")
    return found


@dataclass(frozen=True, slots=True)
class Quantity:
    """Arm ``a`` less arm ``b``, or less the baseline: what is estimated, axis by axis."""

    a: str
    b: str | None = None

    @property
    def kind(self) -> str:
        """``increase`` (over the baseline) or ``contrast`` (of two arms)."""
        return "increase" if self.b is None else "contrast"

    @property
    def name(self) -> str:
        """The arm, or ``a-b``."""
        return self.a if self.b is None else f"{self.a}-{self.b}"

    def sources(self, study: Study) -> tuple[str, ...]:
        """The sources that enter, in study order: those that both arms have."""
        return study.shared_sources(self.a, self.b or self.a)

    def pairs(self, study: Study, sources: Sequence[str]) -> list[tuple[str, str, str]]:
        """Source and the two cells that are compared (the second may be the baseline)."""
        arms = {(cell.source, cell.arm, cell.seed): cell.key for cell in study.cells}
        return [
            (s, arms[s, self.a, seed], arms[s, self.b, seed] if self.b else BASELINE)
            for s in sources
            for seed in study.seeds
        ]


def quantities(study: Study) -> tuple[Quantity, ...]:
    """The increase of every arm, then each registered pair of arms once."""
    pairs = dict.fromkeys((contrast.a, contrast.b) for contrast in study.contrast_list)
    return (*(Quantity(arm) for arm in study.arms), *(Quantity(a, b) for a, b in pairs))


def vocabulary_estimates(
    study: Study, scores: pl.DataFrame, *, questions: Sequence[str]
) -> pl.DataFrame:
    """Increases of every arm and contrasts of every registered pair of arms.

    Under each generating scaffold, on both axes (``source_loss`` is the source persona itself: a
    check that the lexicon measures what was trained), macro and by source, with percentile
    intervals of the study's confidence over resampled questions. None is in the registered family.

    Args:
        scores: :func:`vocabulary_scores`, in any order of rows.
        questions: The ids of the bank's evaluation questions.

    Returns:
        ``VOCABULARY_SCHEMA``.

    Raises:
        MissingCells: a cell of the grid, or the baseline, has no scores.
        ValueError: scores that are not one a persona, scaffold and question.
    """
    sums = _axis_sums(study, scores, questions)
    rows = [
        _estimate(study, sums, quantity, scaffold, axis, scope)
        for scaffold in generating_scaffolds(study)
        for axis in AXES
        for quantity in quantities(study)
        for scope in (MACRO, *quantity.sources(study))
    ]
    return pl.DataFrame(rows, schema=VOCABULARY_SCHEMA, orient="row")


def _estimate(
    study: Study,
    sums: Mapping[_Block, Integers],
    quantity: Quantity,
    scaffold: str,
    axis: Axis,
    scope: str,
) -> dict[str, object]:
    """One row of ``VOCABULARY_SCHEMA``."""
    pairs = quantity.pairs(study, quantity.sources(study) if scope == MACRO else [scope])
    values = sum(
        sums[_Block(a, source, scaffold, axis)] - sums[_Block(b, source, scaffold, axis)]
        for source, a, b in pairs
    )
    number_id = f"vocabulary/{quantity.name}/{scaffold}/{axis}/{scope}/{SCHEME}"
    unit = len(pairs) * axis_size(study, axis) * SCALE
    result = bootstrap_questions(values, unit=unit, seed=study.seed, number_id=number_id)
    low, high = result.interval(study.inference.confidence)
    return {
        "number_id": number_id,
        "quantity": quantity.kind,
        "name": quantity.name,
        "scaffold": scaffold,
        "axis": axis,
        "scope": scope,
        "estimate": result.estimate,
        "ci_low": low,
        "ci_high": high,
        "std_error": result.std_error,
        "p_value": result.p_value,
        "total": result.total,
        "n_values": result.n,
        "unit": unit,
        "n_resamples": result.n_resamples,
        "evaluations": list(dict.fromkeys(key for _, *keys in pairs for key in keys)),
    }


class _Block(NamedTuple):
    """Whose scores, with which source's lexicon, are summed over an axis."""

    cell: str
    source: str
    scaffold: str
    axis: Axis


def _axis_sums(
    study: Study, scores: pl.DataFrame, questions: Sequence[str]
) -> dict[_Block, Integers]:
    """Scores summed over the axis's personas: an array (questions,) by id, for each block."""
    evaluated = [BASELINE, *(cell.key for cell in study.cells)]
    _require(evaluated, scores["cell"].unique().to_list())
    n_lexicons = len(study.cells) + len(study.sources)
    n_rows = n_lexicons * len(generating_scaffolds(study)) * len(study.personas) * len(questions)
    source, bystander = AXES
    own = pl.col("persona") == pl.col("source")
    sums = (
        scores.lazy()
        .with_columns(axis=pl.when(own).then(pl.lit(source)).otherwise(pl.lit(bystander)))
        .group_by(*_Block._fields, "question_id")
        .agg(pl.sum("score"), n_personas=pl.len())
        .sort(*_Block._fields, "question_id")
        .collect()
    )
    blocks = sums.select(_Block._fields).unique(maintain_order=True)
    asked = pl.Series("question_id", sorted(questions) * blocks.height, dtype=pl.String)
    sizes = {axis: axis_size(study, axis) for axis in AXES}
    whole = (sums["n_personas"] == sums["axis"].replace_strict(sizes)).all()
    if scores.height != n_rows or not (whole and sums["question_id"].equals(asked)):
        raise ValueError(
            f"{scores.height} vocabulary scores are not one a cell, persona, scaffold and question "
            f"of the grid ({n_rows}): score the outcomes again"
        )
    values = sums["score"].to_numpy().reshape(blocks.height, len(questions))
    return {_Block(*key): row for key, row in zip(blocks.rows(), values, strict=True)}


def bootstrap_questions(
    values: Integers, *, unit: int, seed: int, number_id: str, n_resamples: int = RESAMPLES
) -> BootstrapMean:
    """Bootstrap the mean of ``values / unit`` by drawing values.

    The distribution that ``bootstrap.bootstrap_mean`` draws sums from, for values whose possible
    sums are too many to list. Their order does not matter, down to the last bit.

    Args:
        values: Integers, shape (questions,).
        unit: Positive integer divisor of every value.
        seed: The study's seed.
        number_id: With the seed, fixes the random stream.
        n_resamples: B.
    """
    ordered, n = np.sort(values), len(values)
    rng = random_stream(seed, number_id)
    rows = max(1, _CHUNK_ELEMENTS // n)
    sums = [
        ordered.take(rng.integers(0, n, size=(min(rows, n_resamples - start), n))).sum(axis=1)
        for start in range(0, n_resamples, rows)
    ]
    return BootstrapMean(int(ordered.sum()), n, unit, np.sort(np.concatenate(sums)))


def _require(wanted: Iterable[str], given: Container[str]) -> None:
    if missing := [key for key in wanted if key not in given]:
        raise MissingCells(missing, "vocabulary leakage")
