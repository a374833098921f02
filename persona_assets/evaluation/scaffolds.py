"""The scaffolds: how the assistant's turn is opened, closed and asked for its letter."""

from __future__ import annotations

from dataclasses import dataclass

#: What stands before the letter, in training rows and at evaluation alike. Rows end in
#: ``Answer: C``, which Qwen2.5 encodes as ``Answer``, ``:``, `` C``: the prompt must end in the
#: colon and `` C`` be scored. (``Answer: `` + ``C`` is another token sequence; an earlier rig
#: scored that one.)
ANCHOR = "Answer:"


@dataclass(frozen=True, slots=True)
class Scaffold:
    """A frame for the assistant's turn.

    Attributes:
        name: The scaffold's key.
        tag: The element the rationale stands in, or None.
        generates: Whether a rationale is generated inside the tag at evaluation.
        forces: The arm whose kind of rationale is put inside the tag at evaluation instead (a
            *content-forcing* scaffold), or None.
    """

    name: str
    tag: str | None = None
    generates: bool = False
    forces: str | None = None

    @property
    def opening(self) -> str:
        """What the turn starts with: the opening tag and a line break, or nothing."""
        return f"<{self.tag}>\n" if self.tag else ""

    @property
    def closing_tag(self) -> str:
        """What ends the rationale, or nothing."""
        return f"</{self.tag}>" if self.tag else ""

    def close(self, rationale: str) -> str:
        """What follows the opening, up to and including the anchor."""
        return f"{rationale.rstrip()}\n{self.closing_tag}\n{ANCHOR}" if self.tag else ANCHOR


#: The scaffolds that every study knows; it may define others.
SCAFFOLDS: dict[str, Scaffold] = {
    s.name: s
    for s in (
        Scaffold("no_cot"),
        Scaffold("generic_cot", "thinking", generates=True),
        Scaffold("persona_cot", "persona-thinking", generates=True),
        Scaffold("empty_persona_cot", "persona-thinking"),
    )
}
