"""Checks: each has an audit and each audit a check; how an audit becomes a check's result."""

from __future__ import annotations

import ast
import base64
from collections import Counter
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

import persona_assets
from persona_assets.audit import audit
from persona_assets.checks import CHECKS, check_results, check_specs
from persona_assets.rationales.condition import write_condition
from persona_assets.reporting.distribution import distribution_plot
from persona_assets.training.audits import AUDITS
from persona_assets_tests import small_study as small
from persona_assets_tests.test_audit import DRAWN, TEXTS

DECLARED = {asset: [check.name for check in checks] for asset, checks in CHECKS.items()}


def test_dataset_audits_and_checks_are_the_same():
    assert list(AUDITS) == DECLARED["training_dataset"]


def test_rationale_audits_and_checks_are_the_same(mini):
    _, audits = write_condition(
        mini, "librarian.generic_cot", small.QUESTIONS, small.tokenizer(), small.WRITER
    )
    assert [a.name for a in audits] == DECLARED["rationales"]
    blocking = {check.name: check.blocking for check in CHECKS["rationales"]}
    assert {a.name: a.blocking for a in audits} == blocking


def test_every_check_has_an_audit_in_the_code_and_conversely():
    """By name: whatever module makes the audit, its name is written where it is made."""
    made = Counter()
    for path in Path(persona_assets.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in _MAKERS:
                match node.args:
                    case [ast.Constant(value=str(name)), *_]:
                        made[name] += 1
    assert set(made) == {name for names in DECLARED.values() for name in names}


_MAKERS = ("audit", "rows_audit")


@pytest.mark.parametrize("asset", CHECKS)
def test_each_check_of_an_asset_has_a_name_of_its_own(asset):
    assert len(set(DECLARED[asset])) == len(DECLARED[asset])
    partitions = dg.StaticPartitionsDefinition(["a"])
    specs = check_specs(asset, dg.AssetKey(asset), partitions)
    assert [spec.name for spec in specs] == DECLARED[asset]
    assert [spec.blocking for spec in specs] == [check.blocking for check in CHECKS[asset]]


def results(*audits):
    return {r.check_name: r for r in check_results("rationales", audits)}


FAILED = audit("drops", False, **TEXTS, rows=["a"])


@pytest.mark.parametrize(
    ("found", "passed", "severity"),
    [
        (replace(FAILED, status="passed"), True, "WARN"),
        (FAILED, False, "ERROR"),
        (replace(FAILED, blocking=False), False, "WARN"),
        (replace(FAILED, status="unverifiable"), False, "WARN"),
    ],
)
def test_an_audit_becomes_a_result(found, passed, severity):
    result = results(found)["drops"]
    assert (result.passed, result.severity.value) == (passed, severity)
    assert result.description == "3 rows (asked: 0 rows)"
    shown = {name: value.value for name, value in result.metadata.items()}
    assert shown == {"status": found.status, **TEXTS, "details": {"rows": ["a"]}}


def test_a_distribution_is_drawn_in_the_result():
    shown = results(replace(FAILED, distribution=DRAWN))["drops"].metadata["distribution"]
    assert isinstance(shown, dg.MarkdownMetadataValue)
    head, _, encoded = shown.value.removesuffix(")").partition("base64,")
    assert head == "![plot](data:image/svg+xml;"
    assert base64.b64decode(encoded) == distribution_plot(DRAWN)


def test_a_check_that_does_not_concern_the_partition_says_so():
    result = results()["refusals"]
    assert result.passed
    assert result.metadata["status"].value == "does not concern this partition"


def test_an_undeclared_audit_is_refused():
    with pytest.raises(ValueError, match=r"rationales: audits \['moods'\] are not declared"):
        results(replace(FAILED, name="moods"))
