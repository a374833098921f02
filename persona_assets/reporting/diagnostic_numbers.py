"""Numbers of the report's diagnostics: what the checks found, how rationales ended, which letters.

None is an estimate: each is what its SQL returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import polars as pl

from persona_assets.audit import Status
from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.evaluation.protocol import StopReason
from persona_assets.reporting.ledger import Number
from persona_assets.reporting.views import literal
from persona_assets.stats.lexicon import generating_scaffolds
from persona_assets.study import Study

STATUSES: tuple[str, ...] = get_args(Status)
STOP_REASONS: tuple[str, ...] = get_args(StopReason)

_NOT_YET = float("nan")


def diagnostic_numbers(study: Study, checks: pl.DataFrame) -> Iterator[Number]:
    """The numbers; ``checks`` has the schema ``warehouse.CHECKS_SCHEMA``."""
    for asset, name in checks.select("asset", "check_name").unique(maintain_order=True).rows():
        partitions = checks.filter(asset=asset, check_name=name)["partition"].to_list()
        for status in STATUSES:
            yield _checked(study, asset, name, status, partitions)
    for arm in (BASELINE, *study.arms):
        for scaffold in generating_scaffolds(study):
            yield from _written(study, arm, scaffold)
        for scaffold in study.scaffolds:
            yield _letters(study, arm, scaffold)


def _checked(study: Study, asset: str, name: str, status: str, partitions: list[str]) -> Number:
    where = f"asset = {literal(asset)} AND check_name = {literal(name)}"
    where += f" AND status = {literal(status)}"
    return Number(
        f"checks/{asset}/{name}/{status}",
        _NOT_YET,
        "partitions",
        0,
        f"Partitions of {asset} whose check {name} came out as {status}.",
        f"SELECT count(*)\nFROM checks\nWHERE {where}",
        f"SELECT * FROM checks\nWHERE {where}\nORDER BY partition",
        tuple(cell.key for cell in study.cells if cell.key in partitions),
    )


def _written(study: Study, arm: str, scaffold: str) -> Iterator[Number]:
    """How the rationales of an arm's cells ended, and how long they are."""
    where = f"{_of(arm)} AND scaffold = {literal(scaffold)}"
    rows = (
        "SELECT cell, persona, scaffold, question_id, stop_reason, rationale_tokens, run_id\n"
        f"FROM outcomes\nWHERE {where}\nORDER BY cell, persona, question_id"
    )
    for reason in STOP_REASONS:
        yield Number(
            f"stopped/{arm}/{scaffold}/{reason}",
            _NOT_YET,
            "share of rationales",
            0,
            f"Share of the rationales of {arm} under {scaffold} that ended by {reason}.",
            f"SELECT coalesce(sum(n) FILTER (stop_reason = {literal(reason)}), 0) / sum(n)\n"
            f"FROM stop_reasons\nWHERE {where}",
            rows,
            _cells(study, arm),
        )
    yield Number(
        f"written/{arm}/{scaffold}",
        _NOT_YET,
        "tokens a rationale",
        0,
        f"Mean tokens of a rationale of {arm} under {scaffold}.",
        f"SELECT sum(tokens) / sum(n)\nFROM stop_reasons\nWHERE {where}",
        rows,
        _cells(study, arm),
    )


def _letters(study: Study, arm: str, scaffold: str) -> Number:
    where = f"{_of(arm)} AND scaffold = {literal(scaffold)}"
    return Number(
        f"letters/{arm}/{scaffold}",
        _NOT_YET,
        "share of answers",
        0,
        f"The largest share that one letter has of the answers of a cell of {arm} under "
        f"{scaffold}, asked as one persona.",
        f"SELECT max(share)\nFROM predicted_letters\nWHERE {where}",
        "SELECT cell, persona, scaffold, question_id, correct_letter, predicted_letter, run_id\n"
        f"FROM outcomes\nWHERE {where}\nORDER BY cell, persona, question_id",
        _cells(study, arm),
    )


def _of(arm: str) -> str:
    """The condition for an arm's rows, or the untrained model's."""
    return f"cell = {literal(BASELINE)}" if arm == BASELINE else f"arm = {literal(arm)}"


def _cells(study: Study, arm: str) -> tuple[str, ...]:
    if arm == BASELINE:
        return (BASELINE,)
    return tuple(cell.key for cell in study.cells if cell.arm == arm)
