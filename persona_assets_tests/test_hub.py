"""Fetching from the hub at a pinned commit, against a server of its protocol on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from persona_assets_tests.hub_server import REVISION, hub_server

FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "model.safetensors": bytes(range(256)) * 40,
    "pytorch_model.bin": b"never asked for",
    "nested/adapter_config.json": b"{}",
}

FETCH = """
import sys
from pathlib import Path
from persona_assets.hub import HubError, fetch
try:
    print(fetch(sys.argv[1], sys.argv[2], sys.argv[4:], Path(sys.argv[3])))
except HubError as error:
    print("HubError:", error)
"""


def run_fetch(endpoint: str, tmp_path: Path, revision: str, *patterns: str) -> str:
    """``hub.fetch`` in a process of its own: the client reads its endpoint once, at import."""
    (tmp_path / "target").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", FETCH, "owner/name", revision, tmp_path / "target", *patterns],
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_matching_files_arrive_whole(tmp_path):
    with hub_server("owner/name", FILES) as endpoint:
        printed = run_fetch(endpoint, tmp_path, REVISION, "*.safetensors", "config.json")
    assert printed.strip() == "['config.json', 'model.safetensors']"
    found = {p.name: p.read_bytes() for p in (tmp_path / "target").iterdir()}
    assert found == {name: FILES[name] for name in ("config.json", "model.safetensors")}


def test_a_folder_of_the_repository_arrives_as_a_folder(tmp_path):
    with hub_server("owner/name", FILES) as endpoint:
        run_fetch(endpoint, tmp_path, REVISION, "nested/*.json")
    assert (tmp_path / "target" / "nested" / "adapter_config.json").read_bytes() == b"{}"


def test_a_second_fetch_brings_only_what_it_asked_for(tmp_path):
    """Both go through one cache, whose snapshot folder holds the files of the first as well."""
    with hub_server("owner/name", FILES) as endpoint:
        run_fetch(endpoint, tmp_path, REVISION, "*.safetensors")
        printed = run_fetch(endpoint, tmp_path, REVISION, "config.json")
    assert printed.strip() == "['config.json']"


def test_another_commit_is_refused_by_name(tmp_path):
    with hub_server("owner/name", FILES) as endpoint:
        printed = run_fetch(endpoint, tmp_path, "f" * 40, "*")
    assert printed.startswith(f"HubError: owner/name at {'f' * 40} cannot be fetched")


def test_no_matching_file_is_refused_by_pattern(tmp_path):
    with hub_server("owner/name", FILES) as endpoint:
        printed = run_fetch(endpoint, tmp_path, REVISION, "absent/*")
    assert printed.startswith("HubError:")
    assert "absent/*" in printed


def test_an_unreachable_hub_is_named(tmp_path):
    printed = run_fetch("http://127.0.0.1:9", tmp_path, REVISION, "*")
    assert printed.startswith("HubError: owner/name")
    assert "Check the network" in printed
