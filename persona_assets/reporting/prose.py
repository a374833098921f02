"""The report's sentences, derived from the study file and the warehouse's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from persona_assets.rationales.arms import ARMS
from persona_assets.reporting.words import count, listed, percent
from persona_assets.study import Contrast, HubModel, Study


def differs(study: Study, macro: dict[str, Any]) -> bool:
    """Whether a macro row differs from 0 at the family-wise level."""
    return macro["p_holm"] <= study.inference.family_alpha


def verdict(study: Study, macro: dict[str, Any]) -> str:
    """:func:`differs` in words, with the sign."""
    if not differs(study, macro):
        return "no difference shown"
    return f"differs from 0 ({'positive' if macro['estimate'] > 0 else 'negative'})"


def methods(study: Study, facts: dict[str, Any]) -> list[str]:
    """Paragraphs that say how the numbers were made."""
    return [_training(study, facts), _evaluation(study, facts), _inference(study)]


def _training(study: Study, facts: dict[str, Any]) -> str:
    recipe = study.training
    scale = "alpha / sqrt(rank)" if recipe.rslora else "alpha / rank"
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    return (
        f"Each cell is one LoRA adapter on {_base_model(study)}, fine-tuned on multiple-choice "
        f"questions ({facts['n_train_questions']} train questions) asked under its source "
        f"persona's system prompt. Cells trained here use rank {recipe.rank}, alpha "
        f"{recipe.alpha:g} (scale {scale}) on {listed(recipe.target_modules)}, learning rate "
        f"{recipe.learning_rate:g}, {epochs}, {recipe.examples_per_step} examples an optimizer "
        f"step, {recipe.dtype}; the loss is taken on the assistant's turn alone. The wrong letter "
        "of a question is the same for every arm, source and seed; a seed sets the order of rows "
        "and the adapter's initialisation, and nothing else."
    )


def _base_model(study: Study) -> str:
    model = study.base_model
    if isinstance(model, HubModel):
        return f"{model.repo} at revision {model.revision[:12]}"
    return "the miniature base model"


def _evaluation(study: Study, facts: dict[str, Any]) -> str:
    settings = study.evaluation
    return (
        f"Every cell and the untrained baseline answer {facts['n_questions']} evaluation questions "
        f"under each of {len(study.personas)} personas and {len(study.scaffolds)} scaffolds "
        f"(ways to open the assistant's turn). Where a scaffold asks for a rationale, the model "
        f"writes it greedily, at most {settings.max_rationale_tokens} tokens; the answer is the "
        "question's letter with the highest next-token log-probability after the anchor. Engine: "
        f"{settings.engine}, {settings.dtype}."
    )


def _inference(study: Study) -> str:
    inference = study.inference
    family = len(study.contrast_list)
    return (
        "The loss of an answer is baseline correctness minus the cell's. Source loss is measured "
        "under the persona that the cell was trained under; bystander leakage is the mean over the "
        f"{len(study.personas) - 1} others. A contrast is the difference of two arms' mean losses "
        f"under the scaffold {inference.scaffold}, paired by source, seed and question. Intervals "
        f"are {percent(inference.confidence)} percentile bootstrap intervals "
        f"({count(inference.resamples)} resamples). The headline scheme draws questions, each with "
        "all its sources and seeds; the scheme “pairs” draws (source, seed, question) triples as "
        "if they were independent. Two-sided p-values are Holm-adjusted over the "
        f"{family} registered contrasts, family-wise level {inference.family_alpha:g}. Equivalence "
        "is two one-sided tests: the interval must lie strictly within the margins. “Differs from "
        "0” and “equivalent” are separate statements; both can hold."
    )


def threats(study: Study) -> list[str]:
    """Threats to validity that follow from the study file."""
    return list(_threats(study))


def _threats(study: Study) -> Iterator[str]:
    origins = [c for c in study.contrast_list if _differs(study, c, lambda cell: cell.origin)]
    if origins:
        yield (
            f"{_names(origins)}: one arm was trained here, the other carried over from an earlier "
            "experiment, so the contrast also holds whatever else differed between the two."
        )
    recipes = [c for c in study.contrast_list if _differs(study, c, study.recipe)]
    if recipes:
        yield f"{_names(recipes)}: the two arms were trained with different recipes."
    scaffold = study.inference.scaffold
    outside = [arm for arm in study.arms if ARMS[arm].scaffold.name != scaffold]
    if outside:
        yield (
            f"All contrasts are measured under {scaffold}, the frame that some arms were trained "
            f"with and others not ({listed(outside)}): an arm may leak less only because its own "
            "frame is absent."
        )
    if study.cells_of("carry_over"):
        yield (
            "The training rows shown for carried-over arms are this study's own reference rows; "
            "what those checkpoints saw cannot be verified here."
        )
    yield (
        "The intervals condition on these checkpoints: they cover neither the variation of "
        "training seeds nor that of source personas. The spread over seeds stands beside them."
    )


def _differs(study: Study, contrast: Contrast, of: Any) -> bool:
    cells = study.contrast_cells(contrast)
    return {of(c) for c in cells if c.arm == contrast.a} != {
        of(c) for c in cells if c.arm == contrast.b
    }


def _names(contrasts: list[Contrast]) -> str:
    return listed(list(dict.fromkeys(f"{c.a} − {c.b}" for c in contrasts)))
