"""A study of 500 cells before webserver and daemon: their memory, and how long one waits.

A part of the cells is made by ``persona-assets run`` and by the daemon, in a backfill of runs like
any others. The rest would take an hour, so they land as copies: the files of the cell of the same
source and arm, from the inputs of their own, each materialization reported to Dagster. Contrasts,
warehouse and report the daemon makes by itself as soon as everything is there.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import dagster as dg
import polars as pl
import yaml

from persona_assets.asset_table import JOBS
from persona_assets.environment import partition_page
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.store import Manifest, Ref, Store
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.browser import CHROMEDRIVER, CHROMIUM, Browser
from persona_assets_tests.integration.project import Project
from persona_assets_tests.integration.webserver import Webserver, backfill
from persona_assets_tests.reliability.memory import Memory
from persona_assets_tests.reliability.table import Row

SOURCES = ("software_engineer", "librarian", "comedian", "police_officer", "villain")
ARMS = ("garbage_cot", "scrambled_english_cot", "contradicting_cot", "generic_cot", "persona_cot")
N_SEEDS = 20
CHAIN = JOBS["cell"].assets
#: Seconds that a page and a command may take, and how often each is looked at.
PAGE_SECONDS, STATUS_SECONDS, LOOKS = 2.0, 3.0, 10


def rows(folder: Path, seed: int) -> list[Row]:
    """Make the study, then look at it."""
    if not (CHROMIUM and CHROMEDRIVER):
        raise RuntimeError("needs Debian's packages chromium and chromium-driver on the PATH")
    project = Project(folder / "data", "long")
    (project.data / "studies").mkdir(parents=True, exist_ok=True)
    (project.data / "studies" / "long.yaml").write_text(study_text(seed), "utf-8")
    cells, (first, second, *_) = project.study.cells, project.study.seeds
    done = project.run("run", "--study", "long", "--cells", f"*.{first}", timeout=3600)
    if done.returncode:
        raise RuntimeError(f"the cells were not made:\n{done.stdout[-4000:]}{done.stderr}")
    with Webserver(project) as server:
        with Memory(server.process.pid) as memory:
            made = backfilled(project, server, [c.key for c in cells if c.seed == second])
            spread(project, first)
            made.count(report_problem(project, 3600))
            time.sleep(60)
            seen = pages(project, server.port, folder / "profile", random.Random(seed))
        during = f"while a study of {len(cells)} cells is made"
        return [made, *memory.rows(during), *seen, status(project)]


def study_text(seed: int) -> str:
    """A study file of 500 cells, as small as they can be; ``seed`` draws those of the cells."""
    raw = yaml.safe_load((PROJECT / "data" / "studies" / "mini.yaml").read_text("utf-8"))
    del raw["carry_over"]
    raw["questions"] |= {"n_entities": 8, "n_eval": 8}
    raw["inference"] |= {"scaffold": "no_cot", "resamples": 999}
    return yaml.safe_dump(
        raw
        | {
            "name": "long",
            "personas": {name: raw["personas"][name] for name in (*SOURCES, "assistant")},
            "sources": list(SOURCES),
            "seeds": random.Random(seed).sample(range(2**31), N_SEEDS),
            "arms": {arm: {"origin": "trained"} for arm in ARMS},
            "scaffolds": ["no_cot"],
        },
        sort_keys=False,
    )


def backfilled(project: Project, server: Webserver, keys: list[str]) -> Row:
    """Cells made by the daemon in one backfill: whether each has landed."""
    runs = backfill(server, CHAIN, keys, seconds=7200)
    row = Row(
        f"a backfill of {len(keys)} of the {len(project.study.cells)} cells by the daemon, which "
        "then makes contrasts, warehouse and report of all of them by itself",
        recovered_by="nothing to recover: all has landed",
    )
    freshness = Freshness(project.graph, project.store)
    for key in keys:
        states = {freshness.state(Ref(asset, key)) for asset in CHAIN}
        run_id, status = runs.get(key, ("none", "missing"))
        whole = states == {"fresh"} and status == "SUCCESS"
        row.count(None if whole else f"{key} is {', '.join(states)}, run {run_id} {status}")
    return row


def spread(project: Project, seed: int) -> None:
    """Land what is missing of all cells as copies of the cells of ``seed``."""
    graph, store = project.graph, project.store
    missing = [
        Ref(asset, cell.key)
        for cell in graph.study.cells
        for asset in CHAIN
        if store.manifest(Ref(asset, cell.key)) is None
    ]
    home = project.environment | {"DAGSTER_HOME": str(project.data)}
    with patch.dict(os.environ, home), dg.DagsterInstance.get() as instance:
        for ref in missing:
            version = copied(graph, store, ref, seed).data_version
            event = dg.AssetMaterialization(
                [graph.study.name, ref.asset],
                partition=ref.key,
                metadata={"data_version": version},
                tags={"dagster/data_version": version},
            )
            instance.report_runless_asset_event(event)


def copied(graph: Graph, store: Store, ref: Ref, seed: int) -> Manifest:
    """Land a cell's partition with the files of the cell of the same condition and that seed."""
    cell = graph.study.cell(str(ref.key))
    model = store.landed(Ref(ref.asset, f"{cell.condition}.{seed}"))
    own = {"cell": cell.key, "seed": cell.seed}
    with store.draft(ref) as draft:
        for name in model.files:
            path = store.path(model.ref, name)
            if path.suffix != ".parquet":
                (draft / name).write_bytes(path.read_bytes())
                continue
            frame = pl.read_parquet(path)
            columns = [
                pl.lit(value, frame.schema[column]).alias(column)
                for column, value in own.items()
                if column in frame.columns
            ]
            frame.with_columns(columns).write_parquet(draft / name)
        return store.land(
            ref,
            draft,
            provenance=replace(model.provenance, inputs=Freshness(graph, store).inputs(ref)),
            audits=model.audits,
            summary=model.summary,
            data_version=model.data_version if ref.asset == "checkpoint" else None,
        )


def report_problem(project: Project, seconds: float) -> str | None:
    """Wait until everything is up to date; what is not, if that takes longer."""
    deadline = time.monotonic() + seconds
    while wanting := [ref for ref, state in project.states().items() if state != "fresh"]:
        if time.monotonic() > deadline:
            return f"after {seconds:g} s {len(wanting)} partitions are not up to date: {wanting[0]}"
        time.sleep(15)
    return None


def pages(project: Project, port: int, profile: Path, rng: random.Random) -> list[Row]:
    """How long a browser takes to show an asset's partitions, and one of them.

    The browser has been there before: the interface's own code is in its cache.
    """
    study, base = project.study, f"http://127.0.0.1:{port}"
    whole = f"Materialized ({len(study.cells)})"
    browser = Browser(profile, profile.parent / "shots")

    def showing(address: str, *texts: str) -> Callable[[], str | None]:
        return lambda: _missing(browser, address, texts)

    def partitions() -> Callable[[], str | None]:
        address = partition_page(study.name, rng.choice(CHAIN), base=base)
        return showing(f"{address}?view=partitions", whole, study.cells[0].key)

    def partition() -> Callable[[], str | None]:
        ref = Ref(rng.choice(CHAIN), rng.choice(study.cells).key)
        address = partition_page(study.name, ref.asset, ref.key, base)
        return showing(address, whole, project.store.landed(ref).data_version)

    try:
        partitions()()
        n = f"of {len(study.cells)} opened in a browser"
        return [
            timed(f"an asset's page of partitions {n}", PAGE_SECONDS, partitions),
            timed(f"the page of one partition {n}", PAGE_SECONDS, partition),
        ]
    finally:
        browser.quit()


def _missing(browser: Browser, address: str, texts: tuple[str, ...]) -> str | None:
    """Open a page and wait until it shows all ``texts``; those that it does not in 60 s."""
    deadline = time.monotonic() + 60
    browser.open(address)
    while missing := [text for text in texts if text not in browser.text()]:
        if time.monotonic() > deadline:
            return f"{address} does not show {', '.join(missing)}"
        time.sleep(0.02)
    return None


def status(project: Project) -> Row:
    """How long ``persona-assets status`` takes, a new process each time."""
    says = ["cell_outcomes", str(len(project.study.cells)), "fresh"]

    def told() -> str | None:
        done = project.run("status", "--study", project.name)
        lines = [line.split() for line in done.stdout.splitlines()]
        return None if says in lines else f"status says {done.stdout[-500:]}{done.stderr}"

    what = f"`persona-assets status` of {len(project.study.cells)} cells"
    return timed(what, STATUS_SECONDS, lambda: told)


def timed(what: str, limit: float, prepare: Callable[[], Callable[[], str | None]]) -> Row:
    """Do something :data:`LOOKS` times; what took longer than ``limit`` seconds, or went wrong.

    Args:
        prepare: Returns what is timed, which returns what is wrong, or None.
    """
    row, taken = Row(f"{what}, within {limit:g} s", recovered_by="nothing to recover"), []
    for _ in range(LOOKS):
        use = prepare()
        began = time.monotonic()
        problem = use()
        taken.append(time.monotonic() - began)
        row.count(problem or (f"took {taken[-1]:.1f} s" if taken[-1] > limit else None))
    row.seen = (
        f"{statistics.median(taken):.2f} s in the median, {max(taken):.2f} s at most, with "
        f"{os.getloadavg()[0]:.1f} processes at work"
    )
    return row
