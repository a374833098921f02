"""A study: one pre-registered experiment, read from YAML, validated, hashed, and its grid.

The study file is the only place that says what is computed. Everything else (partitions, asset
edges, counts in the report) is derived from the :class:`Study` object.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from persona_assets.evaluation.scaffolds import SCAFFOLDS, Scaffold
from persona_assets.hashing import sha256_json
from persona_assets.naming import unknown
from persona_assets.rationales.arms import ARMS, Arm
from persona_assets.study_rules import Problem, inconsistencies, schema_problem
from persona_assets.study_schema import (
    Axis,
    EquivalenceTest,
    LocalRegistry,
    Origin,
    PublishedValue,
    StudyFile,
    TrainingRecipe,
)

#: A study file's length at the most, and how many values it may hold once aliases are followed:
#: the largest study of this repository has 6000 bytes, and 400 values.
_MOST_BYTES, _MOST_VALUES = 200_000, 10_000
#: Problems that an error names.
_SHOWN = 20
#: What PyYAML lets out of a scalar with an explicit tag that its text does not fit.
_BAD_SCALAR = (LookupError, AttributeError)


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
    """One registered macro contrast: arm a − arm b on one axis.

    Attributes:
        published: An earlier experiment's value; no input of any estimate.
        path: Where the study file says it (``contrasts.3``).
    """

    hypothesis: str
    a: str
    b: str
    axis: Axis
    equivalence: tuple[EquivalenceTest, ...] = ()
    published: PublishedValue | None = None
    path: str = ""

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

    @property
    def content(self) -> dict[str, Any]:
        """The parsed file as JSON, less what changes no result: where it runs, who is shown it."""
        return self.model_dump(mode="json", exclude={"publish": True, "compute": {"gpus"}})

    @cached_property
    def content_hash(self) -> str:
        """Hash of :attr:`content`: provenance on everything it produced."""
        return sha256_json(self.content)

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
            Contrast(
                spec.hypothesis,
                spec.a,
                spec.b,
                axis,
                spec.equivalence,
                spec.published.get(axis),
                f"contrasts.{i}",
            )
            for i, spec in enumerate(self.contrasts)
            for axis in spec.axes
        )

    @property
    def wants_gpu(self) -> bool:
        """Whether its models are for a GPU, where there is one; the miniature's are for a CPU."""
        return self.base_model.kind == "hub" or self.evaluation.engine == "vllm"

    @cached_property
    def forced_arms(self) -> tuple[str, ...]:
        """The arms whose kind of rationale some scaffold forces, each once."""
        forced = (self.scaffold(name).forces for name in self.scaffolds)
        return tuple(dict.fromkeys(arm for arm in forced if arm is not None))

    def scaffold(self, name: str) -> Scaffold:
        """A built-in scaffold, or one that the study defines."""
        if name in self.define.scaffolds:
            return Scaffold(name, **dict(self.define.scaffolds[name]))
        return SCAFFOLDS[name]

    def arm(self, name: str) -> Arm:
        """A built-in arm, or one that the study defines."""
        if name in self.define.arms:
            own = self.define.arms[name]
            return Arm(
                name,
                self.scaffold(own.scaffold),
                own.target,
                own.rationale,
                own.voice or "neutral",
                own.argues_for or own.target,
                own.loss_on,
            )
        return ARMS[name]

    def cells_of(self, origin: Origin) -> tuple[Cell, ...]:
        """The cells of one origin."""
        return tuple(cell for cell in self.cells if cell.origin == origin)

    @cached_property
    def _cells_by_key(self) -> dict[str, Cell]:
        return {cell.key: cell for cell in self.cells}

    @cached_property
    def _contrasts_by_key(self) -> dict[str, Contrast]:
        return {contrast.key: contrast for contrast in self.contrast_list}

    def cell(self, key: str) -> Cell:
        """The cell with partition key ``key``.

        Raises:
            KeyError: no such cell; names the nearest.
        """
        return _lookup(key, self._cells_by_key, "cell", self.name)

    def contrast(self, key: str) -> Contrast:
        """The contrast with partition key ``key`` (``a-b.axis``).

        Raises:
            KeyError: no such contrast; names the nearest.
        """
        return _lookup(key, self._contrasts_by_key, "contrast", self.name)

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
        return self.shared_sources(contrast.a, contrast.b)

    def shared_sources(self, a: str, b: str) -> tuple[str, ...]:
        """The sources for which two arms both have cells, in study order."""
        with_a, with_b = ({cell.source for cell in self.cells if cell.arm == arm} for arm in (a, b))
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


class StudyError(ValueError):
    """A study file that cannot be used; names the file, the faulty fields and their remedies."""

    def __init__(self, file: Path | str, problems: list[Problem]):
        self.file, self.problems = str(file), problems
        lines = [f"  - {problem}" for problem in problems[:_SHOWN]]
        if more := len(problems) - len(lines):
            lines.append(f"  and {more} more")
        super().__init__("\n".join([f"study file {file} cannot be used:", *lines]))


def load_study(path: Path) -> Study:
    """Read, validate and freeze a study file.

    Raises:
        StudyError: the file is missing, is not YAML, or says something that cannot be run.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1).decode("utf-8")
    except (OSError, ValueError) as error:
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
    if len(text) > _MOST_BYTES:
        what = f"is longer than {_MOST_BYTES} bytes"
        raise StudyError(file, [Problem("file", what, "Start from data/studies/mini.yaml.")])
    try:
        raw = _loaded(text)
    except (yaml.YAMLError, RecursionError, ValueError, *_BAD_SCALAR) as error:
        what = " ".join(str(error).split())
        if isinstance(error, _BAD_SCALAR):
            what = f"a value is not what its tag says ({what})"
        raise StudyError(file, [Problem("yaml", what, "Mend the YAML syntax.")]) from error
    if not isinstance(raw, dict):
        raise StudyError(
            file,
            [Problem("yaml", "is not a mapping", "Start from data/studies/mini.yaml.")],
        )
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise StudyError(file, [schema_problem(e) for e in error.errors()]) from error
    problems = list(inconsistencies(study))
    if problems:
        raise StudyError(file, problems)
    return study


def _loaded(text: str) -> Any:
    """The value of a YAML text, whose size is looked at before anything is made of it.

    Raises:
        yaml.YAMLError, RecursionError, ValueError, and those of _BAD_SCALAR: it is none.
    """
    loader = _StrictLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if (size := _size(root, {})) > _MOST_VALUES:
            raise ValueError(f"holds {size} values once its aliases are followed")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """The values below a node and itself, counted anew wherever an alias stands for them.

    Raises:
        ValueError: an alias stands for what it is in.
    """
    if node not in known:
        known[node] = 0  # under way
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        nodes = (n for item in below for n in (item if isinstance(item, tuple) else (item,)))
        known[node] = 1 + sum(_size(n, known) for n in nodes)
    if not known[node]:
        raise ValueError("an alias stands for what it is in")
    return known[node]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated mapping key instead of keeping the last one.

    And text that no file can hold: `"\\ud800"`, half of a character.
    """

    def construct_scalar(self, node: yaml.Node) -> Any:
        value = super().construct_scalar(node)
        value.encode("utf-8")  # UnicodeEncodeError is a ValueError
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**63:
            raise yaml.constructor.ConstructorError(
                None, None, "a number has more than 63 bits", node.start_mark
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        merge = "tag:yaml.org,2002:merge"  # `<<: *anchor`, which the base class expands
        keys = [self.construct_object(k, deep=True) for k, _ in node.value if k.tag != merge]
        seen: set[Any] = set()
        for key in keys:
            if isinstance(key, Hashable):  # else the base class refuses it
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} occurs twice", node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _lookup(key: str, table: Mapping[str, Any], what: str, study: str) -> Any:
    if key not in table:
        raise KeyError(unknown(key, table, what, study))
    return table[key]
