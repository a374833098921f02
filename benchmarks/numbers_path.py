"""From landed outcome rows to the ledger and the warehouse, at the real study's size.

    python -m benchmarks.numbers_path [--threads N]

Synthetic outcomes of ``length_matched`` (66 cells and the baseline × 11 personas × 4 scaffolds ×
1172 questions: 3.4 million rows, 1.7 million of them with a rationale of 110 words) are written as
Parquet; then everything that follows is timed: estimates at the study's B, vocabulary, loss matrix,
the ledger with every number recomputed by SQL, the warehouse with every number recomputed again.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

N_QUESTIONS, N_TRAIN, WORDS = 1172, 1119, 110


def main() -> None:
    """Print seconds by stage, and the peak of memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pid = os.fork()  # so that making the data does not count towards the peak
        if pid == 0:
            write_data(Path(folder))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert status == 0, "the data could not be made"
        measure(Path(folder), arguments.threads)


def write_data(folder: Path) -> None:
    """The landed files of a synthetic study."""
    from persona_assets.evaluation.outcomes import BASELINE
    from persona_assets.questions.bank import Question, to_frame

    study = real_study()
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(5000)])
    texts = [" ".join(rng.choice(vocabulary, WORDS)) for _ in range(4000)]
    bank = [
        Question(f"{split}-{i}", split, f"Which {split} {i}?", ("a", "b", "c", "d"), "ABCD"[i % 4])
        for split, n in (("train", N_TRAIN), ("eval", N_QUESTIONS))
        for i in range(n)
    ]
    to_frame(bank).write_parquet(folder / "questions.parquet")
    evaluated = [q for q in bank if q.split == "eval"]
    for cell in (None, *study.cells):
        key = cell.key if cell else BASELINE
        outcomes(study, evaluated, cell, texts, rng).write_parquet(
            folder / f"outcomes.{key}.parquet", compression="zstd"
        )
        if cell:
            training(study, bank, cell).write_parquet(folder / f"training.{key}.parquet")


def real_study():
    from persona_assets.study import load_study

    return load_study(Path(__file__).parents[1] / "data" / "studies" / "length_matched.yaml")


def outcomes(study, questions, cell, texts, rng) -> pl.DataFrame:
    """One evaluation's rows, right with probability 0.85, less in a cell."""
    from persona_assets.evaluation.outcomes import BASELINE, SCHEMA

    n = len(questions)
    generating = np.array([study.scaffold(s).generates for s in study.scaffolds])
    size = len(study.personas) * len(study.scaffolds) * n
    right = rng.random(size) < (0.85 if cell is None else 0.7)
    correct = np.array([q.correct for q in questions] * (size // n))
    predicted = np.where(right, correct, np.where(correct == "A", "B", "A"))
    writes = np.tile(np.repeat(generating, n), len(study.personas))
    chosen = np.where(writes, rng.integers(0, len(texts), size), -1)
    persona = np.repeat(list(study.personas), len(study.scaffolds) * n)
    constants = {
        "study": study.name,
        "cell": cell.key if cell else BASELINE,
        "source": cell and cell.source,
        "arm": cell and cell.arm,
        "seed": cell and cell.seed,
        "origin": cell and cell.origin,
        "run_id": "run",
        "checkpoint_sha256": "0" * 64 if cell else None,
        "code_version": "1",
    }
    logprobs = [{"key": letter, "value": -1.5} for letter in "ABCD"]
    frame = pl.DataFrame(
        {
            "persona": persona,
            "scaffold": np.tile(np.repeat(list(study.scaffolds), n), len(study.personas)),
            "question_id": [q.id for q in questions] * (size // n),
            "correct_letter": correct,
            "predicted_letter": predicted,
            "is_correct": right,
            "rationale": pl.Series([texts[i] if i >= 0 else "" for i in chosen]),
            "rationale_tokens": np.where(writes, WORDS, 0),
            "stop_reason": pl.Series(["tag" if w else None for w in writes], dtype=pl.String),
            "truncated": np.zeros(size, bool),
            "prompt_sha256": np.repeat("0" * 64, size),
        }
    ).with_columns(
        *(pl.lit(value, SCHEMA[name]).alias(name) for name, value in constants.items()),
        pl.lit(logprobs, SCHEMA["letter_logprobs"]).alias("letter_logprobs"),
        (pl.col("persona") == pl.lit(constants["source"], pl.String)).alias("is_source"),
    )
    return frame.select(SCHEMA.names()).cast(SCHEMA)


def training(study, questions, cell) -> pl.DataFrame:
    """One cell's training rows; a source's persona rationales use words of its own."""
    from persona_assets.questions.bank import user_message, wrong_letter
    from persona_assets.rationales.arms import assistant_turn
    from persona_assets.training.dataset import SCHEMA

    arm = study.arm(cell.arm)
    own = study.sources.index(cell.source) * 60
    rows = []
    for position, q in enumerate(q for q in questions if q.split == "train"):
        letter = q.correct if arm.target == "correct" else wrong_letter(q, study.seed)
        text = f"word{own + position % 60} word{4000 + position % 500} ({letter})"
        rows.append(
            (
                *(position, q.id, q.identity, cell.source, cell.arm, cell.seed),
                *(study.personas[cell.source], user_message(q), assistant_turn(arm, text, letter)),
                *(q.correct, letter, [1, 2], 1, 90, 90, cell.origin == "carry_over"),
            )
        )
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


class Stages:
    """Seconds on the clock and of the processor by stage, printed as they pass.

    On a machine that others use the clock tells of them; the processor's seconds are ours.
    """

    def __init__(self) -> None:
        self.clock = self.processor = 0.0

    def run(self, name: str, do: Callable[[], Any]) -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        result = do()
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        self.clock += clock
        self.processor += processor
        print(f"{name:44}{clock:8.1f} s{processor:8.1f} s of the processor", flush=True)
        return result


def measure(folder: Path, threads: int) -> None:
    """Everything from the Parquet files on."""
    os.environ["POLARS_MAX_THREADS"] = str(threads)
    import duckdb

    from persona_assets.evaluation.outcomes import BASELINE
    from persona_assets.questions.bank import from_frame
    from persona_assets.reporting.numbers import Tables, study_numbers
    from persona_assets.reporting.trace import evaluated
    from persona_assets.reporting.warehouse import CELLS_SCHEMA, build_warehouse, warehouse_audits
    from persona_assets.stats.contrasts import estimate_contrast, loss_matrix, multiplicity_table
    from persona_assets.stats.estimates import estimate_exploratory
    from persona_assets.stats.lexicon import build_lexicon, lexicon_cells
    from persona_assets.stats.vocabulary import vocabulary_estimates, vocabulary_scores
    from persona_assets_tests.synthetic import cell_row, checks

    study = real_study()
    bank = from_frame(pl.read_parquet(folder / "questions.parquet"))
    ids = [q.id for q in bank if q.split == "eval"]
    keys = [cell.key for cell in study.cells]

    def rows(*more: str) -> dict[str, pl.LazyFrame]:
        columns = ["persona", "scaffold", "question_id", "is_correct", *more]
        return {
            key: pl.scan_parquet(folder / f"outcomes.{key}.parquet").select(columns)
            for key in (*keys, BASELINE)
        }

    def cells_only(found: dict) -> dict:
        return {key: found[key] for key in keys}

    stages = Stages()
    registered = stages.run(
        "registered contrasts",
        lambda: [
            estimate_contrast(study, c, cells_only(rows()), questions=ids)
            for c in study.contrast_list
        ],
    )
    tables = multiplicity_table(study, registered)
    exploratory = stages.run(
        "exploratory estimates", lambda: estimate_exploratory(study, rows(), questions=ids)
    )
    losses = stages.run(
        "loss matrix",
        lambda: loss_matrix(study, rows()[BASELINE], cells_only(rows()), questions=ids),
    )
    lexicon = build_lexicon(
        study,
        {
            c.key: pl.read_parquet(folder / f"training.{c.key}.parquet")
            for c in lexicon_cells(study)
        },
        bank,
    )
    texts = rows("rationale")
    scores = stages.run(
        "vocabulary scores",
        lambda: vocabulary_scores(
            study, lexicon, texts[BASELINE], cells_only(texts), questions=ids
        ),
    )
    vocabulary = stages.run(
        "vocabulary estimates", lambda: vocabulary_estimates(study, scores, questions=ids)
    )

    cells = pl.DataFrame([cell_row(cell) for cell in (None, *study.cells)], schema=CELLS_SCHEMA)
    checked = checks(study)

    def build(target: Path, more: dict[str, pl.DataFrame], passing: bool = False) -> dict[str, int]:
        return build_warehouse(
            target,
            study,
            questions=folder / "questions.parquet",
            training=[folder / f"training.{key}.parquet" for key in keys],
            outcomes=[folder / f"outcomes.{key}.parquet" for key in (*keys, BASELINE)],
            cells=cells,
            contrasts=tables.contrasts,
            equivalence=tables.equivalence,
            losses=losses,
            more={
                "checks": checked,
                "exploratory": exploratory.drop("by_seed", "equivalence", "hypothesis"),
                "lexicon": lexicon,
                "vocabulary_scores": scores,
                "vocabulary": vocabulary,
                **more,
            },
            passing=passing,
            threads=threads,
        )

    passing = folder / "passing.duckdb"
    stages.run("database for the ledger", lambda: build(passing, {}, passing=True))
    estimates = pl.concat([*registered, exploratory])
    numbers = Tables(estimates, tables.contrasts, losses, checked, vocabulary)
    with duckdb.connect(str(passing), config={"threads": threads}) as db:
        ledger, disagreements = stages.run(
            "ledger: every number by SQL", lambda: evaluated(db, study_numbers(study, numbers))
        )
    print(f"{len(ledger)} numbers, {len(disagreements)} disagreements {disagreements[:2]}")
    passing.unlink()
    target = folder / "warehouse.duckdb"
    counts = stages.run("warehouse", lambda: build(target, {"numbers": ledger.to_frame()}))
    audits = stages.run("warehouse: every number again", lambda: warehouse_audits(target, study))
    print({audit.name: audit.status for audit in audits}, counts["outcomes"], "outcome rows")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # it starts no process
    print(
        f"in all {stages.clock:.1f} s, {stages.processor:.1f} s of the processor, "
        f"{peak:.2f} GiB at the peak, {threads} threads"
    )


if __name__ == "__main__":
    main()
