"""The audit of token-budget parity: rows bear as much loss as the reference arm's rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl

from persona_assets.audit import Audit, Distribution, audit
from persona_assets.rationales.arms import REFERENCE_ARM, Arm
from persona_assets.rationales.condition import MAX_DROPPED
from persona_assets.rationales.matching import TOLERANCE
from persona_assets.training.audited import AuditedDataset

#: Written arms: the mean's distance from the reference arm's mean, as a share of it.
WRITTEN_TOLERANCE = 0.20

_MOST_BARS = 24
#: Differences beyond it are counted in the outermost bar.
_FARTHEST = 10


def loss_token_parity(dataset: AuditedDataset) -> Audit:
    """The cell's tokens are matched to those of the reference rows, in each row or on average.

    Constructed rows are held to ``matching.TOLERANCE`` each, written ones to
    ``WRITTEN_TOLERANCE`` on average; a row of the reference arm is its own reference. Every row
    needs a reference row to be held to, but for ``MAX_DROPPED`` of the written ones, whose
    reference may have been dropped. Rows of a carried-over cell are not what its checkpoint saw:
    ``unverifiable``, whatever they show.

    Where the loss is on the answer line only, the budget is not at parity, by design: the audit
    fails as a warning that blocks nothing. Whole turns are compared in its place, since the
    context is matched all the same, and where these are off it blocks.
    """
    arm, rows = dataset.arm, _compared(dataset)
    remedy = "Materialize the condition's rationales again, with this study's tokenizer."
    if rows.is_empty():
        found = audit(
            "loss_token_parity",
            False,
            observed="no row has a reference row",
            threshold="reference rows to compare with",
            remedy=remedy,
        )
    else:
        matched, threshold, distribution = _parity(arm, rows)
        details, lacking = _details(rows), dataset.frame.height - rows.height
        allowed = MAX_DROPPED if _is_averaged(arm) else 0.0
        found = audit(
            "loss_token_parity",
            matched and lacking <= allowed * dataset.frame.height,
            observed=f"{_observed(arm, details)}; {lacking} rows without a reference row",
            threshold=f"{threshold}; at most {allowed:.0%} of the rows without a reference row",
            remedy=remedy,
            distribution=distribution,
            **details,
            rows_without_reference=lacking,
        )
        if arm.loss_on == "answer":
            found = _as_warning(found, dataset.frame, details["reference_mean"])
    if dataset.cell.origin == "carry_over":
        observed = f"{found.observed}; not what this checkpoint saw"
        return replace(found, status="unverifiable", observed=observed)
    return found


def _compared(dataset: AuditedDataset) -> pl.DataFrame:
    """The rows that have a reference row, with the tokens of both and their difference."""
    frame = dataset.frame.select(
        "question_id", tokens="loss_tokens", reference_tokens="reference_loss_tokens"
    )
    if dataset.arm.loss_on == "answer":
        lengths = [len(ids) for ids in dataset.turn_ids]
        frame = frame.with_columns(tokens=pl.Series(lengths, dtype=pl.Int32))
    return frame.drop_nulls("reference_tokens").with_columns(
        difference=pl.col("tokens") - pl.col("reference_tokens")
    )


def _parity(arm: Arm, rows: pl.DataFrame) -> tuple[bool, str, Distribution]:
    """Whether the rows are matched, what is asked, and the distribution that shows it."""
    what = "tokens of the turn" if arm.loss_on == "answer" else "loss tokens"
    if _is_averaged(arm):
        mean, reference = _mean(rows["tokens"]), _mean(rows["reference_tokens"])
        bounds = [reference * (1 - WRITTEN_TOLERANCE), reference * (1 + WRITTEN_TOLERANCE)]
        asked = f"mean within ±{WRITTEN_TOLERANCE:.0%} of the reference arm's ({what})"
        return bounds[0] <= mean <= bounds[1], asked, _lengths(rows, what, bounds)
    tolerance = 0 if arm.name == REFERENCE_ARM else TOLERANCE
    off = int(rows["difference"].abs().max())
    asked = f"at most {tolerance} {what} from the reference row, in any row"
    return off <= tolerance, asked, _differences(rows, what, tolerance)


def _is_averaged(arm: Arm) -> bool:
    """Whether rows are matched on average: a writer's are; constructions match row by row."""
    return not (arm.is_constructed or arm.name == REFERENCE_ARM)


def _mean(counts: pl.Series) -> float:
    return int(counts.cast(pl.Int64).sum()) / counts.len()


def _details(rows: pl.DataFrame) -> dict:
    return {
        "rows": rows.height,
        "mean": _mean(rows["tokens"]),
        "reference_mean": _mean(rows["reference_tokens"]),
        "total": int(rows["tokens"].cast(pl.Int64).sum()),
        "reference_total": int(rows["reference_tokens"].cast(pl.Int64).sum()),
        "worst_row": rows.sort(pl.col("difference").abs(), descending=True).row(0, named=True),
    }


def _observed(arm: Arm, found: dict) -> str:
    worst = found["worst_row"]
    compared = (
        f"mean {found['mean']:.2f} tokens a row, {found['mean'] / found['reference_mean'] - 1:+.1%}"
        f" of the reference arm's {found['reference_mean']:.2f}; {found['total']} in all, "
        f"{found['total'] - found['reference_total']:+d}; at most {abs(worst['difference'])} "
        f"from the reference row (question {worst['question_id']}: {worst['tokens']} against "
        f"{worst['reference_tokens']})"
    )
    return f"each row is its own reference: {compared}" if arm.name == REFERENCE_ARM else compared


def _as_warning(found: Audit, frame: pl.DataFrame, reference_mean: float) -> Audit:
    """The finding on whole turns of an arm whose rationales bear no loss."""
    loss = _mean(frame["loss_tokens"])
    return replace(
        found,
        status="failed",
        blocking=found.status == "failed",
        observed=f"the loss is on the answer line only: {loss:.2f} loss tokens a row, "
        f"{loss / reference_mean:.1%} of the reference arm's, by design; whole turns: "
        f"{found.observed}",
        threshold=f"loss tokens as the reference arm's (else a warning), and {found.threshold}",
        remedy="Read the arm's contrasts as of another token budget; where whole turns are off, "
        "materialize the condition's rationales again.",
        details={**found.details, "loss_tokens_mean": loss},
    )


def _differences(rows: pl.DataFrame, what: str, tolerance: int) -> Distribution:
    reach = min(max(tolerance + 2, int(rows["difference"].abs().max())), _FARTHEST)
    values = rows["difference"].clip(-reach, reach).to_numpy()
    counts = np.bincount(values + reach, minlength=2 * reach + 1)
    beyond = rows.filter(pl.col("difference").abs() > reach).height
    return Distribution(
        title=f"{what}: row less reference row"
        + (f" ({beyond} rows beyond ±{reach} in the outermost bars)" if beyond else ""),
        axis="difference in tokens",
        counted="rows",
        bins=[edge + 0.5 for edge in range(-reach - 1, reach + 1)],
        series={"rows": counts.tolist()},
        limits=[-tolerance - 0.5, tolerance + 0.5],
        limits_of="each row",
    )


def _lengths(rows: pl.DataFrame, what: str, bounds: list[float]) -> Distribution:
    series = {"this arm": rows["tokens"].to_numpy(), "reference arm": rows["reference_tokens"]}
    low = min(int(values.min()) for values in series.values())
    high = max(int(values.max()) for values in series.values()) + 1
    width = -(-(high - low) // _MOST_BARS)
    edges = np.arange(low, high + width, width)
    return Distribution(
        title=f"{what} a row (mean {_mean(rows['tokens']):.2f}, "
        f"reference arm {_mean(rows['reference_tokens']):.2f})",
        axis="tokens",
        counted="rows",
        bins=edges.tolist(),
        series={name: np.histogram(v, bins=edges)[0].tolist() for name, v in series.items()},
        limits=[round(bound, 2) for bound in bounds],
        limits_of="the mean",
    )
