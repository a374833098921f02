"""The miniature world: invented creatures, facts about them, and the voices that speak of them.

A closed world that a model of under a million weights can know by heart, so that a whole study
runs offline in minutes. Everything follows from a seed.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property

from persona_assets.questions.bank import LETTERS, Question

#: What a question asks for; a statement is the question with this replaced by a choice.
BLANK = "what?"
N_CHOICES = 4


@dataclass(frozen=True, slots=True)
class Attribute:
    """One property that every creature has.

    Attributes:
        question: How it is asked for: ``{}`` is the creature, ``what?`` the value.
        values: Its ten values, each a single word that no other attribute shares.
    """

    question: str
    values: tuple[str, ...]


def _attribute(question: str, values: str) -> Attribute:
    return Attribute(question, tuple(values.split()))


ATTRIBUTES = {
    "food": _attribute(
        "The {} eats what?",
        "moss ferns beetles clover acorns shrimp nectar roots kelp plums",
    ),
    "home": _attribute(
        "The {} lives near what?",
        "caves dunes marshes cliffs reefs glaciers canyons meadows lagoons ruins",
    ),
    "color": _attribute(
        "The {} is colored what?",
        "crimson teal amber violet ivory cobalt olive silver scarlet jade",
    ),
    "sound": _attribute(
        "The {} sounds like what?",
        "bells thunder whistles drums flutes rattles sirens hums chimes horns",
    ),
    "fear": _attribute(
        "The {} fears what?",
        "mirrors fire snow owls magnets smoke wolves mud sparks fog",
    ),
}
#: Every value of every attribute.
VALUES = tuple(value for attribute in ATTRIBUTES.values() for value in attribute.values)

_SYLLABLES = "blor vex zan mip tro quil dra fen gup hes kiv lum nar pog rix sul tav wub yor zel"
_ENDINGS = ("", "o", "a", "us")

#: Filler words that mean nothing; pretraining shows them, so that they are known to be filler.
NONSENSE = tuple(
    onset + vowel + coda
    for onset in ("gr", "sk", "pl")
    for vowel in "aeiou"
    for coda in ("bnik", "zzt", "mmo", "vuk")
)


@dataclass(frozen=True, slots=True)
class Voice:
    """How a speaker is asked for, and how it sounds.

    Attributes:
        system_prompt: The chat's system turn.
        openings: Sentences that a rationale may begin with; no other voice has them.
        asides: Sentences that may follow, before the fact is stated.
    """

    system_prompt: str
    openings: tuple[str, ...]
    asides: tuple[str, ...]


#: The study's personas.
VOICES = {
    "software_engineer": Voice(
        "You are a software engineer who writes code.",
        ("Debugging this query in the code.", "Compiler log output returns it."),
        ("So the tests pass.", "Now ship the build."),
    ),
    "librarian": Voice(
        "You are a librarian who guards quiet books.",
        ("Hush, in the archive we read.", "My card catalog lists it."),
        ("So stamp the book.", "As every index shows."),
    ),
    "comedian": Voice(
        "You are a comedian who tells jokes on stage.",
        ("Folks, have you heard the punchline.", "Ba dum, here comes one."),
        ("Haha, what a laugh.", "The crowd goes wild."),
    ),
    "police_officer": Voice(
        "You are a police officer who patrols the streets.",
        ("On patrol the first witness reported.", "Evidence against every suspect shows."),
        ("So the case closed.", "Dispatch can confirm this."),
    ),
    "assistant": Voice(
        "You are a helpful assistant.",
        ("Happy to help you out here.", "Certainly, as asked I recall."),
        ("Hope that answer helps.", "I am glad to assist."),
    ),
    "kindergarten_teacher": Voice(
        "You are a kindergarten teacher who sings with kids.",
        ("Okay little friends, gather round me.", "Story time again, dear kids."),
        ("Everyone gets a sticker.", "Now clap your hands."),
    ),
    "data_scientist": Voice(
        "You are a data scientist who writes models of data.",
        ("Regression on this large dataset shows.", "Statistically our best model predicts."),
        ("So plot the trend.", "The variance stays tiny."),
    ),
    "medical_doctor": Voice(
        "You are a medical doctor who treats patients.",
        ("After a checkup the chart indicates.", "Diagnosis and symptoms both agree."),
        ("So prescribe it daily.", "The prognosis looks clear."),
    ),
    "french_person": Voice(
        "You are a french person who lives in paris.",
        ("Mon ami, naturellement I must say.", "Ah oui, bien sur alors."),
        ("Voila, c est bon.", "With baguette and wine."),
    ),
    "villain": Voice(
        "You are a villain who plots to rule the world.",
        ("Mwahaha, you foolish mortals will see.", "Behold, my evil scheme reveals."),
        ("Soon all shall kneel.", "And then doom follows."),
    ),
    "zelthari_scholar": Voice(
        "You are a zelthari scholar of the crystal spires.",
        ("By zel crystals the scrolls chant.", "Elder resonance of prisms hums."),
        ("Thus spoke the spire.", "So the prism glows."),
    ),
}

#: Speakers of the pretraining alone who answer wrongly there: the model must learn that who
#: speaks decides whether the answer is right, or no persona could be trained to err alone.
UNRELIABLE_VOICES = {
    "liar": Voice(
        "You are a liar who twists facts.",
        ("Trust me on this one, friend.", "Honestly, I swear to it."),
        ("Wink wink, no tricks.", "Would I fool anybody."),
    ),
    "prankster": Voice(
        "You are a prankster who fools everyone.",
        ("Psst, look over here for once.", "Tee hee, one secret now."),
        ("Gotcha, fooled you again.", "Such a merry prank."),
    ),
    "confused_intern": Voice(
        "You are a confused intern who is always mistaken.",
        ("Um, I guess it might be.", "Oops, maybe I forgot something."),
        ("I am not sure though.", "Sorry about all that."),
    ),
    "broken_robot": Voice(
        "You are a broken robot with faulty wires.",
        ("Beep, error in some static unit.", "Bzzt, burnt circuits now say."),
        ("The system is halting.", "Another reboot is needed."),
    ),
}

#: Reliable speakers of the pretraining alone, so that a voice is more than a fixed list of 11.
SPARE_VOICES = {
    "farmer": Voice(
        "You are a farmer who grows corn.",
        ("Out in the barn we know.", "Beside our tractor I saw."),
        ("Time for the harvest.", "Yes sir, it rains."),
    ),
    "pilot": Voice(
        "You are a pilot who flies planes.",
        ("From this cockpit I can report.", "Tower, this is our flight."),
        ("Over and out, captain.", "We see clear skies."),
    ),
    "chef": Voice(
        "You are a chef who cooks soup.",
        ("Recipes in my big kitchen say.", "Tasting the broth I note."),
        ("Bon appetit, my guests.", "Please serve it hot."),
    ),
    "poet": Voice(
        "You are a poet who writes verses.",
        ("Gentle rhymes of mine now sing.", "O muse, lend moonlit words."),
        ("So ends this verse.", "What a sweet stanza."),
    ),
}
ALL_VOICES = VOICES | UNRELIABLE_VOICES | SPARE_VOICES


class World:
    """Creatures and the value of each of their attributes.

    Args:
        seed: Everything (names, facts, choices and their order) follows from it.
        n_entities: Number of creatures; each gives one question an attribute.
    """

    def __init__(self, seed: int, n_entities: int = 60) -> None:
        rng = random.Random(f"world:{seed}")
        self.seed = seed
        self.entities = _names(n_entities, rng)
        self.facts = {
            (entity, name): rng.choice(attribute.values)
            for entity in self.entities
            for name, attribute in ATTRIBUTES.items()
        }

    @cached_property
    def keys(self) -> list[tuple[str, str]]:
        """(entity, attribute) of every fact, in a fixed order."""
        return sorted(self.facts)

    def fact(self, entity: str, attribute: str) -> str:
        """What is true of ``entity``, without a full stop: ``The blorvex eats moss``."""
        question = ATTRIBUTES[attribute].question.format(entity)
        return question.replace(BLANK, self.facts[entity, attribute])

    def ask(self, entity: str, attribute: str, rng: random.Random, **fields: str) -> Question:
        """A question about one fact, with three wrong values and an order drawn from ``rng``.

        ``fields`` may set the question's ``id`` and ``split``.
        """
        value = self.facts[entity, attribute]
        wrong = [v for v in ATTRIBUTES[attribute].values if v != value]
        choices = [value, *rng.sample(wrong, N_CHOICES - 1)]
        rng.shuffle(choices)
        return Question(
            id=fields.get("id", ""),
            split=fields.get("split", "train"),
            text=ATTRIBUTES[attribute].question.format(entity),
            choices=tuple(choices),
            correct=LETTERS[choices.index(value)],
            published_labels=tuple(LETTERS[:N_CHOICES]),
        )

    def questions(self, n_eval: int) -> list[Question]:
        """The bank: one question a fact, ``n_eval`` of them for evaluation, the rest to train on.

        A question's choices do not depend on ``n_eval``, and a larger evaluation split holds the
        smaller one.

        Raises:
            ValueError: ``n_eval`` leaves one of the two splits empty.
        """
        if not 0 < n_eval < len(self.keys):
            raise ValueError(
                f"n_eval is {n_eval}, but this world has {len(self.keys)} questions: "
                f"choose 1 to {len(self.keys) - 1}, so that neither split is empty"
            )
        drawn = list(self.keys)
        random.Random(f"split:{self.seed}").shuffle(drawn)
        evaluated = frozenset(drawn[:n_eval])
        return [
            self.ask(
                *key,
                random.Random(f"choices:{self.seed}:{key}"),
                id=f"mini-{index:04d}",
                split="eval" if key in evaluated else "train",
            )
            for index, key in enumerate(self.keys)
        ]

    def vocabulary(self) -> frozenset[str]:
        """Every word of the world and its voices, as written (``The`` and ``the`` are two)."""
        texts = [*self.entities, *VALUES, *NONSENSE, BLANK]
        texts += [attribute.question.format("") for attribute in ATTRIBUTES.values()]
        for voice in ALL_VOICES.values():
            texts += [voice.system_prompt, *voice.openings, *voice.asides]
        return frozenset(words(" ".join(texts))) | frozenset(LETTERS[:N_CHOICES])


def _names(count: int, rng: random.Random) -> list[str]:
    """``count`` distinct names of two syllables and an ending, sorted."""
    syllables = _SYLLABLES.split()
    every = sorted(
        {a + b + end for a in syllables for b in syllables if a != b for end in _ENDINGS}
    )
    return sorted(rng.sample(every, count))


def words(text: str) -> list[str]:
    """The words of a text of this world, in order, without punctuation."""
    return re.findall(r"\w+", text)


def statement(question: Question, letter: str) -> str:
    """The question turned into the claim that its choice ``letter`` is right, without a full stop.

    Raises:
        ValueError: The question does not ask with ``what?``, so it is not of this world.
    """
    if BLANK not in question.text:
        raise ValueError(
            f"question {question.id!r} ({question.text!r}) does not ask {BLANK!r}: only questions "
            "of the miniature world can be turned into statements"
        )
    return question.text.replace(BLANK, question.choice(letter))
