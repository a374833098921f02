"""How the vLLM engine is held: what it refuses, what it leaves behind, who it ends with."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from persona_assets.chat import chat_prompt
from persona_assets.evaluation.protocol import PromptGroup
from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.questions.bank import user_message
from persona_assets.training.headers import CheckpointError
from persona_assets_tests import small_study as small
from persona_assets_tests.vllm.conftest import EVAL, PERSONAS, random_adapter

#: Starts an engine, says so, and waits to be killed.
STARTER = """
import sys
from pathlib import Path
from persona_assets.evaluation.engines.vllm import VllmHost
base, tokenizer = map(Path, sys.argv[1:])
host = VllmHost(base, tokenizer, dtype="float32", serving="merged", max_rationale_tokens=8,
                batch_size=4, eos_token_ids=(), max_rank=8)
print("started", flush=True)
sys.stdin.read()
"""


def groups() -> list[PromptGroup]:
    return [
        PromptGroup(
            name,
            question,
            chat_prompt(small.tokenizer(), system, user_message(question)),
            tuple(SCAFFOLDS.values()),
        )
        for name, system in PERSONAS.items()
        for question in EVAL
    ]


def left(serving) -> int:
    """Requests that the engine still has."""
    return serving.host.core.get_num_unfinished_requests()


def test_an_adapter_above_the_largest_rank_is_refused_beside_the_base_and_can_be_merged(
    material, merging, beside, tmp_path
):
    adapter = random_adapter(material.base, tmp_path / "adapter", rank=65)
    with (
        pytest.raises(CheckpointError, match="rank 65, expected at most 64: serve it merged"),
        beside.host.serving(adapter),
    ):
        pass
    with merging.host.serving(adapter):
        assert (merging.probe() != merging.before).any()
    assert beside.base_is_unchanged()
    assert merging.base_is_unchanged()


@pytest.mark.parametrize("mode", ["merging", "beside"])
def test_a_checkpoint_of_another_base_is_refused_and_the_host_goes_on(request, untied, mode):
    serving = request.getfixturevalue(mode)
    for folder, says in ((untied.adapters[0], "lora_A"), (untied.base, "hidden_size")):
        with pytest.raises(CheckpointError, match=says), serving.host.serving(folder):
            pass
    assert serving.base_is_unchanged()


def test_one_checkpoint_is_served_at_a_time(material, merging):
    one, other = material.adapters
    with merging.host.serving(one):
        before = merging.probe()
        with (
            pytest.raises(RuntimeError, match="serves another checkpoint: leave that one first"),
            merging.host.serving(other),
        ):
            pass
        assert (merging.probe() == before).all()
    assert merging.base_is_unchanged()


def test_a_prompt_too_long_is_refused_before_anything_is_computed(merging):
    asked = groups()
    short = asked[1]
    long = PromptGroup("villain", EVAL[0], short.chat + " moss" * 600, short.scaffolds)
    with (
        merging.host.serving(None) as engine,
        pytest.raises(ValueError, match=f"persona 'villain', question '{EVAL[0].id}', scaffold"),
    ):
        next(engine.answer([short, long]))
    assert left(merging) == 0


@pytest.mark.parametrize("mode", ["merging", "beside"])
def test_an_abandoned_answer_leaves_nothing_under_way(request, material, mode):
    serving, adapter = request.getfixturevalue(mode), material.adapters[0]
    whole = serving.answers(adapter)
    with serving.host.serving(adapter) as engine:
        answers = engine.answer(groups())
        next(answers)
        assert left(serving) > 0
        answers.close()
        assert left(serving) == 0
        # The next one is not answered with what was left over.
        again = material.answers(engine)
    assert again.height == whole.height
    assert (again["prompt_sha256"] == whole["prompt_sha256"]).all()
    with (
        pytest.raises(ZeroDivisionError),
        serving.host.serving(adapter) as engine,
    ):
        answers = engine.answer(groups())
        next(answers)
        raise ZeroDivisionError
    assert left(serving) == 0
    with pytest.raises(RuntimeError, match="no longer served"):
        list(answers)
    assert serving.base_is_unchanged()


def test_an_engine_ends_with_the_process_that_started_it_even_if_that_is_killed(untied):
    command = [sys.executable, "-c", STARTER, untied.base, untied.tokenizer]
    starter = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with starter:
        said = iter(starter.stdout.readline, "")
        assert any("started" in line for line in said)
        processes = psutil.Process(starter.pid).children(recursive=True)
        starter.kill()
    assert len(processes) >= 2
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    assert not alive
