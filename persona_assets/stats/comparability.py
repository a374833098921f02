"""What else differs between the two arms of a contrast: recipe, origin, serving, engine, budget.

A contrast is a difference of paired cells (same source and seed). Whatever is unequal within a
pair, other than the arm, may be what the contrast measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from persona_assets.audit import Audit, audit
from persona_assets.naming import listed
from persona_assets.study import Cell, Contrast, Study
from persona_assets.study_schema import HubRegistry

#: What is known of a cell: kind of fact → field → value; None where it is not known.
Facts = Mapping[str, Mapping[str, str | None]]

#: The kinds of facts, and what their difference means for a contrast: one sentence each, which
#: continues the contrasts' names.
KINDS = {
    "origin": "one arm was trained here, the other carried over from an earlier experiment; the "
    "contrast also contains whatever else differed between the two",
    "recipe": "the two arms were trained with different recipes",
    "serving": "the two arms are served in different modes, whose roundings differ",
    "engine": "the two arms were evaluated by different engines",
    "budget": "the two arms bear loss on different parts of the turn, so that their loss-token "
    "budgets are far apart",
}


@dataclass(frozen=True, slots=True)
class Confound:
    """One kind of fact in which the two arms of some contrasts differ.

    Attributes:
        kind: A key of :data:`KINDS`.
        differences: What differs, field by field, in words.
        contrasts: The names, ``a-b``, of the contrasts that differ in just this.
    """

    kind: str
    differences: tuple[str, ...]
    contrasts: tuple[str, ...]

    @property
    def phrase(self) -> tuple[str, str]:
        """The contrasts' names, and what their difference means."""
        return listed([name.replace("-", " − ") for name in self.contrasts]), KINDS[self.kind]

    @property
    def told(self) -> bool:
        """Whether :attr:`differences` say more than the kind does."""
        return self.kind != "origin"

    @property
    def sentence(self) -> str:
        """The threat to validity, in one sentence."""
        names, means = self.phrase
        details = f" ({'; '.join(self.differences)})" if self.told else ""
        return f"{names}: {means}{details}."


def planned_facts(study: Study) -> dict[str, dict[str, dict[str, str | None]]]:
    """What the study file says of each cell, by its key: every kind but ``engine``.

    Of a hub's checkpoints only those settings of the recipe are known that the file states: the
    schema's defaults are this project's own.
    """
    return {
        cell.key: {
            "origin": {"origin": cell.origin},
            "recipe": _recipe(study, cell),
            "serving": {"served as": _serving(study, cell)},
            "budget": {"loss on": _loss_on(study, cell)},
        }
        for cell in study.cells
    }


def with_engines(
    planned: Mapping[str, Facts], engines: Mapping[str, Mapping[str, str]]
) -> dict[str, Facts]:
    """``planned`` and, of the cells that have been evaluated, the engine that did it.

    Args:
        planned: As from :func:`planned_facts`.
        engines: The engine's fingerprint (``Engine.fingerprint``) by cell key.
    """
    return {
        key: {**facts, **({"engine": engines[key]} if key in engines else {})}
        for key, facts in planned.items()
    }


def confounds(
    study: Study, facts: Mapping[str, Facts], contrasts: Iterable[Contrast] | None = None
) -> list[Confound]:
    """The differences within contrasts, kind by kind; contrasts that differ alike stand together.

    Args:
        study: The study.
        facts: What is known of each cell of the contrasts, by its key. What only one cell of a
            pair has is not known of the other.
        contrasts: Some of the study's; None for all.

    Raises:
        KeyError: a cell of a contrast has no facts.
        ValueError: a kind of fact is not one of :data:`KINDS`.
    """
    if unknown := {kind for known in facts.values() for kind in known} - KINDS.keys():
        raise ValueError(f"no kinds of facts: {sorted(unknown)}. Known: {', '.join(KINDS)}")
    chosen = study.contrast_list if contrasts is None else contrasts
    by_name = {contrast.name: contrast for contrast in chosen}  # axes share their cells
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for kind in KINDS:
        for name, contrast in by_name.items():
            if differences := _differences(study, contrast, facts, kind):
                alike.setdefault((kind, differences), []).append(name)
    return [Confound(*difference, tuple(names)) for difference, names in alike.items()]


def comparable_audit(study: Study, contrast: Contrast, facts: Mapping[str, Facts]) -> Audit:
    """``comparable``: whether a contrast's arms differ in nothing but the arm.

    A warning: the estimate of a confounded contrast stands, and means less.
    """
    found = confounds(study, facts, [contrast])
    cells = [facts[cell.key] for cell in study.contrast_cells(contrast)]
    kinds = listed([kind for kind in KINDS if any(kind in known for known in cells)])
    return audit(
        "comparable",
        not found,
        observed=" ".join(confound.sentence for confound in found)
        or f"{contrast.name}: equal in {kinds}, cell by cell",
        threshold=f"the two cells of each source and seed are equal in {kinds}",
        remedy="Make both arms' checkpoints and outcomes alike, or report the contrast as "
        "confounded.",
        blocking=False,
        confounds={confound.kind: list(confound.differences) for confound in found},
    )


def _differences(
    study: Study, contrast: Contrast, facts: Mapping[str, Facts], kind: str
) -> tuple[str, ...]:
    """In words, whichever arm comes first, each field that differs within some pair of cells."""
    pairs: dict[tuple[str, int], dict[str, Mapping[str, str | None]]] = {}
    for cell in study.contrast_cells(contrast):
        pair = pairs.setdefault((cell.source, cell.seed), {})
        pair[cell.arm] = facts[cell.key].get(kind, {})
    differ: dict[str, None] = {}
    unknown: dict[str, None] = {}
    for arms in pairs.values():
        a, b = arms[contrast.a], arms[contrast.b]
        for field in dict.fromkeys([*a, *b]):
            values = {a.get(field), b.get(field)}
            if None in values and len(values) > 1:
                unknown[field] = None
            elif len(values) > 1:
                differ[f"{field} {' and '.join(sorted(values))}"] = None
    known_of_one = [f"{listed(list(unknown))} known of one arm only"] if unknown else []
    return (*differ, *known_of_one)


def _recipe(study: Study, cell: Cell) -> dict[str, str | None]:
    recipe = study.recipe(cell)
    foreign = cell.origin == "carry_over" and isinstance(study.carry_over, HubRegistry)
    stated = recipe.model_fields_set if foreign else type(recipe).model_fields.keys()
    return {
        field.replace("_", " "): _text(value) if field in stated else None
        for field, value in recipe
    }


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _serving(study: Study, cell: Cell) -> str:
    """How the checkpoint is put to use: merged elsewhere or here, or beside the base's weights."""
    registry = study.carry_over if cell.origin == "carry_over" else None
    if isinstance(registry, HubRegistry) and registry.format == "merged":
        return "a whole merged model"
    merged = study.evaluation.serving == "merged"
    return "an adapter merged here" if merged else "an adapter beside the base"


def _loss_on(study: Study, cell: Cell) -> str:
    arm = study.arm(cell.arm)
    light = arm.loss_on == "answer" or arm.rationale == "none"
    return "the answer line alone" if light else "rationale and answer line"
