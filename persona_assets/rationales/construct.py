"""The constructed rationales: random filler and shuffled words, matched in length row by row.

Both are deterministic in (study seed, question identity, source) and know nothing of a cell's
seed, so that the three cells of a condition train on the same text. Length is counted in *loss
tokens* of the whole assistant turn: words merge with the frame around them, so that a rationale's
own token count is another number.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from persona_assets.chat import chat_prompt
from persona_assets.evaluation.scaffolds import ANCHOR, SCAFFOLDS
from persona_assets.rationales.arms import ARMS, REFERENCE_ARM, assistant_turn
from persona_assets.rationales.words import alphabetic_runs, lexicon_of, lone_letters
from persona_assets.training.encoding import count_loss_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How far a constructed row's loss tokens may be from the reference row's.
TOLERANCE = 2
#: Draws a row before the closest is settled on, and at most; a row that is still too far off
#: is left to the parity audit.
DRAWS, MAX_ROUNDS = 8, 40

#: Tokens such as ``is`` are words too, if too short to be looked up as alphabetic runs.
_SHORT_WORD = re.compile(r"[A-Za-z]{1,2}")
_REFERENCE = ARMS[REFERENCE_ARM]
#: A sentence ends at . ! or ? before white space, or with the text.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference arm's row that a constructed one is matched to.

    Attributes:
        identity: The question's identity.
        source: The source persona; two sources get different constructions.
        letter: The target letter.
        rationale: The reference arm's rationale.
    """

    identity: str
    source: str
    letter: str
    rationale: str

    def turn(self, rationale: str) -> str:
        """The reference arm's assistant turn around ``rationale``."""
        return assistant_turn(_REFERENCE, rationale, self.letter)

    def random(self, what: str, study_seed: int) -> random.Random:
        """The row's own stream of random numbers."""
        return random.Random(f"{what}:{study_seed}:{self.identity}:{self.source}")


class ConstructionError(ValueError):
    """A rationale cannot be constructed with this tokenizer and lexicon."""


def garbage(
    tokenizer: PreTrainedTokenizerBase,
    references: Sequence[Reference],
    lexicon: frozenset[str],
    study_seed: int,
) -> list[str]:
    """Filler of random vocabulary tokens for each reference row, as :func:`garbage_faults` asks.

    Each round decodes every open row's tokens, encodes the text again (random tokens seldom
    survive that) and drops or adds as many tokens as it is too long or short; a text with a
    fault is drawn anew. The closest text is kept.

    Raises:
        ConstructionError: fewer than two tokens are fit for filler, or no faultless text is found.
    """
    pool = candidates(tokenizer, lexicon)
    if len(pool) < 2:
        raise ConstructionError(
            f"{len(pool)} of {len(tokenizer)} tokens are fit for filler: give the vocabulary "
            "words that occur neither in the bank nor in the rationales"
        )
    targets = count_loss_tokens(tokenizer, [r.turn(r.rationale) for r in references])
    (frame,) = count_loss_tokens(tokenizer, [assistant_turn(_REFERENCE, "", "A")])
    streams = [r.random("garbage", study_seed) for r in references]
    rows = [s.choices(pool, k=max(1, n - frame)) for s, n in zip(streams, targets)]
    closest = _Closest(references, targets)
    for _ in range(MAX_ROUNDS):
        texts = _decode(tokenizer, [rows[i] for i in closest.open])
        sound = []
        for i, text in zip(closest.open, texts):
            if garbage_faults(text, lexicon):
                rows[i] = streams[i].choices(pool, k=len(rows[i]))
            else:
                sound.append((i, text))
        for i, excess in closest.offer(tokenizer, sound):
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

    Filler holds no alphabetic run of three or more that is in ``lexicon``, no letter A to E
    standing alone, no control character, line break, tag or undecodable byte.
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


def reserved_words(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The words of the frame around a rationale: chat template, tags and anchor."""
    tags = [s.opening for s in SCAFFOLDS.values()]
    return lexicon_of([chat_prompt(tokenizer, "", ""), ANCHOR, *tags])


def scrambled(
    tokenizer: PreTrainedTokenizerBase, references: Sequence[Reference], study_seed: int
) -> list[str]:
    """Each reference rationale with its words shuffled inside each sentence.

    Of eight draws the closest in loss tokens is kept, with eight more while it is further off
    than :data:`TOLERANCE`. Words are what white space separates; a sentence keeps its final
    punctuation, so that it is found again in the shuffled text.
    """
    targets = count_loss_tokens(tokenizer, [r.turn(r.rationale) for r in references])
    streams = [r.random("scrambled", study_seed) for r in references]
    closest = _Closest(references, targets)
    for done in range(1, MAX_ROUNDS + 1):
        closest.offer(
            tokenizer,
            [(i, shuffle_sentences(references[i].rationale, streams[i])) for i in closest.open],
        )
        if done % DRAWS == 0:
            closest.settle(TOLERANCE)
        if not closest.open:
            break
    return closest.texts("a shuffled text")


def shuffle_sentences(text: str, rng: random.Random) -> str:
    """``text`` with the words of each sentence in another order, if two of them differ."""
    return " ".join(_shuffle(words, rng) + end for words, end in sentences(text))


def sentences(text: str) -> list[tuple[list[str], str]]:
    """The sentences of ``text``, each as (its words, its final punctuation)."""
    split = []
    for sentence in _SENTENCE_END.split(text.strip()):
        body = sentence.rstrip(".!?")
        split.append((body.split(), sentence[len(body) :]))
    return split


def _shuffle(words: list[str], rng: random.Random) -> str:
    order = list(words)
    while order == words and len(set(words)) > 1:
        rng.shuffle(order)
    return " ".join(order)


class _Closest:
    """The text closest in loss tokens to each reference row's, among those offered.

    A row is open until a text hits its target exactly or :meth:`settle` closes it.
    """

    def __init__(self, references: Sequence[Reference], targets: Sequence[int]):
        self._references, self._targets = references, targets
        self._best: dict[int, tuple[int, str]] = {}
        self.open = list(range(len(references)))

    def offer(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[int, str]]
    ) -> list[tuple[int, int]]:
        """Weigh one text each for some rows; (row, excess tokens) of those still open."""
        counts = count_loss_tokens(tokenizer, [self._references[i].turn(t) for i, t in texts])
        excess = [(i, n - self._targets[i]) for (i, _), n in zip(texts, counts)]
        for (i, text), (_, by) in zip(texts, excess):
            if i not in self._best or abs(by) < self._best[i][0]:
                self._best[i] = (abs(by), text)
        self.settle(0)
        still = set(self.open)
        return [(i, by) for i, by in excess if i in still]

    def settle(self, tolerance: int) -> None:
        """Close the rows that have a text within ``tolerance`` tokens."""
        self.open = [i for i in self.open if i not in self._best or self._best[i][0] > tolerance]

    def texts(self, what: str) -> list[str]:
        """The closest text of every row.

        Raises:
            ConstructionError: a row was offered none.
        """
        for i, reference in enumerate(self._references):
            if i not in self._best:
                raise ConstructionError(
                    f"no {what} found in {MAX_ROUNDS} rounds for question {reference.identity} "
                    f"of {reference.source}: give the vocabulary more words outside the lexicon"
                )
        return [self._best[i][1] for i in range(len(self._references))]


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
