"""One GPU a process: leases over made-up devices, held by real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from persona_assets import environment, gpus
from persona_assets.runner import default_workers
from persona_assets.unavailable import Unavailable
from persona_assets_tests.conftest import PROJECT

_HOLD = """
import os, sys
from persona_assets import gpus
try:
    print(gpus.lease(), os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
except gpus.NoFreeGpu as error:
    print("none:", error, flush=True)
assert "torch" not in sys.modules
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that leases a GPU of ``devices`` and waits; what it said, and it."""
    started = []

    def start(devices: str | None):
        env = {**os.environ, environment.DATA: str(tmp_path), "PYTHONPATH": str(PROJECT)}
        env.pop(gpus.VISIBLE, None)
        if devices is not None:
            env[gpus.VISIBLE] = devices
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD], env=env, stdin=pipe, stdout=pipe, text=True
        )
        started.append(process)
        return process.stdout.readline().strip(), process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_processes_get_different_gpus_and_a_killed_one_gives_its_own_back(holder):
    devices = "0,GPU-8f2a, 7"
    found = [holder(devices) for _ in range(3)]
    assert [said for said, _ in found] == ["0 0", "GPU-8f2a GPU-8f2a", "7 7"]
    refused, _ = holder(devices)
    assert refused.startswith("none: no GPU is free: ")
    for (_, process), name in zip(found, ("0", "GPU-8f2a", "7")):
        assert f"GPU {name} by process {process.pid}" in refused
    found[1][1].send_signal(signal.SIGKILL)
    found[1][1].wait()
    assert holder(devices)[0] == "GPU-8f2a GPU-8f2a"


def test_another_machine_with_the_same_data_folder_has_gpus_of_its_own(
    holder, monkeypatch, tmp_path
):
    monkeypatch.setenv(environment.DATA, str(tmp_path))
    monkeypatch.setenv(gpus.VISIBLE, "0")
    holder("0")
    assert gpus.unleased() == []
    monkeypatch.setattr(gpus.platform, "node", lambda: "another")
    assert gpus.unleased() == ["0"]


def test_without_gpus_there_is_nothing_to_lease(holder):
    assert holder("")[0] == "None"  # and CUDA_VISIBLE_DEVICES stays empty
    assert issubclass(gpus.NoFreeGpu, Unavailable)  # Dagster's step tries again after a while


def test_what_is_held_is_no_longer_free(holder, monkeypatch, tmp_path, length_matched):
    monkeypatch.setenv(environment.DATA, str(tmp_path))
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    assert gpus.unleased() == ["0", "1"]
    holder("0,1")
    assert gpus.unleased() == ["1"]
    assert default_workers(length_matched) == 1
    holder("0,1")
    with pytest.raises(ValueError, match="other processes hold every GPU"):
        default_workers(length_matched)


def test_names_after_one_that_means_none_are_not_seen(monkeypatch):
    for stated, seen in {"-1": [], "0,-1,1": ["0"], "": [], "2, 5": ["2", "5"]}.items():
        monkeypatch.setenv(gpus.VISIBLE, stated)
        assert gpus.visible() == seen


def test_a_gpus_study_gets_a_worker_a_gpu(monkeypatch, tmp_path, mini, length_matched):
    monkeypatch.setenv(environment.DATA, str(tmp_path))
    processors = min(len(os.sched_getaffinity(0)), 8)
    for devices, workers in {"0,1,2,3": 4, "5": 1, "": 1}.items():
        monkeypatch.setenv(gpus.VISIBLE, devices)
        assert default_workers(length_matched) == workers
        assert default_workers(mini) == processors
