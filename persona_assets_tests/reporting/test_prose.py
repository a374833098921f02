"""The report's sentences: true of the study at hand, and of what can be known of it."""

from __future__ import annotations

import re

import pytest
import yaml

from persona_assets.reporting import prose
from persona_assets.reporting.ledger import Ledger, Number
from persona_assets.reporting.printed import Page, Sentence
from persona_assets.reporting.prose import differs
from persona_assets.reporting.threats import threats
from persona_assets.study import Study, load_study, parse_study
from persona_assets_tests.synthetic import MINI, comparable_rows


def plain(sentence: Sentence) -> str:
    """A sentence as a reader gets it."""
    page = Page(Ledger([]), 0.01)
    return "".join(map(page.text, sentence))


def methods(study: Study) -> list[str]:
    return list(map(plain, prose.methods(study)))


def decision_rule(study: Study) -> str:
    return plain(prose.decision_rule(study))


def verdict(study: Study, row: Number) -> str:
    return plain(prose.verdict(study, row))


def forest_caption(study: Study) -> str:
    return plain(prose.forest_caption(study))


LENGTH_MATCHED = MINI.with_name("length_matched.yaml")


def number(p_value: float, p_holm: float, value: float) -> Number:
    return Number("x", value, "", 1, "", "", "", (), p_value=p_value, p_holm=p_holm)


def changed(path=MINI, **overrides: object) -> Study:
    return parse_study(yaml.safe_dump(yaml.safe_load(path.read_text("utf-8")) | overrides))


@pytest.mark.parametrize(
    ("p_value", "p_holm", "estimate", "words"),
    [
        (0.0001, 0.04, 0.4, "not shown to differ from zero at family-wise 0.01"),
        (0.01, 0.01, 0.4, "differs from zero (positive)"),
        (0.001, 0.008, -0.4, "differs from zero (negative)"),
        (0.01, 0.01000049, 0.4, "not shown to differ from zero at family-wise 0.01"),
    ],
)
def test_verdict_follows_the_adjusted_p(p_value, p_holm, estimate, words):
    row = number(p_value, p_holm, estimate)
    study = load_study(MINI)
    assert verdict(study, row) == words
    assert differs(study, row) is words.startswith("differs")


def test_rule_states_the_registered_level():
    inference = {"scaffold": "persona_cot", "resamples": 1999, "family_alpha": 0.05}
    study = changed(inference=inference)
    assert "Holm-adjusted p ≤ 0.05 with questions drawn" in decision_rule(study)
    assert "interval shown is not adjusted" in decision_rule(study)
    (inferred,) = (p for p in methods(study) if "Holm" in p)
    assert decision_rule(study) in inferred
    assert "at least 0.0005 before adjustment" in inferred
    assert verdict(study, number(0.001, 0.04, 1.0)) == "differs from zero (positive)"


def test_mini_methods():
    here, carried, evaluated, inferred = methods(load_study(MINI))
    assert here.startswith("39 cells are trained here. Each is one LoRA adapter on the miniature")
    assert "fine-tuned on those training questions whose rationale its arm kept" in here
    assert "rank 16, alpha 32, scale alpha / rank," in here
    assert "learning rate 0.002, 5 warm-up steps, 4 epochs, 16 examples" in here
    assert carried.startswith("27 cells are carried over. Each is a LoRA adapter from the study's")
    assert "rank 16, alpha 32, scale alpha / rank," in carried
    assert (
        "every evaluation question of the bank under each of 11 personas and 4 scaffolds"
        in evaluated
    )
    assert "ties go to the first letter" in evaluated
    assert "the mean over the 10 others" in inferred
    assert "Holm-adjusted over the 8 registered contrasts" in inferred


def test_length_matched_methods_say_no_more_of_the_carried_than_the_file():
    here, carried, evaluated, _ = methods(load_study(LENGTH_MATCHED))
    assert here.startswith("39 cells are trained here. Each is one LoRA adapter on Qwen/Qwen2.5-7B")
    assert "at revision a09a35458c70" in here
    assert "learning rate 0.0001," in here
    assert "1 epoch, 16 examples an optimizer step" in here
    assert carried == (
        "27 cells are carried over. Each is a whole merged model from superkaiba1/"
        "explore-persona-space at revision b51dfbc9b335; their recipe as the study file states it: "
        "rank 32, alpha 64, rsLoRA (scale alpha / sqrt(rank)), adapted modules q_proj, k_proj, "
        "v_proj, o_proj, gate_proj, up_proj and down_proj, learning rate 5e-06."
    )
    assert "untrained baseline (Qwen/Qwen2.5-7B-Instruct at revision a09a35458c70)" in evaluated


@pytest.mark.parametrize("path", [MINI, LENGTH_MATCHED], ids=lambda path: path.stem)
def test_claims_of_training_are_of_cells_trained_here(path):
    here, *others = methods(load_study(path))
    for claim in ("nothing else", "wrong letter of a question is the same", "fine-tuned on"):
        assert claim in here
        assert not [text for text in others if claim in text]
    assert "In these cells the wrong letter" in here


def test_adapters_of_a_hub_are_called_adapters():
    carry_over = yaml.safe_load(LENGTH_MATCHED.read_text("utf-8"))["carry_over"]
    study = changed(LENGTH_MATCHED, carry_over=carry_over | {"format": "adapter"})
    assert "Each is a LoRA adapter from superkaiba1/" in methods(study)[1]


def test_seed_sets_dropout_too_where_there_is_some():
    training = yaml.safe_load(MINI.read_text("utf-8"))["training"]
    here = methods(changed(training=training | {"dropout": 0.1}))[0]
    assert "dropout 0.1" in here
    assert "the adapter's initialisation and its dropout, and nothing else" in here


def only(origin: str) -> Study:
    """The mini study with all contrasted arms of one origin."""
    raw = yaml.safe_load(MINI.read_text("utf-8"))
    return changed(arms={arm: {"origin": origin} for arm in raw["arms"]})


def test_a_study_of_one_origin_has_one_paragraph_of_training():
    (here, *_), (carried, *_) = (methods(only(origin)) for origin in ("trained", "carry_over"))
    assert here.startswith("84 cells are trained here")
    assert carried.startswith("84 cells are carried over")
    assert len(methods(only("trained"))) == len(methods(only("carry_over"))) == 3


def found(study: Study, words: str) -> str:
    checks = comparable_rows(study)
    return "".join(t for t in map(plain, threats(study, Ledger([]), checks)) if words in t)


def test_threat_of_two_origins():
    mixed = found(load_study(MINI), "carried over from an earlier experiment")
    assert mixed.startswith(
        "generic_cot − garbage_cot, generic_cot − scrambled_english_cot, "
        "persona_cot − garbage_cot and contradicting_cot − generic_cot: one arm"
    )
    assert "the contrast also contains whatever else differed" in mixed
    assert found(only("trained"), "earlier experiment") == ""


def test_threat_of_two_recipes_names_what_differs():
    assert found(load_study(MINI), "different recipes") == ""
    said = found(load_study(LENGTH_MATCHED), "different recipes")
    assert said.startswith("generic_cot − garbage_cot, generic_cot − scrambled_english_cot, ")
    assert "rank 16 and 32" in said
    assert "learning rate 0.0001 and 5e-06" in said


def test_a_check_that_some_partition_did_not_pass_is_a_threat():
    study = load_study(MINI)
    row = {"asset": "cell_diagnostics", "check_name": "letter_collapse", "threshold": ""}
    checks = [
        row | {"partition": "a.b.1", "status": "passed", "observed": "fine"},
        row | {"partition": "a.b.2", "status": "failed", "observed": "all answers are A"},
        row | {"partition": "a.b.3", "status": "failed", "observed": "all answers are B"},
    ]
    ledger = Ledger(
        Number(f"checks/cell_diagnostics/letter_collapse/{status}", n, "", 0, "", "", "", ())
        for status, n in (("failed", 2.0), ("unverifiable", 0.0))
    )
    (said,) = (t for t in map(plain, threats(study, ledger, checks)) if "letter_collapse" in t)
    assert said == (
        "cell_diagnostics, letter_collapse: 2 failed and 0 unverifiable. First: a.b.2: all answers "
        "are A."
    )
    assert not [t for t in map(plain, threats(study, ledger, checks[:1])) if "collapse" in t]


def test_threat_of_another_frame_names_contrasted_arms_only():
    frames = found(load_study(MINI), "the frame of some contrasted arms")
    assert re.search(r"\((.*)\)", frames)[1] == "generic_cot, garbage_cot and scrambled_english_cot"
    contrast = {"hypothesis": "H1", "a": "persona_cot", "b": "contradicting_cot"}
    same = changed(contrasts=[contrast | {"axes": ["source_loss"]}])
    assert found(same, "frame") == ""


def test_threat_of_unknown_rows_where_cells_are_carried_over():
    assert found(load_study(MINI), "reference rows")
    assert found(only("trained"), "reference rows") == ""


def test_forest_caption_names_the_intervals_it_does_not_show():
    caption = forest_caption(load_study(MINI))
    assert caption.startswith("95\u00a0% intervals: thick blue")
    assert "judged by the 90\u00a0% and 99\u00a0% intervals" in caption
    contrast = {"hypothesis": "H1", "a": "persona_cot", "b": "generic_cot", "axes": ["source_loss"]}
    assert "quivalence" not in forest_caption(changed(contrasts=[contrast]))
