"""From a row of the graph table and a function that makes a partition to a Dagster asset."""

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from persona_assets.asset_table import Asset
from persona_assets.audit import Audit
from persona_assets.checks import check_results, check_specs
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.store import Manifest, Provenance, Ref, Store
from persona_assets.study import Cell, Study

#: Run tag: partitions that are up to date are kept, not made again.
ONLY_STALE = "persona_assets/only_stale"

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
    """

    audits: Sequence[Audit] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    data_version: str | None = None


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


Maker = Callable[[Task], Made]


def build_asset(graph: Graph, asset: Asset, make: Maker, store_root: Path) -> dg.AssetsDefinition:
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
        deps=[
            _dependency(graph, asset, upstream) for upstream in graph.upstream_assets(asset.name)
        ],
        partitions_def=partitions,
        group_name=asset.group,
        description=asset.description,
        code_version=asset.code_version,
        kinds=set(asset.kinds),
        owners=["team:persona-assets"],
        check_specs=check_specs(asset.name, key, partitions),
        op_tags={"study": study.name},
    )
    def compute(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        ref = Ref(asset.name, context.partition_key if partitions else None)
        return _materialize(graph, Store(store_root, study.name), ref, make, context)

    return compute


def partitions_definition(asset: Asset) -> dg.StaticPartitionsDefinition | None:
    """The asset's partitions: one flat, ordered list of keys, since the grid is sparse."""
    return None if asset.keys is None else dg.StaticPartitionsDefinition(list(asset.keys))


def _dependency(graph: Graph, asset: Asset, upstream: str) -> dg.AssetDep:
    """The edge to an upstream asset, mapped partition by partition where both have them.

    Between assets of the same keys it is the identity. A backfill of a cell's assets follows the
    edges down from the first of them: under a mapping of the trained keys only, it silently left
    out the checkpoints of carried-over cells.
    """
    key = dg.AssetKey([graph.study.name, upstream])
    above = graph.assets[upstream].keys
    if asset.keys is None or above is None:
        return dg.AssetDep(key)
    if asset.keys == above:
        return dg.AssetDep(key, partition_mapping=dg.IdentityPartitionMapping())
    mapping = {up: sorted(down) for up, down in graph.key_mapping(asset.name, upstream).items()}
    return dg.AssetDep(key, partition_mapping=dg.StaticPartitionMapping(mapping))


def _materialize(
    graph: Graph, store: Store, ref: Ref, make: Maker, context: dg.AssetExecutionContext
) -> dg.MaterializeResult:
    freshness = Freshness(graph, store)
    if blockers := freshness.blockers(ref):
        raise UpstreamNotReady(ref, blockers)
    if ONLY_STALE in context.run.tags and freshness.state(ref) == "fresh":
        manifest = store.landed(ref)
        context.log.info(f"{freshness.why(ref)}: kept as run {manifest.provenance.run_id} made it")
        return _result(store, manifest, {})
    provenance = Provenance(
        run_id=context.run_id,
        inputs=freshness.inputs(ref),
        study_hash=graph.study.content_hash,
        software={name: importlib.metadata.version(name) for name in _SOFTWARE},
    )
    started = time.perf_counter()
    with store.draft(ref) as draft:
        made = make(Task(graph, store, ref, draft, context.run_id))
        seconds = round(time.perf_counter() - started, 3)
        manifest = store.land(
            ref,
            draft,
            provenance=provenance,
            audits=made.audits,
            summary=made.summary | {"seconds": seconds},
            data_version=made.data_version,
        )
    return _result(store, manifest, made.metadata)


def _result(store: Store, manifest: Manifest, metadata: dict[str, Any]) -> dg.MaterializeResult:
    return dg.MaterializeResult(
        metadata={
            **manifest.summary,
            "path": dg.MetadataValue.path(str(store.folder(manifest.ref) / manifest.version)),
            "data_version": manifest.data_version,
            "inputs_hash": manifest.provenance.inputs_hash,
            "study_hash": manifest.provenance.study_hash,
            **metadata,
        },
        check_results=check_results(manifest.ref.asset, manifest.audits),
        data_version=dg.DataVersion(manifest.data_version),
    )
