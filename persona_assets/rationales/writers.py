"""The rationale-writer interface: who turns (question, voice, letter to argue for) into text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from persona_assets.questions.bank import Question

#: Why a reply is no rationale: the writer declined, was cut off, or wrote what cannot stand in a
#: training row.
WriterProblem = Literal["refused", "truncated", "malformed"]


@dataclass(frozen=True, slots=True)
class RationaleRequest:
    """One rationale to write.

    Attributes:
        question: The question.
        argues_for: The letter that the rationale argues for.
        persona: The persona in whose voice it is written, or None for a neutral one.
        system_prompt: That persona's system prompt, or None.
    """

    question: Question
    argues_for: str
    persona: str | None = None
    system_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class WrittenRationale:
    """A writer's reply.

    Attributes:
        text: The rationale without tags.
        problem: Why it cannot be used, or None; such a row is dropped and counted.
    """

    text: str
    problem: WriterProblem | None = None


class RationaleWriter(Protocol):
    """Writes rationales; equal requests get equal texts, always (templates by hash, APIs by cache).

    That is what lets constructed arms be matched to the reference arm's row, and the
    contradicting arm reuse the persona-correct rationale, without reading each other's files.
    """

    def write(self, requests: Sequence[RationaleRequest]) -> list[WrittenRationale]:
        """One reply a request, in order."""
        ...

    def vocabulary(self) -> frozenset[str]:
        """Case-folded alphabetic runs of 3 or more letters beyond English in its own phrases.

        Garbage filler must hold none of them, nor any English word (``words.english``).
        """
        ...

    @property
    def accounting(self) -> Mapping[str, Any]:
        """What was asked and paid since the writer was made (JSON-representable); may be empty."""
        ...
