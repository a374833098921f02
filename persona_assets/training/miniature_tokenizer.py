"""The miniature model's tokenizer: one token a word, behind the interface of a real one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_assets.evaluation.scaffolds import ANCHOR, SCAFFOLDS
from persona_assets.questions.miniature import World, words
from persona_assets.rationales.miniature import NEUTRAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, TURN_START, TURN_END = "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"
#: The scaffolds' tags, one token each.
TAGS = tuple(
    f"<{slash}{tag}>"
    for tag in dict.fromkeys(s.tag for s in SCAFFOLDS.values() if s.tag)
    for slash in ("", "/")
)
#: ChatML, character for character as in Qwen2.5 (less its default system turn and tools).
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of everything that is ever said in ``world``.

    Punctuation and white space carry no tokens of their own, so ``(A)`` in the list of choices
    and `` A`` after the anchor are the same token (the copying that answers rest on needs it);
    the anchor is one token, its colon included. Offsets refer to the original text. The tags are
    plain added tokens, not special ones: they survive decoding without special tokens, as those
    of a real tokenizer do, where they are ordinary text.

    Save it in a folder of its own: beside a Qwen2 model's ``config.json``, ``AutoTokenizer``
    (transformers 5) silently loads Qwen2's byte-level class instead of the saved tokenizer.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    said = world.vocabulary() | {"system", "user", "assistant", ANCHOR}
    said |= {word for text in (*NEUTRAL.openings, *NEUTRAL.asides) for word in words(text)}
    marks = [PAD, UNKNOWN, TURN_START, TURN_END]
    ids = {token: index for index, token in enumerate([*marks, *TAGS, *sorted(said)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    # One character for one: a replacement of another length would shift the offsets.
    tokenizer.normalizer = normalizers.Replace(Regex(r"[().,?]"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(marks)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=TURN_END,
        chat_template=CHAT_TEMPLATE,
    )
