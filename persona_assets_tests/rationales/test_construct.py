"""Filler and shuffled words: their properties, their length, and what they depend on."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_assets.questions.miniature import NONSENSE
from persona_assets.rationales.condition import filler_lexicon
from persona_assets.rationales.construct import (
    ConstructionError,
    Reference,
    candidates,
    garbage,
    garbage_faults,
    scrambled,
    sentences,
    shuffle_sentences,
)
from persona_assets.rationales.words import alphabetic_runs, lone_letters
from persona_assets.training.encoding import count_loss_tokens
from persona_assets_tests import small_study as small

RATIONALE = "Let us think about this question. So that fits best. The home is near caves (B)."


def reference(identity: str = "i", source: str = "librarian", text: str = RATIONALE) -> Reference:
    return Reference(identity, source, "B", text)


@pytest.fixture(scope="module")
def lexicon(mini):
    return filler_lexicon(mini, small.QUESTIONS, small.tokenizer(), small.WRITER)


def test_words_are_runs_of_three_letters_and_more():
    assert alphabetic_runs("The cat's ABC_def 3rd Éclair go") == {
        "the",
        "cat",
        "abc",
        "def",
        "éclair",
    }
    assert lone_letters("A bee, (c) vitamin-D aE x 3E") == ["A", "c", "D"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("grabnik Moss", "word 'moss'"),
        ("grabnik-e", "letter 'e' alone"),
        ("grabnik\nzzt", "character '\\n'"),
        ("<grabnik", "character '<'"),
        ("\ufffd", "character '\\ufffd'"),
        ("  ", "empty"),
    ],
)
def test_faults_of_filler_are_named(text, fault):
    assert garbage_faults(text, frozenset({"moss"})) == [fault]


def test_candidates_of_the_miniature_are_its_nonsense(lexicon):
    tokenizer = small.tokenizer()
    assert sorted(tokenizer.convert_ids_to_tokens(candidates(tokenizer, lexicon))) == sorted(
        NONSENSE
    )


def test_garbage_is_sound_and_as_long_as_its_reference(lexicon):
    tokenizer = small.tokenizer()
    rows = [reference("long"), reference("short", text="Moss (B).")]
    texts = garbage(tokenizer, rows, lexicon, 186)
    assert [garbage_faults(text, lexicon) for text in texts] == [[], []]
    for row, text in zip(rows, texts):
        ours, theirs = count_loss_tokens(tokenizer, [row.turn(text), row.turn(row.rationale)])
        assert ours == theirs


def test_constructions_depend_on_study_seed_question_and_source_alone(lexicon):
    tokenizer = small.tokenizer()
    rows = [reference(), reference("j"), reference(source="comedian"), reference()]
    for make in (
        lambda seed: garbage(tokenizer, rows, lexicon, seed),
        lambda seed: scrambled(tokenizer, rows, seed),
    ):
        texts = make(186)
        assert texts == make(186)
        assert texts[0] == texts[3]
        assert len({*texts, make(187)[0]}) == 4


def test_a_vocabulary_of_words_alone_is_refused(lexicon):
    with pytest.raises(ConstructionError, match=r"0 of .* tokens are fit for filler"):
        garbage(small.tokenizer(), [reference()], lexicon | frozenset(NONSENSE), 186)


def test_scrambled_keeps_sentences_words_and_length():
    tokenizer, row = small.tokenizer(), reference()
    (text,) = scrambled(tokenizer, [row], 186)
    assert text != RATIONALE
    assert [Counter(words) for words, _ in sentences(text)] == [
        Counter(words) for words, _ in sentences(RATIONALE)
    ]
    ours, theirs = count_loss_tokens(tokenizer, [row.turn(text), row.turn(RATIONALE)])
    assert ours == theirs


def test_sentences_keep_their_final_punctuation():
    assert sentences('One two. "Three four." five!? Six (C).') == [
        (["One", "two"], "."),
        (['"Three', 'four."', "five"], "!?"),
        (["Six", "(C)"], "."),
    ]


@given(st.lists(st.lists(st.sampled_from(["ab", "cd", "ef", "(C)", "g,"]), min_size=1, max_size=6)))
def test_shuffling_never_leaves_a_sentence_as_it_was(written):
    text = " ".join(" ".join(words) + "." for words in written)
    shuffled = sentences(shuffle_sentences(text, random.Random(0)))
    for (words, end), original in zip(shuffled, written) if written else []:
        assert end == "."
        assert sorted(words) == sorted(original)
        assert words != original or len(set(original)) == 1
    assert len(shuffled) == max(1, len(written))
