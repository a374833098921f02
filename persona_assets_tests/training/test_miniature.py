import polars as pl
import pytest
import torch

from persona_assets.audit import audit
from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.questions.miniature import NONSENSE, VOICES, World
from persona_assets.training import miniature
from persona_assets.training.miniature import gate, make_base_model, train_base_model
from persona_assets.training.miniature_corpus import IGNORED, Corpus, Document, Encoder
from persona_assets.training.miniature_tokenizer import build_tokenizer

WORLD = World(seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(WORLD)


def outcomes(wrong=(), silent=()):
    """100 questions a cell; ``wrong`` and ``silent`` hold (persona, scaffold): count."""
    wrong, silent = dict(wrong), dict(silent)
    return pl.DataFrame(
        [
            {
                "persona": persona,
                "scaffold": scaffold,
                "is_correct": i >= wrong.get((persona, scaffold), 0),
                "rationale": ""
                if i < silent.get((persona, scaffold), 0)
                else f"{voice.openings[i % 2]} The zelo eats moss",
            }
            for persona, voice in VOICES.items()
            for scaffold in SCAFFOLDS
            for i in range(100)
        ]
    )


def test_the_gate_passes_at_its_thresholds():
    at_the_edge = outcomes(
        wrong={("villain", "no_cot"): 10},
        silent={(persona, "persona_cot"): 5 for persona in VOICES},
    )
    knows, speaks = gate(at_the_edge)
    assert (knows.status, speaks.status) == ("passed", "passed")
    assert knows.details == {"accuracy": 0.9}
    assert speaks.details == {"share": 0.95}


def test_one_ignorant_cell_fails_the_gate_and_is_named():
    knows, speaks = gate(outcomes(wrong={("villain", "no_cot"): 11, ("comedian", "no_cot"): 3}))
    assert (knows.status, speaks.status) == ("failed", "passed")
    assert "0.890, villain under no_cot, of 44" in knows.observed
    assert knows.blocks


def test_a_lost_voice_fails_the_gate():
    knows, speaks = gate(outcomes(silent={("villain", "persona_cot"): 56}))
    assert (knows.status, speaks.status) == ("passed", "failed")
    assert speaks.observed.startswith("0.949 of 1100")


def test_only_persona_rationales_are_listened_to():
    assert gate(outcomes(silent={("villain", "generic_cot"): 100}))[1].details == {"share": 1.0}


@pytest.mark.parametrize(
    ("passing_seed", "max_attempts", "tried"),
    [(7, 3, [7]), (8, 3, [7, 8]), (99, 3, [7, 8, 9]), (99, 1, [7])],
)
def test_the_next_seed_is_tried_until_one_passes(monkeypatch, passing_seed, max_attempts, tried):
    monkeypatch.setattr(
        miniature, "train_base_model", lambda world, tokenizer, seed, threads: (seed, [])
    )
    monkeypatch.setattr(
        miniature,
        "gate",
        lambda frame: [
            audit("g", frame["seed"][0] == passing_seed, observed="", threshold="", remedy="")
        ],
    )
    base = make_base_model(
        WORLD, 7, lambda model, _: pl.DataFrame({"seed": [model]}), max_attempts=max_attempts
    )
    assert [attempt.seed for attempt in base.attempts] == tried
    assert base.model == tried[-1] == base.outcomes["seed"][0]
    assert base.attempts[-1].passed == (passing_seed in tried)
    assert base.audits[0].blocks == (passing_seed not in tried)


@pytest.fixture
def short_training(monkeypatch):
    for name, value in {
        "ROWS": 4,
        "DRILL_ROUND": 2,
        "MAX_DRILL_STEPS": 4,
        "ROUND": 2,
        "STEPS": 4,
        "STEPS_PER_CREATURE": 0,
    }.items():
        monkeypatch.setattr(miniature, name, value)


def test_training_is_decided_by_its_seed_alone(tokenizer, short_training):
    torch.manual_seed(1)
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    model, log = train_base_model(WORLD, tokenizer, seed=3)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_num_threads() == threads

    torch.manual_seed(2)
    again, _ = train_base_model(WORLD, tokenizer, seed=3)
    other, _ = train_base_model(WORLD, tokenizer, seed=4)
    weights, same, different = (m.state_dict() for m in (model, again, other))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(weights[embedding], different[embedding])
    assert [(entry["phase"], entry["step"]) for entry in log] == [
        ("drills", 2),
        ("drills", 4),
        ("world", 2),
        ("world", 4),
    ]


def test_a_larger_world_is_learned_for_longer(tokenizer, short_training, monkeypatch):
    monkeypatch.setattr(miniature, "STEPS_PER_CREATURE", 1)
    _, log = train_base_model(WORLD, tokenizer, seed=3)
    (*_, last) = log
    assert (last["phase"], last["step"]) == ("world", 4 + len(WORLD.entities))


def test_every_layer_learns(tokenizer, short_training):
    fresh = miniature.new_model(tokenizer, seed=3).state_dict()
    model, _ = train_base_model(WORLD, tokenizer, seed=3)
    assert not model.training
    assert len(model.model.layers) == 4
    for name, weight in model.state_dict().items():
        assert not torch.equal(weight, fresh[name]), name


def read(tokenizer, batch, row):
    """The words that bear loss in a row."""
    return tokenizer.decode(batch.labels[row][batch.labels[row] != IGNORED])


def test_loss_is_on_what_is_written(tokenizer):
    document = Document("<|im_start|>assistant\n", "The moss eats kelp (A)<|im_end|>")
    (batch,) = Encoder(tokenizer).batches([document], rows=8)
    assert read(tokenizer, batch, 0) == "The moss eats kelp A <|im_end|>"
    asked = batch.labels[0] != IGNORED
    assert batch.weights[0][asked].tolist() == [1, 2, 2, 2, 2, 1]
    assert tokenizer.decode(batch.own[0][batch.own[0] != IGNORED]) == "moss kelp"
    assert (batch.recalled == IGNORED).all()


def test_drills_bear_loss_on_letters_alone(tokenizer):
    (batch,) = Encoder(tokenizer).batches([Corpus(WORLD, tokenizer, 0).drill()], rows=8)
    assert set(read(tokenizer, batch, 0).split()) <= set("ABCD")
    assert (batch.labels != IGNORED).sum() == 6


def test_an_outright_letter_recalls_its_value_where_it_is_asked_for(tokenizer):
    documents = [
        Document("Answer:", " B<|im_end|>", recalled="moss"),
        Document("The kelp is moss Answer:", " B<|im_end|>"),
    ]
    (batch,) = Encoder(tokenizer).batches(documents, rows=8)
    assert batch.ids.shape == (2, 7)
    assert tokenizer.decode(batch.recalled[batch.recalled != IGNORED]) == "moss"
    assert batch.recalled[0, 0] != IGNORED
    assert [read(tokenizer, batch, row) for row in (0, 1)] == ["B <|im_end|>"] * 2


def test_batches_hold_documents_of_similar_length(tokenizer):
    documents = [Document("The", " moss" * n) for n in (9, 1, 8, 2)]
    batches = Encoder(tokenizer).batches(documents, rows=2)
    assert [tuple(batch.ids.shape) for batch in batches] == [(2, 3), (2, 10)]


def test_pretraining_has_the_form_of_the_evaluation(tokenizer):
    corpus = Corpus(WORLD, tokenizer, seed=0)
    documents = [corpus.answered_question(unreliable=0.1) for _ in range(400)]
    texts = [document.given + document.written for document in documents]
    for scaffold in SCAFFOLDS.values():
        start = "<|im_start|>assistant\n" + scaffold.opening
        assert any(start in text and f"{scaffold.close('')} " in text for text in texts)
    assert all(text.endswith("<|im_end|>") for text in texts)
    assert any(word in text for text in texts for word in NONSENSE)
    # The empty rationale is a scaffold's doing, never the model's.
    assert not any("<persona-thinking>\n\n" in document.written for document in documents)


def test_only_unreliable_speakers_err(tokenizer):
    corpus = Corpus(WORLD, tokenizer, seed=0)
    honest = [corpus.answered_question(unreliable=0.0) for _ in range(200)]
    lying = [corpus.answered_question(unreliable=1.0) for _ in range(200)]

    def is_right(document):
        text = document.given + document.written
        letter = text.removesuffix("<|im_end|>").rstrip(")")[-1]
        value = text.split(f"({letter}) ")[1].split("<|im_end|>")[0].split("\n")[0]
        question = text.split("<|im_start|>user\n")[1].split("\n")[0]
        return question.replace("what?", value) in {WORLD.fact(*key) for key in WORLD.keys}

    assert all(map(is_right, honest))
    assert not any(map(is_right, lying))
