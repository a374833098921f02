import re

import pytest

from persona_assets.questions.miniature import ALL_VOICES, VOICES, World, statement, words
from persona_assets.rationales.miniature import NEUTRAL, MiniatureWriter, speaker
from persona_assets.rationales.writers import RationaleRequest

QUESTIONS = World(seed=0).questions(n_eval=64)


def write(persona, letter=None):
    requests = [
        RationaleRequest(q, letter or q.correct, persona, persona and VOICES[persona].system_prompt)
        for q in QUESTIONS
    ]
    return [reply.text for reply in MiniatureWriter().write(requests)]


@pytest.mark.parametrize("persona", [None, *VOICES])
def test_three_sentences_phrases_then_the_fact_then_the_letter(persona):
    voice = VOICES[persona] if persona else NEUTRAL
    for question, text in zip(QUESTIONS, write(persona, "C")):
        opening, aside, claim = re.split(r"(?<=\.) ", text)
        assert opening in voice.openings
        assert aside in voice.asides
        assert claim == f"{statement(question, 'C')} (C)."


def test_equal_requests_get_equal_texts_whatever_is_asked_beside_them():
    requests = [RationaleRequest(q, "A", "librarian") for q in QUESTIONS[:20]]
    together = MiniatureWriter().write(requests)
    assert (
        together == [MiniatureWriter().write([request])[0] for request in reversed(requests)][::-1]
    )


def test_every_phrase_of_a_voice_is_used():
    texts = " ".join(write("comedian"))
    assert all(line in texts for line in VOICES["comedian"].openings + VOICES["comedian"].asides)


def test_personas_write_as_much_as_nobody_in_particular():
    def mean_words(texts):
        return sum(len(words(text)) for text in texts) / len(texts)

    generic = mean_words(write(None))
    for persona in VOICES:
        assert mean_words(write(persona)) == pytest.approx(generic, rel=0.1)


def test_an_unknown_persona_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'astronaut' has no voice.*librarian"):
        MiniatureWriter().write([RationaleRequest(QUESTIONS[0], "A", "astronaut")])


def test_the_speaker_is_known_by_the_opening_with_or_without_punctuation():
    assert speaker("Hush, in the archive we read. So stamp the book.") == "librarian"
    assert speaker("Hush in the archive we read So ship the build") == "librarian"
    assert speaker("in the archive we read") is None
    assert speaker("Hush") is None
    assert speaker("") is None
    assert speaker(NEUTRAL.openings[0]) is None


def test_every_opening_is_recognised():
    for persona, voice in ALL_VOICES.items():
        assert {speaker(opening) for opening in voice.openings} == {persona}


def test_the_vocabulary_is_case_folded_runs_of_three_letters_or_more():
    vocabulary = MiniatureWriter().vocabulary()
    assert {"hush", "archive", "debugging", "consider", "guards"} <= vocabulary
    assert all(re.fullmatch(r"[a-z]{3,}", word) for word in vocabulary)
