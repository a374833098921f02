"""What has landed and Dagster has no record of is told to it, and not made again."""

from __future__ import annotations

import shutil

from persona_assets.store import Ref
from persona_assets_tests.reliability.bench import bench

RECORDED = (Ref("training_dataset", "librarian.garbage_cot.42"), Ref("loss_matrix"))


def test_a_history_that_was_moved_away_comes_back(own_project):
    with bench(own_project.data) as on:
        landed = on.landed()
        assert all(on.is_recorded(ref) for ref in RECORDED)
        shutil.rmtree(own_project.data / "dagster")
        for ref in RECORDED:
            assert not on.is_recorded(ref)
            assert on.make(ref).error == ""
            assert on.is_recorded(ref)
        assert on.landed() == landed


def test_a_record_of_other_content_is_none(own_project):
    """As of a run that landed a new version and died before it could say so."""
    ref = RECORDED[0]
    with bench(own_project.data) as on:
        was = on.store.landed(ref)
        shutil.rmtree(on.store.folder(ref))
        with on.store.draft(ref) as draft:
            (draft / "rows").write_text("other")
            on.store.land(ref, draft, provenance=was.provenance)
        assert not on.is_recorded(ref)
