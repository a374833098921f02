"""Group ``training_data``: the conditions' rationales and the cells' datasets."""

from __future__ import annotations

from persona_assets.assets.base import Made, Task
from persona_assets.assets.metadata import table_preview
from persona_assets.questions.bank import from_frame
from persona_assets.rationales.condition import write_condition
from persona_assets.rationales.methods import make_writer
from persona_assets.residency import resident_tokenizer
from persona_assets.training.audits import audit_dataset
from persona_assets.training.dataset import build_dataset, training_data_version


def rationales(task: Task) -> Made:
    """One condition's rationales, written or constructed."""
    writer = make_writer(task.study)
    frame, audits = write_condition(
        task.study,
        task.key,
        from_frame(task.frame("question_bank")),
        resident_tokenizer(task.directory("tokenizer")),
        writer,
    )
    task.write(frame, "rationales")
    shown = frame.select("question_id", "correct_letter", "target_letter", "rationale")
    return Made(
        audits=audits,
        summary={"rows": frame.height, **writer.accounting},
        metadata=table_preview(shown),
    )


def training_dataset(task: Task) -> Made:
    """One cell's rows, encoded with the loss mask, and their audits."""
    study, cell = task.study, task.cell
    questions = from_frame(task.frame("question_bank"))
    rationales = task.frame("rationales", cell.condition)
    tokenizer = resident_tokenizer(task.directory("tokenizer"))
    frame = build_dataset(study, cell, questions, rationales, tokenizer)
    task.write(frame, "training_rows")
    shown = frame.select("question_id", "system", "user", "assistant", "loss_tokens")
    return Made(
        audits=audit_dataset(
            frame,
            study,
            cell,
            questions,
            rationales=rationales,
            tokenizer=tokenizer,
            writer=make_writer(study),
        ),
        summary={
            "rows": frame.height,
            "loss_tokens": int(frame["loss_tokens"].sum()),
            "origin": cell.origin,
        },
        metadata=table_preview(shown),
        data_version=training_data_version(frame),
    )
