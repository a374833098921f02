"""How the vLLM engine is held: what it refuses, and what it leaves behind."""

from __future__ import annotations

import pytest

from persona_assets.chat import chat_prompt
from persona_assets.evaluation.engines.vllm_launch import start
from persona_assets.evaluation.hosts import NoEngine
from persona_assets.evaluation.protocol import PromptGroup
from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.questions.bank import user_message
from persona_assets.training.headers import CheckpointError
from persona_assets_tests import small_study as small
from persona_assets_tests.vllm.conftest import EVAL, PERSONAS, random_adapter


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
            pytest.raises(RuntimeError, match="serves another checkpoint"),
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
    with serving.host.serving(adapter) as engine:
        answers = engine.answer(groups())
        next(answers)
        assert left(serving) > 0
        with pytest.raises(RuntimeError, match="other groups are being answered"):
            next(engine.answer(groups()[:2]))
        answers.close()
        assert left(serving) == 0
        # The next ones are not answered with what was left over.
        few = [answer.prompt_sha256 for answer in engine.answer(groups()[:2])]
    known = serving.answers(adapter)["prompt_sha256"]
    assert len(set(few) & set(known)) == 2 * len(SCAFFOLDS)
    with serving.host.serving(adapter) as engine:
        answers = engine.answer(groups())
        next(answers)
    assert left(serving) == 0
    with pytest.raises(RuntimeError, match="no longer served"):
        list(answers)
    assert serving.base_is_unchanged()


def test_adapters_beside_a_float32_base_are_refused_on_a_gpu_before_a_load(
    monkeypatch,
):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    arguments = {"model": "none", "tokenizer": "none", "max_model_len": 9, "max_num_seqs": 1}
    with pytest.raises(NoEngine, match="on a GPU vLLM computes adapters"):
        start(**arguments, dtype="float32", lora_rank=8)
