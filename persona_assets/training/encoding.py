"""From chat rows to token ids and the position where the loss starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from persona_assets.chat import chat_prompt, refuse_special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatRow(NamedTuple):
    """One training conversation; ``unscored`` is the beginning of ``assistant`` without loss."""

    system: str
    user: str
    assistant: str
    unscored: str = ""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row's token ids; the loss is taken on ``input_ids[loss_start:]``.

    That is the assistant's turn, less what of it is unscored, and the token that ends it.
    """

    input_ids: list[int]
    loss_start: int

    @property
    def loss_tokens(self) -> int:
        """How many tokens bear loss."""
        return len(self.input_ids) - self.loss_start


class SeamError(ValueError):
    """A token holds both the end of what bears no loss and the start of what does."""


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChatRow]) -> list[EncodedRow]:
    """Encode whole rows (prompt + assistant's turn + end of turn), each text once.

    Raises:
        SeamError: a token straddles the seam, so that the loss could not start where it should.
        ValueError: the tokenizer names no end-of-turn token, a text holds a special token, or a
            turn does not begin with its unscored part.
    """
    if not rows:
        return []
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer names no eos_token: set it to the token that ends a turn")
    for row in rows:
        refuse_special_tokens(tokenizer, "assistant's turn", row.assistant)
        if not row.assistant.startswith(row.unscored):
            raise ValueError(
                f"the turn {row.assistant[:40]!r} begins with no {row.unscored[:40]!r}"
            )
    prompts = [chat_prompt(tokenizer, row.system, row.user) for row in rows]
    encoding = tokenizer(
        [p + row.assistant + tokenizer.eos_token for p, row in zip(prompts, rows)],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
    )
    return [
        EncodedRow(ids, _loss_start(offsets, len(prompt) + len(row.unscored), row))
        for ids, offsets, prompt, row in zip(
            encoding["input_ids"], encoding["offset_mapping"], prompts, rows
        )
    ]


def count_turn_tokens(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> list[int]:
    """Tokens of assistant turns, each with the token that ends it, whatever their prompts.

    Pre-tokenization restarts at the special token that opens the assistant's turn, so an empty
    prompt gives the count that the row's own prompt gives.
    """
    rows = encode_rows(tokenizer, [ChatRow("", "", turn) for turn in turns])
    return [row.loss_tokens for row in rows]


def _loss_start(offsets: Sequence[tuple[int, int]], seam: int, row: ChatRow) -> int:
    for index, (start, end) in enumerate(offsets):
        if start >= seam:
            return index
        if end > seam:
            scored = row.assistant[len(row.unscored) :]
            raise SeamError(
                f"a token straddles the start of the loss, {scored[:40]!r}: begin it with text "
                "that the tokenizer does not merge with what stands before"
            )
    raise SeamError("the assistant's turn has no token of its own")
