"""What a check found: the observed value beside the threshold, and what to do about it.

Pure data, made by the core (dataset audits, gates, diagnostics) and turned into Dagster check
results by :mod:`persona_assets.checks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "unverifiable"]


@dataclass(frozen=True, slots=True)
class Distribution:
    """How often each value was seen: one bar a bin, for one series or several beside each other.

    Attributes:
        title: What is shown.
        axis: What the bins are of, with the unit.
        counted: What the bars count (``rows``, ``targets``).
        bins: The n bins' labels, or, for numbers, the n + 1 edges between them.
        series: The n bars of each series, by its name.
        limits: The values asked for, drawn as lines across numeric bins.
        limits_of: Of what they are asked (``each row``, ``the mean``); empty without limits.
    """

    title: str
    axis: str
    counted: str
    bins: list[str] | list[float]
    series: dict[str, list[float]]
    limits: list[float] = field(default_factory=list)
    limits_of: str = ""


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
        distribution: How the values are spread, where one number does not say it.
    """

    name: str
    status: Status
    observed: str
    threshold: str
    remedy: str
    blocking: bool = True
    details: dict[str, Any] = field(default_factory=dict)
    distribution: Distribution | None = None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Audit:
        """An audit from the fields that ``dataclasses.asdict`` gave.

        Raises:
            TypeError: they are not the fields of an audit.
        """
        drawn = raw.get("distribution")
        return cls(**{**raw, "distribution": drawn and Distribution(**drawn)})

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
    distribution: Distribution | None = None,
    **details: Any,
) -> Audit:
    """An :class:`Audit` that passed or failed according to ``ok``."""
    status: Status = "passed" if ok else "failed"
    return Audit(name, status, observed, threshold, remedy, blocking, details, distribution)
