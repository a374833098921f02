"""The evaluation on every real ARC-Challenge test question, with a random two-layer Qwen2.

What it shows: the protocol runs on the real questions, personas and vocabulary (1172 × 11 × 4 rows,
151 665 tokens), its rate and its memory; and, on a subset in the same run, how much faster it is
than a plain loop that evaluates scaffold after scaffold and shares nothing. The model is random, so
nearly every rationale runs to the token limit: the rate is that of the worst case. It is narrow as
well: most of its time goes into the logits of 151 665 tokens a step, which sharing cannot save.

    python benchmarks/eval_real_questions.py --arc-dir ARC --tokenizer-dir TOKENIZER
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from persona_assets import environment
from persona_assets.chat import encode
from persona_assets.evaluation.engines.transformers import TransformersEngine
from persona_assets.evaluation.protocol import (
    Answer,
    PromptGroup,
    cut_rationale,
    evaluate,
    letter_prompt,
    letter_token_ids,
)
from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.hashing import sha256_text
from persona_assets.questions.arc import read_arc
from persona_assets.questions.bank import LETTERS
from persona_assets.study import load_study

TEST_FILE = "ARC-Challenge-Test.jsonl"


class PlainLoop:
    """The protocol without sharing: scaffold by scaffold, ``generate``, then a whole forward.

    ``batch_size`` counts rows, not groups; otherwise as ``TransformersEngine``.
    """

    def __init__(self, model, tokenizer, *, max_rationale_tokens: int, batch_size: int):
        self.model, self.tokenizer = model, tokenizer
        self.limit, self.batch_size = max_rationale_tokens, batch_size
        self.fingerprint = {"engine": "plain loop"}

    def answer(self, groups: Sequence[PromptGroup]) -> Iterator[Answer]:
        """Answers scaffold by scaffold, groups of like length together."""
        groups = sorted(groups, key=lambda group: len(group.chat))
        letter_ids = letter_token_ids(self.tokenizer, LETTERS)
        for scaffold in SCAFFOLDS.values():
            for first in range(0, len(groups), self.batch_size):
                batch = groups[first : first + self.batch_size]
                yield from self._answer(batch, scaffold, letter_ids)

    @torch.inference_mode()
    def _answer(self, groups, scaffold, letter_ids) -> Iterator[Answer]:
        cuts = [("", None)] * len(groups)
        if scaffold.generates:
            inputs = self._pad([group.chat + scaffold.opening for group in groups])
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.limit)
            texts = self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :])
            cuts = [cut_rationale(t, scaffold, [self.tokenizer.eos_token]) for t in texts]
        prompts = [letter_prompt(g.chat, scaffold, r) for g, (r, _) in zip(groups, cuts)]
        inputs = self._pad(prompts)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = self.model(**inputs, position_ids=positions, logits_to_keep=1).logits[:, -1]
        logprobs = logits.log_softmax(-1)[:, list(letter_ids.values())].tolist()
        counts = [len(ids) for ids in encode(self.tokenizer, [text for text, _ in cuts])]
        for group, (rationale, stop), count, prompt, row in zip(
            groups, cuts, counts, prompts, logprobs
        ):
            yield Answer(
                group.persona,
                scaffold.name,
                group.question.id,
                rationale,
                count,
                stop,
                dict(zip(group.question.letters, row)),
                sha256_text(prompt),
            )

    def _pad(self, texts):
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )


def random_model(tokenizer, hidden_size: int) -> Qwen2ForCausalLM:
    """Two layers, weights drawn from seed 0; the vocabulary is the tokenizer's."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config).eval()


def timed(engine, tokenizer, personas, questions) -> tuple[pl.DataFrame, dict[str, float]]:
    """Outcomes and figures of one evaluation."""
    start = time.perf_counter()
    frame = evaluate(engine, tokenizer, personas, questions, list(SCAFFOLDS.values()))
    seconds = time.perf_counter() - start
    tokens = int(frame["rationale_tokens"].sum())
    return frame, {
        "questions": len(questions),
        "rows": frame.height,
        "seconds": round(seconds, 1),
        "rows/s": round(frame.height / seconds, 1),
        "generated tokens": tokens,
        "tokens/s": round(tokens / seconds),
        # ru_maxrss is in KiB on Linux, and never falls: the peak up to here.
        "peak memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def show(columns: dict[str, dict[str, float]]) -> None:
    """One column an evaluation, one line a figure."""
    print(f"{'':<20}" + "".join(f"{name:>24}" for name in columns))
    for figure in next(iter(columns.values())):
        print(f"{figure:<20}" + "".join(f"{c[figure]:>24,}" for c in columns.values()))


def main() -> None:
    """Run the two engines on the subset, then the shared one on everything."""
    args = _parser().parse_args()
    for name in ("arc_dir", "tokenizer_dir"):
        if getattr(args, name) is None:
            raise SystemExit(f"name a folder with --{name.replace('_', '-')}")
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_dir)
    model = random_model(tokenizer, args.hidden_size)
    questions = read_arc(args.arc_dir / TEST_FILE, "eval")
    personas = load_study(environment.study_file("length_matched")).personas
    limit = args.max_rationale_tokens
    shared = TransformersEngine(
        model, tokenizer, max_rationale_tokens=limit, batch_size=args.batch_size
    )
    plain = PlainLoop(model, tokenizer, max_rationale_tokens=limit, batch_size=args.batch_size * 2)
    subset = questions[:: max(1, len(questions) // args.subset)][: args.subset]
    a, shared_figures = timed(shared, tokenizer, personas, subset)
    b, plain_figures = timed(plain, tokenizer, personas, subset)
    whole, whole_figures = timed(shared, tokenizer, personas, questions)
    show({"all questions": whole_figures, "subset": shared_figures, "subset, plain": plain_figures})
    same = (a["predicted_letter"] == b["predicted_letter"]).mean()
    ratio = plain_figures["seconds"] / shared_figures["seconds"]
    print(f"ratio plain / shared  {ratio:.2f}, equal predictions {same:.4f}")
    scored = whole["letter_logprobs"].list.len()
    print(f"letters scored        {dict(sorted(scored.value_counts().rows()))}")
    report = {
        "benchmark": "eval_real_questions",
        "threads": args.threads,
        "hidden_size": args.hidden_size,
        "batch_size": args.batch_size,
        **shared.fingerprint,
        "all": whole_figures,
        "subset": shared_figures,
        "subset_plain": plain_figures,
        "ratio_plain_to_shared": round(ratio, 2),
        "equal_predictions": same,
    }
    print(json.dumps(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = {
        name: os.environ.get(name) for name in (environment.ARC_DIR, environment.TOKENIZER_DIR)
    }
    parser.add_argument("--arc-dir", type=Path, default=folder[environment.ARC_DIR])
    parser.add_argument("--tokenizer-dir", type=Path, default=folder[environment.TOKENIZER_DIR])
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--max-rationale-tokens", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=64, help="persona-question groups")
    parser.add_argument("--subset", type=int, default=24, help="questions compared side by side")
    parser.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
