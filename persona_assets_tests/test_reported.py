"""What has landed, and Dagster does not know of."""

from __future__ import annotations

import dagster as dg
import pytest
from dagster._core.definitions.data_version import DATA_VERSION_TAG

from persona_assets.reported import unreported
from persona_assets.store import Provenance, Ref, Store

INPUTS = {"upstream": {}, "code_version": "1"}
BANK = Ref("question_bank")
CELLS = [Ref("checkpoint", f"librarian.garbage_cot.{seed}") for seed in (42, 137)]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store", "study")


def land(store: Store, ref: Ref, content: str) -> None:
    with store.draft(ref) as draft:
        (draft / "file").write_text(content)
        store.land(ref, draft, provenance=Provenance("run", INPUTS, "study"))


def test_what_was_landed_and_not_reported(store, tmp_path):
    def missing() -> set[Ref]:
        return unreported(instance, "study", map(store.landed, (BANK, *CELLS)))

    def report(ref: Ref) -> None:
        instance.report_runless_asset_event(
            dg.AssetMaterialization(
                ["study", ref.asset],
                partition=ref.key,
                tags={DATA_VERSION_TAG: store.landed(ref).data_version},
            )
        )

    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        for ref in (BANK, *CELLS):
            land(store, ref, "one")
        assert missing() == {BANK, *CELLS}
        report(BANK)
        report(CELLS[0])
        assert missing() == {CELLS[1]}
        for ref in (BANK, CELLS[0]):
            land(store, ref, "two")
        assert missing() == {BANK, *CELLS}  # what it knows of the first is out of date
        for ref in (CELLS[0], BANK, CELLS[1]):
            report(ref)
        assert missing() == set()
