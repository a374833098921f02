"""The page of what has landed so far: an asset made from whatever there is."""

import dagster as dg

from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.reporting.so_far import SO_FAR, render_html, render_markdown, so_far
from persona_assets.store import Provenance, Store

#: What the page is read from: edges for the eye, since it waits for none of them.
_READ = ("baseline_outcomes", "cell_diagnostics", "contrast_estimate")


def build_so_far(graph: Graph, store: Store) -> dg.AssetsDefinition:
    """The Dagster asset of the page.

    It is in no graph table: it has no upstream that must have landed, and is stale when what
    there is differs from what it says, which the sensor ``keep_so_far`` looks at.
    """
    study = graph.study

    @dg.asset(
        key=[study.name, SO_FAR.asset],
        deps=[dg.AssetKey([study.name, name]) for name in _READ],
        group_name="report",
        description="INCOMPLETE by design: a page of what has landed and what is missing. Never "
        "the report.",
        kinds={"html"},
        owners=["team:persona-assets"],
        op_tags={"study": study.name},
    )
    def compute(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with store.turn(SO_FAR), store.draft(SO_FAR) as draft:
            page = so_far(Freshness(graph, store).read_ahead())
            counts = {name: f"{done} of {every}" for name, (done, every) in page.counts.items()}
            (draft / "so_far.html").write_text(render_html(page), encoding="utf-8")
            manifest = store.land(
                SO_FAR,
                draft,
                provenance=Provenance(context.run_id, page.inputs, study.content_hash),
                summary={"complete": page.complete, **counts},
            )
        return dg.MaterializeResult(
            metadata={
                **manifest.summary,
                "so_far": dg.MetadataValue.md(render_markdown(page)),
                "path": dg.MetadataValue.path(f"{store.address(manifest)}/so_far.html"),
            },
            data_version=dg.DataVersion(manifest.data_version),
        )

    return compute
