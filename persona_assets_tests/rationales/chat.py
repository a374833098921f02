"""What the tests of the chat API's writer ask, and of whom."""

from __future__ import annotations

from typing import Any

from persona_assets.questions.bank import Question
from persona_assets.rationales.writers import RationaleRequest, WrittenRationale
from persona_assets.study_schema import ChatApiRationales
from persona_assets_tests.chat_server import Arrival, Step, completion

CANARY = "sk-canary-0123456789abcdef"
#: The price of the server's default usage, 200 + 50 tokens, at the settings' prices.
COST = (200 * 1.0 + 50 * 4.0) / 1e6


def settings(url: str, **changes: Any) -> ChatApiRationales:
    values = {
        "writer": "chat_api",
        "base_url": url,
        "model": "some-model",
        "api_key_env": "TEST_CHAT_API_KEY",
        "concurrency": 4,
        "budget_usd": 1.0,
        "usd_per_million_input_tokens": 1.0,
        "usd_per_million_output_tokens": 4.0,
        "timeout_seconds": 10.0,
    }
    return ChatApiRationales(**{**values, **changes})


def requests(count: int) -> list[RationaleRequest]:
    choices = ("sand", "salt", "light", "noise")
    questions = [Question(f"q{n}", "train", f"Question {n}", choices, "C") for n in range(count)]
    return [RationaleRequest(question, "B") for question in questions]


def echo(arrival: Arrival) -> Step:
    """The reply that tells which question it answers."""
    return completion(f"{arrival.question}: salt, so (B).")


def expected(count: int) -> list[WrittenRationale]:
    return [WrittenRationale(f"Question {n}: salt, so (B).") for n in range(count)]


def at_most(arrival: Arrival) -> float:
    """What the request can cost: a token a byte, 64 of the template, and 320 in answer."""
    written = sum(len(m["content"].encode()) for m in arrival.request["messages"])
    return ((written + 64) * 1.0 + 320 * 4.0) / 1e6
