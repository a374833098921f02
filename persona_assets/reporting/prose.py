"""The report's sentences of what was done, from the study file alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from persona_assets.naming import listed
from persona_assets.reporting.ledger import Number
from persona_assets.reporting.printed import Code, Part, Sentence, Stated, StudyValues
from persona_assets.study import Study
from persona_assets.study_schema import HubModel, HubRegistry, TrainingRecipe

#: The two-sided p-value, as Methods states it.
P_FORMULA = "(1 + #{|S* − S| ≥ |S|}) / (1 + B)"


def differs(study: Study, macro: Number) -> bool:
    """Whether a macro estimate differs from zero at the family-wise level."""
    return macro.p_holm <= study.inference.family_alpha


def verdict(study: Study, macro: Number) -> Sentence:
    """:func:`differs` in words, with the sign."""
    if not differs(study, macro):
        alpha = StudyValues(study).say("inference.family_alpha")
        return ("not shown to differ from zero at family-wise ", alpha)
    return (f"differs from zero ({'positive' if macro.value > 0 else 'negative'})",)


def decision_rule(study: Study) -> Sentence:
    """What :func:`verdict` rests on, and that the interval beside it is another matter."""
    return (
        "“Differs from zero” means Holm-adjusted p ≤ ",
        StudyValues(study).say("inference.family_alpha"),
        " with questions drawn; the interval shown is not adjusted.",
    )


def forest_caption(study: Study) -> Sentence:
    """What the marks of the forest plot are, and which intervals it does not show."""
    say = StudyValues(study).say
    tests = [test for contrast in study.contrast_list for test in contrast.equivalence]
    marks = (
        say("inference.confidence", "percent"),
        " intervals: thick blue with a square, questions drawn (headline); thin orange with a "
        "small square, pairs drawn. Hollow grey markers: estimates of single sources.",
    )
    if not tests:
        return marks
    levels = [
        say(f"grid.level.{alpha:g}", "percent") for alpha in sorted({t.alpha for t in tests})[::-1]
    ]
    return (
        *marks,
        " Green bands: equivalence margins; equivalence is judged by the ",
        *joined([(level,) for level in levels], " and "),
        " intervals given under Findings, which are not drawn.",
    )


def methods(study: Study) -> list[Sentence]:
    """Paragraphs that say how the numbers were made."""
    return [*_trained_here(study), *_carried_over(study), _evaluation(study), _inference(study)]


def reasoning_arms(study: Study) -> str:
    """Which arms train on a rationale before the answer, as the subject of a sentence."""
    reasoning = [arm for arm in study.arms if study.arm(arm).rationale != "none"]
    others = [arm for arm in study.arms if arm not in reasoning]
    if not reasoning:
        return "No arm trains"
    return f"Every arm but {listed(others)} trains" if others else "Every arm trains"


def joined(sentences: Iterable[Sentence], between: str = ", ") -> list[Part]:
    """Sentences one after another, with ``between`` between them."""
    parts: list[Part] = []
    for i, sentence in enumerate(sentences):
        parts += [between, *sentence] if i else sentence
    return parts


def _trained_here(study: Study) -> Iterator[Sentence]:
    if not study.cells_of("trained"):
        return
    seeded = "the order of rows and the adapter's initialisation"
    if study.training.dropout:
        seeded = "the order of rows, the adapter's initialisation and its dropout"
    yield (
        StudyValues(study).say("grid.trained"),
        f" cells are trained here. Each is one LoRA adapter on {_base_model(study)}, "
        "fine-tuned on those training questions whose rationale its arm kept, asked under its "
        "source persona's system prompt: ",
        *_recipe(study, "training", study.training, TrainingRecipe.model_fields),
        f". The loss is taken on the assistant's turn alone{_masked(study)}. In these cells the "
        "wrong letter of a question is the same for every arm, source and seed, and a seed sets "
        f"{seeded}, and nothing else.",
    )


def _masked(study: Study) -> str:
    light = [arm for arm in study.arms if study.arm(arm).loss_on == "answer"]
    return f" (of {listed(light)}: on its answer line alone)" if light else ""


def _carried_over(study: Study) -> Iterator[Sentence]:
    cells = study.cells_of("carry_over")
    if not cells:
        return
    registry, recipe = study.carry_over, study.recipe(cells[0])
    if isinstance(registry, HubRegistry):
        form = "a whole merged model" if registry.format == "merged" else "a LoRA adapter"
        where = f"{registry.repo} at revision {registry.revision[:12]}"
        # What the file does not state is not known of them: the schema's defaults are ours.
        stated = _recipe(study, "carry_over.training", recipe, recipe.model_fields_set)
    else:
        form, where = "a LoRA adapter", "the study's local registry"
        stated = _recipe(study, "carry_over.prior_training", recipe, TrainingRecipe.model_fields)
    yield (
        StudyValues(study).say("grid.carry_over"),
        f" cells are carried over. Each is {form} from {where}; their recipe as the "
        "study file states it: ",
        *stated,
        ".",
    )


def _recipe(study: Study, path: str, recipe: TrainingRecipe, fields: Iterable[str]) -> list[Part]:
    """Those settings of a recipe that are among ``fields``."""
    values = StudyValues(study)

    def say(field: str) -> Stated:
        return values.say(f"{path}.{field}")

    scale = "rsLoRA (scale alpha / sqrt(rank))" if recipe.rslora else "scale alpha / rank"
    sentences: dict[str, Sentence] = {
        "rank": ("rank ", say("rank")),
        "alpha": ("alpha ", say("alpha")),
        "rslora": (scale,),
        "dropout": ("dropout ", say("dropout")),
        "target_modules": (f"adapted modules {listed(recipe.target_modules)}",),
        "learning_rate": ("learning rate ", say("learning_rate")),
        "warmup_steps": (say("warmup_steps"), " warm-up steps"),
        "epochs": (say("epochs"), " epoch" if recipe.epochs == 1 else " epochs"),
        "examples_per_step": (say("examples_per_step"), " examples an optimizer step"),
        "weight_decay": ("weight decay ", say("weight_decay")),
        "max_grad_norm": ("gradients clipped to norm ", say("max_grad_norm")),
        "dtype": (recipe.dtype,),
    }
    return joined(said for field, said in sentences.items() if field in fields)


def _base_model(study: Study) -> str:
    model = study.base_model
    if isinstance(model, HubModel):
        return f"{model.repo} at revision {model.revision[:12]}"
    return "the miniature base model"


_SERVED = {
    "merged": "adapters are merged into the resident base and taken out again",
    "adapter": "adapters are applied beside the resident base's weights",
}


def _evaluation(study: Study) -> Sentence:
    settings, say = study.evaluation, StudyValues(study).say
    return (
        f"Every cell and the untrained baseline ({_base_model(study)}) answer every evaluation "
        "question of the bank under each of ",
        say("grid.personas"),
        " personas and ",
        say("grid.scaffolds"),
        " scaffolds (ways to open the assistant's turn). Where a scaffold asks for a rationale, "
        "the model writes it greedily, at most ",
        say("evaluation.max_rationale_tokens"),
        f" tokens; {_forced(study)}the answer is the question's letter with the highest "
        "next-token log-probability after the anchor, and ties go to the first letter. "
        f"Engine: {settings.engine}, {settings.dtype}; {_SERVED[settings.serving]}.",
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


def _inference(study: Study) -> Sentence:
    say = StudyValues(study).say
    return (
        "The loss of an answer is baseline correctness minus the cell's. Source loss is measured "
        "under the persona that the cell was trained under; bystander leakage is the mean over "
        "the ",
        say("grid.bystanders"),
        " others. A contrast is the difference of two arms' mean losses under the scaffold "
        f"{study.inference.scaffold}, paired by source, seed and question. Intervals are ",
        say("inference.confidence", "percent"),
        " percentile bootstrap intervals (",
        say("inference.resamples", "count"),
        " resamples). The headline scheme draws questions, each with all its sources and seeds; "
        "the scheme “pairs” draws (source, seed, question) triples as if they were independent. "
        "The two-sided p-value is ",
        Code(P_FORMULA),
        ", where S is the observed sum of differences, S* those of the B resamples; it is at "
        "least ",
        say("grid.least_p", "short"),
        " before adjustment. It is Holm-adjusted over the ",
        say("grid.contrasts"),
        " registered contrasts within each scheme, family-wise level ",
        say("inference.family_alpha"),
        ". ",
        *decision_rule(study),
        " Equivalence is two one-sided tests (TOST): the interval must lie strictly within the "
        "margins. “Differs from zero” and “equivalent” are separate statements; both can hold.",
    )
