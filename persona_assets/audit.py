"""What a check found: the observed value beside the threshold, and what to do about it.

Pure data, made by the core (dataset audits, gates, diagnostics) and turned into Dagster check
results by :mod:`persona_assets.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "unverifiable"]


@dataclass(frozen=True, slots=True)
class Audit:
    """One property of one partition, looked at.

    Attributes:
        name: The check's name, a Python identifier, unique within its asset.
        status: ``unverifiable`` where the evidence is not ours (rows of a carried-over
            checkpoint): it is never counted as passed.
        observed: What was measured, with its unit in words where it has one.
        threshold: What was asked for, in the same terms.
        remedy: What to do when it fails; one sentence.
        blocking: Whether consumers refuse a partition on which this failed.
        details: Further values worth a look (JSON-representable), such as the worst rows.
    """

    name: str
    status: Status
    observed: str
    threshold: str
    remedy: str
    blocking: bool = True
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> bool:
        """Whether consumers must refuse the partition: it failed, and it is blocking."""
        return self.blocking and self.status == "failed"


def audit(
    name: str,
    ok: bool,
    *,
    observed: str,
    threshold: str,
    remedy: str,
    blocking: bool = True,
    **details: Any,
) -> Audit:
    """An :class:`Audit` that passed or failed according to ``ok``."""
    return Audit(name, "passed" if ok else "failed", observed, threshold, remedy, blocking, details)
