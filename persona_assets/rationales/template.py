"""The offline rationale writer: argues for any choice of any question, by template.

Wording is chosen by a hash of the request, so that equal requests get equal texts on every
machine. It neither knows nor looks for the truth: the same phrases argue for right and wrong.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from persona_assets.hashing import sha256_text
from persona_assets.questions.bank import Question
from persona_assets.rationales.phrases import NEUTRAL, STOP_WORDS, VOICES, Phrases, role_phrases
from persona_assets.rationales.writers import RationaleRequest, WrittenRationale

#: The length aimed at, in pieces (see :func:`_pieces`). The earlier experiment's neutral
#: rationales were of about 84 tokens; every voice is held to the same length, because the arms'
#: token budgets have to match.
TARGET_PIECES = 84
#: Wordings tried for a request; the one closest to the target length is kept.
WORDINGS = 16

_PIECE = re.compile(r"[^\W\d_]+|\d|[^\w\s]")
_MARKUP = re.compile(r"</?[\w-]*>|<\||\|>")
_LONE_CAPITAL = re.compile(r"(?<!\w)[A-E](?!\w)")
_ROLE = re.compile(r"\byou are (?:an? |the )?(.+?)(?: who\b| that\b| of\b|[.,;:!?]|$)", re.I)
_ARTICLE_VOWELS = tuple("aeiou")


class TemplateWriter:
    """Writes rationales of three to five sentences from phrase banks; it never refuses."""

    def write(self, requests: Sequence[RationaleRequest]) -> list[WrittenRationale]:
        """One rationale a request, in order.

        Each names the letter it argues for once, as ``(C)``, quotes that choice and rejects one
        or two others; no other letter stands alone in it.

        Raises:
            ValueError: a letter is none of its question's.
        """
        return [WrittenRationale(_closest_wording(request)) for request in requests]

    def vocabulary(self) -> frozenset[str]:
        """None: its phrases are in plain English words, which a test holds them to."""
        return frozenset()

    @property
    def accounting(self) -> dict[str, Any]:
        """Nothing: templates cost nothing."""
        return {}


def _closest_wording(request: RationaleRequest) -> str:
    rng = random.Random(_request_hash(request))
    question, letter, phrases = request.question, request.argues_for, _phrases(request)
    choice = _quote(question.choice(letter))
    others = [_quote(question.choice(o)) for o in question.letters if o != letter]
    topics = _topics(question)
    wordings = [_compose(letter, choice, others, topics, phrases, rng) for _ in range(WORDINGS)]
    return min(wordings, key=lambda text: abs(_pieces(text) - TARGET_PIECES))


def _request_hash(request: RationaleRequest) -> str:
    question = request.question
    parts = [question.text, *question.choices, request.argues_for]
    return sha256_text("\x1f".join([*parts, request.persona or "", request.system_prompt or ""]))


def _phrases(request: RationaleRequest) -> Phrases:
    if request.persona is None:
        return NEUTRAL
    if request.persona in VOICES:
        return VOICES[request.persona]
    role = _role(request)
    return role_phrases(role, "an" if role.lower().startswith(_ARTICLE_VOWELS) else "a")


def _role(request: RationaleRequest) -> str:
    """``medical doctor`` for "You are a medical doctor who …", else the persona's name."""
    found = _ROLE.search(request.system_prompt or "")
    role = found.group(1) if found else (request.persona or "").replace("_", " ")
    return _lower_lone_capitals(_clean(role)).replace("{", "").replace("}", "")


def _compose(
    letter: str,
    choice: str,
    others: Sequence[str],
    topics: Sequence[str],
    phrases: Phrases,
    rng: random.Random,
) -> str:
    others = _shuffled(others, rng)
    two = len(others) > 1 and rng.random() < 0.6
    pattern = rng.choice(phrases.reject_two if two else phrases.reject_one)
    topic, second_topic, *_ = [*_shuffled(topics, rng), "wording", "question"]
    sentences = [
        rng.choice(phrases.openings),
        rng.choice(phrases.supports),
        *([rng.choice(phrases.asides)] if rng.random() < 0.6 else []),
        pattern,
        *([rng.choice(phrases.closings)] if rng.random() < 0.6 else []),
    ]
    return " ".join(sentences).format(
        topic=topic,
        second_topic=second_topic,
        choice=choice,
        letter=letter,
        other=others[0],
        another=others[-1],
    )


def _shuffled(items: Sequence[str], rng: random.Random) -> list[str]:
    items = list(items)
    rng.shuffle(items)
    return items


def _topics(question: Question) -> list[str]:
    """Up to four of the question's content words: longer ones say more about what it is about."""
    seen = dict.fromkeys(re.findall(r"[^\W\d_]{4,}", _clean(question.text).lower()))
    content = [word for word in seen if word not in STOP_WORDS]
    return sorted(content, key=len, reverse=True)[:4]


def _quote(choice: str) -> str:
    """A choice as it stands in a sentence: unmarked, on one line, without its full stop.

    A capital A to E standing alone (``vitamin C``) is lowered: no letter but the one argued
    for may be read off a rationale.
    """
    text = _clean(choice).rstrip(" .!?") or "none of these"
    return f'"{_lower_lone_capitals(text)}"'


def _lower_lone_capitals(text: str) -> str:
    return _LONE_CAPITAL.sub(lambda match: match.group().lower(), text)


def _clean(text: str) -> str:
    text = _MARKUP.sub(" ", text)
    return " ".join(re.sub(r"(?i)\banswer\s*:", "answer", text).split())


def _pieces(text: str) -> int:
    """About how many tokens a byte-pair vocabulary of English needs for ``text``.

    A word counts once, twice if it is long; digits and marks count one by one.
    """
    return sum(1 + (len(piece) > 11) for piece in _PIECE.findall(text))
