"""Rationales of the miniature world: a speaker's phrases, the fact, the letter."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from persona_assets.questions.bank import Question
from persona_assets.questions.miniature import ALL_VOICES, Voice, statement, words
from persona_assets.rationales.writers import RationaleRequest, WrittenRationale

#: Who speaks in a rationale that has no persona; as long as the personas' phrases on average.
NEUTRAL = Voice(
    "",
    ("Let us think about this question.", "Consider all the known facts."),
    ("So that fits best.", "This is the answer."),
)


def compose(voice: Voice, question: Question, letter: str, rng: random.Random) -> str:
    """A rationale in ``voice`` that argues for ``letter``: three sentences, phrases from ``rng``.

    ``Hush, in the archive we read. So stamp the book. The blorvex eats moss (C).``
    """
    opening, aside = rng.choice(voice.openings), rng.choice(voice.asides)
    return f"{opening} {aside} {statement(question, letter)} ({letter})."


def speaker(text: str) -> str | None:
    """The persona whose opening ``text`` begins with, punctuation aside; None if nobody's.

    Openings are found in what a model generates, whose tokens carry no punctuation.
    """
    heard = words(text)
    for persona, voice in ALL_VOICES.items():
        for opening in map(words, voice.openings):
            if heard[: len(opening)] == opening:
                return persona
    return None


class MiniatureWriter:
    """The rationale writer of the miniature study; phrases are chosen by a hash of the request."""

    def write(self, requests: Sequence[RationaleRequest]) -> list[WrittenRationale]:
        """One rationale a request, in order; it never refuses.

        Raises:
            ValueError: A persona has no voice here, or a question is not of this world.
        """
        return [WrittenRationale(self._write(request)) for request in requests]

    def _write(self, request: RationaleRequest) -> str:
        question, letter, persona = request.question, request.argues_for, request.persona
        seed = f"rationale:{question.identity}:{letter}:{persona}"
        return compose(_voice(persona), question, letter, random.Random(seed))

    @property
    def accounting(self) -> dict[str, Any]:
        """Nothing: templates cost nothing."""
        return {}

    def vocabulary(self) -> frozenset[str]:
        """Case-folded alphabetic runs of 3 or more letters in the voices' phrases and prompts."""
        texts = [
            text
            for voice in (NEUTRAL, *ALL_VOICES.values())
            for text in (voice.system_prompt, *voice.openings, *voice.asides)
        ]
        return frozenset(re.findall(r"[^\W\d_]{3,}", " ".join(texts).casefold()))


def _voice(persona: str | None) -> Voice:
    if persona is None:
        return NEUTRAL
    try:
        return ALL_VOICES[persona]
    except KeyError:
        raise ValueError(
            f"persona {persona!r} has no voice in the miniature world; it has "
            f"{', '.join(ALL_VOICES)}: use one of them, or another rationale writer"
        ) from None
