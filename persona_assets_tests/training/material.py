"""What datasets are made from and audited with, in the miniature world and on ARC-Challenge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import polars as pl
import yaml
from transformers import PreTrainedTokenizerBase

from persona_assets.audit import Audit
from persona_assets.questions.bank import Question
from persona_assets.rationales.arms import unscored
from persona_assets.rationales.condition import write_condition
from persona_assets.rationales.writers import RationaleWriter
from persona_assets.study import Study, parse_study
from persona_assets.training.audits import audit_dataset
from persona_assets.training.dataset import build_dataset
from persona_assets.training.encoding import ChatRow, encode_rows

CONTEXT = "context_cot"
CONTRADICTING, GENERIC, PERSONA = "contradicting_cot", "generic_cot", "persona_cot"
CORRECT, GARBAGE, SCRAMBLED = "generic_cot_correct", "garbage_cot", "scrambled_english_cot"
WRITTEN = (GENERIC, PERSONA, CONTRADICTING, CORRECT, "persona_cot_correct")


def all_trained(text: str) -> Study:
    """A study file's study with every arm, and one without loss on its rationale, trained here."""
    raw = yaml.safe_load(text)
    raw["define"] = {
        "arms": {
            CONTEXT: {
                "scaffold": "generic_cot",
                "target": "wrong",
                "rationale": "written",
                "loss_on": "answer",
            }
        }
    }
    arms = (*raw["arms"], "no_cot", CONTEXT)
    raw["arms"] = {arm: {"origin": "trained"} for arm in arms}
    return parse_study(yaml.safe_dump(raw))


@dataclass(frozen=True, eq=False)
class Material:
    """A study with what its datasets are made from; texts that are foreign to its filler."""

    study: Study
    questions: Sequence[Question]
    tokenizer: PreTrainedTokenizerBase
    writer: RationaleWriter
    #: A plain word of the bank, and a string that the tokenizer has no token for.
    word: str
    unknown: str

    def rationales(self, arm: str) -> pl.DataFrame:
        return _rationales(self, f"librarian.{arm}")

    def dataset(self, arm: str) -> pl.DataFrame:
        return _dataset(self, f"librarian.{arm}.42")

    def with_writer(self, writer: Any) -> Material:
        return replace(self, writer=writer)

    @cached_property
    def carried_over(self) -> Material:
        """The same, with checkpoints that come from elsewhere."""
        arms = {arm: {"origin": "carry_over"} for arm in self.study.arms}
        return replace(self, study=Study.model_validate(self.study.model_dump() | {"arms": arms}))

    @cached_property
    def train(self) -> list[Question]:
        return [q for q in self.questions if q.split == "train"]

    def audits(
        self,
        arm: str,
        frame: pl.DataFrame | None = None,
        rationales: pl.DataFrame | None = None,
        questions: Sequence[Question] | None = None,
    ) -> dict[str, Audit]:
        found = audit_dataset(
            self.dataset(arm) if frame is None else frame,
            self.study,
            self.study.cell(f"librarian.{arm}.42"),
            self.questions if questions is None else questions,
            rationales=self.rationales(arm) if rationales is None else rationales,
            tokenizer=self.tokenizer,
            writer=self.writer,
        )
        assert all(a.observed and a.threshold and a.remedy for a in found)
        return {a.name: a for a in found}

    def failures(self, arm: str, *args, **more) -> list[str]:
        """The audits that did not pass, but for the warning that every context arm bears."""
        return _failed(arm, self.audits(arm, *args, **more))

    def only_failure(self, name: str, arm: str, *args, **more) -> Audit:
        """The one audit that did not pass, which is to be that of this name."""
        found = self.audits(arm, *args, **more)
        assert _failed(arm, found) == [name]
        return found[name]

    def rewritten(self, frame: pl.DataFrame, changes: dict[int, dict]) -> pl.DataFrame:
        """``frame`` with some rows changed, by number, and these encoded again."""
        rows = frame.to_dicts()
        for index, new in changes.items():
            row = rows[index] | new
            arm, turn = self.study.arm(row["arm"]), row["assistant"]
            chat = ChatRow(row["system"], row["user"], turn, unscored(arm, turn))
            (encoded,) = encode_rows(self.tokenizer, [chat])
            rows[index] = row | {
                "input_ids": encoded.input_ids,
                "loss_start": encoded.loss_start,
                "loss_tokens": encoded.loss_tokens,
            }
        return pl.DataFrame(rows, schema=frame.schema)

    def reworded(self, arm: str, texts: dict[int, str]) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The dataset with other rationales in some rows, and the rationales that it is made of."""
        frame, table = self.dataset(arm), self.rationales(arm)
        names = [frame["question_id"][i] for i in texts]
        new = pl.col("question_id").replace_strict(names, list(texts.values()), default=None)
        table = table.with_columns(rationale=pl.coalesce(new, "rationale"))
        scaffold = self.study.arm(arm).scaffold
        turns = {
            i: {"assistant": f"{scaffold.opening}{scaffold.close(text)} {letter}"}
            for i, text in texts.items()
            for letter in [frame["target_letter"][i]]
        }
        return self.rewritten(frame, turns), table

    def without(self, arm: str, dropped: pl.Expr) -> tuple[pl.DataFrame, pl.DataFrame]:
        """A dataset and its rationales, some of which are dropped."""
        problem = pl.when(dropped).then(pl.lit("refused")).otherwise("problem")
        table = self.rationales(arm).with_columns(problem=problem)
        return self.built(arm, table), table

    def built(self, arm: str, table: pl.DataFrame) -> pl.DataFrame:
        """The dataset of some rationales."""
        cell = self.study.cell(f"librarian.{arm}.42")
        return build_dataset(self.study, cell, self.questions, table, self.tokenizer)

    def texts(self, frame: pl.DataFrame, arm: str) -> list[str]:
        """The rows' rationales, in the order of ``frame``."""
        table = dict(self.rationales(arm).select("question_id", "rationale").rows())
        return [table[name] for name in frame["question_id"]]


def _failed(arm: str, audits: Mapping[str, Audit]) -> list[str]:
    return [
        name for name, a in audits.items() if a.status != "passed" and (a.blocks or arm != CONTEXT)
    ]


@lru_cache(maxsize=64)
def _rationales(material: Material, condition: str) -> pl.DataFrame:
    m = material
    return write_condition(m.study, condition, m.questions, m.tokenizer, m.writer)[0]


@lru_cache(maxsize=64)
def _dataset(material: Material, key: str) -> pl.DataFrame:
    m, cell = material, material.study.cell(key)
    return build_dataset(m.study, cell, m.questions, _rationales(m, cell.condition), m.tokenizer)


def matched(frame: pl.DataFrame) -> pl.DataFrame:
    """``frame`` with reference rows as long as its own."""
    return frame.with_columns(reference_loss_tokens="loss_tokens")
