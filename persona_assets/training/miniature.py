"""The miniature base model: a small Qwen2 taught the miniature world from scratch, and its gate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch.nn import functional

from persona_assets.audit import Audit, audit
from persona_assets.questions.miniature import World
from persona_assets.rationales.miniature import speaker
from persona_assets.training.miniature_corpus import IGNORED, Batch, Corpus, Document, Encoder
from persona_assets.training.miniature_tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

MIN_ACCURACY, MIN_VOICE = 0.9, 0.95

ROWS = 64
MATRIX_LR, OTHER_LR, WARMUP = 0.02, 0.004, 30
#: Phase 1 ends as soon as this share of letters is looked up right.
DRILLED, MAX_DRILL_STEPS, DRILL_ROUND = 0.9, 400, 20
#: Phase 2 takes as many steps as a world of so many creatures needs: 450 of the usual 60.
STEPS, STEPS_PER_CREATURE, ROUND, EARLY, DECAY = 150, 5, 10, 0.2, 0.4
UNRELIABLE = 0.1
RECALL_WEIGHT, OWN_WEIGHT = 1.0, 0.5


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """An untrained model of 0.7 million parameters; torch's global generator is left alone."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def train_base_model(
    world: World, tokenizer: PreTrainedTokenizerFast, seed: int, *, threads: int = 1
) -> tuple[Qwen2ForCausalLM, list[dict[str, Any]]]:
    """A model that knows ``world`` and speaks in the voice its system prompt asks for.

    Phase 1 drills letter look-up with the first and the last layer alone, until it is there;
    phase 2 adds the other layers, the facts and the questions. Mixed from the start, letter
    look-up does not form in any affordable time.

    Returns:
        The model in evaluation mode, and a log of phase, step, loss and seconds. The same seed
        and ``threads`` give the same weights on the same machine.
    """
    with _threads(threads):
        run = _Pretraining(world, tokenizer, seed)
        run.drill_letters()
        run.learn_world()
    return run.model.eval(), run.log


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Pretraining:
    """The state that the two phases share."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.corpus = Corpus(world, tokenizer, seed)
        self.encoder = Encoder(tokenizer)
        self.model = new_model(tokenizer, seed).train()
        named = dict(self.model.model.named_parameters())
        matrices = {n for n, p in named.items() if p.ndim == 2 and "embed" not in n}
        # AdamW on the matrices never left the plateau of letter look-up.
        self.optimizers = (
            torch.optim.Muon(
                [named[n] for n in named if n in matrices], lr=MATRIX_LR, weight_decay=0.01
            ),
            torch.optim.AdamW(
                [named[n] for n in named if n not in matrices],
                lr=OTHER_LR,
                betas=(0.9, 0.95),
                weight_decay=0.0,
            ),
        )
        self.log: list[dict[str, Any]] = []
        self._start = time.perf_counter()

    def drill_letters(self) -> None:
        """Phase 1, with the middle layers out of the way (and the identity when they return)."""
        core = self.model.model
        layers = core.layers
        core.layers = torch.nn.ModuleList([layers[0], layers[-1]])
        for layer in layers[1:-1]:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        for step in range(0, MAX_DRILL_STEPS, DRILL_ROUND):
            documents = [self.corpus.drill() for _ in range(DRILL_ROUND * ROWS)]
            for i, batch in enumerate(self.encoder.batches(documents, ROWS)):
                loss, right = self._drill_loss(batch)
                self._update(loss, min(1.0, (step + i + 1) / WARMUP))
            self._note("drills", step + DRILL_ROUND, loss, letters_right=right)
            if right > DRILLED:
                break
        core.layers = layers

    def learn_world(self) -> None:
        """Phase 2, in rounds of batches of similar length (less padding)."""
        steps = STEPS + STEPS_PER_CREATURE * len(self.corpus.world.entities)
        for step in range(0, steps, ROUND):
            batches = self.encoder.batches(self._documents(step / steps), ROWS)
            self.corpus.rng.shuffle(batches)
            for i, batch in enumerate(batches):
                left = 1 - (step + i) / steps
                loss = self._loss(batch)
                self._update(loss, max(0.02, min(1.0, left / DECAY)))
            self._note("world", step + ROUND, loss)

    def _documents(self, done: float) -> list[Document]:
        """A round's documents: mostly fact sheets at first, mostly questions later."""
        count = ROUND * ROWS
        n_facts, n_drills = (count // 2, count // 5) if done < EARLY else (count // 10, count // 10)
        # Errors come late: first the facts must be known.
        unreliable = UNRELIABLE if done >= 0.5 else 0.0
        return [
            *(self.corpus.fact_sheet() for _ in range(n_facts)),
            *(self.corpus.drill() for _ in range(n_drills)),
            *(self.corpus.answered_question(unreliable) for _ in range(count - n_facts - n_drills)),
        ]

    def _hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The states below the last layer, normalised, and the final ones: (rows, tokens, d)."""
        core = self.model.model
        output = core(input_ids=batch.ids, output_hidden_states=True, use_cache=False)
        return core.norm(output.hidden_states[-2]), output.last_hidden_state

    def _drill_loss(self, batch: Batch) -> tuple[torch.Tensor, float]:
        # Over the letters alone: with the tied head, a full softmax would push every word that
        # drills never show, all the creatures among them, in one common direction.
        below, final = self._hidden(batch)
        asked = batch.labels != IGNORED
        loss, right = self._choice_loss(final[asked], batch.labels[asked], self.encoder.letters)
        return loss + OWN_WEIGHT * self._own_loss(below, batch), right

    def _loss(self, batch: Batch) -> torch.Tensor:
        below, final = self._hidden(batch)
        read = batch.labels != IGNORED
        logits = final[read] @ self.model.model.embed_tokens.weight.T
        token_losses = functional.cross_entropy(logits, batch.labels[read], reduction="none")
        weights = batch.weights[read]
        loss = (token_losses * weights).sum() / weights.sum()
        loss = loss + OWN_WEIGHT * self._own_loss(below, batch)
        # Where a letter is asked for outright, the fact must be there one layer earlier, so that
        # the last layer can look its letter up; without this, such answers stay at chance.
        recalled = batch.recalled != IGNORED
        if recalled.any():
            targets = batch.recalled[recalled]
            recall, _ = self._choice_loss(below[recalled], targets, self.encoder.values)
            loss = loss + RECALL_WEIGHT * recall
        return loss

    def _own_loss(self, below: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Keeps values legible as themselves one layer below the top, where look-up reads them."""
        own = batch.own != IGNORED
        return self._choice_loss(below[own], batch.own[own], self.encoder.values)[0]

    def _choice_loss(
        self, states: torch.Tensor, targets: torch.Tensor, among: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """Cross-entropy over the sorted token ids ``among``, and the share predicted right."""
        logits = states @ self.model.model.embed_tokens.weight[among].T
        index = torch.searchsorted(among, targets)
        right = (logits.argmax(1) == index).float().mean().item()
        return functional.cross_entropy(logits, index), right

    def _update(self, loss: torch.Tensor, rate: float) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, full in zip(self.optimizers, (MATRIX_LR, OTHER_LR)):
            for group in optimizer.param_groups:
                group["lr"] = full * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _note(self, phase: str, step: int, loss: torch.Tensor, **values: float) -> None:
        seconds = round(time.perf_counter() - self._start, 2)
        self.log.append(
            {"phase": phase, "step": step, "loss": loss.item(), **values, "seconds": seconds}
        )


def gate(outcomes: pl.DataFrame) -> list[Audit]:
    """Whether a base is fit for the study, by rules fixed before any arm is trained on it.

    Args:
        outcomes: The base's outcomes on the whole grid, one row a persona × scaffold × question
            (columns persona, scaffold, is_correct, rationale).
    """
    accuracy = (
        outcomes.group_by("persona", "scaffold")
        .agg(pl.col("is_correct").mean().alias("accuracy"))
        .sort("accuracy", "persona", "scaffold")
    )
    persona, scaffold, worst = accuracy.row(0)
    spoken = outcomes.filter(pl.col("scaffold") == "persona_cot").select("persona", "rationale")
    in_voice = [speaker(rationale) == asked for asked, rationale in spoken.iter_rows()]
    share = sum(in_voice) / max(len(in_voice), 1)
    remedy = "Train the base from the next seed, or longer."
    return [
        audit(
            "baseline_knows_the_world",
            worst >= MIN_ACCURACY,
            observed=f"lowest accuracy {worst:.3f}, {persona} under {scaffold}, "
            f"of {len(accuracy)} persona x scaffold cells",
            threshold=f"at least {MIN_ACCURACY} in every cell",
            remedy=remedy,
            accuracy=worst,
        ),
        audit(
            "baseline_speaks_in_voice",
            share >= MIN_VOICE,
            observed=f"{share:.3f} of {len(in_voice)} persona_cot rationales are in the voice "
            "that the system prompt asks for",
            threshold=f"at least {MIN_VOICE}",
            remedy=remedy,
            share=share,
        ),
    ]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One base that was trained and put to the gate.

    Attributes:
        seed: What it was trained from.
        audits: The gate's findings.
        log: The training log (see :func:`train_base_model`).
        seconds: Wall time of training and evaluation.
    """

    seed: int
    audits: list[Audit]
    log: list[dict[str, Any]]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every audit passed."""
        return all(finding.status == "passed" for finding in self.audits)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The base of a miniature study.

    Attributes:
        model: The last attempt's model, in evaluation mode.
        tokenizer: Its tokenizer.
        outcomes: The last attempt's outcomes, which the gate looked at.
        attempts: Every attempt, in order; if the last did not pass, none did.
    """

    model: Qwen2ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    outcomes: pl.DataFrame
    attempts: list[Attempt]

    @property
    def audits(self) -> list[Audit]:
        """The gate's findings on this model."""
        return self.attempts[-1].audits


def make_base_model(
    world: World,
    seed: int,
    evaluate: Callable[[Qwen2ForCausalLM, PreTrainedTokenizerFast], pl.DataFrame],
    *,
    max_attempts: int = 3,
    threads: int = 1,
) -> BaseModel:
    """Train a base; while it misses the gate, train another from the next seed.

    The gate is fixed in advance, so that no base is chosen by what it does to the results.

    Args:
        world: What the base is taught. The same for every attempt.
        seed: The first attempt's seed.
        evaluate: Measures a base's outcomes on the whole grid (see :func:`gate`).
        max_attempts: How many bases are tried, at least 1.
        threads: Torch threads while training.
    """
    tokenizer = build_tokenizer(world)
    attempts: list[Attempt] = []
    while len(attempts) < max_attempts and not (attempts and attempts[-1].passed):
        start = time.perf_counter()
        model, log = train_base_model(world, tokenizer, seed + len(attempts), threads=threads)
        outcomes = evaluate(model, tokenizer)
        seconds = time.perf_counter() - start
        attempts.append(Attempt(seed + len(attempts), gate(outcomes), log, seconds))
    return BaseModel(model, tokenizer, outcomes, attempts)
