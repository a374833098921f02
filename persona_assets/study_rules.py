"""What the schema of a study file cannot see: names that refer to nothing, repeats, conflicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.naming import nearest
from persona_assets.questions.miniature import ALL_VOICES, ATTRIBUTES
from persona_assets.rationales.arms import ARMS
from persona_assets.rationales.methods import CONSTRUCTIONS
from persona_assets.study_schema import CHAT_KEY, HubRegistry, LocalRegistry, MiniatureQuestions

if TYPE_CHECKING:
    from persona_assets.study import Study

#: The scope over all sources of an estimate; every other scope is one source, so no source has
#: this name.
MACRO = "macro"
#: The key of the untrained model's evaluation, and what stands for its arm; no arm has this name.
BASELINE = "baseline"
_MOST_CELLS = 20_000


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a study file."""

    field: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.what}. {self.remedy}"


_REMEDIES = {
    "missing": "Add the field.",
    "extra_forbidden": "Remove it, or mend its spelling.",
    "union_tag_invalid": "Use one of the listed kinds.",
    "union_tag_not_found": "Add `kind`.",
    "password_in_url": "Study files are shared: put the key into the variable of `api_key_env`.",
}


def schema_problem(error: Mapping[str, Any]) -> Problem:
    path = ".".join(str(part) for part in error["loc"] if part != "[key]") or "file"
    what = f"{error['msg']} (found {_shown(error['input'])})"
    remedy = _REMEDIES.get(error["type"], "Give a value of that kind.")
    if error["type"] == "password_in_url":
        what = error["msg"]  # and not what it is
    if error["type"] == "string_pattern_mismatch":
        found = _shown(error["input"])
        if error["ctx"]["pattern"] == r"^[0-9a-f]{40}$":
            what = f"{found} is not a full commit hash"
            remedy = "Pin the revision to its full 40-character lower-case hex commit."
        elif error["ctx"]["pattern"] == r"^[0-9a-f]{64}$":
            what = f"{found} is no SHA-256"
            remedy = "Give the file's SHA-256 as 64 lower-case hex digits."
        elif error["ctx"]["pattern"] == CHAT_KEY:
            what = "is no name of a variable for chat keys"  # and, by mistake, may be a key
            remedy = (
                "A study file does not choose which secret leaves: put the endpoint's key into "
                "CHAT_API_KEY, or into a variable whose name ends in _CHAT_API_KEY, and name that."
            )
        elif error["ctx"]["pattern"].startswith("^[a-z]"):
            what = f"{found} cannot stand in a path or a partition key"
            remedy = "Use lower-case letters, digits and underscores, starting with a letter."
    return Problem(path, what, remedy)


def _shown(value: Any) -> str:
    """A value in a sentence: its first 80 characters, quoted."""
    text = str(value)
    return repr(text if len(text) <= 80 else f"{text[:79]}…")


def inconsistencies(study: Study) -> Iterator[Problem]:
    """What the schema alone cannot see: names that refer to nothing, repeats, missing parts.

    A grid that is too large is the only problem told of a study: the others are looked for in it.
    """
    n_cells = len(study.arms) * len(study.sources) * len(study.seeds)
    if n_cells > _MOST_CELLS:
        yield Problem(
            "arms",
            f"× sources × seeds are {n_cells} cells",
            f"Split the study: {_MOST_CELLS} are the most.",
        )
        return
    yield from _definition_problems(study)
    yield from _unknown(study.arms, {**ARMS, **study.define.arms}, "arms", "arm")
    yield from _unknown(
        study.scaffolds, {**SCAFFOLDS, **study.define.scaffolds}, "scaffolds", "scaffold"
    )
    yield from _unknown(study.sources, study.personas, "sources", "persona")
    yield from _repeats(study)
    for arm, use in study.arms.items():
        yield from _unknown(use.sources or (), study.sources, f"arms.{arm}.sources", "source")
        if use.sources == ():
            yield Problem(f"arms.{arm}.sources", "is empty", "Remove it to use every source.")
    if study.inference.scaffold not in study.scaffolds:
        yield Problem(
            "inference.scaffold",
            f"{study.inference.scaffold!r} is not evaluated",
            f"Add it to `scaffolds` ({', '.join(study.scaffolds)}).",
        )
    if BASELINE in study.arms:
        yield Problem(f"arms.{BASELINE}", "is what the untrained model is called", "Rename it.")
    if MACRO in study.sources:
        yield Problem(
            f"sources.{MACRO}", "is what the mean over the sources is called", "Rename it."
        )
    if len(study.personas) < 2:
        yield Problem("personas", "has no bystander", "Name at least two personas.")
    if study.cells_of("carry_over") and study.carry_over is None:
        yield Problem(
            "carry_over", "is missing, but an arm has origin carry_over", "Add the section."
        )
    if isinstance(study.carry_over, HubRegistry):
        yield from _folder_pattern(study.carry_over.folder)
    miniature = {study.base_model.kind, study.questions.kind, study.rationales.writer} & {
        "miniature"
    }
    if miniature and not (
        study.base_model.kind == study.questions.kind == study.rationales.writer == "miniature"
    ):
        yield Problem(
            "base_model.kind",
            "the miniature model, questions and writer share one closed world",
            "Use `miniature` for base_model.kind, questions.kind and rationales.writer, or "
            "for none.",
        )
    if isinstance(study.carry_over, LocalRegistry) and study.base_model.kind != "miniature":
        yield Problem(
            "carry_over.kind",
            "a local registry is filled by the miniature study's prior_checkpoint",
            "Use `kind: hub` with a pinned revision.",
        )
    if isinstance(study.questions, MiniatureQuestions):
        yield from _strangers(study)
        n = study.questions.n_entities * len(ATTRIBUTES)
        if study.questions.n_eval >= n:
            yield Problem(
                "questions.n_eval",
                f"leaves no question to train on: the world has {n}",
                "Lower it, or raise n_entities.",
            )
    yield from _contrast_problems(study)


def _strangers(study: Study) -> Iterator[Problem]:
    """The miniature model is pretrained on its world's speakers, and knows no other."""
    yield from _unknown(study.personas, ALL_VOICES, "personas", "speaker of the miniature world")
    for persona, prompt in study.personas.items():
        if persona in ALL_VOICES and prompt != (known := ALL_VOICES[persona].system_prompt):
            yield Problem(
                f"personas.{persona}", f"is {prompt!r}", f"The miniature knows it as {known!r}."
            )


_TAGS = tuple(dict.fromkeys(s.tag for s in SCAFFOLDS.values() if s.tag))


def _definition_problems(study: Study) -> Iterator[Problem]:
    arms, scaffolds = study.define.arms, study.define.scaffolds
    for field, own, built_in in (("arms", arms, ARMS), ("scaffolds", scaffolds, SCAFFOLDS)):
        for name in own.keys() & built_in.keys():
            yield Problem(
                f"define.{field}.{name}", "is built in", "Give the study's own another name."
            )
    known_scaffolds = {**SCAFFOLDS, **scaffolds}
    ways = ["none", "written", *CONSTRUCTIONS]
    for name, arm in arms.items():
        at = f"define.arms.{name}"
        yield from _unknown([arm.scaffold], known_scaffolds, f"{at}.scaffold", "scaffold")
        yield from _unknown([arm.rationale], ways, f"{at}.rationale", "way to make a rationale")
        if arm.rationale != "written" and (arm.voice or arm.argues_for):
            yield Problem(
                f"{at}.{'voice' if arm.voice else 'argues_for'}",
                f"says nothing of a rationale that is {arm.rationale!r}",
                "Remove it, or have the rationale written.",
            )
        if arm.rationale == "none" and arm.loss_on == "answer":
            yield Problem(f"{at}.loss_on", "masks no rationale, for there is none", "Remove it.")
        frame = known_scaffolds.get(arm.scaffold)
        if frame is None:
            continue
        if (frame.tag is None and arm.rationale != "none") or (
            frame.generates and arm.rationale == "none"
        ):
            yield Problem(
                f"{at}.rationale",
                f"is {arm.rationale!r} in the scaffold {arm.scaffold!r}, whose tag is {frame.tag}",
                "A rationale stands in a tag, and one that is generated has to be trained: mend "
                "either.",
            )
        if frame.forces is not None:
            yield Problem(f"{at}.scaffold", "forces a rationale", "Train under one that does not.")
    for name, scaffold in scaffolds.items():
        at = f"define.scaffolds.{name}"
        if scaffold.tag is None and (scaffold.generates or scaffold.forces):
            yield Problem(f"{at}.tag", "is missing, and the rationale stands in it", "Add it.")
        if scaffold.generates and scaffold.forces:
            yield Problem(f"{at}.generates", "and `forces` exclude each other", "Keep one.")
        if scaffold.tag not in (None, *_TAGS) and study.base_model.kind == "miniature":
            yield Problem(
                f"{at}.tag", f"is {scaffold.tag!r}", f"The miniature knows {', '.join(_TAGS)}."
            )
        if scaffold.forces is None:
            continue
        yield from _unknown([scaffold.forces], {**ARMS, **arms}, f"{at}.forces", "arm")
        forced = {**ARMS, **arms}.get(scaffold.forces)
        if forced is not None and forced.rationale == "none":
            yield Problem(f"{at}.forces", "names an arm without a rationale", "Name another arm.")
        if study.rationales.writer == "chat_api" and name in study.scaffolds:
            yield Problem(
                f"{at}.forces",
                "needs a rationale for every persona and question, and a chat model refuses some",
                "Use `writer: template` for studies that force rationales.",
            )


def _contrast_problems(study: Study) -> Iterator[Problem]:
    seen: set[tuple[str, str, str]] = set()
    for i, spec in enumerate(study.contrasts):
        for side, arm in (("a", spec.a), ("b", spec.b)):
            if arm not in study.arms:
                yield Problem(
                    f"contrasts.{i}.{side}",
                    f"no cell has the arm {arm!r}",
                    f"Use one of {', '.join(study.arms)}, or add it to `arms`.",
                )
        if spec.a == spec.b:
            yield Problem(f"contrasts.{i}", "contrasts an arm with itself", "Name two arms.")
        margins = [f"{test.margin:g}" for test in spec.equivalence]  # as the numbers' ids have it
        if repeated := sorted({margin for margin in margins if margins.count(margin) > 1}):
            yield Problem(
                f"contrasts.{i}.equivalence",
                f"the margin {repeated[0]} occurs twice: its two tests would bear one name",
                "Keep one test a margin.",
            )
        for axis in spec.axes:
            if (spec.a, spec.b, axis) in seen or (spec.b, spec.a, axis) in seen:
                yield Problem(
                    f"contrasts.{i}.axes",
                    f"{spec.a}-{spec.b}.{axis} occurs twice, or with its arms exchanged",
                    "Keep one.",
                )
            seen.add((spec.a, spec.b, axis))
        for axis, value in spec.published.items():
            at = f"contrasts.{i}.published.{axis}"
            if axis not in spec.axes:
                yield Problem(at, "is of no axis of this contrast", "Remove it, or add the axis.")
            elif value.interval and not value.interval[0] <= value.estimate <= value.interval[1]:
                yield Problem(
                    f"{at}.interval", "does not hold the estimate", "Give its two ends in order."
                )
        if {spec.a, spec.b} <= set(study.arms) and not study.shared_sources(spec.a, spec.b):
            yield Problem(
                f"contrasts.{i}", "the two arms share no source", "Give them a common source."
            )


def _folder_pattern(folder: str) -> Iterator[Problem]:
    remedy = "Use {source}, {arm} and {seed}, each once, in a relative path."
    try:
        fields = [part[1:] for part in Formatter().parse(folder) if part[1] is not None]
    except ValueError as error:
        yield Problem("carry_over.folder", f"is no such pattern ({error})", remedy)
        return
    for name, spec, conversion in fields:
        if name not in ("source", "arm", "seed") or spec or conversion:
            yield Problem("carry_over.folder", f"has a field {name!r} that is none", remedy)
            return
    rendered = {
        folder.format(source=source, arm=arm, seed=seed)
        for source, arm, seed in (("s", "a", 1), ("t", "a", 1), ("s", "b", 1), ("s", "a", 2))
    }
    if len(rendered) < 4:
        yield Problem("carry_over.folder", "gives two cells the same folder", remedy)
    if not all(part.strip(".") for part in folder.split("/")) or "\\" in folder:
        yield Problem("carry_over.folder", "leaves the repository", remedy)


def _repeats(study: Study) -> Iterator[Problem]:
    for field in ("sources", "seeds", "scaffolds"):
        values = getattr(study, field)
        for value in sorted({v for v in values if values.count(v) > 1}, key=str):
            yield Problem(field, f"{value!r} occurs twice", "Keep one of them.")
    prompts = list(study.personas.values())
    for persona, prompt in study.personas.items():
        if prompts.count(prompt) > 1:
            yield Problem(
                f"personas.{persona}", "has the same prompt as another", "Tell them apart."
            )


def _unknown(names, known, field: str, what: str) -> Iterator[Problem]:
    for name in names:
        if name not in known:
            yield Problem(
                f"{field}.{name}",
                f"{name!r} is no {what} known here",
                f"{nearest(name, known)}Known: {', '.join(known)}.",
            )
