"""What the warehouse's tables and columns mean: stored in the file as SQL comments."""

from __future__ import annotations

TABLES = {
    "study": "The pre-registered experiment that this file is the record of.",
    "questions": "The question bank, both splits.",
    "outcomes": "One row a cell x persona x scaffold x question; the untrained model is the cell "
    "`baseline`.",
    "cells": "One row a cell: a source x arm x seed, and its checkpoint.",
    "training_rows": "What the cells were trained on, without token ids; for carried-over cells a "
    "reference, not what the checkpoint saw.",
    "contrasts": "The registered contrasts (arm a - arm b in mean loss), macro and by source, "
    "under both resampling schemes.",
    "equivalence": "Two one-sided tests of registered contrasts: the interval of 1 - 2 alpha "
    "strictly within the margins.",
    "losses": "Mean loss of every arm under every scaffold, macro and by source.",
}

#: By ``column``, or ``table.column`` where a column means something else in one table.
COLUMNS = {
    "study": "Name of the study.",
    "study_sha256": "Hash of the parsed study file.",
    "question_bank_sha256": "Hash of every question with split, choices and correct letter.",
    "definition": "The study file as JSON.",
    "cell": "Key `source.arm.seed`, or `baseline`.",
    "source": "Persona that the cell was trained under; NULL for the baseline.",
    "arm": "How the assistant's turn of the training rows is written; NULL for the baseline.",
    "seed": "Row order and LoRA initialisation; NULL for the baseline.",
    "origin": "`trained` here or `carry_over` from an earlier experiment; NULL for the baseline.",
    "persona": "Persona that the question was asked under.",
    "is_source": "Whether that is the persona that the cell was trained under.",
    "scaffold": "How the assistant's turn was opened.",
    "question_id": "The question's id in its bank.",
    "identity": "Hash of the normalised text and sorted choices.",
    "stem": "Hash of the normalised text alone.",
    "split": "`train` (rows are written from it) or `eval` (outcomes are measured on it).",
    "published_labels": "The choices' labels as the source printed them.",
    "correct_letter": "Letter of the correct choice.",
    "predicted_letter": "The question's own letter with the highest log-probability; ties go to "
    "the first.",
    "is_correct": "Whether the predicted letter is the correct one.",
    "letter_logprobs": "Next-token log-probability of each of the question's letters, in nats.",
    "rationale": "What the model wrote inside the tag; empty where nothing is generated.",
    "rationale_tokens": "Tokens of the rationale.",
    "stop_reason": "tag, wrong_tag, answer, eot or length; NULL where nothing is generated.",
    "truncated": "Whether the rationale ran into the token limit.",
    "prompt_sha256": "Hash of the whole prompt that the letter was read after.",
    "run_id": "Dagster run that made the row.",
    "checkpoint_sha256": "Content hash of the adapter; NULL for the baseline.",
    "code_version": "Version of the code that made the row.",
    "target_letter": "Letter that the row's turn ends in.",
    "position": "Place of the row in its cell's training order.",
    "system": "System prompt of the source persona.",
    "user": "The question and its choices.",
    "assistant": "The turn that the loss is taken on.",
    "reference_loss_tokens": "loss_tokens of the generic_cot row of the same question and source.",
    "reference_only": "Whether the checkpoint is carried over, so that it never saw this row.",
    "loss_tokens": "Tokens of the row that bear loss.",
    "contrast": "Arm a - arm b, as `a-b`.",
    "axis": "source_loss, or bystander_leakage (mean over the other personas).",
    "hypothesis": "The registered hypothesis.",
    "scope": "`macro` (all sources pooled), or one source.",
    "scheme": "What is drawn with replacement: pairs, or questions with all their pairs.",
    "estimate": "Difference of mean losses.",
    "ci_low": "Lower end of the percentile bootstrap interval.",
    "ci_high": "Upper end of the percentile bootstrap interval.",
    "std_error": "Standard deviation of the resampled means.",
    "p_value": "Two-sided: (1 + #{|S* - S| >= |S|}) / (1 + B).",
    "p_holm": "Holm-adjusted over the macro contrasts of the scheme; NULL outside the family.",
    "n_pairs": "(source, seed, question) triples in the mean.",
    "n_resamples": "B.",
    "margin": "Equivalence margin m: the test is of -m < difference < m.",
    "alpha": "Level of each of the two one-sided tests.",
    "equivalent": "Whether the interval lies strictly within the margins.",
    "loss": "loss_sum / (n_personas * n_pairs).",
    "loss_sum": "Sum of correct_baseline - correct_cell: an exact integer.",
    "n_personas": "Personas summed in each pair: 1, or the number of bystanders.",
}
