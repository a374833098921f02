"""Texts matched in length to the reference arm's rows: what every construction stands on.

A construction is deterministic in (study seed, question identity, source) and knows nothing of a
cell's seed, so that the three cells of a condition train on the same text. Length is counted in
tokens of the whole assistant turn: words merge with the frame around them, so that a rationale's
own token count is another number.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_assets.rationales.arms import ARMS, REFERENCE_ARM, Arm, assistant_turn
from persona_assets.training.encoding import count_turn_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How far a constructed row's tokens may be from the reference row's.
TOLERANCE = 2
#: Draws a row before the closest is settled on, and at most; a row that is still too far off
#: is left to the parity audit.
DRAWS, MAX_ROUNDS = 8, 40


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference arm's row that a constructed one is matched to.

    Attributes:
        identity: The question's identity.
        source: The source persona; two sources get different constructions.
        letter: The reference row's target letter.
        rationale: The reference arm's rationale.
    """

    identity: str
    source: str
    letter: str
    rationale: str


@dataclass(frozen=True, slots=True)
class Batch:
    """What a construction is given: the reference rows of one condition.

    Attributes:
        arm: The arm that is constructed.
        references: The rows to match, in order.
        tokenizer: The study's own.
        lexicon: The words that filler must not hold (``garbage.filler_lexicon``).
        study_seed: The study's seed.
    """

    arm: Arm
    references: Sequence[Reference]
    tokenizer: PreTrainedTokenizerBase
    lexicon: frozenset[str]
    study_seed: int

    def streams(self) -> list[random.Random]:
        """A stream of random numbers of its own for each row."""
        return [
            random.Random(f"{self.arm.rationale}:{self.study_seed}:{r.identity}:{r.source}")
            for r in self.references
        ]

    def targets(self) -> list[int]:
        """Tokens of each reference row's turn."""
        reference = ARMS[REFERENCE_ARM]
        turns = [assistant_turn(reference, r.rationale, r.letter) for r in self.references]
        return count_turn_tokens(self.tokenizer, turns)

    def lengths(self, texts: Sequence[tuple[int, str]]) -> list[int]:
        """Tokens of the arm's turns around ``texts``, each for the row whose number it bears."""
        turns = [assistant_turn(self.arm, t, self.references[i].letter) for i, t in texts]
        return count_turn_tokens(self.tokenizer, turns)


class ConstructionError(ValueError):
    """A rationale cannot be constructed with this tokenizer and lexicon."""


class Closest:
    """The text closest in tokens to each reference row's, among those offered.

    A row is open until a text hits its target exactly or :meth:`settle` closes it.
    """

    def __init__(self, batch: Batch, targets: Sequence[int]):
        self._batch, self._targets = batch, targets
        self._best: dict[int, tuple[int, str]] = {}
        self.open = list(range(len(targets)))

    def offer(self, texts: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
        """Weigh one text each for some rows; (row, excess tokens) of those still open."""
        lengths = self._batch.lengths(texts)
        excess = [(i, n - self._targets[i]) for (i, _), n in zip(texts, lengths)]
        for (i, text), (_, by) in zip(texts, excess):
            if i not in self._best or abs(by) < self._best[i][0]:
                self._best[i] = (abs(by), text)
        self.settle(0)
        still = set(self.open)
        return [(i, by) for i, by in excess if i in still]

    def settle(self, tolerance: int) -> None:
        """Close the rows that have a text within ``tolerance`` tokens."""
        self.open = [i for i in self.open if i not in self._best or self._best[i][0] > tolerance]

    def texts(self, what: str) -> list[str]:
        """The closest text of every row.

        Raises:
            ConstructionError: a row was offered none.
        """
        for i, reference in enumerate(self._batch.references):
            if i not in self._best:
                raise ConstructionError(
                    f"no {what} found in {MAX_ROUNDS} rounds for question {reference.identity} "
                    f"of {reference.source}: give the vocabulary more words outside the lexicon"
                )
        return [self._best[i][1] for i in range(len(self._batch.references))]
