"""Engines in processes of their own: one that is killed, and the GPU benchmark on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
#: Starts an engine, says so, and waits to be killed.
STARTER = """
import sys
from pathlib import Path
from persona_assets.evaluation.engines.vllm import VllmHost
base, tokenizer = map(Path, sys.argv[1:])
host = VllmHost(base, tokenizer, dtype="float32", serving="merged", max_rationale_tokens=8,
                batch_size=4, eos_token_ids=(), max_rank=8)
print("started", flush=True)
sys.stdin.read()
"""


def test_an_engine_ends_with_the_process_that_started_it_even_if_that_is_killed(untied):
    command = [sys.executable, "-c", STARTER, untied.base, untied.tokenizer]
    starter = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with starter:
        said = iter(starter.stdout.readline, "")
        assert any("started" in line for line in said)
        processes = psutil.Process(starter.pid).children(recursive=True)
        starter.kill()
    assert len(processes) >= 2
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    assert not alive


def test_the_evaluation_benchmark_runs_on_a_tiny_model(arc_dir, tokenizer_dir, tmp_path):
    """What it prints is there and adds up, for the engine that a study uses."""
    sections = ("prepare", "merged")
    folders = ("--work", tmp_path, "--arc-dir", arc_dir, "--tokenizer-dir", tokenizer_dir)
    size = ("--personas", "1", "--questions", "3", "--batch-size", "2", "--warm-up", "1")
    command = [sys.executable, "-m", "benchmarks.gpu_eval", "--tiny", *folders, *size, *sections]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert run.returncode == 0, run.stderr[-3000:]
    assert not [line for line in lines if "error" in line]
    assert [line["section"] for line in lines if line.get("what") == "done"] == list(sections)
    (cell,) = (line for line in lines if line.get("what") == "cell")
    # 3 questions under 4 scaffolds, 2 of which generate.
    assert cell["requests"] == 3 * (4 + 2)
    assert cell["generated_tokens"] > 3 * 2 * 60
    assert 0 < cell["cached_tokens"] < cell["prompt_tokens"]
    switches = [line for line in lines if "enter_s" in line]
    assert len(switches) == 1 + 6 + 1 + 1  # base, three adapters twice, a whole model, the cell
    assert all(set(line["stops"]) <= {"None", "length", "eot"} for line in switches)
    (base,) = (line for line in lines if line.get("what") == "base unchanged")
    assert base["same_bits"]
    assert base["moved_meanwhile"] > 1e-3
