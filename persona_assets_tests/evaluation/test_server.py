"""Hosts and the engine server: what clients get over HTTP is what the server's host gives."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import httpx2
import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from persona_assets.chat import chat_prompt
from persona_assets.evaluation.engines.remote import RemoteHost
from persona_assets.evaluation.engines.transformers import TransformersHost
from persona_assets.evaluation.hosts import NoEngine
from persona_assets.evaluation.probe import probe_prompts
from persona_assets.evaluation.protocol import Answer, PromptGroup, evaluate
from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.evaluation.server import EngineServer
from persona_assets.residency import release, resident_model
from persona_assets.training.headers import CheckpointError
from persona_assets.training.lora import train_adapter
from persona_assets.unavailable import Unavailable
from persona_assets_tests.evaluation import small
from persona_assets_tests.small_study import QUESTIONS, dataset, model, tokenizer
from persona_assets_tests.synthetic import small_study

STUDY = small_study()
ASKED = [q for q in QUESTIONS if q.split == "eval"][:6]
ALL = (*SCAFFOLDS.values(), small.FORCED)
IDENTITY = {"base": "the base", "serving": "merged", "eos_token_ids": (1, 2)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A base model, its tokenizer, an adapter of it, and the two merged, on disk."""
    root = tmp_path_factory.mktemp("store")
    base, cell = model(), STUDY.cells[0]
    base.save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "tokenizer")
    rows = dataset(STUDY, cell)
    train_adapter(base, rows, STUDY.training, cell.seed, root / "adapter", base_id="base")
    release()
    with host(root).serving(root / "adapter") as engine:
        engine.model.save_pretrained(root / "merged")
    yield root
    release()


def host(store, serving="merged") -> TransformersHost:
    return TransformersHost(
        store / "base",
        store / "tokenizer",
        dtype="float32",
        serving=serving,
        max_rationale_tokens=12,
        batch_size=5,
    )


def measure(host, checkpoint=None) -> pl.DataFrame:
    forced = small.forced(ASKED)
    with host.serving(checkpoint) as engine:
        return evaluate(engine, tokenizer(), small.PERSONAS, ASKED, ALL, forced)


def logprobs(frame: pl.DataFrame) -> np.ndarray:
    values = frame["letter_logprobs"].list.eval(pl.element().struct.field("value"))
    return values.explode().to_numpy()


@contextmanager
def serving(store, served=None):
    server = EngineServer(served or host(store), IDENTITY, store, port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.url
    finally:
        server.shut_down()
        thread.join()


@pytest.fixture(scope="module")
def remote(store):
    with serving(store) as url:
        yield RemoteHost(url, IDENTITY)


def test_merged_and_adapter_agree_and_differ_from_the_base(store):
    base = measure(host(store))
    merged, beside = (measure(host(store, m), store / "adapter") for m in ("merged", "adapter"))
    assert (merged["rationale"] == beside["rationale"]).all()
    # Float32 sums in another order; the adapter itself moves every log-probability further.
    assert np.abs(logprobs(merged) - logprobs(beside)).max() < 2e-4
    same_text = merged["rationale"] == base["rationale"]
    moved = np.abs(logprobs(merged.filter(same_text)) - logprobs(base.filter(same_text)))
    assert np.median(moved) > 0.01
    assert_frame_equal(measure(host(store)), base)
    assert_frame_equal(measure(host(store), store / "merged"), merged)


def test_engines_tell_how_they_serve(store):
    found = []
    for mode in ("merged", "adapter"):
        with host(store, mode).serving(store / "adapter") as engine:
            found.append(engine.fingerprint["serving"])
    assert found == ["merged", "adapter"]


def test_a_client_gets_what_the_host_gives(store, remote):
    for checkpoint in (None, store / "adapter", store / "merged"):
        assert_frame_equal(measure(remote, checkpoint), measure(host(store), checkpoint))
    with remote.serving(None) as theirs, host(store).serving(None) as ours:
        assert theirs.fingerprint == ours.fingerprint
    prompts = probe_prompts(tokenizer(), STUDY.personas)
    assert np.array_equal(remote.probe(prompts), host(store).probe(prompts))


def test_two_clients_are_served_one_after_the_other(store):
    """Under two checkpoints, at once; each gets what it gets alone."""
    at_work, most = [], []

    class Watched(TransformersHost):
        @contextmanager
        def serving(self, checkpoint):
            at_work.append(checkpoint)
            most.append(len(at_work))
            with super().serving(checkpoint) as engine:
                yield engine
            at_work.remove(checkpoint)

    watched = host(store)
    watched.__class__ = Watched
    found = {}
    with serving(store, watched) as url:
        threads = [
            threading.Thread(
                target=lambda c=c: found.update({c: measure(RemoteHost(url, IDENTITY), c)})
            )
            for c in (None, store / "adapter", store / "merged")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(most) == 1
    for checkpoint, frame in found.items():
        assert_frame_equal(frame, measure(host(store), checkpoint))


def test_a_server_of_something_else_is_refused(remote):
    wanted = IDENTITY | {"serving": "adapter", "dtype": "bfloat16"}
    with pytest.raises(NoEngine) as refused:
        RemoteHost(remote._url, wanted)
    assert "serving: merged and not adapter; dtype: None and not bfloat16" in str(refused.value)


def test_nobody_there_is_unavailable_and_says_what_to_start():
    with pytest.raises(Unavailable, match="persona-assets serve"):
        RemoteHost("http://127.0.0.1:9", IDENTITY)


def test_only_checkpoints_of_the_store_are_served_and_only_those_that_were_meant(
    store, remote, tmp_path
):
    outside = tmp_path / "adapter"
    outside.symlink_to(store / "adapter")
    inside = store / "link"
    inside.symlink_to(tmp_path)
    measure(remote, outside)  # a link into the store names what lies in it
    elsewhere = tmp_path / "copy"
    elsewhere.mkdir()
    for file in (store / "adapter").iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
    for folder in (elsewhere, inside / "copy"):
        with pytest.raises(ValueError, match="lies outside this server's store"):
            measure(remote, folder)
    with remote.serving(store / "adapter") as engine:
        engine._checkpoint["sha256"] = "0" * 64
        with pytest.raises(ValueError, match=r"and 0{64} was asked for"):
            list(engine.answer([]))


def test_a_checkpoint_that_does_not_fit_is_the_clients_error_and_the_server_goes_on(store, remote):
    broken = store / "broken"
    broken.mkdir()
    for file in (store / "adapter").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(CheckpointError, match="lora_A"):
        measure(remote, broken)
    assert_frame_equal(measure(remote), measure(host(store)))


def meant_for(**more: object) -> bytes:
    return json.dumps({"identity": json.loads(json.dumps(IDENTITY)), **more}).encode()


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"Content-Type": "text/plain"}, b"{}", 415),
        ({"Content-Type": "application/json"}, b"[]", 400),
        ({"Content-Type": "application/json"}, b"{", 400),
        ({"Content-Type": "application/json"}, b"[" * 100_000, 400),
        ({"Content-Type": "application/json"}, b"{}", 409),
        ({"Content-Type": "application/json", "Origin": "http://example.org"}, b"{}", 403),
        ({"Content-Type": "application/json", "Host": "example.org:3001"}, b"{}", 403),
    ],
)
def test_what_is_no_request_is_refused(remote, headers, content, status):
    answer = httpx2.post(f"{remote._url}/answers", headers=headers, content=content)
    assert answer.status_code == status
    assert httpx2.post(f"{remote._url}/nothing", json={}).status_code == 404
    assert httpx2.get(f"{remote._url}/engine", headers={"Origin": "null"}).status_code == 403


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/answers", {}),
        ("/answers", {"checkpoint": "adapter", "groups": []}),
        ("/answers", {"checkpoint": None, "groups": [{"persona": "villain"}]}),
        ("/answers", {"checkpoint": None, "groups": [7]}),
        ("/probe", {"prompts": "a"}),
        ("/probe", {"prompts": [7]}),
    ],
)
def test_a_request_that_cannot_be_read_is_its_clients_error_and_no_engines(remote, path, body):
    with pytest.raises(ValueError, match=r"request cannot be served|expected a list of texts"):
        list(remote.ask(path, body))
    assert len(remote.probe(["a"])) == 1


def test_no_request_hides_in_anothers_body(remote):
    """A web page may send text; what it sends must not be read as a request of its own."""
    hidden = b"GET /engine HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n"
    port = int(remote._url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        head = f"POST /probe HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: text/plain\r\n"
        raw.sendall(head.encode() + f"Content-Length: {len(hidden)}\r\n\r\n".encode() + hidden)
        received = b""
        while more := raw.recv(65536):
            received += more
    assert received.count(b"HTTP/1.") == 1
    assert b" 415 " in received


def test_another_server_in_the_place_of_the_one_that_was_met_is_noticed(store):
    with serving(store) as url:
        remote = RemoteHost(url, IDENTITY)
        remote._identity = IDENTITY | {"code": "older"}
        with pytest.raises(NoEngine, match="refused"):
            measure(remote)


def test_something_else_at_the_address_is_told_from_an_engine_server():
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        with pytest.raises(NoEngine, match="no engine server"):
            RemoteHost(f"http://127.0.0.1:{other.server_address[1]}", IDENTITY)
        thread.join()


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "+1", "1_0", "", "²"])
def test_a_length_that_is_none_is_refused(remote, length):
    address = remote._url.removeprefix("http://")
    host, port = address.split(":")
    request = f"POST /answers HTTP/1.1\r\nHost: {address}\r\nContent-Length: {length}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(request.encode())
        assert b" 413 " in client.recv(1 << 16)


def test_a_page_that_goes_by_another_name_reads_nothing(remote):
    """DNS rebinding: a browser takes the page's own name for this server."""
    port = remote._url.rpartition(":")[2]
    for host, status in (("evil.example", 403), ("localhost", 200), ("127.0.0.1", 200)):
        answer = httpx2.get(f"{remote._url}/engine", headers={"Host": f"{host}:{port}"})
        assert answer.status_code == status
        assert ("fingerprint" in answer.text) == (status == 200)


class Slow(TransformersHost):
    """A host whose engine waits for permission before each answer."""

    def __init__(self, store):
        self.__dict__ |= vars(host(store))
        self.go, self.given = threading.Semaphore(0), 0

    @contextmanager
    def serving(self, checkpoint):
        with super().serving(checkpoint) as engine:
            slow = self

            class Engine:
                fingerprint = engine.fingerprint

                def answer(self, groups):
                    for answer in engine.answer(groups):
                        slow.go.acquire()
                        slow.given += 1
                        yield answer

            yield Engine()


def groups() -> list[PromptGroup]:
    chat = chat_prompt(tokenizer(), "You are.", "Which?")
    return [PromptGroup("villain", q, chat, tuple(SCAFFOLDS.values())) for q in ASKED]


def test_a_client_that_goes_away_ends_its_request(store):
    slow = Slow(store)
    with serving(store, slow) as url:
        remote = RemoteHost(url, IDENTITY)
        with remote.serving(None) as engine:
            answers = engine.answer(groups())
            slow.go.release()
            next(answers)
            answers.close()
        done = []
        other = threading.Thread(target=lambda: done.append(remote.probe(["a"])))
        other.start()  # waits for the request of the client that is gone
        while other.is_alive():
            slow.go.release()
            other.join(timeout=0.2)
        assert done
        assert slow.given < len(ASKED) * len(SCAFFOLDS)


class Endless(TransformersHost):
    """A host whose engine never stops answering, at such length that no buffer holds it."""

    def __init__(self, store):
        self.__dict__ |= vars(host(store))

    @contextmanager
    def serving(self, checkpoint):
        with super().serving(checkpoint) as engine:

            class Engine:
                fingerprint = engine.fingerprint

                def answer(self, groups):
                    yield from repeat(Answer("a", "b", "c", "x" * 10**6, 1, None, {"A": 0.0}, "d"))

            yield Engine()


def test_a_client_that_reads_nothing_does_not_block_the_others(store, monkeypatch):
    monkeypatch.setattr("persona_assets.evaluation.server._PATIENCE", 1.0)
    with serving(store, Endless(store)) as url, socket.socket() as raw:
        port = int(url.rpartition(":")[2])
        body = meant_for(checkpoint=None, groups=[])
        raw.connect(("127.0.0.1", port))
        head = f"POST /answers HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        raw.recv(10)  # it has begun; and nothing more is read
        served = []
        other = threading.Thread(
            target=lambda: served.append(RemoteHost(url, IDENTITY).probe(["a"]))
        )
        other.start()
        other.join(timeout=30)
        raw.close()  # else a server without patience would never end
        assert len(served) == 1


class Failing(TransformersHost):
    """A host whose engine, or whose base, does not survive a checkpoint."""

    def __init__(self, store, how: str):
        self.__dict__ |= vars(host(store))
        self.how = how

    @contextmanager
    def serving(self, checkpoint):
        with super().serving(checkpoint) as engine:
            if checkpoint is not None and self.how == "dies":
                raise OSError("the GPU fell off the bus")
            yield engine

    def base_holds(self):
        return self.how == "dies"


@pytest.mark.parametrize(
    ("how", "said"), [("dies", "fell off the bus"), ("drifts", "no longer what was loaded")]
)
def test_an_engine_that_fails_or_a_base_that_drifts_ends_the_server(store, how, said):
    server = EngineServer(Failing(store, how), IDENTITY, store, port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    remote = RemoteHost(server.url, IDENTITY)
    with pytest.raises(RuntimeError, match=said):
        measure(remote, store / "adapter")
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert said in str(server.failed)
    server.shut_down()


def test_a_server_that_is_stopped_breaks_off_and_the_client_may_try_again(store):
    slow, caught = Slow(store), []
    server = EngineServer(slow, IDENTITY, store, port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def ask():
        try:
            measure(RemoteHost(server.url, IDENTITY))
        except Unavailable as error:
            caught.append(str(error))

    client = threading.Thread(target=ask)
    client.start()
    slow.go.release()
    while slow.given < 1:
        time.sleep(0.01)
    stopping = threading.Thread(target=server.shut_down)
    stopping.start()
    slow.go.release(1000)
    for waiting in (stopping, thread, client):
        waiting.join(timeout=60)
    assert caught
    assert "broke off" in caught[0] or "does not answer" in caught[0]


def test_one_model_is_resident_a_process(store):
    base = resident_model(store / "base", "float32")
    assert resident_model(store / "base", "float32") is base
    merged = resident_model(store / "merged", "float32")
    assert merged is not base
    assert resident_model(store / "base", "float32") is not base


def test_a_resident_model_does_not_change_with_its_file(store, tmp_path):
    """Its weights were pages of the file, mapped: damage to that was damage to the base."""
    folder = Path(shutil.copytree(store / "base", tmp_path / "base"))
    held = resident_model(folder, "float32")
    weights = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    (path,) = folder.glob("*.safetensors")
    content = path.read_bytes()
    with path.open("r+b") as file:  # in place, as a disk does
        file.seek(len(content) // 2)
        file.write(bytes(byte ^ 1 for byte in content[len(content) // 2 :]))
    assert resident_model(folder, "float32") is held
    changed = [k for k, tensor in held.state_dict().items() if not torch.equal(tensor, weights[k])]
    assert changed == []
