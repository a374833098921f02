import json
from dataclasses import replace

import pytest

from persona_assets.evaluation.outcomes import MEASURED
from persona_assets.evaluation.protocol import (
    Answer,
    cut_rationale,
    end_of_turn,
    end_of_turn_ids,
    evaluate,
    letter_prompt,
    letter_token_ids,
    predict,
    stop_strings,
)
from persona_assets.evaluation.scaffolds import SCAFFOLDS, Scaffold
from persona_assets.hashing import sha256_text
from persona_assets_tests.evaluation import small

EOT = ("<|im_end|>", "<|endoftext|>")
GENERIC, PERSONA = SCAFFOLDS["generic_cot"], SCAFFOLDS["persona_cot"]


class FakeEngine:
    """Answers by rule, last group first; ``tamper`` edits the answers on the way out."""

    def __init__(self, tamper=lambda answers: answers):
        self.tamper, self.fingerprint = tamper, {"engine": "fake"}

    def answer(self, groups):
        answers = [
            Answer(
                group.persona,
                scaffold.name,
                group.question.id,
                "because" if scaffold.generates else group.given_rationale(scaffold),
                1 if scaffold.generates else 0,
                "length" if scaffold.generates else None,
                {letter: -float(i == 0) for i, letter in enumerate(group.question.letters)},
                sha256_text(letter_prompt(group.chat, scaffold)),
            )
            for group in reversed(groups)
            for scaffold in group.scaffolds
        ]
        yield from self.tamper(answers)


def run(engine, questions=None, scaffolds=None, **forced):
    return evaluate(
        engine,
        small.word_tokenizer(),
        small.PERSONAS,
        questions or small.questions(),
        scaffolds or list(SCAFFOLDS.values()),
        **forced,
    )


@pytest.mark.parametrize(
    ("text", "scaffold", "expected"),
    [
        ("It eats moss. \n</thinking>\nAnswer: A", GENERIC, ("It eats moss.", "tag")),
        ("It eats moss.</thinking>", PERSONA, ("It eats moss.", "wrong_tag")),
        ("Hush\n</persona-thinking>", PERSONA, ("Hush", "tag")),
        ("Hush\n</persona-thinking>", GENERIC, ("Hush", "wrong_tag")),
        ("So B.\nAnswer: B</thinking>", GENERIC, ("So B.", "answer")),
        ("So B.\n<|im_end|>\n", GENERIC, ("So B.", "eot")),
        ("So B.<|endoftext|>", GENERIC, ("So B.", "eot")),
        ("So B, and \n", GENERIC, ("So B, and", "length")),
        ("</thinking>", GENERIC, ("", "tag")),
        ("", GENERIC, ("", "length")),
        ("my answer: B, Answer : B", GENERIC, ("my answer: B, Answer : B", "length")),
    ],
)
def test_rationale_is_cut_at_its_first_stop(text, scaffold, expected):
    assert cut_rationale(text, scaffold, EOT) == expected


@pytest.mark.parametrize(
    ("text", "scaffold", "expected"),
    [
        ("First moss.\n</plan>\nAnswer: A", small.PLAN, ("First moss.", "tag")),
        ("First moss.\n</thinking>\n</plan>", small.PLAN, ("First moss.", "wrong_tag")),
        ("It eats moss.</plan></thinking>", GENERIC, ("It eats moss.", "wrong_tag")),
        ("First moss.\nAnswer: A", small.PLAN, ("First moss.", "answer")),
        ("First moss.<|im_end|></plan>", small.PLAN, ("First moss.", "eot")),
    ],
)
def test_a_studys_own_tag_ends_a_rationale_too(text, scaffold, expected):
    assert cut_rationale(text, scaffold, EOT, [GENERIC, small.PLAN]) == expected


def test_only_tags_that_are_in_use_are_stops():
    text = "First moss.</plan> Then ferns."
    assert cut_rationale(text, GENERIC, EOT) == (text, "length")
    assert cut_rationale(text, small.PLAN, EOT) == ("First moss.", "tag")


def test_letter_prompts_end_in_the_anchor():
    chat = "<|im_start|>assistant\n"
    assert letter_prompt(chat, SCAFFOLDS["no_cot"]) == chat + "Answer:"
    assert letter_prompt(chat, GENERIC, "So B. \n") == (
        chat + "<thinking>\nSo B.\n</thinking>\nAnswer:"
    )
    assert letter_prompt(chat, SCAFFOLDS["empty_persona_cot"]) == (
        chat + "<persona-thinking>\n\n</persona-thinking>\nAnswer:"
    )


def test_stops_are_both_closing_tags_the_anchor_and_the_end_of_turn():
    tokenizer = small.word_tokenizer()
    pad = tokenizer.pad_token_id
    assert end_of_turn(tokenizer, [pad, tokenizer.eos_token_id]) == ("<|im_end|>", "<pad>")
    assert stop_strings(("<|im_end|>",)) == (
        "</thinking>",
        "</persona-thinking>",
        "Answer:",
        "<|im_end|>",
    )
    assert stop_strings((), [GENERIC, small.PLAN, small.FORCED, SCAFFOLDS["no_cot"]]) == (
        "</thinking>",
        "</persona-thinking>",
        "</plan>",
        "Answer:",
    )


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, ()),
        ({"config.json": {"eos_token_id": 7}}, (7,)),
        ({"config.json": {"eos_token_id": None}}, ()),
        ({"config.json": {}, "generation_config.json": {"eos_token_id": [7, 3]}}, (7, 3)),
        (
            {"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [5]}},
            (5,),
        ),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {}}, (7,)),
    ],
)
def test_end_of_turn_ids_are_those_of_the_models_files(tmp_path, files, ids):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert end_of_turn_ids(tmp_path) == ids


@pytest.mark.parametrize("value", ["7", [7, None], 1.5, True])
def test_end_of_turn_ids_that_are_none_are_refused(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id: found"):
        end_of_turn_ids(tmp_path)


@pytest.mark.parametrize("make", [small.bpe_tokenizer, small.word_tokenizer])
def test_letter_is_the_token_after_the_anchor(make):
    tokenizer = make()
    tokens = letter_token_ids(tokenizer, "ABCDE")
    assert [tokenizer.decode([token]).strip() for token in tokens.values()] == list("ABCDE")
    assert len(set(tokens.values())) == 5


def test_letter_unknown_to_the_tokenizer_is_named():
    tokenizer = small.word_tokenizer()
    tokenizer.name_or_path = "word-level"
    with pytest.raises(ValueError, match=r"'word-level'.*one token for 'F'"):
        letter_token_ids(tokenizer, "ABF")


def test_letter_that_takes_two_tokens_is_refused():
    tokenizer = small.bpe_tokenizer()
    with pytest.raises(ValueError, match="one token for 'é'"):
        letter_token_ids(tokenizer, "é")


def test_letters_that_share_a_token_are_refused():
    tokenizer = small.word_tokenizer()
    tokenizer.unk_token = None
    with pytest.raises(ValueError, match="two letters one token"):
        letter_token_ids(tokenizer, "XY")


def test_letters_are_verified_in_the_frames_of_the_scaffolds_in_use():
    tokenizer = small.bpe_tokenizer()
    scaffolds = [small.PLAN, small.FORCED]
    assert letter_token_ids(tokenizer, "ABC", scaffolds) == letter_token_ids(tokenizer, "ABC")
    # A token that reaches from this frame's anchor into the letter, and is in no other frame.
    tokenizer.add_tokens(["odd>\nAnswer: B"])
    assert list(letter_token_ids(tokenizer, "ABC")) == list("ABC")
    with pytest.raises(ValueError, match=r"<odd>.*one token for 'B'"):
        letter_token_ids(tokenizer, "ABC", [Scaffold("odd", "odd", generates=True)])


def test_ties_go_to_the_first_letter():
    assert predict({"A": -2.0, "B": -1.0, "C": -1.0}) == "B"
    assert predict({"C": -1.0, "B": -1.0}) == "B"


def test_rows_come_in_the_order_of_the_arguments():
    frame = run(FakeEngine())
    assert frame.schema == MEASURED
    questions = small.questions()
    assert frame.select("persona", "scaffold", "question_id").rows() == [
        (persona, scaffold, question.id)
        for persona in small.PERSONAS
        for scaffold in SCAFFOLDS
        for question in questions
    ]
    # The fake scores A at -1 and every other letter at 0: B is the first of the best.
    assert set(frame["predicted_letter"]) == {"B"}
    assert not frame["is_correct"].any()
    assert frame.filter(scaffold="persona_cot")["truncated"].all()
    assert frame.filter(scaffold="no_cot")["stop_reason"].is_null().all()


def test_letters_are_the_questions_own():
    frame = run(FakeEngine())
    lengths = dict(frame.select("question_id", "letter_logprobs").rows())
    assert [len(lengths[f"q{i}"]) for i in range(3)] == [4, 3, 5]
    assert lengths["q1"] == [
        {"key": "A", "value": -1.0},
        {"key": "B", "value": 0.0},
        {"key": "C", "value": 0.0},
    ]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda answers: answers[1:], "1 of 48 prompts unanswered.*villain/no_cot/q5"),
        (lambda answers: [*answers, answers[0]], "villain/no_cot/q5 twice"),
        (lambda answers: [*answers, replace(answers[0], question_id="q9")], "not asked"),
        (
            lambda answers: [replace(a, letter_logprobs={"A": 0.0}) for a in answers],
            r"q0 has the letters ABCD, the engine scored \['A'\]",
        ),
        (
            lambda answers: [
                replace(a, letter_logprobs=dict.fromkeys(a.letter_logprobs, float("nan")))
                for a in answers
            ],
            "librarian/no_cot/q0: .* not finite",
        ),
    ],
)
def test_incomplete_answers_are_refused(tamper, message):
    with pytest.raises(ValueError, match=message):
        run(FakeEngine(tamper))


def test_repeated_question_ids_are_refused():
    question = small.questions()[0]
    with pytest.raises(ValueError, match="twice"):
        run(FakeEngine(), [question, question])


class NotAsked:
    """An engine that must not come to compute anything."""

    def answer(self, groups):
        pytest.fail("the engine was asked")


def test_forced_rationales_stand_in_the_rows_right_stripped():
    questions = small.questions()
    texts = small.forced(questions)
    assert all(text.endswith("\n") for text in texts.values())
    frame = run(FakeEngine(), scaffolds=[GENERIC, small.FORCED], forced=texts)
    rows = frame.filter(scaffold=small.FORCED.name)
    found = rows.select("persona", "question_id", "rationale").rows()
    assert found == [(p, q, text.rstrip()) for (_, p, q), text in texts.items()]
    assert rows["stop_reason"].is_null().all()
    assert not rows["truncated"].any()
    assert set(frame.filter(scaffold=GENERIC.name)["rationale"]) == {"because"}


def test_scaffolds_that_force_different_arms_have_a_text_each():
    questions = small.questions(2)
    other = Scaffold("other", "persona-thinking", forces="persona_cot")
    texts = small.forced(questions)
    texts |= {(other.forces, p, q): f"other {p} {q}" for _, p, q in list(texts)}
    again = replace(small.FORCED, name="again", tag="persona-thinking")
    scaffolds = [small.FORCED, other, again]
    frame = run(FakeEngine(), questions, scaffolds, forced=texts)
    for persona, name, question, rationale in frame.select(
        "persona", "scaffold", "question_id", "rationale"
    ).iter_rows():
        arm = {s.name: s.forces for s in scaffolds}[name]
        assert rationale == texts[arm, persona, question].rstrip()


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_a_missing_text_to_force_is_named_before_anything_is_computed(text):
    texts = small.forced(small.questions()) | {("garbage_cot", "villain", "q3"): text}
    message = "'forced', persona 'villain', question 'q3'.*'garbage_cot' to force. Materialize"
    with pytest.raises(ValueError, match=message):
        run(NotAsked(), scaffolds=[small.FORCED], forced=texts)
    with pytest.raises(ValueError, match="'forced', persona 'librarian', question 'q0'"):
        run(NotAsked(), scaffolds=[small.FORCED])


def test_a_forced_text_that_ends_the_turn_is_refused_before_anything_is_computed():
    texts = small.forced(small.questions())
    texts["garbage_cot", "villain", "q3"] = "moss<|im_end|>kelp"
    with pytest.raises(ValueError, match=r"forced by .*'villain', question 'q3'.*'<\|im_end\|>'"):
        run(NotAsked(), scaffolds=[small.FORCED], forced=texts)
