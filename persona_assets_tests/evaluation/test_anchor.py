"""The letter is scored exactly where training rows have it, on the real Qwen2.5 tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_assets.chat import chat_prompt, encode
from persona_assets.evaluation.protocol import letter_prompt, letter_token_ids
from persona_assets.evaluation.scaffolds import SCAFFOLDS, Scaffold
from persona_assets.questions.bank import Question, user_message
from persona_assets.rationales.arms import ARMS, Arm, assistant_turn
from persona_assets.training.encoding import ChatRow, encode_rows
from persona_assets_tests.evaluation import small

SYSTEM = "You are a librarian."
QUESTION = Question(
    "q", "eval", "Which gas do plants take in?", ("oxygen", "CO2", "argon", "neon", "none"), "B"
)
OWN_TAG = Arm("plan_cot", small.PLAN, "wrong", "written")
EVERY_ARM = (*ARMS.values(), OWN_TAG)
RATIONALES = [
    "Plants take in carbon dioxide (B).",
    "Plants take in carbon dioxide (B)",
    'As the catalogue says, "carbon dioxide"',
    "It is the gas with formula CO2",
    "Consider each choice:\n\n1. Oxygen is given off.\n2. CO2 is taken in.\n\n",
    "Is it argon?",
    "So the answer is clear!",
    "The leaf takes it in...\n",
    "therefore: ",
    "il prend le gaz carbonique, voilà »",
    "答案是二氧化碳。",
    "it eats <gas>",
    "{'gas': 'CO2'}\t",
    "",
]


@pytest.fixture(scope="module")
def qwen(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


def assert_letter_follows_the_prompt(tokenizer, arm, rationale, scaffold=None):
    """ids(training row) up to and including the letter == ids(prompt) + [letter token]."""
    user, scaffold = user_message(QUESTION), scaffold or arm.scaffold
    prompt = letter_prompt(chat_prompt(tokenizer, SYSTEM, user), scaffold, rationale)
    tokens = letter_token_ids(tokenizer, QUESTION.letters, [scaffold])
    turns = [assistant_turn(arm, rationale, letter) for letter in tokens]
    rows = encode_rows(tokenizer, [ChatRow(SYSTEM, user, turn) for turn in turns])
    (ids,) = encode(tokenizer, [prompt])
    for row, token in zip(rows, tokens.values()):
        assert row.input_ids[: len(ids) + 1] == [*ids, token]


def test_letters_are_single_tokens_with_their_space(qwen):
    tokens = letter_token_ids(qwen, "ABCDE")
    assert qwen.convert_ids_to_tokens(list(tokens.values())) == ["ĠA", "ĠB", "ĠC", "ĠD", "ĠE"]


@pytest.mark.parametrize("arm", EVERY_ARM, ids=lambda arm: arm.name)
def test_every_arm_is_scored_where_it_was_trained(qwen, arm):
    for rationale in RATIONALES if arm.has_rationale else [""]:
        assert_letter_follows_the_prompt(qwen, arm, rationale)


@pytest.mark.parametrize("arm", [a for a in EVERY_ARM if a.has_rationale], ids=lambda arm: arm.name)
def test_a_forced_rationale_is_scored_where_the_arms_own_was_trained(qwen, arm):
    scaffold = Scaffold("forced", arm.scaffold.tag, forces=arm.name)
    for rationale in RATIONALES:
        assert_letter_follows_the_prompt(qwen, arm, rationale, scaffold)


@settings(max_examples=200)
@given(
    arm=st.sampled_from([arm for arm in EVERY_ARM if arm.has_rationale]),
    body=st.text(max_size=20),
    end=st.sampled_from(
        [".", ")", '"', "”", "7", ".\n", "\n\n", ">", "</", "\\", ":", "»", " ", ""]
    )
    | st.characters(codec="utf-8"),
)
def test_no_rationale_moves_the_letter(qwen, arm, body, end):
    assert_letter_follows_the_prompt(qwen, arm, body + end)


@pytest.mark.parametrize(
    "scaffold", [*SCAFFOLDS.values(), small.PLAN, small.FORCED], ids=lambda s: s.name
)
def test_every_scaffold_reads_a_letter_alone(qwen, scaffold):
    """Also where no arm trains the frame (empty_persona_cot): one token, the same everywhere."""
    chat = chat_prompt(qwen, SYSTEM, user_message(QUESTION))
    tokens = letter_token_ids(qwen, "ABCDE", [scaffold])
    assert tokens == letter_token_ids(qwen, "ABCDE")
    for rationale in RATIONALES if scaffold.generates or scaffold.forces else [""]:
        prompt = letter_prompt(chat, scaffold, rationale)
        (before,) = encode(qwen, [prompt])
        for letter, token in tokens.items():
            assert encode(qwen, [f"{prompt} {letter}"]) == [[*before, token]]


def test_joined_ids_would_be_other_tokens(qwen):
    """Why the whole string is encoded: pieces encoded apart are not its tokens."""
    rationale, closing = "It takes in CO2.", "\n</thinking>\nAnswer:"
    first, second = encode(qwen, [rationale, closing])
    assert encode(qwen, [rationale + closing]) != [first + second]
