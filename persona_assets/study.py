"""A study: one pre-registered experiment, read from YAML, validated, hashed, and its grid.

The study file is the only place that says what is computed. Everything else (partitions, asset
edges, counts in the report) is derived from the :class:`Study` object.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.hashing import sha256_json
from persona_assets.questions.miniature import ATTRIBUTES
from persona_assets.rationales.arms import ARMS

#: What a path, a partition key and a contrast name can all bear: ``.`` joins the parts of a cell's
#: key, ``-`` the two arms of a contrast.
Key = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
Revision = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
Origin = Literal["trained", "carry_over"]
Axis = Literal["source_loss", "bystander_leakage"]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MiniatureModel(_Section):
    """A small Qwen2-architecture model, trained here from the study's seed."""

    kind: Literal["miniature"]
    max_attempts: Annotated[int, Field(ge=1, le=3)] = 3


class HubModel(_Section):
    """A published chat model at a pinned commit."""

    kind: Literal["hub"]
    repo: str
    revision: Revision


class MiniatureQuestions(_Section):
    """Questions about an invented world, generated from the study's seed."""

    kind: Literal["miniature"]
    n_entities: Annotated[int, Field(ge=8, le=200)] = 60
    n_eval: Annotated[int, Field(ge=8)] = 96


class ArcQuestions(_Section):
    """ARC-Challenge as published: its train split for rows, its test split for outcomes."""

    kind: Literal["arc_challenge"]
    repo: str
    revision: Revision


class TemplateRationales(_Section):
    """Offline, deterministic rationale writers: for the miniature world, or for any question."""

    writer: Literal["miniature", "template"]


class ArmUse(_Section):
    """How the study uses an arm: where its checkpoints come from, and for which sources."""

    origin: Origin
    sources: tuple[Key, ...] | None = None


class TrainingRecipe(_Section):
    """LoRA fine-tuning of one cell.

    ``alpha`` is LoRA's numerator: updates are scaled by alpha / rank, or by alpha / sqrt(rank)
    with ``rslora`` (Kalajdzievski 2023).
    """

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    rslora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    epochs: Annotated[int, Field(ge=1)] = 1
    examples_per_step: Annotated[int, Field(ge=1)] = 16
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class LocalRegistry(_Section):
    """Carry-over checkpoints of a prior study that this study trains and publishes itself.

    ``revision: lock`` takes the hashes of the registry's generated lock file; the resolved hash
    is recorded with every checkpoint. Legal for local registries only.
    """

    kind: Literal["local"]
    revision: Literal["lock"] = "lock"
    prior_training: TrainingRecipe


class HubRegistry(_Section):
    """Carry-over checkpoints in folders of a hub repository at a pinned commit.

    ``folder`` is a pattern over ``{source}``, ``{arm}`` and ``{seed}``; ``format`` says whether a
    folder holds a LoRA adapter or a whole merged model. ``training`` is the recipe they were
    trained with, as far as it is known: contrasts between recipes are flagged by it.
    """

    kind: Literal["hub"]
    repo: str
    revision: Revision
    folder: str
    format: Literal["adapter", "merged"]
    training: TrainingRecipe


class EvaluationSettings(_Section):
    """How the rationale-then-letter protocol is run."""

    engine: Literal["transformers"] = "transformers"
    max_rationale_tokens: Annotated[int, Field(ge=1)] = 768
    batch_size: Annotated[int, Field(ge=1)] = 64
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class EquivalenceTest(_Section):
    """Two one-sided tests against ±margin, each at level alpha (interval of 1 − 2 alpha)."""

    margin: Annotated[float, Field(gt=0)]
    alpha: Annotated[float, Field(gt=0, lt=0.5)]


class ContrastSpec(_Section):
    """Arm a − arm b on one or two axes, under the study's registered scaffold."""

    hypothesis: Annotated[str, StringConstraints(pattern=r"^H[0-9]+$")]
    a: Key
    b: Key
    axes: Annotated[tuple[Axis, ...], Field(min_length=1)]
    equivalence: tuple[EquivalenceTest, ...] = ()


class InferenceSettings(_Section):
    """The registered scaffold, and how intervals and p-values are made."""

    scaffold: Key = "persona_cot"
    resamples: Annotated[int, Field(ge=999)] = 100_000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    family_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01


class ComputeSettings(_Section):
    """Threads of one worker; part of a checkpoint's identity, since sums depend on their order."""

    threads: Annotated[int, Field(ge=1)] = 1


class StudyFile(_Section):
    """The schema of ``data/studies/<name>.yaml``."""

    name: Key
    title: str
    seed: Seed
    demonstration: bool = False
    base_model: Annotated[MiniatureModel | HubModel, Field(discriminator="kind")]
    questions: Annotated[MiniatureQuestions | ArcQuestions, Field(discriminator="kind")]
    rationales: TemplateRationales
    personas: dict[Key, Annotated[str, StringConstraints(min_length=1)]]
    sources: Annotated[tuple[Key, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    arms: Annotated[dict[Key, ArmUse], Field(min_length=1)]
    scaffolds: Annotated[tuple[Key, ...], Field(min_length=1)]
    training: TrainingRecipe
    carry_over: Annotated[LocalRegistry | HubRegistry, Field(discriminator="kind")] | None = None
    evaluation: EvaluationSettings
    contrasts: tuple[ContrastSpec, ...]
    inference: InferenceSettings
    compute: ComputeSettings = ComputeSettings()


@dataclass(frozen=True, slots=True)
class Cell:
    """Source × arm × seed: one LoRA checkpoint and its evaluation."""

    source: str
    arm: str
    seed: int
    origin: Origin

    @property
    def key(self) -> str:
        """The partition key, ``source.arm.seed``."""
        return f"{self.source}.{self.arm}.{self.seed}"

    @property
    def condition(self) -> str:
        """The condition's partition key, ``source.arm``."""
        return f"{self.source}.{self.arm}"


@dataclass(frozen=True, slots=True)
class Contrast:
    """One registered macro contrast: arm a − arm b on one axis."""

    hypothesis: str
    a: str
    b: str
    axis: Axis
    equivalence: tuple[EquivalenceTest, ...] = ()

    @property
    def name(self) -> str:
        """``a-b``, as in the ``contrasts`` table."""
        return f"{self.a}-{self.b}"

    @property
    def key(self) -> str:
        """The partition key, ``a-b.axis``."""
        return f"{self.name}.{self.axis}"


class Study(StudyFile):
    """A validated study and the grid derived from it."""

    @cached_property
    def content_hash(self) -> str:
        """Hash of the parsed file: provenance on everything it produced."""
        return sha256_json(self.model_dump(mode="json"))

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell: trained ones first, then carry-over ones, each a contiguous range."""
        return tuple(
            Cell(source, arm, seed, use.origin)
            for origin in ("trained", "carry_over")
            for arm, use in self.arms.items()
            if use.origin == origin
            for source in (self.sources if use.sources is None else use.sources)
            for seed in self.seeds
        )

    @cached_property
    def conditions(self) -> tuple[str, ...]:
        """Every ``source.arm``, in the order of :attr:`cells`."""
        return tuple(dict.fromkeys(cell.condition for cell in self.cells))

    @cached_property
    def contrast_list(self) -> tuple[Contrast, ...]:
        """The registered macro contrasts, one an axis, in file order: the family of the tests."""
        return tuple(
            Contrast(spec.hypothesis, spec.a, spec.b, axis, spec.equivalence)
            for spec in self.contrasts
            for axis in spec.axes
        )

    def cells_of(self, origin: Origin) -> tuple[Cell, ...]:
        """The cells of one origin."""
        return tuple(cell for cell in self.cells if cell.origin == origin)

    def cell(self, key: str) -> Cell:
        """The cell with partition key ``key``.

        Raises:
            KeyError: no such cell; names the nearest.
        """
        return _lookup(key, {cell.key: cell for cell in self.cells}, "cell", self.name)

    def contrast(self, key: str) -> Contrast:
        """The contrast with partition key ``key`` (``a-b.axis``).

        Raises:
            KeyError: no such contrast; names the nearest.
        """
        return _lookup(key, {c.key: c for c in self.contrast_list}, "contrast", self.name)

    def contrast_cells(self, contrast: Contrast) -> tuple[Cell, ...]:
        """Exactly the cells that feed a contrast: both arms, at the sources that both have."""
        shared = self.contrast_sources(contrast)
        return tuple(
            cell
            for cell in self.cells
            if cell.arm in (contrast.a, contrast.b) and cell.source in shared
        )

    def contrast_sources(self, contrast: Contrast) -> tuple[str, ...]:
        """The sources for which both arms of a contrast have cells, in study order."""
        with_a, with_b = (
            {cell.source for cell in self.cells if cell.arm == arm}
            for arm in (contrast.a, contrast.b)
        )
        return tuple(source for source in self.sources if source in with_a & with_b)

    def bystanders(self, source: str) -> tuple[str, ...]:
        """Every persona but ``source``."""
        return tuple(persona for persona in self.personas if persona != source)

    def recipe(self, cell: Cell) -> TrainingRecipe:
        """The recipe that a cell's checkpoint was trained with."""
        if cell.origin == "trained":
            return self.training
        assert self.carry_over is not None, "validated: carry-over cells need `carry_over`"
        if isinstance(self.carry_over, LocalRegistry):
            return self.carry_over.prior_training
        return self.carry_over.training


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a study file."""

    field: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.what}. {self.remedy}"


class StudyError(ValueError):
    """A study file that cannot be used; names the file, every faulty field and its remedy."""

    def __init__(self, file: Path | str, problems: list[Problem]):
        self.file, self.problems = str(file), problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"study file {file} cannot be used:\n{lines}")


def load_study(path: Path) -> Study:
    """Read, validate and freeze a study file.

    Raises:
        StudyError: the file is missing, is not YAML, or says something that cannot be run.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(
            path, [Problem("file", f"cannot be read ({error})", "Name an existing UTF-8 file.")]
        ) from error
    study = parse_study(text, path)
    if study.name != path.stem:
        what = f"is {study.name!r} in the file {path.name}"
        remedy = f"Call it {path.stem!r}, or rename the file: stores and commands go by the name."
        raise StudyError(path, [Problem("name", what, remedy)])
    return study


def parse_study(text: str, file: Path | str = "<text>") -> Study:
    """As :func:`load_study`, from the YAML text itself; ``file`` names it in errors."""
    try:
        raw = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        what = " ".join(str(error).split())
        raise StudyError(file, [Problem("yaml", what, "Mend the YAML syntax.")]) from error
    if not isinstance(raw, dict):
        raise StudyError(
            file,
            [Problem("yaml", "is not a mapping", "Start from data/studies/mini.yaml.")],
        )
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise StudyError(file, [_from_pydantic(e) for e in error.errors()]) from error
    problems = list(_inconsistencies(study))
    if problems:
        raise StudyError(file, problems)
    return study


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated mapping key instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        merge = "tag:yaml.org,2002:merge"  # `<<: *anchor`, which the base class expands
        keys = [self.construct_object(k, deep=True) for k, _ in node.value if k.tag != merge]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_REMEDIES = {
    "missing": "Add the field.",
    "extra_forbidden": "Remove it, or mend its spelling.",
    "union_tag_invalid": "Use one of the listed kinds.",
    "union_tag_not_found": "Add `kind`.",
}


def _from_pydantic(error: Mapping[str, Any]) -> Problem:
    path = ".".join(str(part) for part in error["loc"] if part != "[key]") or "file"
    what = f"{error['msg']} (found {str(error['input'])[:80]!r})"
    remedy = _REMEDIES.get(error["type"], "Give a value of that kind.")
    if error["type"] == "string_pattern_mismatch":
        if error["ctx"]["pattern"] == r"^[0-9a-f]{40}$":
            what = f"{error['input']!r} is not a full commit hash"
            remedy = "Pin the revision to its full 40-character lower-case hex commit."
        elif error["ctx"]["pattern"].startswith("^[a-z]"):
            what = f"{error['input']!r} cannot stand in a path or a partition key"
            remedy = "Use lower-case letters, digits and underscores, starting with a letter."
    return Problem(path, what, remedy)


def _inconsistencies(study: Study) -> Iterator[Problem]:
    """What the schema alone cannot see: names that refer to nothing, repeats, missing parts."""
    yield from _unknown(study.arms, ARMS, "arms", "arm")
    yield from _unknown(study.scaffolds, SCAFFOLDS, "scaffolds", "scaffold")
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
        n = study.questions.n_entities * len(ATTRIBUTES)
        if study.questions.n_eval >= n:
            yield Problem(
                "questions.n_eval",
                f"leaves no question to train on: the world has {n}",
                "Lower it, or raise n_entities.",
            )
    yield from _contrast_problems(study)


def _contrast_problems(study: Study) -> Iterator[Problem]:
    seen: set[str] = set()
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
        for axis in spec.axes:
            contrast = Contrast(spec.hypothesis, spec.a, spec.b, axis)
            if contrast.key in seen:
                yield Problem(f"contrasts.{i}.axes", f"{contrast.key} occurs twice", "Keep one.")
            seen.add(contrast.key)
            if {spec.a, spec.b} <= set(study.arms) and not study.contrast_sources(contrast):
                yield Problem(
                    f"contrasts.{i}", "the two arms share no source", "Give them a common source."
                )


def _folder_pattern(folder: str) -> Iterator[Problem]:
    remedy = "Use {source}, {arm} and {seed}, each once, in a relative path."
    try:
        rendered = {
            folder.format(source=source, arm=arm, seed=seed)
            for source, arm, seed in (("s", "a", 1), ("t", "a", 1), ("s", "b", 1), ("s", "a", 2))
        }
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        yield Problem("carry_over.folder", f"is no such pattern ({error!r})", remedy)
        return
    if len(rendered) < 4:
        yield Problem("carry_over.folder", "gives two cells the same folder", remedy)
    if folder.startswith("/") or ".." in folder.split("/"):
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
                f"{_nearest(name, known)}Known: {', '.join(known)}.",
            )


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


def _lookup(key: str, table: Mapping[str, Any], what: str, study: str) -> Any:
    if key not in table:
        raise KeyError(f"study {study} has no {what} {key!r}. {_nearest(key, table)}".strip())
    return table[key]
