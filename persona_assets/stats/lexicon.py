"""Each source's lexicon: the words that its persona-voiced training rationales prefer.

A *word* is a maximal run of word characters (``\\w``: letters, marks, digits, connectors, of any
script) of the lower-cased text: ``Don't`` is ``don`` and ``t``. :func:`words` makes them for
lexicons, and :func:`word_count` counts them for the scores read off lexicons.

Words are ranked by the weighted log-odds ratio with an informative Dirichlet prior (Monroe,
Colaresi & Quinn 2008, "Fightin' Words", Political Analysis 16(4)). The prior is the pooled counts
as they are: a word's mass α_w is its count over all sources, and α_0 their sum, the pooled number
of words, so that the prior weighs as much as all that was observed. A word too rare to tell is
drawn to the sources' common odds: with four sources of one size, one that only a single source
uses passes z = 1.96 from its sixth occurrence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import polars as pl

from persona_assets.evaluation.scaffolds import ANCHOR
from persona_assets.questions.bank import Question, user_message
from persona_assets.study import Cell, Study

#: The arm whose training rationales the lexicons are made from.
LEXICON_ARM = "persona_cot"
MAX_WORDS, MIN_Z = 50, 1.96
_WORD = r"\w+"

#: ``count_source`` and ``count_others`` are occurrences in the rationales of the source, and of the
#: other sources together; ``rank`` starts at 1.
LEXICON_SCHEMA = pl.Schema(
    {
        "source": pl.String,
        "rank": pl.Int64,
        "word": pl.String,
        "z": pl.Float64,
        "log_odds": pl.Float64,
        "count_source": pl.Int64,
        "count_others": pl.Int64,
    }
)

#: One cell's training rows, in memory or scanned; only three columns of it are read.
TrainingRows = pl.DataFrame | pl.LazyFrame


class LexiconError(ValueError):
    """Training rows that no lexicon can be made from; names the cell or source, and the remedy."""


def words(text: pl.Expr) -> pl.Expr:
    """The words of a text column, in order: a list of strings a row."""
    return text.str.to_lowercase().str.extract_all(_WORD)


def word_count(text: pl.Expr, among: Sequence[str] | None = None) -> pl.Expr:
    """How many words a text column holds, or how many of them are among some words; by row."""
    # A run is maximal where it stands between two boundaries: no list of words need be made.
    pattern = _WORD if among is None else rf"\b(?:{'|'.join(among)})\b"
    return text.str.to_lowercase().str.count_matches(pattern).cast(pl.Int32)


def generating_scaffolds(study: Study) -> tuple[str, ...]:
    """The study's scaffolds under which the model writes its own rationale."""
    return tuple(name for name in study.scaffolds if study.scaffold(name).generates)


def undefined_because(study: Study) -> str | None:
    """Why the study has no vocabulary leakage to measure; None where it has."""
    speaking = {cell.source for cell in study.cells if cell.arm == LEXICON_ARM}
    if absent := [source for source in study.sources if source not in speaking]:
        return f"no cell has the arm {LEXICON_ARM} for the source(s) {', '.join(absent)}"
    if len(study.sources) < 2:
        return "a lexicon is what sets one source apart from others, and there is one source only"
    if not generating_scaffolds(study):
        return "under no scaffold does the model write a rationale"
    return None


def lexicon_cells(study: Study) -> tuple[Cell, ...]:
    """The cells whose training rows the lexicons are made from.

    Raises:
        LexiconError: the study has no vocabulary leakage to measure.
    """
    if reason := undefined_because(study):
        raise LexiconError(f"study {study.name} has no vocabulary leakage: {reason}")
    return tuple(cell for cell in study.cells if cell.arm == LEXICON_ARM)


def build_lexicon(
    study: Study, training_by_cell: Mapping[str, TrainingRows], questions: Sequence[Question]
) -> pl.DataFrame:
    """The lexicon of every source: the first 50 words with z > 1.96, by z, then by word.

    The words of the bank (as a prompt shows it, the letters of its choices included), of the tags
    and of the answer line are counted but cannot be ranked: every arm's rationales hold them.

    Args:
        training_by_cell: Training rows by cell key, for every cell of :func:`lexicon_cells`.
            The seeds of a source hold the same texts; that they do is checked.
        questions: The bank, both splits.

    Returns:
        ``LEXICON_SCHEMA``, sources in study order.

    Raises:
        LexiconError: a cell's rows are absent, differ between the seeds of a source or are not in
            the arm's frame; or a source has no word of its own.
    """
    counts = {
        source: Counter(texts.select(words(pl.col("rationale")).explode()).to_series().drop_nulls())
        for source, texts in _rationales(study, training_by_cell).items()
    }
    common = common_words(study, questions)
    rows = []
    for source in study.sources:
        ranked = rank_words(counts, source, common)
        if not ranked:
            raise LexiconError(
                f"no word sets the {LEXICON_ARM} rationales of {source} apart (z > {MIN_Z}): the "
                "vocabulary it could leak is undefined. Have them written in the persona's voice."
            )
        rows += ranked
    return pl.DataFrame(rows, schema=LEXICON_SCHEMA, orient="row")


def rank_words(
    counts: Mapping[str, Counter[str]], source: str, excluded: frozenset[str] = frozenset()
) -> list[tuple[str, int, str, float, float, int, int]]:
    """One source's rows of ``LEXICON_SCHEMA``.

    Args:
        counts: Occurrences of each word, by source.
        source: The source to rank for, against all others together.
        excluded: Words that are not ranked.

    Raises:
        LexiconError: all rationales together hold fewer than two different words.
    """
    pooled = sum(counts.values(), Counter())
    if len(pooled) < 2:
        raise LexiconError("the training rationales hold fewer than two different words")
    mine, n_pooled = counts[source], pooled.total()
    n_mine = mine.total()
    scored = []
    for word in mine.keys() - excluded:
        here, elsewhere = mine[word], pooled[word] - mine[word]
        log_odds, z = weighted_log_odds(
            (here, n_mine), (elsewhere, n_pooled - n_mine), prior=(pooled[word], n_pooled)
        )
        if z > MIN_Z:
            scored.append((-z, word, log_odds, here, elsewhere))
    return [
        (source, rank, word, -minus_z, log_odds, here, elsewhere)
        for rank, (minus_z, word, log_odds, here, elsewhere) in enumerate(
            sorted(scored)[:MAX_WORDS], start=1
        )
    ]


def weighted_log_odds(
    a: tuple[int, int], b: tuple[int, int], prior: tuple[float, float]
) -> tuple[float, float]:
    """A word's log-odds ratio in corpus ``a`` against ``b``, and its z score.

    Each argument is the word's count and the corpus's size, in words; ``prior`` is (α_w, α_0).
    With y + α_w occurrences of n + α_0 in each corpus, the difference of log odds is divided by
    its standard deviation, √(1 / (y_a + α_w) + 1 / (y_b + α_w)).
    """
    alpha, alpha_0 = prior
    (y_a, n_a), (y_b, n_b) = ((y + alpha, n + alpha_0) for y, n in (a, b))
    log_odds = math.log(y_a / (n_a - y_a)) - math.log(y_b / (n_b - y_b))
    return log_odds, log_odds / math.sqrt(1 / y_a + 1 / y_b)


def common_words(study: Study, questions: Sequence[Question]) -> frozenset[str]:
    """The words of the bank's prompts, of the study's tags and of the answer line."""
    scaffolds = [study.scaffold(name) for name in study.scaffolds]
    scaffolds += [study.arm(name).scaffold for name in study.arms]
    texts = [user_message(q) for q in questions] + [s.opening for s in scaffolds] + [ANCHOR]
    found = pl.DataFrame({"text": texts}).select(words(pl.col("text")).explode()).to_series()
    return frozenset(found.drop_nulls())


def _rationales(
    study: Study, training_by_cell: Mapping[str, TrainingRows]
) -> dict[str, pl.DataFrame]:
    """Each source's ``question_id`` and ``rationale``, from any of its seeds: they agree."""
    cells = lexicon_cells(study)
    if absent := [cell.key for cell in cells if cell.key not in training_by_cell]:
        raise LexiconError(
            f"the lexicons need the training rows of {len(absent)} more cell(s): "
            f"{', '.join(absent)}. Make their datasets first."
        )
    found: dict[str, pl.DataFrame] = {}
    for cell in cells:
        texts = _cell_rationales(study, cell, training_by_cell[cell.key])
        if not found.setdefault(cell.source, texts).equals(texts):
            raise LexiconError(
                f"the rationales of {cell.key} differ from those of another seed of {cell.source}, "
                "and a seed is to change their order only. Make both datasets again."
            )
    return found


def _cell_rationales(study: Study, cell: Cell, training: TrainingRows) -> pl.DataFrame:
    scaffold = study.arm(cell.arm).scaffold
    turn = pl.col("assistant")
    ending = pl.concat_str(pl.lit(f"{scaffold.close('')} "), "target_letter")
    rows = (
        training.lazy()
        .select(
            "question_id",
            framed=turn.str.starts_with(scaffold.opening) & turn.str.ends_with(ending),
            rationale=turn.str.strip_prefix(scaffold.opening).str.strip_suffix(ending),
        )
        .sort("question_id")
        .collect()
    )
    faulty = rows.filter(~pl.col("framed").fill_null(False))
    if faulty.height:
        raise LexiconError(
            f"training rows of {cell.key}: {faulty.height} turn(s), first that of question "
            f"{faulty['question_id'][0]}, do not stand in the frame of {cell.arm} "
            f"({scaffold.opening!r} … {scaffold.close('')!r}). Make the dataset again."
        )
    return rows.drop("framed")
