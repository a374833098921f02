"""vLLM in the process's care: what it is started with, when anew, and what is said without it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from persona_assets import residency
from persona_assets.evaluation import hosts
from persona_assets.evaluation.engines import vllm
from persona_assets.study import Study
from persona_assets_tests.synthetic import small_study

TOKENIZER = Path("the tokenizer")


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    return tmp_path


@pytest.fixture(autouse=True)
def _nothing_resident():
    residency.release()
    yield
    residency.release()


@pytest.fixture
def started(monkeypatch) -> list:
    """The hosts that were started, in place of vLLM's, by its constructor's arguments."""
    signature, found = inspect.signature(vllm.VllmHost), []

    class Recorded:
        def __init__(self, *args, **settings):
            self.told = signature.bind(*args, **settings).arguments
            self.closed = False
            found.append(self)

        def close(self):
            assert not self.closed
            self.closed = True

    monkeypatch.setattr(vllm, "VllmHost", Recorded)
    monkeypatch.setattr(hosts, "find_spec", lambda name: name == "vllm")
    return found


def study(**evaluation: object) -> Study:
    own = small_study()
    settings = own.evaluation.model_dump() | {"engine": "vllm"} | evaluation
    return small_study(evaluation=settings)


def test_vllm_that_is_not_installed_is_named_before_anything_is_loaded(base, monkeypatch):
    monkeypatch.setattr(hosts, "find_spec", lambda name: None)
    with pytest.raises(hosts.NoEngine) as refused:
        hosts.open_host(study(), base, TOKENIZER)
    assert "vLLM is not installed" in str(refused.value)
    assert "set the engine to transformers" in str(refused.value)


def test_vllm_is_started_with_the_studys_settings(base, started):
    asked = study(serving="adapter", batch_size=9, max_rationale_tokens=33)
    host = hosts.open_host(asked, base, TOKENIZER)
    assert started == [host]
    assert host.told == {
        "base": base,
        "tokenizer": TOKENIZER,
        "dtype": asked.evaluation.dtype,
        "serving": "adapter",
        "max_rationale_tokens": 33,
        "batch_size": 9,
        "eos_token_ids": (7, 8),
        "max_rank": asked.training.rank,
    }


def test_vllm_is_started_once_and_closed_before_another_one(base, started, tmp_path_factory):
    one = hosts.open_host(study(), base, TOKENIZER)
    assert hosts.open_host(study(), base, TOKENIZER) is one
    assert not one.closed
    other = hosts.open_host(study(max_rationale_tokens=7), base, TOKENIZER)
    assert one.closed
    assert started == [one, other]
    moved = tmp_path_factory.mktemp("elsewhere")
    (moved / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    third = hosts.open_host(study(max_rationale_tokens=7), moved, TOKENIZER)
    assert third is not other
    residency.release()
    assert [host.closed for host in started] == [True] * 3
