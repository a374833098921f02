"""Pools: what making a partition takes a share of, so that the run queue starts no more than fit.

They bind whole runs, as these are taken from Dagster's queue (``granularity: run`` in
dagster.yaml). At the granularity of steps a run that waits within Dagster's in-process executor
spins on a whole processor, and a killed worker's share stays taken until a daemon frees it.
``persona-assets run`` starts its own workers and waits for no pool; the queue counts its runs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from persona_assets import environment, gpus
from persona_assets.publish_table import PUBLISH_JOBS
from persona_assets.study import Study
from persona_assets.study_schema import ArcQuestions

if TYPE_CHECKING:
    from dagster import DagsterInstance

#: Name → what a run in the pool does. One run at a time in each, unless a limit of its own is set.
POOLS = {
    "gpu": "trains or evaluates a model that wants a GPU: leased, or reserved by Ray (gpus.py)",
    "cpu_models": "trains or evaluates a model that fits a processor",
    "hub": "downloads from the Hugging Face hub",
    "warehouse": "builds a DuckDB database in memory",
    "publish": "uploads to a place outside",
}

_MODELS = ("cpu_models", "gpu")
_TRAINING = frozenset({"prior_checkpoint", "checkpoint"})
_EVALUATION = frozenset({"prior_accuracies", "baseline_outcomes", "cell_outcomes"})


def pool_of(asset: str, study: Study) -> str | None:
    """The pool of an asset's runs; None for what may run at any time.

    A cell's run is in the pool of its model, also where it fetches a carried-over checkpoint.
    What an engine server evaluates waits in the server's own queue.
    """
    if asset in _EVALUATION and study.evaluation.engine == "vllm_server":
        return None
    if asset in _TRAINING | _EVALUATION:
        return "gpu" if study.wants_gpu else "cpu_models"
    from_hub = study.base_model.kind == "hub"
    if asset == "base_model":
        return "hub" if from_hub else "cpu_models"
    if asset == "tokenizer":
        return "hub" if from_hub else None
    if asset == "question_bank":
        return "hub" if isinstance(study.questions, ArcQuestions) else None
    if any(asset in job.assets for job in PUBLISH_JOBS.values()):
        return "publish"
    return "warehouse" if asset in ("number_ledger", "warehouse") else None


def reservation(assets: Collection[str], study: Study) -> dict[str, float]:
    """What a run over ``assets`` reserves on a cluster, by dagster-ray's names.

    Raises:
        ValueError: they want a GPU, and the study file says that none is to be reserved.
    """
    models = any(pool_of(asset, study) in _MODELS for asset in assets)
    compute = study.compute
    if not compute.gpus and any(pool_of(asset, study) == "gpu" for asset in assets):
        raise ValueError(
            f"study {study.name}: compute.gpus is 0, and {', '.join(assets)} wants a GPU: say in "
            "the study file how much of one a run reserves"
        )
    return {"num_cpus": compute.threads, "num_gpus": compute.gpus if models else 0}


def open_pools(instance: DagsterInstance) -> dict[str, int]:
    """Let as many runs go at once as there are processors or free GPUs for them; each pool's limit.

    Where runs go to a cluster, that holds back what finds no room: as many as the queue lets go.
    A limit that somebody has set (``dagster instance concurrency set``, or the UI's page
    Deployment > Concurrency) is left as it is. dagster.yaml can say one default for all pools, and
    that is 1: too many runs on a GPU fail, too few on a processor are only slow.
    """
    from persona_assets.launcher import LocalRunLauncher

    storage, notes = instance.event_log_storage, instance.daemon_cursor_storage
    default = instance.global_op_concurrency_default_limit or 1
    if isinstance(instance.run_launcher, LocalRunLauncher):
        here = {"cpu_models": environment.processors(), "gpu": max(1, len(gpus.unleased()))}
    else:
        queue = instance.get_concurrency_config().run_queue_config
        here = dict.fromkeys(_MODELS, queue.max_concurrent_runs if queue else default)
    limits = {p.name: p.limit for p in storage.get_pool_limits() if not p.from_default}
    keys = {name: f"persona_assets/pool/{name}" for name in here}
    ours = notes.get_cursor_values(set(keys.values()))
    for name, count in here.items():
        if name not in limits or str(limits[name]) == ours.get(keys[name]):
            limits[name] = count
            storage.set_concurrency_slots(name, count)
            notes.set_cursor_values({keys[name]: str(count)})
    return {pool: limits.get(pool, default) for pool in POOLS}
