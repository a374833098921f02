"""How far vLLM and ``transformers`` agree on the same answers of a finished miniature study.

    python -m benchmarks.engine_agreement pack FOLDER --study mini --cells 2 --questions 60
    python -m benchmarks.engine_agreement compare FOLDER

The first copies from the study's store what a comparison needs: base, tokenizer, adapters,
questions and personas. The second, on a machine that has vLLM, prints each figure as a JSON line as
soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from persona_assets.evaluation.protocol import Engine, end_of_turn_ids, evaluate
from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.questions.bank import Question

_ROW = ["persona", "scaffold", "question_id"]
#: Disagreements that are written out whole.
_LISTED = 20


@dataclass(frozen=True)
class Material:
    """What engines are compared on.

    Attributes:
        base: The base model's folder.
        tokenizer: Its tokenizer's.
        adapters: Folders of adapters.
        personas: System prompt of each persona.
        questions: The questions.
        max_rationale_tokens: Tokens after which a rationale is cut off.
    """

    base: Path
    tokenizer: Path
    adapters: tuple[Path, ...]
    personas: dict[str, str]
    questions: tuple[Question, ...]
    max_rationale_tokens: int

    @property
    def checkpoints(self) -> dict[str, Path | None]:
        """The base and each adapter, by name."""
        return {"base": None} | {folder.name: folder for folder in self.adapters}

    def host(self, serving: str, dtype: str = "float32", batch_size: int = 64) -> Any:
        """vLLM over the base; the adapters' ranks are at most 64."""
        from persona_assets.evaluation.engines.vllm import VllmHost

        return VllmHost(
            self.base,
            self.tokenizer,
            dtype=dtype,
            serving=serving,
            max_rationale_tokens=self.max_rationale_tokens,
            batch_size=batch_size,
            eos_token_ids=end_of_turn_ids(self.base),
            max_rank=64,
        )

    def answers(self, engine: Engine) -> pl.DataFrame:
        """Every question under every persona and scaffold (columns ``outcomes.MEASURED``)."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        scaffolds = list(SCAFFOLDS.values())
        return evaluate(engine, tokenizer, self.personas, self.questions, scaffolds)

    @contextmanager
    def reference(self, model: Any, checkpoint: Path | None) -> Iterator[Engine]:
        """``transformers`` over the resident model, under a checkpoint or under none."""
        from transformers import AutoTokenizer

        from persona_assets.evaluation.engines.transformers import TransformersEngine
        from persona_assets.training.checkpoints import adapted

        with nullcontext(model) if checkpoint is None else adapted(model, checkpoint) as served:
            yield TransformersEngine(
                served,
                AutoTokenizer.from_pretrained(self.tokenizer),
                max_rationale_tokens=self.max_rationale_tokens,
                batch_size=64,
                eos_token_ids=end_of_turn_ids(self.base),
            )


@dataclass(frozen=True)
class Agreement:
    """How far two engines agree.

    Attributes:
        rows: Answers compared.
        same_letter: Share of equal predictions.
        same_rationale: Share of equal rationales, of those generated.
        same_stop: Share of equal stop reasons, of those generated.
        largest: Largest difference of a letter's log-probability, in nats, where the prompts (and
            so the rationales) are the same.
        mean: Mean of those differences.
        listed: The first rows that differ in letter, rationale or stop, both sides whole.
    """

    rows: int
    same_letter: float
    same_rationale: float
    same_stop: float
    largest: float
    mean: float
    listed: list[dict[str, Any]]

    def figures(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def compare(one: pl.DataFrame, other: pl.DataFrame) -> Agreement:
    """Compare the answers of two engines (columns ``outcomes.MEASURED``).

    Raises:
        ValueError: they are not answers to the same prompts.
    """
    one, other = (frame.sort(_ROW) for frame in (one, other))
    if not one.select(_ROW).equals(other.select(_ROW)):
        raise ValueError("the two engines answered other prompts")
    both = pl.concat([one, other.select(pl.all().name.suffix("_other"))], how="horizontal")
    letter = pl.col("predicted_letter") == pl.col("predicted_letter_other")
    rationale = pl.col("rationale") == pl.col("rationale_other")
    stop = pl.col("stop_reason").eq_missing(pl.col("stop_reason_other"))
    generated = both.filter(pl.col("stop_reason").is_not_null())
    same = both.filter(pl.col("prompt_sha256") == pl.col("prompt_sha256_other"))
    apart = [
        abs(a["value"] - b["value"])
        for left, right in same.select("letter_logprobs", "letter_logprobs_other").rows()
        for a, b in zip(left, right, strict=True)
    ]
    shown = [
        *_ROW,
        *(
            name + side
            for name in ("predicted_letter", "letter_logprobs", "stop_reason", "rationale")
            for side in ("", "_other")
        ),
    ]
    return Agreement(
        rows=both.height,
        same_letter=both.select(letter.mean()).item(),
        same_rationale=generated.select(rationale.mean()).item(),
        same_stop=generated.select(stop.mean()).item(),
        largest=max(apart),
        mean=sum(apart) / len(apart),
        listed=both.filter(~(letter & rationale & stop)).select(shown).head(_LISTED).to_dicts(),
    )


def read(folder: Path) -> Material:
    """What :func:`pack` wrote."""
    told = json.loads((folder / "material.json").read_text("utf-8"))
    return Material(
        folder / "base",
        folder / "tokenizer",
        tuple(folder / "adapters" / name for name in told["adapters"]),
        told["personas"],
        tuple(Question(**row | {"choices": tuple(row["choices"])}) for row in told["questions"]),
        told["max_rationale_tokens"],
    )


def pack(material: Material, folder: Path) -> None:
    """Copy everything into a new folder."""
    folder.mkdir(parents=True)
    copies = {"base": material.base, "tokenizer": material.tokenizer}
    copies |= {f"adapters/{path.name}": path for path in material.adapters}
    for name, source in copies.items():
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("manifest.json"))
    questions = [
        {"id": q.id, "split": q.split, "text": q.text, "choices": q.choices, "correct": q.correct}
        for q in material.questions
    ]
    told = {
        "adapters": [path.name for path in material.adapters],
        "personas": material.personas,
        "questions": questions,
        "max_rationale_tokens": material.max_rationale_tokens,
    }
    (folder / "material.json").write_text(json.dumps(told, indent=1), "utf-8")


def from_store(study_name: str, n_cells: int, n_questions: int) -> Material:
    """The first cells' adapters and the first evaluation questions of a landed study."""
    from persona_assets import environment
    from persona_assets.questions.bank import from_frame
    from persona_assets.store import Ref, Store
    from persona_assets.study import load_study

    study = load_study(environment.study_file(study_name))
    store = Store(environment.store_dir(), study_name)
    questions = [q for q in from_frame(store.frame(Ref("question_bank"))) if q.split == "eval"]
    return Material(
        store.directory(Ref("base_model")),
        store.directory(Ref("tokenizer")),
        tuple(store.directory(Ref("checkpoint", cell.key)) for cell in study.cells[:n_cells]),
        dict(study.personas),
        tuple(questions[:n_questions]),
        study.evaluation.max_rationale_tokens,
    )


def compare_engines(material: Material) -> None:
    """vLLM, merged and beside the base, against transformers in float32: base and adapters.

    Beside the base vLLM computes an adapter in half precision only on a GPU.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from persona_assets.evaluation.probe import probe_prompts

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(material.base, dtype=torch.float32).to(device)
    references = {}
    for name, checkpoint in material.checkpoints.items():
        with material.reference(model, checkpoint) as engine:
            references[name] = material.answers(engine)
            if checkpoint is None:
                _emit("reference", **engine.fingerprint)
            accuracy = references[name]["is_correct"].mean()
        _emit("reference", checkpoint=name, accuracy=accuracy)
    del model
    for serving in ("merged", "adapter"):
        host = material.host(
            serving, "bfloat16" if (serving, device) == ("adapter", "cuda") else "float32"
        )
        try:
            _emit("start", **host.fingerprint)
            before = host.probe(probe_prompts(host.tokenizer, material.personas))
            for name, checkpoint in material.checkpoints.items():
                with host.serving(checkpoint) as engine:
                    found = material.answers(engine)
                _emit(serving, checkpoint=name, **compare(references[name], found).figures())
            after = host.probe(probe_prompts(host.tokenizer, material.personas))
            same = bool((before.view(np.uint32) == after.view(np.uint32)).all())
            _emit(f"{serving}: base unchanged", same_bits=same)
        finally:
            host.close()


def _emit(what: str, **figures: Any) -> None:
    print(json.dumps({"what": what, **figures}), flush=True)


def main() -> None:
    """Copy what a comparison needs, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="copy from a study's store what is compared on")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--study", default="mini")
    packing.add_argument("--cells", type=int, default=2)
    packing.add_argument("--questions", type=int, default=60)
    comparing = commands.add_parser("compare", help="compare the engines on what was packed")
    comparing.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "pack":
        pack(from_store(args.study, args.cells, args.questions), args.folder)
    else:
        compare_engines(read(args.folder))


if __name__ == "__main__":
    main()
