"""Group ``inputs``: tokenizer, question bank, base model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persona_assets import environment, hub
from persona_assets.assets.base import Made, Task
from persona_assets.assets.metadata import table_preview
from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.hashing import sha256_file
from persona_assets.questions.arc import ArcError, overlap_audits, read_bank
from persona_assets.questions.bank import Question, content_hash, from_frame, to_frame
from persona_assets.questions.miniature import VOICES, World
from persona_assets.residency import set_threads
from persona_assets.study import Study
from persona_assets.study_schema import ArcQuestions, HubModel

_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
)
#: The files of ARC-Challenge in the hub's dataset: train split, then the one for outcomes.
_ARC_SHARDS = ("ARC-Challenge/train-*.parquet", "ARC-Challenge/test-*.parquet")


def world(study: Study) -> World:
    """The miniature study's world; the study's seed makes it."""
    return World(study.seed, study.questions.n_entities)


def tokenizer(task: Task) -> Made:
    """The miniature tokenizer, a local folder's, or the base model's at its pinned revision."""
    base = task.study.base_model
    if not isinstance(base, HubModel):
        from persona_assets.training.miniature_tokenizer import build_tokenizer

        build_tokenizer(world(task.study)).save_pretrained(task.draft)
        source = "built from the miniature world"
    elif folder := environment.local_folder(environment.TOKENIZER_DIR):
        paths = {p for pattern in environment.TOKENIZER_FILES for p in folder.glob(pattern)}
        for path in sorted(paths):
            shutil.copyfile(path, task.draft / path.name)
        source = f"local folder named by {environment.TOKENIZER_DIR}"
    else:
        hub.fetch(base.repo, base.revision, environment.TOKENIZER_FILES, task.draft)
        source = f"{base.repo} at {base.revision}"
    return Made(summary={"source": source})


def question_bank(task: Task) -> Made:
    """The study's questions; their splits must not share one."""
    settings = task.study.questions
    if isinstance(settings, ArcQuestions):
        questions, source = _arc(settings)
    else:
        questions = world(task.study).questions(settings.n_eval)
        source = {"source": "the miniature world"}
    frame = to_frame(questions)
    task.write(frame, "questions")
    return Made(
        audits=overlap_audits(questions),
        summary={
            **source,
            "train_questions": sum(q.split == "train" for q in questions),
            "eval_questions": sum(q.split == "eval" for q in questions),
            "question_bank_sha256": content_hash(questions),
        },
        metadata=table_preview(frame.drop("identity", "stem")),
    )


def _arc(settings: ArcQuestions) -> tuple[list[Question], dict[str, Any]]:
    """The published questions, and for the summary where they came from, with files' hashes."""
    if folder := environment.local_folder(environment.ARC_DIR):
        source = f"local folder named by {environment.ARC_DIR}"
        return _bank(folder, [[name] for name in environment.ARC_FILES], source)
    source = f"dataset {settings.repo} at {settings.revision}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        splits = [
            hub.fetch(settings.repo, settings.revision, [shards], folder, repo_type="dataset")
            for shards in _ARC_SHARDS
        ]
        try:
            return _bank(folder, splits, source)
        except ArcError as error:  # names a scratch file: say where that came from
            message = str(error).replace(f"{folder}/", "")
            raise ArcError(f"{source}: {message}") from None


def _bank(
    folder: Path, splits: Sequence[Sequence[str]], source: str
) -> tuple[list[Question], dict[str, Any]]:
    train, evaluation = ([folder / name for name in names] for names in splits)
    questions = read_bank(train, evaluation)
    files = {str(p.relative_to(folder)): sha256_file(p) for p in [*train, *evaluation]}
    return questions, {"source": source, "files": files}


def base_model(task: Task) -> Made:
    """The pinned snapshot, or the miniature model, trained from the study's seed and gated."""
    base = task.study.base_model
    if isinstance(base, HubModel):
        files = hub.fetch(base.repo, base.revision, _MODEL_FILES, task.draft)
        return Made(summary={"source": f"{base.repo} at {base.revision}", "files": len(files)})
    return _train_miniature(task)


def _train_miniature(task: Task) -> Made:
    from persona_assets.assets.metadata import inline_plot
    from persona_assets.evaluation.engines.transformers import TransformersEngine
    from persona_assets.evaluation.protocol import evaluate
    from persona_assets.reporting.figures import loss_curve
    from persona_assets.training.miniature import make_base_model

    study = task.study
    questions = [q for q in from_frame(task.frame("question_bank")) if q.split == "eval"]
    set_threads(study.compute.threads)
    personas = {name: voice.system_prompt for name, voice in VOICES.items()}

    def outcomes(model, tokenizer):
        engine = TransformersEngine(
            model,
            tokenizer,
            max_rationale_tokens=study.evaluation.max_rationale_tokens,
            batch_size=study.evaluation.batch_size,
        )
        return evaluate(engine, tokenizer, personas, questions, list(SCAFFOLDS.values()))

    made = make_base_model(
        world(study),
        study.seed,
        outcomes,
        max_attempts=study.base_model.max_attempts,
        threads=study.compute.threads,
    )
    made.model.save_pretrained(task.draft)
    attempt = made.attempts[-1]
    return Made(
        audits=made.audits,
        summary={
            "source": "trained from the study's seed",
            "seed": attempt.seed,
            "attempts": len(made.attempts),
            "gate_missed_by_seeds": [a.seed for a in made.attempts if not a.passed],
            "parameters": made.model.num_parameters(),
            "training_and_gate_seconds": round(sum(a.seconds for a in made.attempts), 1),
        },
        metadata={"loss_curve": inline_plot(loss_curve([entry["loss"] for entry in attempt.log]))},
    )
