"""dagster-ray's run launcher, told what each run needs: ``deploy/ray/dagster.yaml`` names it.

One Dagster run, a cell mostly, is one Ray job. What it reserves of the cluster goes by the assets
it makes and the study's ``compute`` section, whoever asked for it: Dagster gives a backfill's runs
no tags of a job. Whether it is still there, and its end, are dagster-ray's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from dagster import DagsterRun
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster_ray import RayRunLauncher

from persona_assets import environment
from persona_assets.asset_table import JOBS
from persona_assets.launcher import RAY_TAG, health_of_unlaunched, was_launched
from persona_assets.pools import reservation
from persona_assets.study import load_study


class RayLauncher(RayRunLauncher):
    """Launches runs as Ray jobs, each with the processors and GPUs that its study asks for."""

    def launch_run(self, context: LaunchRunContext) -> None:
        """Submit the run's job, with what it is to reserve in its tags; what else they say stays.

        Raises:
            DagsterUserCodeUnreachableError: nobody answers for the cluster. The run goes back into
                the queue, as where a code server does not answer: ``run_queue`` says how often.
        """
        run = context.dagster_run
        tag = json.dumps(json.loads(run.tags.get(RAY_TAG, "{}")) | _wanted(run))
        self._instance.add_run_tags(run.run_id, {RAY_TAG: tag})
        launched = run.with_tags({**run.tags, RAY_TAG: tag})
        try:
            super().launch_run(context._replace(dagster_run=launched))
        except OSError as error:  # requests' errors of connections are
            raise DagsterUserCodeUnreachableError(
                f"Ray's head does not answer at {self.address}: {error}"
            ) from error

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Whether the run's job is still there; a head that cannot say is no reason to end it."""
        if not was_launched(run):
            return health_of_unlaunched(run)
        found = super().check_run_worker_health(run)
        if found.status == WorkerStatus.UNKNOWN and "status code 404" not in (found.msg or ""):
            return CheckRunHealthResult(WorkerStatus.RUNNING, found.msg)
        return found


def _wanted(run: DagsterRun) -> dict[str, float]:
    """What a run is to reserve; nothing said of what is no asset, or of no study that is here."""
    made = list(_made(run))
    names = {study for study, _ in made}
    if len(names) != 1 or not environment.study_file(name := names.pop()).is_file():
        return {}
    return reservation([asset for _, asset in made], load_study(environment.study_file(name)))


def _made(run: DagsterRun) -> Iterator[tuple[str, str]]:
    """The assets that a run makes, as (study, asset)."""
    if run.asset_selection:
        for key in run.asset_selection:
            yield key.path[0], "/".join(key.path[1:])
    elif (study := run.tags.get("study")) and (job := JOBS.get(run.job_name)):
        for asset in job.assets:
            yield study, asset
