"""The arms: how the assistant's turn of a training row is written, arm by arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from persona_assets.evaluation.scaffolds import SCAFFOLDS, Scaffold


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of writing a training row's assistant turn.

    Attributes:
        name: The arm's key in study files, partitions and paths.
        scaffold: The scaffold whose frame the turn has (tags and anchor), hence the one the
            arm is *matched* with at evaluation.
        target: Whether the row's final letter is the question's wrong letter or the correct one.
        rationale: ``written`` by the rationale writer, ``garbage`` or ``scrambled`` (constructed,
            length-matched row by row), or ``none``.
        voice: Who speaks in a written rationale: nobody in particular, or the source persona.
        argues_for: Which letter a written rationale argues for.
    """

    name: str
    scaffold: Scaffold
    target: Literal["wrong", "correct"]
    rationale: Literal["none", "written", "garbage", "scrambled"]
    voice: Literal["neutral", "persona"] = "neutral"
    argues_for: Literal["wrong", "correct"] = "wrong"

    @property
    def has_rationale(self) -> bool:
        """Whether token-budget parity applies to the arm."""
        return self.rationale != "none"

    @property
    def is_constructed(self) -> bool:
        """Whether the rationale is built from the reference arm's row rather than written."""
        return self.rationale in ("garbage", "scrambled")


_PLAIN, _GENERIC, _PERSONA = (SCAFFOLDS[s] for s in ("no_cot", "generic_cot", "persona_cot"))

#: The arm whose rows the others' token budget is matched to.
REFERENCE_ARM = "generic_cot"

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
