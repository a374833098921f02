"""How vLLM is started: its arguments by device, and the environment of its processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from persona_assets.evaluation.engines.vllm_worker import ResidentModel
from persona_assets.evaluation.hosts import NoEngine

#: The ranks that vLLM reserves adapters' memory for.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: What vLLM and its processes are started with.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    # Forking a process that has threads may leave a lock held for ever.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    # GiB; read on a CPU only.
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def start(
    *,
    model: str,
    tokenizer: str,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    lora_rank: int | None,
) -> Any:
    """vLLM with the model loaded.

    Raises:
        NoEngine: vLLM has no kernels for adapters beside a base of this ``dtype`` on this device.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    if lora_rank and dtype == "float32" and not current_platform.is_cpu():
        raise NoEngine(
            "evaluation.dtype: on a GPU vLLM computes adapters beside the base in half precision "
            "only: set bfloat16, or evaluation.serving to merged"
        )
    device: dict[str, Any]
    if current_platform.is_cpu():
        # Blocks of 128, the default, hold none of a short prompt: nothing would be shared.
        device = {"enforce_eager": True, "block_size": 32}
    else:
        device = {"compilation_config": {"cudagraph_capture_sizes": _graph_sizes(max_num_seqs)}}
    lora = {"enable_lora": True, "max_lora_rank": lora_rank, "max_loras": 1} if lora_rank else {}
    return LLM(
        model=model,
        tokenizer=tokenizer,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=True,
        disable_log_stats=True,
        seed=0,
        generation_config="vllm",
        hf_overrides={"head_dtype": "float32"},
        worker_extension_cls=f"{ResidentModel.__module__}.{ResidentModel.__qualname__}",
        **device,
        **lora,
    )


def _graph_sizes(max_num_seqs: int) -> list[int]:
    """Batches, in tokens, that a CUDA graph is captured for: decoding, and mixed with prompts."""
    sizes = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, *range(256, 2049, 128), *range(2304, 6145, 256)]
    return [size for size in sizes if size <= 3 * max_num_seqs]


def reserved(rank: int) -> int:
    """The smallest rank that vLLM reserves memory for and that ``rank`` fits into."""
    return next((known for known in _RANKS if known >= rank), rank)


def vllm_version() -> str:
    """Of the release itself: its packages go by several names."""
    import vllm

    return vllm.__version__


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables set meanwhile, for the process that is started in it too."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
