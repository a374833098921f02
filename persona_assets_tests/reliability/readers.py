"""What reads input that others wrote, and how each is given one: the material of ``fuzz``."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import click

from persona_assets_tests.reliability import inputs

PROJECT = Path(__file__).resolve().parents[2]
_CANARY = "canary-7f3a-outside-the-warehouse"


class Escape(Exception):
    """Something got out: a path, a write, or what lies outside."""


Use = Callable[[random.Random], bool]


@dataclass(frozen=True)
class Reader:
    """Something that reads input.

    Attributes:
        what: What it is given, in words.
        opened: A context that gives, in a folder of its own, the function that makes one input
            and has it read: True if it was taken, False if it was refused as documented.
        share: How many of a million inputs it is given.
    """

    what: str
    opened: Callable[[Path], AbstractContextManager[Use]]
    share: int


@contextmanager
def study_files(folder: Path) -> Iterator[Use]:
    from persona_assets.study import StudyError, load_study

    texts = [p.read_text("utf-8") for p in sorted((PROJECT / "data" / "studies").glob("*.yaml"))]
    short = "a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a}\nseeds: [1, 2]\nname: mini\n"
    path = folder / "mini.yaml"

    def use(rng: random.Random) -> bool:
        kind = rng.random()  # the real ones take 10 ms each, refused or not
        text = rng.choice(texts) if kind < 0.2 else short if kind < 0.7 else inputs.text(rng)
        path.write_bytes(inputs.damaged(text, rng).encode("utf-8", "surrogatepass"))
        try:
            study = load_study(path)
        except StudyError as error:
            if not error.problems or str(path) not in str(error) or len(str(error)) > 20_000:
                raise Escape("names no file, no field, or says far too much") from error
            return False
        return bool(study.cells) and bool(study.content_hash)

    yield use


@contextmanager
def arc_rows(folder: Path) -> Iterator[Use]:
    from persona_assets.questions.arc import ArcError, read_arc

    path = folder / "arc.jsonl"
    choices = {"text": ["heat", "cold", "dark"], "label": ["A", "B", "C"]}
    good = {"id": "Q1", "question": "What melts ice?", "choices": choices, "answerKey": "A"}

    def use(rng: random.Random) -> bool:
        rows = [inputs.json_text({**good, "id": f"Q{i}"}, rng) for i in range(rng.randint(1, 2))]
        path.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
        try:
            return bool(read_arc(path, "train"))
        except ArcError as error:
            return _named(error, path)

    yield use


@contextmanager
def arc_parquet(folder: Path) -> Iterator[Use]:
    import polars as pl

    from persona_assets.questions.arc import ArcError, read_arc

    path, kept = folder / "arc.parquet", []
    for compression in ("zstd", "snappy", "uncompressed"):
        frame = pl.DataFrame(
            {
                "id": [f"Q{i}" for i in range(30)],
                "question": [f"What melts {i}?" for i in range(30)],
                "choices": [{"text": ["heat", "cold"], "label": ["A", "B"]}] * 30,
                "answerKey": ["A", "B"] * 15,
            }
        )
        frame.write_parquet(buffer := BytesIO(), compression=compression)
        kept.append(buffer.getvalue())

    def use(rng: random.Random) -> bool:
        path.write_bytes(inputs.flipped(rng.choice(kept), rng))
        try:
            return bool(read_arc(path, "train"))
        except ArcError as error:
            return _named(error, path)

    yield use


@contextmanager
def prior_tables(folder: Path) -> Iterator[Use]:
    from persona_assets.evaluation.drift import PriorTableError, read_prior_table

    path, key = folder / "earlier.json", inputs.PRIOR_KEY
    table = {key: 0.5, key.replace("no-cot", "generic-cot"): 1, key.replace("42", "7"): 0.25}
    good = {"accuracy_table": table, "baseline_metadata": {"n_questions": 4}}

    def use(rng: random.Random) -> bool:
        path.write_bytes(inputs.json_text(good, rng).encode("utf-8", "surrogatepass"))
        try:
            return not read_prior_table(path).is_empty()
        except PriorTableError as error:
            return _named(error, path)

    yield use


@contextmanager
def names(folder: Path) -> Iterator[Use]:
    """``--study``, ``--why``, ``--cells``, and the store's own folders."""
    from persona_assets import cli, environment
    from persona_assets.graph import Graph
    from persona_assets.store import Ref, Store, StoreError
    from persona_assets.study import load_study

    graph = Graph(load_study(PROJECT / "data" / "studies" / "mini.yaml"))
    store, root = Store(folder, "mini"), os.path.realpath(folder / "mini")
    refs = [str(ref) for ref in graph.refs]
    keys = [cell.key for cell in graph.study.cells]
    find = lru_cache(Graph.find)  # most of its work is to name the nearest

    def use(rng: random.Random) -> bool:
        name = inputs.pick(rng, refs if rng.random() < 0.5 else keys)
        match rng.randrange(40):
            case 0:
                try:
                    return bool(find(graph, name))
                except KeyError:
                    return False
            case 1:
                return any(fnmatch.fnmatchcase(key, name) for key in keys)
            case 2:
                try:
                    return bool(cli._load(inputs.pick(rng, environment.study_names())))
                except click.ClickException:
                    return False
        asset, _, key = name.partition("[")
        ref = Ref(asset, key.removesuffix("]") or None)
        try:
            place = os.path.realpath(store.folder(ref))
        except StoreError:
            return False
        if not place.startswith(f"{root}{os.sep}"):
            raise Escape(place)
        return store.manifest(ref) is None

    yield use


@contextmanager
def manifests(folder: Path) -> Iterator[Use]:
    from persona_assets.store import Provenance, Ref, Store, StoreError

    store, ref = Store(folder / "store", "mini"), Ref("checkpoint", "a.b.1")
    outside = folder / "outside"
    outside.write_text(_CANARY)
    with store.draft(ref) as draft:
        (draft / "x").write_text("content")
        inputs_of = {"upstream": {}, "code_version": "1"}
        store.land(ref, draft, provenance=Provenance("r", inputs_of, "h", {}), summary={"n": 1})
    path = store.folder(ref) / "manifest.json"
    good = json.loads(path.read_text())

    def use(rng: random.Random) -> bool:
        path.write_bytes(inputs.json_text(good, rng).encode("utf-8", "surrogatepass"))
        try:
            manifest = store.manifest(ref)
            store.damage(manifest)
            found = store.directory(ref)
        except StoreError:
            for aside in path.parent.rglob(".damaged-*"):  # what it was is known to be whole
                aside.rename(aside.parent / "x")
            return False
        finally:
            if outside.read_text() != _CANARY:
                raise Escape("a file outside the store was touched")
        return found.is_relative_to(store.folder(ref))

    yield use


@contextmanager
def number_ids(folder: Path) -> Iterator[Use]:
    from persona_assets.reporting.ledger import UnknownNumber
    from persona_assets.reporting.trace import trace

    path = _warehouse(folder)
    ids = [f"contrast/{i}/question" for i in range(9)] + ["count/cells", "count/outcomes"]

    def use(rng: random.Random) -> bool:
        try:
            return bool(trace(path, inputs.pick(rng, ids)).reproduced)
        except UnknownNumber:
            return False

    yield use


@contextmanager
def queries(folder: Path) -> Iterator[Use]:
    """What ``persona-assets sql`` hands to DuckDB, and how it tells of failure."""
    import duckdb

    from persona_assets.reporting.queries import open_warehouse
    from persona_assets.reporting.words import text_table, visible

    path = _warehouse(folder)
    room = folder / "room"
    room.mkdir()
    secret, target = room / "secret.csv", room / "target"
    secret.write_text(f"a\n{_CANARY}\n")
    before = hashlib.sha256(path.read_bytes()).digest()

    def seen() -> set[str]:
        return {str(p) for p in folder.rglob("*")}

    places, count = seen(), Counter[str]()
    with open_warehouse(path) as db:

        def use(rng: random.Random) -> bool:
            count["queries"] += 1
            result = None
            try:
                result = db.cursor().execute(inputs.sql(rng, str(secret), str(target)))
                columns = [column[0] for column in result.description or ()] if result else []
                rows = result.fetchmany(50) if result else []
                shown = text_table(columns, rows, exact=True)
            except (duckdb.Error, ValueError, OverflowError) as error:
                result, shown = None, visible(str(error))
            if _CANARY in shown:
                raise Escape("a file was read through SQL")
            if "\x1b" in shown or "\u202e" in shown:
                raise Escape(f"acts on a terminal: {shown!r}")
            if count["queries"] % 20 == 0 and (more := seen() - places):
                raise Escape(f"written through SQL: {sorted(more)}")
            return result is not None

        yield use
    if seen() - places or hashlib.sha256(path.read_bytes()).digest() != before:
        raise Escape("written through SQL")


@contextmanager
def headers(folder: Path) -> Iterator[Use]:
    from persona_assets.training.headers import CheckpointError, read_header, read_index

    path = folder / "model.safetensors"
    index = {"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}

    def use(rng: random.Random) -> bool:
        try:
            if rng.random() < 0.2:
                path.write_bytes(inputs.json_text(index, rng).encode("utf-8", "surrogatepass"))
                return all("/" not in name for name in read_index(path))
            path.write_bytes(inputs.safetensors(rng))
            return isinstance(read_header(path), dict)
        except CheckpointError as error:
            return _named(error, path)

    yield use


@contextmanager
def adapter_configurations(folder: Path) -> Iterator[Use]:
    from persona_assets.training.checkpoints import check_adapter
    from persona_assets.training.headers import CheckpointError

    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    good |= {"use_rslora": True, "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0}
    path = folder / "adapter_config.json"
    stem = "base_model.model.q_proj.lora_"
    tensors = {
        f"{stem}A.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
        f"{stem}B.weight": {"dtype": "F32", "shape": [8, 4], "data_offsets": [128, 256]},
    }
    head = json.dumps(tensors).encode()
    weights = len(head).to_bytes(8, "little") + head + bytes(256)
    (folder / "adapter_model.safetensors").write_bytes(weights)

    def use(rng: random.Random) -> bool:
        path.write_bytes(inputs.json_text(good, rng).encode("utf-8", "surrogatepass"))
        try:
            return bool(check_adapter(folder, {"q_proj": (8, 8)}))
        except CheckpointError as error:
            return _named(error, folder)

    yield use


@contextmanager
def chat_replies(_: Path) -> Iterator[Use]:
    from persona_assets.rationales.chat_api import _usage
    from persona_assets.rationales.chat_prompts import is_completion, read_reply

    message = {"role": "assistant", "content": "It is wet, so (B).", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    good = {"id": "c", "choices": [choice], "usage": {"prompt_tokens": 2, "completion_tokens": 5}}

    def use(rng: random.Random) -> bool:
        body = inputs.json_text(good, rng)
        is_completion(body)
        _usage(body)
        read = read_reply(body, rng.choice("ABCDE"))
        if read.problem is None and not (read.text and read.text.isprintable()):
            raise Escape(f"taken as a rationale: {read.text!r}")
        return read.problem is None

    yield use


READERS = {
    "study files": Reader("YAML of a study file", study_files, 60_000),
    "ARC rows": Reader("JSON lines of questions", arc_rows, 250_000),
    "ARC Parquet": Reader("Parquet files of questions", arc_parquet, 40_000),
    "prior tables": Reader("aggregate tables of the earlier experiment", prior_tables, 150_000),
    "names": Reader("study names, partition keys, refs and globs", names, 200_000),
    "manifests": Reader("manifests in the store", manifests, 60_000),
    "number ids": Reader("number ids given to `trace`", number_ids, 3_000),
    "SQL": Reader("queries given to `sql`", queries, 40_000),
    "headers": Reader("safetensors headers and indexes", headers, 160_000),
    "adapters": Reader("adapter configurations", adapter_configurations, 20_000),
    "chat replies": Reader("replies of a chat API", chat_replies, 80_000),
}


def _named(error: Exception, path: Path) -> bool:
    """That an error names the file: the input was refused as documented."""
    if str(path) not in str(error):
        raise Escape(f"names no file: {error}") from error
    return False


def _warehouse(folder: Path) -> Path:
    """A small warehouse of made-up rows; one a process."""
    target = folder / "w.duckdb"
    target.write_bytes(_made_warehouse())
    return target


@lru_cache(1)
def _made_warehouse() -> bytes:
    from persona_assets_tests.synthetic import bank, land, small_study

    with tempfile.TemporaryDirectory() as folder:
        landed = land(Path(folder), small_study(), bank(12), rationale="\x1b[31mred\u202e(A)")
        landed.build(Path(folder) / "w.duckdb")
        return (Path(folder) / "w.duckdb").read_bytes()
