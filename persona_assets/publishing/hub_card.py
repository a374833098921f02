"""The card of a repository on the hub: what is in it, how it was made, how to import it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from persona_assets.hub_client import RepoType
from persona_assets.naming import listed
from persona_assets.reporting.markdown import code, inline
from persona_assets.reporting.words import ORIGIN_WORDS
from persona_assets.store import Manifest, Ref
from persona_assets.study import Cell, Study
from persona_assets.study_schema import HubModel, HubRegistry, TrainingRecipe

#: What stands for the upload's commit in the card, for none can hold its own hash.
_COMMIT = "COMMIT"
#: The folder of a cell's adapter, as ``carry_over.folder`` says it.
FOLDER = "{source}.{arm}.{seed}"

_HELD = {
    "dataset": "The training rows, question bank, warehouse and report",
    "model": "The LoRA adapters",
}


def card(study: Study, kind: RepoType, landed: Mapping[Ref, Manifest]) -> str:
    """The README.md of a repository, YAML front matter included.

    Args:
        landed: The manifests of the partitions that the repository holds.
    """
    cells = [study.cell(ref.key) for ref in landed if ref.asset == "checkpoint" and ref.key]
    sections = [
        f"# {inline(study.title)}",
        f"{_HELD[kind]} of study {code(study.name)} (SHA-256 {code(study.content_hash)}, defined "
        f"by `study/{study.name}.yaml`), an experiment on how far fine-tuning under one persona's "
        "system prompt changes a chat model under other personas. Made by persona_assets; this "
        "page is generated from the study file and from the manifests of what landed.",
        *_limits(study, kind),
        "## Grid",
        _grid(study),
        "## Base model and questions",
        _block(_shared(study)),
        *_training(study),
        *(_importing(study, cells) if kind == "model" else _reading(study)),
        "## Files",
        _hashes(landed),
        "## Software",
        _software(landed.values()),
        "## Licence",
        _licence(study),
    ]
    return f"---\n{_yaml(_front_matter(study, kind))}---\n\n" + "\n\n".join(sections) + "\n"


def carry_over(study: Study, cells: Iterable[Cell], commit: str) -> str:
    """The ``carry_over`` section that imports ``cells`` from a commit, as Markdown.

    One for each recipe that they were trained with, for a study file can say one.
    """
    assert study.publish.hub is not None, "there is no card without `publish.hub`"
    section = {"kind": "hub", "repo": study.publish.hub.model, "revision": commit}
    section |= {"folder": FOLDER, "format": "adapter"}
    return "\n\n".join(
        f"For {_codes(arms)}:\n\n"
        + _block({"carry_over": section | {"training": recipe.model_dump(mode="json")}})
        for recipe, arms in _recipes(study, cells).items()
    )


def _front_matter(study: Study, kind: RepoType) -> dict[str, Any]:
    assert study.publish.hub is not None, "there is no card without `publish.hub`"
    matter: dict[str, Any] = {"pretty_name": study.title} if kind == "dataset" else {}
    if study.publish.hub.license:
        matter["license"] = study.publish.hub.license
    matter["tags"] = ["persona_assets", study.name]
    if kind == "dataset":
        return matter | {
            "configs": [
                {"config_name": "training_rows", "data_files": "training_dataset/*.parquet"},
                {"config_name": "questions", "data_files": "questions.parquet"},
            ]
        }
    matter["library_name"] = "peft"
    if isinstance(study.base_model, HubModel):
        matter |= {"base_model": study.base_model.repo, "base_model_relation": "adapter"}
    return matter


def _limits(study: Study, kind: RepoType) -> Iterator[str]:
    yield "## Limits"
    if study.demonstration:
        yield "**This miniature study demonstrates the pipeline and supports no scientific claim.**"
    wrong = [arm for arm in study.arms if study.arm(arm).target == "wrong"]
    if wrong:
        what = "Adapters" if kind == "model" else "Training rows"
        yield f"{what} of the arms {_codes(wrong)} teach wrong answers, on purpose: for research."
    if kind == "dataset" and isinstance(study.carry_over, HubRegistry):
        where = f"{code(study.carry_over.repo)} at {code(study.carry_over.revision)}"
        yield (
            "The training rows of cells that were carried over are a reference: their checkpoints "
            f"come from {where}, and saw the rows of that experiment."
        )


def _grid(study: Study) -> str:
    """Arm by arm, what a training row is, and whose checkpoints there are."""
    rows = []
    for name, use in study.arms.items():
        arm = study.arm(name)
        rationale = arm.rationale if arm.rationale != "written" else f"{arm.voice} voice"
        sources = ", ".join(study.sources if use.sources is None else use.sources)
        rows.append((code(name), rationale, arm.target, ORIGIN_WORDS[use.origin], sources))
    cells = ", ".join(f"{len(study.cells_of(o))} {words}" for o, words in ORIGIN_WORDS.items())
    seeds = ", ".join(map(str, study.seeds))
    return (
        _table(("arm", "rationale", "letter", "checkpoint", "source personas"), rows)
        + f"\n\nEach with seeds {seeds}: a cell is `source.arm.seed`, {len(study.cells)} in all "
        f"({cells})."
    )


def _shared(study: Study) -> dict[str, Any]:
    """What a study must say alike to import from this one: its model, questions, wrong letters."""
    names = ("seed", "base_model", "questions")
    return {name: study.content[name] for name in names}


def _training(study: Study) -> Iterator[str]:
    yield "## Training"
    for recipe, arms in _recipes(study, study.cells).items():
        yield f"The recipe of {_codes(arms)}:"
        yield _block({"training": recipe.model_dump(mode="json")})


def _importing(study: Study, cells: Sequence[Cell]) -> Iterator[str]:
    yield "## Import as carry-over"
    yield (
        "In the study file of an experiment with the same `seed`, `base_model` and `questions`, "
        "give the arms `origin: carry_over`, and say where their checkpoints are. For "
        f"`{_COMMIT}`, put the full hash of the commit that you import: `persona-assets publish` "
        "printed it, and this repository's history has it."
    )
    yield carry_over(study, cells, _COMMIT)


def _reading(study: Study) -> Iterator[str]:
    assert study.publish.hub is not None, "there is no card without `publish.hub`"
    yield "## Reading it"
    yield (
        "`training_dataset/` has one Parquet file a cell. `warehouse.duckdb` is a DuckDB database "
        "with every outcome row, estimate and number of the report: `FROM study` tells what it is "
        f"of. The adapters are in {code(study.publish.hub.model)}."
    )


def _recipes(study: Study, cells: Iterable[Cell]) -> dict[TrainingRecipe, tuple[str, ...]]:
    """The recipes of ``cells``, each with its arms."""
    found: dict[TrainingRecipe, dict[str, None]] = {}
    for cell in cells:
        found.setdefault(study.recipe(cell), {})[cell.arm] = None
    return {recipe: tuple(arms) for recipe, arms in found.items()}


def _hashes(landed: Mapping[Ref, Manifest]) -> str:
    """What the files hold, by partition, and the base model that adapters are for."""
    rows = [(code(ref), code(manifest.data_version)) for ref, manifest in landed.items()]
    bases = {manifest.provenance.upstream.get("base_model") for manifest in landed.values()}
    rows += [(code("base_model"), code(version)) for version in sorted(bases - {None})]
    return _table(("partition", "data version (a SHA-256 of its content)"), rows)


def _software(manifests: Iterable[Manifest]) -> str:
    """The versions of the packages that the results depend on; several where they were mixed."""
    versions: dict[str, set[str]] = {}
    for manifest in manifests:
        for name, version in manifest.provenance.software.items():
            versions.setdefault(name, set()).add(version)
    return ", ".join(
        f"{code(name)} {listed(sorted(each))}" for name, each in sorted(versions.items())
    )


def _licence(study: Study) -> str:
    hub = study.publish.hub
    granted = (
        f"{code(hub.license)}, as the study file says."
        if hub and hub.license
        else "None is granted: the study file says none (`publish.hub.license`)."
    )
    return f"{granted} What base model and questions are under holds beside it."


def _codes(names: Iterable[str]) -> str:
    return listed([code(name) for name in names])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([inline(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(value: dict[str, Any]) -> str:
    return f"```yaml\n{_yaml(value)}```"


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
