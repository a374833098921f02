"""The run queue over several (made-up) GPUs: a run on each at a time, none on two, none twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import dagster as dg
import pytest

from persona_assets import environment, gpus
from persona_assets.pools import open_pools
from persona_assets_tests.conftest import PROJECT

GPUS, RUNS = 4, 6

_LOCATION = f"""
import json, os, time
from pathlib import Path
import dagster as dg
from persona_assets import gpus

keys = dg.StaticPartitionsDefinition([str(i) for i in range({RUNS})])

@dg.asset(pool="gpu", partitions_def=keys)
def trained(context) -> None:
    name, since, folder = gpus.lease(), time.time(), Path(os.environ["SAID"])
    (folder / f"{{os.getpid()}}.held").touch()
    # Until as many runs as there are GPUs hold one: so many must be let through at once.
    while len(list(folder.glob("*.held"))) < {GPUS}:
        assert time.time() < since + 120, "the queue lets too few runs through"
        time.sleep(0.1)
    seen = os.environ["CUDA_VISIBLE_DEVICES"]
    said = {{"gpu": name, "seen": seen, "from": since, "to": time.time(), "pid": os.getpid()}}
    (folder / f"{{context.partition_key}}.json").write_text(json.dumps(said))

job = dg.define_asset_job("train", selection=[trained], partitions_def=keys)
defs = dg.Definitions([trained], jobs=[job], executor=dg.in_process_executor)
"""


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    """Dagster's daemon with the project's own dagster.yaml, on a machine of ``GPUS`` GPUs."""
    shutil.copy(PROJECT / "dagster.yaml", tmp_path)
    (tmp_path / "location.py").write_text(_LOCATION)
    (tmp_path / "workspace.yaml").write_text("load_from: [{python_file: location.py}]\n")
    (tmp_path / "said").mkdir()
    variables = {
        "DAGSTER_HOME": str(tmp_path),
        environment.DATA: str(tmp_path / "data"),
        environment.DAGSTER_STORAGE: str(tmp_path / "dagster"),
        "PYTHONPATH": str(PROJECT),
        "SAID": str(tmp_path / "said"),
        gpus.VISIBLE: ",".join(map(str, range(GPUS))),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.get() as instance:
        assert open_pools(instance)["gpu"] == GPUS
    with (tmp_path / "daemon.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster._daemon", "run", "-w", "workspace.yaml"],
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    yield tmp_path
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_backfill_spreads_over_the_gpus_one_run_each(daemon):
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "dagster", "job", "backfill", "-w", "workspace.yaml"),
            *("-j", "train", "--all", "--noprompt"),
        ],
        cwd=daemon,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    deadline = time.monotonic() + 150
    while len(files := sorted((daemon / "said").glob("*.json"))) < RUNS:
        assert time.monotonic() < deadline, (daemon / "daemon.log").read_text()[-4000:]
        time.sleep(0.5)
    said = [json.loads(file.read_text()) for file in files]
    assert {s["gpu"] for s in said} == {s["seen"] for s in said} == {str(i) for i in range(GPUS)}
    assert len({s["pid"] for s in said}) == RUNS
    for run in said:
        held = [s["gpu"] for s in said if s["from"] <= run["from"] < s["to"]]
        assert len(held) == len(set(held))
