"""Cells of the miniature study, trained and evaluated on a GPU and on the CPU, side by side.

    python -m benchmarks.gpu_mini pack FOLDER --cells 'librarian.*.42'   # here, with a landed study
    python -m benchmarks.gpu_mini run FOLDER                             # there, on the GPU

``pack`` copies base model, tokenizer, questions and datasets out of the store, and trains and
evaluates each cell on the CPU. ``run`` does the same on the GPU by the same functions, and tells
apart what the training and what the evaluation contribute: the CPU's adapter is evaluated on the
GPU as well. Nothing but the packed folder is needed there, and no Dagster.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.engine_agreement import compare
from persona_assets.evaluation.engines.transformers import TransformersHost
from persona_assets.evaluation.protocol import end_of_turn_ids, evaluate
from persona_assets.questions.bank import from_frame
from persona_assets.residency import Device, resident_model, set_threads
from persona_assets.study import Study, load_study
from persona_assets.training.lora import TrainingLog, train_adapter


def train(study: Study, folder: Path, key: str, on: Device, out: Path) -> TrainingLog:
    """Train a cell's adapter on ``on``, into the folder ``out``."""
    base = resident_model(folder / "base_model", study.training.dtype, on)
    rows = pl.read_parquet(folder / "datasets" / f"{key}.parquet")
    return train_adapter(base, rows, study.training, study.cell(key).seed, out, base_id="base")


def measure(study: Study, folder: Path, adapter: Path | None, on: Device) -> pl.DataFrame:
    """Every evaluation question under every persona and scaffold (``outcomes.MEASURED``)."""
    settings = study.evaluation
    host = TransformersHost(
        folder / "base_model",
        folder / "tokenizer",
        dtype=settings.dtype,
        serving=settings.serving,
        max_rationale_tokens=settings.max_rationale_tokens,
        batch_size=settings.batch_size,
        eos_token_ids=end_of_turn_ids(folder / "base_model"),
        device=on,
    )
    bank = from_frame(pl.read_parquet(folder / "questions.parquet"))
    asked = [question for question in bank if question.split == "eval"]
    scaffolds = [study.scaffold(name) for name in study.scaffolds]
    with host.serving(adapter) as engine:
        return evaluate(engine, host.tokenizer, study.personas, asked, scaffolds)


def pack(study: Study, store_root: Path, folder: Path, cells: str) -> Iterator[dict[str, Any]]:
    """Copy what is needed, and make every cell on the CPU; a line of figures a cell."""
    from persona_assets.store import Ref, Store

    store = Store(store_root, study.name)
    for name in ("base_model", "tokenizer"):
        shutil.copytree(store.directory(Ref(name)), folder / name)
    store.frame(Ref("question_bank")).write_parquet(folder / "questions.parquet")
    (folder / "datasets").mkdir()
    measure(study, folder, None, "cpu").write_parquet(folder / "baseline.parquet")
    for cell in study.cells_of("trained"):
        if not fnmatch.fnmatchcase(cell.key, cells):
            continue
        rows = store.frame(Ref("training_dataset", cell.key))
        rows.select("input_ids", "loss_start").write_parquet(
            folder / "datasets" / f"{cell.key}.parquet"
        )
        log = train(study, folder, cell.key, "cpu", folder / "cpu" / cell.key)
        (folder / "cpu" / cell.key / "training_log.json").write_text(log.to_json())
        outcomes = measure(study, folder, folder / "cpu" / cell.key, "cpu")
        outcomes.write_parquet(folder / "cpu" / cell.key / "outcomes.parquet")
        yield {"cell": cell.key, "device": "cpu", "train_seconds": round(log.wall_seconds, 2)}


def run(study: Study, folder: Path, on: Device) -> Iterator[dict[str, Any]]:
    """Make every packed cell on ``on``; a line of figures for the baseline and for each cell."""
    baseline = pl.read_parquet(folder / "baseline.parquet")
    yield {"cell": "baseline"} | compared(baseline, measure(study, folder, None, on))
    for path in sorted((folder / "datasets").glob("*.parquet")):
        theirs = folder / "cpu" / path.stem
        cpu = json.loads((theirs / "training_log.json").read_text())
        ours = folder / "here" / path.stem
        log = train(study, folder, path.stem, on, ours)
        outcomes = pl.read_parquet(theirs / "outcomes.parquet")
        yield {
            "cell": path.stem,
            "device": on,
            "train_seconds": round(log.wall_seconds, 2),
            "first_loss": [round(cpu["losses"][0], 6), round(log.losses[0], 6)],
            "last_loss": [round(cpu["losses"][-1], 4), round(log.losses[-1], 4)],
            "largest_loss_difference": round(
                max(abs(a - b) for a, b in zip(cpu["losses"], log.losses, strict=True)), 6
            ),
            "evaluated_here": compared(outcomes, measure(study, folder, theirs, on)),
            "trained_and_evaluated_here": compared(outcomes, measure(study, folder, ours, on)),
        }


def compared(one: pl.DataFrame, other: pl.DataFrame) -> dict[str, Any]:
    """How far two evaluations agree, and both accuracies; the first is the CPU's."""
    found = compare(one, other)
    by_group = [
        frame.group_by("persona", "scaffold").agg(pl.col("is_correct").mean()).sort(pl.all())
        for frame in (one, other)
    ]
    groups = by_group[0].join(by_group[1], on=["persona", "scaffold"], suffix="_other")
    apart = (groups["is_correct"] - groups["is_correct_other"]).abs().max()
    return {
        "rows": found.rows,
        "same_letter": round(found.same_letter, 5),
        "same_rationale": round(found.same_rationale, 5),
        "largest_logprob_difference": float(f"{found.largest:.3g}"),
        "accuracy": [round(frame["is_correct"].mean(), 5) for frame in (one, other)],
        "largest_accuracy_difference": round(apart, 5),
    }


def main() -> None:
    """Print a JSON line as soon as a cell is made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["pack", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--study", type=Path, default=Path("data/studies/mini.yaml"))
    parser.add_argument("--store", type=Path, default=Path("data/store"))
    parser.add_argument("--cells", default="librarian.*.42")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    args = parser.parse_args()
    study = load_study(args.study)
    set_threads(study.compute.threads)
    if args.step == "pack":
        args.folder.mkdir(parents=True)
        lines = pack(study, args.store, args.folder, args.cells)
    else:
        lines = run(study, args.folder, args.device)
    for line in lines:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
