"""What differs between the arms of a contrast besides the arm, in the study file and as landed."""

from __future__ import annotations

import pytest
import yaml

from persona_assets.stats.comparability import (
    KINDS,
    comparable_audit,
    confounds,
    planned_facts,
    with_engines,
)
from persona_assets.study import Study, load_study, parse_study
from persona_assets_tests.synthetic import MINI

LENGTH_MATCHED = MINI.with_name("length_matched.yaml")
CPU = {"engine": "transformers", "torch": "2.13.0", "dtype": "float32"}


def changed(path=MINI, **overrides: object) -> Study:
    return parse_study(yaml.safe_dump(yaml.safe_load(path.read_text("utf-8")) | overrides))


def of_one_origin(**overrides: object) -> Study:
    raw = yaml.safe_load(MINI.read_text("utf-8"))
    return changed(arms={arm: {"origin": "trained"} for arm in raw["arms"]}, **overrides)


def by_kind(study: Study) -> dict[str, list]:
    found: dict[str, list] = {}
    for confound in confounds(study, planned_facts(study)):
        found.setdefault(confound.kind, []).append(confound)
    return found


def engines(study: Study, **other: dict[str, str]) -> dict[str, dict[str, str]]:
    """Each cell's engine; by keyword that of all cells whose key holds it."""
    return {
        cell.key: next((CPU | e for part, e in other.items() if part in cell.key), CPU)
        for cell in study.cells
    }


def test_contrasts_of_one_origin_and_recipe_are_comparable():
    study = of_one_origin()
    assert confounds(study, planned_facts(study)) == []
    for contrast in study.contrast_list:
        found = comparable_audit(study, contrast, planned_facts(study))
        assert (found.status, found.blocking) == ("passed", False)
        assert found.observed == (
            f"{contrast.name}: equal in origin, recipe, serving and budget, cell by cell"
        )


def test_two_origins_are_one_sentence_over_all_contrasts():
    found = by_kind(load_study(MINI))
    assert list(found) == ["origin"]
    (origin,) = found["origin"]
    assert origin.sentence == (
        "generic_cot − garbage_cot, generic_cot − scrambled_english_cot, persona_cot − garbage_cot "
        "and contradicting_cot − generic_cot: one arm was trained here, the other carried over "
        "from an earlier experiment; the contrast also contains whatever else differed between "
        "the two."
    )


def test_two_recipes_differ_field_by_field_and_what_is_not_stated_is_not_known():
    found = by_kind(load_study(LENGTH_MATCHED))
    assert list(found) == ["origin", "recipe", "serving"]
    (recipe,) = found["recipe"]
    assert len(recipe.contrasts) == 4
    assert recipe.differences == (
        "rank 16 and 32",
        "alpha 32 and 64",
        "rslora false and true",
        "target modules q_proj+k_proj+v_proj+o_proj and "
        "q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj",
        "learning rate 0.0001 and 5e-06",
        "dropout, epochs, examples per step, warmup steps, weight decay, max grad norm and dtype "
        "known of one arm only",
    )
    assert recipe.sentence.startswith("generic_cot − garbage_cot, ")
    assert "the two arms were trained with different recipes (rank 16 and 32;" in recipe.sentence


def test_what_is_known_of_neither_arm_is_no_difference_between_them():
    """Two arms of one hub: the settings that its section does not state are the hub's own."""
    both = {"hypothesis": "H1", "a": "persona_cot", "b": "generic_cot", "axes": ["source_loss"]}
    study = changed(LENGTH_MATCHED, contrasts=[both])
    facts = planned_facts(study)
    assert facts["librarian.persona_cot.42"]["recipe"]["dropout"] is None
    assert confounds(study, facts) == []


def test_two_serving_modes():
    """Whole merged models are carried over: merged by other code, and rounded as that did."""
    (serving,) = by_kind(load_study(LENGTH_MATCHED))["serving"]
    assert serving.differences == ("served as a whole merged model and an adapter merged here",)
    raw = yaml.safe_load(LENGTH_MATCHED.read_text("utf-8"))
    beside = {"evaluation": raw["evaluation"] | {"serving": "adapter"}}
    (serving,) = by_kind(changed(LENGTH_MATCHED, **beside))["serving"]
    assert serving.differences == ("served as a whole merged model and an adapter beside the base",)
    for settings in ({}, beside):
        adapters = {"carry_over": raw["carry_over"] | {"format": "adapter"}}
        assert "serving" not in by_kind(changed(LENGTH_MATCHED, **settings, **adapters))


def test_two_loss_token_budgets():
    contrast = {"hypothesis": "H1", "a": "persona_cot", "b": "no_cot", "axes": ["source_loss"]}
    arms = {arm: {"origin": "trained"} for arm in ("persona_cot", "no_cot", "generic_cot")}
    also = contrast | {"b": "generic_cot"}
    study = changed(arms=arms, contrasts=[contrast, also])
    facts = planned_facts(study)
    assert facts["librarian.no_cot.42"]["budget"] == {"loss on": "the answer line alone"}
    found = by_kind(study)
    assert list(found) == ["budget"]
    assert found["budget"][0].contrasts == ("persona_cot-no_cot",)
    assert "(loss on rationale and answer line and the answer line alone)" in (
        found["budget"][0].sentence
    )


def test_two_engines_are_found_in_what_landed():
    study = of_one_origin()
    facts = with_engines(planned_facts(study), engines(study, garbage_cot={"torch": "2.12.0"}))
    (engine,) = confounds(study, facts)
    assert engine.kind == "engine"
    assert engine.contrasts == ("generic_cot-garbage_cot", "persona_cot-garbage_cot")
    assert engine.differences == ("torch 2.12.0 and 2.13.0",)
    spared, hit = (
        study.contrast("generic_cot-scrambled_english_cot.source_loss"),
        (study.contrast("generic_cot-garbage_cot.source_loss")),
    )
    assert comparable_audit(study, spared, facts).status == "passed"
    found = comparable_audit(study, hit, facts)
    assert (found.status, found.blocks) == ("failed", False)
    assert found.observed == (
        "generic_cot − garbage_cot: the two arms were evaluated by different engines "
        "(torch 2.12.0 and 2.13.0)."
    )
    assert found.details["confounds"] == {"engine": ["torch 2.12.0 and 2.13.0"]}


def test_cells_are_compared_pair_by_pair():
    study = of_one_origin()
    paired = engines(study, **{"librarian": {"torch": "2.12.0"}})  # both arms of every pair
    assert confounds(study, with_engines(planned_facts(study), paired)) == []
    crossed = engines(
        study,
        **{
            "librarian.garbage_cot.42": {"torch": "2.12.0"},
            "librarian.generic_cot.137": {"torch": "2.12.0"},
        },
    )  # both arms have one cell of each engine, in different pairs
    found = confounds(study, with_engines(planned_facts(study), crossed))
    assert "generic_cot-garbage_cot" in {name for c in found for name in c.contrasts}


def test_a_cell_that_has_not_been_evaluated_is_not_known():
    study = of_one_origin()
    known = engines(study)
    del known["comedian.garbage_cot.256"]
    (found,) = confounds(study, with_engines(planned_facts(study), known))
    assert found.differences == ("engine, torch and dtype known of one arm only",)


def test_facts_of_no_known_kind_or_cell_are_refused():
    study = of_one_origin()
    with pytest.raises(ValueError, match=r"no kinds of facts: \['engines'\]. Known: origin, rec"):
        confounds(study, {cell.key: {"engines": CPU} for cell in study.cells})
    with pytest.raises(KeyError, match=r"software_engineer\.garbage_cot"):
        confounds(study, {k: v for k, v in planned_facts(study).items() if "garbage" not in k})


def test_every_planned_kind_has_a_sentence():
    study = load_study(LENGTH_MATCHED)
    assert {kind for facts in planned_facts(study).values() for kind in facts} == (
        KINDS.keys() - {"engine"}
    )
