"""Star Attention's phase 1 on the CPU: its three ways to an anchor, and the ring, in one run."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import cpu_seconds, over_ranks
from benchmarks.model import PRELOAD, rank_runtime, some_ids
from ringstar.config import RingConfig, StarConfig, StrategyConfig
from seqpar import Transport
from seqpar.spawn import run_processes

TOKENS, WORLD, WARM_UPS, REPEATS = 7500, 4, 1, 3
PARTS = {"eighths": 8, "quarters": 4}
SHARES = ("world", "rank", "none")


def run(folder: str) -> dict[str, Any]:
    """CPU seconds of all ranks together, and ratios to the paper's procedure and to the ring."""
    ranks = run_processes(WORLD, encode_rank, folder, preload=PRELOAD, timeout_s=7200)
    times = {name: over_ranks([rank[name] for rank in ranks]) for name in ranks[0]}
    result: dict[str, Any] = {
        "what": f"SmolLM2-135M encode of {TOKENS} tokens, float32, {WORLD} ranks of one thread;"
        f" medians of {REPEATS} after {WARM_UPS} warm-up",
        **times,
    }
    for part in PARTS:
        world, none = (times[f"star, {part}, {share}"]["cpu_s"] for share in ("world", "none"))
        result[f"{part}: world / none"] = world / none
        result[f"{part}: world / ring"] = world / times["ring"]["cpu_s"]
    return result


def encode_rank(transport: Transport, folder: str) -> dict[str, dict[str, list[float]]]:
    """CPU and wall seconds on one rank, from a barrier on, for each setting."""
    runtime, ids = rank_runtime(transport, folder, "float32"), some_ids(TOKENS)

    def seconds(strategy: StrategyConfig) -> dict[str, list[float]]:
        def work() -> None:
            runtime.encode(ids, strategy=strategy)

        return cpu_seconds(work, transport.barrier, warm_ups=WARM_UPS, repeats=REPEATS)

    return {name: seconds(strategy) for name, strategy in settings().items()}


def settings() -> dict[str, StrategyConfig]:
    """The ring, and star with whole anchors."""
    found: dict[str, StrategyConfig] = {"ring": RingConfig()}
    for part, blocks in PARTS.items():
        for share in SHARES:
            size = -(-TOKENS // blocks)
            found[f"star, {part}, {share}"] = StarConfig(block_size=size, share_anchor=share)
    return found
