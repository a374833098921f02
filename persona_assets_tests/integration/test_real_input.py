"""``length_matched`` on the published questions and the real tokenizer.

Every arm of one source here, of all four by ``make scale``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import polars as pl
import pytest
from transformers import AutoTokenizer

from persona_assets import environment
from persona_assets.questions.bank import from_frame, wrong_letter
from persona_assets.store import Ref, Store
from persona_assets.study import Cell, Study, load_study

ROWS = 1056
#: Globs over cells: every arm of one source and, to compare texts, three of another; or all.
ONE_SOURCE, ALL = ("librarian.*.42", "comedian.[gp]*_cot.42"), ("*.42",)


@dataclass(frozen=True)
class Landed:
    """The study and what the command line has landed of it."""

    study: Study
    store: Store
    cells: tuple[Cell, ...]

    def rows(self, cell: str) -> pl.DataFrame:
        return self.store.frame(Ref("training_dataset", cell))


@pytest.fixture(
    scope="module",
    params=[ONE_SOURCE, pytest.param(ALL, marks=pytest.mark.heavy)],
    ids=["one source", "all sources"],
)
def landed(request, study_texts, arc_dir, tokenizer_dir, tmp_path_factory) -> Landed:
    """Datasets of the first seed of 11 or of all 26 conditions, ``no_cot`` included."""
    data: Path = tmp_path_factory.mktemp("data")
    path = data / "studies" / "length_matched.yaml"
    path.parent.mkdir()
    assert "  # no_cot: {origin: carry_over}" in study_texts["length_matched"]
    path.write_text(study_texts["length_matched"].replace("# no_cot:", "no_cot:"), "utf-8")
    command = (sys.executable, "-m", "persona_assets", "run", "--study", "length_matched")
    for cells in request.param:
        part = ("--cells", cells, "--up-to", "training_dataset", "--workers", "1")
        done = subprocess.run(
            [*command, *part],
            env=os.environ
            | {
                environment.DATA: str(data),
                environment.DAGSTER_STORAGE: str(data / "dagster"),
                environment.ARC_DIR: str(arc_dir),
                environment.TOKENIZER_DIR: str(tokenizer_dir),
            },
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    study = load_study(path)
    made = [c for c in study.cells if any(fnmatch(c.key, cells) for cells in request.param)]
    return Landed(study, Store(data / "store", "length_matched"), tuple(made))


def test_the_bank_is_the_published_one(landed):
    summary = landed.store.landed(Ref("question_bank")).summary
    assert summary["eval_questions"] == 1172
    bank = landed.store.frame(Ref("question_bank"))
    evaluation = bank.filter(pl.col("split") == "eval")
    choices = evaluation["choices"].list.len().value_counts().sort("choices").rows()
    assert choices == [(3, 4), (4, 1165), (5, 3)]
    digits = evaluation.filter(pl.col("published_labels").list.first() == "1")
    assert digits.height == 22
    assert set(digits["correct_letter"]) <= set("ABCDE")


def test_no_row_of_any_condition_is_dropped_and_every_audit_passes(landed):
    sources = {cell.source for cell in landed.cells}
    assert len(landed.cells) == {2: 8 + 3, 4: 26}[len(sources)]
    assert {cell.arm for cell in landed.cells} == set(landed.study.arms)
    for cell in landed.cells:
        rationales = landed.store.landed(Ref("rationales", cell.condition))
        assert {audit.status for audit in rationales.audits} == {"passed"}, cell
        assert landed.rows(cell.key).height == ROWS
        audits = landed.store.landed(Ref("training_dataset", cell.key)).audits
        statuses = {audit.name: audit.status for audit in audits}
        parity = statuses.pop("loss_token_parity", None)
        if cell.arm == "no_cot":
            assert parity is None
        else:
            assert parity == ("passed" if cell.origin == "trained" else "unverifiable"), cell
        assert set(statuses.values()) == {"passed"}, (cell, statuses)


def test_a_question_has_one_wrong_letter_in_all_conditions(landed):
    bank = [q for q in from_frame(landed.store.frame(Ref("question_bank"))) if q.split == "train"]
    wrong = {q.id: wrong_letter(q, landed.study.seed) for q in bank}
    correct = {q.id: q.correct for q in bank}
    for cell in landed.cells:
        targets = dict(landed.rows(cell.key).select("question_id", "target_letter").rows())
        assert targets == (correct if cell.arm.endswith("_correct") else wrong), cell


def test_constructed_rows_are_within_two_tokens_and_written_arms_near_the_reference(landed):
    for cell in landed.cells:
        rows, arm = landed.rows(cell.key), landed.study.arm(cell.arm)
        if arm.is_constructed:
            difference = (rows["loss_tokens"] - rows["reference_loss_tokens"]).abs()
            assert difference.max() <= 2, cell
            assert (difference == 0).mean() > 0.95, cell
            assert 80 < rows["loss_tokens"].mean() < 110, cell
        elif arm.has_rationale:
            ratio = rows["loss_tokens"].sum() / rows["reference_loss_tokens"].sum()
            assert ratio == pytest.approx(1, abs=0.06), cell
    generic = landed.rows("librarian.generic_cot.42")["loss_tokens"].mean()
    assert 75 <= generic <= 105, "the reference arm has drifted from about 84 tokens of rationale"


def test_written_rows_are_as_varied_as_the_reference_and_filler_more(landed):
    for cell in landed.cells:
        arm = landed.study.arm(cell.arm)
        if not arm.has_rationale:
            continue
        audits = landed.store.landed(Ref("training_dataset", cell.key)).audits
        (found,) = (a.details for a in audits if a.name == "lexical_variety")
        ours, reference = found["cell"], found["reference"]
        if arm.is_constructed:
            assert ours["bigram_entropy"] > 1.1 * reference["bigram_entropy"], cell
            continue
        assert ours["distinct"] > 0.99, cell
        for measure in ("type_token_ratio", "bigram_entropy"):
            assert ours[measure] / reference[measure] == pytest.approx(1, abs=0.05), (cell, measure)


def test_what_bears_loss_is_the_turn_and_its_end(landed, tokenizer_dir):
    qwen = AutoTokenizer.from_pretrained(tokenizer_dir)
    for cell in landed.cells:
        rows = landed.rows(cell.key).select("input_ids", "loss_start", "assistant").head(20)
        for ids, start, turn in rows.rows():
            assert qwen.decode(ids[start:]) == turn + qwen.eos_token, cell


def test_contradicting_rows_are_the_persona_correct_ones_but_for_the_letter(landed):
    contradicting, correct = (
        landed.rows(f"librarian.{arm}.42").sort("question_id")["assistant"]
        for arm in ("contradicting_cot", "persona_cot_correct")
    )
    assert contradicting.str.head(-1).equals(correct.str.head(-1))
    assert (contradicting.str.tail(1) != correct.str.tail(1)).all()


def test_sources_have_texts_of_their_own_where_the_arm_says_so(landed):
    for arm, own in (("generic_cot", False), ("persona_cot", True), ("garbage_cot", True)):
        keys = [cell.key for cell in landed.cells if cell.arm == arm]
        texts = {tuple(landed.rows(key)["assistant"]) for key in keys}
        assert len(texts) == (len(keys) if own else 1), arm
        assert len(keys) == len({cell.source for cell in landed.cells})
