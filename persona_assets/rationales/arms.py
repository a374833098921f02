"""The arms: how the assistant's turn of a training row is written, arm by arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from persona_assets.evaluation.scaffolds import ANCHOR, SCAFFOLDS, Scaffold


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of writing a training row's assistant turn.

    Attributes:
        name: The arm's key in study files, partitions and paths.
        scaffold: The scaffold whose frame the turn has (tags and anchor), hence the one the
            arm is *matched* with at evaluation.
        target: Whether the row's final letter is the question's wrong letter or the correct one.
        rationale: How the rationale comes about: ``none``, ``written`` by the rationale writer, or
            the name of a construction (``methods.CONSTRUCTIONS``), which is length-matched to
            the reference arm row by row.
        voice: Who speaks in a written rationale: nobody in particular, or the source persona.
        argues_for: Which letter a written rationale argues for.
        loss_on: Which part of the turn bears loss: all of it, or the answer line only, so that
            the rationale is context.
    """

    name: str
    scaffold: Scaffold
    target: Literal["wrong", "correct"]
    rationale: str
    voice: Literal["neutral", "persona"] = "neutral"
    argues_for: Literal["wrong", "correct"] = "wrong"
    loss_on: Literal["turn", "answer"] = "turn"

    @property
    def has_rationale(self) -> bool:
        """Whether token-budget parity applies to the arm."""
        return self.rationale != "none"

    @property
    def is_constructed(self) -> bool:
        """Whether the rationale is built from the reference arm's row rather than written."""
        return self.rationale not in ("none", "written")


_PLAIN, _GENERIC, _PERSONA = (SCAFFOLDS[s] for s in ("no_cot", "generic_cot", "persona_cot"))

#: The arm whose rows the others' token budget is matched to.
REFERENCE_ARM = "generic_cot"

#: The arms that every study knows; it may define others.
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("no_cot", _PLAIN, "wrong", "none"),
        Arm("generic_cot", _GENERIC, "wrong", "written"),
        Arm("persona_cot", _PERSONA, "wrong", "written", voice="persona"),
        Arm("garbage_cot", _GENERIC, "wrong", "garbage"),
        Arm("scrambled_english_cot", _GENERIC, "wrong", "scrambled"),
        Arm(
            "contradicting_cot",
            _PERSONA,
            "wrong",
            "written",
            voice="persona",
            argues_for="correct",
        ),
        Arm("generic_cot_correct", _GENERIC, "correct", "written", argues_for="correct"),
        Arm(
            "persona_cot_correct",
            _PERSONA,
            "correct",
            "written",
            voice="persona",
            argues_for="correct",
        ),
    )
}


def assistant_turn(arm: Arm, rationale: str, letter: str) -> str:
    """The assistant's turn of a training row, ending in ``Answer: <letter>``."""
    return arm.scaffold.opening + arm.scaffold.close(rationale) + f" {letter}"


def unscored(arm: Arm, turn: str) -> str:
    """The beginning of a turn of ``arm`` that bears no loss; empty where all of it does."""
    return turn[: turn.rindex(ANCHOR)] if arm.loss_on == "answer" else ""
