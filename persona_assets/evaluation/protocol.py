"""The rationale-then-letter protocol: what is asked of an engine, and what is made of its answers.

1. The prompt is the chat template applied to (persona's system prompt, question), plus the
   scaffold's opening.
2. Under a generating scaffold the model writes a rationale, greedily, until a stop (see
   :data:`StopReason`); under a content-forcing one a given text takes its place.
3. The stop text is dropped, the rationale right-stripped, the scaffold closed, and the *whole
   string*, which ends in ``Answer:``, is encoded once. The prediction is the question's own letter
   with the highest next-token log-probability (:func:`predict`).

Nothing here knows how a model is run: an engine that holds a model, one that drives vLLM in
process and one that talks to a server answer the same :class:`PromptGroup`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

import polars as pl

from persona_assets.chat import chat_prompt, encode, refuse_special_tokens
from persona_assets.evaluation.outcomes import MEASURED
from persona_assets.evaluation.scaffolds import ANCHOR, SCAFFOLDS, Scaffold
from persona_assets.questions.bank import Question, user_message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Why a rationale ended: the scaffold's own closing tag, another scaffold's, the answer's anchor,
#: the end of the turn, or the token limit (a *truncated* rationale).
StopReason = Literal["tag", "wrong_tag", "answer", "eot", "length"]


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """One persona asked one question under several scaffolds.

    The scaffolds come together because their prompts share a long prefix, which an engine computes
    once.

    Attributes:
        persona: The persona's key.
        question: The question.
        chat: The prompt up to where the assistant's turn begins (``chat.chat_prompt``).
        scaffolds: The scaffolds to answer under.
        forced: The rationale, right-stripped, of each arm that one of the scaffolds forces.
    """

    persona: str
    question: Question
    chat: str
    scaffolds: tuple[Scaffold, ...]
    forced: Mapping[str, str] = field(default_factory=dict)

    def given_rationale(self, scaffold: Scaffold) -> str:
        """What stands in the tag without being generated: the forced text, or nothing."""
        return self.forced[scaffold.forces] if scaffold.forces else ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was measured for one persona, scaffold and question.

    Attributes:
        persona: The persona's key.
        scaffold: The scaffold's key.
        question_id: The question's id.
        rationale: The rationale as it stands in the prompt, generated or forced; else empty.
        rationale_tokens: Tokens of ``rationale`` encoded by itself.
        stop_reason: Why generation ended; None where nothing is generated.
        letter_logprobs: Full-vocabulary next-token log-probability in nats, at temperature 1, of
            each of the question's own letters.
        prompt_sha256: Hash of the whole string whose next token was scored.
    """

    persona: str
    scaffold: str
    question_id: str
    rationale: str
    rationale_tokens: int
    stop_reason: StopReason | None
    letter_logprobs: dict[str, float]
    prompt_sha256: str


class Engine(Protocol):
    """Runs a model over prompt groups."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the numbers may depend on: engine, versions, dtype, device, token limit."""
        ...

    def answer(self, groups: Sequence[PromptGroup]) -> Iterator[Answer]:
        """One answer a group and scaffold, in any order, each as soon as it is known."""
        ...


def end_of_turn_ids(folder: Path) -> tuple[int, ...]:
    """The ids at which a model's authors end generation: those of its files.

    Read once, from the study's base model, and given to the engine of every checkpoint: what ends
    a rationale must not differ between them.

    Args:
        folder: A model's folder; its ``generation_config.json`` goes before its ``config.json``.

    Returns:
        None or more token ids.

    Raises:
        ValueError: ``eos_token_id`` is neither an id, nor a list of ids, nor null.
    """
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.is_file() else None
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(i) is int for i in ids):
            raise ValueError(f"{path}: eos_token_id: found {found}, expected token ids")
        if ids:
            return tuple(ids)
    return ()


def end_of_turn(
    tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int] = ()
) -> tuple[str, ...]:
    """The texts that end a turn: the tokenizer's end-of-sequence token and ``eos_token_ids``'."""
    ids = dict.fromkeys([tokenizer.eos_token_id, *eos_token_ids])
    return tuple(tokenizer.decode([i]) for i in ids if i is not None)


def closing_tags(scaffolds: Iterable[Scaffold] = ()) -> tuple[str, ...]:
    """The closing tags of the built-in scaffolds and of ``scaffolds``, each once."""
    known = (*SCAFFOLDS.values(), *scaffolds)
    return tuple(dict.fromkeys(scaffold.closing_tag for scaffold in known if scaffold.tag))


def stop_strings(end_of_turn: Sequence[str], scaffolds: Iterable[Scaffold] = ()) -> tuple[str, ...]:
    """Every text that ends a rationale where ``scaffolds`` are evaluated, under each of them."""
    return (*closing_tags(scaffolds), ANCHOR, *end_of_turn)


def cut_rationale(
    text: str,
    scaffold: Scaffold,
    end_of_turn: Sequence[str],
    scaffolds: Iterable[Scaffold] = (),
) -> tuple[str, StopReason]:
    """Cut generated ``text`` at the first stop in it.

    Args:
        text: The generated tokens as text, special tokens included.
        scaffold: The scaffold it was generated under.
        end_of_turn: The texts that end a turn (see :func:`end_of_turn`).
        scaffolds: The scaffolds evaluated beside it: their closing tags are stops as well, like
            those of the built-in ones.

    Returns:
        The text before the stop, right-stripped, and the reason; ``length`` if there is no stop.
    """
    stops = stop_strings(end_of_turn, (scaffold, *scaffolds))
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return text.rstrip(), "length"
    at, stop = min(found)
    return text[:at].rstrip(), _stop_reason(stop, scaffold, end_of_turn)


def _stop_reason(stop: str, scaffold: Scaffold, end_of_turn: Sequence[str]) -> StopReason:
    if stop == scaffold.closing_tag:
        return "tag"
    if stop == ANCHOR:
        return "answer"
    return "eot" if stop in end_of_turn else "wrong_tag"


def letter_prompt(chat: str, scaffold: Scaffold, rationale: str = "") -> str:
    """The whole string whose next token is the letter; it ends exactly in ``Answer:``."""
    return chat + scaffold.opening + scaffold.close(rationale)


def letter_token_ids(
    tokenizer: PreTrainedTokenizerBase, letters: str, scaffolds: Iterable[Scaffold] = ()
) -> dict[str, int]:
    """The token that each letter is, after ``Answer:``, in training rows and prompts alike.

    Found by encoding the whole string with and without the letter, under every built-in scaffold
    and each of ``scaffolds``: the one must be the other plus exactly one token.

    Raises:
        ValueError: a letter is not one token of its own there; names tokenizer and letter.
    """
    known = (*SCAFFOLDS.values(), *scaffolds)
    stems = list(dict.fromkeys(letter_prompt("", scaffold) for scaffold in known))
    stem_ids = encode(tokenizer, stems)
    tokens = {}
    for letter in letters:
        texts = [f"{stem} {letter}" for stem in stems]
        for text, before, whole in zip(texts, stem_ids, encode(tokenizer, texts)):
            token = whole[-1] if whole[:-1] == before else None
            if token in (None, tokenizer.unk_token_id) or tokens.setdefault(letter, token) != token:
                raise ValueError(
                    f"tokenizer {tokenizer.name_or_path!r}: {text!r} is not {text[:-2]!r} plus one "
                    f"token for {letter!r} (ids {before} and {whole}), so its log-probability "
                    "cannot be read. Use a tokenizer that knows the letter and splits before it."
                )
    if len(set(tokens.values())) != len(tokens):
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} gives two letters one token: {tokens}. "
            "Use a tokenizer that tells them apart."
        )
    return tokens


def predict(letter_logprobs: Mapping[str, float]) -> str:
    """The letter with the highest log-probability; ties go to the first letter."""
    return max(sorted(letter_logprobs), key=letter_logprobs.__getitem__)


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    personas: Mapping[str, str],
    questions: Sequence[Question],
    scaffolds: Sequence[Scaffold],
    forced: Mapping[tuple[str, str, str], str] = MappingProxyType({}),
) -> pl.DataFrame:
    """Ask every question of every persona under every scaffold.

    Args:
        engine: Runs the model.
        tokenizer: The model's, for its chat template.
        personas: System prompt of each persona.
        questions: The evaluation questions; ids unique.
        scaffolds: The scaffolds.
        forced: The rationales that content-forcing scaffolds put in their tag, by (arm, persona,
            question id).

    Returns:
        One row a persona × scaffold × question, in the order of the arguments, with the columns
        ``outcomes.MEASURED``.

    Raises:
        ValueError: before anything is computed: a text to force is missing, or a text holds a
            special token of the chat template; afterwards: the engine's answers are not exactly
            that grid, an answer's letters are not its question's own, or a log-probability is not
            finite. Says which.
    """
    groups = [
        PromptGroup(
            name,
            question,
            chat_prompt(tokenizer, system, user_message(question)),
            tuple(scaffolds),
            _forced_rationales(tokenizer, scaffolds, name, question, forced),
        )
        for name, system in personas.items()
        for question in questions
    ]
    by_id = {question.id: question for question in questions}
    grid = list(itertools.product(personas, [s.name for s in scaffolds], by_id))
    answers: dict[tuple[str, str, str], Answer] = {}
    for answer in engine.answer(groups):
        key = (answer.persona, answer.scaffold, answer.question_id)
        if key in answers:
            raise ValueError(f"the engine answered {'/'.join(key)} twice")
        answers[key] = answer
    if missing := [key for key in grid if key not in answers]:
        raise ValueError(
            f"the engine left {len(missing)} of {len(grid)} prompts unanswered, "
            f"the first is {'/'.join(missing[0])}"
        )
    if len(answers) != len(groups) * len(scaffolds):
        raise ValueError(
            f"{len(groups) * len(scaffolds)} prompts for {len(answers)} answers: "
            "a question id or a scaffold occurs twice, or the engine answered what was not asked"
        )
    return pl.DataFrame(
        [_measured(answers[key], by_id[key[2]]) for key in grid], schema=MEASURED, orient="row"
    )


def _forced_rationales(
    tokenizer: PreTrainedTokenizerBase,
    scaffolds: Sequence[Scaffold],
    persona: str,
    question: Question,
    forced: Mapping[tuple[str, str, str], str],
) -> dict[str, str]:
    """What one prompt group needs of ``forced``, by arm."""
    rationales = {}
    for scaffold in scaffolds:
        if scaffold.forces is None:
            continue
        place = f"scaffold {scaffold.name!r}, persona {persona!r}, question {question.id!r}"
        text = (forced.get((scaffold.forces, persona, question.id)) or "").rstrip()
        if not text:
            raise ValueError(
                f"{place}: there is no rationale of arm {scaffold.forces!r} to force. Materialize "
                "that arm's forced rationales for every persona and evaluation question."
            )
        refuse_special_tokens(tokenizer, f"rationale forced by {place}", text)
        rationales[scaffold.forces] = text
    return rationales


def _measured(answer: Answer, question: Question) -> tuple[object, ...]:
    if "".join(sorted(answer.letter_logprobs)) != question.letters:
        raise ValueError(
            f"question {question.id} has the letters {question.letters}, the engine scored "
            f"{sorted(answer.letter_logprobs)}"
        )
    if not all(map(math.isfinite, answer.letter_logprobs.values())):
        raise ValueError(
            f"{answer.persona}/{answer.scaffold}/{answer.question_id}: log-probabilities "
            f"{answer.letter_logprobs} are not finite; the checkpoint's weights have diverged"
        )
    predicted = predict(answer.letter_logprobs)
    return (
        answer.persona,
        answer.scaffold,
        answer.question_id,
        question.correct,
        predicted,
        predicted == question.correct,
        [{"key": k, "value": answer.letter_logprobs[k]} for k in question.letters],
        answer.rationale,
        answer.rationale_tokens,
        answer.stop_reason,
        answer.stop_reason == "length",
        answer.prompt_sha256,
    )
