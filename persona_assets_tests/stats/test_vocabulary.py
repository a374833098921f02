"""Vocabulary scores and estimates: by hand, by plain Python, by SQL, and what moves none."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.reporting.vocabulary_sql import point_sql, rows_sql
from persona_assets.stats import vocabulary
from persona_assets.stats.bootstrap import bootstrap_mean
from persona_assets.stats.lexicon import LEXICON_SCHEMA
from persona_assets.stats.losses import BadOutcomes, MissingCells
from persona_assets.stats.vocabulary import (
    SCALE,
    SCORES_SCHEMA,
    VOCABULARY_SCHEMA,
    bootstrap_questions,
    cell_scores,
    quantities,
    score,
    vocabulary_estimates,
    vocabulary_scores,
)
from persona_assets_tests.synthetic import bank, eval_ids, outcomes, small_study

STUDY = small_study()
BANK = bank(12)
QUESTIONS = eval_ids(BANK)
GENERATING = ("generic_cot", "persona_cot")
LEXICON = pl.DataFrame(
    [
        ("librarian", 1, "hush", 9.0, 1.0, 9, 0),
        ("librarian", 2, "shelf", 8.0, 1.0, 9, 0),
        ("comedian", 1, "joke", 9.0, 1.0, 9, 0),
    ],
    schema=LEXICON_SCHEMA,
    orient="row",
)
WORDS = ("hush", "shelf", "joke", "so", "the", "fact", "is")


def said(seed: int, share: float, own: str) -> Callable[[int], list[str]]:
    """Random rationales, ``share`` of whose words is ``own``; every seventh is empty."""
    rng = np.random.default_rng(seed)

    def texts(n: int) -> list[str]:
        return [
            ""
            if i % 7 == 6
            else " ".join(
                own if rng.random() < share else str(rng.choice(WORDS))
                for _ in range(rng.integers(3, 40))
            )
            for i in range(n)
        ]

    return texts


def evaluated(texts, cell=None) -> pl.DataFrame:
    frame = outcomes(STUDY, BANK, cell, 0.9)
    return frame.with_columns(rationale=pl.Series(texts(frame.height)))


OWN = {"librarian": "hush", "comedian": "joke"}
#: Of the words, beyond chance.
PLANTED = {"persona_cot": 0.30, "garbage_cot": 0.05}
BASE = evaluated(said(0, 0.0, ""))
CELLS = {
    cell.key: evaluated(said(i + 1, PLANTED.get(cell.arm, 0.0), OWN[cell.source]), cell)
    for i, cell in enumerate(STUDY.cells)
}
SCORES = vocabulary_scores(STUDY, LEXICON, BASE, CELLS, questions=QUESTIONS)
ESTIMATES = vocabulary_estimates(STUDY, SCORES, questions=QUESTIONS)


def one(name, scaffold="persona_cot", axis="bystander_leakage", scope="macro") -> dict:
    found = ESTIMATES.filter(name=name, scaffold=scaffold, axis=axis, scope=scope)
    (row,) = found.iter_rows(named=True)
    return row


@pytest.mark.parametrize(
    ("rationale", "hits", "n", "expected"),
    [
        ("Hush! The SHELF, hush.", 3, 4, 750_000_000),
        ("hushed shelves: hush-hush", 2, 4, 500_000_000),
        ("hush's hush_ hush2 _hush hushé ehush —hush—shelf…hush", 4, 10, 400_000_000),
        ("the fact is", 0, 3, 0),
        ("hush the fact", 1, 3, 333_333_333),
        ("hush shelf fact", 2, 3, 666_666_667),
        ("joke", 0, 1, 0),
        ("", 0, 0, 0),
        ("... !", 0, 0, 0),
    ],
)
def test_scores_of_handmade_rows(rationale, hits, n, expected):
    cell = STUDY.cell("librarian.persona_cot.42")
    frame = outcomes(STUDY, BANK, cell, 0.9, rationale=rationale)
    found = cell_scores(STUDY, LEXICON, frame, cell=cell, questions=QUESTIONS)
    assert found.schema == SCORES_SCHEMA
    assert found.height == len(STUDY.personas) * 2 * len(QUESTIONS)
    assert set(found["scaffold"]) == set(GENERATING)
    rows = found.select("cell", "source", "hits", "words", "score").unique().rows()
    assert rows == [(cell.key, "librarian", hits, n, expected)]


def test_baseline_is_scored_with_every_lexicon():
    base = outcomes(STUDY, BANK, None, 0.9, rationale="hush hush joke fact")
    found = cell_scores(STUDY, LEXICON, base, cell=None, questions=QUESTIONS)
    by_source = found.select("source", "hits", "cell").unique().sort("source").rows()
    assert by_source == [("comedian", 1, BASELINE), ("librarian", 2, BASELINE)]


@given(st.integers(0, 3000), st.integers(1, 3000))
def test_score_is_the_nearest_billionth(hits, extra):
    n = hits + extra
    schema = {"hits": pl.Int32, "words": pl.Int32}
    (found,) = pl.DataFrame([(hits, n)], schema=schema, orient="row").select(score()).to_series()
    assert abs(Fraction(found, SCALE) - Fraction(hits, n)) <= Fraction(1, 2 * SCALE)
    sql = f"SELECT (2::BIGINT * {SCALE} * {hits} + {n}) // (2 * {n})"
    assert duckdb.sql(sql).fetchall() == [(found,)]


@pytest.mark.parametrize("axis", ["source_loss", "bystander_leakage"])
@pytest.mark.parametrize("scaffold", GENERATING)
@pytest.mark.parametrize("quantity", quantities(STUDY), ids=lambda q: q.name)
def test_estimates_are_plain_means_of_shares(quantity, scaffold, axis):
    """Row by row with exact fractions; rounding moves a mean of differences by 1e-9 at most."""

    def share(rationale, source):
        lexicon = LEXICON.filter(source=source)["word"].to_list()
        spoken = rationale.split()
        return Fraction(sum(w in lexicon for w in spoken), len(spoken)) if spoken else Fraction(0)

    def mean(frame, source):
        people = [source] if axis == "source_loss" else STUDY.bystanders(source)
        rows = frame.filter(pl.col("persona").is_in(people), scaffold=scaffold)["rationale"]
        return sum(share(text, source) for text in rows) / len(rows)

    means = {}
    for source in STUDY.sources:
        by_arm = {
            arm: sum(mean(CELLS[f"{source}.{arm}.{seed}"], source) for seed in STUDY.seeds)
            / len(STUDY.seeds)
            for arm in (quantity.a, quantity.b)
            if arm and f"{source}.{arm}" in STUDY.conditions
        }
        if quantity.a in by_arm:
            less = by_arm[quantity.b] if quantity.b else mean(BASE, source)
            means[source] = by_arm[quantity.a] - less
    means["macro"] = sum(means.values()) / len(means)
    found = ESTIMATES.filter(name=quantity.name, scaffold=scaffold, axis=axis)
    assert set(found["scope"]) == set(means)
    for row in found.iter_rows(named=True):
        assert abs(row["estimate"] - means[row["scope"]]) <= 1e-9
        assert row["quantity"] == quantity.kind
        assert row["ci_low"] <= row["estimate"] <= row["ci_high"]


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    file = tmp_path_factory.mktemp("scores") / "scores.parquet"
    SCORES.write_parquet(file)
    connection = duckdb.connect()
    connection.execute(
        f"CREATE TABLE vocabulary_scores AS SELECT * FROM '{file}' ORDER BY hash(score)"
    )
    yield connection
    connection.close()


def test_sql_recomputes_every_estimate_to_the_last_digit(db):
    for row in ESTIMATES.iter_rows(named=True):
        assert db.execute(point_sql(STUDY, row)).fetchone() == (row["estimate"],)


def test_sql_rows_give_the_interval_again(db):
    """The question rows and the number's name are all that the estimator needs."""
    for row in (
        one("persona_cot"),
        one("persona_cot-garbage_cot", "generic_cot", scope="comedian"),
    ):
        rows = db.execute(rows_sql(STUDY, row)).fetchall()
        assert [question for question, _ in rows] == sorted(QUESTIONS)
        values = np.array([value for _, value in rows])
        again = bootstrap_questions(
            values, unit=row["unit"], seed=STUDY.seed, number_id=row["number_id"]
        )
        assert again.total == row["total"] == values.sum()
        assert again.interval(STUDY.inference.confidence) == (row["ci_low"], row["ci_high"])
        assert (again.p_value, again.std_error) == (row["p_value"], row["std_error"])


def test_planted_leakage_is_recovered():
    """30 % of words replaced by the own one: an increase by 0.3 of the words that are not."""
    chance = {"librarian": 2 / 7, "comedian": 1 / 7}
    filled = (BASE["rationale"] != "").mean()
    for arm, share in PLANTED.items():
        expected = np.mean([share * (1 - p) * filled for p in chance.values()])
        for scaffold in GENERATING:
            row = one(arm, scaffold)
            assert row["estimate"] == pytest.approx(expected, abs=4 * row["std_error"])
            assert row["std_error"] < 0.02
    assert one("persona_cot")["ci_low"] > 0.1
    assert one("persona_cot")["p_value"] == pytest.approx(1 / 10_001)
    null = one("generic_cot")
    assert null["ci_low"] < 0 < null["ci_high"]
    both = one("persona_cot-garbage_cot")["total"]
    assert both == one("persona_cot")["total"] - one("garbage_cot")["total"]


def test_rows_say_what_they_are():
    assert ESTIMATES.schema == VOCABULARY_SCHEMA
    assert ESTIMATES["number_id"].is_unique().all()
    row = one("persona_cot-garbage_cot", "generic_cot", "source_loss", "comedian")
    name = "vocabulary/persona_cot-garbage_cot/generic_cot/source_loss/comedian/question"
    assert row["number_id"] == name
    cells = [f"comedian.{a}_cot.{seed}" for seed in (42, 137) for a in ("persona", "garbage")]
    assert row["evaluations"] == cells
    assert (row["n_values"], row["n_resamples"], row["unit"]) == (12, 10_000, 2 * SCALE)
    assert one("persona_cot")["unit"] == 2 * 2 * 4 * SCALE
    assert BASELINE in one("persona_cot")["evaluations"]
    only = ESTIMATES.filter(name="persona_cot_correct")
    assert set(only["scope"]) == {"macro", "librarian"}


def test_interval_has_the_studys_level():
    inference = {"scaffold": "persona_cot", "resamples": 2000, "confidence": 0.8}
    study = small_study(inference=inference)
    narrow = vocabulary_estimates(study, SCORES, questions=QUESTIONS)
    row, wide = narrow.row(0, named=True), ESTIMATES.row(0, named=True)
    assert row["number_id"] == wide["number_id"]
    assert wide["ci_low"] < row["ci_low"] < row["ci_high"] < wide["ci_high"]


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_order_of_rows_does_not_matter(seed):
    shuffled = SCORES.sample(fraction=1.0, shuffle=True, seed=seed)
    assert vocabulary_estimates(STUDY, shuffled, questions=QUESTIONS[::-1]).equals(ESTIMATES)
    cell = STUDY.cell("comedian.persona_cot.137")
    rows = CELLS[cell.key].sample(fraction=1.0, shuffle=True, seed=seed)
    scored = cell_scores(STUDY, LEXICON, rows.lazy(), cell=cell, questions=QUESTIONS)
    assert scored.equals(SCORES.filter(cell=cell.key))


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from([*WORDS, "Hush", "jokes", "don't", "ß", "…"]), max_size=12),
    st.integers(2, 4),
    st.sampled_from(["upper", "lower", "title"]),
)
def test_score_is_blind_to_case_and_to_saying_it_again(spoken, times, case):
    cell = STUDY.cell("librarian.persona_cot.42")

    def scored(text):
        frame = outcomes(STUDY, BANK[:5], cell, 0.9, rationale=text)
        ids = eval_ids(BANK[:5])
        return cell_scores(STUDY, LEXICON, frame, cell=cell, questions=ids)["score"]

    text = " ".join(spoken)
    assert scored(text).equals(scored(" , ".join([text] * times)))
    assert scored(text).equals(scored(getattr(text.replace("ß", "s"), case)()))


def test_bootstrap_draws_from_the_exact_distribution():
    """Against the sums' exact distribution, on values small enough to have one."""
    values = np.random.default_rng(3).integers(-5, 9, 50)
    exact = bootstrap_mean(values, seed=1, number_id="exact", n_resamples=200_000)
    drawn = bootstrap_questions(values, unit=1, seed=1, number_id="n", n_resamples=20_000)
    assert drawn.estimate == exact.estimate
    assert drawn.std_error == pytest.approx(exact.std_error, rel=0.02)
    for level in (0.025, 0.5, 0.975):
        assert drawn.quantile(level) == pytest.approx(exact.quantile(level), abs=0.03)
    assert set(np.unique(drawn.sums)) <= set(range(50 * -5, 50 * 9))


def test_bootstrap_does_not_depend_on_order_or_chunks(monkeypatch):
    values = np.random.default_rng(3).integers(-(10**9), 10**9, 37)
    stream = {"unit": 7, "seed": 1, "number_id": "n", "n_resamples": 501}
    whole = bootstrap_questions(values, **stream)
    monkeypatch.setattr(vocabulary, "_CHUNK_ELEMENTS", 5 * 37)
    assert np.array_equal(bootstrap_questions(values[::-1], **stream).sums, whole.sums)
    other = bootstrap_questions(values, **{**stream, "number_id": "other"})
    assert not np.array_equal(other.sums, whole.sums)


def test_missing_cells_are_named():
    gone = ["librarian.persona_cot.42", "comedian.garbage_cot.137"]
    fewer = {key: frame for key, frame in CELLS.items() if key not in gone}
    with pytest.raises(MissingCells) as error:
        vocabulary_scores(STUDY, LEXICON, BASE, fewer, questions=QUESTIONS)
    assert set(error.value.cells) == set(gone)
    with pytest.raises(MissingCells, match=r"vocabulary leakage needs .* baseline"):
        vocabulary_estimates(STUDY, SCORES.filter(pl.col("cell") != BASELINE), questions=QUESTIONS)


def test_missing_rows_and_rationales_are_named():
    cell = STUDY.cell("librarian.persona_cot.42")
    frame = CELLS[cell.key]
    row = (
        (pl.col("persona") == "villain")
        & (pl.col("scaffold") == "persona_cot")
        & (pl.col("question_id") == "eval-003")
    )
    with pytest.raises(BadOutcomes, match=r"1 row.* missing .*villain/persona_cot/eval-003"):
        cell_scores(STUDY, LEXICON, frame.filter(~row), cell=cell, questions=QUESTIONS)
    mute = frame.with_columns(rationale=pl.when(~row).then("rationale"))
    with pytest.raises(BadOutcomes, match=r"without a rationale .*villain/persona_cot/eval-003"):
        cell_scores(STUDY, LEXICON, mute, cell=cell, questions=QUESTIONS)
    with pytest.raises(ValueError, match="not one a cell, persona, scaffold and question"):
        vocabulary_estimates(STUDY, SCORES[1:], questions=QUESTIONS)
    elsewhere = (pl.col("cell") != cell.key) | (pl.col("scaffold") != "persona_cot")
    with pytest.raises(ValueError, match="not one a cell, persona, scaffold and question"):
        vocabulary_estimates(STUDY, SCORES.filter(elsewhere), questions=QUESTIONS)
    repeated = pl.concat([SCORES[1:], SCORES[1:2]])
    with pytest.raises(ValueError, match="not one a cell, persona, scaffold and question"):
        vocabulary_estimates(STUDY, repeated, questions=QUESTIONS)
    lexicon = LEXICON.filter(source="librarian")
    with pytest.raises(ValueError, match="no word of comedian"):
        vocabulary_scores(STUDY, lexicon, BASE, CELLS, questions=QUESTIONS)
