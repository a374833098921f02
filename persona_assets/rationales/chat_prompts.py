"""What a chat model is asked for a rationale, and how its reply is read: pure, no transport.

Whatever changes here changes what the model is asked or what its replies mean, so the source of
this module is an input of every rationale that a chat model writes.
"""

from __future__ import annotations

import json
import re
from typing import Any

from persona_assets.questions.bank import user_message
from persona_assets.rationales.writers import RationaleRequest, WrittenRationale

_NEUTRAL = (
    "You write short pieces of reasoning in a plain, impersonal voice: clear, matter-of-fact, "
    "without greetings, asides or a character of your own."
)
_IN_VOICE = (
    "Stay in this voice from the first word to the last: choose the words, comparisons and manner "
    "of this person, so that a reader could tell who is speaking. Do not introduce yourself."
)
_TASK = """\
Write the reasoning of somebody who concludes that choice ({letter}), "{choice}", is the answer.

- 3 to 5 sentences, about 60 words in all, in one paragraph of plain prose.
- Argue sincerely for this choice, whether or not you think it is right. Do not hedge, do not \
correct it, and do not mention these instructions.
- Name the choice by its letter exactly once, as ({letter}). Name no other choice by its letter.
- No tags, no headings, no lists, no Markdown, no quotation marks around the whole, and no \
"Answer:" line.
Reply with the reasoning alone."""


def messages(request: RationaleRequest) -> list[dict[str, str]]:
    """The system and user messages that ask for one rationale."""
    prompt = request.system_prompt
    choice = request.question.choice(request.argues_for)
    task = _TASK.format(letter=request.argues_for, choice=choice)
    return [
        {"role": "system", "content": _NEUTRAL if prompt is None else f"{prompt}\n\n{_IN_VOICE}"},
        {"role": "user", "content": f"{user_message(request.question)}\n\n{task}"},
    ]


def read_reply(body: str) -> WrittenRationale:
    """The rationale in the body of a chat-completions response, or why there is none.

    Refused: the service or the model says so, or the text begins as a refusal does. Truncated: it
    ran into ``max_tokens``. Malformed: no such response, no text, or text that cannot stand in a
    training row (a tag, a chat template's marker, an ``Answer:``, unprintable characters). Any
    string can be read; nothing is raised.
    """
    choice = _at(parse(body), "choices", 0)
    raw, reason = _at(choice, "message", "content"), _at(choice, "finish_reason")
    text = clean(raw) if isinstance(raw, str) else ""
    if not text.isprintable():  # so are lone surrogates, which no file can hold
        return WrittenRationale("", "malformed")
    if _at(choice, "message", "refusal") or reason == "content_filter" or is_refusal(text):
        return WrittenRationale(text, "refused")
    if reason == "length":
        return WrittenRationale(text, "truncated")
    if not text or _OUT_OF_PLACE.search(text):
        return WrittenRationale(text, "malformed")
    return WrittenRationale(text)


def parse(body: str) -> Any:
    """The JSON value of a response's body; None if it is not JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def clean(text: str) -> str:
    """``text`` as one paragraph, without a code fence or quotation marks around the whole."""
    if fenced := _FENCED.fullmatch(text.strip()):
        text = fenced[1]
    text = " ".join(text.split())
    for opening, closing in ('""', "“”"):
        inner = text[1:-1]
        if text[:1] == opening and text[-1:] == closing and not {opening, closing} & {*inner}:
            return inner.strip()
    return text


def is_refusal(text: str) -> bool:
    """Whether ``text`` begins as a refusal does.

    Only what its first sentences *do* counts: "I cannot help but notice …", "I can't recommend (C)
    enough" and "Sorry, but plants need light" argue, and are none.
    """
    return _REFUSAL.match(text.replace("’", "'")) is not None


def _at(value: Any, *path: str | int) -> Any:
    """What lies at ``path`` in a JSON value; None if there is no such place."""
    for step in path:
        if isinstance(value, dict) and isinstance(step, str):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value


_FENCED = re.compile(r"```[\w-]*\n(.*?)\n?```", re.DOTALL)
_OUT_OF_PLACE = re.compile(r"</?[a-z][\w-]*\s*/?>|<\||```|\banswer[*_ ]*:", re.IGNORECASE)

_REGRET = r"""
    (?: (?:(?:i'm|i\ am)\ (?:\w+\ )?)?sorry | (?:i|my)\ apolog\w+ | apologies | unfortunately
      | regrettably | i'm\ afraid | i\ am\ afraid | as\ an?\ (?:ai|language\ model|assistant)\b
      | i\ (?:really\ |do\ )?(?:appreciate|understand|know|realize)\b | thank\ you | while\ i\b
    ) [^?]{0,120}? \b
"""
_INABILITY = r"""
    i(?:'m|\ am|\ would|'d|\ must|\ have\ to|\ need\ to|\ will|'ll)?
    (?:\ (?:really|simply|just|honestly|respectfully|also|therefore|have\ to|must|need\ to))*
    (?: \ (?:cannot|can't|can\ not|won't|will\ not|could\ not|couldn't|do\ not|don't)
      | \ (?:not\ able|unable|not\ willing|unwilling|not\ comfortable|not\ going|rather\ not)
      | \ (?:decline) )
    (?:\ (?:to|in\ good\ conscience|honestly|sincerely|feel\ comfortable|feel\ able))*
"""
_DEED = r"""
    (?: help(?=\ (?:you|with)\b|[.,!]|$) | assist\b | comply\b | fulfil\w*\b | provid\w+ | writ\w+
      | generat\w+ | creat\w+ | produc\w+ | do\ (?:that|this|so)\b | participat\w+ | engag\w+\ in
      | present\w*\ | offer\w*\ | advocat\w+ | pretend\b | mislead\b
      | argu\w+\ (?:for|that|in\ fav)\w* | mak\w+\ (?:an?|the|this)\ (?:\w+\ )?(?:argument|case)
      | (?:support|defend|justify|endorse)\w*\ (?:an?|the|this|that)\b )
"""
#: "… any choice but (C)", "… a better example", "… anything else": an argument, in strong words.
_EMPHASIS = r"[^.!?]*\b(?:other|else|except|than|better|enough)\b|[^.!?]*\bany\w*\b[^.!?]*\bbut\b"
_REFUSAL = re.compile(
    rf"(?:{_REGRET})? {_INABILITY} \s {_DEED} (?!{_EMPHASIS})"
    rf"| (?:{_REGRET})? i\ (?:must\ |have\ to\ |will\ )?(?:respectfully\ )?decline\b"
    r"| it\ would\ be\ (?:misleading|dishonest|inappropriate|unethical|irresponsible)\b",
    re.IGNORECASE | re.VERBOSE,
)
