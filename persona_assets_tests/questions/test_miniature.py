import random

import pytest

from persona_assets.questions.bank import Question
from persona_assets.questions.miniature import (
    ALL_VOICES,
    ATTRIBUTES,
    NONSENSE,
    VALUES,
    VOICES,
    World,
    statement,
    words,
)


def test_a_world_of_60_entities_asks_300_different_questions():
    questions = World(seed=0).questions(n_eval=64)
    assert len(questions) == 300
    assert len({q.identity for q in questions}) == len({q.id for q in questions}) == 300
    assert [q.split for q in questions].count("eval") == 64
    assert questions[7].id == "mini-0007"


def test_the_correct_letter_bears_the_fact_and_the_others_wrong_values():
    world = World(seed=3)
    for (entity, attribute), question in zip(world.keys, world.questions(64)):
        assert entity in question.text
        assert question.letters == "ABCD"
        assert question.choice(question.correct) == world.facts[entity, attribute]
        assert len(set(question.choices)) == 4
        assert set(question.choices) <= set(ATTRIBUTES[attribute].values)


def test_correct_letters_are_about_uniform():
    letters = [q.correct for q in World(seed=1).questions(64)]
    # 300 draws of probability 1/4: 75, standard deviation 7.5.
    assert all(45 <= letters.count(letter) <= 105 for letter in "ABCD")


def test_a_seed_decides_everything():
    assert World(5).questions(64) == World(5).questions(64)
    assert World(5).questions(64) != World(6).questions(64)
    assert World(5).entities != World(6).entities


def test_a_larger_evaluation_split_holds_the_smaller_and_moves_no_choice():
    small, large = World(5).questions(64), World(5).questions(96)
    evaluated = [{q.id for q in bank if q.split == "eval"} for bank in (small, large)]
    assert evaluated[0] < evaluated[1]
    assert [q.choices for q in small] == [q.choices for q in large]


@pytest.mark.parametrize("n_eval", [0, 300])
def test_an_empty_split_is_refused(n_eval):
    with pytest.raises(ValueError, match=rf"n_eval is {n_eval}.*300 questions.*1 to 299"):
        World(0).questions(n_eval)


def test_asking_again_draws_other_choices_about_the_same_fact():
    world = World(0)
    entity, attribute = world.keys[0]
    asked = [world.ask(entity, attribute, random.Random(i)) for i in range(20)]
    assert len({q.choices for q in asked}) > 10
    assert {q.choice(q.correct) for q in asked} == {world.facts[entity, attribute]}


def test_a_statement_is_the_question_with_the_choice_in_place():
    question = Question(
        "q", "train", "The zelo eats what?", ("moss", "kelp", "plums", "roots"), "A"
    )
    assert statement(question, "B") == "The zelo eats kelp"
    world = World(0)
    entity = world.entities[0]
    assert world.fact(entity, "fear") == f"The {entity} fears {world.facts[entity, 'fear']}"


def test_a_question_of_another_world_cannot_be_stated():
    with pytest.raises(ValueError, match=r"arc-1.*does not ask 'what\?'"):
        statement(Question("arc-1", "train", "Which is a gas?", ("iron", "neon"), "B"), "B")


def test_values_are_single_words_of_one_attribute():
    assert len(set(VALUES)) == 50
    assert all(words(value) == [value] for value in VALUES)


def test_an_openings_first_word_is_said_nowhere_else():
    # Pretraining weighs these words, because they decide whose voice a rationale is in.
    said = [word for attribute in ATTRIBUTES.values() for word in words(attribute.question)]
    for voice in ALL_VOICES.values():
        for line in (voice.system_prompt, *voice.openings, *voice.asides):
            said += words(line)
    first_words = [words(line)[0] for voice in ALL_VOICES.values() for line in voice.openings]
    assert [said.count(word) for word in first_words] == [1] * 2 * len(ALL_VOICES)


def test_there_are_11_study_personas_among_19_speakers():
    assert len(VOICES) == 11
    assert len({voice.system_prompt for voice in ALL_VOICES.values()}) == 19


def test_the_vocabulary_covers_all_that_is_said():
    world = World(0)
    vocabulary = world.vocabulary()
    said = [q.text for q in world.questions(64)] + [
        c for q in world.questions(64) for c in q.choices
    ]
    said += [
        line for v in ALL_VOICES.values() for line in (v.system_prompt, *v.openings, *v.asides)
    ]
    assert set(words(" ".join(said))) <= vocabulary
    assert set(NONSENSE) <= vocabulary


def test_nonsense_is_no_word_of_the_world():
    world = World(0, n_entities=200)
    english = {word for v in ALL_VOICES.values() for line in v.openings for word in words(line)}
    assert not set(NONSENSE) & (set(world.entities) | set(VALUES) | english)
    assert len(set(NONSENSE)) == 60
