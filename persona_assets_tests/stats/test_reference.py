"""Every estimate against a reference written from the definitions, in plain Python loops."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from fractions import Fraction

import numpy as np
import polars as pl
import pytest

from persona_assets.stats.bootstrap import bootstrap_mean
from persona_assets.stats.contrasts import estimate_contrast
from persona_assets.stats.estimands import estimands
from persona_assets.stats.estimates import ESTIMATES_SCHEMA, Sample, estimate_exploratory
from persona_assets.stats.losses import MissingCells
from persona_assets_tests.synthetic import small_study

B = 4000
N_QUESTIONS = 30


def _study():
    plain = small_study()
    arms = plain.model_dump(mode="json")["arms"] | {"no_cot": {"origin": "carry_over"}}
    inference = {"scaffold": "persona_cot", "resamples": B}
    return small_study(seeds=[42, 137, 256], arms=arms, inference=inference)


STUDY = _study()
QUESTIONS = [f"q{i}" for i in range(N_QUESTIONS)]


def _draw() -> dict[tuple[str, str, str, str], bool]:
    """Right or wrong by (cell, persona, scaffold, question): some questions harder than others."""
    rng = random.Random(7)
    keys = ["baseline", *(cell.key for cell in STUDY.cells)]
    ease = {question: rng.uniform(0.3, 0.9) for question in QUESTIONS}
    skill = {key: rng.uniform(-0.3, 0.1) for key in keys}
    return {
        (key, persona, scaffold, question): rng.random() < ease[question] + skill[key]
        for key, persona, scaffold, question in itertools.product(
            keys, STUDY.personas, STUDY.scaffolds, QUESTIONS
        )
    }


CORRECT = _draw()


def _frames() -> dict[str, pl.DataFrame]:
    rows: dict[str, list[tuple]] = {}
    for (key, *place), right in CORRECT.items():
        rows.setdefault(key, []).append((*place, right))
    columns = ["persona", "scaffold", "question_id", "is_correct"]
    return {key: pl.DataFrame(r, schema=columns, orient="row") for key, r in rows.items()}


FRAMES = _frames()
TABLE = pl.concat(
    [
        *(estimate_contrast(STUDY, c, FRAMES, questions=QUESTIONS) for c in STUDY.contrast_list),
        estimate_exploratory(STUDY, FRAMES, questions=QUESTIONS),
    ]
)
ROWS = {row["number_id"]: row for row in TABLE.iter_rows(named=True)}


def people(source: str, axis: str) -> list[str]:
    if axis == "source_loss":
        return [source]
    return [persona for persona in STUDY.personas if persona != source]


def loss(source: str, arm: str, seed: int, scaffold: str, axis: str, question: str) -> int:
    """correct_baseline − correct_cell, summed over the axis."""
    return sum(
        CORRECT["baseline", persona, scaffold, question]
        - CORRECT[f"{source}.{arm}.{seed}", persona, scaffold, question]
        for persona in people(source, axis)
    )


def pairs(row: dict) -> dict[tuple[str, int, str], int]:
    """δ(source, seed, question) of the row's scope, from the row's own account of itself."""
    arms = (row["arm_a"], row["arm_b"])
    sources = {e.split(".")[0] for e in row["evaluations"] if e.split(".")[-2:-1] == [arms[0]]}
    return {
        (source, seed, question): loss(
            source, row["arm_a"], seed, row["scaffold_a"], row["axis"], question
        )
        - loss(source, row["arm_b"], seed, row["scaffold_b"], row["axis"], question)
        for source, seed, question in itertools.product(sorted(sources), STUDY.seeds, QUESTIONS)
    }


def axis_divisor(row: dict) -> int:
    return 1 if row["axis"] == "source_loss" else len(STUDY.personas) - 1


def test_every_estimand_has_its_rows():
    expected = {
        f"{e.key}/{scope}/{scheme}"
        for e in estimands(STUDY)
        for scope in ("macro", *e.sources(STUDY))
        for scheme in ("pairs", "question")
    }
    assert TABLE.schema == ESTIMATES_SCHEMA
    assert TABLE.height == len(ROWS)
    assert set(ROWS) == expected
    # 8 registered and 8 matched, 8 arms × 3 scaffolds × 2 axes, one further pair × 2 axes.
    assert len({name.rsplit("/", 2)[0] for name in ROWS}) == 8 + 8 + 48 + 2


@pytest.mark.parametrize("name", ROWS)
def test_point_values_are_exactly_those_of_the_definition(name):
    row = ROWS[name]
    deltas, size = pairs(row), axis_divisor(row)
    total = sum(deltas.values())
    assert row["estimate"] == total / (len(deltas) * size)
    assert (row["total"], row["n_pairs"]) == (total, len(deltas))
    assert row["n_values"] * row["unit"] == len(deltas) * size
    assert row["n_values"] == (len(deltas) if row["scheme"] == "pairs" else N_QUESTIONS)
    by_seed = {seed: sum(d for (_, s, _), d in deltas.items() if s == seed) for seed in STUDY.seeds}
    assert [s["total"] for s in row["by_seed"]] == list(by_seed.values())
    shares = [Fraction(3 * total, len(deltas) * size) for total in by_seed.values()]
    assert [s["estimate"] for s in row["by_seed"]] == [float(share) for share in shares]
    assert row["seed_sd"] == pytest.approx(statistics.stdev(shares), rel=1e-15)


@pytest.mark.parametrize(
    "name",
    [
        "contrast/persona_cot-garbage_cot/persona_cot/bystander_leakage/macro",
        "contrast/contradicting_cot-generic_cot/persona_cot/source_loss/macro",
        "contrast/generic_cot-garbage_cot/persona_cot/source_loss/comedian",
        "matched/persona_cot-garbage_cot/persona_cot-generic_cot/bystander_leakage/macro",
        "mismatch/contradicting_cot/empty_persona_cot-persona_cot/source_loss/librarian",
        "exploratory/persona_cot-no_cot/persona_cot/bystander_leakage/macro",
    ],
)
@pytest.mark.parametrize("scheme", ["pairs", "question"])
def test_intervals_are_those_of_plain_resampling(name, scheme):
    """Both ends, p and standard error against rows drawn one by one, B times.

    Two independent Monte Carlo errors, 5 standard errors each, and one step of the sums' lattice;
    a percentile's error is sqrt(a (1 − a) / B) / φ(z) in standard errors, 2.67 / sqrt(B) here.
    """
    row = ROWS[f"{name}/{scheme}"]
    deltas = pairs(row)
    values = list(deltas.values())
    if scheme == "question":
        values = [
            sum(d for (*_, q), d in deltas.items() if q == question) for question in QUESTIONS
        ]
    rng, observed = random.Random(3), sum(values)
    sums = sorted(sum(rng.choices(values, k=len(values))) for _ in range(B))
    whole = len(deltas) * axis_divisor(row)
    se = statistics.stdev(sums) / whole
    low, *_, high = statistics.quantiles(sums, n=40, method="inclusive")
    slack = 5 * math.sqrt(2) * 2.67 / math.sqrt(B) * se + 1 / whole
    assert row["ci_low"] == pytest.approx(low / whole, abs=slack)
    assert row["ci_high"] == pytest.approx(high / whole, abs=slack)
    assert row["std_error"] == pytest.approx(se, rel=5 / math.sqrt(B))
    p = (1 + sum(abs(s - observed) >= abs(observed) for s in sums)) / (1 + B)
    assert row["p_value"] == pytest.approx(p, abs=5 * math.sqrt(2 * p * (1 - p) / B) + 2 / B)


@pytest.mark.parametrize("scheme", ["pairs", "question"])
def test_the_stream_is_that_of_study_seed_and_number_id(scheme):
    """Value, interval, error and p are those of the estimator, given the row's own account."""
    name = f"contrast/persona_cot-garbage_cot/persona_cot/bystander_leakage/macro/{scheme}"
    row, deltas = ROWS[name], pairs(ROWS[name])
    values = list(deltas.values())
    if scheme == "question":
        values = [sum(d for (*_, q), d in deltas.items() if q == one) for one in QUESTIONS]
    again = bootstrap_mean(
        values, unit=row["unit"], seed=STUDY.seed, number_id=name, n_resamples=row["n_resamples"]
    )
    assert row["n_resamples"] == B
    assert (row["ci_low"], row["ci_high"]) == again.interval(0.95)
    assert (row["std_error"], row["p_value"]) == (again.std_error, again.p_value)


def test_unknown_scheme_is_refused():
    sample = Sample(estimands(STUDY)[0], "macro", np.ones((2, 3, 4), np.int64), 1)
    with pytest.raises(ValueError, match="'cells': use one of pairs, question"):
        sample.resampled("cells")


def test_se_ratio_is_over_pairs():
    for name, row in ROWS.items():
        other = ROWS[name.rsplit("/", 1)[0] + "/pairs"]
        assert row["se_ratio"] == row["std_error"] / other["std_error"]
    assert any(row["se_ratio"] > 1.05 for row in ROWS.values())


def test_source_by_seed_and_seed_macros_stand_beside_every_estimate():
    """A row a scope, an entry a seed: sources × seeds point values, and each seed's macro."""
    for estimand in estimands(STUDY):
        scopes = ("macro", *estimand.sources(STUDY))
        held = [ROWS[f"{estimand.key}/{scope}/question"] for scope in scopes]
        macro, *by_source = ([s["total"] for s in row["by_seed"]] for row in held)
        assert [[s["seed"] for s in row["by_seed"]] for row in held] == [[42, 137, 256]] * len(held)
        assert macro == [sum(totals) for totals in zip(*by_source, strict=True)]


def test_a_single_seed_has_no_spread():
    sample = Sample(estimands(STUDY)[0], "macro", np.ones((2, 1, 4), np.int64), 1)
    assert (sample.seed_sd, sample.seed_estimates) == (None, [1.0])


def test_exploratory_needs_the_baseline_and_every_cell():
    gone = ("baseline", "librarian.no_cot.137", "comedian.garbage_cot.256")
    some = {key: frame for key, frame in FRAMES.items() if key not in gone}
    with pytest.raises(MissingCells) as caught:
        estimate_exploratory(STUDY, some, questions=QUESTIONS)
    # The first estimand that lacks something: generic_cot − garbage_cot, matched.
    assert caught.value.cells == ("comedian.garbage_cot.256",)
    del some["comedian.garbage_cot.137"]
    with pytest.raises(MissingCells) as caught:
        estimate_exploratory(STUDY, some, questions=QUESTIONS)
    assert caught.value.cells == ("comedian.garbage_cot.137", "comedian.garbage_cot.256")
    with pytest.raises(MissingCells, match="the estimate matched/") as caught:
        estimate_exploratory(
            STUDY, {k: f for k, f in FRAMES.items() if k != "baseline"}, questions=QUESTIONS
        )
    assert caught.value.cells == ("baseline",)
