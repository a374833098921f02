"""What the study's numbers say, in sentences: verdicts, the summary, how sure, and what next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from persona_assets.reporting.ledger import Ledger, Number
from persona_assets.reporting.printed import Part, Printed, Sentence, StudyValues
from persona_assets.reporting.prose import differs, joined
from persona_assets.reporting.queries import Row
from persona_assets.reporting.threats import found_confounds
from persona_assets.reporting.words import AXIS_WORDS
from persona_assets.stats.comparability import KINDS
from persona_assets.stats.estimands import MACRO, exploratory, registered
from persona_assets.stats.estimates import HEADLINE_SCHEME
from persona_assets.study import Contrast, Study
from persona_assets.study_schema import EquivalenceTest

#: Checks of answers that warn, and what their failure means for the estimates.
_WEAKENING = {
    "letter_collapse": "Some cells answer with hardly more than one letter: what they lose is not "
    "knowledge alone.",
    "truncation": "Some rationales were cut off at the token limit, which moves their answers.",
    "letter_mass": "Some answers were read where the model was not about to give a letter.",
    "drift": "Some carried-over cells do not answer as the earlier experiment found.",
}
#: Fewer seeds than this say little of how far another seed would move an estimate.
_FEW_SEEDS = 3


@dataclass(frozen=True, slots=True)
class Confidence:
    """How far the registered verdicts can be trusted, by rule.

    ``HIGH`` unless a reason stands against it: each of ``reasons`` caps it at ``MODERATE``, and
    with a single seed or a single source it is ``LOW``. Reasons are the design's, the numbers', and
    what the checks found. A demonstration supports no claim at all.
    """

    marker: str
    reasons: tuple[str, ...]


def contrast_id(study: Study, contrast: Contrast, scheme: str = HEADLINE_SCHEME) -> str:
    """The id of a registered contrast's macro estimate."""
    return f"{registered(study, contrast).key}/{MACRO}/{scheme}"


def equivalent(number: Number, margin: float) -> bool:
    """Whether a number's interval lies strictly within the margins."""
    return -margin < number.ci_low and number.ci_high < margin


def equivalence_id(study: Study, contrast: Contrast, test: EquivalenceTest) -> str:
    """The id of the number that an equivalence test reads."""
    return f"{contrast_id(study, contrast)}/equivalence_{test.margin:g}"


def confidence(study: Study, ledger: Ledger, checks: Sequence[Row]) -> Confidence:
    """The confidence marker and its reasons: see :class:`Confidence`.

    Args:
        study: The study.
        ledger: Its numbers.
        checks: The rows of the warehouse's table ``checks``.
    """
    if study.demonstration:
        return Confidence(
            "demonstration: supports no claim",
            ("The study file declares a demonstration: its numbers show that the pipeline works.",),
        )
    low, moderate = list(_low(study)), list(_moderate(study, ledger, checks))
    marker = "LOW" if low else "MODERATE" if moderate else "HIGH"
    nothing = (
        "Arms that differ in nothing else, enough seeds, verdicts that both schemes share, and "
        "answers that passed their checks."
    )
    return Confidence(f"{marker} confidence", tuple([*low, *moderate] or [nothing]))


def _low(study: Study) -> Iterator[str]:
    if len(study.seeds) == 1:
        yield "A single training seed: nothing tells its effect from that of the arms."
    if any(len(study.contrast_sources(c)) == 1 for c in study.contrast_list):
        yield "A contrast has a single source: nothing tells its effect from that of the arms."


def _moderate(study: Study, ledger: Ledger, checks: Sequence[Row]) -> Iterator[str]:
    for confound in found_confounds(study, checks):
        yield f"In {_how_many(confound.contrasts, study)}, {KINDS[confound.kind]}."
    failed = {row["check_name"] for row in checks if row["status"] == "failed"}
    for name, what in _WEAKENING.items():
        if name in failed:
            yield what
    if 1 < len(study.seeds) < _FEW_SEEDS:
        yield "There are few training seeds: their spread is hardly known."
    if any(_turns_on_the_scheme(study, ledger, c) for c in study.contrast_list):
        yield "Some verdict is another one with pairs drawn than with questions drawn."
    if any(_seeds_disagree(study, ledger, c) for c in study.contrast_list):
        yield "Some contrast that differs from zero has another sign in a single seed."


def _how_many(contrasts: Sequence[str], study: Study) -> str:
    """How many of the contrasts, in words."""
    every = {contrast.name for contrast in study.contrast_list}
    return "every contrast" if set(contrasts) == every else "some contrasts"


def _turns_on_the_scheme(study: Study, ledger: Ledger, contrast: Contrast) -> bool:
    verdicts = {
        differs(study, ledger[contrast_id(study, contrast, scheme)])
        for scheme in ("pairs", "question")
    }
    return len(verdicts) > 1


def _seeds_disagree(study: Study, ledger: Ledger, contrast: Contrast) -> bool:
    macro = ledger[contrast_id(study, contrast)]
    key = f"{registered(study, contrast).key}/{MACRO}"
    seeds = [ledger[f"{key}/seed_{seed}"].value for seed in study.seeds]
    return differs(study, macro) and any(value * macro.value <= 0 for value in seeds)


def headline(study: Study, ledger: Ledger, checks: Sequence[Row]) -> Sentence:
    """The report in one sentence: how many registered contrasts differ, and how sure that is."""
    trust = confidence(study, ledger, checks).marker
    shown = [c for c in study.contrast_list if differs(study, ledger[contrast_id(study, c)])]
    if not shown:
        return (f"No registered contrast is shown to differ from zero ({trust}).",)
    found = "Some registered contrasts differ from zero, and some are not shown to"
    if len(shown) == len(study.contrast_list):
        found = "Every registered contrast differs from zero"
    largest = max(shown, key=lambda c: abs(ledger[contrast_id(study, c)].value))
    name = f"{largest.a} − {largest.b} in {AXIS_WORDS[largest.axis]}"
    return (
        f"{found}; the largest that does is {name}, ",
        Printed(ledger[contrast_id(study, largest)], "value", "signed"),
        f" ({trust}).",
    )


def summary(study: Study, ledger: Ledger, checks: Sequence[Row]) -> list[Sentence]:
    """The report in three to five sentences."""
    return list(_summary(study, ledger, checks))


def _summary(study: Study, ledger: Ledger, checks: Sequence[Row]) -> Iterator[Sentence]:
    everything, cells = ledger["count/outcomes"], ledger["count/cells"]
    yield (
        *(Printed(cells, "value", "count"), " cells and one untrained baseline gave "),
        *(Printed(everything, "value", "count"), " answers."),
    )
    by_verdict: dict[bool, list[Contrast]] = {True: [], False: []}
    for contrast in study.contrast_list:
        verdict = differs(study, ledger[contrast_id(study, contrast)])
        by_verdict[verdict].append(contrast)
    heads = {
        True: "Differing from zero among the registered contrasts: ",
        False: "Not shown to differ from zero: ",
    }
    for verdict, contrasts in by_verdict.items():
        if contrasts:
            said = (_estimate(ledger[contrast_id(study, c)], c) for c in contrasts)
            yield (heads[verdict], *joined(said, "; "), ".")
    tests = [(c, i) for c in study.contrast_list for i in range(len(c.equivalence))]
    if tests:
        yield (*_equivalence(study, ledger, tests), ".")
    trust = confidence(study, ledger, checks)
    yield (f"How far to trust this: {trust.marker}. {trust.reasons[0]}",)


def _estimate(number: Number, contrast: Contrast) -> Sentence:
    name = f"{contrast.a} − {contrast.b}, {AXIS_WORDS[contrast.axis]} ("
    return (name, Printed(number, "value", "signed"), ")")


def _equivalence(study: Study, ledger: Ledger, tests: list[tuple[Contrast, int]]) -> Iterator[Part]:
    say = StudyValues(study).say
    before = None
    for contrast, i in tests:
        test = contrast.equivalence[i]
        number = ledger[equivalence_id(study, contrast, test)]
        word = "equivalent" if equivalent(number, test.margin) else "not shown equivalent"
        if contrast is not before:
            yield "; " if before else ""
            yield f"{contrast.a} and {contrast.b} are, in {AXIS_WORDS[contrast.axis]}, "
        else:
            yield ", and "
        yield f"{word} within ±"
        yield say(f"{contrast.path}.equivalence.{i}.margin")
        before = contrast


def next_steps(study: Study, ledger: Ledger, checks: Sequence[Row]) -> list[str]:
    """What would make the verdicts firmer, derived from what weakens them."""
    return list(_next_steps(study, ledger, checks))


def _next_steps(study: Study, ledger: Ledger, checks: Sequence[Row]) -> Iterator[str]:
    if study.demonstration:
        yield "Run the study on a real base model and question bank: this one shows the machinery."
    if {"origin", "recipe"} & {confound.kind for confound in found_confounds(study, checks)}:
        yield "Train every contrasted arm here, with one recipe (origin: trained)."
    if len(study.seeds) < _FEW_SEEDS:
        yield "Add training seeds."
    unsure = [
        f"{c.a} − {c.b} ({AXIS_WORDS[c.axis]})"
        for c in study.contrast_list
        if not (differs(study, ledger[contrast_id(study, c)]) or _is_equivalent(study, ledger, c))
    ]
    if unsure:
        yield (
            "Add evaluation questions, or seeds, for what is neither shown to differ nor shown "
            f"equivalent: {'; '.join(unsure)}."
        )
    if any(estimand.kind == "matched" for estimand in exploratory(study)):
        yield (
            "Read the matched contrasts before explaining a registered one: an arm may leak less "
            "only because its own frame is absent."
        )


def _is_equivalent(study: Study, ledger: Ledger, contrast: Contrast) -> bool:
    """Whether a contrast is shown equivalent within some margin."""
    return any(
        equivalent(ledger[equivalence_id(study, contrast, test)], test.margin)
        for test in contrast.equivalence
    )
