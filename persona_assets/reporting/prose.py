"""The report's sentences, derived from the study file and the warehouse's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from persona_assets.naming import listed
from persona_assets.reporting.ledger import Number
from persona_assets.reporting.words import count, percent
from persona_assets.study import Cell, Contrast, Study
from persona_assets.study_schema import HubModel, HubRegistry, TrainingRecipe


def differs(study: Study, macro: Number) -> bool:
    """Whether a macro estimate differs from 0 at the family-wise level."""
    return macro.p_holm <= study.inference.family_alpha


def verdict(study: Study, macro: Number) -> str:
    """:func:`differs` in words, with the sign."""
    if not differs(study, macro):
        return f"not shown to differ from 0 at family-wise {study.inference.family_alpha:g}"
    return f"differs from 0 ({'positive' if macro.value > 0 else 'negative'})"


def decision_rule(study: Study) -> str:
    """What :func:`verdict` rests on, and that the interval beside it is another matter."""
    return (
        f"“Differs from 0” means Holm-adjusted p ≤ {study.inference.family_alpha:g} with questions "
        "drawn; the interval shown is not adjusted."
    )


def forest_caption(study: Study) -> str:
    """What the marks of the forest plot are, and which intervals it does not show."""
    level = percent(study.inference.confidence)
    tests = [test for contrast in study.contrast_list for test in contrast.equivalence]
    marks = (
        f"{level} intervals: thick blue with a square, questions drawn (headline); thin orange "
        "with a small square, pairs drawn. Hollow grey markers: estimates of single sources."
    )
    if not tests:
        return marks
    levels = listed([percent(1 - 2 * alpha) for alpha in sorted({t.alpha for t in tests})[::-1]])
    return (
        f"{marks} Green bands: equivalence margins; equivalence is judged by the {levels} "
        "intervals given under Findings, which are not drawn."
    )


def methods(study: Study) -> list[str]:
    """Paragraphs that say how the numbers were made."""
    return [*_trained_here(study), *_carried_over(study), _evaluation(study), _inference(study)]


def _trained_here(study: Study) -> Iterator[str]:
    cells = study.cells_of("trained")
    if not cells:
        return
    seeded = "the order of rows and the adapter's initialisation"
    if study.training.dropout:
        seeded = "the order of rows, the adapter's initialisation and its dropout"
    yield (
        f"{len(cells)} cells are trained here. Each is one LoRA adapter on {_base_model(study)}, "
        "fine-tuned on those training questions whose rationale its arm kept, asked under its "
        f"source persona's system prompt: {_recipe(study.training, TrainingRecipe.model_fields)}. "
        f"The loss is taken on the assistant's turn alone{_masked(study)}. In these cells the "
        "wrong letter of a question is the same for every arm, source and seed, and a seed sets "
        f"{seeded}, and nothing else."
    )


def _masked(study: Study) -> str:
    light = [arm for arm in study.arms if study.arm(arm).loss_on == "answer"]
    return f" (of {listed(light)}: on its answer line alone)" if light else ""


def _carried_over(study: Study) -> Iterator[str]:
    cells = study.cells_of("carry_over")
    if not cells:
        return
    registry, recipe = study.carry_over, study.recipe(cells[0])
    if isinstance(registry, HubRegistry):
        form = "a whole merged model" if registry.format == "merged" else "a LoRA adapter"
        where = f"{registry.repo} at revision {registry.revision[:12]}"
        # What the file does not state is not known of them: the schema's defaults are ours.
        stated = _recipe(recipe, recipe.model_fields_set)
    else:
        form, where = "a LoRA adapter", "the study's local registry"
        stated = _recipe(recipe, TrainingRecipe.model_fields)
    yield (
        f"{len(cells)} cells are carried over. Each is {form} from {where}; their recipe as the "
        f"study file states it: {stated}."
    )


def _recipe(recipe: TrainingRecipe, fields: Any) -> str:
    """Those settings of a recipe that are among ``fields``."""
    texts = {
        "rank": f"rank {recipe.rank}",
        "alpha": f"alpha {recipe.alpha:g}",
        "rslora": "rsLoRA (scale alpha / sqrt(rank))" if recipe.rslora else "scale alpha / rank",
        "dropout": f"dropout {recipe.dropout:g}",
        "target_modules": f"adapted modules {listed(recipe.target_modules)}",
        "learning_rate": f"learning rate {recipe.learning_rate:g}",
        "warmup_steps": f"{recipe.warmup_steps} warm-up steps",
        "epochs": "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs",
        "examples_per_step": f"{recipe.examples_per_step} examples an optimizer step",
        "weight_decay": f"weight decay {recipe.weight_decay:g}",
        "max_grad_norm": f"gradients clipped to norm {recipe.max_grad_norm:g}",
        "dtype": recipe.dtype,
    }
    return ", ".join(text for field, text in texts.items() if field in fields)


def _base_model(study: Study) -> str:
    model = study.base_model
    if isinstance(model, HubModel):
        return f"{model.repo} at revision {model.revision[:12]}"
    return "the miniature base model"


def _evaluation(study: Study) -> str:
    settings = study.evaluation
    return (
        f"Every cell and the untrained baseline ({_base_model(study)}) answer every evaluation "
        f"question of the bank under each of {len(study.personas)} personas "
        f"and {len(study.scaffolds)} scaffolds (ways to open the assistant's turn). Where a "
        "scaffold asks for a rationale, the model writes it greedily, at most "
        f"{settings.max_rationale_tokens} tokens; {_forced(study)}the answer is the question's "
        "letter with the highest next-token log-probability after the anchor, and ties go to the "
        "first letter. "
        f"Engine: {settings.engine}, {settings.dtype}."
    )


def _forced(study: Study) -> str:
    forcing = [s for s in map(study.scaffold, study.scaffolds) if s.forces]
    if not forcing:
        return ""
    kinds = listed([f"{s.name} ({s.forces})" for s in forcing])
    return (
        f"under {kinds}, a rationale of the kind that the arm in brackets trains on stands in its "
        "place, made as if the evaluated persona were its source; "
    )


def _inference(study: Study) -> str:
    inference = study.inference
    family = len(study.contrast_list)
    least = 1 / (1 + inference.resamples)
    return (
        "The loss of an answer is baseline correctness minus the cell's. Source loss is measured "
        "under the persona that the cell was trained under; bystander leakage is the mean over the "
        f"{len(study.personas) - 1} others. A contrast is the difference of two arms' mean losses "
        f"under the scaffold {inference.scaffold}, paired by source, seed and question. Intervals "
        f"are {percent(inference.confidence)} percentile bootstrap intervals "
        f"({count(inference.resamples)} resamples). The headline scheme draws questions, each with "
        "all its sources and seeds; the scheme “pairs” draws (source, seed, question) triples as "
        "if they were independent. The two-sided p-value is (1 + #{|S* − S| ≥ |S|}) / (1 + B), "
        "where S is the observed sum of differences, S* those of the B resamples; it is at least "
        f"{least:.2g} before adjustment. It is Holm-adjusted over the {family} registered "
        f"contrasts, family-wise level {inference.family_alpha:g}. {decision_rule(study)} "
        "Equivalence is two one-sided tests (TOST): the interval must lie strictly within the "
        "margins. "
        "“Differs from 0” and “equivalent” are separate statements; both can hold."
    )


def threats(study: Study) -> list[str]:
    """Threats to validity that follow from the study file."""
    return list(_threats(study))


def _threats(study: Study) -> Iterator[str]:
    origins = [c for c in study.contrast_list if unequal(study, c, lambda cell: cell.origin)]
    if origins:
        yield (
            f"{_names(origins)}: one arm was trained here, the other carried over from an earlier "
            "experiment; the contrast also contains whatever else differed between the two."
        )
    recipes = [c for c in study.contrast_list if unequal(study, c, study.recipe)]
    if recipes:
        yield f"{_names(recipes)}: the two arms were trained with different recipes."
    scaffold = study.inference.scaffold
    contrasted = dict.fromkeys(arm for c in study.contrast_list for arm in (c.a, c.b))
    tag = study.scaffold(scaffold).tag
    outside = [arm for arm in contrasted if study.arm(arm).scaffold.tag != tag]
    if outside:
        yield (
            f"All contrasts are measured under {scaffold}; the frame of some contrasted arms is "
            f"another one ({listed(outside)}): such an arm may leak less only because its own "
            "frame is absent."
        )
    light = [arm for arm in contrasted if study.arm(arm).loss_on == "answer"]
    if light:
        yield (
            f"{listed(light)}: only the answer line bears loss, so that the loss-token budget is "
            "far below that of the other arms."
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


def unequal(study: Study, contrast: Contrast, of: Callable[[Cell], object]) -> bool:
    """Whether the cells of a contrast's two arms differ in a property."""
    cells = study.contrast_cells(contrast)
    return {of(c) for c in cells if c.arm == contrast.a} != {
        of(c) for c in cells if c.arm == contrast.b
    }


def _names(contrasts: list[Contrast]) -> str:
    return listed(list(dict.fromkeys(f"{c.a} − {c.b}" for c in contrasts)))
