"""Pools: what making a partition takes a share of, so that the run queue starts no more than fit.

They bind whole runs, as these are taken from Dagster's queue (``granularity: run`` in
dagster.yaml). At the granularity of steps a run that waits within Dagster's in-process executor
spins on a whole processor, and a killed worker's share stays taken until a daemon frees it.
``persona-assets run`` starts its own workers and waits for no pool; the queue counts its runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_assets import environment
from persona_assets.study import Study
from persona_assets.study_schema import ArcQuestions, HubModel

if TYPE_CHECKING:
    from dagster import DagsterInstance

#: Name → what a run in the pool does. One run at a time in each, unless a limit of its own is set.
POOLS = {
    "gpu": "trains or evaluates a model that wants a GPU of its own",
    "cpu_models": "trains or evaluates a model that fits a processor",
    "hub": "downloads from the Hugging Face hub",
    "warehouse": "builds a DuckDB database in memory",
}

_MODEL_WORK = frozenset(
    {
        "prior_checkpoint",
        "prior_accuracies",
        "checkpoint",
        "baseline_outcomes",
        "cell_outcomes",
    }
)


def pool_of(asset: str, study: Study) -> str | None:
    """The pool of an asset's runs; None for what may run at any time.

    A cell's run is in the pool of its model, also where it fetches a carried-over checkpoint.
    """
    from_hub = isinstance(study.base_model, HubModel)
    if asset in _MODEL_WORK:
        return "gpu" if from_hub else "cpu_models"
    if asset == "base_model":
        return "hub" if from_hub else "cpu_models"
    if asset == "tokenizer":
        return "hub" if from_hub else None
    if asset == "question_bank":
        return "hub" if isinstance(study.questions, ArcQuestions) else None
    return "warehouse" if asset in ("number_ledger", "warehouse") else None


def open_pools(instance: DagsterInstance) -> dict[str, int]:
    """Let as many runs with small models go at once as there are processors; each pool's limit.

    A limit that somebody has set (``dagster instance concurrency set``, or the UI's page
    Deployment > Concurrency) is left as it is. dagster.yaml can say one default for all pools, and
    that is 1: too many runs on a GPU fail, too few on a processor are only slow.
    """
    storage, name = instance.event_log_storage, "cpu_models"
    default = instance.global_op_concurrency_default_limit or 1
    set_by_hand = {p.name: p.limit for p in storage.get_pool_limits() if not p.from_default}
    if name not in set_by_hand:
        set_by_hand[name] = environment.processors()
        storage.set_concurrency_slots(name, set_by_hand[name])
    return {pool: set_by_hand.get(pool, default) for pool in POOLS}
