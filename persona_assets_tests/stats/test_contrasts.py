"""Outcome rows to estimates: the arithmetic, the guard against missing rows, the family."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_assets.stats.contrasts import (
    CONTRASTS_SCHEMA,
    EQUIVALENCE_SCHEMA,
    ESTIMATES_SCHEMA,
    LOSSES_SCHEMA,
    MACRO,
    estimate_contrast,
    loss_matrix,
    multiplicity_table,
)
from persona_assets.stats.estimands import registered
from persona_assets.stats.estimates import bootstrap, estimate_exploratory, samples
from persona_assets.stats.losses import Answers, MissingCells
from persona_assets_tests.synthetic import bank, eval_ids, outcomes, small_study, study_outcomes

STUDY = small_study()
BANK = bank(40)
QUESTIONS = eval_ids(BANK)
BASELINE, CELLS = study_outcomes(STUDY, BANK)
PERSONA_SOURCE = STUDY.contrast("persona_cot-garbage_cot.source_loss")
PERSONA_BYSTANDER = STUDY.contrast("persona_cot-garbage_cot.bystander_leakage")
BYSTANDER_TABLE = estimate_contrast(STUDY, PERSONA_BYSTANDER, CELLS, questions=QUESTIONS)


def answers(cells) -> Answers:
    return Answers(STUDY, cells, questions=QUESTIONS, scaffolds=["persona_cot"])


def accuracy(cell: str, personas: list[str]) -> pl.Expr:
    return CELLS[cell].filter(pl.col("persona").is_in(personas), scaffold="persona_cot")


@pytest.mark.parametrize("contrast", STUDY.contrast_list, ids=lambda c: c.key)
def test_macro_estimate_is_the_difference_of_mean_losses(contrast):
    """Against losses over the baseline, row by row in plain Python: the baseline cancels."""
    base = {
        (r["persona"], r["question_id"]): r["is_correct"]
        for r in BASELINE.filter(scaffold="persona_cot").iter_rows(named=True)
    }
    sums = {contrast.a: 0, contrast.b: 0}
    n = 0
    for source, seed in itertools.product(STUDY.sources, STUDY.seeds):
        people = [source] if contrast.axis == "source_loss" else STUDY.bystanders(source)
        for arm in sums:
            rows = accuracy(f"{source}.{arm}.{seed}", people)
            for r in rows.iter_rows(named=True):
                sums[arm] += base[r["persona"], r["question_id"]] - r["is_correct"]
                n += 1
    expected = (sums[contrast.a] - sums[contrast.b]) / (n // 2)
    table = estimate_contrast(STUDY, contrast, CELLS, questions=QUESTIONS)
    assert table.schema == ESTIMATES_SCHEMA
    macro = table.filter(scope=MACRO)
    assert macro["estimate"].to_list() == [expected, expected]
    assert macro["scheme"].to_list() == ["pairs", "question"]
    assert macro["n_pairs"].to_list() == [2 * 2 * 40] * 2


def test_planted_effect_is_recovered():
    """persona_cot is right in 0.4 of source rows where garbage_cot is in 0.9."""
    table = estimate_contrast(STUDY, PERSONA_SOURCE, CELLS, questions=QUESTIONS)
    macro = table.filter(scope=MACRO, scheme="question").row(0, named=True)
    assert macro["ci_low"] < 0.5 < macro["ci_high"]
    assert macro["p_value"] == pytest.approx(1 / 2001)
    assert set(table["scope"]) == {MACRO, "librarian", "comedian"}


@pytest.mark.parametrize(("confidence", "tail"), [(0.95, 0.025), (0.8, 0.1)])
def test_interval_has_the_registered_level(confidence, tail):
    """Percentiles of the same named stream's resampled sums, taken here."""
    inference = {"scaffold": "persona_cot", "resamples": 2000, "confidence": confidence}
    study = small_study(inference=inference)
    table = estimate_contrast(study, PERSONA_BYSTANDER, CELLS, questions=QUESTIONS)
    macro = next(samples(study, registered(study, PERSONA_BYSTANDER), answers(CELLS)))
    for scheme in ("pairs", "question"):
        sums = bootstrap(study, macro, scheme).sums
        low, high = np.quantile(sums, [tail, 1 - tail]) / (macro.values.size * 4)
        (row,) = table.filter(scope=MACRO, scheme=scheme).iter_rows(named=True)
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high))


def test_identical_arms_differ_by_exactly_nothing():
    contrast = STUDY.contrast("generic_cot-garbage_cot.bystander_leakage")
    same = {cell.key: outcomes(STUDY, BANK, cell, 0.7) for cell in STUDY.contrast_cells(contrast)}
    table = estimate_contrast(STUDY, contrast, same, questions=QUESTIONS)
    assert table["estimate"].to_list() == [0.0] * 6
    assert table["p_value"].to_list() == [1.0] * 6


def test_question_scheme_sees_that_seeds_repeat_questions():
    """With identical seeds and sources the pairs' error is too small by the square root of 4."""
    study = small_study(inference={"scaffold": "persona_cot", "resamples": 20_000})
    contrast = study.contrast(PERSONA_SOURCE.key)
    rows = {}
    for cell in study.contrast_cells(contrast):
        frame = outcomes(study, BANK, cell, 0.4 if cell.arm == "persona_cot" else 0.9)
        comedian = frame.filter(persona="comedian").drop("persona")
        rows[cell.key] = frame.select("persona").unique().join(comedian, how="cross")
    macro = estimate_contrast(study, contrast, rows, questions=QUESTIONS).filter(scope=MACRO)
    pairs, question = macro["std_error"].to_list()
    assert question / pairs == pytest.approx(2.0, rel=0.03)
    assert macro["se_ratio"].to_list() == [1.0, question / pairs]


def test_bystander_values_are_integer_sums_over_bystanders():
    macro, librarian, comedian = samples(
        STUDY, registered(STUDY, PERSONA_BYSTANDER), answers(CELLS)
    )
    assert (macro.scope, librarian.scope, comedian.scope) == (MACRO, "librarian", "comedian")
    assert macro.values.shape == (2, 2, 40)
    assert macro.values.dtype == np.int64
    assert np.array_equal(macro.values, np.concatenate([librarian.values, comedian.values]))
    people = list(STUDY.bystanders("librarian"))
    a, b = (
        accuracy(f"librarian.{arm}.42", people).filter(question_id=QUESTIONS[7])["is_correct"].sum()
        for arm in ("persona_cot", "garbage_cot")
    )
    assert librarian.values[0, 0, 7] == b - a
    assert librarian.divisor == 4


@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**31))
def test_row_order_and_laziness_do_not_matter(seed):
    shuffled = {
        key: frame.sample(fraction=1, shuffle=True, seed=seed).lazy()
        for key, frame in reversed(CELLS.items())
    }
    other = estimate_contrast(STUDY, PERSONA_BYSTANDER, shuffled, questions=QUESTIONS)
    assert other.equals(BYSTANDER_TABLE)


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(["assistant", "software_engineer", "villain"]), st.permutations(QUESTIONS))
def test_relabelled_bystanders_and_questions_do_not_matter(personas, questions):
    """Names that are exchanged alike in every cell: the sums, and so the draws, are the same."""
    people = dict(zip(sorted(personas), personas, strict=True))
    asked = dict(zip(QUESTIONS, questions, strict=True))
    relabelled = {
        key: frame.with_columns(
            pl.col("persona").replace(people), pl.col("question_id").replace(asked)
        )
        for key, frame in CELLS.items()
    }
    other = estimate_contrast(STUDY, PERSONA_BYSTANDER, relabelled, questions=QUESTIONS)
    assert other.equals(BYSTANDER_TABLE)


def test_relabelled_sources_exchange_their_estimates():
    """Everything of one source under the other's name: its own rows move, the macro stays."""
    names = {"librarian": "comedian", "comedian": "librarian"}
    relabelled = {}
    for key, frame in CELLS.items():
        source, _, rest = key.partition(".")
        if "correct" not in key:
            relabelled[f"{names[source]}.{rest}"] = frame.with_columns(
                pl.col("persona").replace(names)
            )
    other = estimate_contrast(STUDY, PERSONA_BYSTANDER, relabelled, questions=QUESTIONS)
    assert other.filter(scope=MACRO).equals(BYSTANDER_TABLE.filter(scope=MACRO))
    totals = dict(BYSTANDER_TABLE.filter(scheme="pairs").select("scope", "total").iter_rows())
    exchanged = dict(other.filter(scheme="pairs").select("scope", "total").iter_rows())
    assert totals["librarian"] != totals["comedian"]
    assert (exchanged["librarian"], exchanged["comedian"]) == (
        totals["comedian"],
        totals["librarian"],
    )


def test_swapped_arms_flip_the_sign():
    tables = []
    for a, b in (("persona_cot", "garbage_cot"), ("garbage_cot", "persona_cot")):
        contrast = {"hypothesis": "H1", "a": a, "b": b, "axes": ["source_loss"]}
        study = small_study(contrasts=[contrast])
        tables.append(estimate_contrast(study, *study.contrast_list, CELLS, questions=QUESTIONS))
    one, other = tables
    assert one["estimate"].to_list() == [-x for x in other["estimate"]]
    for a, b in zip(one.iter_rows(named=True), other.iter_rows(named=True), strict=True):
        # Two ends, each with 5 Monte Carlo standard errors of 2.67 se / sqrt(B); then the lattice.
        slack = 5 * 2**0.5 * 2.67 / 2000**0.5 * a["std_error"] + 2 / a["n_pairs"]
        assert (a["ci_low"], a["ci_high"]) == pytest.approx(
            (-b["ci_high"], -b["ci_low"]), abs=slack
        )


def test_missing_cells_are_named_and_nothing_is_estimated():
    gone = ("comedian.persona_cot.137", "librarian.garbage_cot.42")
    some = {key: frame for key, frame in CELLS.items() if key not in gone}
    with pytest.raises(MissingCells) as caught:
        estimate_contrast(STUDY, PERSONA_SOURCE, some, questions=QUESTIONS)
    assert set(caught.value.cells) == set(gone)
    assert all(key in str(caught.value) for key in gone)
    with pytest.raises(MissingCells, match="loss matrix"):
        loss_matrix(STUDY, BASELINE, some, questions=QUESTIONS)


def test_only_the_contrast_s_own_cells_and_scaffold_are_needed():
    own = {cell.key: CELLS[cell.key] for cell in STUDY.contrast_cells(PERSONA_BYSTANDER)}
    assert len(own) == 8
    read = {key: frame.filter(scaffold="persona_cot") for key, frame in own.items()}
    table = estimate_contrast(STUDY, PERSONA_BYSTANDER, read, questions=QUESTIONS)
    assert table.equals(BYSTANDER_TABLE)


def test_family_is_holm_over_the_macro_rows_of_each_scheme():
    estimates = [
        estimate_contrast(STUDY, c, CELLS, questions=QUESTIONS) for c in STUDY.contrast_list
    ]
    contrasts, equivalence = multiplicity_table(STUDY, estimates[::-1])
    assert contrasts.schema == CONTRASTS_SCHEMA
    assert contrasts.height == 8 * 3 * 2
    for scheme in ("pairs", "question"):
        macro = contrasts.filter(scope=MACRO, scheme=scheme).sort("p_value")
        expected = (macro["p_value"] * pl.Series(range(8, 0, -1))).cum_max().clip(upper_bound=1)
        assert macro["p_holm"].to_list() == pytest.approx(expected.to_list())
    assert contrasts.filter(pl.col("scope") != MACRO)["p_holm"].null_count() == 8 * 2 * 2
    order = contrasts.filter(scope=MACRO, scheme="pairs").select("contrast", "axis").rows()
    assert order == [(c.name, c.axis) for c in STUDY.contrast_list]

    assert equivalence.schema == EQUIVALENCE_SCHEMA
    assert equivalence.select("hypothesis", "scope", "scheme", "margin", "alpha").rows() == [
        ("H3", MACRO, scheme, margin, alpha)
        for scheme in ("pairs", "question")
        for margin, alpha in ((0.03, 0.05), (0.05, 0.005))
    ]


@pytest.mark.parametrize("kept", [slice(1, None), slice(None, -1)])
def test_family_must_be_complete(kept):
    estimates = [
        estimate_contrast(STUDY, c, CELLS, questions=QUESTIONS) for c in STUDY.contrast_list
    ]
    with pytest.raises(ValueError, match="absent"):
        multiplicity_table(STUDY, estimates[kept])
    matched = estimate_exploratory(STUDY, CELLS | {"baseline": BASELINE}, questions=QUESTIONS)
    with pytest.raises(ValueError, match=r"unregistered .*matched/contradicting"):
        multiplicity_table(STUDY, [*estimates, matched.filter(kind="matched")])
    with pytest.raises(ValueError, match="repeated"):
        multiplicity_table(STUDY, [*estimates, estimates[0]])


def test_loss_matrix_adds_up():
    matrix = loss_matrix(STUDY, BASELINE, CELLS, questions=QUESTIONS)
    assert matrix.schema == LOSSES_SCHEMA
    arms = {"generic_cot_correct": 2, "persona_cot_correct": 2} | dict.fromkeys(
        ("garbage_cot", "scrambled_english_cot", "contradicting_cot", "generic_cot", "persona_cot"),
        3,
    )
    assert matrix.height == sum(arms.values()) * 4 * 2
    people = list(STUDY.bystanders("comedian"))
    lost = 0
    for seed in STUDY.seeds:
        keep = pl.col("persona").is_in(people), pl.col("scaffold") == "generic_cot"
        cell = CELLS[f"comedian.persona_cot.{seed}"].filter(*keep)["is_correct"].sum()
        lost += BASELINE.filter(*keep)["is_correct"].sum() - cell
    row = matrix.filter(
        arm="persona_cot", scaffold="generic_cot", axis="bystander_leakage", scope="comedian"
    ).row(0, named=True)
    assert row["loss_sum"] == lost
    assert row["loss"] == lost / (4 * 2 * 40)
    assert (row["n_personas"], row["n_pairs"]) == (4, 80)
    macro = matrix.filter(scope=MACRO, arm="persona_cot")
    parts = matrix.filter(pl.col("scope") != MACRO, arm="persona_cot")
    assert macro["loss_sum"].sum() == parts["loss_sum"].sum()
    assert macro["n_pairs"].to_list() == [160] * 8


def test_contrast_is_the_difference_of_the_loss_matrix():
    matrix = loss_matrix(STUDY, BASELINE, CELLS, questions=QUESTIONS)
    for contrast in STUDY.contrast_list:
        a, b = (
            matrix.filter(arm=arm, scaffold="persona_cot", axis=contrast.axis, scope=MACRO)["loss"][
                0
            ]
            for arm in (contrast.a, contrast.b)
        )
        table = estimate_contrast(STUDY, contrast, CELLS, questions=QUESTIONS)
        assert table["estimate"][0] == pytest.approx(a - b, abs=1e-12)
