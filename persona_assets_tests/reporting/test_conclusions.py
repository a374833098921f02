"""Confidence, summary and next steps follow from study file and ledger by the stated rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from persona_assets.reporting.conclusions import (
    confidence,
    contrast_id,
    equivalent,
    headline,
    next_steps,
    summary,
)
from persona_assets.reporting.ledger import Ledger, Number
from persona_assets.reporting.printed import Page
from persona_assets.stats.estimands import registered
from persona_assets.study import Study, parse_study
from persona_assets_tests.synthetic import MINI, comparable_rows


def study(*, origin: str | None = "trained", **overrides: object) -> Study:
    """The mini study as no demonstration, with all arms of one origin unless that is None."""
    raw = yaml.safe_load(MINI.read_text("utf-8")) | {"demonstration": False}
    if origin:
        raw["arms"] = {arm: {"origin": origin} for arm in raw["arms"]}
    return parse_study(yaml.safe_dump(raw | overrides, sort_keys=False))


def ledger(of: Study, **changes: dict[str, float]) -> Ledger:
    """Every registered contrast at +0.2 with adjusted p 0.001; ``changes`` by end of id."""
    numbers = [
        Number("count/cells", 66.0, "rows", 66, "", "", "", ()),
        Number("count/outcomes", 188672.0, "rows", 188672, "", "", "", ()),
    ]
    for contrast in of.contrast_list:
        key = f"{registered(of, contrast).key}/macro"
        ends = ["question", "pairs", *(f"seed_{seed}" for seed in of.seeds)]
        ends += [f"question/equivalence_{test.margin:g}" for test in contrast.equivalence]
        for end in ends:
            number = Number(f"{key}/{end}", 0.2, "", 96, "", "", "", (), 0.1, 0.3, p_holm=0.001)
            numbers.append(replace(number, **changes.get(end, {})))
    return Ledger(numbers)


def checks(of: Study, *failed: str) -> list[dict[str, str]]:
    """What was checked: of each contrast its arms; of the answers, that these checks failed."""
    return [*comparable_rows(of), *({"check_name": name, "status": "failed"} for name in failed)]


def test_a_demonstration_supports_no_claim():
    demo = study(demonstration=True)
    assert confidence(demo, ledger(demo), checks(demo)).marker == "demonstration: supports no claim"


def test_high_where_nothing_stands_against_it():
    found = confidence(study(), ledger(study()), checks(study()))
    assert found.marker == "HIGH confidence"
    assert found.reasons == (
        "Arms that differ in nothing else, enough seeds, verdicts that both schemes share, and "
        "answers that passed their checks.",
    )


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        (
            {"origin": None},
            {},
            "In every contrast, one arm was trained here, the other carried over",
        ),
        ({"seeds": [42, 137]}, {}, "few training seeds"),
        ({}, {"pairs": {"p_holm": 0.2}}, "another one with pairs drawn"),
        ({}, {"seed_137": {"value": -0.1}}, "another sign in a single seed"),
        ({}, {"seed_137": {"value": 0.0}}, "another sign in a single seed"),
    ],
)
def test_each_reason_caps_at_moderate(options, changes, reason):
    of = study(**options)
    found = confidence(of, ledger(of, **changes), checks(of))
    assert found.marker == "MODERATE confidence"
    assert len(found.reasons) == 1
    assert reason in found.reasons[0]


@pytest.mark.parametrize(
    ("failed", "reason"),
    [
        ("letter_collapse", "hardly more than one letter"),
        ("truncation", "cut off at the token limit"),
        ("letter_mass", "not about to give a letter"),
        ("drift", "do not answer as the earlier experiment found"),
    ],
)
def test_what_the_checks_found_caps_at_moderate(failed, reason):
    found = confidence(study(), ledger(study()), checks(study(), failed))
    assert found.marker == "MODERATE confidence"
    assert len(found.reasons) == 1
    assert reason in found.reasons[0]


def test_a_seeds_sign_matters_only_where_the_contrast_differs():
    unsure = {end: {"p_holm": 0.5} for end in ("question", "pairs")}
    found = confidence(
        study(), ledger(study(), **unsure, seed_137={"value": -0.1}), checks(study())
    )
    assert found.marker == "HIGH confidence"


@pytest.mark.parametrize("options", [{"seeds": [42]}, {"sources": ["librarian"]}])
def test_low_with_a_single_seed_or_source(options):
    found = confidence(study(**options), ledger(study(**options)), checks(study(**options)))
    assert found.marker == "LOW confidence"
    assert "A single" in found.reasons[0] or "a single source" in found.reasons[0]


def said(sentences, of: Study, numbers: Ledger) -> list[str]:
    page = Page(numbers, of.inference.family_alpha)
    return ["".join(map(page.text, sentence)) for sentence in sentences]


def test_summary_is_three_to_five_sentences_of_verdicts():
    of = study()
    numbers = ledger(of)
    sentences = said(summary(of, numbers, checks(of)), of, numbers)
    assert sentences[0] == "66 cells and one untrained baseline gave 188\u00a0672 answers."
    assert sentences[1].startswith(
        "Differing from zero among the registered contrasts: generic_cot"
    )
    assert sentences[1].count("(+0.200)") == len(of.contrast_list)
    assert sentences[2] == (
        "contradicting_cot and generic_cot are, in source loss, not shown equivalent within ±0.03, "
        "and not shown equivalent within ±0.05."
    )
    assert sentences[3].startswith("How far to trust this: HIGH confidence. Arms that differ")
    assert len(sentences) == 4


def test_headline_tells_whether_contrasts_differ_and_which_is_largest():
    of = study()
    (said_all,) = said([headline(of, ledger(of), checks(of))], of, ledger(of))
    assert said_all == (
        "Every registered contrast differs from zero; the largest that does is generic_cot − "
        "garbage_cot in source loss, +0.200 (HIGH confidence)."
    )
    none = ledger(of, question={"p_holm": 0.011})
    (said_none,) = said([headline(of, none, checks(of))], of, none)
    assert said_none == "No registered contrast is shown to differ from zero (MODERATE confidence)."
    far, unsure = (contrast_id(of, of.contrast_list[i]) for i in (2, 3))
    other = {far: {"value": -0.3}, unsure: {"value": 0.9, "p_holm": 0.5}}
    mixed = Ledger(replace(n, **other.get(n.number_id, {})) for n in ledger(of).values())
    (said_some,) = said([headline(of, mixed, checks(of))], of, mixed)
    assert said_some.startswith("Some registered contrasts differ from zero, and some are not")
    assert f"{of.contrast_list[2].a} − {of.contrast_list[2].b} in source loss, −0.300" in said_some


def test_equivalence_of_several_contrasts_names_each():
    raw = yaml.safe_load(MINI.read_text("utf-8"))["contrasts"]
    raw[0]["equivalence"] = [{"margin": 0.04, "alpha": 0.05}]
    of = study(contrasts=raw)
    numbers = ledger(of)
    (sentence,) = (
        s for s in said(summary(of, numbers, checks(of)), of, numbers) if "equivalent" in s
    )
    assert sentence == (
        "generic_cot and garbage_cot are, in source loss, not shown equivalent within ±0.04; "
        "generic_cot and garbage_cot are, in bystander leakage, not shown equivalent within ±0.04; "
        "contradicting_cot and generic_cot are, in source loss, not shown equivalent within ±0.03, "
        "and not shown equivalent within ±0.05."
    )


def test_summary_tells_what_is_not_shown():
    of = study()
    numbers = ledger(of, question={"p_holm": 0.011})
    sentences = said(summary(of, numbers, checks(of)), of, numbers)
    assert sentences[1].startswith("Not shown to differ from zero: ")
    assert not [sentence for sentence in sentences if sentence.startswith("Differing")]
    unsure = [
        step for step in next_steps(of, numbers, checks(of)) if "Add evaluation questions" in step
    ]
    assert len(unsure) == 1
    assert unsure[0].count("−") == len(of.contrast_list)
    assert not [step for step in next_steps(of, ledger(of), checks(of)) if "Add evaluation" in step]


@pytest.mark.parametrize(
    ("low", "high", "within"),
    [(-0.029, 0.029, True), (-0.03, 0.0, False), (0.0, 0.03, False), (0.04, 0.05, False)],
)
def test_equivalence_is_strict(low, high, within):
    number = Number("x", 0.0, "", 1, "", "", "", (), low, high)
    assert equivalent(number, 0.03) is within


def test_next_steps_follow_from_what_weakens():
    of = study(origin=None)
    assert any(
        "Train every contrasted arm here" in step for step in next_steps(of, ledger(of), checks(of))
    )
    of = study()
    assert not any("Train every" in step for step in next_steps(of, ledger(of), checks(of)))
    few = study(seeds=[42, 137])
    assert "Add training seeds." in next_steps(few, ledger(few), checks(few))


def test_contrast_ids_are_those_of_the_ledger(landed):
    ids = set(landed.frames["more"]["numbers"]["number_id"])
    for contrast in landed.study.contrast_list:
        assert contrast_id(landed.study, contrast) in ids
