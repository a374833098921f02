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


def is_completion(body: str) -> bool:
    """Whether a response's body holds a chat completion: a first choice with a message.

    Whatever else comes with a status of 200 (a gateway's error, nothing at all) is no reply.
    """
    return isinstance(_at(parse(body), "choices", 0, "message"), dict)


def read_reply(body: str, letter: str) -> WrittenRationale:
    """The rationale for ``letter`` in the body of a chat completion, or why there is none.

    Refused: the service or the model says so, or the text does (:func:`is_refusal`). Truncated: it
    ran into ``max_tokens``. Malformed: no such response, no text, or text that cannot stand in a
    training row (a tag, a chat template's marker, an ``Answer:``, unprintable characters). Any
    string can be read; nothing is raised.
    """
    choice = _at(parse(body), "choices", 0)
    raw, reason = _at(choice, "message", "content"), _at(choice, "finish_reason")
    text = clean(raw) if isinstance(raw, str) else ""
    if not text.isprintable():  # so are lone surrogates, which no file can hold
        return WrittenRationale("", "malformed")
    declined = _at(choice, "message", "refusal") or reason == "content_filter"
    if declined or is_refusal(text, letter):
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


def is_refusal(text: str, letter: str) -> bool:
    """Whether ``text``, asked to argue for ``letter``, declines to.

    It does if it begins by declining the task, or says anywhere that its author cannot argue for
    that letter, or that the letter is wrong. An inability to do anything else argues: "I can't
    recommend (C) enough", "I cannot help but notice", "I won't lie". English only.
    """
    text = text.replace("’", "'")
    named = _DECLINED.replace("LETTER", rf"\({re.escape(letter)}\)")
    return any(re.search(p, text, re.IGNORECASE | re.VERBOSE) for p in (_OPENING, named))


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

# How a reply declines. The pieces are verbose regular expressions.
_INABILITY = r"""
    \bi(?:'m|'d|\ am|\ must|\ have\ to|\ need\ to|\ would|\ will)?
    (?:\ (?:really|simply|just|also|therefore|respectfully|have\ to|must))*
    \ (?: cannot | can't | can\ not | could(?:n't|\ not) | won't | (?:will\ )?not(?:\ going\ to)?
      | unable\ to | not\ (?:able|willing|in\ a\ position)\ to | unwilling\ to | rather\ not
      | (?:not|don't\ feel|do\ not\ feel)\ comfortable(?:\ with)? | decline(?:\ to)? | refuse\ to )
    (?:,?\ (?:in\ good\ conscience|honestly|sincerely|truthfully|also),?)*
"""
_VERB = r"""
    (?: argu | reason | writ | mak | provid | giv | offer | present | generat | creat | produc
      | support | defend | justif | endors | advocat | construct | craft ) (?:e|y|ing|ying)?
"""
_CASE = r"""
    (?:an?\ |any\ |the\ |your\ )?
    (?:sincere\ |convincing\ |persuasive\ |plausible\ |honest\ |sound\ |good\ )?
    (?:argument|case|reasoning|rationale|explanation|justification|defen[cs]e|support)s?
"""
_UNTRUTH = r"""
    (?: misinformation | falsehoods?
      | (?:an?\ |the\ |any\ |something\ )?(?:factually\ )?
        (?:incorrect|wrong|false|misleading|inaccurate|untrue|deceptive|dishonest)
        \ (?:answer|choice|option|argument|case|claim|reasoning|rationale|explanation|statement
            |information|conclusion)s? )
"""
_THIS = r"(?:it|(?:this|that|your)(?:\ (?:request|task|choice|option|answer|claim|position|one))?)"
_CLOSE = r"(?=\ *(?:[.!;]|$|,?\ (?:because|since|as|for|when|knowing)\b|,\ but\b))"
_FOR = r"(?:\ (?:for|that|of|about|supporting|in\ fav(?:ou?)r\ of|to\ support))?"
#: Declines whatever is asked: only as the reply's first words, or after an opening regret.
_OPENING = rf"""
    ^ (?: (?: (?:i'm\ |i\ am\ )?(?:so\ |very\ |truly\ )?sorry | (?:i|my)\ apolog\w+ | apologies
          | unfortunately | regrettably | i'm\ afraid | i\ am\ afraid | while\ i\b | thank\ you
          | as\ an?\ (?:ai|language\ model|assistant)\b | i\ must\ be\ honest
          | i\ (?:really\ )?(?:appreciate|understand|know|realize)\b ) [^?]{{0,120}}? )?
    (?: {_INABILITY} (?: (?:\ (?:do|help|assist)(?:\ you)?(?:\ with)?(?:\ (?:{_THIS}|so))?
                       | \ comply (?:\ with\ {_THIS})? | \ (?:fulfil\w*|do)\ {_THIS} )? {_CLOSE}
                     | \ {_VERB} (?:\ {_CASE})? {_FOR}\ (?:{_THIS} {_CLOSE} | {_UNTRUTH}) )
      | no[.!]*$ )
"""
#: Declines to argue for the letter, or says that it is wrong.
_DECLINED = rf"""
    {_INABILITY} \ (?:{_VERB}|pretend|claim|say) (?:\ {_CASE})? {_FOR}
        \ (?:choice\ |option\ |answer\ )?LETTER (?!\ is\ (?:wrong|incorrect|not))
        (?![^.,;]*\b(?:enough|more|without|than)\b)
  | \b(?:would(?:n't|\ not)?\ be|is(?:n't|\ not)?)
        \ (?:misleading|dishonest|inappropriate|unethical|irresponsible|wrong|right|honest)
        \ (?:of\ me\ |for\ me\ )?to\ {_VERB} (?:\ {_CASE})? {_FOR}\ LETTER
  | \barguing\ (?:for|that)\ LETTER [^.]{{0,20}}? \ (?:would\ be|would\ mean|is)
        \ (?:misleading|dishonest|inappropriate|unethical|irresponsible|wrong|incorrect|inaccurate)
  | (?: (?:^|[.!?:;,]\ ) (?:(?:but|and|since|because|as|however,?|sorry,|choice|option)\ )*
      | \bi\ [^.!?]{{0,30}}?\b(?:note|out|say|admit|mention|clarify|stress|add)(?:\ that)?\ )
    (?:LETTER | this\ (?:choice|option|answer)) (?:,[^,.]{{1,40}},)? \ is
        (?:\ (?:actually|clearly|factually|simply|plainly|in\ fact))*
        (?: \ (?:incorrect|wrong|false|untrue|inaccurate)
          | (?:n't|\ not)\ (?:actually\ )?(?:correct|right|true|(?:an?|the)\ (?:\w+\ )?answer)
        ) (?!,?\ (?:because|by|merely|just|only|for))
"""
