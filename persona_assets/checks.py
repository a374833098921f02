"""Asset checks: their names, declared once, and how a core :class:`Audit` becomes a result."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from persona_assets.audit import Audit
from persona_assets.reporting.markdown import picture

# Partition-aware check specs are a preview in the pinned release; we know, and test them.
warnings.filterwarnings("ignore", category=dg.PreviewWarning)


@dataclass(frozen=True, slots=True)
class Check:
    """A declared check: its name, what it asks, and whether consumers refuse on its failure."""

    name: str
    asks: str
    blocking: bool = True


_OUTCOME_CHECKS = (
    Check("coverage", "Exactly one row a persona × scaffold × question."),
    Check("reachability", "Each question's correct letter is among the letters scored."),
    Check("truncation", "At most 5 % of rationales were cut off at the token limit.", False),
    Check("answers_parseable", "Every answer is the best of the question's own letters."),
    Check(
        "letter_mass",
        "At most 5 % of answers put under half of the probability on the letters.",
        blocking=False,
    ),
)

_PUBLISHED = (Check("published", "What landed is at the place that the study names.", False),)

#: The checks of each asset, in the order the UI shows them.
CHECKS: dict[str, tuple[Check, ...]] = {
    "question_bank": (
        Check("train_eval_identities", "No question stands in both splits."),
        Check(
            "train_eval_stems",
            "No question text stands in both splits, with other choices.",
            blocking=False,
        ),
    ),
    "base_model": (
        Check(
            "baseline_knows_the_world",
            "The miniature model's accuracy is at least 0.9 in each persona × scaffold.",
        ),
        Check(
            "baseline_speaks_in_voice",
            "At least 0.95 of its persona rationales are in the voice the system prompt asks for.",
        ),
    ),
    "rationales": (
        Check("refusals", "At most 5 % of the rationales were refused."),
        Check("drops", "At most 30 % of the rows were dropped."),
        Check("letters_argued_for", "Each rationale names the letter it argues for.", False),
    ),
    "training_dataset": (
        Check("rows_complete", "Each kept rationale has one row, in the order of the seed."),
        Check("rows_as_prescribed", "Rows are what study, questions and rationales make them."),
        Check("loss_token_parity", "Rows bear as many loss tokens as the reference arm's."),
        Check("letter_balance", "Target letters are as balanced as a fair draw."),
        Check("answer_suffix", "Each turn ends in the target letter's answer line."),
        Check("encoding", "Token ids and loss mask are those of the text."),
        Check("target_letters", "Targets are wrong in wrong arms and correct in correct ones."),
        Check("wrong_letter_identity", "Each target is the question's prescribed letter."),
        Check("train_eval_disjoint", "No row is of a question of the eval split."),
        Check("argued_letter", "Rationales argue for their arm's letter, and for no other."),
        Check("lexical_variety", "Rationales are as varied as the reference arm's."),
        Check("byte_fallback", "Hardly a token is a piece of a character or an unknown word."),
        Check("garbage_words", "Garbage filler holds no English word and no lone letter."),
        Check("scrambled_words", "Scrambled rows reorder the reference's words, by sentence."),
    ),
    "prior_checkpoint": (Check("training_loss_fell", "The loss is finite and lower at the end."),),
    "checkpoint": (
        Check("training_loss_fell", "The loss is finite and lower at the end."),
        Check("checkpoint_fits_base", "Every tensor has the shape that the base model asks for."),
    ),
    "forced_rationales": (
        Check("usable", "Every persona has a rationale for every eval question."),
    ),
    "baseline_outcomes": _OUTCOME_CHECKS,
    "cell_outcomes": (
        *_OUTCOME_CHECKS,
        Check("base_unchanged", "The base's logits are those at loading, to the last bit."),
    ),
    "cell_diagnostics": (
        Check("adapter_effect", "The checkpoint moves the answers to the baseline's prompts."),
        Check(
            "letter_collapse",
            "Predicted letters vary as the baseline's do, under every persona and scaffold.",
            blocking=False,
        ),
        Check(
            "drift",
            "A carried-over cell's accuracies are those of the earlier experiment.",
            blocking=False,
        ),
    ),
    "contrast_estimate": (
        Check("comparable", "The two arms differ in nothing but the arm.", blocking=False),
    ),
    "warehouse": (
        Check("complete", "The outcomes table holds exactly the study's grid."),
        Check(
            "one_wrong_letter",
            "A question has one wrong letter, over all arms, sources and seeds.",
        ),
        Check("numbers_reproduced", "Every number of the ledger is what its SQL returns."),
    ),
    "number_ledger": (
        Check("statistics_agree", "SQL and statistics give the same estimates, to the last bit."),
    ),
    "report": (
        Check("numbers_in_ledger", "Every number of the page is the ledger's or the study file's."),
        Check(
            "report_structure",
            "Sections, captions, introduced acronyms, real sample rows, the confidence marker.",
        ),
    ),
    "wandb_run": _PUBLISHED,
    "wandb_bundle": _PUBLISHED,
}


def check_specs(
    asset: str, key: dg.AssetKey, partitions: dg.PartitionsDefinition | None
) -> list[dg.AssetCheckSpec]:
    """The asset's check specs, partition-aware: each partition keeps a status of its own."""
    return [
        dg.AssetCheckSpec(
            check.name,
            asset=key,
            description=check.asks,
            blocking=check.blocking,
            partitions_def=partitions,
        )
        for check in CHECKS.get(asset, ())
    ]


def check_results(asset: str, audits: Sequence[Audit]) -> list[dg.AssetCheckResult]:
    """A result for each declared check of an asset.

    An ``unverifiable`` audit is reported as a warning, never as passed; a declared check that
    does not concern the partition says so.

    Raises:
        ValueError: an audit was made whose check is not declared in ``CHECKS``.
    """
    declared = CHECKS.get(asset, ())
    by_name = {audit.name: audit for audit in audits}
    undeclared = sorted(by_name.keys() - {check.name for check in declared})
    if undeclared:
        raise ValueError(f"{asset}: audits {undeclared} are not declared in checks.CHECKS")
    return [_result(check, by_name.get(check.name)) for check in declared]


def _result(check: Check, audit: Audit | None) -> dg.AssetCheckResult:
    if audit is None:
        return dg.AssetCheckResult(
            check_name=check.name,
            passed=True,
            metadata={"status": "does not concern this partition"},
        )
    failed_hard = audit.status == "failed" and audit.blocking
    return dg.AssetCheckResult(
        check_name=check.name,
        passed=audit.status == "passed",
        severity=dg.AssetCheckSeverity.ERROR if failed_hard else dg.AssetCheckSeverity.WARN,
        description=f"{audit.observed} (asked: {audit.threshold})",
        metadata=dict(_metadata(audit)),
    )


def _metadata(audit: Audit) -> Iterator[tuple[str, Any]]:
    yield from (
        ("status", audit.status),
        ("observed", audit.observed),
        ("threshold", audit.threshold),
        ("remedy", audit.remedy),
    )
    if audit.distribution is not None:
        from persona_assets.reporting.distribution import distribution_plot

        plot = picture(distribution_plot(audit.distribution))
        yield "distribution", dg.MetadataValue.md(str(plot))
    if audit.details:
        yield "details", dg.MetadataValue.json(audit.details)
