"""One cell's evaluation with vLLM at the geometry of Qwen2.5-7B.

The workload is the study's: 11 personas × 1172 published ARC-Challenge test questions × 4
scaffolds, real text through the real tokenizer, stop strings and detokenizing on. The weights are
random (their values do not change a rate), so nothing stops by itself: each rationale's limit is
drawn from 60 to 160 tokens, seeded. Sections, in any order:

merged    the engine as the study uses it: start, switches, one whole cell with an adapter merged
adapter   the same with the adapter served beside the base
two_pass  as the earlier scripts did: default engine, scaffold after scaffold, all rationales
          before the first letter; on ``--two-pass-personas``, scaled to the cell

    python -m benchmarks.gpu_eval --work FOLDER prepare          # random base and adapters
    python -m benchmarks.gpu_eval --work FOLDER merged two_pass adapter
    python -m benchmarks.gpu_eval --tiny --work FOLDER prepare merged two_pass adapter   # a CPU

Each figure is printed as a JSON line as soon as it is known; a section that fails says so and the
next one is run. Exit status 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from persona_assets import environment
from persona_assets.chat import chat_prompt, encode
from persona_assets.evaluation.probe import probe_prompts
from persona_assets.evaluation.protocol import (
    PromptGroup,
    cut_rationale,
    end_of_turn,
    letter_prompt,
    letter_token_ids,
    stop_strings,
)
from persona_assets.evaluation.scaffolds import SCAFFOLDS, Scaffold
from persona_assets.questions.arc import read_arc
from persona_assets.questions.bank import LETTERS, user_message
from persona_assets.study import load_study

#: Qwen2.5-7B-Instruct's configuration.
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
#: Of the same kind, for a CPU.
TINY = QWEN_7B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "torch_dtype": "float32",
}
RANK, N_ADAPTERS = 16, 3
EOS = (151645, 151643)
SHORTEST, LONGEST = 60, 160
#: A H100's dense bfloat16 rate and memory rate (SXM5, as published).
FLOPS, BYTES = 989e12, 3.35e12
PROGRESS_SECONDS = 15.0


def emit(section: str, **figures: Any) -> None:
    """Print one JSON line."""
    print(json.dumps({"section": section, **figures}), flush=True)


# --- what is evaluated ---


def modules(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) features of the linear modules of one layer."""
    wide, ff = config["hidden_size"], config["intermediate_size"]
    narrow = wide // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "self_attn.q_proj": (wide, wide),
        "self_attn.k_proj": (narrow, wide),
        "self_attn.v_proj": (narrow, wide),
        "self_attn.o_proj": (wide, wide),
        "mlp.gate_proj": (ff, wide),
        "mlp.up_proj": (ff, wide),
        "mlp.down_proj": (wide, ff),
    }


def words(tokenizer: Any) -> list[int]:
    """The tokens that are a space and a whole word, and that such a text is encoded as."""
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    shaped = {i: text for i, text in texts.items() if re.fullmatch(" [a-z]{3,}", text)}
    ids = encode(tokenizer, list(shaped.values()))
    return [i for i, found in zip(shaped, ids) if found == [i]]


def prepare(work: Path, config: dict[str, Any], tokenizer: Any) -> None:
    """Write a random base in one safetensors file a layer, and random adapters.

    The head favours whole words, so that what is generated is encoded as it was generated, like a
    trained model's text: of other random tokens hardly any sequence is, and each letter's request
    would compute its whole rationale anew.
    """
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config["torch_dtype"])
    generator = torch.Generator(device).manual_seed(0)
    wide, vocabulary, layers = (
        config[name] for name in ("hidden_size", "vocab_size", "num_hidden_layers")
    )

    def drawn(*shape: int, scale: float = 0.02) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        return tensor.normal_(0, scale, generator=generator).cpu()

    base = work / "base"
    base.mkdir(parents=True, exist_ok=True)
    placed = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, base / name)
        placed.update(dict.fromkeys(tensors, name))

    head, favoured = drawn(vocabulary, wide), torch.zeros(vocabulary, dtype=torch.bool)
    favoured[words(tokenizer)] = True
    head[~favoured] *= 0.05
    save(
        "model-ends.safetensors",
        {
            "model.embed_tokens.weight": drawn(vocabulary, wide),
            "lm_head.weight": head,
            "model.norm.weight": torch.ones(wide, dtype=dtype),
        },
    )
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        tensors = {f"{stem}{m}.weight": drawn(*shape) for m, shape in modules(config).items()}
        for name in ("q", "k", "v"):
            out = modules(config)[f"self_attn.{name}_proj"][0]
            tensors[f"{stem}self_attn.{name}_proj.bias"] = drawn(out)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}{name}.weight"] = torch.ones(wide, dtype=dtype)
        save(f"model-{layer:02}.safetensors", tensors)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (base / "config.json").write_text(json.dumps(config))
    for number in range(N_ADAPTERS):
        tensors = {}
        for layer in range(layers):
            for name in ("q", "k", "v", "o"):
                out, into = modules(config)[f"self_attn.{name}_proj"]
                stem = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_"
                tensors[f"{stem}A.weight"] = drawn(RANK, into, scale=0.01)
                tensors[f"{stem}B.weight"] = drawn(out, RANK, scale=0.01)
        folder = work / "adapters" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        targets = [f"{name}_proj" for name in "qkvo"]
        lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
        (folder / "adapter_config.json").write_text(json.dumps(lora | {"target_modules": targets}))


def limit(group: PromptGroup, scaffold: Scaffold) -> int:
    """The length of one rationale, in tokens: the same in every section."""
    place = f"{group.persona}/{group.question.id}/{scaffold.name}"
    return random.Random(place).randint(SHORTEST, LONGEST)


class Workload:
    """The prompts of one cell."""

    def __init__(self, args: argparse.Namespace):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_dir)
        personas = load_study(environment.study_file("length_matched")).personas
        questions = read_arc(args.arc_dir / "ARC-Challenge-Test.jsonl", "eval")
        self.rows = len(personas) * len(questions) * len(SCAFFOLDS)
        self.personas = dict(list(personas.items())[: args.personas])
        self.questions = questions[: args.questions]

    def groups(self, n_personas: int | None = None) -> list[PromptGroup]:
        """Persona after persona, as ``protocol.evaluate`` asks."""
        return [
            PromptGroup(
                name,
                question,
                chat_prompt(self.tokenizer, system, user_message(question)),
                tuple(SCAFFOLDS.values()),
            )
            for name, system in list(self.personas.items())[:n_personas]
            for question in self.questions
        ]


# --- measuring ---


class Meter:
    """Counts what an engine's ended requests computed, and says so while they run."""

    def __init__(self, section: str, config: dict[str, Any], core: Any):
        self.section, self.config, self.core = section, config, core
        self.step = core.step

    @contextmanager
    def running(self, what: str, cell_rows: int, rows: int) -> Iterator[None]:
        """Report what happens meanwhile, and what the whole cell would take at that rate."""
        self.count: Counter[str] = Counter()
        self.start = self.said = time.perf_counter()
        self.cpu = time.process_time()
        self.core.step = self._counted
        try:
            yield
        finally:
            self.core.step = self.step
            seconds = time.perf_counter() - self.start
            figures = self._figures(seconds)
            whole = {"cell_s": round(seconds * cell_rows / rows, 1), "scaled_from_rows": rows}
            emit(self.section, what=what, **figures, **whole, floors=self._floors())

    def _counted(self) -> list[Any]:
        outputs = self.step()
        for output in outputs:
            if output.finished:
                self.count["requests"] += 1
                self.count["prompt_tokens"] += len(output.prompt_token_ids)
                self.count["cached_tokens"] += output.num_cached_tokens or 0
                self.count["generated_tokens"] += len(output.outputs[0].token_ids)
        now = time.perf_counter()
        if now - self.said > PROGRESS_SECONDS:
            self.said = now
            emit(self.section, what="progress", **self._figures(now - self.start))
        return outputs

    def _figures(self, seconds: float) -> dict[str, Any]:
        n = self.count
        return {
            "seconds": round(seconds, 2),
            # Of this process, which turns tokens into text: at ``seconds`` it is the bottleneck.
            "own_cpu_s": round(time.process_time() - self.cpu, 2),
            **n,
            "generated_per_s": round(n["generated_tokens"] / seconds),
            "cache_hit": round(n["cached_tokens"] / max(1, n["prompt_tokens"]), 4),
        }

    def _floors(self) -> dict[str, Any]:
        """Seconds at the device's published rates: matrix products, and bytes that must be read."""
        c, n = self.config, self.count
        per_token = c["num_hidden_layers"] * sum(math.prod(s) for s in modules(c).values())
        head = c["hidden_size"] * c["vocab_size"]
        run = n["prompt_tokens"] - n["cached_tokens"] + n["generated_tokens"]
        flops = 2 * (per_token * run + head * n["generated_tokens"])
        head_size = c["hidden_size"] // c["num_attention_heads"]
        token_bytes = 2 * 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * head_size
        # Each generated token reads the keys and values of its prompt, at least.
        context = n["prompt_tokens"] / max(1, n["requests"])
        return {
            "flop_s": round(flops / FLOPS, 1),
            "kv_read_s": round(n["generated_tokens"] * context * token_bytes / BYTES, 1),
            "teraflop": round(flops / 1e12),
        }


def host_section(args: argparse.Namespace, load: Workload, serving: str) -> None:
    """The engine as the study uses it: start, switches, one cell, base unchanged."""
    from persona_assets.evaluation.engines.vllm import VllmHost

    start = time.perf_counter()
    host = VllmHost(
        args.work / "base",
        args.tokenizer_dir,
        dtype=args.config["torch_dtype"],
        serving=serving,
        max_rationale_tokens=LONGEST,
        batch_size=args.batch_size,
        eos_token_ids=EOS,
        max_rank=RANK,
    )
    seconds = time.perf_counter() - start
    emit(serving, what="start", seconds=round(seconds, 1), **host.fingerprint)
    try:
        _cell(args, load, serving, host)
    finally:
        host.close()


def _cell(args: argparse.Namespace, load: Workload, serving: str, host: Any) -> None:
    prompts = probe_prompts(load.tokenizer, load.personas)
    before = host.probe(prompts)
    adapters = [args.work / "adapters" / str(number) for number in range(N_ADAPTERS)]
    groups = load.groups()
    meter = Meter(serving, args.config, host.core)

    def answer(checkpoint: Path | None, asked: Sequence[PromptGroup], what: str) -> None:
        entering = time.perf_counter()
        with host.serving(checkpoint) as engine:
            entered = time.perf_counter() - entering
            engine.rationale_limit = limit
            stops: Counter[str | None] = Counter()
            with meter.running(what, load.rows, len(asked) * len(SCAFFOLDS)):
                for answered in engine.answer(asked):
                    stops[answered.stop_reason] += 1
            leaving = time.perf_counter()
        left = time.perf_counter() - leaving
        emit(
            serving,
            what=f"{what}: switch",
            enter_s=round(entered, 3),
            leave_s=round(left, 3),
            stops={str(reason): n for reason, n in stops.items()},
        )

    answer(None, groups[:: max(1, len(groups) // args.warm_up)], "warm-up")
    for adapter in [*adapters, *adapters]:
        answer(adapter, groups[:1], f"adapter {adapter.name}, one question")
    # A whole merged model takes the base's place in the same engine; here it is the base itself.
    answer(args.work / "base", groups[:1], "whole model, one question")
    with host.serving(adapters[0]):
        # Requests that name no adapter: they see one that is merged, and none beside the base.
        adapted = host.probe(prompts)
    after = host.probe(prompts)
    emit(
        serving,
        what="base unchanged",
        same_bits=bool((before.view(np.uint32) == after.view(np.uint32)).all()),
        moved_meanwhile=float(np.abs(adapted - before).max()),
    )
    answer(adapters[0], groups, "cell")


def two_pass(args: argparse.Namespace, load: Workload) -> None:
    """The earlier scripts' way, on vLLM's defaults: generate everything, then read everything."""
    from persona_assets.evaluation.engines.vllm_launch import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    start = time.perf_counter()
    from vllm import LLM

    llm = LLM(
        model=str(args.work / "base"),
        tokenizer=str(args.tokenizer_dir),
        dtype=args.config["torch_dtype"],
        max_model_len=2048 + LONGEST,
        disable_log_stats=True,
        enforce_eager=args.tiny,
    )
    emit("two_pass", what="start", seconds=round(time.perf_counter() - start, 1))
    core = llm.llm_engine
    try:
        meter = Meter("two_pass", args.config, core)
        groups = load.groups(args.two_pass_personas)
        _two_passes(llm, load, groups[:20])
        core.reset_prefix_cache()
        with meter.running("cell", load.rows, len(groups) * len(SCAFFOLDS)):
            _two_passes(llm, load, groups)
    finally:
        core.engine_core.shutdown()


def _two_passes(llm: Any, load: Workload, groups: Sequence[PromptGroup]) -> None:
    from vllm import SamplingParams

    ends = end_of_turn(load.tokenizer, EOS)
    letters = set(letter_token_ids(load.tokenizer, LETTERS).values())
    read = SamplingParams(max_tokens=1, temperature=0, logprobs=20)

    def ask(texts: list[str], params: Any) -> list[Any]:
        prompts = [{"prompt_token_ids": ids} for ids in encode(load.tokenizer, texts)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        # A whole cell is larger than the cache: nothing of one pass would be left for the next.
        llm.reset_prefix_cache()
        return outputs

    for scaffold in SCAFFOLDS.values():
        rationales = [""] * len(groups)
        if scaffold.generates:
            params = [
                SamplingParams(
                    max_tokens=limit(group, scaffold),
                    temperature=0,
                    ignore_eos=True,
                    stop=list(stop_strings(ends)),
                    skip_special_tokens=False,
                )
                for group in groups
            ]
            outputs = ask([group.chat + scaffold.opening for group in groups], params)
            rationales = [cut_rationale(o.outputs[0].text, scaffold, ends)[0] for o in outputs]
        texts = [letter_prompt(g.chat, scaffold, r) for g, r in zip(groups, rationales)]
        for output in ask(texts, read):
            letters & output.outputs[0].logprobs[0].keys()  # may be none: hence 20 were asked for


def main() -> None:
    """Run the sections that were named."""
    args = _parser().parse_args()
    args.config = TINY if args.tiny else QWEN_7B
    sections: dict[str, Callable[[], None]] = {
        "prepare": lambda: prepare(args.work, args.config, Workload(args).tokenizer),
        "merged": lambda: host_section(args, Workload(args), "merged"),
        "adapter": lambda: host_section(args, Workload(args), "adapter"),
        "two_pass": lambda: two_pass(args, Workload(args)),
    }
    failed = []
    for name in args.sections:
        start = time.perf_counter()
        try:
            sections[name]()
        except Exception as error:  # the next section is worth its time all the same
            failed.append(name)
            emit(name, error=f"{type(error).__name__}: {error}"[:2000])
            traceback.print_exc()
        emit(name, what="done", seconds=round(time.perf_counter() - start, 1))
    sys.exit(1 if failed else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = {
        name: Path(os.environ.get(name, "."))
        for name in (environment.ARC_DIR, environment.TOKENIZER_DIR)
    }
    names = ("prepare", "merged", "adapter", "two_pass")
    parser.add_argument("sections", nargs="+", choices=names)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the random base and adapters"
    )
    parser.add_argument("--arc-dir", type=Path, default=folder[environment.ARC_DIR])
    parser.add_argument("--tokenizer-dir", type=Path, default=folder[environment.TOKENIZER_DIR])
    parser.add_argument("--personas", type=int, default=None, help="the first N; all by default")
    parser.add_argument("--questions", type=int, default=None, help="the first N of each persona")
    parser.add_argument("--two-pass-personas", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=675, help="groups under way at once")
    parser.add_argument("--warm-up", type=int, default=400, help="groups asked of the base first")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a CPU")
    return parser


if __name__ == "__main__":
    main()
