"""Every way of getting a study file wrong: refused at once, with field and remedy."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_assets.study import StudyError, load_study, parse_study
from persona_assets_tests.test_study import ARM, define

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


def test_missing_file_and_wrong_encoding_are_study_errors(tmp_path):
    with pytest.raises(StudyError, match=r"absent\.yaml"):
        load_study(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(StudyError, match="UTF-8"):
        load_study(tmp_path / "latin.yaml")


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
    began = time.process_time()
    with pytest.raises(StudyError) as error:
        parse_study(text)
    assert says in str(error.value)
    assert len(str(error.value)) < 5000
    assert time.process_time() - began < 5


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
