"""From chat rows to token ids and the position where the loss starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from persona_assets.chat import chat_prompt, refuse_special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatRow(NamedTuple):
    """One training conversation."""

    system: str
    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row's token ids; the loss is taken on ``input_ids[loss_start:]``.

    That is the assistant's turn and the token that ends it.
    """

    input_ids: list[int]
    loss_start: int

    @property
    def loss_tokens(self) -> int:
        """How many tokens bear loss."""
        return len(self.input_ids) - self.loss_start


class SeamError(ValueError):
    """A token holds both the end of the prompt and the start of the assistant's turn."""


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChatRow]) -> list[EncodedRow]:
    """Encode whole rows (prompt + assistant's turn + end of turn), each text once.

    Raises:
        SeamError: a token straddles the seam, so that the loss could not start at the
            assistant's first token.
        ValueError: the tokenizer names no end-of-turn token, or a text holds a special token.
    """
    if not rows:
        return []
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer names no eos_token: set it to the token that ends a turn")
    for row in rows:
        refuse_special_tokens(tokenizer, "assistant's turn", row.assistant)
    prompts = [chat_prompt(tokenizer, row.system, row.user) for row in rows]
    encoding = tokenizer(
        [p + row.assistant + tokenizer.eos_token for p, row in zip(prompts, rows)],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
    )
    return [
        EncodedRow(ids, _loss_start(offsets, len(prompt), row))
        for ids, offsets, prompt, row in zip(
            encoding["input_ids"], encoding["offset_mapping"], prompts, rows
        )
    ]


def count_loss_tokens(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> list[int]:
    """Loss tokens of rows with these assistant turns, whatever their prompts.

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
            raise SeamError(
                f"a token straddles the start of the assistant's turn {row.assistant[:40]!r}: "
                "start the turn with text that the tokenizer does not merge with the prompt's end"
            )
    raise SeamError("the assistant's turn has no token of its own")
