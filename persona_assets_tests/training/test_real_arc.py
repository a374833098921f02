"""ARC-Challenge with the Qwen2.5 tokenizer: the whole train split, from question to audit."""

from __future__ import annotations

import pytest

from persona_assets.rationales.condition import write_condition
from persona_assets.rationales.template import TemplateWriter
from persona_assets.training.audits import audit_dataset
from persona_assets.training.dataset import build_dataset

WRITER = TemplateWriter()


def made(study, key, questions, tokenizer):
    """(dataset, audits by name) of a cell, rationales included."""
    cell = study.cell(key)
    rationales, audits = write_condition(study, cell.condition, questions, tokenizer, WRITER)
    frame = build_dataset(study, cell, questions, rationales, tokenizer)
    audits += audit_dataset(
        frame, study, cell, questions, rationales=rationales, tokenizer=tokenizer, writer=WRITER
    )
    return frame, {a.name: a for a in audits}


@pytest.mark.parametrize(
    "arm", ["persona_cot", "generic_cot", "generic_cot_correct", "contradicting_cot"]
)
def test_written_arms(length_matched, arc, qwen, arm):
    frame, audits = made(length_matched, f"librarian.{arm}.42", arc, qwen)
    assert frame.height == sum(q.split == "train" for q in arc)
    carried = arm in ("persona_cot", "generic_cot")
    assert audits["loss_token_parity"].status == ("unverifiable" if carried else "passed")
    others = {n: a.observed for n, a in audits.items() if a.status != "passed"}
    assert set(others) == ({"loss_token_parity"} if carried else set())
    gap = frame["loss_tokens"].sum() / frame["reference_loss_tokens"].sum()
    assert gap == pytest.approx(1, abs=0.06)
    found = audits["lexical_variety"].details
    assert found["cell"]["distinct"] > 0.99
    for measure in ("type_token_ratio", "bigram_entropy"):
        assert found["cell"][measure] / found["reference"][measure] == pytest.approx(1, abs=0.05)
    for ids, start, turn in frame.select("input_ids", "loss_start", "assistant").head(20).rows():
        assert qwen.decode(ids[start:]) == turn + qwen.eos_token


@pytest.mark.parametrize("arm", ["garbage_cot", "scrambled_english_cot"])
def test_constructed_arms(length_matched, arc, qwen, arm):
    frame, audits = made(length_matched, f"librarian.{arm}.42", arc, qwen)
    assert frame.height == sum(q.split == "train" for q in arc)
    assert {name: a.observed for name, a in audits.items() if a.status != "passed"} == {}
    difference = (frame["loss_tokens"] - frame["reference_loss_tokens"]).abs()
    assert difference.max() <= 2
    assert (difference == 0).mean() > 0.95
    assert 80 < frame["loss_tokens"].mean() < 110
    found = audits["lexical_variety"].details
    assert found["cell"]["bigram_entropy"] > 1.1 * found["reference"]["bigram_entropy"]
