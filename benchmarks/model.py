"""SmolLM2 on the CPU: encode and decode over ranks against plain Hugging Face `sdpa`."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.measure import MEDIANS, REPEATS, WARM_UPS, cpu_seconds, over_ranks
from ringstar import LongContext
from ringstar.config import CacheConfig, Config, GenerationConfig, ModelConfig
from ringstar.models import find_model
from ringstar.models.one_device import OneDevice
from seqpar import Transport
from seqpar.process import ProcessWorld
from seqpar.spawn import run_processes

PRELOAD = ("torch", "seqpar", "ringstar", "transformers.models.llama.modeling_llama")


def some_ids(tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 49152, (tokens,), generator=generator).tolist()


def rank_runtime(transport: Transport, folder: str, dtype: str) -> LongContext:
    config = Config(model=ModelConfig(path=folder, dtype=dtype), cache=CacheConfig(reuse=False))
    return LongContext.from_config(config, ProcessWorld(transport))


def encode_rank(transport: Transport, folder: str, dtype: str, tokens: int) -> Any:
    runtime, ids = rank_runtime(transport, folder, dtype), some_ids(tokens)
    return cpu_seconds(lambda: runtime.encode(ids), transport.barrier)


def decode_rank(transport: Transport, folder: str, dtype: str, tokens: int, new_tokens: int) -> Any:
    """CPU and wall seconds of each generated token after the first few."""
    runtime = rank_runtime(transport, folder, dtype)
    (shard,) = runtime.encode(some_ids(tokens)).shards
    settings = GenerationConfig(max_new_tokens=(WARM_UPS + REPEATS) * new_tokens + 1)
    steps = runtime.group.engines[transport.rank].generate(shard, some_ids(8), settings)
    next(steps)  # the question

    def work() -> None:
        for _ in range(new_tokens):
            next(steps)

    return cpu_seconds(work, transport.barrier)


def encode(folder: str, dtype: str, tokens: int, worlds: tuple[int, ...]) -> dict[str, Any]:
    """Total CPU seconds over ranks, as a ratio to one process."""
    torch.set_num_threads(1)
    plain = OneDevice(*_plain(folder, dtype))
    alone = over_ranks([cpu_seconds(lambda: plain.encode(some_ids(tokens)))])
    result: dict[str, Any] = {
        "what": f"SmolLM2-135M encode of {tokens} tokens, {dtype}, one thread per rank; {MEDIANS}",
        "Hugging Face sdpa, one process": alone,
    }
    for world in worlds:
        ranks = run_processes(world, encode_rank, folder, dtype, tokens, preload=PRELOAD)
        result[f"ring, {world} ranks"] = over_ranks(ranks)
        result[f"{world} ranks / one process"] = (
            result[f"ring, {world} ranks"]["cpu_s"] / alone["cpu_s"]
        )
    return result


def decode(folder: str, dtype: str, tokens: int, worlds: tuple[int, ...]) -> dict[str, Any]:
    """CPU seconds of the busiest rank for a token, as a ratio to one process at one thread."""
    torch.set_num_threads(1)
    new_tokens = 8
    plain = OneDevice(*_plain(folder, dtype))
    plain.encode(some_ids(tokens))
    with torch.inference_mode():
        plain._forward(some_ids(8))
        times = cpu_seconds(lambda: [plain._forward([5]) for _ in range(new_tokens)])
    alone = {name: statistics.median(values) / new_tokens for name, values in times.items()}
    result: dict[str, Any] = {
        "what": f"SmolLM2-135M, seconds per decoded token after {tokens}, {dtype}; {MEDIANS}",
        "Hugging Face sdpa, one process": alone,
    }
    for world in worlds:
        ranks = run_processes(
            world, decode_rank, folder, dtype, tokens, new_tokens, preload=PRELOAD
        )
        busiest = {
            name: max(statistics.median(rank[name]) for rank in ranks) / new_tokens
            for name in ("cpu", "wall")
        }
        result[f"ring, {world} ranks, busiest"] = busiest
        result[f"{world} ranks / one process"] = busiest["cpu"] / alone["cpu"]
    return result


def _plain(folder: str, dtype: str) -> Any:
    files = find_model(ModelConfig(path=folder))
    return files, getattr(torch, dtype), torch.device("cpu")
