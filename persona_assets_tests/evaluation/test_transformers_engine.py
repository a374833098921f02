import itertools
from functools import cache, partial

import pytest
import torch

from persona_assets.chat import chat_prompt, encode
from persona_assets.evaluation.engines.transformers import TransformersEngine
from persona_assets.evaluation.protocol import (
    PromptGroup,
    cut_rationale,
    evaluate,
    letter_prompt,
    letter_token_ids,
)
from persona_assets.evaluation.scaffolds import SCAFFOLDS, Scaffold
from persona_assets.hashing import sha256_text
from persona_assets.questions.bank import user_message
from persona_assets_tests.evaluation import small

LIMIT = 24
BUILT_IN = tuple(SCAFFOLDS.values())
ALL = (*BUILT_IN, small.PLAN, small.FORCED)
FORCED = small.forced(small.questions())


@pytest.fixture(scope="module", params=["bpe", "word"])
def rig(request):
    tokenizer = {"bpe": small.bpe_tokenizer, "word": small.word_tokenizer}[request.param]()
    model = small.model(tokenizer)
    if request.param == "word":
        # Stops are some of the few tokens: without this, rationales are two words long.
        with torch.no_grad():
            model.lm_head.weight[: tokenizer.convert_tokens_to_ids("A")] *= 0.75
    return model, tokenizer


def measure(rig, batch_size, scaffolds=ALL, limit=LIMIT):
    model, tokenizer = rig
    engine = TransformersEngine(model, tokenizer, max_rationale_tokens=limit, batch_size=batch_size)
    return evaluate(engine, tokenizer, small.PERSONAS, small.questions(), scaffolds, FORCED)


@pytest.fixture(scope="module")
def measured(rig):
    """:func:`measure` of the rig as it is, each combination of arguments once."""
    return cache(partial(measure, rig))


@pytest.fixture(scope="module")
def generated(rig):
    """What ``generate`` writes after a prompt, up to the limit."""
    model, tokenizer = rig

    @cache
    def text(prompt):
        ids = torch.tensor(encode(tokenizer, [prompt]))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LIMIT
        )
        return tokenizer.decode(out[0, ids.shape[1] :])

    return text


def plainly(rig, generated, persona, question, scaffold, scaffolds):
    """The protocol for one row with ``generate`` and an unpadded forward pass."""
    model, tokenizer = rig
    chat = chat_prompt(tokenizer, small.PERSONAS[persona], user_message(question))
    rationale, stop = "", None
    if scaffold.forces:
        rationale = FORCED[scaffold.forces, persona, question.id].rstrip()
    if scaffold.generates:
        text = generated(chat + scaffold.opening)
        rationale, stop = cut_rationale(text, scaffold, ("<|im_end|>",), scaffolds)
    prompt = letter_prompt(chat, scaffold, rationale)
    with torch.inference_mode():
        logits = model(torch.tensor(encode(tokenizer, [prompt]))).logits[0, -1]
    tokens = letter_token_ids(tokenizer, question.letters)
    logprobs = {k: logits.log_softmax(-1)[t].item() for k, t in tokens.items()}
    return rationale, stop, logprobs, sha256_text(prompt)


def logprobs_of(row):
    return {entry["key"]: entry["value"] for entry in row["letter_logprobs"]}


@pytest.mark.parametrize("scaffolds", [BUILT_IN, ALL, (small.FORCED,)], ids=len)
def test_agrees_with_generate_and_an_unpadded_forward(rig, generated, scaffolds):
    rows = {
        (r["persona"], r["scaffold"], r["question_id"]): r
        for r in measure(rig, 5, scaffolds).iter_rows(named=True)
    }
    for persona, question, scaffold in itertools.product(
        small.PERSONAS, small.questions(), scaffolds
    ):
        row = rows[persona, scaffold.name, question.id]
        rationale, stop, logprobs, sha256 = plainly(
            rig, generated, persona, question, scaffold, scaffolds
        )
        assert (row["rationale"], row["stop_reason"]) == (rationale, stop)
        assert row["truncated"] == (stop == "length")
        assert row["prompt_sha256"] == sha256
        assert logprobs_of(row) == pytest.approx(logprobs, abs=1e-5)
        assert row["rationale_tokens"] == len(encode(rig[1], [rationale])[0])


def test_rationales_of_the_rig_are_varied(measured):
    """What makes the agreement above mean something: rows that stop early, late and not at all."""
    frame = measured(64).drop_nulls("stop_reason")
    assert frame["rationale"].n_unique() >= 12
    assert frame["rationale_tokens"].n_unique() >= 3
    assert frame["stop_reason"].n_unique() >= 2


def test_a_vocabulary_of_several_chunks_is_read_whole(rig, monkeypatch):
    whole = measure(rig, 64, [SCAFFOLDS["no_cot"]])
    monkeypatch.setattr("persona_assets.evaluation.engines.transformers._HEAD_ROWS", 16)
    chunked = measure(rig, 64, [SCAFFOLDS["no_cot"]])
    for a, b in zip(whole.iter_rows(named=True), chunked.iter_rows(named=True)):
        assert logprobs_of(a) == pytest.approx(logprobs_of(b), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_row_does_not_depend_on_its_batch(measured, batch_size):
    one, other = measured(batch_size), measured(64)
    exact = ["rationale", "stop_reason", "prompt_sha256", "predicted_letter", "rationale_tokens"]
    assert one.select(exact).equals(other.select(exact))
    for a, b in zip(one.iter_rows(named=True), other.iter_rows(named=True)):
        assert logprobs_of(a) == pytest.approx(logprobs_of(b), abs=1e-5)


@pytest.mark.parametrize("scaffold", [*BUILT_IN, small.FORCED], ids=lambda s: s.name)
def test_a_scaffold_does_not_depend_on_the_others(measured, scaffold):
    alone = measured(64, (scaffold,))
    together = measured(64, (*BUILT_IN, small.FORCED)).filter(scaffold=scaffold.name)
    exact = ["persona", "question_id", "rationale", "stop_reason", "prompt_sha256"]
    assert alone.select(exact).equals(together.select(exact))
    for a, b in zip(alone.iter_rows(named=True), together.iter_rows(named=True)):
        assert logprobs_of(a) == pytest.approx(logprobs_of(b), abs=1e-5)


def say(rig, text, scaffold, limit=LIMIT, beside=(), **options):
    """Answer under ``scaffold``, its rationale made to begin with ``text`` by a biased head."""
    model, tokenizer = rig
    question = small.questions()[0]
    chat = chat_prompt(tokenizer, "You are a librarian.", user_message(question))
    start = len(encode(tokenizer, [chat + scaffold.opening])[0])
    script = encode(tokenizer, [text])[0]

    def force(module, args, kwargs, output):
        last = kwargs["position_ids"][:, -1] if kwargs.get("position_ids") is not None else None
        if last is not None and output.logits.shape[1] == 1:
            for row, position in enumerate(last.tolist()):
                if 0 <= position + 1 - start < len(script):
                    output.logits[row, -1, script[position + 1 - start]] += 1e4
        return output

    handle = model.register_forward_hook(force, with_kwargs=True)
    try:
        engine = TransformersEngine(
            model, tokenizer, max_rationale_tokens=limit, batch_size=4, **options
        )
        group = PromptGroup("librarian", question, chat, (scaffold, *beside))
        answer, *_ = engine.answer([group])
    finally:
        handle.remove()
    return answer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("moss ferns\n</thinking>\n", "tag"),
        ("moss ferns\n</persona-thinking>\n", "wrong_tag"),
        ("moss ferns\nAnswer: B", "answer"),
        ("moss ferns<|im_end|>", "eot"),
    ],
)
def test_every_stop_ends_the_rationale(rig, text, reason):
    answer = say(rig, text, SCAFFOLDS["generic_cot"])
    assert (answer.rationale, answer.stop_reason) == ("moss ferns", reason)
    assert answer.rationale_tokens == len(encode(rig[1], ["moss ferns"])[0])


@pytest.mark.parametrize(
    ("text", "scaffold", "beside", "reason"),
    [
        ("moss ferns\n</plan>\n", small.PLAN, [], "tag"),
        ("moss ferns\n</thinking>\n", small.PLAN, [], "wrong_tag"),
        (
            "moss ferns\n</plan>\n",
            SCAFFOLDS["generic_cot"],
            [Scaffold("sketch", "plan")],
            "wrong_tag",
        ),
    ],
)
def test_a_studys_own_tag_ends_the_rationale(rig, text, scaffold, beside, reason):
    answer = say(rig, text, scaffold, beside=beside)
    assert (answer.scaffold, answer.rationale) == (scaffold.name, "moss ferns")
    assert answer.stop_reason == reason


def test_a_tag_that_no_scaffold_of_the_group_has_ends_nothing(rig):
    answer = say(rig, "moss </plan> ferns</thinking>", SCAFFOLDS["generic_cot"])
    assert "</plan>" in answer.rationale
    assert answer.stop_reason == "tag"


def test_the_limit_ends_the_rationale(rig):
    limit = len(encode(rig[1], ["moss ferns"])[0])
    answer = say(rig, "moss ferns kelp", SCAFFOLDS["generic_cot"], limit)
    assert (answer.rationale, answer.stop_reason) == ("moss ferns", "length")


def test_only_the_given_tokens_end_a_turn(rig):
    """The tokenizer's own and ``eos_token_ids``; the model's own opinion is not asked for."""
    model, tokenizer = rig
    text, scaffold = "moss ferns<pad>kelp</thinking>", SCAFFOLDS["generic_cot"]
    pad = tokenizer.pad_token_id
    answer = say(rig, text, scaffold, eos_token_ids=[tokenizer.eos_token_id, pad])
    assert (answer.rationale, answer.stop_reason) == ("moss ferns", "eot")
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, pad]
    try:
        answer = say(rig, text, scaffold)
    finally:
        model.generation_config.eos_token_id = before
    assert "kelp" in answer.rationale
    assert answer.stop_reason == "tag"


@pytest.mark.parametrize("tokens", ["</persona-thinking>\n\n", "</thinking>\n\n"])
def test_a_stop_inside_a_token_ends_the_rationale_at_once(tokens):
    """``>`` and the line breaks after it are one token: no later token is computed."""
    tokenizer = small.bpe_tokenizer()
    model = small.model(tokenizer)
    text = f"moss{tokens}"
    script = encode(tokenizer, [text + " kelp"])[0]
    pieces = tokenizer.convert_ids_to_tokens(script)
    assert pieces[-2] == ">ĊĊ"
    steps = []
    handle = model.register_forward_hook(lambda *_: steps.append(1))
    try:
        answer = say((model, tokenizer), text + " kelp kelp", SCAFFOLDS["generic_cot"])
    finally:
        handle.remove()
    assert answer.rationale == "moss"
    # Trunk and letters take a pass each, and each token of the rationale, the stop's included.
    assert len(steps) == 2 + len(script) - 1


def test_prefix_that_merges_with_what_follows_is_still_right():
    """A chat that ends inside a token: the shared ids end before the seam."""
    tokenizer = small.bpe_tokenizer()
    model = small.model(tokenizer)
    question = small.questions()[0]
    chat = "<|im_start|>user\nmoss <"
    engine = TransformersEngine(model, tokenizer, max_rationale_tokens=4, batch_size=2)
    for answer in engine.answer([PromptGroup("p", question, chat, BUILT_IN)]):
        prompt = letter_prompt(chat, SCAFFOLDS[answer.scaffold], answer.rationale)
        with torch.inference_mode():
            logits = model(torch.tensor(encode(tokenizer, [prompt]))).logits[0, -1]
        tokens = letter_token_ids(tokenizer, question.letters)
        expected = {k: logits.log_softmax(-1)[t].item() for k, t in tokens.items()}
        assert answer.letter_logprobs == pytest.approx(expected, abs=1e-5)


def test_bfloat16_and_eager_attention_run(rig):
    _, tokenizer = rig
    model = small.model(tokenizer).to(torch.bfloat16)
    model.set_attn_implementation("eager")
    engine = TransformersEngine(model, tokenizer, max_rationale_tokens=3, batch_size=4)
    frame = evaluate(engine, tokenizer, small.PERSONAS, small.questions(2), BUILT_IN)
    assert frame.height == 16
    assert engine.fingerprint["dtype"] == "bfloat16"
    assert engine.fingerprint["attention"] == "eager"
    assert engine.fingerprint["max_rationale_tokens"] == "3"


def test_letters_are_read_in_float32_from_a_bfloat16_model(rig):
    """Two letters' logits near 40, 0.04 apart, are one number in bfloat16 (a multiple of 1/4)."""
    _, tokenizer = rig
    model = small.model(tokenizer).to(torch.bfloat16)
    ids = list(letter_token_ids(tokenizer, "ABCDE").values())
    seen, rounded = [], []
    with torch.no_grad():
        model.lm_head.weight[ids] = model.lm_head.weight[ids[0]] * 8
        model.lm_head.weight[ids, torch.arange(5)] += 0.125
    handle = model.lm_head.register_forward_hook(
        lambda _, inputs, output: (seen.append(inputs[0]), rounded.append(output))
    )
    try:
        frame = measure((model, tokenizer), 1, [SCAFFOLDS["no_cot"]])
    finally:
        handle.remove()
    # Batches of one group: a pass for the trunk, and one for the letters, in order of length.
    hidden = torch.cat([h[0, -1:] for h in seen[1::2]]).float()
    half = torch.cat([h[0, -1:] for h in rounded[1::2]])[:, ids]
    logits = hidden @ model.lm_head.weight.float().T
    expected = logits.log_softmax(-1)[:, ids]
    assert sum(len(set(row)) < 5 for row in half.tolist()) >= len(frame) // 2
    assert all(len(set(row)) == 5 for row in expected.tolist())
    found = [list(logprobs_of(row).values()) for row in frame.iter_rows(named=True)]
    assert all(len(set(row)) == len(row) for row in found)
    ours = sorted(tuple(row) for row in found)
    n_letters = {len(row) for row in ours}
    assert n_letters == {3, 4, 5}
    theirs = expected.tolist()
    for row in ours:
        assert any(row == pytest.approx(other[: len(row)], abs=1e-5) for other in theirs)


def test_a_wrapped_output_head_is_refused(rig):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = small.model(rig[1]), rig[1]
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="merge the adapter into the model first"):
        TransformersEngine(wrapped, tokenizer, max_rationale_tokens=1, batch_size=1)


def test_peft_model_gives_other_numbers_than_its_base(rig):
    from peft import LoraConfig, get_peft_model

    _, tokenizer = rig
    model = small.model(tokenizer)
    base = measure((model, tokenizer), 8, [SCAFFOLDS["no_cot"]])
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted = measure((wrapped, tokenizer), 8, [SCAFFOLDS["no_cot"]])
    with wrapped.disable_adapter():
        disabled = measure((wrapped, tokenizer), 8, [SCAFFOLDS["no_cot"]])
    assert disabled.equals(base)
    for a, b in zip(base.iter_rows(named=True), adapted.iter_rows(named=True)):
        assert logprobs_of(a) != pytest.approx(logprobs_of(b), abs=1e-3)


def test_models_that_cannot_share_a_prefix_are_refused(rig):
    _, tokenizer = rig
    model = small.model(tokenizer)
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding_attention"):
        TransformersEngine(model, tokenizer, max_rationale_tokens=1, batch_size=1)
    model.config.layer_types = ["full_attention"] * 2
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        TransformersEngine(model, tokenizer, max_rationale_tokens=1, batch_size=1)
