"""The ``scrambled`` construction: the reference's words, shuffled inside each sentence."""

from __future__ import annotations

import random
import re

from persona_assets.rationales.matching import DRAWS, MAX_ROUNDS, TOLERANCE, Batch, Closest

#: A sentence ends at . ! or ? before white space, or with the text.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def scrambled(batch: Batch) -> list[str]:
    """Each reference rationale with its words shuffled inside each sentence.

    Of eight draws the closest in tokens is kept, with eight more while it is further off than
    ``TOLERANCE``. Words are what white space separates; a sentence keeps its final punctuation, so
    that it is found again in the shuffled text.
    """
    streams, closest = batch.streams(), Closest(batch, batch.targets())
    for done in range(1, MAX_ROUNDS + 1):
        closest.offer(
            [
                (i, shuffle_sentences(batch.references[i].rationale, streams[i]))
                for i in closest.open
            ]
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
