"""Dagster's local run launcher, with an answer to whether a run's process is still there.

The stock one leaves that question open, so that run monitoring never ends a run whose code server
was killed along with it, nor one of ``persona-assets run`` or ``dagster asset materialize`` that
was: such runs stay "started" for ever, and the queue takes their pools for full. ``dagster.yaml``
names this class.
"""

from __future__ import annotations

import os

import grpc
from dagster import DagsterRun
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value

from persona_assets.environment import PROCESS_TAG, WORKER_TAG, is_of_this_machine

#: The tag that the Ray launcher reads, and leaves on what it has launched.
RAY_TAG = "dagster-ray/config"

_PATIENCE_SECONDS = 10


class LocalRunLauncher(DefaultRunLauncher):
    """Launches runs in the code server's processes, and tells lost ones from running ones."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Yes."""
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Whether the process that makes ``run`` is still there."""
        if was_launched(run):
            return _health(self._is_executing(run), "its process, or the code server's,")
        return health_of_unlaunched(run)

    def _is_executing(self, run: DagsterRun) -> bool:
        client = self._get_grpc_client_for_termination(run.run_id)
        if client is None:  # it has ended meanwhile
            return True
        request = CanCancelExecutionRequest(run_id=run.run_id)
        try:
            answer = client.can_cancel_execution(request, timeout=_PATIENCE_SECONDS)
        except DagsterUserCodeUnreachableError as error:
            # Nobody listens there. One that is only slow to answer may still be at the run.
            cause = error.__cause__
            gone = isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.UNAVAILABLE
            return not gone
        return deserialize_value(answer, CanCancelExecutionResult).can_cancel


def was_launched(run: DagsterRun) -> bool:
    """Whether a launcher has started a run: not a worker of ``persona-assets run``, nor a hand.

    Whatever else its tags say: re-executed from the interface, it has those of its parent.
    """
    return GRPC_INFO_TAG in run.tags or RAY_TAG in run.tags


def health_of_unlaunched(run: DagsterRun) -> CheckRunHealthResult:
    """Whether the process is still there that makes a run which no launcher has started."""
    if name := run.tags.get(WORKER_TAG):
        return _health(_is_alive(name), f"worker {name} of `persona-assets run`")
    if name := run.tags.get(PROCESS_TAG):
        return _health(_is_alive(name), f"process {name}, started by hand,")
    return CheckRunHealthResult(WorkerStatus.RUNNING, "started by hand, at no asset yet")


def _health(running: bool, who: str) -> CheckRunHealthResult:
    status = WorkerStatus.RUNNING if running else WorkerStatus.NOT_FOUND
    return CheckRunHealthResult(status, f"{who} is {'' if running else 'no longer '}there")


def _is_alive(name: str) -> bool:
    """Whether a process is there, by its :func:`process_name`; another machine's is taken to be."""
    if not is_of_this_machine(name):
        return True
    try:
        os.kill(int(name.partition("@")[0]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
