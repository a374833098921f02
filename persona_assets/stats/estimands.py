"""What the study estimates: differences of two losses, registered ones and exploratory ones.

Every estimate is one side's mean loss minus another's, on an axis; a side is an arm under a
scaffold. Where both sides stand under one scaffold the baseline cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.stats.losses import AXES
from persona_assets.study import Cell, Contrast, Study
from persona_assets.study_rules import MACRO
from persona_assets.study_schema import Axis, EquivalenceTest

#: ``contrast``: registered, under the registered scaffold. Exploratory: ``matched``, the
#: registered contrasts with each arm under the scaffold it was trained with; ``mismatch``, an arm
#: under another scaffold than that, minus itself under that; ``exploratory``, further pairs.
Kind = Literal["contrast", "matched", "mismatch", "exploratory"]

#: Pairs of arms that are contrasted where the study has both, without being registered.
_FURTHER_PAIRS = (("persona_cot", "no_cot"),)


@dataclass(frozen=True, slots=True)
class Side:
    """An arm under a scaffold."""

    arm: str
    scaffold: str


@dataclass(frozen=True, slots=True)
class Estimand:
    """Mean loss of side ``a`` minus mean loss of side ``b``, on an axis."""

    kind: Kind
    a: Side
    b: Side
    axis: Axis
    hypothesis: str | None = None
    equivalence: tuple[EquivalenceTest, ...] = ()

    @property
    def name(self) -> str:
        """The arms: ``a-b``, or ``a`` where both sides are of one arm."""
        return _joined(self.a.arm, self.b.arm)

    @property
    def key(self) -> str:
        """``kind/arms/scaffolds/axis``: what the ids of all its numbers begin with."""
        scaffolds = _joined(self.a.scaffold, self.b.scaffold)
        return f"{self.kind}/{self.name}/{scaffolds}/{self.axis}"

    @property
    def needs_baseline(self) -> bool:
        """Whether the baseline's answers enter: under one scaffold they cancel."""
        return self.a.scaffold != self.b.scaffold

    @property
    def scaffolds(self) -> tuple[str, ...]:
        """The scaffolds whose outcomes enter, each once."""
        return tuple(dict.fromkeys((self.a.scaffold, self.b.scaffold)))

    def sources(self, study: Study, scope: str = MACRO) -> tuple[str, ...]:
        """The sources of a scope, in study order; the macro's are those that both arms have."""
        shared = tuple(
            source
            for source in study.sources
            if all(f"{source}.{side.arm}" in study.conditions for side in (self.a, self.b))
        )
        return shared if scope == MACRO else tuple(s for s in shared if s == scope)

    def cells(self, study: Study, scope: str = MACRO) -> tuple[Cell, ...]:
        """Exactly the cells that define the estimate, in grid order."""
        sources, arms = self.sources(study, scope), (self.a.arm, self.b.arm)
        return tuple(c for c in study.cells if c.arm in arms and c.source in sources)

    def evaluations(self, study: Study, scope: str = MACRO) -> tuple[str, ...]:
        """The keys of :meth:`cells`, and ``baseline`` where it enters."""
        keys = tuple(cell.key for cell in self.cells(study, scope))
        return (*keys, BASELINE) if self.needs_baseline else keys


def registered(study: Study, contrast: Contrast) -> Estimand:
    """A registered contrast: both arms under the registered scaffold."""
    scaffold = study.inference.scaffold
    return Estimand(
        "contrast",
        Side(contrast.a, scaffold),
        Side(contrast.b, scaffold),
        contrast.axis,
        contrast.hypothesis,
        contrast.equivalence,
    )


def exploratory(study: Study) -> tuple[Estimand, ...]:
    """Every estimand that is not registered, whose scaffolds the study evaluates."""
    found = (*_matched(study), *_mismatches(study), *_further(study))
    return tuple(e for e in found if set(e.scaffolds) <= set(study.scaffolds))


def estimands(study: Study) -> tuple[Estimand, ...]:
    """Everything the study estimates: the registered contrasts first."""
    return (*(registered(study, c) for c in study.contrast_list), *exploratory(study))


def trained_side(study: Study, arm: str) -> Side:
    """An arm under the scaffold that its training rows have."""
    return Side(arm, study.arm(arm).scaffold.name)


def _matched(study: Study) -> Iterator[Estimand]:
    """The registered contrasts, each arm under its own training scaffold.

    Of the built-in arms only those with a persona's voice train with ``<persona-thinking>``, and
    the registered contrasts are all read under one scaffold.
    """
    for contrast in study.contrast_list:
        a, b = trained_side(study, contrast.a), trained_side(study, contrast.b)
        if {a.scaffold, b.scaffold} != {study.inference.scaffold}:  # else it is the registered one
            yield Estimand("matched", a, b, contrast.axis)


def _mismatches(study: Study) -> Iterator[Estimand]:
    """Every arm under every other scaffold than the one it was trained with.

    Under that one itself the mismatch is 0 by definition, and nothing is estimated: so it is for
    ``scrambled_english_cot`` under ``generic_cot``, whose loss there is in the loss matrix.
    """
    for arm in study.arms:
        trained = trained_side(study, arm)
        for scaffold in study.scaffolds:
            if scaffold != trained.scaffold:
                for axis in AXES:
                    yield Estimand("mismatch", Side(arm, scaffold), trained, axis)


def _further(study: Study) -> Iterator[Estimand]:
    """The further pairs that the study has, under the registered scaffold."""
    for a, b in _FURTHER_PAIRS:
        for axis in AXES:
            sides = Side(a, study.inference.scaffold), Side(b, study.inference.scaffold)
            estimand = Estimand("exploratory", *sides, axis)
            if estimand.sources(study):
                yield estimand


def _joined(a: str, b: str) -> str:
    return a if a == b else f"{a}-{b}"
