"""Study files: the grid they give, and what they define."""

from __future__ import annotations

import pytest

from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.rationales.arms import ARMS
from persona_assets.study import StudyError, parse_study


def test_grid_of_both_studies(mini, length_matched):
    for study in (mini, length_matched):
        assert len(study.cells) == 66
        assert len(study.cells_of("trained")) == 39
        assert len(study.cells_of("carry_over")) == 27
        assert len({cell.key for cell in study.cells}) == 66
        assert len(study.conditions) == 22
        assert len(study.personas) == 11
        assert len(study.contrast_list) == 8


def test_trained_and_carry_over_cells_are_contiguous(mini):
    origins = [cell.origin for cell in mini.cells]
    assert origins == ["trained"] * 39 + ["carry_over"] * 27


def test_no_cot_is_one_line_and_twelve_cells(study_texts):
    text = study_texts["length_matched"].replace("# no_cot:", "no_cot:")
    study = parse_study(text)
    assert len(study.cells) == 78
    assert len(study.cells_of("carry_over")) == 39


def test_a_contrast_is_fed_by_24_cells_of_two_arms(mini):
    for contrast in mini.contrast_list:
        cells = mini.contrast_cells(contrast)
        assert len(cells) == 24
        assert {cell.arm for cell in cells} == {contrast.a, contrast.b}
        assert {cell.source for cell in cells} == set(mini.sources)


def test_contrast_over_unequal_sources_takes_the_shared_ones(study_texts):
    text = study_texts["mini"].replace(
        "  - {hypothesis: H4, a: contradicting_cot, b: generic_cot, axes: [bystander_leakage]}",
        "  - {hypothesis: H4, a: generic_cot, b: generic_cot_correct, axes: [bystander_leakage]}",
    )
    study = parse_study(text)
    assert {cell.source for cell in study.contrast_cells(study.contrast_list[-1])} == {"librarian"}


def test_recipe_follows_the_origin(length_matched):
    trained, carried = length_matched.cells[0], length_matched.cells[-1]
    assert length_matched.recipe(trained).rank == 16
    assert length_matched.recipe(carried).rank == 32
    assert length_matched.recipe(carried).rslora


def test_hash_is_of_content_not_of_wording(study_texts):
    text = study_texts["mini"]
    assert parse_study(text).content_hash == parse_study("# a comment\n" + text).content_hash
    changed = parse_study(text.replace("seed: 186", "seed: 187"))
    assert changed.content_hash != parse_study(text).content_hash


def test_where_it_runs_and_is_published_is_no_content_of_it(study_texts):
    text = study_texts["mini"]
    own = "compute: {threads: 1}"
    elsewhere = text.replace(own, "compute: {threads: 1, gpus: 0.5}\n")
    elsewhere = elsewhere.replace("persona-leakage-mini", "leakage")
    assert parse_study(elsewhere).publish.wandb.project == "leakage"
    assert parse_study(elsewhere).content_hash == parse_study(text).content_hash
    slower = text.replace(own, "compute: {threads: 2}")
    assert parse_study(slower).content_hash != parse_study(text).content_hash


def define(kind: str, name: str, fields: str) -> tuple[str, str]:
    """An edit that defines an arm or a scaffold."""
    return "\narms:\n", f"\ndefine: {{{kind}: {{{name}: {{{fields}}}}}}}\narms:\n"


ARM = "scaffold: generic_cot, target: wrong, rationale: written"


def test_a_study_defines_arms_and_scaffolds_of_its_own(study_texts):
    text = study_texts["mini"].replace(*define("arms", "context_cot", f"{ARM}, loss_on: answer"))
    text = text.replace(
        "define: {",
        "define: {scaffolds: {forced: {tag: thinking, forces: "
        "context_cot}, own: {tag: persona-thinking}}, ",
        1,
    )
    text = text.replace(
        "arms:\n  garbage_cot:", "arms:\n  context_cot: {origin: trained}\n  garbage_cot:"
    )
    study = parse_study(text.replace("empty_persona_cot]", "empty_persona_cot, forced, own]"))
    arm, forced, own = study.arm("context_cot"), study.scaffold("forced"), study.scaffold("own")
    assert (arm.scaffold.name, arm.loss_on, arm.rationale) == ("generic_cot", "answer", "written")
    assert (forced.opening, forced.forces, forced.generates) == (
        "<thinking>\n",
        "context_cot",
        False,
    )
    assert (own.tag, own.forces, own.generates) == ("persona-thinking", None, False)
    assert study.forced_arms == ("context_cot",)
    assert len(study.cells) == 78
    assert study.arm("generic_cot") == ARMS["generic_cot"]
    assert study.scaffold("no_cot") == SCAFFOLDS["no_cot"]


def test_what_an_own_arm_argues_for_is_its_target_unless_said_otherwise(study_texts):
    fields = "scaffold: generic_cot, target: correct, rationale: written"
    for more, argued in (("", "correct"), (", argues_for: wrong", "wrong")):
        text = study_texts["mini"].replace(*define("arms", "mine", fields + more))
        assert parse_study(text).arm("mine").argues_for == argued


def test_forcing_asks_for_a_writer_that_never_refuses(study_texts):
    chat = (
        "rationales: {writer: chat_api, base_url: 'http://localhost/v1', model: m, budget_usd: 1, "
        "usd_per_million_input_tokens: 1, usd_per_million_output_tokens: 1}"
    )
    text = study_texts["length_matched"].replace("rationales: {writer: template}", chat)
    text = text.replace(*define("scaffolds", "forced", "tag: thinking, forces: generic_cot"))
    assert parse_study(text).forced_arms == ()
    with pytest.raises(StudyError, match=r"define\.scaffolds\.forced\.forces: needs a rationale"):
        parse_study(text.replace("empty_persona_cot]", "empty_persona_cot, forced]"))


def test_checkpoints_are_kept_unless_the_study_says_otherwise(study_texts):
    text, said = study_texts["length_matched"], "keep: until_evaluated"
    assert parse_study(text).carry_over.keep == "until_evaluated"
    assert parse_study(text.replace(f"  {said}", " ")).carry_over.keep == "always"
    with pytest.raises(StudyError, match=r"carry_over\.hub\.keep"):
        parse_study(text.replace(said, "keep: never"))


def test_yaml_merge_keys_are_understood(study_texts):
    text = study_texts["mini"].replace(
        "  prior_training: *recipe\n", "  prior_training:\n    <<: *recipe\n    epochs: 2\n"
    )
    prior = parse_study(text).carry_over.prior_training
    assert (prior.epochs, prior.rank) == (2, 16)


def test_unknown_cell_names_the_nearest(mini):
    with pytest.raises(KeyError, match=r"librarian\.garbage_cot\.42"):
        mini.cell("librarian.garbage.42")


def test_earlier_values_stand_beside_their_contrast(length_matched, mini):
    found = {c.key: c.published for c in length_matched.contrast_list}
    assert len(found) == 8
    assert found["persona_cot-garbage_cot.source_loss"].estimate == 0.212
    assert found["persona_cot-garbage_cot.source_loss"].interval is None
    assert found["contradicting_cot-generic_cot.bystander_leakage"].interval == (-0.015, -0.011)
    assert {c.published for c in mini.contrast_list} == {None}


def test_a_name_is_looked_up_without_going_through_the_grid(study_texts):
    study = parse_study(study_texts["mini"])
    for named, look_up, all_of in (
        (study.cells[-1], study.cell, "cells"),
        (study.contrast_list[-1], study.contrast, "contrast_list"),
    ):
        assert look_up(named.key) == named
        study.__dict__[all_of] = None  # nothing can go through it any more
        assert look_up(named.key) == named
        with pytest.raises(KeyError, match="no_such"):
            look_up("no_such")
