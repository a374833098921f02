"""Every number of a ledger comes out again, and says where it is from."""

from __future__ import annotations

import shutil

import duckdb
import pytest

from persona_assets.reporting.ledger import Ledger, Number, UnknownNumber
from persona_assets.reporting.queries import open_warehouse
from persona_assets.reporting.trace import (
    as_json,
    as_text,
    not_reproduced,
    question_rows,
    read_ledger,
    remade,
    trace,
)

MACRO = "contrast/contradicting_cot-generic_cot/persona_cot/source_loss/macro/question"


@pytest.fixture
def own_warehouse(warehouse, tmp_path):
    """A copy that a test may tamper with."""
    return shutil.copy(warehouse, tmp_path)


def test_every_field_of_every_number_is_reproduced(warehouse):
    """Values, intervals and p: of estimates, of equivalence tests, of what is only counted."""
    fields = set()
    with open_warehouse(warehouse) as db:
        ledger = read_ledger(db)
        for number in ledger.values():
            again = remade(db, ledger, number)
            assert {name: getattr(number, name) for name in again} == again, number.number_id
            fields |= again.keys()
            resampled = number.ci_low is not None
            assert resampled == ("ci_low" in again), number.number_id
    assert fields == {"value", "ci_low", "ci_high", "std_error", "p_value", "p_holm"}
    assert f"{MACRO}/equivalence_0.05" in ledger


def test_a_number_that_was_tampered_with_is_not_reproduced(own_warehouse):
    with duckdb.connect(str(own_warehouse)) as db:
        db.execute("UPDATE numbers SET ci_low = ci_low + 1e-12 WHERE number_id = $1", [MACRO])
    found = trace(own_warehouse, MACRO)
    assert [name for name, ok in found.reproduced.items() if not ok] == ["ci_low"]
    assert "ci_low" in as_text(found, None)
    assert "NOT reproduced" in as_text(found, None)


def test_rows_that_contradict_a_stored_view_are_told(own_warehouse):
    """Numbers are read from a stored view of the rows: trace holds the two against each other."""
    assert trace(own_warehouse, MACRO).views == {"question_losses": True}
    cell = "librarian.generic_cot.42"
    with duckdb.connect(str(own_warehouse)) as db:
        db.execute("UPDATE outcomes SET is_correct = NOT is_correct WHERE cell = $1", [cell])
    found = trace(own_warehouse, MACRO)
    assert [name for name, ok in found.reproduced.items() if not ok] == ["question_losses"]
    assert "question_losses is, for these cells, NOT what the outcome rows give" in as_text(
        found, None
    )
    other = "contrast/persona_cot-garbage_cot/persona_cot/source_loss/macro/question"
    assert trace(own_warehouse, other).views == {"question_losses": True}


def test_a_ratio_of_errors_is_made_again_from_the_samples(own_warehouse):
    key = MACRO.removesuffix("/question")
    assert trace(own_warehouse, f"{key}/se_ratio").reproduced == {"value": True}
    with duckdb.connect(str(own_warehouse)) as db:
        db.execute("UPDATE numbers SET std_error = 2 * std_error WHERE number_id = $1", [MACRO])
        assert not_reproduced(db)[0].startswith(f"{MACRO}, std_error: ")


def test_the_warehouses_check_finds_nothing_in_a_whole_ledger(warehouse):
    with open_warehouse(warehouse) as db:
        assert not_reproduced(db) == []


def test_the_warehouses_check_makes_registered_intervals_again(own_warehouse):
    fields = ("ci_low", "ci_high", "std_error", "p_value", "p_holm")
    with duckdb.connect(str(own_warehouse)) as db:
        changes = ", ".join(f"{field} = {field} + 1e-9" for field in fields)
        db.execute(f"UPDATE numbers SET {changes} WHERE number_id = $1", [MACRO])
        said = [s.partition(": ")[0] for s in not_reproduced(db) if "se_ratio" not in s]
    assert sorted(said) == sorted(f"{MACRO}, {field}" for field in fields)


def test_the_cells_of_a_number_are_exactly_those_of_its_definition(landed, warehouse):
    found = trace(warehouse, MACRO)
    contrast = landed.study.contrast("contradicting_cot-generic_cot.source_loss")
    assert [cell["cell"] for cell in found.cells] == sorted(
        cell.key for cell in landed.study.contrast_cells(contrast)
    )
    text = as_text(found, None)
    assert "Cells (8):" in text
    # What all have in common is said once.
    assert text.count("transformers, torch 2.13.0") == 1
    assert f"  study_sha256: {landed.study.content_hash}" in text
    cell = found.cells[0]
    assert cell["checkpoint_sha256"][:12] in text
    assert cell["checkpoint_sha256"] not in text
    assert as_json(found)["cells"][0]["checkpoint_sha256"] == cell["checkpoint_sha256"]


def test_the_untrained_models_numbers_have_their_lineage(warehouse):
    found = trace(warehouse, "accuracy/baseline/no_cot/librarian")
    (cell,) = found.cells
    assert (cell["cell"], cell["outcomes_run_id"]) == ("baseline", "run-baseline")
    assert cell["checkpoint_sha256"] is None
    shown = question_rows(warehouse, found.number, 3)
    assert len(shown) == 3
    assert {row["run_id"] for row in shown} == {"run-baseline"}
    assert "run-baseline" in as_text(found, shown)


def test_an_unknown_number_names_the_nearest(warehouse):
    with pytest.raises(UnknownNumber, match=f"Did you mean '{MACRO}'"):
        trace(warehouse, MACRO.replace("macro", "makro"))


def test_to_ask_whether_a_number_is_there_looks_for_no_other(monkeypatch):
    """The report asks so of each number that may not be defined; to find the nearest takes long."""
    monkeypatch.setattr("persona_assets.reporting.ledger.nearest", None)
    ledger = Ledger([Number("count/cells", 1.0, "rows", 1, "", "", "", ())])
    assert "count/cells" in ledger
    assert "count/cell" not in ledger


def test_two_numbers_of_one_id_are_refused():
    number = Number("count/cells", 1.0, "rows", 1, "", "", "", ())
    with pytest.raises(ValueError, match="two numbers are called 'count/cells'"):
        Ledger([number, number])
