"""An engine server over vLLM gives its clients what the engine itself gives."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from persona_assets.evaluation.engines.remote import RemoteHost
from persona_assets.evaluation.probe import probe_prompts
from persona_assets.evaluation.server import EngineServer
from persona_assets_tests import small_study as small
from persona_assets_tests.vllm.conftest import PERSONAS
from persona_assets_tests.vllm.test_agreement import agree

IDENTITY = {"base": "the base", "serving": "merged"}


@pytest.fixture
def remote(material, merging, monkeypatch):
    monkeypatch.setattr(merging.host, "close", lambda: None)  # others use it afterwards
    server = EngineServer(merging.host, IDENTITY, material.base.parent, port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield RemoteHost(server.url, IDENTITY)
    server.shut_down()
    thread.join()


def test_clients_of_a_server_get_what_vllm_gives(material, merging, remote):
    for checkpoint in (None, material.adapters[0]):
        with remote.serving(checkpoint) as engine:
            assert engine.fingerprint == merging.host.fingerprint
            agree(merging.answers(checkpoint), material.answers(engine))
    found = remote.probe(probe_prompts(small.tokenizer(), PERSONAS))
    assert np.array_equal(found, merging.before)
