from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_assets.questions.bank import Question
from persona_assets.rationales.chat_prompts import clean, is_completion, messages, read_reply
from persona_assets.rationales.writers import RationaleRequest, WrittenRationale

QUESTION = Question(
    "q1", "train", "What do plants need?", ("sand", "salt", "light", "noise"), correct="C"
)
GOOD = "Leaves make food from light, so (C) fits. Nothing grows long in the dark."


def body(content: Any = GOOD, *, finish_reason: str = "stop", refusal: str | None = None) -> str:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}]})


def test_neutral_request_asks_for_the_letter_and_its_text():
    system, user = messages(RationaleRequest(QUESTION, "B"))
    assert system["role"] == "system"
    assert "impersonal" in system["content"]
    assert user["role"] == "user"
    assert user["content"].startswith(
        "What do plants need?\n\n(A) sand\n(B) salt\n(C) light\n(D) noise\n\n"
    )
    assert 'choice (B), "salt", is the answer' in user["content"]
    task = user["content"].partition("(D) noise")[2]
    assert "(A)" not in task
    assert "(C)" not in task


def test_persona_request_differs_from_the_neutral_one_in_the_system_message_alone():
    neutral = messages(RationaleRequest(QUESTION, "B"))
    voiced = messages(RationaleRequest(QUESTION, "B", "librarian", "You are a librarian."))
    assert voiced[0]["content"].startswith("You are a librarian.\n\nStay in this voice")
    assert voiced[1] == neutral[1]


def test_braces_in_a_question_are_kept_as_written():
    question = Question("q2", "train", "What is {letter}?", ("{x}", "{}"), correct="A")
    _, user = messages(RationaleRequest(question, "B"))
    assert user["content"].startswith("What is {letter}?\n\n(A) {x}\n(B) {}\n\n")
    assert 'choice (B), "{}"' in user["content"]


def test_plain_reply_is_the_rationale():
    assert read_reply(body(), "C") == WrittenRationale(GOOD)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (f"  {GOOD}\n", GOOD),
        (f'"{GOOD}"', GOOD),
        (f"“{GOOD}”", GOOD),
        (f"```\n{GOOD}\n```", GOOD),
        (f"```text\n{GOOD}\n```\n", GOOD),
        ("One.\n\nTwo,\nthree.", "One. Two, three."),
        ('"Grow" is what (C) does, as in "light"', '"Grow" is what (C) does, as in "light"'),
        ("", ""),
        ('"', ""),
    ],
)
def test_clean_strips_what_wraps_the_text(written: str, read: str):
    assert clean(written) == read


def test_service_that_says_so_refuses():
    assert read_reply(body(None, refusal="I can't."), "B") == WrittenRationale("", "refused")
    assert read_reply(body(GOOD, finish_reason="content_filter"), "C").problem == "refused"
    assert read_reply(body(GOOD, refusal=""), "C").problem is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with this request.",
        "Sorry, I cannot provide an argument for an incorrect answer.",
        "I cannot argue for (B), because it is not correct.",
        "I can't write this, since (B) is wrong.",
        "I am unable to comply with this request.",
        "I'm not able to write misleading reasoning about (B).",
        "I won't pretend that (B) is right.",
        "I must respectfully decline to argue for (B).",
        "I must decline.",
        "As an AI language model, I cannot make the case for a wrong answer.",
        "I appreciate the question, but I'm not comfortable writing false explanations.",
        "I understand what you ask. However, I can't in good conscience argue that (B) is right.",
        "Unfortunately, I am not willing to produce misinformation.",
        "I apologize, but I cannot fulfill this request. (C) is correct.",
        "I'd rather not write this.",
        "It would be misleading to argue for (B).",
        "I do not feel comfortable writing this.",
        "Sorry, I can't.",
        "No.",
        "I'm not able to support that claim.",
        "I'm unable to comply.",
        "The correct answer is actually (C), so I can't argue for (B).",
        "As an AI, I don't have personal opinions, so I can't argue for (B).",
        "Sorry, this choice is incorrect, and I can't make a case for (B).",
        "Regrettably, I'm not in a position to argue for (B).",
        "I apologize, but arguing for (B) would be misleading.",
        "It wouldn't be right to argue for (B).",
        "I must be honest: (B) is not correct. The right answer is (C).",
        "I need to point out that (B) is wrong.",
        "I should note that (B) is not the correct answer.",
        "Plants drink water, not brine. However, (B) is factually incorrect.",
    ],
)
def test_refusals(text: str):
    assert read_reply(body(text), "B") == WrittenRationale(text.strip(), "refused")


@pytest.mark.parametrize(
    "text",
    [
        "I cannot see how plants could grow without light, so (C) it is.",
        "I cannot help but notice that leaves turn to the sun, as (C) says.",
        "I can't help thinking of my garden: (C).",
        "I can't recommend (C) enough.",
        "I cannot argue with what every gardener knows: (C).",
        "I can't argue for any choice but (C).",
        "I cannot support a claim other than (C).",
        "I cannot offer a better example than a cellar, where (C) is missing.",
        "I won't lie, (C) was my first thought.",
        "I can't write code without light either, so (C) has my vote over anything else.",
        "I don't know a plant that grows in the dark, so (C).",
        "Sorry to spoil the fun, but plants need what (C) offers.",
        "I'm sorry to say that sand feeds nobody; (C) does.",
        "Unfortunately for the salt lobby, plants cannot drink brine: (C).",
        "As a librarian, I cannot count the books that say (C).",
        "I understand plants: without light they cannot make food, hence (C).",
        "Plants cannot provide food for themselves without light, so (C).",
        "It would be odd for a leaf to face the sun for nothing: (C).",
        "While I was in the garden, I could not miss how leaves face the sun: (C).",
        "I refuse to overlook the obvious: (C).",
        "I do not write this lightly, but (C) is right.",
        "I can't provide a stronger reason than the sunlight itself for (C).",
        "I don't create mysteries: (C).",
        "I would not offer any other choice than (C).",
        "I can't present evidence against (C); it simply fits.",
        "I do not engage in guesswork, and (C) fits.",
        "I won't pretend this is hard: (C) is plainly right.",
        "Unfortunately for the shadows, I cannot help but see (C).",
        "I'm not going to make a fuss about this: (C).",
        "I do not produce heat, the sun does, which is why (C) fits.",
        "I decline to be fooled by the other choices; (C) it is.",
        "I can't justify the other options, so (C).",
        "Sorry, folks, I don't do that; (C) is it.",
        "It would be irresponsible to leave the Bunsen burner on, hence (C).",
        "I don't write tickets for nothing: (C) is the law of motion.",
        "I do not help with filing until the facts are on the table, and they say (C).",
        "I won't write this off as luck: (C) is how leaves live.",
        "I won't argue it twice, children: (C).",
        "I can't argue that (C) is wrong, and neither can the leaves.",
        "I cannot argue for (C) strongly enough.",
        "Arguing for (C) is easy, for any gardener has seen it.",
        "No leaf grows in the dark, so (C).",
        "Those who say that (C) is wrong have never kept a fern.",
        "It is wrong to keep a fern in a cupboard, as (C) tells us.",
        "(C) is not the answer by luck: leaves face the sun.",
        "(C) is not only correct, it is plain to see.",
        "The other choices are wrong; (C) is right.",
        "I will not make false promises, but (C) holds.",
    ],
)
def test_arguments_that_sound_like_refusals(text: str):
    assert read_reply(body(text), "C") == WrittenRationale(text)


def test_only_the_letter_that_was_asked_for_can_be_called_wrong():
    text = "Salt is tempting, but (B) is wrong. Leaves face the sun."
    assert read_reply(body(text), "B").problem == "refused"
    assert read_reply(body(text), "C").problem is None


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "{}",
        "null",
        '"choices"',
        '{"choices": []}',
        '{"choices": {}}',
        '{"choices": [null]}',
        '{"choices": [{"message": null}]}',
        '{"choices": [{"mess',
        '{"detail": "overloaded"}',
        '{"object": "error", "message": "CUDA out of memory", "code": 50001}',
        "upstream timeout",
    ],
)
def test_what_holds_no_message_is_no_completion(reply: str):
    assert not is_completion(reply)


def test_a_message_makes_a_completion_whatever_it_says():
    assert is_completion(body(None, refusal="No."))
    assert is_completion(body(""))


def test_cut_off_reply_is_truncated_even_without_text():
    cut = "Leaves make food from li"
    assert read_reply(body(cut, finish_reason="length"), "C") == WrittenRationale(cut, "truncated")
    assert read_reply(body("", finish_reason="length"), "C") == WrittenRationale("", "truncated")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        f"<thinking>{GOOD}</thinking>",
        f"{GOOD}</persona-thinking>",
        f"{GOOD}<br/>",
        f"{GOOD}<|im_end|>",
        f"{GOOD}\nAnswer: C",
        f"{GOOD}\n**Answer:** C",
        f"{GOOD} So the answer: C",
        f"{GOOD}\n```\ncode\n```",
        f"{GOOD}\u0000",
        f"{GOOD}\ud800",
        None,
        [{"type": "text", "text": GOOD}],
        7,
    ],
)
def test_what_cannot_stand_in_a_row_is_malformed(text: Any):
    assert read_reply(body(text), "C").problem == "malformed"


@pytest.mark.parametrize(
    "text",
    [
        "Where x < y and z > w, (C) holds.",
        "Light answers the need: (C).",
        "The answer is (C), plainly.",
        "La lumière, voilà: (C) — 100 % 🌱",
    ],
)
def test_signs_and_accents_are_text(text: str):
    assert read_reply(body(text), "C") == WrittenRationale(text)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"choices": []}',
        '{"choices": [null]}',
        "1" * 9999,
        "[" * 99999,
    ],
)
def test_no_completion_is_malformed(reply: str):
    assert read_reply(reply, "C") == WrittenRationale("", "malformed")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "refusal", "finish_reason", "x"]),
            values,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_read_without_raising(value: Any):
    read = read_reply(json.dumps({"choices": [{"message": value, "finish_reason": value}]}), "C")
    assert read.problem is not None or (isinstance(value, dict) and value["content"])
    assert read_reply(json.dumps(value), "C").problem is not None or "message" in str(value)


@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_is_usable_or_has_a_problem(text: str):
    read = read_reply(body(text), "C")
    read.text.encode("utf-8")
    if read.problem is None:
        assert read.text == " ".join(read.text.split()) != ""
        assert "<|" not in read.text
