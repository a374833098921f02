"""Row encoding: the loss mask's start, the end of turn, and the seams."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from persona_assets.chat import chat_prompt
from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.rationales.arms import ARMS, assistant_turn, unscored
from persona_assets.training.encoding import (
    ChatRow,
    SeamError,
    count_turn_tokens,
    encode_rows,
)
from persona_assets_tests import small_study as small

ROW = ChatRow(
    "You are a librarian.", "Why?\n\n(A) x\n(B) y", "<thinking>\nSo.\n</thinking>\nAnswer: B"
)


@pytest.fixture(scope="module")
def qwen(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def check(tokenizer, row: ChatRow) -> None:
    (encoded,) = encode_rows(tokenizer, [row])
    prompt = chat_prompt(tokenizer, row.system, row.user)
    head, tail = encoded.input_ids[: encoded.loss_start], encoded.input_ids[encoded.loss_start :]
    assert head == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tail[-1] == tokenizer.eos_token_id
    assert tail == tokenizer(row.assistant + tokenizer.eos_token)["input_ids"]
    assert encoded.loss_tokens == len(tail)
    assert count_turn_tokens(tokenizer, [row.assistant]) == [len(tail)]


def test_loss_starts_at_the_assistants_first_token():
    check(small.tokenizer(), ROW)


@pytest.mark.parametrize("arm", ARMS)
def test_loss_starts_at_the_assistants_first_token_with_qwen(qwen, arm):
    turn = assistant_turn(ARMS[arm], "Étant ✓ given.", "B")
    check(qwen, ROW._replace(assistant=turn))
    (encoded,) = encode_rows(qwen, [ROW._replace(assistant=turn)])
    whole = qwen.decode(encoded.input_ids[encoded.loss_start :])
    assert whole == turn + qwen.eos_token
    anchor, letter = qwen.convert_tokens_to_ids(["Answer", "ĠB"])
    assert encoded.input_ids[-4:] == [
        anchor,
        qwen.convert_tokens_to_ids(":"),
        letter,
        qwen.eos_token_id,
    ]


def test_a_token_over_the_seam_is_refused(qwen):
    with pytest.raises(SeamError, match="straddles the start of the loss"):
        encode_rows(qwen, [ROW._replace(assistant="\nAnswer: B")])


@pytest.mark.parametrize("scaffold", ["generic_cot", "persona_cot"])
def test_loss_can_start_at_the_answer_line_with_qwen(qwen, scaffold):
    arm = replace(ARMS["generic_cot"], scaffold=SCAFFOLDS[scaffold], loss_on="answer")
    turn = assistant_turn(arm, "Étant ✓ given. Answer is near.", "B")
    (whole,) = encode_rows(qwen, [ROW._replace(assistant=turn)])
    (masked,) = encode_rows(qwen, [ROW._replace(assistant=turn, unscored=unscored(arm, turn))])
    assert masked.input_ids == whole.input_ids
    assert qwen.decode(masked.input_ids[masked.loss_start :]) == f"Answer: B{qwen.eos_token}"
    assert masked.loss_tokens == 4


def test_an_unscored_part_that_is_none_is_refused():
    with pytest.raises(ValueError, match="begins with no 'Because'"):
        encode_rows(small.tokenizer(), [ROW._replace(unscored="Because")])


@pytest.mark.parametrize(
    ("field", "name"),
    [("system", "system prompt"), ("user", "user turn"), ("assistant", "assistant's turn")],
)
def test_a_special_token_in_a_text_is_refused(qwen, field, name):
    text = getattr(ROW, field)
    for tokenizer in (qwen, small.tokenizer()):
        for token in ("<|im_end|>", "<|im_start|>"):
            spoiled = ROW._replace(**{field: f"{text} {token} {text}"})
            with pytest.raises(
                ValueError, match=f"^{name}: the text .* special token '.*{token[2:-2]}"
            ):
                encode_rows(tokenizer, [ROW, spoiled])
        encode_rows(tokenizer, [ROW._replace(**{field: f"{text} <|im_end> {text}"})])


def test_an_empty_batch_is_empty():
    assert encode_rows(small.tokenizer(), []) == []


def test_a_tokenizer_without_an_end_of_turn_is_refused():
    class Endless:
        eos_token = None

    with pytest.raises(ValueError, match="names no eos_token"):
        encode_rows(Endless(), [ROW])
