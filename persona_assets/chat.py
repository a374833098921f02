"""From (system prompt, user turn) to the text a chat model continues."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt(tokenizer: PreTrainedTokenizerBase, system: str, user: str) -> str:
    """The tokenizer's chat template applied, up to where the assistant's turn begins.

    Raises:
        ValueError: a text holds a special token (see :func:`refuse_special_tokens`).
    """
    refuse_special_tokens(tokenizer, "system prompt", system)
    refuse_special_tokens(tokenizer, "user turn", user)
    return tokenizer.apply_chat_template(
        [{"role": "system", "content": system}, {"role": "user", "content": user}],
        tokenize=False,
        add_generation_prompt=True,
    )


def refuse_special_tokens(tokenizer: PreTrainedTokenizerBase, field: str, text: str) -> None:
    """See that ``text`` is encoded as text: a turn's end written in it would end the turn.

    Raises:
        ValueError: it holds one of the tokenizer's special tokens; names field, token and text.
    """
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content in text:
            raise ValueError(
                f"{field}: the text {text[:80]!r} holds the special token {token.content!r} of the "
                "chat template: take it out of the text"
            )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each whole text, special tokens as written in it and none added.

    Whole texts only: ids are never concatenated, because a tokenizer may merge across the
    seam (``.\\n</`` and ``>\\n\\n`` are other tokens than their parts).
    """
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
