"""Study files: the grid they give, and every way of getting one wrong."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.rationales.arms import ARMS
from persona_assets.study import StudyError, load_study, parse_study


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


WRONG = {
    "unknown arm": (
        "  garbage_cot: {origin",
        "  garbge_cot: {origin",
        "arms.garbge_cot",
        "Did you mean",
    ),
    "source without persona": (
        "sources: [software_engineer,",
        "sources: [plumber,",
        "sources.plumber",
        "Known: ",
    ),
    "duplicated seed": ("seeds: [42, 137, 256]", "seeds: [42, 137, 42]", "seeds", "Keep one"),
    "contrast over an absent arm": (
        "a: persona_cot, b: garbage_cot",
        "a: no_cot, b: garbage_cot",
        "contrasts.2.a",
        "add it to `arms`",
    ),
    "key with a slash": (
        "  villain: You",
        "  vil/lain: You",
        "personas.vil/lain",
        "lower-case letters",
    ),
    "key with a dot": ("  villain: You", "  vil.lain: You", "personas.vil.lain", "lower-case"),
    "no question left to train on": (
        "n_eval: 96",
        "n_eval: 300",
        "questions.n_eval",
        "raise n_entities",
    ),
    "infinite number": ("alpha: 32", "alpha: .inf", "training.alpha", "Give a value"),
    "name that is not the file's": ("name: mini", "name: other", "name", "rename the file"),
    "misspelt field": ("seeds: [42", "sedes: [42", "sedes", "mend its spelling"),
    "missing field": ("seed: 186\n", "", "seed", "Add the field"),
    "repeated key": ("name: mini", "name: mini\nname: other", "yaml", ""),
    "registered scaffold not evaluated": (
        "scaffold: persona_cot",
        "scaffold: other",
        "inference.scaffold",
        "Add it to `scaffolds`",
    ),
    "two personas with one prompt": (
        "You are a villain who plots to rule the world.",
        "You are a helpful assistant.",
        "personas.villain",
        "Tell them apart",
    ),
    "arm's source that is no source": (
        "sources: [librarian]}\n  generic_cot:",
        "sources: [villain]}\n  generic_cot:",
        "arms.generic_cot_correct.sources.villain",
        "Known: ",
    ),
    "repeated contrast": (
        "axes: [bystander_leakage]}\n\ncompute",
        "axes: [bystander_leakage, bystander_leakage]}\n\ncompute",
        "contrasts.4.axes",
        "Keep one",
    ),
    "two equivalence tests of one margin": (
        "{margin: 0.05, alpha: 0.005}",
        "{margin: 0.0300000001, alpha: 0.005}",
        "contrasts.3.equivalence",
        "Keep one test a margin",
    ),
    "no carry_over section": ("carry_over:\n  kind: local", "other:\n  kind: local", "other", ""),
    "question bank of another world": (
        "rationales: {writer: miniature}",
        "rationales: {writer: template}",
        "base_model.kind",
        "or for none",
    ),
}


def define(kind: str, name: str, fields: str) -> tuple[str, str]:
    """An edit that defines an arm or a scaffold."""
    return "\narms:\n", f"\ndefine: {{{kind}: {{{name}: {{{fields}}}}}}}\narms:\n"


ARM = "scaffold: generic_cot, target: wrong, rationale: written"
WRONG |= {
    "defined arm of a built-in name": (
        *define("arms", "generic_cot", ARM),
        "define.arms.generic_cot",
        "another name",
    ),
    "defined arm in an unknown scaffold": (
        *define("arms", "mine", ARM.replace("generic_cot", "generic_cott")),
        "define.arms.mine.scaffold.generic_cott",
        "Did you mean 'generic_cot'",
    ),
    "defined arm made in an unknown way": (
        *define("arms", "mine", ARM.replace("written", "shuffled")),
        "define.arms.mine.rationale.shuffled",
        "Known: none, written, garbage, scrambled",
    ),
    "defined arm with a rationale and no tag": (
        *define("arms", "mine", ARM.replace("generic_cot", "no_cot")),
        "define.arms.mine.rationale",
        "mend either",
    ),
    "defined scaffold of a built-in name": (
        *define("scaffolds", "no_cot", "tag: plan"),
        "define.scaffolds.no_cot",
        "another name",
    ),
    "scaffold that generates outside a tag": (
        *define("scaffolds", "mine", "generates: true"),
        "define.scaffolds.mine.tag",
        "Add it",
    ),
    "scaffold that generates what it forces": (
        *define("scaffolds", "mine", "tag: thinking, generates: true, forces: generic_cot"),
        "define.scaffolds.mine.generates",
        "Keep one",
    ),
    "scaffold that forces an unknown arm": (
        *define("scaffolds", "mine", "tag: thinking, forces: generic_cott"),
        "define.scaffolds.mine.forces.generic_cott",
        "Did you mean",
    ),
    "scaffold that forces no rationale": (
        *define("scaffolds", "mine", "tag: thinking, forces: no_cot"),
        "define.scaffolds.mine.forces",
        "another arm",
    ),
    "tag that breaks out of its brackets": (
        *define("scaffolds", "mine", "tag: 'thinking><b', generates: true"),
        "define.scaffolds.mine.tag",
        "",
    ),
    "tag that the miniature model does not know": (
        *define("scaffolds", "mine", "tag: plan, generates: true"),
        "define.scaffolds.mine.tag",
        "thinking, persona-thinking",
    ),
    "a speaker that the miniature does not know": (
        "  villain: You",
        "  astronaut: You",
        "personas.astronaut",
        "Known: software_engineer",
    ),
    "a prompt that the miniature does not know": (
        "  villain: You are a villain who plots to rule the world.",
        "  villain: You are a villain.",
        "personas.villain",
        "knows it as 'You are a villain who plots",
    ),
    "voice of what nobody writes": (
        *define(
            "arms",
            "mine",
            "scaffold: persona_cot, target: wrong, rationale: scrambled, voice: persona",
        ),
        "define.arms.mine.voice",
        "have the rationale written",
    ),
    "no rationale to mask": (
        *define(
            "arms", "mine", "scaffold: no_cot, target: wrong, rationale: none, loss_on: answer"
        ),
        "define.arms.mine.loss_on",
        "Remove it",
    ),
    "generated rationale that is never trained": (
        *define("arms", "mine", "scaffold: generic_cot, target: wrong, rationale: none"),
        "define.arms.mine.rationale",
        "mend either",
    ),
    "no contrast": ("contrasts:\n", "contrasts: []\nothers:\n", "contrasts", ""),
    "contrast with its arms exchanged": (
        "a: contradicting_cot, b: generic_cot, axes: [bystander_leakage]}",
        "a: garbage_cot, b: generic_cot, axes: [source_loss]}",
        "contrasts.4.axes",
        "Keep one",
    ),
    "chat endpoint that is no URL": (
        "rationales: {writer: miniature}",
        "rationales: {writer: chat_api, base_url: 'http://localhost:port/v1', model: m, "
        "usd_per_million_input_tokens: 1, usd_per_million_output_tokens: 1}",
        "rationales.chat_api.base_url",
        "",
    ),
    "chat endpoint without a budget": (
        "rationales: {writer: miniature}",
        "rationales: {writer: chat_api, base_url: 'http://localhost', model: m, "
        "usd_per_million_input_tokens: 1, usd_per_million_output_tokens: 1}",
        "rationales.chat_api.budget_usd",
        "Add the field",
    ),
}


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


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_wrong_file_is_refused_with_file_field_and_remedy(case, study_texts, tmp_path):
    before, after, field, remedy = WRONG[case]
    assert before in study_texts["mini"], "the case no longer changes the file"
    path = tmp_path / "mini.yaml"
    path.write_text(study_texts["mini"].replace(before, after, 1), "utf-8")
    with pytest.raises(StudyError) as error:
        load_study(path)
    problems = [p for p in error.value.problems if p.field == field]
    assert problems, error.value
    assert remedy in str(problems[0])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("revision", ["main", "a09a354", "A" * 40, "g" * 40])
@pytest.mark.parametrize("section", ["base_model", "carry_over", "questions"])
def test_hub_revision_must_be_a_full_commit(revision, section, study_texts):
    pinned = {
        "base_model": "a09a35458c702b33eeacc393d103063234e8bc28",
        "carry_over": "b51dfbc9b3352c7f032add11fd44c89222484aa8",
        "questions": "210d026faf9955653af8916fad021475a3f00453",
    }[section]
    with pytest.raises(StudyError) as error:
        parse_study(study_texts["length_matched"].replace(pinned, revision))
    assert any(
        p.field.startswith(section) and p.field.endswith("revision") and "40-character" in p.remedy
        for p in error.value.problems
    ), error.value


@pytest.mark.parametrize(
    "folder",
    [
        "x/{source}_{arm}",
        "/abs/{source}_{arm}_{seed}",
        "../{source}{arm}{seed}",
        "x/../../{source}{arm}{seed}",
        "x/./{source}{arm}{seed}",
        "x//{source}{arm}{seed}",
        "..\\{source}{arm}{seed}",
        "{what}",
        "{}",
        "{source}{arm}{seed",
        "{source}{arm}{seed:99999999999}",
        "{source}{arm}{seed!r}",
        "{source.__class__}{source}{arm}{seed}",
    ],
)
def test_carry_over_folder_must_name_each_cell_inside_the_repository(folder, study_texts):
    text = study_texts["length_matched"].replace("i186_{source}_{arm}_seed{seed}_post_em", folder)
    with pytest.raises(StudyError, match=r"carry_over\.folder"):
        parse_study(text.replace(f"folder: {folder}", f"folder: '{folder}'"))


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


def test_missing_file_and_wrong_encoding_are_study_errors(tmp_path):
    with pytest.raises(StudyError, match=r"absent\.yaml"):
        load_study(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(StudyError, match="UTF-8"):
        load_study(tmp_path / "latin.yaml")


def test_unknown_cell_names_the_nearest(mini):
    with pytest.raises(KeyError, match=r"librarian\.garbage_cot\.42"):
        mini.cell("librarian.garbage.42")


def is_study_or_study_error(text: str) -> bool:
    """Whether the text parses or is refused properly; anything else raises."""
    try:
        return bool(parse_study(text).cells)
    except StudyError as error:
        return bool(error.problems)


@given(st.text())
def test_any_text_is_a_study_or_a_study_error(text):
    assert is_study_or_study_error(text)


@given(st.data())
def test_any_damaged_line_is_a_study_or_a_study_error(study_texts, data):
    lines = study_texts["mini"].splitlines()
    lines[data.draw(st.integers(0, len(lines) - 1))] = data.draw(st.text(max_size=40))
    assert is_study_or_study_error("\n".join(lines))


def bomb(line: str, first: str) -> str:
    """Nine levels, each of nine times the one before."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} " + line.format(",".join([f"*a{i - 1}"] * 9)) for i in range(1, 9)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (bomb("[{}]", "[x]"), "values once its aliases are followed"),
        (bomb("{{<<: [{}], b: 1}}", "{c: 1}"), "values once its aliases are followed"),
        ("\n".join(f"k{i}: 1" for i in range(9000)), "values once its aliases are followed"),
        ("a: &a [*a]", "an alias stands for what it is in"),
        ("&a {<<: *a}", "an alias stands for what it is in"),
        ("a: !!int ''", "a value is not what its tag says"),
        ("a: !!bool x", "a value is not what its tag says"),
        ("a: !!timestamp x", "a value is not what its tag says"),
        ("a: !!python/object/apply:os.system [exit]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("seed: 0x" + "f" * 4000, "a number has more than 63 bits"),
        ("seed: 1" + ":59" * 3000, "a number has more than 63 bits"),
        ('title: "\\ud800"', "surrogates not allowed"),
        ("a: b\na: c", "the key 'a' occurs twice"),
        ("? [a]\n: b", "unhashable key"),
        ("#" * 200_001, "is longer than 200000 bytes"),
    ],
)
def test_what_yaml_can_be_made_to_do_is_refused_at_once(text, says):
    began = time.monotonic()
    with pytest.raises(StudyError) as error:
        parse_study(text)
    assert says in str(error.value)
    assert len(str(error.value)) < 5000
    assert time.monotonic() - began < 5


def test_a_grid_of_millions_is_refused_before_it_is_made(study_texts):
    seeds = ", ".join(map(str, range(2000)))
    text = study_texts["mini"].replace("seeds: [42, 137, 256]", f"seeds: [{seeds}]")
    with pytest.raises(StudyError, match=r"arms: × sources × seeds are 56000 cells\. Split"):
        parse_study(text)


def test_an_error_names_twenty_fields_and_counts_the_others(study_texts):
    text = study_texts["mini"] + "".join(f"x{i}: 1\n" for i in range(50))
    with pytest.raises(StudyError) as error:
        parse_study(text)
    assert len(error.value.problems) == 50
    assert str(error.value).count("\n") == 21
    assert str(error.value).endswith("  and 30 more")


def test_a_file_without_end_is_not_read_to_it(tmp_path):
    path = tmp_path / "mini.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: a terabyte of NUL
    with pytest.raises(StudyError, match="is longer than 200000 bytes"):
        load_study(path)


def test_earlier_values_stand_beside_their_contrast(length_matched, mini):
    found = {c.key: c.published for c in length_matched.contrast_list}
    assert len(found) == 8
    assert found["persona_cot-garbage_cot.source_loss"].estimate == 0.212
    assert found["persona_cot-garbage_cot.source_loss"].interval is None
    assert found["contradicting_cot-generic_cot.bystander_leakage"].interval == (-0.015, -0.011)
    assert {c.published for c in mini.contrast_list} == {None}


@pytest.mark.parametrize(
    ("published", "field", "what"),
    [
        (
            "{bystander_leakage: {estimate: 0.1}}",
            "contrasts.3.published.bystander_leakage",
            "is of no axis of this contrast",
        ),
        (
            "{source_loss: {estimate: 0.1, interval: [0.2, 0.3]}}",
            "contrasts.3.published.source_loss.interval",
            "does not hold the estimate",
        ),
    ],
)
def test_an_earlier_value_that_cannot_be_is_refused(study_texts, published, field, what):
    text = study_texts["mini"].replace(
        "    axes: [source_loss]\n", f"    axes: [source_loss]\n    published: {published}\n"
    )
    with pytest.raises(StudyError) as raised:
        parse_study(text)
    assert [(p.field, p.what) for p in raised.value.problems] == [(field, what)]


def test_no_arm_is_called_as_the_untrained_model_is(study_texts):
    own = "{scaffold: generic_cot, target: wrong, rationale: written}"
    text = study_texts["mini"].replace(
        "arms:\n",
        f"define: {{arms: {{baseline: {own}}}}}\narms:\n  baseline: {{origin: trained}}\n",
        1,
    )
    with pytest.raises(StudyError, match=r"arms\.baseline: is what the untrained model is called"):
        parse_study(text)


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
