"""Fetching from the hub at a pinned commit, against a server of its protocol on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from persona_assets_tests.hub_server import REVISION, Refusal, Request, hub_server

FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "model.safetensors": bytes(range(256)) * 40,
    "pytorch_model.bin": b"never asked for",
    "nested/adapter_config.json": b"{}",
    "nested/a name & more.txt": b"quoted in a URL",
}
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens

#: The client's waits between its tries are taken out; they are counted in its warnings.
FETCH = """
import sys
from pathlib import Path
from types import SimpleNamespace
from huggingface_hub.utils import _http
from persona_assets.hub import HubError, fetch
_http.time = SimpleNamespace(sleep=lambda seconds: None)
repo_type, repo, revision, target, *patterns = sys.argv[1:]
try:
    print(fetch(repo, revision, patterns, Path(target), repo_type=repo_type))
except HubError as error:
    assert error.__suppress_context__ or not error.__context__
    print(f"{type(error).__name__}:", error)
"""


def fetched(
    endpoint: str,
    tmp_path: Path,
    *patterns: str,
    repo: str = "owner/name",
    repo_type: str = "model",
    revision: str = REVISION,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """``hub.fetch`` in a process of its own: the client reads its environment once, at import."""
    (tmp_path / "target").mkdir(exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, repo_type, repo, revision, tmp_path / "target", *patterns],
        env=inherited | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def run_fetch(*arguments, **options) -> str:
    """What :func:`fetched` printed: the files, or the error."""
    return fetched(*arguments, **options).stdout.strip()


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_the_matching_files_arrive_whole(tmp_path, repo_type):
    with hub_server("owner/name", FILES, repo_type=repo_type) as endpoint:
        printed = run_fetch(endpoint, tmp_path, "*.safetensors", "config.json", repo_type=repo_type)
    assert printed == "['config.json', 'model.safetensors']"
    found = {p.name: p.read_bytes() for p in (tmp_path / "target").iterdir()}
    assert found == {name: FILES[name] for name in ("config.json", "model.safetensors")}


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_a_folder_of_the_repository_arrives_as_a_folder(tmp_path, repo_type):
    with hub_server("owner/name", FILES, repo_type=repo_type) as endpoint:
        run_fetch(endpoint, tmp_path, "nested/*", repo_type=repo_type)
    found = {p.name: p.read_bytes() for p in (tmp_path / "target" / "nested").iterdir()}
    assert found == {
        "adapter_config.json": b"{}",
        "a name & more.txt": FILES["nested/a name & more.txt"],
    }


def test_a_second_fetch_brings_only_what_it_asked_for(tmp_path):
    """Both go through one cache, whose snapshot folder holds the files of the first as well."""
    with hub_server("owner/name", FILES) as endpoint:
        run_fetch(endpoint, tmp_path, "*.safetensors")
        printed = run_fetch(endpoint, tmp_path, "config.json")
    assert printed == "['config.json']"


@pytest.mark.parametrize("where", ["offline", "unreachable"])
def test_the_cache_serves_without_a_network(tmp_path, where):
    with hub_server("owner/name", FILES, repo_type="dataset") as endpoint:
        run_fetch(endpoint, tmp_path, "*.json", repo_type="dataset")
    (tmp_path / "target" / "config.json").unlink()
    (tmp_path / "target" / "nested" / "adapter_config.json").unlink()
    offline = {"HF_HUB_OFFLINE": "1"} if where == "offline" else {}
    printed = run_fetch(NOWHERE, tmp_path, "config.json", repo_type="dataset", **offline)
    assert printed == "['config.json']"
    assert (tmp_path / "target" / "config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize("cached", [None, "config.json"])
def test_offline_what_the_cache_lacks_is_an_error(tmp_path, cached):
    with hub_server("owner/name", FILES) as endpoint:
        if cached:
            run_fetch(endpoint, tmp_path, cached)
        printed = run_fetch(endpoint, tmp_path, "*.safetensors", HF_HUB_OFFLINE="1")
    assert printed == (
        f"HubError: owner/name at {REVISION} cannot be fetched: the cache lacks files of it and "
        "HF_HUB_OFFLINE forbids to download them. Unset HF_HUB_OFFLINE, or point HF_HOME to a "
        "cache that has them."
    )


def test_another_commit_is_refused_by_name(tmp_path):
    with hub_server("owner/name", FILES) as endpoint:
        printed = run_fetch(endpoint, tmp_path, "*", revision="f" * 40)
    assert printed == (
        f"HubError: owner/name at {'f' * 40} cannot be fetched: the repository has no such commit. "
        "Pin the full hash of one of its commits."
    )


def test_a_dataset_is_not_a_model(tmp_path):
    with hub_server("owner/name", FILES, repo_type="model") as endpoint:
        printed = run_fetch(endpoint, tmp_path, "*", repo_type="dataset")
    assert printed == (
        f"HubError: dataset owner/name at {REVISION} cannot be fetched: the hub shows no such "
        "dataset repository (HTTP 404). Check its name; if it is private, set HF_TOKEN to a token "
        "that may read it."
    )


def test_a_name_that_can_be_none_is_refused(tmp_path):
    printed = run_fetch(NOWHERE, tmp_path, "*", repo="owner/na me")
    assert printed.startswith(f"HubError: owner/na me at {REVISION} cannot be fetched: ")
    assert printed.endswith("Check the repository's name, HF_ENDPOINT, and the folder HF_HOME.")


def test_no_matching_file_is_refused_by_pattern(tmp_path):
    with hub_server("owner/name", FILES) as endpoint:
        printed = run_fetch(endpoint, tmp_path, "absent/*")
    assert printed.startswith("HubError:")
    assert "absent/*" in printed


@pytest.mark.parametrize(
    ("refusal", "what"),
    [
        (Refusal(403, "GatedRepo"), "the hub refuses access (HTTP 403). Accept"),
        (Refusal(401, "GatedRepo"), "the hub refuses access (HTTP 401). Accept"),
        (Refusal(403), "the hub refuses access (HTTP 403). Accept"),
        (Refusal(401), "the hub refuses access (HTTP 401). Accept"),
        # The hub answers 401 about what it does not show, missing repositories included.
        (
            Refusal(401, "RepoNotFound"),
            "the hub shows no such model repository (HTTP 401). Check its name",
        ),
    ],
)
def test_refused_access_tells_the_remedy_and_not_the_token(tmp_path, refusal, what):
    requests: list[Request] = []
    with hub_server("owner/name", FILES, refuse=refusal, requests=requests) as endpoint:
        done = fetched(endpoint, tmp_path, "*", HF_TOKEN="hf_secret")
    assert f"HubError: owner/name at {REVISION} cannot be fetched: {what}" in done.stdout
    assert "set HF_TOKEN to a token that may read it." in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr
    assert [request.token for request in requests] == ["Bearer hf_secret"]


@pytest.mark.parametrize("token", ["hf_sec\nret", "hf_sec ret", "hf_sec\x01ret", "hf_secrét"])
def test_a_token_that_makes_no_header_is_not_shown(tmp_path, token):
    done = fetched(NOWHERE, tmp_path, "*", HF_TOKEN=token)
    assert done.stdout.strip() == (
        "HubError: HF_TOKEN holds a character that no token has. Set it to the token alone."
    )
    assert done.stderr == ""


def test_a_token_file_is_not_read(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "token").write_text("hf_of_whoever_is_logged_in")
    requests: list[Request] = []
    with hub_server("owner/name", FILES, requests=requests) as endpoint:
        run_fetch(endpoint, tmp_path, "config.json")
    assert requests
    assert {request.token for request in requests} == {None}


def test_an_overloaded_hub_is_asked_a_few_times(tmp_path):
    requests: list[Request] = []
    overloaded = hub_server("owner/name", FILES, refuse=Refusal(503), requests=requests)
    with overloaded as endpoint:
        printed = run_fetch(endpoint, tmp_path, "*")
    assert printed == (
        f"HubUnavailable: owner/name at {REVISION} cannot be fetched: the hub answered HTTP 503. "
        "Try again later."
    )
    assert len(requests) == 6


def test_an_unreachable_hub_is_named(tmp_path):
    done = fetched(NOWHERE.replace("//", "//user:password@"), tmp_path, "*", repo_type="dataset")
    assert done.stdout.startswith(
        f"HubUnavailable: dataset owner/name at {REVISION} cannot be fetched: 127.0.0.1:9 cannot "
        "be reached (ConnectError: "
    )
    assert "Check the network" in done.stdout
    assert "password" not in done.stdout
    assert done.stderr.count("Retrying in") == 5
