"""What the study estimates, by id: the registered contrasts and what is exploratory."""

from __future__ import annotations

import pytest

from persona_assets import environment
from persona_assets.stats.estimands import Estimand, Side, estimands, exploratory, registered
from persona_assets.study import load_study
from persona_assets_tests.synthetic import small_study

REAL = load_study(environment.study_file("length_matched"))
SMALL = small_study()


def keys(study, kind):
    return [e.key for e in estimands(study) if e.kind == kind]


def test_registered_contrasts_come_first_in_the_study_s_order():
    assert [e.key for e in estimands(REAL)[:8]] == [
        "contrast/generic_cot-garbage_cot/persona_cot/source_loss",
        "contrast/generic_cot-garbage_cot/persona_cot/bystander_leakage",
        "contrast/generic_cot-scrambled_english_cot/persona_cot/source_loss",
        "contrast/generic_cot-scrambled_english_cot/persona_cot/bystander_leakage",
        "contrast/persona_cot-garbage_cot/persona_cot/source_loss",
        "contrast/persona_cot-garbage_cot/persona_cot/bystander_leakage",
        "contrast/contradicting_cot-generic_cot/persona_cot/source_loss",
        "contrast/contradicting_cot-generic_cot/persona_cot/bystander_leakage",
    ]
    assert len(keys(REAL, "contrast")) == 8
    assert [(e.hypothesis, len(e.equivalence)) for e in estimands(REAL)[6:8]] == [
        ("H3", 2),
        ("H4", 0),
    ]


def test_matched_contrasts_take_each_arm_under_its_training_scaffold():
    assert keys(REAL, "matched")[::2] == [
        "matched/generic_cot-garbage_cot/generic_cot/source_loss",
        "matched/generic_cot-scrambled_english_cot/generic_cot/source_loss",
        "matched/persona_cot-garbage_cot/persona_cot-generic_cot/source_loss",
        "matched/contradicting_cot-generic_cot/persona_cot-generic_cot/source_loss",
    ]


def test_mismatch_is_every_arm_under_every_scaffold_but_its_own():
    found = keys(REAL, "mismatch")
    assert len(found) == len(set(found)) == 7 * 3 * 2
    for arm, under, trained in (
        ("garbage_cot", "persona_cot", "generic_cot"),
        ("scrambled_english_cot", "persona_cot", "generic_cot"),
        ("contradicting_cot", "empty_persona_cot", "persona_cot"),
    ):
        for axis in ("source_loss", "bystander_leakage"):
            assert f"mismatch/{arm}/{under}-{trained}/{axis}" in found
    assert not any(e.a == e.b for e in exploratory(REAL))


def test_further_pair_is_there_where_the_study_has_both_arms():
    assert keys(SMALL, "exploratory") == []
    arms = SMALL.model_dump(mode="json")["arms"] | {"no_cot": {"origin": "carry_over"}}
    assert keys(small_study(arms=arms), "exploratory") == [
        "exploratory/persona_cot-no_cot/persona_cot/source_loss",
        "exploratory/persona_cot-no_cot/persona_cot/bystander_leakage",
    ]


def test_nothing_is_estimated_under_a_scaffold_that_is_not_evaluated():
    study = small_study(scaffolds=["persona_cot", "empty_persona_cot"])
    assert {s for e in exploratory(study) for s in e.scaffolds} == set(study.scaffolds)
    assert {e.a.arm for e in exploratory(study)} == {
        "persona_cot",
        "contradicting_cot",
        "persona_cot_correct",
    }


def test_ids_are_unique():
    found = [e.key for e in estimands(REAL)]
    assert len(found) == len(set(found)) == 58


@pytest.mark.parametrize("estimand", estimands(SMALL), ids=lambda e: e.key)
def test_cells_are_both_arms_at_the_shared_sources(estimand):
    expected = [
        cell.key
        for cell in SMALL.cells
        if cell.arm in (estimand.a.arm, estimand.b.arm)
        and not ("correct" in estimand.name and cell.source != "librarian")
    ]
    base = ["baseline"] if estimand.a.scaffold != estimand.b.scaffold else []
    assert list(estimand.evaluations(SMALL)) == expected + base
    librarian = [key for key in expected if key.startswith("librarian.")]
    assert list(estimand.evaluations(SMALL, "librarian")) == librarian + base


def test_registered_cells_are_those_of_the_contrast():
    for contrast in REAL.contrast_list:
        assert registered(REAL, contrast).cells(REAL) == REAL.contrast_cells(contrast)


def test_macro_is_over_the_sources_that_both_arms_have():
    side = Side("generic_cot", "no_cot")
    control = Estimand("exploratory", Side("generic_cot_correct", "no_cot"), side, "source_loss")
    assert control.sources(REAL) == ("librarian",)
    assert control.sources(REAL, "comedian") == ()
