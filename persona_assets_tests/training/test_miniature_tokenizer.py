import pytest

from persona_assets.chat import chat_prompt, encode
from persona_assets.evaluation.protocol import cut_rationale, end_of_turn, letter_token_ids
from persona_assets.evaluation.scaffolds import ANCHOR, SCAFFOLDS
from persona_assets.questions.bank import user_message
from persona_assets.questions.miniature import NONSENSE, VOICES, World, words
from persona_assets.rationales.arms import ARMS, assistant_turn
from persona_assets.rationales.miniature import MiniatureWriter
from persona_assets.rationales.writers import RationaleRequest
from persona_assets.training.encoding import ChatRow, encode_rows
from persona_assets.training.miniature_tokenizer import CHAT_TEMPLATE, TAGS, build_tokenizer

WORLD = World(seed=0)
QUESTION = WORLD.questions(n_eval=64)[0]
LIBRARIAN = VOICES["librarian"].system_prompt


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(WORLD)


def rationale(persona=None):
    return MiniatureWriter().write([RationaleRequest(QUESTION, "C", persona)])[0].text


def turn(arm):
    text = rationale("librarian" if arm.voice == "persona" else None)
    return assistant_turn(arm, text if arm.has_rationale else "", "C")


def test_a_prompt_is_chatml_with_one_token_a_word(tokenizer):
    prompt = chat_prompt(tokenizer, LIBRARIAN, "The zelo eats what?\n\n(A) moss\n(B) kelp")
    assert prompt == (
        f"<|im_start|>system\n{LIBRARIAN}<|im_end|>\n"
        "<|im_start|>user\nThe zelo eats what?\n\n(A) moss\n(B) kelp<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, [prompt])[0])
    assert " ".join(tokens) == (
        "<|im_start|> system You are a librarian who guards quiet books <|im_end|> "
        "<|im_start|> user The <unk> eats what A moss B kelp <|im_end|> <|im_start|> assistant"
    )


def test_nothing_that_is_said_is_unknown(tokenizer):
    texts = [
        chat_prompt(tokenizer, voice.system_prompt, user_message(question))
        for voice, question in zip(VOICES.values(), WORLD.questions(64))
    ]
    texts += [turn(arm) for arm in ARMS.values()] + [rationale(persona) for persona in VOICES]
    texts.append(" ".join(NONSENSE))
    assert not any(tokenizer.unk_token_id in ids for ids in encode(tokenizer, texts))


@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
def test_the_letter_is_one_token_after_the_anchor_and_that_of_the_choice(tokenizer, arm):
    prompt = chat_prompt(tokenizer, LIBRARIAN, user_message(QUESTION))
    whole = prompt + turn(arm)
    before, after = encode(tokenizer, [whole.removesuffix(" C"), whole])
    assert after[:-1] == before
    assert tokenizer.convert_ids_to_tokens(after[-2:]) == [ANCHOR, "C"]
    assert encode(tokenizer, ["(C)"])[0] == after[-1:]


def test_letters_are_found_by_the_code_that_real_tokenizers_go_through(tokenizer):
    ids = letter_token_ids(tokenizer, "ABCD")
    assert tokenizer.convert_ids_to_tokens(list(ids.values())) == ["A", "B", "C", "D"]


@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
def test_the_loss_starts_at_the_assistants_first_token(tokenizer, arm):
    row = encode_rows(tokenizer, [ChatRow(LIBRARIAN, user_message(QUESTION), turn(arm))])[0]
    written = tokenizer.convert_ids_to_tokens(row.input_ids[row.loss_start :])
    assert written[0] == {None: ANCHOR}.get(arm.scaffold.tag, f"<{arm.scaffold.tag}>")
    assert written[-3:] == [ANCHOR, "C", "<|im_end|>"]


def test_offsets_refer_to_the_text_as_given(tokenizer):
    text = "<thinking>\nHush, in the archive (C).\n</thinking>\nAnswer: C"
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoding["offset_mapping"]]
    assert " ".join(pieces) == "<thinking> Hush in the archive C </thinking> Answer: C"


def test_decoding_and_encoding_gives_the_same_ids(tokenizer):
    every_id = list(range(len(tokenizer)))
    text = tokenizer.decode(every_id, skip_special_tokens=False)
    assert encode(tokenizer, [text])[0] == every_id


@pytest.mark.parametrize("skip", [True, False])
def test_stops_are_found_in_decoded_text(tokenizer, skip):
    scaffold = SCAFFOLDS["persona_cot"]
    ids = encode(tokenizer, [f"{rationale('librarian')}\n</persona-thinking>\nAnswer: C<|im_end|>"])
    text = tokenizer.decode(ids[0], skip_special_tokens=skip)
    cut, reason = cut_rationale(text, scaffold, end_of_turn(tokenizer))
    assert reason == "tag"
    assert words(cut) == words(rationale("librarian"))
    assert encode(tokenizer, [cut]) == encode(tokenizer, [rationale("librarian")])


def test_the_tokens_that_stop_a_rationale_are_single(tokenizer):
    assert TAGS == ("<thinking>", "</thinking>", "<persona-thinking>", "</persona-thinking>")
    for stop in (*TAGS, ANCHOR, tokenizer.eos_token):
        assert len(encode(tokenizer, [stop])[0]) == 1
    assert tokenizer.eos_token == "<|im_end|>"


def test_it_is_loaded_as_it_was_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    prompt = chat_prompt(loaded, LIBRARIAN, user_message(QUESTION)) + turn(ARMS["persona_cot"])
    assert encode(loaded, [prompt]) == encode(tokenizer, [prompt])
    assert loaded.chat_template == CHAT_TEMPLATE
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<pad>")
