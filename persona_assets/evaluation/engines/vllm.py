"""vLLM in a child process of this one: one resident base model, every checkpoint served over it.

The engine's core runs in a process of its own, so that it computes while this one turns tokens
into text and back. A group's scaffolds are asked for together, a letter as soon as its rationale
has ended, while the prefix that they share still lies in the cache; the number of groups under way
is capped for the same reason.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from persona_assets.chat import encode
from persona_assets.evaluation.engines.vllm_launch import (
    ENVIRONMENT,
    environment,
    reserved,
    start,
    vllm_version,
)
from persona_assets.evaluation.engines.vllm_worker import STARTER
from persona_assets.evaluation.hosts import FirstReadings
from persona_assets.evaluation.protocol import (
    Answer,
    Engine,
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
from persona_assets.training.checkpoints import (
    MODEL_CONFIG,
    adapter_hash,
    adapter_rank,
    check_checkpoint,
    is_adapter,
    matrix_shapes,
    read_updates,
)
from persona_assets.training.headers import CheckpointError, read_json

Serving = Literal["merged", "adapter"]

#: Tokens that a prompt may have, its opening included, besides the longest rationale.
_PROMPT_TOKENS = 2048
#: Tokens kept free for the scaffold's end and for a rationale that is encoded otherwise than it
#: was written.
_SPARE_TOKENS = 64
#: Tokens whose log-probabilities a probe reads; vLLM gives at most 128.
_PROBED = 128
#: Requests that a GPU decodes together: memory for their caches is there for a 7B model in 80 GB.
_MAX_REQUESTS = 2048
#: Seconds within which what was aborted must have left the engine.
_DRAIN = 60.0


class VllmHost:
    """A base model resident in vLLM (see ``hosts.Host``).

    Args:
        base: The base model's folder.
        tokenizer: Its tokenizer's.
        dtype: Of the weights and of all that is computed with them, but for the head: its logits
            are float32 where vLLM can (0.30; the fingerprint says).
        serving: How an adapter is served: ``merged`` into the base's weights in place, or
            computed beside them (``adapter``). A whole model takes the base's place in either.
        max_rationale_tokens: Tokens after which a rationale is cut off.
        batch_size: Groups (persona × question) under way at once.
        eos_token_ids: Tokens that end a turn, besides the tokenizer's own (see
            ``protocol.end_of_turn_ids``); what the model itself says of them is not read.
        max_rank: The largest rank of an adapter that is served beside the base.

    Raises:
        CheckpointError: the base's configuration is missing or damaged.
    """

    def __init__(
        self,
        base: Path,
        tokenizer: Path,
        *,
        dtype: str,
        serving: Serving,
        max_rationale_tokens: int,
        batch_size: int,
        eos_token_ids: Sequence[int],
        max_rank: int,
    ):
        from transformers import AutoTokenizer

        self.base, self.mode = base, serving
        self.max_rationale_tokens, self.batch_size = max_rationale_tokens, batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.end_of_turn = end_of_turn(self.tokenizer, eos_token_ids)
        ids = dict.fromkeys([self.tokenizer.eos_token_id, *eos_token_ids])
        self.stop_token_ids = [i for i in ids if i is not None]
        config = read_json(base / MODEL_CONFIG)
        self.max_tokens = min(
            config["max_position_embeddings"], _PROMPT_TOKENS + max_rationale_tokens
        )
        self._vocabulary = config["vocab_size"]
        self._max_rank, self._adapter_ids = max_rank, {}
        self._serves, self._first_readings = False, FirstReadings()
        self.request_ids = map(str, itertools.count())
        quiet = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}
        with environment(**ENVIRONMENT, **quiet, **{STARTER: str(os.getpid())}):
            self._llm = start(
                model=str(base),
                tokenizer=str(tokenizer),
                dtype=dtype,
                max_model_len=self.max_tokens,
                max_num_seqs=min(_MAX_REQUESTS, 4 * batch_size),
                lora_rank=reserved(max_rank) if serving == "adapter" else None,
            )
        self.core = self._llm.llm_engine
        self.fingerprint = {
            "engine": "vllm",
            "vllm": vllm_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
            **self.core.collective_rpc("describe_model")[0],
            "serving": serving,
            "max_rationale_tokens": str(max_rationale_tokens),
        }

    @contextmanager
    def serving(self, checkpoint: Path | None) -> Iterator[Engine]:
        """An engine over the base or over a checkpoint; see ``hosts.Host``.

        Raises:
            CheckpointError: the checkpoint does not fit the base, or its rank is above ``max_rank``
                where it is served beside the base.
            RuntimeError: another checkpoint is being served, or could not be taken out again.
        """
        if self._serves:
            raise RuntimeError(
                "the engine serves another checkpoint, or failed to take one out: leave that one "
                "first, or restart the process"
            )
        beside = False
        if checkpoint is not None:
            self._look_at(checkpoint)
            beside = self.mode == "adapter" and is_adapter(checkpoint)
        engine = VllmEngine(self, self._lora_request(checkpoint) if beside else None)
        self._serves = True
        try:
            if beside:
                self.core.add_lora(engine.lora)
            elif checkpoint is not None:
                names = (str(self.base), str(checkpoint))
                self.core.collective_rpc("merge_checkpoint", args=names)
                self._forget()
            yield engine
        finally:
            engine.stop()
            if beside:
                self.core.remove_lora(engine.lora.lora_int_id)
            elif checkpoint is not None:
                self.core.collective_rpc("unmerge_checkpoint", args=(str(self.base),))
            self._forget()
            self._serves = False

    def probe(self, prompts: Sequence[str]) -> np.ndarray:
        """Log-probabilities of tokens from all over the vocabulary after each prompt, in nats."""
        from vllm import SamplingParams

        n = min(_PROBED, self._vocabulary)
        tokens = [i * self._vocabulary // n for i in range(n)]
        params = SamplingParams(
            max_tokens=1, temperature=0, logprob_token_ids=tokens, detokenize=False
        )
        rows = []
        for ids in encode(self.tokenizer, list(prompts)):
            self._forget()  # what is cached was computed with the weights of its time
            found = self._llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
            logprobs = found[0].outputs[0].logprobs[0]
            rows.append([logprobs[token].logprob for token in tokens])
        return np.array(rows, dtype=np.float32)

    def first_reading(self, prompts: Sequence[str]) -> np.ndarray:
        """Since the engine was started."""
        return self._first_readings.of(self, prompts)

    def base_holds(self) -> bool:
        """See ``hosts.Host``."""
        return self._first_readings.hold(self)

    def close(self) -> None:
        """End the engine's process."""
        self.core.engine_core.shutdown()

    def _look_at(self, checkpoint: Path) -> None:
        check_checkpoint(checkpoint, self.base)
        if not is_adapter(checkpoint):
            return
        read_updates(checkpoint, matrix_shapes(self.base))
        if self.mode == "adapter" and (rank := adapter_rank(checkpoint)) > self._max_rank:
            raise CheckpointError(
                f"{checkpoint}: rank {rank}, expected at most {self._max_rank}: serve it merged, "
                "or make room for it when the engine is started"
            )

    def _lora_request(self, checkpoint: Path) -> Any:
        from vllm.lora.request import LoRARequest

        # The prefix cache goes by the name: it must stand for the content.
        name = adapter_hash(checkpoint)
        number = self._adapter_ids.setdefault(name, len(self._adapter_ids) + 1)
        return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(checkpoint))

    def _forget(self) -> None:
        """See that nothing is under way, and keep nothing of what was computed."""
        deadline = time.monotonic() + _DRAIN
        while not self.core.reset_prefix_cache():
            if time.monotonic() > deadline:
                raise RuntimeError("requests are left in the engine: restart the process")
            time.sleep(0.05)


@dataclass(slots=True)
class _Job:
    """One scaffold of one group, on its way to an answer.

    Attributes:
        group: The group.
        scaffold: The scaffold.
        prompt: Its text so far; at last the whole string whose next token is scored.
        rationale: The rationale, once generated or from the start where it is forced.
        rationale_tokens: Tokens of ``rationale``.
        stop_reason: Why its generation ended.
        writes: Whether the request under way generates the rationale.
    """

    group: PromptGroup
    scaffold: Scaffold
    prompt: str
    rationale: str = ""
    rationale_tokens: int = 0
    stop_reason: StopReason | None = None
    writes: bool = False


class VllmEngine:
    """Answers prompt groups with what its host serves.

    Args:
        host: The host.
        lora: The adapter that every request names, or None.
    """

    def __init__(self, host: VllmHost, lora: Any):
        self.host, self.lora = host, lora
        self._flying: dict[str, _Job] = {}
        self._stopped = False

    @property
    def fingerprint(self) -> dict[str, str]:
        """Versions, dtypes, device, attention, serving mode and token limit."""
        return dict(self.host.fingerprint)

    def answer(self, groups: Sequence[PromptGroup]) -> Iterator[Answer]:
        """Answers as they come; groups are taken up in the order given.

        Raises:
            ValueError: a prompt is too long for the model; names persona and question.
            RuntimeError: the checkpoint is no longer served, other groups are being answered, or
                vLLM ended a request otherwise than asked.
        """
        self._require_served()
        if self._flying:
            raise RuntimeError("other groups are being answered: finish or close that first")
        letters = "".join(sorted({letter for g in groups for letter in g.question.letters}))
        scaffolds = dict.fromkeys(scaffold for g in groups for scaffold in g.scaffolds)
        letter_ids = letter_token_ids(self.host.tokenizer, letters, scaffolds)
        self._refuse_long(groups)
        waiting, open_jobs = iter(groups), dict[int, int]()
        try:
            while True:
                fresh = list(itertools.islice(waiting, self.host.batch_size - len(open_jobs)))
                open_jobs |= {id(group): len(group.scaffolds) for group in fresh}
                self._take_up(fresh, letter_ids)
                if not self._flying:
                    return
                written = []
                for output in self._step():
                    job = self._flying.pop(output.request_id)
                    if job.writes:
                        self._end_rationale(job, output.outputs[0])
                        written.append(job)
                        continue
                    at = id(job.group)
                    open_jobs[at] -= 1
                    if not open_jobs[at]:
                        del open_jobs[at]
                    yield _answer(job, output.outputs[0].logprobs[0], letter_ids)
                    self._require_served()
                self._ask_letters(written, letter_ids)
        finally:
            self._abort()

    def rationale_limit(self, group: PromptGroup, scaffold: Scaffold) -> int:
        """Tokens after which a rationale is cut off."""
        return self.host.max_rationale_tokens

    def stop(self) -> None:
        """Answer nothing more: what is under way is aborted."""
        self._stopped = True
        self._abort()

    def _refuse_long(self, groups: Sequence[PromptGroup]) -> None:
        for group in groups:
            for scaffold in group.scaffolds:
                left = self.host.max_tokens - _SPARE_TOKENS
                left -= self.host.max_rationale_tokens if scaffold.generates else 0
                text = letter_prompt(group.chat, scaffold, group.given_rationale(scaffold))
                # No token is shorter than a byte, so that few texts need to be encoded for this.
                if len(text.encode()) <= left:
                    continue
                if (length := len(encode(self.host.tokenizer, [text])[0])) > left:
                    raise ValueError(
                        f"persona {group.persona!r}, question {group.question.id!r}, scaffold "
                        f"{scaffold.name!r}: the prompt has {length} tokens, expected at most "
                        f"{left} beside a rationale of {self.host.max_rationale_tokens}: shorten "
                        "it, or evaluate it with the engine transformers"
                    )

    def _take_up(self, groups: Sequence[PromptGroup], letter_ids: Mapping[str, int]) -> None:
        """Ask for everything of some groups that can be asked for at once."""
        jobs = [_job(group, scaffold) for group in groups for scaffold in group.scaffolds]
        writing = [job for job in jobs if job.writes]
        for job, ids in zip(writing, self._encode([job.prompt for job in writing])):
            self._ask_rationale(job, ids)
        self._ask_letters([job for job in jobs if not job.writes], letter_ids)

    def _ask_rationale(self, job: _Job, ids: list[int]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=self.rationale_limit(job.group, job.scaffold),
            temperature=0,
            stop=list(stop_strings(self.host.end_of_turn, (job.scaffold, *job.group.scaffolds))),
            # The model's own idea of what ends a turn is left aside, ours is here.
            ignore_eos=True,
            stop_token_ids=self.host.stop_token_ids,
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        self._add(job, ids, params)

    def _end_rationale(self, job: _Job, output: Any) -> None:
        """Cut what was generated, and make of it the string that asks for the letter."""
        text = self.host.tokenizer.decode(output.token_ids)
        job.rationale, job.stop_reason = cut_rationale(
            text, job.scaffold, self.host.end_of_turn, job.group.scaffolds
        )
        if output.finish_reason not in ("stop", "length") or (
            output.finish_reason == "stop" and job.stop_reason == "length"
        ):
            raise RuntimeError(
                f"{_place(job)}: vLLM ended the rationale for {output.finish_reason!r} "
                f"({output.stop_reason!r}), but its text holds no stop: {text[-80:]!r}"
            )
        job.prompt = letter_prompt(job.group.chat, job.scaffold, job.rationale)
        job.writes = False

    def _ask_letters(self, jobs: Sequence[_Job], letter_ids: Mapping[str, int]) -> None:
        """Ask for the letters of jobs whose rationale stands."""
        ids = self._encode([job.prompt for job in jobs] + [job.rationale for job in jobs])
        for job, prompt, rationale in zip(jobs, ids, ids[len(jobs) :]):
            job.rationale_tokens = len(rationale)
            self._add(job, prompt, self._letter_params(job, letter_ids))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of some texts, all at once: the tokenizer has a thread a processor."""
        return encode(self.host.tokenizer, texts) if texts else []

    def _letter_params(self, job: _Job, letter_ids: Mapping[str, int]) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=1,
            temperature=0,
            logprob_token_ids=[letter_ids[letter] for letter in job.group.question.letters],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # made for this request: a deep copy would take as long as all else
        )

    def _add(self, job: _Job, ids: list[int], params: Any) -> None:
        from vllm.inputs.engine import tokens_input

        number = next(self.host.request_ids)
        self.host.core.add_request(number, tokens_input(ids), params, lora_request=self.lora)
        self._flying[number] = job

    def _step(self) -> list[Any]:
        """The requests that have ended since; of those aborted earlier, nothing."""
        outputs = self.host.core.step()
        return [o for o in outputs if o.finished and o.request_id in self._flying]

    def _require_served(self) -> None:
        if self._stopped:
            raise RuntimeError("the checkpoint is no longer served")

    def _abort(self) -> None:
        if self._flying:
            self.host.core.abort_request(list(self._flying))
            self._flying.clear()


def _job(group: PromptGroup, scaffold: Scaffold) -> _Job:
    """A job at its start, with what is known of its text before anything is generated."""
    if scaffold.generates:
        return _Job(group, scaffold, group.chat + scaffold.opening, writes=True)
    rationale = group.given_rationale(scaffold)
    return _Job(group, scaffold, letter_prompt(group.chat, scaffold, rationale), rationale)


def _answer(job: _Job, logprobs: Mapping[int, Any], letter_ids: Mapping[str, int]) -> Answer:
    return Answer(
        persona=job.group.persona,
        scaffold=job.scaffold.name,
        question_id=job.group.question.id,
        rationale=job.rationale,
        rationale_tokens=job.rationale_tokens,
        stop_reason=job.stop_reason,
        letter_logprobs={
            letter: logprobs[letter_ids[letter]].logprob for letter in job.group.question.letters
        },
        prompt_sha256=sha256_text(job.prompt),
    )


def _place(job: _Job) -> str:
    return f"{job.group.persona}/{job.scaffold.name}/{job.group.question.id}"
