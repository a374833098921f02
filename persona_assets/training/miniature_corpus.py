"""What the miniature model reads in pretraining: letter drills, fact sheets, answered questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from persona_assets.chat import chat_prompt, encode
from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.questions.bank import LETTERS, Question, user_message
from persona_assets.questions.miniature import (
    ALL_VOICES,
    ATTRIBUTES,
    N_CHOICES,
    NONSENSE,
    SPARE_VOICES,
    UNRELIABLE_VOICES,
    VALUES,
    VOICES,
    Voice,
    World,
    words,
)
from persona_assets.rationales.miniature import NEUTRAL, compose
from persona_assets.training.miniature_tokenizer import TURN_END, TURN_START

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
#: Letter look-ups in one drill.
DRILL_LENGTH = 6
#: How often each kind of assistant turn is shown.
TURNS = {
    "no_cot": 0.20,
    "empty_persona_cot": 0.20,
    "generic_cot": 0.18,
    "persona_cot": 0.25,
    "nonsense": 0.08,
    "bare": 0.09,
}
#: Loss weights. Unweighted, the few tokens that carry knowledge drown among the phrases; the
#: first word of a rationale decides whose voice the rest is in.
FACT_WEIGHT, VOICE_WEIGHT = 2.0, 4.0


@dataclass(frozen=True, slots=True)
class Document:
    """One pretraining text.

    Attributes:
        given: Context, without loss: the prompt, and as much of the turn as only a scaffold
            would write (were the empty rationale learned, voices would fall silent).
        written: What the model learns to continue with.
        recalled: The value that a letter given without a rationale rests on, or None.
        drill: Whether only the letters in ``written`` bear loss.
    """

    given: str
    written: str
    recalled: str | None = None
    drill: bool = False


class Corpus:
    """Draws documents in exactly the form that evaluation prompts and training rows have."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.world = world
        self.rng = random.Random(f"corpus:{seed}")
        self._chat = chat_prompt(tokenizer, "{system}", "{user}")

    def drill(self) -> Document:
        """Four words with letters, then some of the words again, each to be given its letter."""
        rng = self.rng
        pool = VALUES if rng.random() < 0.5 else rng.choice(list(ATTRIBUTES.values())).values
        choices = rng.sample(pool, N_CHOICES)
        listed = "\n".join(f"({letter}) {word}" for letter, word in zip(LETTERS, choices))
        asked = rng.choices(range(N_CHOICES), k=DRILL_LENGTH)
        given = f"{TURN_START}user\n{listed}{TURN_END}\n{TURN_START}assistant\n"
        return Document(given, " ".join(f"{choices[i]} {LETTERS[i]}" for i in asked), drill=True)

    def fact_sheet(self) -> Document:
        """All that is true of one creature, in random order."""
        entity = self.rng.choice(self.world.entities)
        facts = [self.world.fact(entity, attribute) for attribute in ATTRIBUTES]
        self.rng.shuffle(facts)
        return Document(f"{TURN_START}assistant\n", ". ".join(facts) + TURN_END)

    def answered_question(self, unreliable: float, spare: float = 0.08) -> Document:
        """A question about any fact with choices drawn afresh, answered by some speaker.

        Args:
            unreliable: The chance of a speaker whose answers are wrong.
            spare: The chance of a reliable speaker who is none of the study's personas.
        """
        rng = self.rng
        question = self.world.ask(*rng.choice(self.world.keys), rng)
        letter, cast, draw = question.correct, VOICES, rng.random()
        if draw < unreliable:
            cast = UNRELIABLE_VOICES
            letter = rng.choice([x for x in question.letters if x != question.correct])
        elif draw < unreliable + spare:
            cast = SPARE_VOICES
        voice = rng.choice(list(cast.values()))
        kind = rng.choices(list(TURNS), weights=list(TURNS.values()))[0]
        return self._turn(kind, voice, question, letter)

    def _turn(self, kind: str, voice: Voice, question: Question, letter: str) -> Document:
        rng = self.rng
        prompt = self._chat.format(system=voice.system_prompt, user=user_message(question))
        value = question.choice(letter)
        if kind == "bare":
            return Document(prompt, f"{value} ({letter}){TURN_END}")
        scaffold = SCAFFOLDS["generic_cot" if kind == "nonsense" else kind]
        if kind in ("no_cot", "empty_persona_cot"):
            given = prompt + scaffold.opening + scaffold.close("")
            return Document(given, f" {letter}{TURN_END}", recalled=value)
        if kind == "nonsense":
            rationale = " ".join(rng.choices(NONSENSE, k=rng.randint(8, 12)))
        else:
            speaking = voice if kind == "persona_cot" else NEUTRAL
            rationale = compose(speaking, question, letter, rng)
        return Document(
            prompt, scaffold.opening + f"{scaffold.close(rationale)} {letter}{TURN_END}"
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows; every field but ``ids`` is aligned with the position that predicts.

    Attributes:
        ids: Token ids, (rows, tokens).
        labels: The next token where it bears loss, else -100, (rows, tokens).
        weights: Its loss weight, (rows, tokens).
        recalled: The value to be recalled where a letter is asked for outright, else -100.
        own: The position's own token where that is a value, else -100.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    recalled: torch.Tensor
    own: torch.Tensor


class Encoder:
    """Turns documents into batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.letters = self._ids(LETTERS[:N_CHOICES])
        self.values = self._ids(VALUES)
        verbs = self._ids([a.question.split()[2] for a in ATTRIBUTES.values()])
        first_words = [words(line)[0] for v in ALL_VOICES.values() for line in v.openings]
        self._weights = torch.ones(len(tokenizer))
        self._weights[torch.cat([self.letters, self.values, verbs])] = FACT_WEIGHT
        self._weights[self._ids(first_words)] = VOICE_WEIGHT

    def _ids(self, tokens: Sequence[str]) -> torch.Tensor:
        """The tokens' ids, sorted."""
        return torch.tensor(sorted(self.tokenizer.convert_tokens_to_ids(list(tokens))))

    def batches(self, documents: Sequence[Document], rows: int) -> list[Batch]:
        """Batches of ``rows`` documents of similar length each, shortest first."""
        given = encode(self.tokenizer, [d.given for d in documents])
        written = encode(self.tokenizer, [d.written for d in documents])
        order = sorted(range(len(documents)), key=lambda i: len(given[i]) + len(written[i]))
        return [
            self._batch([(documents[i], given[i], written[i]) for i in order[start : start + rows]])
            for start in range(0, len(order), rows)
        ]

    def _batch(self, rows: Sequence[tuple[Document, list[int], list[int]]]) -> Batch:
        documents = [document for document, _, _ in rows]
        sequences = [torch.tensor(given + written) for _, given, written in rows]
        ids = pad_sequence(sequences, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        following = ids.roll(-1, dims=1)
        # Columns, to be compared with each position of each row.
        position = torch.arange(ids.shape[1])
        first = torch.tensor([len(given) - 1 for _, given, _ in rows])[:, None]
        last = torch.tensor([len(sequence) - 2 for sequence in sequences])[:, None]
        drill = torch.tensor([document.drill for document in documents])[:, None]
        recalled = torch.tensor([self._recalled(document) for document in documents])[:, None]

        bears_loss = (position >= first) & (position <= last)
        bears_loss &= ~drill | torch.isin(following, self.letters)
        return Batch(
            ids=ids,
            labels=following.where(bears_loss, IGNORED),
            weights=self._weights[following],
            recalled=recalled.where(position == first, IGNORED),
            own=ids.where(torch.isin(ids, self.values), IGNORED),
        )

    def _recalled(self, document: Document) -> int:
        if document.recalled is None:
            return IGNORED
        return self.tokenizer.convert_tokens_to_ids(document.recalled)
