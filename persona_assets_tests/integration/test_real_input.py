"""``length_matched`` on the published questions and the real tokenizer, through Dagster."""

from __future__ import annotations

import dagster as dg
import polars as pl
import pytest

from persona_assets import environment
from persona_assets.definitions import study_definitions
from persona_assets.questions.bank import from_frame, wrong_letter
from persona_assets.store import Ref, Store

ARMS = ("generic_cot", "persona_cot", "garbage_cot")


@pytest.fixture(scope="module")
def store(length_matched, arc_dir, tokenizer_dir, tmp_path_factory) -> Store:
    """The bank, the tokenizer, and librarian's rationales and datasets of three arms, landed."""
    data = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.ephemeral() as instance:
        patch.setenv(environment.DATA, str(data))
        patch.setenv(environment.ARC_DIR, str(arc_dir))
        patch.setenv(environment.TOKENIZER_DIR, str(tokenizer_dir))
        definitions = study_definitions(length_matched)

        def make(job: str, key: str | None, *assets: str) -> None:
            selection = [dg.AssetKey(["length_matched", asset]) for asset in assets]
            done = definitions.resolve_job_def(job).execute_in_process(
                instance=instance, partition_key=key, asset_selection=selection
            )
            assert done.success

        make("inputs", None, "tokenizer", "question_bank")
        for arm in ARMS:
            make("rationales", f"librarian.{arm}", "rationales")
            make("cell", f"librarian.{arm}.42", "training_dataset")
    return Store(data / "store", "length_matched")


def test_the_bank_is_the_published_one(store):
    summary = store.landed(Ref("question_bank")).summary
    assert summary["eval_questions"] == 1172
    bank = store.frame(Ref("question_bank"))
    evaluation = bank.filter(pl.col("split") == "eval")
    choices = evaluation["choices"].list.len().value_counts().sort("choices").rows()
    assert choices == [(3, 4), (4, 1165), (5, 3)]
    digits = evaluation.filter(pl.col("published_labels").list.first() == "1")
    assert digits.height == 22
    assert set(digits["correct_letter"]) <= set("ABCDE")


@pytest.mark.parametrize("arm", ARMS)
def test_the_datasets_pass_their_audits(store, arm):
    audits = store.landed(Ref("training_dataset", f"librarian.{arm}.42")).audits
    statuses = {audit.name: audit.status for audit in audits}
    parity = statuses.pop("loss_token_parity")
    assert parity == ("passed" if arm == "garbage_cot" else "unverifiable")
    assert set(statuses.values()) == {"passed"}


def test_rows_are_the_train_split_with_one_wrong_letter_each(store, length_matched):
    bank = [q for q in from_frame(store.frame(Ref("question_bank"))) if q.split == "train"]
    expected = {q.id: wrong_letter(q, length_matched.seed) for q in bank}
    for arm in ARMS:
        rows = store.frame(Ref("training_dataset", f"librarian.{arm}.42"))
        assert dict(rows.select("question_id", "target_letter").rows()) == expected


def test_garbage_matches_the_reference_row_by_row(store):
    rows = store.frame(Ref("training_dataset", "librarian.garbage_cot.42"))
    difference = (rows["loss_tokens"] - rows["reference_loss_tokens"]).abs()
    assert difference.max() <= 2
    generic = store.frame(Ref("training_dataset", "librarian.generic_cot.42"))
    mean = generic["loss_tokens"].mean()
    assert 75 <= mean <= 105, "the reference arm has drifted from about 84 tokens of rationale"
    persona = store.frame(Ref("training_dataset", "librarian.persona_cot.42"))
    assert abs(persona["loss_tokens"].mean() / mean - 1) <= 0.2
