"""The ``garbage`` construction: random vocabulary tokens in which no word can be read."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from persona_assets.chat import chat_prompt
from persona_assets.evaluation.scaffolds import ANCHOR
from persona_assets.questions.bank import Question
from persona_assets.rationales.arms import Arm
from persona_assets.rationales.matching import MAX_ROUNDS, Batch, Closest, ConstructionError
from persona_assets.rationales.words import alphabetic_runs, english, lexicon_of, lone_letters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens such as ``is`` are words too, if too short to be looked up as alphabetic runs.
_SHORT_WORD = re.compile(r"[A-Za-z]{1,2}")


def garbage(batch: Batch) -> list[str]:
    """Filler of random vocabulary tokens for each reference row, as :func:`garbage_faults` asks.

    Each round decodes every open row's tokens, encodes the text again (random tokens seldom
    survive that) and drops or adds as many tokens as it is too long or short; a text with a
    fault is drawn anew. The closest text is kept.

    Raises:
        ConstructionError: fewer than two tokens are fit for filler, or no faultless text is found.
    """
    tokenizer, lexicon = batch.tokenizer, batch.lexicon
    pool = candidates(tokenizer, lexicon)
    if len(pool) < 2:
        raise ConstructionError(
            f"{len(pool)} of {len(tokenizer)} tokens are fit for filler: give the vocabulary "
            "words that occur neither in the bank nor in the rationales"
        )
    targets, streams = batch.targets(), batch.streams()
    frame = sum(batch.lengths([(0, "")])) if targets else 0
    rows = [s.choices(pool, k=max(1, n - frame)) for s, n in zip(streams, targets)]
    closest = Closest(batch, targets)
    for _ in range(MAX_ROUNDS):
        texts = _decode(tokenizer, [rows[i] for i in closest.open])
        sound = []
        for i, text in zip(closest.open, texts):
            if garbage_faults(text, lexicon):
                rows[i] = streams[i].choices(pool, k=len(rows[i]))
            else:
                sound.append((i, text))
        for i, excess in closest.offer(sound):
            if excess < 0:
                rows[i] = rows[i] + streams[i].choices(pool, k=-excess)
            elif excess < len(rows[i]):
                rows[i] = rows[i][: len(rows[i]) - excess]
            else:
                rows[i] = streams[i].choices(pool, k=1)
        if not closest.open:
            break
    return closest.texts("filler without a fault")


def garbage_faults(text: str, lexicon: frozenset[str]) -> list[str]:
    """What is wrong with ``text`` as filler; empty if nothing is.

    Filler holds no word that is in ``lexicon`` (runs of three or more letters, and their parts by
    case: :mod:`~persona_assets.rationales.words`), no letter A to E standing alone or what looks
    like one, no control character, line break, tag or undecodable byte.
    """
    faults = [f"word {word!r}" for word in sorted(alphabetic_runs(text) & lexicon)]
    faults += [f"letter {letter!r} alone" for letter in lone_letters(text)]
    faults += [f"character {c!a}" for c in sorted(set(text)) if not _is_plain(c)]
    return faults if text.strip() else ["empty"]


@lru_cache(maxsize=4)
def candidates(tokenizer: PreTrainedTokenizerBase, lexicon: frozenset[str]) -> tuple[int, ...]:
    """The tokens fit for filler: ordinary ones whose own text has no fault, by id."""
    special = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    ordinary = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]
    return tuple(
        i
        for i, text in zip(ordinary, _decode(tokenizer, [[i] for i in ordinary]))
        if _is_joinable(text)
        and not _SHORT_WORD.fullmatch(text)
        and not garbage_faults(text, lexicon)
    )


def filler_lexicon(
    tokenizer: PreTrainedTokenizerBase,
    arm: Arm,
    questions: Iterable[Question],
    texts: Iterable[str],
) -> frozenset[str]:
    """The words that filler must not hold: English, the bank's, those of ``texts``, the frame's."""
    frame = (chat_prompt(tokenizer, "", ""), ANCHOR, arm.scaffold.opening)
    asked = (text for q in questions for text in (q.text, *q.choices))
    return english() | lexicon_of([*asked, *texts, *frame])


def _decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    return [text.strip(" ") for text in texts]


def _is_plain(character: str) -> bool:
    return character.isprintable() and character not in "<>|\ufffd"


def _is_joinable(text: str) -> bool:
    """Whether ``text`` stays as it is whatever stands before it, as a combining mark does not."""
    return (
        bool(text)
        and unicodedata.category(text[0])[0] != "M"
        and unicodedata.is_normalized("NFC", text)
    )
