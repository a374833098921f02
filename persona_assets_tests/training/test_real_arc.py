"""ARC-Challenge with the Qwen2.5 tokenizer: from published rows to audited datasets."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from persona_assets.questions.arc import read_arc
from persona_assets.rationales.condition import filler_lexicon, write_condition
from persona_assets.rationales.template import TemplateWriter
from persona_assets.training.audits import audit_dataset
from persona_assets.training.dataset import build_dataset

WRITER = TemplateWriter()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="module")
def questions(arc_dir):
    return [
        *read_arc(arc_dir / "ARC-Challenge-Train.jsonl", "train"),
        *read_arc(arc_dir / "ARC-Challenge-Test.jsonl", "eval"),
    ]


def made(study, key, questions, tokenizer):
    """(dataset, audits by name) of a cell, rationales included."""
    cell = study.cell(key)
    rationales, audits = write_condition(study, cell.condition, questions, tokenizer, WRITER)
    frame = build_dataset(study, cell, questions, rationales, tokenizer)
    audits += audit_dataset(
        frame,
        study,
        cell,
        questions,
        rationales=rationales,
        tokenizer=tokenizer,
        lexicon=filler_lexicon(study, questions, tokenizer, WRITER),
    )
    return frame, {a.name: a for a in audits}


@pytest.mark.parametrize(
    "arm", ["persona_cot", "generic_cot", "scrambled_english_cot", "contradicting_cot"]
)
def test_a_part_of_arc(length_matched, questions, tokenizer, arm):
    part = [q for q in questions if q.split == "train"][:200]
    part += [q for q in questions if q.split == "eval"][:50]
    frame, audits = made(length_matched, f"librarian.{arm}.42", part, tokenizer)
    assert frame.height == 200
    expected = "unverifiable" if arm in ("persona_cot", "generic_cot") else "passed"
    assert audits.pop("loss_token_parity").status == expected
    assert {name: a.observed for name, a in audits.items() if a.status != "passed"} == {}
    for ids, start, turn in frame.select("input_ids", "loss_start", "assistant").head(20).rows():
        assert tokenizer.decode(ids[start:]) == turn + tokenizer.eos_token
    gap = frame["loss_tokens"].mean() / frame["reference_loss_tokens"].mean()
    assert gap == pytest.approx(1, abs=0.06)


def test_filler_for_the_whole_train_split(length_matched, questions, tokenizer):
    frame, audits = made(length_matched, "librarian.garbage_cot.42", questions, tokenizer)
    assert frame.height == sum(q.split == "train" for q in questions)
    assert {name: a.observed for name, a in audits.items() if a.status != "passed"} == {}
    difference = (frame["loss_tokens"] - frame["reference_loss_tokens"]).abs()
    assert difference.max() <= 2
    assert (difference == 0).mean() > 0.95
    assert 80 < frame["loss_tokens"].mean() < 110
