"""Lexicons: the arithmetic by hand, what the prior does to rare words, what may not be ranked."""

from __future__ import annotations

import math
from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_assets.rationales.arms import assistant_turn
from persona_assets.stats.lexicon import (
    LEXICON_SCHEMA,
    MAX_WORDS,
    MIN_Z,
    LexiconError,
    build_lexicon,
    common_words,
    lexicon_cells,
    rank_words,
    undefined_because,
    weighted_log_odds,
    word_count,
    words,
)
from persona_assets_tests.synthetic import bank, small_study

STUDY = small_study()
BANK = bank(3, n_train=40)
#: Each source's own words, many times over, and words that all share.
VOICE = {"librarian": "The catalogue says Shelf 77", "comedian": "The audience laughs; it's funny"}


def training(study, said, questions=BANK):
    """Training rows of every persona_cot cell: ``said(cell, question index)`` is the rationale."""
    rows = {}
    for cell in (c for c in study.cells if c.arm == "persona_cot"):
        asked = [q for q in questions if q.split == "train"]
        rows[cell.key] = pl.DataFrame(
            {
                "question_id": [q.id for q in asked],
                "target_letter": [q.letters[-1] for q in asked],
                "assistant": [
                    assistant_turn(study.arm(cell.arm), said(cell, i), q.letters[-1])
                    for i, q in enumerate(asked)
                ],
            }
        )
    return rows


def voices(cell, i):
    return f"{VOICE[cell.source]}, so choice {i} persona thinking answer (A)"


def test_words_are_runs_of_word_characters_in_lower_case():
    text = "Don't re-use snake_case, ÉTÉ 42%!\n(A) naïve—ok"
    (found,) = pl.DataFrame({"t": [text]}).select(words(pl.col("t"))).to_series()
    assert found.to_list() == [
        *("don", "t", "re", "use", "snake_case", "été", "42", "a", "naïve", "ok"),
    ]


@given(
    st.lists(
        st.sampled_from(
            ["hush", "hushed", "Été", "a", "ab", "_", "'", "-", " ", "\u0308", "7", "—"]
        )
        | st.text(max_size=2),
        max_size=12,
    )
)
def test_words_are_counted_as_they_are_extracted(pieces):
    """Over letters of any script, marks that join and signs that part."""
    among = ["hush", "été", "a", "ab", "hush7"]
    found, count, hits = (
        pl.DataFrame({"t": ["".join(pieces)]})
        .select(a=words(pl.col("t")), b=word_count(pl.col("t")), c=word_count(pl.col("t"), among))
        .row(0)
    )
    assert (count, hits) == (len(found), sum(word in among for word in found))


def test_z_by_hand():
    """a: 3 of 10, b: 1 of 20, prior 4 of 30: 7 of 40 against 5 of 50."""
    log_odds, z = weighted_log_odds((3, 10), (1, 20), prior=(4, 30))
    assert log_odds == pytest.approx(math.log((7 / 33) / (5 / 45)), rel=1e-15)
    assert log_odds == pytest.approx(0.646627, abs=1e-6)
    assert z == pytest.approx(0.646627 / math.sqrt(1 / 7 + 1 / 5), abs=1e-6)
    assert z == pytest.approx(1.104326, abs=1e-6)


def test_ranking_by_hand():
    """The prior is the pooled counts: 20 of 100 pooled words are 'quiet', all the librarian's."""
    counts = {
        "librarian": Counter(quiet=20, the=30),
        "comedian": Counter(joke=20, the=30),
    }
    log_odds = math.log(40 / 110) - math.log(20 / 130)
    z = log_odds / math.sqrt(1 / 40 + 1 / 20)
    assert z > MIN_Z
    ((source, rank, word, *numbers),) = rank_words(counts, "librarian")
    assert (source, rank, word) == ("librarian", 1, "quiet")
    assert numbers == pytest.approx([z, log_odds, 20, 0], rel=1e-14)


def test_prior_keeps_a_word_that_occurs_once_from_the_top():
    """Plain log-odds put the one-off first; by z it is last but one, and far from the lexicon."""
    mine = Counter(once=1, shush=60, book=300, the=2639)
    others = Counter(shush=40, book=280, the=8680)
    pooled, n_mine, n_others = mine + others, mine.total(), others.total()

    def plain(word):
        """Log-odds ratio with half an occurrence added, so that it is finite."""
        here, there = mine[word] + 0.5, others[word] + 0.5
        return math.log(here / (n_mine - here)) - math.log(there / (n_others - there))

    def z(word):
        prior = (pooled[word], pooled.total())
        return weighted_log_odds((mine[word], n_mine), (others[word], n_others), prior)[1]

    assert sorted(mine, key=plain, reverse=True) == ["once", "shush", "book", "the"]
    assert sorted(mine, key=z, reverse=True) == ["book", "shush", "once", "the"]
    assert 0 < z("once") < 1 < MIN_Z < z("shush")
    assert [row[2] for row in rank_words({"a": mine, "b": others}, "a")] == ["book", "shush"]


def test_four_equal_sources_need_six_occurrences():
    """What the module says of its own prior mass."""

    def z(k):
        return weighted_log_odds((k, 25_000), (0, 75_000), prior=(k, 100_000))[1]

    assert z(5) < MIN_Z < z(6)
    assert MIN_Z == 1.96


def test_lexicon_holds_the_sources_own_words_only():
    lexicon = build_lexicon(STUDY, training(STUDY, voices), BANK)
    assert lexicon.schema == LEXICON_SCHEMA
    by_source = {s: lexicon.filter(source=s)["word"].to_list() for s in STUDY.sources}
    assert by_source == {
        "librarian": ["77", "catalogue", "says", "shelf"],
        "comedian": ["audience", "funny", "it", "laughs", "s"],
    }
    assert lexicon.filter(source="librarian")["rank"].to_list() == [1, 2, 3, 4]
    assert lexicon.filter(source="librarian")["count_source"].to_list() == [40] * 4
    assert lexicon["count_others"].to_list() == [0] * 9


def test_words_of_bank_tags_and_answer_line_are_never_ranked():
    """The librarian alone says them, and unless they are excluded they lead the list."""
    frame = {"persona", "thinking", "answer", "eval", "b"}  # Tags, answer line, bank, a letter.
    common = common_words(STUDY, BANK)
    assert frame <= common
    said = {
        "librarian": f"{VOICE['librarian']} {'<Persona-Thinking> Answer: eval (B) ' * 3}",
        "comedian": f"{VOICE['comedian']} {'ha hi ho he hu ' * 3}",
    }
    counts = {
        source: Counter(
            pl.DataFrame({"t": [text] * 40}).select(words(pl.col("t")).explode()).to_series()
        )
        for source, text in said.items()
    }
    assert {row[2] for row in rank_words(counts, "librarian")[:5]} == frame
    lexicon = build_lexicon(STUDY, training(STUDY, lambda cell, i: said[cell.source]), BANK)
    assert lexicon.filter(source="librarian")["word"].to_list() == [
        "77",
        "catalogue",
        "says",
        "shelf",
    ]


def test_lexicon_is_the_first_fifty():
    """All 70 words pass; those said twice lead, and equal z is ordered by the word."""
    own = {
        source: " ".join(f"{source}{i:02d} " * (1 + (i >= 67)) for i in range(70))
        for source in STUDY.sources
    }
    lexicon = build_lexicon(STUDY, training(STUDY, lambda cell, i: own[cell.source]), BANK)
    for source in STUDY.sources:
        expected = [f"{source}{i:02d}" for i in (67, 68, 69, *range(47))]
        assert lexicon.filter(source=source)["word"].to_list() == expected
        assert lexicon.filter(source=source)["z"].min() > MIN_Z
    assert lexicon.height == len(STUDY.sources) * MAX_WORDS


def test_seeds_must_hold_the_same_texts():
    rows = training(STUDY, voices)
    key = "comedian.persona_cot.137"
    shuffled = {**rows, key: rows[key].reverse()}
    assert build_lexicon(STUDY, shuffled, BANK).equals(build_lexicon(STUDY, rows, BANK))
    other = training(STUDY, lambda cell, i: voices(cell, i + 1))
    with pytest.raises(LexiconError, match=rf"{key} differ from those of another seed"):
        build_lexicon(STUDY, {**rows, key: other[key]}, BANK)


def test_absent_cells_are_named():
    rows = training(STUDY, voices)
    del rows["librarian.persona_cot.42"], rows["comedian.persona_cot.137"]
    names = r"2 more cell\(s\): librarian\.persona_cot\.42, comedian\.persona_cot\.137"
    with pytest.raises(LexiconError, match=names):
        build_lexicon(STUDY, rows, BANK)


def test_turns_out_of_frame_are_named():
    rows = training(STUDY, voices)
    key = "librarian.persona_cot.42"
    turns = pl.col("assistant").str.replace("<persona-thinking>", "<thinking>", literal=True)
    rows[key] = rows[key].with_columns(
        assistant=pl.when(pl.col("question_id") == "train-003").then(turns).otherwise("assistant")
    )
    with pytest.raises(LexiconError, match=rf"{key}: 1 turn\(s\), first .* train-003"):
        build_lexicon(STUDY, rows, BANK)


def test_a_source_without_a_word_of_its_own_is_an_error():
    def same(cell, i):
        return "all say the same here"

    with pytest.raises(LexiconError, match=r"no word sets .* librarian apart"):
        build_lexicon(STUDY, training(STUDY, same), BANK)
    with pytest.raises(LexiconError, match="fewer than two different words"):
        build_lexicon(STUDY, training(STUDY, lambda cell, i: "hush"), BANK)


def test_studies_without_the_measure_say_why():
    assert undefined_because(STUDY) is None
    assert len(lexicon_cells(STUDY)) == 4
    alone = small_study(sources=["librarian"])
    assert "one source only" in undefined_because(alone)
    silent = small_study(scaffolds=["no_cot"], inference={"scaffold": "no_cot"})
    assert "under no scaffold" in undefined_because(silent)
    arms = {name: {"origin": "trained"} for name in STUDY.arms}
    arms["persona_cot"] = {"origin": "trained", "sources": ["comedian"]}
    partial = small_study(arms=arms)
    assert "for the source(s) librarian" in undefined_because(partial)
    with pytest.raises(LexiconError, match=r"source\(s\) librarian"):
        lexicon_cells(partial)


COUNTS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d", "e"]), st.integers(1, 400), min_size=2
).map(Counter)


@given(COUNTS, COUNTS)
def test_swapping_two_corpora_turns_the_sign(one, other):
    prior = one + other
    for word in prior:
        a, b = (one[word], one.total()), (other[word], other.total())
        alpha = (prior[word], prior.total())
        there, back = weighted_log_odds(a, b, alpha), weighted_log_odds(b, a, alpha)
        assert there == pytest.approx([-x for x in back], rel=1e-12, abs=1e-12)


@given(COUNTS, COUNTS, st.integers(2, 9))
def test_as_much_text_again_keeps_the_odds_and_sharpens_z(one, other, times):
    """k times the text: the same log odds, z times √k."""
    prior = one + other
    for word in prior:
        counts = (
            (one[word], one.total()),
            (other[word], other.total()),
            (prior[word], prior.total()),
        )
        log_odds, z = weighted_log_odds(*counts)
        more = weighted_log_odds(*(tuple(times * x for x in pair) for pair in counts))
        assert more == pytest.approx((log_odds, z * math.sqrt(times)), rel=1e-9, abs=1e-12)


@given(COUNTS, COUNTS, COUNTS)
def test_ranks_do_not_depend_on_how_the_others_are_split(mine, other, third):
    apart = rank_words({"me": mine, "you": other, "they": third}, "me")
    assert apart == rank_words({"x": other + third, "me": mine}, "me")
    zs = [row[3] for row in apart]
    assert zs == sorted(zs, reverse=True)
    assert all(z > MIN_Z for z in zs)
