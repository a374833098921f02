"""The API key: which a study may name, and where it goes."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from persona_assets.rationales.chat_api import ChatApiWriter
from persona_assets.rationales.chat_client import ChatApiError
from persona_assets.rationales.replies import Replies
from persona_assets.rationales.writers import WrittenRationale
from persona_assets.study import Study, StudyError, parse_study
from persona_assets_tests.chat_server import Arrival, Step, chat_server, completion, failure
from persona_assets_tests.rationales.chat import (
    CANARY,
    echo,
    requests,
    settings,
)


@pytest.mark.parametrize(
    ("value", "fault"),
    [(None, "is not set"), ("  ", "is not set"), ("clé-0123456789", "holds characters")],
)
def test_without_a_usable_key_nothing_is_sent(
    replies: Replies, monkeypatch: pytest.MonkeyPatch, value: str | None, fault: str
):
    monkeypatch.delenv("TEST_CHAT_API_KEY")
    if value is not None:
        monkeypatch.setenv("TEST_CHAT_API_KEY", value)
    with chat_server(echo) as server:
        with pytest.raises(ChatApiError, match=f"variable TEST_CHAT_API_KEY, .* {fault}") as raised:
            ChatApiWriter(settings(server.url), replies, "mini").write(requests(1))
        assert server.arrivals == []
    assert "clé" not in str(raised.value)


def test_an_endpoint_that_asks_for_no_key_gets_none(
    replies: Replies, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CHAT_API_KEY", CANARY)
    with chat_server(echo) as server:
        ChatApiWriter(settings(server.url, api_key_env=None), replies, "mini").write(requests(1))
        assert [a.authorization for a in server.arrivals] == [None]


def test_the_key_is_nowhere_but_in_the_header(
    replies: Replies, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)

    def script(arrival: Arrival) -> Step:
        if arrival.question == "Question 1":
            return failure(401, f"wrong key: {CANARY}")
        return completion(f"You are {arrival.authorization}, so (B).")

    with chat_server(script) as server:
        writer = ChatApiWriter(settings(server.url, concurrency=1), replies, "mini")
        with pytest.raises(ChatApiError, match=r"401: .*wrong key: \[API key\]") as raised:
            writer.write(requests(2))
        assert writer.write(requests(1)) == [WrittenRationale("You are Bearer [API key], so (B).")]
        assert {a.authorization for a in server.arrivals} == {f"Bearer {CANARY}"}
    error: BaseException | None = raised.value
    while error is not None:
        assert CANARY not in "".join(traceback.format_exception(error))
        error = error.__context__
    assert CANARY not in caplog.text
    assert CANARY not in json.dumps(writer.accounting)
    stored = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert replies.file in stored
    assert all(CANARY.encode() not in file.read_bytes() for file in stored)


@pytest.fixture
def chat_study(study_texts) -> Callable[..., Study]:
    """A study whose rationales come from an endpoint, with the key's variable as the file says."""

    def read(variable: str, url: str = "https://elsewhere.example/v1") -> Study:
        chat = (
            f"rationales: {{writer: chat_api, base_url: '{url}', model: m, "
            f"{variable} budget_usd: 1, usd_per_million_input_tokens: 1, "
            "usd_per_million_output_tokens: 1}"
        )
        before = "rationales: {writer: template}"
        assert before in study_texts["length_matched"]
        return parse_study(study_texts["length_matched"].replace(before, chat))

    return read


def test_a_study_holds_no_password(chat_study):
    """Its definition goes into the warehouse, and to the hub."""
    with pytest.raises(StudyError) as error:
        chat_study("", "https://me:canary@elsewhere.example/v1")
    assert "rationales.chat_api.base_url: has a user name or password in it" in str(error.value)
    assert "canary" not in str(error.value)


@pytest.mark.parametrize("name", ["CHAT_API_KEY", "LAB_CHAT_API_KEY", "OUR_LAB2_CHAT_API_KEY"])
def test_a_study_names_a_variable_that_was_set_for_chat_models(chat_study, name):
    assert chat_study(f"api_key_env: {name},").rationales.api_key_env == name


def test_where_a_study_says_nothing_the_key_is_that_of_chat_models(chat_study):
    assert chat_study("").rationales.api_key_env == "CHAT_API_KEY"
    assert chat_study("api_key_env: null,").rationales.api_key_env is None


@pytest.mark.parametrize(
    "name",
    [
        *("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN"),
        *("PATH", "XCHAT_API_KEY", "_CHAT_API_KEY", "CHAT_API_KEY_OLD", "chat_api_key"),
        *("'CHAT_API_KEY\n'", '"HF_TOKEN\\nCHAT_API_KEY"', "''", CANARY),
    ],
)
def test_a_study_cannot_have_any_other_secret_sent_to_its_endpoint(chat_study, name):
    with pytest.raises(StudyError) as raised:
        chat_study(f"api_key_env: {name},")
    [problem] = raised.value.problems
    assert problem.field == "rationales.chat_api.api_key_env"
    assert "put the endpoint's key into CHAT_API_KEY, or into a variable" in problem.remedy
    assert CANARY not in str(raised.value)  # the key itself, where its variable's name belongs
