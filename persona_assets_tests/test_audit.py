"""Audits as data: what a manifest keeps of them."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from persona_assets.audit import Audit, Distribution, audit

DRAWN = Distribution(
    title="tokens",
    axis="tokens a row",
    counted="rows",
    bins=[0.5, 1.5, 2.5],
    series={"this arm": [3, 4], "reference arm": [0, 7]},
    limits=[1.25],
    limits_of="the mean",
)
TEXTS = {"observed": "3 rows", "threshold": "0 rows", "remedy": "Write them again."}


@pytest.mark.parametrize("distribution", [None, DRAWN])
def test_an_audit_survives_json(distribution):
    found = audit("drops", False, **TEXTS, distribution=distribution, rows=["a", "b"])
    assert (found.status, found.blocks, found.details) == ("failed", True, {"rows": ["a", "b"]})
    assert found.distribution == distribution
    assert Audit.from_json(json.loads(json.dumps(asdict(found)))) == found


def test_an_audit_without_the_field_has_no_distribution():
    raw = asdict(audit("drops", True, **TEXTS))
    del raw["distribution"]
    assert Audit.from_json(raw) == audit("drops", True, **TEXTS)


def test_what_is_no_audit_is_refused():
    with pytest.raises(TypeError):
        Audit.from_json({"name": "drops"})
    with pytest.raises(TypeError):
        Audit.from_json(asdict(audit("drops", True, **TEXTS)) | {"distribution": {"bins": []}})
