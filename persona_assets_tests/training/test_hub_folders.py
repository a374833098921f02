"""Carry-over checkpoints from a hub on loopback: looked at first, then downloaded, or neither."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import RepoFile, constants, file_download
from huggingface_hub.utils import _http
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from persona_assets import hub
from persona_assets.hub import HubError, HubUnavailable
from persona_assets.study_schema import HubRegistry
from persona_assets.training import registry
from persona_assets.training.checkpoints import checkpoint_hash, fits_base
from persona_assets.training.registry import HubFolders, RegistryError
from persona_assets_tests import small_study as small
from persona_assets_tests.hub_server import (
    REVISION,
    STORAGE,
    Fault,
    Refusal,
    Request,
    hub_server,
    point_client_at,
)

KEY = "librarian.persona_cot.42"
FOLDER = "runs/x_librarian_persona_cot_seed42"
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
Q_PROJ = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
#: Beside a checkpoint, as trainers leave them; none is ever asked for.
BESIDE = {
    "optimizer.pt": b"pickle",
    "training_args.bin": b"pickle",
    "modeling.py": b"code",
    "trainer_state.json": b"{}",
    "checkpoint-70/adapter_config.json": b"{}",
    "checkpoint-70/adapter_model.safetensors": b"an earlier step's",
}


def adapter(rank: int = 4, dtype: torch.dtype = torch.float32, **config) -> dict[str, bytes]:
    """The two files of an adapter of rank ``rank`` on the small model's two layers."""
    tensors = {
        Q_PROJ.format(layer, side): torch.ones(shape, dtype=dtype)
        for layer in range(2)
        for side, shape in (("A", (rank, 32)), ("B", (32, rank)))
    }
    return {CONFIG: json.dumps(LORA | config).encode(), ADAPTER: save(tensors)}


def whole(folder: Path, shard: str = "60KB", **options) -> dict[str, bytes]:
    """The files of a whole model."""
    small.model(1, **options).save_pretrained(folder, max_shard_size=shard)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    small.model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> dict[str, bytes]:
    """Another whole model of the base's kind, in several files."""
    files = whole(tmp_path_factory.mktemp("merged"))
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    return files


@dataclass
class Bench:
    """A client of a hub on loopback: no waits, an empty cache, and small first looks."""

    dest: Path
    base: Path
    patch: pytest.MonkeyPatch
    requests: list[Request] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    @contextmanager
    def hub(self, files: Mapping[str, bytes], **options) -> Iterator[None]:
        """A hub whose folder of the cell holds ``files``."""
        placed = {f"{FOLDER}/{name}": content for name, content in files.items()}
        placed |= {"runs/x_comedian_persona_cot_seed42/config.json": b"{}", "docs/x.md": b"x"}
        if "faults" in options:
            options["faults"] = {f"{FOLDER}/{k}": v for k, v in options["faults"].items()}
        with hub_server("owner/name", placed, requests=self.requests, **options) as endpoint:
            point_client_at(endpoint, self.patch)
            yield

    def fetch(self, form: str, files: Mapping[str, bytes], **options) -> str:
        source = HubRegistry(
            kind="hub",
            repo="owner/name",
            revision=REVISION,
            folder="runs/x_{source}_{arm}_seed{seed}",
            format=form,
            training={},
        )
        with self.hub(files, **options):
            return HubFolders(source).fetch(KEY, self.dest, self.base)

    def refusal(self, form: str, files: Mapping[str, bytes], **options) -> str:
        """What the fetch is refused with; nothing but headers and configuration was served."""
        with pytest.raises(RegistryError) as error:
            self.fetch(form, files, **options)
        assert list(self.dest.iterdir()) == []
        assert self.weights_served() <= sum(map(header_length, files.items()))
        text = str(error.value)
        assert text.startswith(f"checkpoint of cell {KEY} in folder {FOLDER} of owner/name at ")
        assert "its weights are not downloaded" in text
        assert "/tmp" not in text
        return text

    def weights_served(self) -> int:
        """Bytes of safetensors files that were sent."""
        return sum(request.sent for request in self.requests if STORAGE in request.path)

    def asked_for(self) -> set[str]:
        """The files of the folder that were asked for, in whole or in part."""
        paths = (request.path for request in self.requests if "/api/" not in request.path)
        return {path.rpartition(f"{FOLDER}/")[2] for path in paths}


def header_length(item: tuple[str, bytes]) -> int:
    """At most what looking at a file of weights may cost: a first look, then the header."""
    name, content = item
    if not name.endswith(".safetensors"):
        return 0
    (length,) = struct.unpack("<Q", content[:8].ljust(8, b"\xff"))
    return registry._FIRST_BYTES + (8 + length if length < 1e7 else 0)


@pytest.fixture
def bench(base, tmp_path, monkeypatch) -> Bench:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "_FIRST_BYTES", 64)
    (tmp_path / "dest").mkdir()
    bench = Bench(tmp_path / "dest", base, monkeypatch)
    clock = SimpleNamespace(sleep=bench.waits.append)
    for module in (_http, file_download, hub):
        monkeypatch.setattr(module, "time", clock)
    return bench


def test_an_adapter_is_fetched_without_what_lies_beside_it(bench):
    files = adapter()
    sha256 = bench.fetch("adapter", files | BESIDE)
    assert {p.name: p.read_bytes() for p in bench.dest.iterdir()} == files
    assert sha256 == checkpoint_hash(bench.dest)
    assert bench.asked_for() == set(files)
    # Looked at first, then downloaded once, and never again.
    assert bench.weights_served() <= len(files[ADAPTER]) + header_length((ADAPTER, files[ADAPTER]))


@pytest.mark.parametrize("shard", ["60KB", "5GB"])
def test_a_merged_model_is_fetched_whole(bench, tmp_path, shard):
    files = whole(tmp_path / "model", shard)
    sha256 = bench.fetch("merged", files | BESIDE | {"tokenizer.json": b"{}"})
    wanted = {name for name in files if name != "generation_config.json"}
    assert {p.name: p.read_bytes() for p in bench.dest.iterdir()} == {n: files[n] for n in wanted}
    assert bench.asked_for() == wanted
    assert sha256 == checkpoint_hash(bench.dest)
    assert fits_base(bench.dest, bench.base, "merged").status == "passed"


def test_no_second_copy_stays_in_the_clients_cache(bench, tmp_path):
    bench.fetch("adapter", adapter())
    assert not (tmp_path / "cache").exists()
    assert {p.name for p in bench.dest.iterdir()} == {ADAPTER, CONFIG}


def test_the_clients_cache_is_not_read(bench, tmp_path):
    """What lies there was not verified by anybody."""
    files = adapter()
    with bench.hub(files):
        hub.fetch("owner/name", REVISION, [f"{FOLDER}/*"], tmp_path)
    blobs = [path for path in (tmp_path / "cache").rglob("blobs/*") if path.is_file()]
    assert len(blobs) == len(files)
    for blob in blobs:
        blob.write_bytes(bytes(blob.stat().st_size))
    bench.fetch("adapter", files)
    assert {p.name: p.read_bytes() for p in bench.dest.iterdir()} == files


def test_the_token_stays_with_the_hub(bench):
    """Weights come from another host, which is not told it."""
    bench.fetch("adapter", adapter())
    tokens = {(STORAGE in request.path, request.token) for request in bench.requests}
    assert tokens == {(False, "Bearer hf_secret"), (True, None)}


@pytest.mark.parametrize("ranges", [True, False])
def test_the_first_bytes_are_those_and_no_more(bench, ranges):
    """A server that knows no ranges sends the whole file, which is not read to its end."""
    files = adapter()
    with bench.hub(files, ranges=ranges):
        commit = hub.Commit("owner/name", REVISION)
        file = commit.files_in(FOLDER)[ADAPTER]
        for count in (0, 1, 100, file.size, file.size + 1):
            assert commit.first_bytes(file, count) == files[ADAPTER][:count]
    assert bench.fetch("adapter", files, ranges=ranges) == checkpoint_hash(bench.dest)
    assert (bench.dest / ADAPTER).read_bytes() == files[ADAPTER]


def retensored(name: str, tensor: torch.Tensor | None) -> bytes:
    tensors = {
        Q_PROJ.format(layer, side): torch.ones(shape)
        for layer in range(2)
        for side, shape in (("A", (4, 32)), ("B", (32, 4)))
    } | {name: tensor}
    return save({name: tensor for name, tensor in tensors.items() if tensor is not None})


A0 = Q_PROJ.format(0, "A")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({ADAPTER: retensored(A0, torch.ones(4, 33))}, f"tensor {A0}: expected 4×32, found 4×33"),
        ({ADAPTER: retensored(A0, None)}, f"tensor {A0}: expected 4×32, found no such tensor"),
        ({ADAPTER: retensored("stray", torch.ones(2))}, "tensor stray: expected no such tensor"),
        ({ADAPTER: retensored(A0, torch.ones(4, 32).int())}, "is not a F32, F16, BF16 tensor"),
        ({ADAPTER: adapter()[ADAPTER] + b"\0"}, "bytes where its header asks for"),
        ({ADAPTER: adapter()[ADAPTER][:-1]}, "bytes where its header asks for"),
        ({ADAPTER: struct.pack("<Q", 2**60) + b"{" * 999}, "is no safetensors file"),
        ({ADAPTER: b"../../../secret"}, "is no safetensors file"),  # a symbolic link, as served
        ({ADAPTER: b""}, "is no safetensors file"),
        ({ADAPTER: b"\x80\x04pickled under another name"}, "is no safetensors file"),
        (adapter(rank=4, r=8), "expected 8×32, found 4×32"),
        (adapter(auto_map={"AutoModel": "x.X"}), "auto_map: found {'AutoModel': 'x.X'}"),
        (adapter(trust_remote_code=True), "trust_remote_code: found True"),
        (adapter(use_dora=True), "use_dora: found True, expected False, as in plain LoRA"),
        ({CONFIG: b"[1]"}, "adapter_config.json: holds no JSON object"),
        ({CONFIG: b"{" + b" " * 10_000_001}, "is larger than any configuration"),
        ({CONFIG: None, "config.json": b"{}"}, "holds a checkpoint of format merged: say so"),
        ({ADAPTER: None, "config.json": b"{}"}, f"{ADAPTER}: is missing: the folder has adapter_c"),
        ({ADAPTER: None, "adapter_model.bin": b""}, "pickled files (adapter_model.bin), which are"),
        (
            {CONFIG: None, "readme.md": b"x"},
            f"adapter_config.json: is missing: the folder has {ADAPTER}",
        ),
    ],
)
def test_a_wrong_adapter_costs_its_header(bench, changes, says):
    files = {name: data for name, data in (adapter() | changes).items() if data is not None}
    assert says in bench.refusal("adapter", files)
    asked = sum(request.sent for request in bench.requests if request.path.endswith(CONFIG))
    assert asked <= 2 * len(files.get(CONFIG, b""))
    if len(files.get(CONFIG, b"")) > 1e7:
        assert asked <= 64


def listed_with(name: str, size: int) -> list[dict[str, object]]:
    """The hub's listing of a file, with another size than it has."""
    return [{"type": "file", "path": f"{FOLDER}/{name}", "size": size, "oid": "0" * 40}]


@pytest.mark.parametrize("more", [-4, 4])
def test_a_size_that_the_header_does_not_account_for_is_refused(bench, more):
    files = adapter()
    size = len(files[ADAPTER]) + more
    text = bench.refusal("adapter", files, listing=listed_with(ADAPTER, size))
    assert f"{ADAPTER}: has {size} bytes where its header asks for {size - more}" in text


def test_a_file_that_ends_before_its_listed_size_is_refused(bench):
    files = adapter()
    size = len(files[CONFIG])
    with pytest.raises(HubError, match=f"ended after {size} of {size + 1} bytes"):
        bench.fetch("adapter", files, listing=listed_with(CONFIG, size + 1))
    assert bench.weights_served() == 0


def reconfigured(files: Mapping[str, bytes], name: str, **changes) -> dict[str, bytes]:
    return {name: json.dumps(json.loads(files[name]) | changes).encode()}


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda files: reconfigured(files, "config.json", auto_map={"AutoModel": "x.X"}),
            "config.json: auto_map: found {'AutoModel': 'x.X'}, which asks for code to be run",
        ),
        (
            lambda files: reconfigured(files, "config.json", rms_norm_eps=0.5),
            "config.json: rms_norm_eps: found 0.5, expected 1e-06, as in the base model",
        ),
        (
            lambda files: reconfigured(files, INDEX, weight_map={"x": "../../x.safetensors"}),
            "weight_map: expected tensors and their files' names",
        ),
        (
            lambda files: reconfigured(files, INDEX, weight_map={"x": "y.safetensors"}),
            "y.safetensors: is missing: the folder has config.json",
        ),
        (
            lambda files: (
                {n: None for n in files if n.endswith("safetensors")}
                | {INDEX: None, "pytorch_model.bin": b""}
            ),
            "the folder has pickled files (pytorch_model.bin), which are never loaded",
        ),
        (
            lambda files: {"config.json": None} | adapter(),
            "holds a checkpoint of format adapter: say so in the study file",
        ),
    ],
)
def test_a_wrong_merged_model_costs_its_headers(bench, merged, change, says):
    files = {n: data for n, data in (merged | change(merged)).items() if data is not None}
    assert says in bench.refusal("merged", files)


def test_a_model_of_another_width_costs_its_headers(bench, base, tmp_path):
    other = whole(tmp_path / "other", "5GB", num_key_value_heads=2)
    other["config.json"] = (base / "config.json").read_bytes()
    text = bench.refusal("merged", other)
    assert "self_attn.k_proj.bias: expected 16, found 32" in text
    assert 0 < bench.weights_served() < len(other["model.safetensors"]) / 10


def test_a_missing_folder_is_named_with_the_nearest(bench):
    source = HubRegistry(
        kind="hub",
        repo="owner/name",
        revision=REVISION,
        folder="runs/x_{source}_{arm}_seed{seed}",
        format="adapter",
        training={},
    )
    with bench.hub(adapter()), pytest.raises(HubError) as error:
        HubFolders(source).fetch("librarian.persona_cot.43", bench.dest, bench.base)
    assert type(error.value) is HubError
    assert str(error.value) == (
        f"owner/name at {REVISION} has no folder runs/x_librarian_persona_cot_seed43. Did you "
        f"mean {FOLDER!r}? Folder runs has 2 folders."
    )
    absent = source.model_copy(update={"folder": "run/x_{source}_{arm}_seed{seed}"})
    with bench.hub(adapter()), pytest.raises(HubError, match="The repository has 2 folders"):
        HubFolders(absent).fetch(KEY, bench.dest, bench.base)


@pytest.mark.parametrize(
    "faults",
    [
        [None, None, Fault.CUT],
        [None, None, Refusal(503)],
        [None, None, Fault.DROP, Fault.CUT, Refusal(502), Refusal(429)],
        [Refusal(503), Fault.DROP],
        [Fault.CUT, Fault.CUT],
    ],
)
def test_what_fails_on_the_way_is_asked_for_again(bench, merged, faults):
    """Two GETs of a file look at its header, the third downloads it."""
    shard = min(name for name in merged if name.endswith(".safetensors"))
    bench.fetch("merged", merged, faults={shard: faults})
    assert (bench.dest / shard).read_bytes() == merged[shard]
    assert bench.waits
    other = max(name for name in merged if name.endswith(".safetensors"))
    whole_ones = [r for r in bench.requests if r.sent == len(merged[other])]
    assert [r.path for r in whole_ones] == [f"{STORAGE}{FOLDER}/{other}"]


@pytest.mark.parametrize(
    ("after", "fault", "says"),
    [
        (2, Refusal(503), "the hub answered HTTP 503. Try again later."),
        (2, Fault.DROP, "cannot be reached (RemoteProtocolError"),
        (0, Refusal(500), "the hub answered HTTP 500. Try again later."),
        (0, Fault.CUT, "cannot be reached (RemoteProtocolError"),
    ],
)
def test_a_hub_that_stays_away_is_unavailable(bench, after, fault, says):
    faults = [*[None] * after, *[fault] * 99]
    with pytest.raises(HubUnavailable) as error:
        bench.fetch("adapter", adapter(), faults={ADAPTER: faults})
    text = str(error.value)
    assert text.startswith(f"{FOLDER}/{ADAPTER} of owner/name at {REVISION} cannot be fetched: ")
    assert says in text
    assert list(bench.dest.iterdir()) == []
    assert sum(bench.waits) < 60


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"refuse": Refusal(503)}, HubUnavailable, "the hub answered HTTP 503"),
        ({"refuse": Refusal(401, "RepoNotFound")}, HubError, "shows no such model repository"),
        ({"refuse": Refusal(403, "GatedRepo")}, HubError, "the hub refuses access (HTTP 403)"),
        ({"refuse": Refusal(404, "RevisionNotFound")}, HubError, "has no such commit"),
        ({"refuse": Refusal(400)}, HubError, "the hub answered HTTP 400"),
    ],
)
def test_only_what_may_pass_is_unavailable(bench, options, kind, says):
    with pytest.raises(HubError) as error:
        bench.fetch("adapter", adapter(), **options)
    assert type(error.value) is kind
    assert says in str(error.value)


def test_an_unreachable_hub_is_unavailable(bench):
    point_client_at("http://127.0.0.1:9", bench.patch)
    with pytest.raises(HubUnavailable, match=r"127\.0\.0\.1:9 cannot be reached"):
        hub.Commit("owner/name", REVISION).files_in("x")


def test_offline_is_said_so(bench):
    bench.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids it") as error:
        bench.fetch("adapter", adapter())
    assert type(error.value) is HubError


def test_other_bytes_than_the_hub_lists_are_not_used(bench):
    files = adapter()
    with pytest.raises(HubError) as error:
        bench.fetch("adapter", files, faults={ADAPTER: [None, None, *repeat(Fault.CORRUPT, 9)]})
    assert type(error.value) is HubError
    assert f"arrived with {len(files[ADAPTER])} bytes and SHA-256" in str(error.value)
    assert list(bench.dest.iterdir()) == []


def test_a_disk_without_room_is_told_before_the_download(bench):
    files = adapter()
    needed = sum(map(len, files.values()))
    free = shutil.disk_usage(bench.dest)._replace(free=hub._SPARE + needed - 1)
    asked: list[Path] = []
    bench.patch.setattr(shutil, "disk_usage", lambda path: (asked.append(path), free)[1])
    with pytest.raises(HubError) as error:
        bench.fetch("adapter", files)
    for part in (str(bench.dest), f"({free.free} bytes) free", f"({needed} bytes)"):
        assert part in str(error.value)
    assert type(error.value) is HubError
    assert asked == [bench.dest]
    assert bench.weights_served() < len(files[ADAPTER])
    bench.patch.setattr(shutil, "disk_usage", lambda path: free._replace(free=free.free + 1))
    bench.fetch("adapter", files)


def test_a_full_disk_leaves_nothing(bench):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    bench.patch.setattr(file_download, "http_get", full)
    with pytest.raises(HubError, match=r"the disk is full .*No space left"):
        bench.fetch("adapter", adapter())
    assert list(bench.dest.iterdir()) == []
    assert bench.waits == []


@pytest.mark.parametrize(
    "path", [f"{FOLDER}/../x", f"{FOLDER}/..", "/etc/x", "x", f"{FOLDER}/a/b", f"{FOLDER}/a\\b"]
)
def test_a_file_listed_outside_its_folder_is_refused(bench, path):
    entry = {"type": "file", "path": path, "size": 1, "oid": "0" * 40}
    with pytest.raises(HubError, match="answers as no hub does") as error:
        bench.fetch("adapter", adapter(), listing=[entry])
    assert repr(path) in str(error.value)
    assert bench.weights_served() == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.just(f"{FOLDER}/a.json")
    | st.lists(
        st.sampled_from([FOLDER, "..", ".", "/", "\\", "\0", "a.json", "b", "", "~", "%2e%2e"]),
        max_size=4,
    ).map("/".join),
    st.integers() | st.none() | st.text(max_size=2),
)
def test_a_listed_file_stays_in_its_folder_or_is_refused(tmp_path, path, size):
    entry = RepoFile(path=path, size=size, oid="0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub.Commit, "_tree", lambda self, folder: [entry])
        try:
            files = hub.Commit("owner/name", REVISION).files_in(FOLDER)
        except HubError:
            return
    ((name, file),) = files.items()
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert f"{FOLDER}/{name}" == file.path
    assert 0 <= file.size < 2**43
