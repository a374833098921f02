"""Filler and shuffled words: their properties, their length, and what they depend on."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.questions.miniature import NONSENSE
from persona_assets.rationales.arms import ARMS
from persona_assets.rationales.condition import condition_lexicon
from persona_assets.rationales.garbage import candidates, garbage, garbage_faults
from persona_assets.rationales.matching import Batch, ConstructionError, Reference
from persona_assets.rationales.scrambled import scrambled, sentences, shuffle_sentences
from persona_assets.rationales.words import alphabetic_runs, english, lone_letters
from persona_assets_tests import small_study as small

RATIONALE = "Let us think about this question. So that fits best. The home is near caves (B)."


def reference(identity: str = "i", source: str = "librarian", text: str = RATIONALE) -> Reference:
    return Reference(identity, source, "B", text)


@pytest.fixture(scope="module")
def lexicon(mini):
    arm = ARMS["garbage_cot"]
    return condition_lexicon(
        mini, "librarian", arm, [RATIONALE], small.QUESTIONS, small.tokenizer(), small.WRITER
    )


def batch(rows, lexicon=frozenset(), seed: int = 186, arm: str = "garbage_cot") -> Batch:
    return Batch(ARMS[arm], rows, small.tokenizer(), lexicon, seed)


def difference(rows, texts, arm: str) -> list[int]:
    """Tokens of the constructed turns less those of their reference rows."""
    made = batch(rows, arm=arm)
    return [n - m for n, m in zip(made.lengths(list(enumerate(texts))), made.targets())]


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
    ("text", "words"),
    [
        (".GetProperty", {"getproperty", "get", "property"}),
        ("blackColor", {"blackcolor", "black", "color"}),
        ("HTMLParser", {"htmlparser", "html", "parser"} | {"htmlp", "arser"}),
        ("FIELDname", {"fieldname", "field", "name"} | {"fiel", "dname"}),
        ("ZéroÉclair", {"zéroéclair", "zéro", "éclair"}),
        ("的property的", {"的property的", "property"}),
        ("ｍｏｓｓ ﬁne", {"moss", "fine"}),
        ("Moss MOSS moss", {"moss"}),
        ("certificateauthentication", {"certificateauthentication"}),
    ],
)
def test_words_are_also_what_a_change_of_case_or_script_sets_off(text, words):
    assert alphabetic_runs(text) == words


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("x_B D_", "BD"),
        ("Ａ ｃ (Ｂ)", "AcB"),
        ("Ⓓ zⓔz ⒜ 🄱 🅲 🇪", "DeaBCE"),
        ("С. Β!", "CB"),  # Cyrillic and Greek
        ("ℂ Ⅾ", "CD"),
        ("xB Bx САТ _", ""),
    ],
)
def test_what_looks_like_a_lone_letter_is_one(text, letters):
    assert lone_letters(text) == list(letters)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("grabnik Moss", "word 'moss'"),
        ("grabnikMoss", "word 'moss'"),
        ("ＭＯＳＳ", "word 'moss'"),
        ("grabnik_Ⓔ", "letter 'E' alone"),
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
    rows = [reference("long"), reference("short", text="Moss (B).")]
    texts = garbage(batch(rows, lexicon))
    assert [garbage_faults(text, lexicon) for text in texts] == [[], []]
    assert difference(rows, texts, "garbage_cot") == [0, 0]


def test_an_arm_is_matched_in_its_own_frame(lexicon):
    """A construction in another frame than the reference's: its own tags are counted."""
    arm = replace(ARMS["garbage_cot"], name="framed", scaffold=SCAFFOLDS["persona_cot"])
    made = Batch(arm, [reference()], small.tokenizer(), lexicon, 186)
    (text,) = garbage(made)
    assert made.lengths([(0, text)]) == made.targets()


def test_no_english_word_can_be_read_in_filler(lexicon):
    assert {"certificate", "authentication", "punchline", "hush"} <= english() | lexicon
    assert garbage_faults("Certificate", lexicon) == ["word 'certificate'"]
    assert all(len(word) >= 3 for word in english())


def test_constructions_depend_on_study_seed_question_and_source_alone(lexicon):
    rows = [reference(), reference("j"), reference(source="comedian"), reference()]
    for make in (
        lambda seed: garbage(batch(rows, lexicon, seed)),
        lambda seed: scrambled(batch(rows, seed=seed, arm="scrambled_english_cot")),
    ):
        texts = make(186)
        assert texts == make(186)
        assert texts[0] == texts[3]
        assert len({*texts, make(187)[0]}) == 4


def test_a_vocabulary_of_words_alone_is_refused(lexicon):
    with pytest.raises(ConstructionError, match=r"0 of .* tokens are fit for filler"):
        garbage(batch([reference()], lexicon | frozenset(NONSENSE)))


def test_scrambled_keeps_sentences_words_and_length():
    rows = [reference()]
    (text,) = scrambled(batch(rows, arm="scrambled_english_cot"))
    assert text != RATIONALE
    assert [Counter(words) for words, _ in sentences(text)] == [
        Counter(words) for words, _ in sentences(RATIONALE)
    ]
    assert difference(rows, [text], "scrambled_english_cot") == [0]


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
