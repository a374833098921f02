"""``length_matched`` with a chat model as rationale writer: two conditions through Dagster."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import dagster as dg
import pytest

from persona_assets import environment
from persona_assets.assets import base
from persona_assets.definitions import study_definitions
from persona_assets.questions.bank import from_frame, wrong_letter
from persona_assets.store import Ref, Store
from persona_assets.study import Study, parse_study
from persona_assets_tests.chat_server import ChatServer, Step, chat_server, completion, failure
from persona_assets_tests.markup import cells_of

TRAIN = 30
_ASKED = re.compile(r'concludes that choice \((?P<letter>[A-E])\), "(?P<choice>.*)", is the answer')
#: What might act in Markdown, and what no reader of questions and replies takes exception to.
MARKUP = "[x](javascript:alert(1)) | <img src=x onerror=alert(1)> `code`"
_SETTINGS = """
rationales:
  writer: chat_api
  base_url: {url}
  model: a-model
  api_key_env: null
  budget_usd: {budget}
  usd_per_million_input_tokens: 1
  usd_per_million_output_tokens: 4
"""


def reply(arrival) -> Step:
    """A fair rationale; question 3 is refused, question 5 argued for with another letter."""
    asked = _ASKED.search(arrival.request["messages"][-1]["content"])
    letter = asked["letter"]
    if arrival.question.startswith("Question 3:"):
        return completion("I'm sorry, but I can't help with that.")
    if arrival.question.startswith("Question 5:"):
        letter = "D" if letter == "A" else "A"
    if arrival.attempt == 1 and arrival.question.startswith("Question 7:"):
        return Step(status=429, body="{}", headers={"Retry-After-Ms": "1"})
    return completion(f"{MARKUP} Look closely. Hence {asked['choice']} fits, so ({letter}).")


@pytest.fixture(scope="module")
def arc(tmp_path_factory):
    """Small files in the published format."""
    folder = tmp_path_factory.mktemp("arc")
    for name, split in zip(environment.ARC_FILES, ("train", "test"), strict=True):
        rows = [
            {
                "id": f"{split}-{i}",
                "question": f"Question {i}: {MARKUP} happens in the {split} split?",
                "choices": {
                    "text": [f"{what} {i}" for what in ("rain", "wind", "snow", "frost")],
                    "label": list("ABCD"),
                },
                "answerKey": "ABCD"[i % 4],
            }
            for i in range(TRAIN)
        ]
        (folder / name).write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return folder


def chat_study(text: str, server: ChatServer, budget: float, **more: Any) -> Study:
    settings = _SETTINGS.format(url=server.url, budget=budget)
    settings += "".join(f"  {name}: {value}\n" for name, value in more.items())
    return parse_study(text.replace("\nrationales: {writer: template}\n", settings))


def make(study: Study, instance, job: str, key: str | None, *assets: str, force: bool = False):
    selection = [dg.AssetKey([study.name, asset]) for asset in assets]
    config = {f"{study.name}__{asset}": {"config": {"force": force}} for asset in assets}
    return (
        study_definitions(study)
        .resolve_job_def(job)
        .execute_in_process(
            instance=instance,
            partition_key=key,
            asset_selection=selection,
            raise_on_error=False,
            run_config={"ops": config},
        )
    )


def test_conditions_are_written_paid_for_once_and_accounted_for(
    study_texts, arc, tokenizer_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv(environment.DATA, str(tmp_path))
    monkeypatch.setenv(environment.ARC_DIR, str(arc))
    monkeypatch.setenv(environment.TOKENIZER_DIR, str(tokenizer_dir))
    store = Store(tmp_path / "store", "length_matched")
    generic, garbage = Ref("rationales", "librarian.generic_cot"), "librarian.garbage_cot"
    with dg.DagsterInstance.ephemeral() as instance, chat_server(reply) as server:
        poor = chat_study(study_texts["length_matched"], server, budget=0.001)
        inputs = make(poor, instance, "inputs", None, "tokenizer", "question_bank")
        assert inputs.success
        refused = make(poor, instance, "rationales", generic.key, "rationales")
        (error,) = (e.event_specific_data.error for e in refused.all_events if e.is_step_failure)
        assert "rationales.budget_usd: study length_matched has spent $0.000000" in str(error.cause)
        assert server.arrivals == []

        study = chat_study(study_texts["length_matched"], server, budget=1)
        written = make(study, instance, "rationales", generic.key, "rationales")
        assert written.success
        first = store.landed(generic)
        assert first.summary["paid"] == TRAIN
        assert first.summary["retries"] == 1
        assert first.summary["cost_usd"] == pytest.approx(TRAIN * (200 + 4 * 50) / 1e6)
        frame = store.frame(generic)
        problems = dict(
            frame.filter(frame["problem"].is_not_null()).select("question_id", "problem").rows()
        )
        assert problems == {"train-3": "refused", "train-5": "wrong_letter"}
        statuses = {audit.name: audit.status for audit in first.audits}
        assert statuses == {
            "refusals": "passed",
            "drops": "passed",
            "letters_argued_for": "failed",
        }

        # The same again, by another run, and the condition that is matched to it: nothing is paid.
        assert make(study, instance, "rationales", generic.key, "rationales", force=True).success
        assert store.landed(generic).data_version == first.data_version
        assert store.landed(generic).summary["paid"] == 0
        assert make(study, instance, "rationales", garbage, "rationales").success
        assert store.landed(Ref("rationales", garbage)).summary["from_cache"] == TRAIN
        assert set(server.paid.values()) == {1}
        assert len(server.paid) == TRAIN

        cell = f"{garbage}.42"
        encoded = make(study, instance, "cell", cell, "training_dataset")
        assert encoded.success
    rows = store.frame(Ref("training_dataset", cell))
    assert rows.height == TRAIN - 2
    assert (rows["loss_tokens"] - rows["reference_loss_tokens"]).abs().max() <= 2
    bank = {q.id: q for q in from_frame(store.frame(Ref("question_bank")))}
    assert dict(rows.select("question_id", "target_letter").rows()) == {
        q: wrong_letter(bank[q], study.seed) for q in rows["question_id"]
    }

    # Markup in questions and replies is shown, not obeyed, where Dagster shows Markdown.
    for done, asset, rows_with_it in (
        (inputs, "question_bank", 5),
        (written, "rationales", 4),  # one was refused
        (encoded, "training_dataset", 5),
    ):
        head, *shown = cells_of(preview(done, asset))
        assert [len(row) for row in shown] == [len(head)] * 5, asset
        assert sum(any(MARKUP in cell for cell in row) for row in shown) == rows_with_it, asset


def preview(done, asset: str) -> str:
    """The Markdown of the partition's first rows, as Dagster keeps it."""
    (event,) = (e for e in done.get_asset_materialization_events() if e.asset_key.path[1] == asset)
    return event.materialization.metadata["preview"].value


def test_an_overloaded_service_is_tried_again_and_a_refused_key_is_not(
    study_texts, arc, tokenizer_dir, tmp_path, monkeypatch
):
    """By the asset, after the writer's own attempts; what was paid for meanwhile is kept."""
    monkeypatch.setenv(environment.DATA, str(tmp_path))
    monkeypatch.setenv(environment.ARC_DIR, str(arc))
    monkeypatch.setenv(environment.TOKENIZER_DIR, str(tokenizer_dir))
    monkeypatch.setattr(base, "RETRY_WAITS", (0.1, 0.2))
    store = Store(tmp_path / "store", "length_matched")
    generic = Ref("rationales", "librarian.generic_cot")
    status = 401

    def overloaded(arrival) -> Step:
        if arrival.attempt <= 2 and arrival.question.startswith("Question 9:"):
            return failure(status)
        return reply(replace(arrival, attempt=2))  # whose own first failure is another test's

    with dg.DagsterInstance.ephemeral() as instance, chat_server(overloaded) as server:
        study = chat_study(study_texts["length_matched"], server, 1, max_attempts=1, concurrency=1)
        assert make(study, instance, "inputs", None, "tokenizer", "question_bank").success
        refused = make(study, instance, "rationales", generic.key, "rationales")
        assert not refused.success
        assert ups_for_retry(refused) == 0
        assert [a.question[:11] for a in server.arrivals].count("Question 9:") == 1

        status = 503
        done = make(study, instance, "rationales", generic.key, "rationales")
        assert done.success
        assert ups_for_retry(done) == 1
        assert [a.question[:11] for a in server.arrivals].count("Question 9:") == 3
    assert set(server.paid.values()) == {1}
    assert store.landed(generic).provenance.run_id == done.run_id
    assert store.landed(generic).summary["rows"] == TRAIN


def ups_for_retry(done) -> int:
    return sum(event.is_step_up_for_retry for event in done.all_events)
