"""Group ``training_data``: the conditions' rationales and the cells' datasets."""

from __future__ import annotations

from persona_assets.assets.base import Made, Task
from persona_assets.assets.metadata import table_preview
from persona_assets.questions.bank import from_frame
from persona_assets.rationales.condition import write_condition
from persona_assets.rationales.miniature import MiniatureWriter
from persona_assets.rationales.template import TemplateWriter
from persona_assets.residency import resident_tokenizer
from persona_assets.training.audits import audit_dataset
from persona_assets.training.dataset import build_dataset

_WRITERS = {"miniature": MiniatureWriter, "template": TemplateWriter}


def rationales(task: Task) -> Made:
    """One condition's rationales, written or constructed."""
    frame, audits = write_condition(
        task.study,
        task.key,
        from_frame(task.frame("question_bank")),
        resident_tokenizer(task.directory("tokenizer")),
        _WRITERS[task.study.rationales.writer](),
    )
    task.write(frame, "rationales")
    shown = frame.select("question_id", "correct_letter", "target_letter", "rationale")
    return Made(audits=audits, summary={"rows": frame.height}, metadata=table_preview(shown))


def training_dataset(task: Task) -> Made:
    """One cell's rows, encoded with the loss mask, and their audits."""
    cell = task.cell
    questions = from_frame(task.frame("question_bank"))
    frame = build_dataset(
        task.study,
        cell,
        questions,
        task.frame("rationales", cell.condition),
        resident_tokenizer(task.directory("tokenizer")),
    )
    task.write(frame, "training_rows")
    shown = frame.select("question_id", "system", "user", "assistant", "loss_tokens")
    return Made(
        audits=audit_dataset(frame, task.study, cell, questions),
        summary={
            "rows": frame.height,
            "loss_tokens": int(frame["loss_tokens"].sum()),
            "origin": cell.origin,
        },
        metadata=table_preview(shown),
    )
