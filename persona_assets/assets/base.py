"""From a row of the graph table and a function that makes a partition to a Dagster asset."""

import importlib.metadata
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
from dagster._core.storage.tags import RETRY_ON_ASSET_OR_OP_FAILURE_TAG
from pydantic import Field

from persona_assets.asset_row import Asset
from persona_assets.assets.metadata import definition_metadata, lineage_links, table_metadata
from persona_assets.audit import Audit
from persona_assets.checks import check_results, check_specs
from persona_assets.environment import PROCESS_TAG, WORKER_TAG, process_name
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.launcher import was_launched
from persona_assets.partitions import dependency, partitions_definition
from persona_assets.pools import pool_of
from persona_assets.publishing.hub_content import KINDS
from persona_assets.release import release_read
from persona_assets.store import Manifest, Provenance, Ref, Store
from persona_assets.study import Cell, Study
from persona_assets.unavailable import Unavailable

#: Seconds before each further try where a service was unavailable, less a random quarter.
RETRY_WAITS = (15.0, 60.0, 240.0)

#: Packages whose versions can change results; recorded with every partition.
_SOFTWARE = ("persona_assets", "torch", "transformers", "tokenizers", "peft", "polars", "numpy")


@dataclass(frozen=True)
class Task:
    """One partition being made: what its function may use.

    Attributes:
        ref: The partition.
        draft: The folder to write its files into; they land when the function has returned.
        run_id: The Dagster run's id.
    """

    graph: Graph
    store: Store
    ref: Ref
    draft: Path
    run_id: str

    @property
    def study(self) -> Study:
        """The study."""
        return self.graph.study

    @property
    def code_version(self) -> str:
        """The code version of the asset that is being made."""
        return self.graph.assets[self.ref.asset].code_version

    @property
    def key(self) -> str:
        """The partition key."""
        assert self.ref.key is not None, f"{self.ref.asset} is not partitioned"
        return self.ref.key

    @property
    def cell(self) -> Cell:
        """The cell that the partition key names."""
        return self.study.cell(self.key)

    def frame(self, asset: str, key: str | None = None, columns=None) -> pl.DataFrame:
        """An upstream partition's table."""
        return self.store.frame(Ref(asset, key), columns)

    def directory(self, asset: str, key: str | None = None) -> Path:
        """The folder of an upstream partition's files."""
        return self.store.directory(Ref(asset, key))

    def manifest(self, asset: str, key: str | None = None) -> Manifest:
        """An upstream partition's manifest."""
        return self.store.landed(Ref(asset, key))

    def write(self, frame: pl.DataFrame, name: str) -> None:
        """Write a table into the draft as ``<name>.parquet``."""
        frame.write_parquet(self.draft / f"{name}.parquet", compression="zstd", statistics=True)


@dataclass(frozen=True)
class Made:
    """What a partition's function has to say besides the files it wrote.

    Attributes:
        audits: What the checks found.
        summary: Values kept in the manifest and shown in the UI (JSON-representable).
        metadata: Further Dagster metadata (previews, plots), for the UI only.
        data_version: Content hash, where the files' bytes say more than the content.
        warnings: What is amiss without failing it, for Dagster's log.
    """

    audits: Sequence[Audit] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    data_version: str | None = None
    warnings: Sequence[str] = ()


class UpstreamNotReady(dg.Failure):
    """A partition's upstream is missing, stale or failed its checks.

    Names what to materialize first: the roots of what is not fresh, not merely what is next to
    the partition.
    """

    def __init__(self, ref: Ref, blockers: Mapping[Ref, str]):
        shown = "\n".join(f"  - {why}" for why in list(blockers.values())[:10])
        more = f"\n  - and {len(blockers) - 10} more" if len(blockers) > 10 else ""
        first = next(iter(blockers))
        where = f"partition {first.key} of {first.asset}" if first.key else first.asset
        super().__init__(
            f"{ref} cannot be made yet:\n{shown}{more}\nMaterialize {where} first.",
            allow_retries=False,
        )


class HowToMake(dg.Config):
    """The run config of every asset, as the launchpad shows it."""

    force: bool = Field(
        default=False,
        description="Make the partition again although it has landed and is up to date. By default "
        "it is then kept, at no cost, and its checks and metadata are reported as they were. What "
        "is missing, stale, damaged or failed a blocking check is made in either case.",
    )


Maker = Callable[[Task], Made]


def build_asset(graph: Graph, asset: Asset, make: Maker, store: Store) -> dg.AssetsDefinition:
    """The Dagster asset for one row of the graph table.

    Its function refuses upstream partitions that are missing, stale or failed (a blocking check
    of Dagster's binds within one run only), calls ``make``, lands what it wrote, and reports
    data version, metadata and check results.
    """
    study = graph.study
    key = dg.AssetKey([study.name, asset.name])
    partitions = partitions_definition(asset)

    @dg.asset(
        key=key,
        deps=[dependency(graph, asset, upstream) for upstream in graph.upstream_assets(asset.name)],
        partitions_def=partitions,
        group_name=asset.group,
        description=asset.description,
        code_version=asset.code_version,
        kinds=set(asset.kinds),
        owners=["team:persona-assets"],
        metadata=definition_metadata(make),
        check_specs=check_specs(asset.name, key, partitions),
        tags=_tags(study, asset),
        pool=pool_of(asset.name, study),
        op_tags={"study": study.name},
    )
    def compute(context: dg.AssetExecutionContext, config: HowToMake) -> dg.MaterializeResult:
        ref = Ref(asset.name, context.partition_key if partitions else None)
        if not (was_launched(context.run) or WORKER_TAG in context.run.tags):
            context.instance.add_run_tags(context.run_id, {PROCESS_TAG: process_name()})

        def on_wait() -> None:
            context.log.warning(f"{ref} is being made by another process: waiting for that one")

        try:
            with store.turn(ref, on_wait):
                return _materialize(graph, store, ref, make, context, config)
        except Unavailable as error:  # nothing else: a retry policy would try bad input again, too
            if context.retry_number == len(RETRY_WAITS):
                _let_stand(context)
            raise _try_again(error, context.retry_number) from error
        except Exception:
            _let_stand(context)
            raise

    return compute


def _let_stand(context: dg.AssetExecutionContext) -> None:
    """Keep Dagster from starting the run again: what the asset itself says of its input stays so.

    ``dagster.yaml`` has runs started again whose step failed, for a step also fails where a
    statement was cut off in the middle by a restart of Dagster's database.
    """
    with suppress(Exception):  # if not even that can be written, the asset's own error is told
        context.instance.add_run_tags(context.run_id, {RETRY_ON_ASSET_OR_OP_FAILURE_TAG: "false"})


def _tags(study: Study, asset: Asset) -> dict[str, str]:
    """What assets are searched by: the study, and what a partition is of."""
    grids = {
        None: "none",
        tuple(cell.key for cell in study.cells_of("carry_over")): "carry_over_cell",
        tuple(cell.key for cell in study.cells): "cell",
        study.conditions: "condition",
        tuple(contrast.key for contrast in study.contrast_list): "contrast",
        study.forced_arms: "arm",
        KINDS: "repository",
    }
    return {"study": study.name, "partitioned_by": grids.get(asset.keys, "bundle")}


def _try_again(error: Unavailable, tries: int) -> dg.RetryRequested:
    """The request to try again in a while; after the last of them the failure stands."""
    wait = RETRY_WAITS[tries] * random.uniform(0.75, 1) if tries < len(RETRY_WAITS) else None
    return dg.RetryRequested(max_retries=len(RETRY_WAITS), seconds_to_wait=wait)


def _materialize(
    graph: Graph,
    store: Store,
    ref: Ref,
    make: Maker,
    context: dg.AssetExecutionContext,
    config: HowToMake,
) -> dg.MaterializeResult:
    freshness = Freshness(graph, store).read_ahead(ref)
    if blockers := freshness.blockers(ref):
        raise UpstreamNotReady(ref, blockers)
    kept = not config.force and freshness.state(ref) == "fresh"
    if kept and (damage := store.verify(ref)):  # the state goes by names and sizes
        context.log.warning(damage)
        kept = False
    if kept:
        manifest = store.landed(ref)
        release_read(graph, store, ref)  # of a run that was killed before it could
        context.log.info(
            f"{freshness.why(ref)}: kept as run {manifest.provenance.run_id} made it; the run "
            "config `force: true` makes it again"
        )
        return _result(graph, store, manifest, _shown_before(context, manifest))
    provenance = Provenance(
        run_id=context.run_id,
        inputs=freshness.inputs(ref),
        study_hash=graph.study.content_hash,
        software={name: importlib.metadata.version(name) for name in _SOFTWARE},
    )
    started = time.perf_counter()
    with store.draft(ref) as draft:
        made = make(Task(graph, store, ref, draft, context.run_id))
        for warning in made.warnings:
            context.log.warning(warning)
        seconds = round(time.perf_counter() - started, 3)
        manifest = store.land(
            ref,
            draft,
            provenance=provenance,
            audits=made.audits,
            summary=made.summary | {"seconds": seconds},
            data_version=made.data_version,
        )
    if manifest.blocking_failures:
        _let_stand(context)
    for released in release_read(graph, store, ref):
        context.log.info(f"the files of {released} were removed, as the study says")
    return _result(graph, store, manifest, made.metadata)


def _shown_before(context: dg.AssetExecutionContext, manifest: Manifest) -> dict[str, Any]:
    """What the run that made a partition had to show of it: previews and plots are not stored."""
    key = manifest.ref.key
    wanted = dg.AssetRecordsFilter(context.asset_key, asset_partitions=[key] if key else None)
    for record in context.instance.fetch_materializations(wanted, limit=1).records:
        shown = record.asset_materialization.metadata
        if shown.get("data_version") == dg.MetadataValue.text(manifest.data_version):
            return dict(shown)
    return {}


def _result(
    graph: Graph, store: Store, manifest: Manifest, metadata: dict[str, Any]
) -> dg.MaterializeResult:
    tables = [n for n in manifest.files if n.endswith(".parquet") and not manifest.released]
    return dg.MaterializeResult(
        metadata={
            **metadata,
            **manifest.summary,
            **table_metadata(graph, manifest.ref, {n: store.path(manifest.ref, n) for n in tables}),
            **lineage_links(graph, manifest),
            "path": dg.MetadataValue.path(store.address(manifest)),
            "data_version": manifest.data_version,
            "inputs_hash": manifest.provenance.inputs_hash,
            "study_hash": manifest.provenance.study_hash,
            "made_by": dg.MetadataValue.dagster_run(manifest.provenance.run_id),
            "landed_at": manifest.landed_at,
        },
        check_results=check_results(manifest.ref.asset, manifest.audits),
        data_version=dg.DataVersion(manifest.data_version),
    )
