"""LoRA training of cells at the geometry of Qwen2.5-7B: our loop, plain PEFT loops, and the floors.

    python -m benchmarks.gpu_train [--only ceilings,padded,ours,...] [--cells N] [--tiny]

The base has random weights, made on the device in bfloat16 (throughput does not depend on their
values). The workload is a cell of `length_matched`: 1119 rows, 277 k tokens, 103.6 k of them
loss-bearing, 16 examples a step. Every figure is printed as a JSON line as soon as it is known, and
all of them as a table at the end; an error in one part is reported and the next part runs. `--tiny`
runs everything on a small model, on a CPU too.

ceilings   matrix products and copies of the device, and the floors they set for one cell
padded     plain transformers + PEFT loops: 4 x 4 accumulated with checkpointing, and 16 at once
ours       the project's loop over one whole cell, its adapter saved, after a warm-up; with
           `--eager`, also with its layers not compiled
agreement  gradients of one step: padded and packed in bfloat16 against a float32 reference
attach     an adapter on the resident base: new layers, and those of the cell before
cells      `--cells` cells one after another with saved adapters, sources, arms and seeds in turn,
           or as many as `--seconds` leave time for
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel, Qwen2ForCausalLM

from benchmarks.cell_workload import PER_STEP, QWEN, RECIPES, TINY, Size, frame
from benchmarks.padded_loop import padded_gradients, plain_peft, run_steps
from persona_assets.study_schema import TrainingRecipe
from persona_assets.training.lora import TrainingLog, add_gradients, attached, train_adapter
from persona_assets.training.packing import pack


class Benchmark:
    """The base on its device, the workload, every figure so far, and the time left."""

    def __init__(self, size: Size, arguments: argparse.Namespace) -> None:
        self.size, self.arguments = size, arguments
        self.began = time.perf_counter()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.figures: list[dict[str, Any]] = []
        self.recipes = {name: RECIPES[name] for name in RECIPES if arguments.recipe in name}
        self.examples = size.examples()
        self.tokens = sum(len(ids) for ids, _ in self.examples)
        self.loss_tokens = sum(len(ids) - start for ids, start in self.examples)
        self.model = self._random_model()
        self.sync()
        self.report(
            "setup",
            device=torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            torch=torch.__version__,
            transformers=transformers.__version__,
            rows=size.rows,
            tokens=self.tokens,
            loss_tokens=self.loss_tokens,
            parameters=sum(p.numel() for p in self.model.parameters()),
            seconds=time.perf_counter() - self.began,
        )

    def _random_model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:
                model = Qwen2ForCausalLM(self.size.config)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.02)
        return model.eval()

    def report(self, part: str, **figures: Any) -> None:
        """Print one JSON line; seconds and ratios to four digits."""
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
        self.figures.append({"part": part} | rounded)
        print(json.dumps(self.figures[-1]), flush=True)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_left(self) -> float:
        """Of the time for the whole run."""
        return self.arguments.seconds - (time.perf_counter() - self.began)

    @contextmanager
    def part(self, name: str, **labels: Any) -> Iterator[None]:
        """Free memory first; report an error, or that the time limit was hit, and go on."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        limit = max(1.0, min(self.arguments.limit, self.seconds_left()))

        def give_up(*_: object) -> None:
            raise TimeoutError(f"no end after {limit:.0f} s")

        signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.report(name, **labels, error=repr(error)[:300])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def peak_gib(self) -> float:
        """Peak of device memory since the part began, in GiB."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0

    def flops(self) -> float:
        """Of one cell: 2 a weight and token forward, 2 backward to the input, the head scored."""
        head = self.model.get_output_embeddings().weight.numel()
        decoder = sum(p.numel() for n, p in self.model.named_parameters() if "layers" in n)
        return 4.0 * (decoder * self.tokens + head * self.loss_tokens)


def seconds(action: Callable[[], object], sync: Callable[[], None], repeats: int) -> float:
    """Mean seconds of ``action`` after three to warm up."""
    for _ in range(3):
        action()
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    sync()
    return (time.perf_counter() - start) / repeats


def ceilings(bench: Benchmark) -> None:
    """What the device reaches, and the least a cell can take at that."""
    config, half = bench.size.config, {"device": bench.device, "dtype": torch.bfloat16}
    tokens = bench.tokens * PER_STEP // bench.size.rows
    large = 8192 if bench.device.type == "cuda" else 256
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "large": (large, large, large),
        "gate, up": (tokens, width, inner),
        "down": (tokens, inner, width),
        "q, o": (tokens, width, width),
    }
    rates = {}
    with bench.part("ceilings"):
        for name, (m, k, n) in shapes.items():
            a, b = torch.randn(m, k, **half), torch.randn(n, k, **half)
            took = seconds(lambda a=a, b=b: a @ b.T, bench.sync, 20)
            rates[name] = 2 * m * k * n / took
            bench.report("ceilings", product=name, tflops=rates[name] / 1e12)
        source = torch.empty(2**30 if bench.device.type == "cuda" else 2**22, **half)
        target = torch.empty_like(source)
        bandwidth = 4 * source.numel() / seconds(lambda: target.copy_(source), bench.sync, 10)
        weights = 2 * 2 * sum(p.numel() for p in bench.model.parameters())
        steps = -(-bench.size.rows // PER_STEP)
        bench.report(
            "ceilings",
            copy_gb_s=bandwidth / 1e9,
            cell_tflop=bench.flops() / 1e12,
            floor_s_at_989_tflops=bench.flops() / 989e12,
            floor_s_at_large_product=bench.flops() / rates["large"],
            floor_s_by_weight_bytes=steps * weights / bandwidth,
        )


def padded(bench: Benchmark) -> None:
    """Plain loops over 12 steps, scaled to the cell by tokens."""
    steps = [
        bench.examples[first : first + PER_STEP] for first in range(0, bench.size.rows, PER_STEP)
    ][:12]
    share = sum(len(ids) for step in steps for ids, _ in step) / bench.tokens
    for name, recipe in bench.recipes.items():
        for micro, checkpointing in ((PER_STEP, False), (4, True)):
            labels = {"recipe": name, "loop": f"padded {micro}" + " checkpointed" * checkpointing}
            with bench.part("padded", **labels), plain_peft(bench.model, recipe) as adapted:
                if checkpointing:
                    adapted.gradient_checkpointing_enable({"use_reentrant": False})
                try:
                    took, again, first_loss = run_steps(adapted, recipe, steps, micro, bench.sync)
                finally:
                    adapted.gradient_checkpointing_disable()
                    bench.model.disable_input_require_grads()
                bench.report(
                    "padded",
                    **labels,
                    cell_s=took / share,
                    cell_again_s=again / share,
                    steps_measured=len(steps),
                    tokens_s=bench.tokens * share / took,
                    peak_gib=bench.peak_gib(),
                    first_loss=first_loss,
                )


def timed_cell(
    bench: Benchmark, recipe: TrainingRecipe, out: Path, rows: pl.DataFrame, seed: int = 42
) -> tuple[float, TrainingLog]:
    """Seconds from the bare base to the saved adapter, and the log."""
    start = time.perf_counter()
    log = train_adapter(bench.model, rows, recipe, seed, out, base_id="random")
    return time.perf_counter() - start, log


def ours(bench: Benchmark, out: Path) -> None:
    """One whole cell with its adapter saved, after a warm-up of the longest step and two more."""
    rows = frame(bench.examples)
    longest = sorted(bench.examples, key=lambda example: -len(example[0]))[:PER_STEP]
    warm_up = frame(longest + bench.examples[: 2 * PER_STEP])
    stances = {"ours": "default", "ours, not compiled": "force_eager"}
    for name, recipe in bench.recipes.items():
        for loop in list(stances)[: 1 + bench.arguments.eager]:
            labels = {"recipe": name, "loop": loop}
            with bench.part("ours", **labels), torch.compiler.set_stance(stances[loop]):
                train = partial(timed_cell, bench, recipe, out)
                warm_s, _ = train(warm_up)
                bench.report("ours", **labels, warm_up_s=warm_s)
                if bench.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                took, log = train(rows)
                bench.report(
                    "ours",
                    **labels,
                    cell_s=took,
                    optimizing_s=log.wall_seconds,
                    steps_measured=log.steps,
                    tokens_s=bench.tokens / took,
                    tflops=bench.flops() / took / 1e12,
                    peak_gib=bench.peak_gib(),
                    examples_per_pack=log.examples_per_pack,
                    first_loss=log.losses[0],
                    last_loss=log.losses[-1],
                    compiled_graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"],
                )


def to_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The weights only: the rotary frequencies stay float32, as loading leaves them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def agreement(bench: Benchmark) -> None:
    """Gradients of the first step, of an adapter that is not at its start.

    The plain padded loop in float32 is the reference; in bfloat16 the padded loop shows what the
    dtype itself costs, and ours is to be no further away.
    """
    step, recipe = bench.examples[:PER_STEP], RECIPES["r16 q,k,v,o"]

    def drawn(adapted: PeftModel) -> dict[str, torch.nn.Parameter]:
        """LoRA's parameters with both factors drawn: B = 0 would leave A without gradient."""
        generator = torch.Generator().manual_seed(0)
        parameters = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in parameters.values():
                draw = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(draw / 100)
        return parameters

    def result(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        return {name: p.grad.detach().float().clone() for name, p in parameters.items()}

    def of_padded(micro: int) -> tuple[float, dict[str, torch.Tensor]]:
        with plain_peft(bench.model, recipe) as adapted:
            parameters = drawn(adapted)
            loss = padded_gradients(adapted, step, micro)
            return float(loss), result(parameters)

    def of_ours(per_pack: int) -> tuple[float, dict[str, torch.Tensor]]:
        with attached(bench.model, recipe, 0) as adapted:
            parameters = drawn(adapted)
            parts = (step[first : first + per_pack] for first in range(0, len(step), per_pack))
            loss = add_gradients(bench.model, [pack(part, bench.device) for part in parts])
            if loss is None:
                raise MemoryError(f"{per_pack} examples a pack")
            return float(loss), result(parameters)

    def compare(
        name: str, found: tuple[float, dict[str, torch.Tensor]], to: str = "padded float32"
    ) -> None:
        loss, gradients = found
        expected_loss, expected = known[to]
        errors = [float((gradients[n] - expected[n]).norm() / expected[n].norm()) for n in expected]
        bench.report(
            "agreement",
            gradients=name,
            against=to,
            loss=loss,
            loss_difference=loss - expected_loss,
            mean_relative_error=sum(errors) / len(errors),
            worst_relative_error=max(errors),
        )

    known: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}
    with bench.part("agreement", gradients="float32 reference"):
        to_dtype(bench.model, torch.float32)
        try:
            known["padded float32"] = of_padded(2)
            compare("ours float32", of_ours(4))
        finally:
            to_dtype(bench.model, torch.bfloat16)
    with bench.part("agreement", gradients="padded bfloat16"):
        known["padded bfloat16"] = of_padded(PER_STEP)
        compare("padded bfloat16", known["padded bfloat16"])
    with bench.part("agreement", gradients="ours bfloat16"):
        found = of_ours(PER_STEP)
        compare("ours bfloat16", found)
        compare("ours bfloat16", found, "padded bfloat16")


def attach(bench: Benchmark) -> None:
    """Seconds from the bare base to a fresh adapter on it, and back to the bare base."""

    def once(recipe: TrainingRecipe) -> float:
        start = time.perf_counter()
        with attached(bench.model, recipe, 42):
            pass
        bench.sync()
        return time.perf_counter() - start

    for name, recipe in bench.recipes.items():
        with bench.part("attach", recipe=name):
            once(recipe.model_copy(update={"rank": 1}))  # the base now keeps others' layers
            first, *following = (once(recipe) for _ in range(6))
            bench.report("attach", recipe=name, which="first", seconds=first)
            bench.report("attach", recipe=name, which="next", seconds=sum(following) / 5)


def cells(bench: Benchmark, out: Path) -> None:
    """Cells in turn, as a worker trains them, for as long as there is time for another one."""
    recipe = RECIPES["r16 q,k,v,o"]
    arms = [frame(bench.size.examples(arm)) for arm in range(4)]
    began, taken = time.perf_counter(), [0.0]

    def report() -> None:
        saved = sorted(out.glob("cell-*/adapter_config.json"))
        bench.report(
            "cells",
            cells=bench.arguments.cells,
            trained=len(taken) - 1,
            adapters_saved=len(saved),
            total_s=sum(taken),
            peak_gib=bench.peak_gib(),
        )

    with bench.part("cells"):
        try:
            for number in range(bench.arguments.cells):
                if bench.seconds_left() < 1.2 * max(taken[-2:]):
                    break
                rows, seed = arms[number % len(arms)], (42, 137, 256)[number % 3]
                took, log = timed_cell(bench, recipe, out / f"cell-{number}", rows, seed)
                taken.append(took)
                bench.report(
                    "cells",
                    cell=number,
                    seconds=took,
                    last_loss=log.losses[-1],
                    so_far_s=time.perf_counter() - began,
                )
        finally:
            report()


def table(bench: Benchmark) -> None:
    """The loops, side by side."""
    loops = [figure for figure in bench.figures if "cell_s" in figure]
    print(f"\n| recipe | loop | s a cell | tokens/s | GiB |\n|{'---|' * 5}")
    for f in loops:
        print(
            f"| {f['recipe']} | {f['loop']} | {f['cell_s']:.1f} | {f['tokens_s']:.0f} "
            f"| {f['peak_gib']:.1f} |"
        )


def main() -> None:
    """Run the parts asked for."""
    parts = ("ceilings", "padded", "ours", "agreement", "attach", "cells")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(parts), help="parts, comma-separated")
    parser.add_argument("--eager", action="store_true", help="time our loop not compiled, too")
    parser.add_argument("--recipe", default="", help="recipes whose name holds this")
    parser.add_argument("--cells", type=int, default=39)
    parser.add_argument("--limit", type=int, default=300, help="seconds a part may take")
    parser.add_argument("--seconds", type=float, default=math.inf, help="all there is for the run")
    parser.add_argument("--tiny", action="store_true", help="a small model")
    arguments = parser.parse_args()
    bench = Benchmark(TINY if arguments.tiny else QWEN, arguments)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        actions: dict[str, Callable[[], None]] = {
            "ceilings": lambda: ceilings(bench),
            "ours": lambda: ours(bench, out),
            "agreement": lambda: agreement(bench),
            "attach": lambda: attach(bench),
            "padded": lambda: padded(bench),
            "cells": lambda: cells(bench, out),
        }
        for name in arguments.only.split(","):
            actions[name]()
    table(bench)


if __name__ == "__main__":
    main()
