"""Bits flipped and ends cut off in everything that is read, at seeded places.

Each must be noticed by a hash or a reader and named, or change nothing of what is made; and be
mended by making the partition again.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from click.testing import CliRunner

from persona_assets import environment
from persona_assets.assets import MAKERS
from persona_assets.assets.base import Task
from persona_assets.cli import main
from persona_assets.dagster_databases import DATABASES, DatabaseDamaged, check_databases
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.hashing import sha256_file
from persona_assets.questions.arc import ArcError
from persona_assets.store import Provenance, Ref, Store, StoreError
from persona_assets.study import StudyError, load_study
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.project import Project, make
from persona_assets_tests.questions.published import as_jsonl, published
from persona_assets_tests.reliability.bench import Bench, bench, lost
from persona_assets_tests.reliability.content import content_of
from persona_assets_tests.reliability.table import Row

_AGAIN = "making the partition again"
#: What the landed files are, by name and asset, for the rows of the table; the first that fits.
_WHAT: tuple[tuple[str, Callable[[str, str], bool]], ...] = (
    ("a Parquet table", lambda asset, name: name.endswith(".parquet")),
    ("an adapter's weights", lambda asset, name: name == "adapter_model.safetensors"),
    ("an adapter's configuration", lambda asset, name: name == "adapter_config.json"),
    ("the base model", lambda asset, name: asset == "base_model"),
    ("the tokenizer", lambda asset, name: asset == "tokenizer"),
    ("the warehouse", lambda asset, name: asset == "warehouse"),
    ("a training log, a figure or the report", lambda asset, name: True),
)


@dataclass(frozen=True)
class Extent:
    """How much is tried.

    Attributes:
        files: Flips and cuts of each kind of file of each asset, so many of each.
        manifests: Of the manifests of each asset.
        edges: Of the inputs of real functions, one for each way from asset to asset, at most.
        study, questions: Of the study file, and of the files of questions.
        databases: Of each database of Dagster's, and of the registry.
        healed: The assets of which a damaged partition is made again.
    """

    files: int = 10
    manifests: int = 10
    edges: int = 1000
    study: int = 100
    questions: int = 100
    databases: int = 8
    healed: Collection[str] = tuple(MAKERS)


def rows(folder: Path, seed: int) -> list[Row]:
    """All of it, on a tiny study that is made for it."""
    project = Project(folder / "data")
    make(project)
    return tried(project.data, folder / "work", seed, Extent())


def tried(data: Path, folder: Path, seed: int, extent: Extent) -> list[Row]:
    """Damage a copy of the complete study in ``data``; works in ``folder``."""
    rng = random.Random(seed)
    project = Project(data).copy(folder / "data")
    with bench(project.data) as on:
        before = on.landed()
        found = [
            *_files(on, data, extent.files, rng),
            _manifests(on, data, extent.manifests, rng),
            _edges(on, data, extent.edges, rng),
            _warehouse(on, data, extent.files, rng),
            _study(on, data, extent.study, rng),
        ]
        intact = Row("what was not damaged, after all that")
        intact.count(lost(before, on.landed()))
        found += [
            intact,
            _registry(on, data, extent.databases, rng),
            _databases(on, data, extent.databases, rng),
            _healed(on, extent.healed, rng),
        ]
    return [*found, _questions(folder / "arc", extent.questions, rng)]


def damage(path: Path, rng: random.Random, cut: bool) -> str:
    """Flip one to three bits of a file, or cut its end off; what was done, in words."""
    content = bytearray(path.read_bytes())
    if cut:
        size = rng.randrange(len(content))
        path.write_bytes(bytes(content[:size]))
        return f"{path.name} cut to {size} of {len(content)} bytes"
    places = {rng.randrange(len(content)) for _ in range(rng.randint(1, 3))}
    for at in places:
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))
    return f"{path.name} with bits flipped at {sorted(places)}"


def _restored(on: Bench, pristine: Path, path: Path) -> None:
    """Put a file of the data folder back as it was."""
    for aside in path.parent.glob(f".damaged-*-{path.name}"):
        aside.unlink()
    shutil.copyfile(pristine / path.relative_to(on.project.data), path)


def noticed(on: Bench, ref: Ref, path: Path) -> str | None:
    """Whether reading a partition names its damaged file, and counts it as missing from then on."""
    try:
        on.store.directory(ref)
    except StoreError as error:
        if str(path) not in str(error) or f"aterialize {ref} again" not in str(error):
            return f"the error does not name {path}: {error}"
        state = Freshness(on.graph, on.store).state(ref)
        return None if state == "missing" else f"{ref} is {state}, and not made again"
    return f"{path} was read"


def _landed_files(on: Bench) -> dict[tuple[str, str], list[tuple[Ref, str]]]:
    """Every landed file, by what it is and of which asset."""
    found: dict[tuple[str, str], list[tuple[Ref, str]]] = {}
    for ref in on.graph.refs:
        for name in on.store.landed(ref).files:
            what = next(what for what, fits in _WHAT if fits(ref.asset, name))
            found.setdefault((what, ref.asset), []).append((ref, name))
    return found


def _files(on: Bench, pristine: Path, times: int, rng: random.Random) -> list[Row]:
    found = {
        what: Row(f"{what}: bits flipped or cut off", recovered_by=_AGAIN) for what, _ in _WHAT
    }
    assets: dict[str, set[str]] = {}
    for (what, asset), files in _landed_files(on).items():
        assets.setdefault(what, set()).add(asset)
        for turn in range(2 * times):
            ref, name = rng.choice(files)
            path = on.store.path(ref, name)
            done = damage(path, rng, cut=turn % 2 == 0)
            problem = noticed(on, ref, path)
            found[what].count(problem and f"{ref}, {done}: {problem}")
            _restored(on, pristine, path)
    for what, row in found.items():
        n, row.recovered_by = len(assets[what]), _AGAIN
        row.seen = f"of {n} asset{'s' * (n > 1)}; named by size or hash, set aside"
    return list(found.values())


def _manifests(on: Bench, pristine: Path, times: int, rng: random.Random) -> Row:
    row = Row("a manifest: bits flipped or cut off", recovered_by=_AGAIN)
    for asset in on.graph.assets.values():
        for turn in range(2 * times):
            ref = rng.choice(asset.refs())
            path, was = on.store.folder(ref) / "manifest.json", on.store.landed(ref)
            done = damage(path, rng, cut=turn % 2 == 0)
            problem = None
            try:
                if on.store.manifest(ref) != was:
                    problem = "it was read, with other content"
            except StoreError as error:
                state = Freshness(on.graph, on.store).state(ref)
                if str(path) not in str(error) or state != "missing":
                    problem = f"{ref} is {state}: {error}"
            row.count(problem and f"{ref}, {done}: {problem}")
            _restored(on, pristine, path)
    row.seen = f"of {len(on.graph.assets)} assets; by the manifest's hash of itself"
    return row


def _edges(on: Bench, pristine: Path, most: int, rng: random.Random) -> Row:
    """For each way from asset to asset: the function of the lower one, on a damaged input.

    What it does not read changes nothing: then it must make what it made before.
    """
    row = Row("an input of a function that makes a partition, flipped", recovered_by=_AGAIN)
    pairs = [
        (asset, upstream)
        for asset in on.graph.assets
        for upstream in on.graph.upstream_assets(asset)
        if asset != "base_model"  # two minutes, where it does not read what is damaged
    ]
    refused = 0
    for asset, upstream in rng.sample(pairs, min(most, len(pairs))):
        refs = [
            ref
            for ref in on.graph.assets[asset].refs()
            if upstream in {above.asset for above in on.graph.upstream(ref)}
        ]
        ref = rng.choice(refs)
        above = rng.choice([r for r in on.graph.upstream(ref) if r.asset == upstream])
        name = rng.choice(sorted(on.store.landed(above).files))
        path = on.store.path(above, name)
        done = damage(path, rng, cut=False)
        problem = None
        try:
            if differing := _differing(on, ref):
                problem = f"made of it all the same, differing: {differing}"
        except StoreError as error:
            refused += 1
            if str(path) not in str(error):
                problem = f"the error does not name {path}: {error}"
        row.count(problem and f"{ref}, {above}: {done}: {problem}")
        _restored(on, pristine, path)
    row.seen = f"{refused} refused by name; the others read no such file, and made what they had"
    return row


def _differing(on: Bench, ref: Ref) -> list[str]:
    """Call the function that makes a partition; the files that are not what had landed."""
    manifest = on.store.landed(ref)
    landed = on.store.folder(ref) / manifest.version
    with tempfile.TemporaryDirectory() as draft:
        made = Path(draft)
        MAKERS[ref.asset](Task(on.graph, on.store, ref, made, manifest.provenance.run_id))
        return [
            name
            for name, entry in manifest.files.items()
            if not (
                content_of(made / name) == content_of(landed / name)
                if name.endswith(".duckdb")
                else sha256_file(made / name) == entry["sha256"]
            )
        ]


def _warehouse(on: Bench, pristine: Path, times: int, rng: random.Random) -> Row:
    row = Row("the warehouse, asked by `sql` and `trace`", recovered_by=_AGAIN)
    path = on.store.path(Ref("warehouse"), "warehouse.duckdb")
    for turn in range(2 * times):
        done = damage(path, rng, cut=turn % 2 == 0)
        command = rng.choice((["sql", "SELECT count(*) FROM outcomes"], ["trace", "count/cells"]))
        asked = CliRunner().invoke(main, [*command, "--study", "tiny"])
        told = " ".join(asked.output.split())
        named = asked.exit_code == 1 and told.startswith("Error:") and str(path) in told
        row.count(None if named else f"{done}: exit code {asked.exit_code}: {told[-300:]}")
        _restored(on, pristine, path)
    row.seen = "exit status 1, file and remedy in one sentence"
    return row


def _study(on: Bench, pristine: Path, times: int, rng: random.Random) -> Row:
    """A changed study is another one: either it cannot be read, or what it changes is stale."""
    row = Row("the study file: bits flipped or cut off", recovered_by="putting the file back")
    path = environment.study_file("tiny")
    counts = {"refused": 0, "alike": 0, "stale": 0}
    for turn in range(2 * times):
        done = damage(path, rng, cut=turn % 2 == 0)
        problem = None
        try:
            study = load_study(path)
        except StudyError as error:
            counts["refused"] += 1
            if str(path) not in str(error):
                problem = f"the error does not name {path}: {error}"
        else:
            changed = study.content_hash != on.study.content_hash
            freshness = Freshness(Graph(study), Store(environment.store_dir(), study.name))
            state = freshness.state(Ref("report"))
            counts["stale" if changed else "alike"] += 1
            if changed and state == "fresh":
                problem = "another study, and the report is up to date"
            elif changed and not freshness.reasons(Ref("report")):
                problem = "no reason is given why the report is stale"
            elif not changed and state != "fresh":
                problem = f"the same study, and the report is {state}"
        row.count(problem and f"{done}: {problem}")
        _restored(on, pristine, path)
    row.seen = (
        f"{counts['refused']} refused by name, {counts['stale']} another valid study: stale, the "
        f"change named; {counts['alike']} the same study (comments)"
    )
    return row


def _databases(on: Bench, pristine: Path, times: int, rng: random.Random) -> Row:
    """A run on damaged databases of Dagster's says so, or makes what it would have made."""
    row = Row(
        "Dagster's SQLite: bits flipped or cut off",
        recovered_by="moving the named file away, and the same run again",
    )
    named = 0
    for name in DATABASES:
        path = on.dagster / name
        for turn in range(2 * times):
            ref = rng.choice(on.graph.assets["training_dataset"].refs())
            content, before = on.content(ref), on.landed()
            on.remove(ref)
            done = damage(path, rng, cut=turn % 2 == 0)
            problems = []
            try:
                check_databases()
                under = on.make(ref)
            except DatabaseDamaged as error:
                under = None
                told = str(error)
            if under is not None and under.status == "failed":
                told = under.error
            if under is None or under.status == "failed":
                named += 1
                if str(path) not in told or "move it away" not in told:
                    problems.append(f"no clear error: {' '.join(told.split())[-600:]}")
                _moved_away(path)
            again = on.make(ref)
            if again.status == "failed":
                problems.append(f"not made afterwards: {again.error[-600:]}")
            elif on.content(ref) != content:
                problems.append("made with another content")
            elif not on.is_recorded(ref):
                problems.append("Dagster has no record of it")
            problems.append(lost(before, on.landed(), but=[ref]) or "")
            said = "; ".join(problem for problem in problems if problem)
            row.count(f"{name}, {done}: {said}" if said else None)
            _moved_away(path)
            shutil.copyfile(pristine / "dagster" / name, path)
    row.seen = f"{named} named; the others in text of old events, which no result is read from"
    return row


def _registry(on: Bench, pristine: Path, times: int, rng: random.Random) -> Row:
    """A checkpoint is carried over from a damaged registry: it is published anew, or told."""
    row = Row(
        "the registry of carried-over adapters", recovered_by="publishing again, from the store"
    )
    named = 0
    root = on.project.data / "registry" / "tiny"
    for turn in range(2 * times):
        ref = Ref("checkpoint", rng.choice(on.study.cells_of("carry_over")).key)
        content = on.content(ref)
        adapter = sorted((root / content).iterdir())
        path = root / "lock.json" if turn % 2 else rng.choice(adapter)
        on.remove(ref)
        done = damage(path, rng, cut=turn % 4 < 2)
        made = on.make(ref)
        problem = None
        if made.status == "failed":
            named += 1
            if str(path) not in made.error or "Delete it" not in made.error:
                problem = f"the error does not name {path}: {made.error[-300:]}"
            path.unlink()
            made = on.make(ref)
        if made.status == "failed":
            problem = f"not made afterwards: {made.error[-300:]}"
        elif on.content(ref) != content:
            problem = "made with another content"
        row.count(problem and f"{ref}, {done}: {problem}")
        _restored(on, pristine, path)
    row.seen = f"{named} times the lock file named; the others healed in the same run"
    return row


def _moved_away(database: Path) -> None:
    for path in database.parent.glob(f"{database.name}*"):
        path.unlink()


def _healed(on: Bench, assets: Iterable[str], rng: random.Random) -> Row:
    """A file of a partition of each asset is damaged; all are found, and made again."""
    row = Row("one partition of each asset damaged at once", recovered_by="`verify`, then `run`")
    refs = [rng.choice(on.graph.assets[name].refs()) for name in on.graph.assets if name in assets]
    before = {ref: on.content(ref) for ref in refs}
    for ref in refs:
        damage(on.store.path(ref, rng.choice(sorted(on.store.landed(ref).files))), rng, cut=False)
    told = CliRunner().invoke(main, ["verify", "--study", "tiny"])
    found = told.output.rstrip().endswith(
        f"{len(refs)} of {len(on.graph.refs)} partitions are damaged"
    )
    row.count(None if found and told.exit_code == 1 else told.output[-600:])
    for ref in on.graph.refs:  # upstream first; a warehouse of other bytes has another report
        if on.project.states()[ref] == "fresh":
            continue
        outcome = on.make(ref)
        problem = outcome.error or on.store.verify(ref)
        if not problem and ref in before and on.content(ref) != before[ref]:
            problem = "other content"
        row.count(f"{ref}: {problem}" if problem else None)
    stale = [str(ref) for ref, state in on.project.states().items() if state != "fresh"]
    row.count(f"not up to date: {stale}" if stale else None)
    row.seen = f"{len(refs)} partitions, the same content again"
    return row


def _questions(folder: Path, times: int, rng: random.Random) -> Row:
    """Files of ARC questions that are damaged: refused by name, or another bank, which says so."""
    row = Row("a file of questions: bits flipped or cut off", recovered_by="putting the file back")
    arc = folder / "arc"
    arc.mkdir(parents=True)
    study = load_study(PROJECT / "data" / "studies" / "length_matched.yaml")
    graph, store, bank = Graph(study), Store(folder / "store", study.name), Ref("question_bank")
    good = {}
    for at, name in enumerate(environment.ARC_FILES):
        asked = [
            published(f"q{at}{i}", f"What is {i} and {at}?", [f"{i}", f"{at}x", "3y"], "ABC"[i % 3])
            for i in range(40)
        ]
        good[arc / name] = as_jsonl(asked)
    refused = 0
    with patch.dict(os.environ, {environment.ARC_DIR: str(arc)}):
        for path, content in good.items():
            path.write_bytes(content)
        with store.draft(bank) as draft:
            MAKERS[bank.asset](Task(graph, store, bank, draft, "run"))
            made_from = Provenance("run", Freshness(graph, store).inputs(bank), study.content_hash)
            was = store.land(bank, draft, provenance=made_from)
        for turn in range(2 * times):
            path = rng.choice(list(good))
            done = damage(path, rng, cut=turn % 2 == 0)
            freshness, problem = Freshness(graph, store), None
            if freshness.state(bank) != "stale" or path.name not in freshness.why(bank):
                problem = f"not noticed: {freshness.why(bank)}"
            try:
                with tempfile.TemporaryDirectory() as draft:
                    made = MAKERS[bank.asset](Task(graph, store, bank, Path(draft), "run"))
                    if made.summary["files"][path.name] != sha256_file(path):
                        problem = "made of other bytes than it says"
            except ArcError as error:
                refused += 1
                if str(path) not in str(error):
                    problem = f"the error does not name {path}: {error}"
            row.count(problem and f"{done}: {problem}")
            path.write_bytes(good[path])
        row.count(None if Freshness(graph, store).state(bank) == "fresh" else "not fresh again")
        row.count(None if store.landed(bank) == was else "the bank that had landed is another")
    row.seen = f"{refused} refused by name; the bank is stale each time, the file named"
    return row
