"""Asset checks: their names, declared once, and how a core :class:`Audit` becomes a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import dagster as dg

from persona_assets.audit import Audit


@dataclass(frozen=True, slots=True)
class Check:
    """A declared check: its name, what it asks, and whether consumers refuse on its failure."""

    name: str
    asks: str
    blocking: bool = True


#: The checks of each asset, in the order the UI shows them.
CHECKS: dict[str, tuple[Check, ...]] = {}


def check_specs(
    asset: str, key: dg.AssetKey, partitions: dg.PartitionsDefinition | None
) -> list[dg.AssetCheckSpec]:
    """The asset's check specs, partition-aware: each partition keeps a status of its own."""
    return [
        dg.AssetCheckSpec(
            check.name,
            asset=key,
            description=check.asks,
            blocking=check.blocking,
            partitions_def=partitions,
        )
        for check in CHECKS.get(asset, ())
    ]


def check_results(asset: str, audits: Sequence[Audit]) -> list[dg.AssetCheckResult]:
    """A result for each declared check of an asset.

    An ``unverifiable`` audit is reported as a warning, never as passed; a declared check that
    does not concern the partition says so.

    Raises:
        ValueError: an audit was made whose check is not declared in ``CHECKS``.
    """
    declared = CHECKS.get(asset, ())
    by_name = {audit.name: audit for audit in audits}
    undeclared = sorted(by_name.keys() - {check.name for check in declared})
    if undeclared:
        raise ValueError(f"{asset}: audits {undeclared} are not declared in checks.CHECKS")
    return [_result(check, by_name.get(check.name)) for check in declared]


def _result(check: Check, audit: Audit | None) -> dg.AssetCheckResult:
    if audit is None:
        return dg.AssetCheckResult(
            check_name=check.name,
            passed=True,
            metadata={"status": "does not concern this partition"},
        )
    failed_hard = audit.status == "failed" and audit.blocking
    return dg.AssetCheckResult(
        check_name=check.name,
        passed=audit.status == "passed",
        severity=dg.AssetCheckSeverity.ERROR if failed_hard else dg.AssetCheckSeverity.WARN,
        description=f"{audit.observed} (asked: {audit.threshold})",
        metadata={
            "status": audit.status,
            "observed": audit.observed,
            "threshold": audit.threshold,
            "remedy": audit.remedy,
            **({"details": dg.MetadataValue.json(audit.details)} if audit.details else {}),
        },
    )
