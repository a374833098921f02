"""The GPU benchmarks, whole, on small models: what they print is there and adds up."""

from __future__ import annotations

import json
import sys

from benchmarks import gpu_train


def test_the_training_benchmark_runs_on_a_small_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_train", "--tiny", "--eager", "--cells", "2"])
    gpu_train.main()
    out = capsys.readouterr().out
    figures = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert not [figure for figure in figures if "error" in figure]
    assert {f["part"] for f in figures} == {
        *("setup", "ceilings", "ours", "agreement", "attach", "padded", "cells")
    }
    loops = [figure for figure in figures if "cell_s" in figure]
    assert len(loops) == 2 * 4
    assert len({round(loop["first_loss"], 2) for loop in loops}) == 1
    assert out.count("\n| r") == 1 + len(loops)
    compared = {f["gradients"]: f for f in figures if f.get("against") == "padded float32"}
    assert compared["ours float32"]["worst_relative_error"] < 1e-5
    padded, ours = (
        compared[name]["worst_relative_error"] for name in ("padded bfloat16", "ours bfloat16")
    )
    assert 1e-3 < ours < 1.5 * padded
    attaching = {(f["recipe"], f["which"]): f["seconds"] for f in figures if "which" in f}
    assert len(attaching) == 4
    last = figures[-1]
    assert last["adapters_saved"] == last["trained"] == last["cells"] == 2


def test_the_training_benchmark_stops_in_time_and_says_what_it_has(monkeypatch, capsys):
    arguments = ["--tiny", "--only", "ours,cells", "--recipe", "r16", "--seconds", "0.5"]
    monkeypatch.setattr(sys, "argv", ["gpu_train", *arguments, "--cells", "1000"])
    gpu_train.main()
    out = capsys.readouterr().out
    figures = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    last = figures[-1]
    assert last["trained"] == last["adapters_saved"] < last["cells"] == 1000
    assert sum("cell" in figure for figure in figures) == last["trained"]
