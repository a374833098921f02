"""One Dagster code location a study: ``mini``, ``length_matched``, and any other study file.

``workspace.yaml`` loads this module once a study, with the study's name as the attribute; the
definitions of a study are built from ``data/studies/<name>.yaml`` when they are first asked for.
Nothing heavy is imported here: torch, transformers and matplotlib wait inside the functions that
need them.
"""

from __future__ import annotations

from functools import lru_cache

import dagster as dg

from persona_assets import environment
from persona_assets.asset_table import JOBS
from persona_assets.assets import MAKERS
from persona_assets.assets.base import build_asset
from persona_assets.assets.so_far import build_so_far
from persona_assets.automation import study_sensors
from persona_assets.backfill import carry_over_backfill
from persona_assets.graph import Graph
from persona_assets.object_store import open_store
from persona_assets.partitions import partitions_definition
from persona_assets.reporting.so_far import SO_FAR
from persona_assets.study import Study, load_study


def study_definitions(study: Study) -> dg.Definitions:
    """The assets, checks, jobs and sensors of a study."""
    graph = Graph(study)
    store = open_store(study.name)
    assets = [
        build_asset(graph, asset, MAKERS[asset.name], store) for asset in graph.assets.values()
    ]
    jobs = {
        name: dg.define_asset_job(
            name,
            selection=[
                dg.AssetKey([study.name, asset]) for asset in job.assets if asset in graph.assets
            ],
            partitions_def=partitions_definition(graph.assets[job.assets[0]]),
            description=job.description,
            tags={"study": study.name},
        )
        for name, job in JOBS.items()
        if job.assets[0] in graph.assets
    }
    page = build_so_far(graph, store)
    jobs[SO_FAR.asset] = dg.define_asset_job(
        SO_FAR.asset,
        selection=[page],
        description="The page of what has landed so far.",
        tags={"study": study.name},
    )
    carried = [carry_over_backfill(graph, store)] if study.cells_of("carry_over") else []
    return dg.Definitions(
        assets=[*assets, page],
        jobs=[*jobs.values(), *carried],
        sensors=study_sensors(study, jobs),
        executor=dg.in_process_executor,
    )


@lru_cache
def _load(name: str) -> dg.Definitions:
    return study_definitions(load_study(environment.study_file(name)))


def __getattr__(name: str) -> dg.Definitions:
    """The definitions of the study ``name``, if the data folder has a file for it."""
    if name.startswith("_") or not environment.study_file(name).is_file():
        raise AttributeError(f"no study file {environment.study_file(name)}")
    return _load(name)
