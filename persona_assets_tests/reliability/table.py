"""The rows of ``docs/reliability.md``: what was done to the tool, how often, and what was lost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Row:
    """A kind of fault.

    Attributes:
        fault: What was done.
        tried: How often.
        lost: How often something that had landed was lost, wrong, or silently used though broken.
        recovered_by: What made it good again.
        seen: Figures worth knowing, in words.
        faults: What went wrong, in words; the first few.
    """

    fault: str
    tried: int = 0
    lost: int = 0
    recovered_by: str = ""
    seen: str = ""
    faults: list[str] = field(default_factory=list)

    def count(self, problem: str | None) -> None:
        """One more try, which went well (None) or did not."""
        self.tried += 1
        if problem is not None:
            self.lost += 1
            self.faults = [*self.faults, problem][:5]


def markdown(rows: list[Row]) -> str:
    """The table, one line a row."""
    lines = ["| fault | tried | lost | recovered by | seen |", "|---|---|---|---|---|"]
    lines += [f"| {r.fault} | {r.tried} | {r.lost} | {r.recovered_by} | {r.seen} |" for r in rows]
    return "\n".join(lines) + "\n"
