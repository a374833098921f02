"""The template writer: what every rationale holds, its length, and that it never varies."""

from __future__ import annotations

import re
import subprocess
import sys
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_assets.questions.arc import read_arc
from persona_assets.questions.bank import LETTERS, Question, wrong_letter
from persona_assets.rationales.phrases import NEUTRAL, VOICES, role_phrases
from persona_assets.rationales.template import TemplateWriter
from persona_assets.rationales.words import alphabetic_runs, english
from persona_assets.rationales.writers import RationaleRequest

WRITER = TemplateWriter()
MINERAL = Question(
    "q", "train", "Which mineral scratches glass?", ("Talc", "Quartz", "Gypsum", "Chalk."), "B"
)
BANKS = {"neutral": NEUTRAL, "role": role_phrases("pilot", "a"), **VOICES}


def write(question: Question, letter: str, persona: str | None = None, prompt: str | None = None):
    (reply,) = WRITER.write([RationaleRequest(question, letter, persona, prompt)])
    assert reply.problem is None
    return reply.text


@pytest.mark.parametrize("persona", [None, *VOICES, "pilot"])
@pytest.mark.parametrize("letter", "ABCD")
def test_a_rationale_argues_for_its_letter(persona, letter):
    text = write(MINERAL, letter, persona, "You are a pilot.")
    assert re.findall(r"(?<!\w)[A-E](?!\w)", text) == [letter]
    assert text.count(f"({letter})") == 1
    quoted = set(re.findall(r'"([^"]+)"', text))
    argued = MINERAL.choice(letter).rstrip(".")
    assert argued in quoted
    assert 1 <= len(quoted - {argued}) <= 2
    assert quoted <= {"Talc", "Quartz", "Gypsum", "Chalk"}
    assert {"mineral", "scratches", "glass"} & alphabetic_runs(text)
    assert 3 <= len(re.findall(r"[.!?](?: |$)", text)) <= 5


def test_equal_requests_get_equal_texts_in_any_process():
    code = (
        "from persona_assets_tests.rationales.test_template import *;"
        "print(write(MINERAL, 'C', 'librarian', 'You are a librarian.'))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == write(MINERAL, "C", "librarian", "You are a librarian.")


def test_another_request_gets_another_text():
    texts = {write(MINERAL, letter, persona) for letter in "ABCD" for persona in (None, *VOICES)}
    assert len(texts) == 4 * (1 + len(VOICES))


@pytest.mark.parametrize(
    ("prompt", "role"),
    [
        ("You are a medical doctor who treats patients.", "medical doctor"),
        ("You are an astronaut.", "astronaut"),
        ("Speak like Yoda.", "old sage"),
        (None, "old sage"),
    ],
)
def test_any_persona_speaks_by_its_role(prompt, role):
    texts = " ".join(write(MINERAL, letter, "old_sage", prompt) for letter in "ABCD")
    assert role in texts
    assert f"an {role}" in texts or f"any {role}" in texts.lower() or f"a {role}" in texts


@pytest.mark.parametrize("name", BANKS)
def test_phrases_hold_what_their_slot_asks(name):
    bank = BANKS[name]
    for phrase in bank.supports:
        assert phrase.count("{letter}") == phrase.count("{choice}") == 1
    for phrase in (p for slot in bank.slots() for p in slot):
        assert ("{letter}" in phrase) == (phrase in bank.supports)
        assert not re.search(r"(?<!\w)[A-E](?!\w)|<|>|Answer:", phrase)
        assert phrase[-1] in ".!?"
    assert all("{other}" in p and "{another}" not in p for p in bank.reject_one)
    assert all("{other}" in p and "{another}" in p for p in bank.reject_two)


_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


@given(_TEXT, st.lists(_TEXT, min_size=2, max_size=5), st.sampled_from([None, "comedian", "x"]))
def test_no_question_smuggles_markup_or_letters_into_a_rationale(text, choices, persona):
    question = Question("q", "train", f"{text} </thinking>", tuple(choices), "A")
    for letter in question.letters:
        written = write(question, letter, persona, f"You are a {text}.")
        assert "</" not in written
        assert "Answer:" not in written
        assert "\n" not in written
        assert re.findall(r"(?<!\w)\(([A-E])\)", written) == [letter]


def test_quotes_lower_letters_that_stand_alone():
    question = Question("q", "train", "Which helps bones?", ("Vitamin C", "Vitamin D.", "A B"), "B")
    for letter in "ABC":
        assert re.findall(r"(?<!\w)[A-E](?!\w)", write(question, letter)) == [letter]


def test_a_prompt_smuggles_no_letter_and_no_field_into_a_rationale():
    for letter in "ABCD":
        text = write(MINERAL, letter, "coder", "You are a {letter} C coder.")
        assert re.findall(r"(?<!\w)[A-E](?!\w)", text) == [letter]


def test_a_foreign_letter_is_refused():
    with pytest.raises(ValueError, match="substring"):
        write(MINERAL, LETTERS[4])


def test_its_phrases_are_in_plain_english():
    """Which is why garbage filler, that holds no English word, holds none of its words."""
    asked = alphabetic_runs(" ".join([MINERAL.text, *MINERAL.choices]))
    banks = [NEUTRAL, role_phrases("pilot", "a"), *VOICES.values()]
    phrases = [re.sub(r"\{\w+\}", " ", p) for bank in banks for slot in bank.slots() for p in slot]
    assert alphabetic_runs(" ".join(phrases)) <= english()
    for persona in (None, *VOICES, "pilot"):
        for letter in "ABCD":
            words = alphabetic_runs(write(MINERAL, letter, persona, "You are a pilot."))
            assert words <= english() | asked


def test_length_on_arc_with_the_qwen_tokenizer(arc_dir, tokenizer_dir, length_matched):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    questions = read_arc(arc_dir / "ARC-Challenge-Train.jsonl", "train")

    def mean_tokens(persona: str | None) -> float:
        prompt = length_matched.personas.get(persona)
        requests = [
            RationaleRequest(q, wrong_letter(q, length_matched.seed), persona, prompt)
            for q in questions
        ]
        texts = [reply.text for reply in WRITER.write(requests)]
        return fmean(map(len, tokenizer(texts)["input_ids"]))

    neutral = mean_tokens(None)
    assert neutral == pytest.approx(84, rel=0.03)
    for persona in (*length_matched.sources, "french_person"):
        assert mean_tokens(persona) == pytest.approx(neutral, rel=0.05)
