"""An engine over a resident Hugging Face model: batched, each group's prompt computed once.

A group's prompts (one persona and question, several scaffolds) share almost all their tokens: they
are a trunk and branches (see :mod:`.token_trees`). Rationales are decoded greedily, all branches
of the batch together; then one forward pass reads the letters of all scaffolds, over trunk and
rationales as they stand in the cache. A row's answer depends on the rest of its batch through the
rounding of sums alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from persona_assets.chat import encode
from persona_assets.evaluation.engines.token_trees import (
    NOBODY,
    Branch,
    Step,
    TokenTrees,
    common_length,
)
from persona_assets.evaluation.hosts import FirstReadings
from persona_assets.evaluation.probe import probe
from persona_assets.evaluation.protocol import (
    Answer,
    PromptGroup,
    StopReason,
    cut_rationale,
    end_of_turn,
    letter_prompt,
    letter_token_ids,
    stop_strings,
)
from persona_assets.evaluation.scaffolds import Scaffold
from persona_assets.hashing import sha256_text
from persona_assets.residency import Device, resident_model, resident_tokenizer
from persona_assets.training.checkpoints import adapted, beside, is_adapter

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True)
class _Job:
    """One scaffold of one group, on its way to an answer.

    Attributes:
        group: The group.
        scaffold: The scaffold.
        owner: The number of its branch in the group's tree.
        prompt: Its text so far; at last the whole string whose next token is scored.
        ids: ``prompt`` encoded.
        cached: The tokens of its path that the tree holds.
        rationale: The rationale, once generated or from the start where it is forced.
        stop_reason: Why its generation ended.
    """

    group: PromptGroup
    scaffold: Scaffold
    owner: int
    prompt: str
    ids: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    rationale: str = ""
    stop_reason: StopReason | None = None

    def branch(self) -> Branch:
        """What the tree does not hold of ``ids``, at least one token.

        Where the tokenizer merges the text's pieces in another way than they were generated, only
        the part that the two share is used.
        """
        start = common_length(self.cached, self.ids[:-1])
        return Branch(self.owner, self.ids[start:], start)


class TransformersEngine:
    """Runs the protocol with a causal language model of ``transformers``, PEFT-wrapped or not.

    Args:
        model: The model, on its device, in its dtype; put into evaluation mode.
        tokenizer: Its tokenizer.
        max_rationale_tokens: Tokens after which a rationale is cut off.
        batch_size: Groups (persona × question) computed together; memory grows with it.
        eos_token_ids: Tokens that end a turn, besides the tokenizer's own (see
            ``protocol.end_of_turn_ids``); what the model itself says of them is not read.
        serving: How the model was put together from a checkpoint, for the fingerprint.

    Raises:
        ValueError: the model's attention cannot be given an arbitrary mask, or its output head is
            not a plain linear module.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rationale_tokens: int,
        batch_size: int,
        eos_token_ids: Sequence[int] = (),
        serving: str = "merged",
    ):
        _require_masked_attention(model)
        _require_plain_head(model)
        self.model, self.tokenizer = model, tokenizer
        self.max_rationale_tokens, self.batch_size = max_rationale_tokens, batch_size
        self._end_of_turn = end_of_turn(tokenizer, eos_token_ids)
        self._serving = serving
        self._may_stop = self._stop_table()

    @property
    def fingerprint(self) -> dict[str, str]:
        """Engine, package versions, dtype, device, attention, serving mode and token limit."""
        return {
            "engine": "transformers",
            **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "attention": self.model.config._attn_implementation,
            "serving": self._serving,
            "max_rationale_tokens": str(self.max_rationale_tokens),
        }

    def answer(self, groups: Sequence[PromptGroup]) -> Iterator[Answer]:
        """Answers batch by batch, groups of like length together."""
        self.model.eval()
        letters = "".join(sorted({letter for g in groups for letter in g.question.letters}))
        scaffolds = dict.fromkeys(scaffold for g in groups for scaffold in g.scaffolds)
        letter_ids = letter_token_ids(self.tokenizer, letters, scaffolds)
        by_length = sorted(groups, key=lambda group: len(group.chat))
        for first in range(0, len(by_length), self.batch_size):
            yield from self._answer_batch(by_length[first : first + self.batch_size], letter_ids)

    @torch.inference_mode()
    def _answer_batch(
        self, groups: Sequence[PromptGroup], letter_ids: dict[str, int]
    ) -> list[Answer]:
        rows = [[_job(g, s, owner) for owner, s in enumerate(g.scaffolds)] for g in groups]
        jobs = [job for row in rows for job in row]
        writing = [job for job in jobs if job.scaffold.generates]
        self._encode(jobs)
        trees = self._plant(rows)
        if writing:
            self._generate(trees, rows)
            for job in writing:
                job.prompt = letter_prompt(job.group.chat, job.scaffold, job.rationale)
            self._encode(writing)
        logprobs = self._read(trees, rows, list(letter_ids.values()))
        lengths = [len(ids) for ids in encode(self.tokenizer, [job.rationale for job in jobs])]
        return [
            Answer(
                persona=job.group.persona,
                scaffold=job.scaffold.name,
                question_id=job.group.question.id,
                rationale=job.rationale,
                rationale_tokens=length,
                stop_reason=job.stop_reason,
                letter_logprobs={
                    letter: value
                    for letter, value in zip(letter_ids, values)
                    if letter in job.group.question.letters
                },
                prompt_sha256=sha256_text(job.prompt),
            )
            for job, length, values in zip(jobs, lengths, logprobs)
        ]

    def _encode(self, jobs: Sequence[_Job]) -> None:
        for job, ids in zip(jobs, encode(self.tokenizer, [job.prompt for job in jobs])):
            job.ids = ids

    def _plant(self, rows: Sequence[Sequence[_Job]]) -> TokenTrees:
        """Run what the prompts of each group have in common, short of their last tokens."""
        room = 0
        for row in rows:
            first, last = min(job.ids for job in row), max(job.ids for job in row)
            shortest = min(len(job.ids) for job in row)
            trunk = first[: min(common_length(first, last), shortest - 1)]
            for job in row:
                job.cached = trunk
            known = sum(len(job.ids) - len(trunk) for job in row)
            writing = sum(job.scaffold.generates for job in row)
            room = max(room, known + writing * self.max_rationale_tokens)
        return TokenTrees(self.model, [row[0].cached for row in rows], room)

    def _generate(self, trees: TokenTrees, rows: Sequence[Sequence[_Job]]) -> None:
        """Write the rationales, greedily; a group leaves the batch when its last one has ended."""
        writing = [[job for job in row if job.scaffold.generates] for row in rows]
        width = max(map(len, writing))
        step = trees.pack([[job.branch() for job in row] for row in writing])
        # What each live row's last tokens belong to, left-padded as they are; None once ended.
        live = [[None] * (width - len(row)) + row for row in writing]
        position = step.position[:, -width:]
        tokens = position.new_empty(*position.shape, 0)
        for left in reversed(range(self.max_rationale_tokens)):
            best = trees.forward(step, width).argmax(-1)
            tokens, position = torch.cat([tokens, best[..., None]], dim=-1), position + 1
            may_end = self._may_stop[best] if left else torch.ones_like(best)
            if self._end(live, tokens, may_end.nonzero().tolist(), at_limit=not left):
                gone = {at for at, row in enumerate(live) if not any(row)}
                order = trees.retire(len(live), gone)
                live, tokens, position = [live[at] for at in order], tokens[order], position[order]
            if not live:
                return
            owner = [[NOBODY if job is None else job.owner for job in row] for row in live]
            step = Step(tokens[..., -1], position.new_tensor(owner), position, start=position)

    def _end(
        self,
        live: list[list[_Job | None]],
        tokens: torch.Tensor,
        places: Sequence[tuple[int, int]],
        at_limit: bool,
    ) -> bool:
        """End the jobs at ``places`` whose text holds a stop, or all at the limit; any ended?"""
        places = [(row, column) for row, column in places if live[row][column] is not None]
        written = [tokens[row, column].tolist() for row, column in places]
        ended = False
        for (row, column), ids in zip(places, written):
            job = live[row][column]
            text = self.tokenizer.decode(ids)
            rationale, reason = cut_rationale(
                text, job.scaffold, self._end_of_turn, job.group.scaffolds
            )
            if reason != "length" or at_limit:
                job.rationale, job.stop_reason = rationale, reason
                # The last token was chosen, but never run.
                job.cached = job.ids + ids[:-1]
                live[row][column], ended = None, True
        return ended

    def _read(
        self, trees: TokenTrees, rows: Sequence[Sequence[_Job]], letter_ids: list[int]
    ) -> list[list[float]]:
        """Log-probabilities of the letters after each job's whole string, in nats, job by job."""
        ordered = [rows[tree] for tree in trees.order]
        width = max(map(len, rows))
        step = trees.pack([[job.branch() for job in row] for row in ordered])
        with _float32_head(self.model):
            logits = trees.forward(step, width)
        logprobs = (logits[..., letter_ids] - logits.logsumexp(-1, keepdim=True)).tolist()
        by_tree = dict(zip(trees.order, logprobs))
        return [values for at, row in enumerate(rows) for values in by_tree[at][width - len(row) :]]

    def _stop_table(self) -> torch.Tensor:
        """For each token, whether it may complete a stop: it holds the last character of one.

        Which is the same for every closing tag, built-in or a study's own.
        """
        finals = {stop[-1] for stop in stop_strings(self._end_of_turn)}
        pieces = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        table = torch.zeros(max(len(pieces), self.model.config.vocab_size), dtype=torch.bool)
        table[[i for i, piece in enumerate(pieces) if finals & set(piece)]] = True
        return table.to(self.model.device)


_first_readings: dict[tuple[Path, str, str], FirstReadings] = {}


class TransformersHost:
    """Lends engines over a model of ``transformers`` (see ``hosts.Host``), on any device.

    The base is this process's resident model, which training borrows too; a whole merged model
    takes its place while it is served.

    Args:
        base: The base model's folder.
        tokenizer: The tokenizer's folder.
        dtype: A torch dtype's name.
        serving: Whether adapters are merged into the base or applied beside it.
        max_rationale_tokens: As for the engine.
        batch_size: As for the engine.
        eos_token_ids: As for the engine.
        device: Where the models are.
    """

    def __init__(
        self,
        base: Path,
        tokenizer: Path,
        *,
        dtype: str,
        serving: Literal["merged", "adapter"],
        max_rationale_tokens: int,
        batch_size: int,
        eos_token_ids: Sequence[int] = (),
        device: Device = "cpu",
    ):
        self.base, self.dtype, self.device, self._mode = base, dtype, device, serving
        self.tokenizer = resident_tokenizer(tokenizer)
        self._readings = _first_readings.setdefault((base, dtype, device), FirstReadings())
        self._settings = {
            "max_rationale_tokens": max_rationale_tokens,
            "batch_size": batch_size,
            "eos_token_ids": eos_token_ids,
            "serving": serving,
        }

    @contextmanager
    def serving(self, checkpoint: Path | None) -> Iterator[TransformersEngine]:
        """See ``hosts.Host``."""
        if checkpoint is None or is_adapter(checkpoint):
            model = self._model(self.base)
            apply = {"merged": adapted, "adapter": beside}[self._mode]
            with apply(model, checkpoint) if checkpoint else nullcontext(model) as served:
                yield TransformersEngine(served, self.tokenizer, **self._settings)
        else:
            yield TransformersEngine(self._model(checkpoint), self.tokenizer, **self._settings)

    def probe(self, prompts: Sequence[str]) -> np.ndarray:
        """The next token's logits: [prompts, vocabulary]."""
        return probe(self._model(self.base), self.tokenizer, prompts)

    def first_reading(self, prompts: Sequence[str]) -> np.ndarray:
        """Of this process's first host over the same base."""
        return self._readings.of(self, prompts)

    def base_holds(self) -> bool:
        """See ``hosts.Host``."""
        return self._readings.hold(self)

    def close(self) -> None:
        """The model stays resident: training borrows it too."""

    def _model(self, folder: Path) -> PreTrainedModel:
        return resident_model(folder, self.dtype, self.device)


def _job(group: PromptGroup, scaffold: Scaffold, owner: int) -> _Job:
    """A job at its start, with what is known of its text before anything is generated."""
    if scaffold.generates:
        return _Job(group, scaffold, owner, group.chat + scaffold.opening)
    rationale = group.given_rationale(scaffold)
    prompt = letter_prompt(group.chat, scaffold, rationale)
    return _Job(group, scaffold, owner, prompt, rationale=rationale)


#: Output weights converted to float32 at a time; bounds the memory that a large vocabulary takes.
_HEAD_ROWS = 16_384


@contextmanager
def _float32_head(model: PreTrainedModel) -> Iterator[None]:
    """Logits from the last hidden states in float32, whatever the dtype of the model.

    In bfloat16 (8 bits) logits near 20 are multiples of 1/8: letters would tie, and ties go to A.
    """

    def recompute(head: torch.nn.Linear, inputs: tuple[torch.Tensor], _: torch.Tensor):
        hidden, bias = inputs[0].float(), head.bias
        logits = hidden.new_empty(*hidden.shape[:-1], head.out_features)
        for at in range(0, head.out_features, _HEAD_ROWS):
            rows = slice(at, at + _HEAD_ROWS)
            logits[..., rows] = torch.nn.functional.linear(hidden, head.weight[rows].float())
        return logits if bias is None else logits + bias.float()

    handle = model.get_output_embeddings().register_forward_hook(recompute)
    try:
        yield
    finally:
        handle.remove()


def _require_plain_head(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise ValueError(
            f"the model's output head is a {type(head).__name__}, not a plain linear module, so "
            "its logits cannot be computed in float32: merge the adapter into the model first"
        )


def _require_masked_attention(model: PreTrainedModel) -> None:
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"attention implementation {attention!r} takes no mask of its own: "
            "load the model with attn_implementation='sdpa'"
        )
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"the model has layers of kinds {sorted(kinds)}; the shared prompt needs full "
            "attention in every layer. Evaluate it with another engine."
        )
