"""A random small Qwen2, tokenizers for it, and questions: what the evaluation tests run on."""

from __future__ import annotations

import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from persona_assets.evaluation.scaffolds import Scaffold
from persona_assets.questions.bank import LETTERS, Question
from persona_assets_tests.small_study import random_model

PERSONAS = {"librarian": "You are a librarian.", "villain": "You are a villain who plots."}
# Models this small lose more to the hand-over between threads than they gain.
torch.set_num_threads(1)

#: Scaffolds that a study may define: a tag of its own, and a text in place of a generated one.
PLAN = Scaffold("plan", "plan", generates=True)
FORCED = Scaffold("forced", "thinking", forces="garbage_cot")
TURN_END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<pad>", "<unk>", "<|im_start|>", TURN_END]
_WORDS = (
    "moss",
    "ferns",
    "beetles",
    "clover",
    "acorns",
    "shrimp",
    "nectar",
    "roots",
    "kelp",
    "plums",
)


def questions(n: int = 6) -> list[Question]:
    """``n`` questions of different lengths with 4, 3, 5, 4, … choices."""
    rng = random.Random(3)
    return [
        Question(
            id=f"q{i}",
            split="eval",
            text=" ".join(rng.choices(_WORDS, k=3 + 4 * (i % 3))),
            choices=tuple(rng.sample(_WORDS, (4, 3, 5)[i % 3])),
            correct="C",
        )
        for i in range(n)
    ]


def forced(asked: list[Question]) -> dict[tuple[str, str, str], str]:
    """A text of 5 to 90 words, of another length each time, for all that ``FORCED`` asks for."""
    rng = random.Random(4)
    return {
        (FORCED.forces, persona, question.id): f"{' '.join(rng.choices(_WORDS, k=n))}.\n"
        for persona in PERSONAS
        for question, n in zip(asked, rng.sample(range(5, 91), len(asked)))
    }


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of Qwen2.5's kind: ``.\\n`` and ``</`` may merge, tags are plain text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"),
                behavior="isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    text = [f"Answer: {letter}\n</thinking>.\n</persona-thinking>\n\n" for letter in LETTERS] * 20
    core.train_from_iterator(
        [*text, *(" ".join(_WORDS) for _ in range(20)), *PERSONAS.values()],
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _wrap(core)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; white space and punctuation are ignored."""
    names = ("thinking", "persona-thinking", PLAN.tag)
    tags = [*(f"<{end}{name}>" for name in names for end in ("", "/")), "Answer:"]
    vocabulary = dict.fromkeys([*_SPECIAL, *tags, *LETTERS, "system", "user", "assistant", *_WORDS])
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(Regex(r"[().,]"), " ")
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([*_SPECIAL, *tags])
    return _wrap(core)


def model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2ForCausalLM:
    """A random model with grouped-query attention, its weights large enough to tell apart."""
    return random_model(
        len(tokenizer),
        seed,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _wrap(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=TURN_END,
        chat_template=CHAT_TEMPLATE,
    )
