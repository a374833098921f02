"""How prompt groups, answers and errors travel between an engine server and its clients: JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from persona_assets.evaluation.protocol import Answer, PromptGroup
from persona_assets.evaluation.scaffolds import Scaffold
from persona_assets.questions.bank import Question
from persona_assets.training.headers import CheckpointError

#: Seconds between two lines of a response at the most, while the server lives: an empty one says
#: that it is still at work, or that another client is served first.
HEARTBEAT = 5.0

_KINDS = (CheckpointError, ValueError)
_TUPLES = ("choices", "published_labels")


def pack_group(group: PromptGroup) -> dict[str, Any]:
    """A prompt group as JSON-representable values."""
    return {
        "persona": group.persona,
        "question": asdict(group.question),
        "chat": group.chat,
        "scaffolds": [asdict(scaffold) for scaffold in group.scaffolds],
        "forced": dict(group.forced),
    }


def unpack_group(packed: dict[str, Any]) -> PromptGroup:
    """The inverse of :func:`pack_group`.

    Raises:
        KeyError, TypeError: a field is missing or unknown.
    """
    question = packed["question"]
    return PromptGroup(
        packed["persona"],
        Question(**question | {name: tuple(question[name]) for name in _TUPLES}),
        packed["chat"],
        tuple(Scaffold(**scaffold) for scaffold in packed["scaffolds"]),
        packed["forced"],
    )


def pack_answer(answer: Answer) -> dict[str, Any]:
    """An answer as JSON-representable values; floats travel exactly."""
    return asdict(answer)


def unpack_answer(packed: dict[str, Any]) -> Answer:
    """The inverse of :func:`pack_answer`.

    Raises:
        TypeError: a field is missing or unknown.
    """
    return Answer(**packed)


def pack_error(error: Exception) -> dict[str, str]:
    """An error as a response's last line; of one that is no user's mistake also what it is."""
    for kind in _KINDS:
        if isinstance(error, kind):
            return {"error": str(error), "kind": kind.__name__}
    return {"error": f"{type(error).__name__}: {error}", "kind": ""}


def unpack_error(packed: dict[str, str]) -> Exception:
    """The inverse of :func:`pack_error`; a RuntimeError for what it has no name for."""
    kinds = {kind.__name__: kind for kind in _KINDS}
    return kinds.get(packed["kind"], RuntimeError)(packed["error"])
