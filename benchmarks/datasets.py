"""Where the time of the real study's 78 training datasets goes, and how long all of them take.

    PERSONA_ASSETS_ARC_DIR=… PERSONA_ASSETS_TOKENIZER_DIR=… python -m benchmarks.datasets

Two measurements in one run, on ``length_matched`` with its optional ``no_cot`` arm (26 conditions,
78 cells) and the published train questions: every stage of every condition and of its first cell
in this process, and the whole command ``persona-assets run --up-to training_dataset`` with two
workers in a fresh data folder, Dagster runs, audits and files included.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from persona_assets import environment
from persona_assets.questions.arc import read_arc
from persona_assets.rationales.condition import write_condition
from persona_assets.rationales.methods import make_writer
from persona_assets.study import Study, parse_study
from persona_assets.training.audits import audit_dataset
from persona_assets.training.dataset import build_dataset

STUDY = "length_matched"
STAGES = ("rationales", "dataset", "audits")


class Stopwatch:
    """Seconds by (arm, stage)."""

    def __init__(self) -> None:
        self.seconds: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def of(self, arm: str, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[arm, stage] += time.perf_counter() - start


def study_text() -> str:
    """The study file with its optional extension."""
    text = (Path(__file__).parents[1] / "data" / "studies" / f"{STUDY}.yaml").read_text("utf-8")
    text, found = re.subn(r"# (no_cot: \{origin: carry_over\})", r"\1", text)
    assert found == 1, "the study file no longer offers no_cot as a comment"
    return text


def folder(variable: str) -> Path:
    """The folder that an environment variable names."""
    return environment.local_folder(variable) or sys.exit(f"set {variable} (see README)")


def stages(study: Study) -> Stopwatch:
    """Every condition and its first cell, in this process."""
    from transformers import AutoTokenizer

    train, test = (folder(environment.ARC_DIR) / name for name in environment.ARC_FILES)
    questions = [*read_arc(train, "train"), *read_arc(test, "eval")]
    tokenizer = AutoTokenizer.from_pretrained(folder(environment.TOKENIZER_DIR))
    watch = Stopwatch()
    for condition in study.conditions:
        cell = next(cell for cell in study.cells if cell.condition == condition)
        writer = make_writer(study)
        with watch.of(cell.arm, "rationales"):
            rationales, _ = write_condition(study, condition, questions, tokenizer, writer)
        with watch.of(cell.arm, "dataset"):
            frame = build_dataset(study, cell, questions, rationales, tokenizer)
        with watch.of(cell.arm, "audits"):
            audits = audit_dataset(
                frame,
                study,
                cell,
                questions,
                rationales=rationales,
                tokenizer=tokenizer,
                writer=writer,
            )
        if failed := [audit for audit in audits if audit.status == "failed"]:
            print(f"{cell.key}: {', '.join(f'{a.name} ({a.observed})' for a in failed)}")
    return watch


def print_stages(study: Study, watch: Stopwatch) -> None:
    """Seconds a condition, by arm, and what they come to over the grid."""
    print(f"{'arm':24}{'conditions':>11}" + "".join(f"{stage:>12}" for stage in STAGES))
    total: Counter[str] = Counter()
    for arm in study.arms:
        conditions = sum(condition.endswith(f".{arm}") for condition in study.conditions)
        each = {stage: watch.seconds[arm, stage] / conditions for stage in STAGES}
        print(f"{arm:24}{conditions:11}" + "".join(f"{each[stage]:12.2f}" for stage in STAGES))
        for stage in STAGES:
            times = 1 if stage == "rationales" else len(study.seeds)
            total[stage] += watch.seconds[arm, stage] * times
    print(f"{'all cells, one process':35}" + "".join(f"{total[s]:12.1f}" for s in STAGES))


def whole_command(text: str) -> float:
    """Seconds of the real command in a fresh data folder."""
    with tempfile.TemporaryDirectory() as data:
        studies = Path(data, "studies")
        studies.mkdir()
        (studies / f"{STUDY}.yaml").write_text(text, "utf-8")
        command = [sys.executable, "-m", "persona_assets", "run", "--study", STUDY]
        start = time.perf_counter()
        subprocess.run(
            [*command, "--up-to", "training_dataset", "--workers", "2"],
            env=os.environ
            | {environment.DATA: data, environment.DAGSTER_STORAGE: str(Path(data, "dagster"))},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - start


def main() -> None:
    """Print both measurements."""
    text = study_text()
    study = parse_study(text)
    print(f"{len(study.conditions)} conditions, {len(study.cells)} cells; seconds a condition:")
    print_stages(study, stages(study))
    print(f"persona-assets run --up-to training_dataset --workers 2: {whole_command(text):.1f} s")


if __name__ == "__main__":
    main()
