"""The command line: make a study, see what has landed, ask where a number comes from."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from pathlib import Path

import click

from persona_assets import environment
from persona_assets.dagster_databases import DatabaseUnusable, check_databases
from persona_assets.disk import DiskError
from persona_assets.object_store import open_store
from persona_assets.reporting.words import visible
from persona_assets.store import Ref, StoreError
from persona_assets.study import Study, StudyError, load_study
from persona_assets.study_schema import KEY

_STAGES = ("training_dataset", "prior_checkpoint", "checkpoint", "cell_outcomes")
_MARKS = {"fresh": "✓", "stale": "stale", "failed": "FAILED", "missing": "·", None: ""}

study_option = click.option(
    "--study", default="mini", show_default=True, help="A file of data/studies, without .yaml."
)


class _Commands(click.Group):
    """Commands whose users' mistakes are told in a sentence, not in a traceback.

    What a sentence quotes may come from a model or a damaged file: no character of it acts.
    """

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (StoreError, DiskError, DatabaseUnusable, environment.FolderMissing) as error:
            raise click.ClickException(visible(str(error))) from error
        except click.ClickException as error:
            error.message = visible(error.message)
            raise


def _say(text: str) -> None:
    click.echo(visible(text))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="persona_assets")
def main() -> None:
    """A Dagster asset graph for persona fine-tuning experiments."""
    environment.prepare()
    for variable in (environment.ARC_DIR, environment.TOKENIZER_DIR, environment.PRIOR_DIR):
        environment.local_folder(variable)  # before any work: a folder that is not there


@main.command()
@study_option
@click.option("--cells", default="*", show_default=True, help="Glob over cell keys.")
@click.option(
    "--up-to",
    metavar="ASSET",
    help="Make this asset and what it is made from, no more: training_dataset needs no GPU.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    show_default="one a processor, at most 8; one where a GPU's model is needed",
    help="Resident worker processes.",
)
def run(study: str, cells: str, up_to: str | None, workers: int | None) -> None:
    """Make what is not up to date, each cell its own Dagster run."""
    from persona_assets import runner
    from persona_assets.run_lock import AlreadyRunning

    loaded = _load(study)
    try:
        workers = workers or runner.default_workers(loaded, up_to)
        outcomes = runner.run(study, cells, workers, up_to, say=_say)
    except (ValueError, AlreadyRunning) as error:
        raise click.ClickException(str(error)) from error
    bad = {unit: o for unit, o in outcomes.items() if o.status in ("failed", "skipped")}
    store = open_store(study)
    for asset, name in (("report", "report.html"), ("warehouse", "warehouse.duckdb")):
        if Ref(asset) in {ref for unit in outcomes for ref in unit.refs} and not bad:
            click.echo(f"{asset + ':':<10} {store.path(Ref(asset), name)}")
    if bad:
        failed = [str(unit) for unit, o in bad.items() if o.status == "failed"]
        click.echo(f"failed: {', '.join(failed)}; skipped: {len(bad) - len(failed)}", err=True)
        sys.exit(1)


@main.command()
@study_option
@click.option(
    "--why",
    metavar="CELL",
    help="Of one cell, stage by stage, why it is not up to date. Also ASSET or ASSET[KEY].",
)
def status(study: str, why: str | None) -> None:
    """Cells × stages: what is landed and up to date."""
    from persona_assets.freshness import Freshness
    from persona_assets.graph import Graph

    loaded = _load(study)
    graph = Graph(loaded)
    freshness = Freshness(graph, open_store(study)).read_ahead()
    if why is not None:
        _explain(graph, freshness, why)
        return
    stages = [stage for stage in _STAGES if stage in graph.assets]
    width = max(len(cell.key) for cell in loaded.cells)
    click.echo(" " * (width + 2) + "  ".join(stages))
    for cell in loaded.cells:
        marks = [_mark(graph, freshness, Ref(stage, cell.key)) for stage in stages]
        row = "  ".join(f"{mark:^{len(s)}}" for mark, s in zip(marks, stages, strict=True))
        click.echo(f"{cell.key:<{width}}  {row}".rstrip())
    click.echo()
    for name, asset in graph.assets.items():
        states = [freshness.state(ref) for ref in asset.refs()]
        counts = {state: states.count(state) for state in dict.fromkeys(states)}
        text = ", ".join(f"{count} {state}" for state, count in counts.items())
        click.echo(f"{name:<{width}}  {text}")


@main.command()
@study_option
def verify(study: str) -> None:
    """Read all files that have landed, and name those that are not as they landed.

    Nothing damaged is ever read for a result; this finds what nothing reads just now. What is
    named counts as missing, and `persona-assets run` makes it again.
    """
    from persona_assets.graph import Graph

    refs, store = Graph(_load(study)).refs, open_store(study)
    damaged = [what for ref in refs if (what := store.verify(ref))]
    for what in damaged:
        _say(what)
    click.echo(f"{len(damaged)} of {len(refs)} partitions are damaged")
    sys.exit(bool(damaged))


@main.command()
@study_option
@click.option("--to", type=click.Choice(["wandb", "hub"]), help="Only there.")
def publish(study: str, to: str | None) -> None:
    """Take what has landed to the places that the study file names under `publish`.

    Trains and evaluates nothing. Without a key in the environment (WANDB_API_KEY, HF_TOKEN) nothing
    is sent: what is for W&B is logged here, and sent when this is called with one.
    """
    from persona_assets import publisher
    from persona_assets.run_lock import AlreadyRunning

    _load(study)
    try:
        done = publisher.publish(study, to, say=_say)
    except (ValueError, AlreadyRunning) as error:
        raise click.ClickException(str(error)) from error
    for ref, where in done.commits.items():
        _say(f"{ref}: {where}")
    for why in dict.fromkeys(done.pending.values()):
        refs = [ref for ref, reason in done.pending.items() if reason == why]
        more = f" and {len(refs) - 3} more" if len(refs) > 3 else ""
        _say(f"pending: {', '.join(map(str, refs[:3]))}{more}: {why}")
    bad = [str(u) for u, o in done.outcomes.items() if o.status in ("failed", "skipped")]
    if bad:
        click.echo(f"failed: {', '.join(bad)}", err=True)
    sys.exit(bool(bad or done.late))


@main.command()
@study_option
@click.argument("query")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="Rows shown at most."
)
def sql(study: str, query: str, limit: int) -> None:
    """Run a read-only query on the study's warehouse and print the rows."""
    import duckdb

    from persona_assets.reporting.queries import open_warehouse
    from persona_assets.reporting.words import text_table

    with open_warehouse(_warehouse(study)) as db:
        try:
            result = db.execute(query)
            if result is None:
                raise click.ClickException('there is no query: try "FROM study"')
            names = [column[0] for column in result.description or ()]
            found = result.fetchmany(limit + 1)  # a row far down may be the first to fail
        except (duckdb.Error, ValueError, OverflowError) as error:  # or be none that Python has
            raise click.ClickException(str(error)) from error
    click.echo(text_table(names, found[:limit], exact=True))
    if len(found) > limit:
        click.echo(f"… the first {limit} rows; --limit shows more")


@main.command()
@study_option
@click.argument("number_id")
@click.option("--rows", is_flag=True, help="Show the question rows behind the number.")
@click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, help="Rows shown at most."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def trace(study: str, number_id: str, rows: bool, limit: int, as_json: bool) -> None:
    """Where a number of the report comes from, and whether it comes out again."""
    from persona_assets.reporting import trace as tracing
    from persona_assets.reporting.ledger import UnknownNumber

    path = _warehouse(study)
    try:
        found = tracing.trace(path, number_id)
    except UnknownNumber as error:
        raise click.ClickException(str(error)) from error
    shown = tracing.question_rows(path, found.number, limit) if rows else None
    if as_json:
        value = tracing.as_json(found) | ({"rows": shown} if rows else {})
        click.echo(json.dumps(value, indent=1, default=str))  # ASCII: nothing in it acts
    else:
        _say(tracing.as_text(found, shown))
    if not all(found.reproduced.values()):
        sys.exit(1)


@main.command()
@click.option("--port", default=3000, show_default=True, help="On the loopback interface.")
def ui(port: int) -> None:
    """Dagster's web interface and daemon for the studies of workspace.yaml."""
    from dagster import DagsterInstance

    from persona_assets.pools import open_pools

    check_databases()
    with DagsterInstance.get() as instance:
        for pool, limit in open_pools(instance).items():
            click.echo(f"pool {pool:<10} {limit} at once")
    workspace = Path(os.environ["DAGSTER_HOME"], "workspace.yaml")
    place = ("--workspace", str(workspace), "--host", "127.0.0.1", "--port", str(port))
    command = (sys.executable, "-m", "dagster", "dev", *place)
    sys.stdout.flush()
    os.execv(command[0], command)


@main.command()
@study_option
@click.option("--port", default=3001, show_default=True, help="On the loopback interface.")
def serve(study: str, port: int) -> None:
    """A resident vLLM engine, for the evaluations of many runs (evaluation.engine: vllm_server)."""
    from persona_assets.evaluation.hosts import NoEngine, identity, local_vllm
    from persona_assets.evaluation.server import EngineServer
    from persona_assets.gpus import NoFreeGpu

    loaded = _load(study)
    if loaded.evaluation.engine != "vllm_server":
        raise click.ClickException(
            f"study {study}: evaluation.engine is {loaded.evaluation.engine}, whose runs ask no "
            "server. Set it to vllm_server."
        )
    store = open_store(study)
    for asset in ("base_model", "tokenizer"):
        if store.manifest(Ref(asset)) is None:
            raise click.ClickException(
                f"study {study} has no {asset} yet: `persona-assets run --study {study} --up-to "
                f"{asset}` makes it"
            )
    folders = (store.directory(Ref("base_model")), store.directory(Ref("tokenizer")))
    try:
        with socket.create_server(("127.0.0.1", port)):
            pass  # taken? said before the engine's start, which takes minutes
        host = local_vllm(loaded, *folders)
        server = EngineServer(host, identity(loaded, *folders), environment.store_dir(), port)
    except (NoEngine, NoFreeGpu, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"study {study} is served at {server.url}; export {environment.ENGINE}={server.url}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.serve_forever()
    finally:
        server.shut_down()
    if server.failed:
        raise click.ClickException(f"the engine failed: {server.failed}")


def _warehouse(study: str) -> Path:
    """The study's warehouse.

    Raises:
        ClickException: it has not landed.
    """
    _load(study)
    store = open_store(study)
    if store.manifest(Ref("warehouse")) is None:
        raise click.ClickException(
            f"study {study} has no warehouse yet: `persona-assets run --study {study}` makes it"
        )
    return store.path(Ref("warehouse"), "warehouse.duckdb")


def _explain(graph, freshness, what: str) -> None:
    """Print state and reasons of the partitions that ``what`` names."""
    try:
        refs = graph.find(what)
    except KeyError as error:
        raise click.ClickException(error.args[0]) from error
    width = max(len(str(ref)) for ref in refs)
    for ref in refs:
        click.echo(f"{ref!s:<{width}}  {freshness.state(ref)}")
        for reason in freshness.reasons(ref):
            _say(f"    {reason}")


def _mark(graph, freshness, ref: Ref) -> str:
    return _MARKS[freshness.state(ref) if graph.assets[ref.asset].has(ref.key) else None]


def _load(name: str) -> Study:
    if not re.fullmatch(KEY, name):  # a path, say, which would lead the store elsewhere too
        raise click.ClickException(f"{name!r} is no study's name: it is a file's, without .yaml")
    try:
        return load_study(environment.study_file(name))
    except StudyError as error:
        known = ", ".join(environment.study_names())
        raise click.ClickException(f"{error}\nStudies here: {known}") from error
