"""What recording a trace costs: SmolLM2's encode and decode with `profile.path` and without."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.measure import over_ranks
from benchmarks.model import PRELOAD, some_ids
from ringstar import LongContext
from ringstar.config import CacheConfig, Config, ModelConfig, ProfileConfig
from seqpar import Transport
from seqpar.process import ProcessWorld
from seqpar.spawn import run_processes

TOKENS, QUESTION, NEW_TOKENS, WORLD, WARM_UPS, REPEATS = 1000, 8, 17, 2, 1, 7
PLAIN, TRACED = "plain", "traced"


def run(folder: str) -> dict[str, Any]:
    """CPU seconds of all ranks together, with and without; and writing the file."""
    with tempfile.TemporaryDirectory() as path:
        ranks = run_processes(WORLD, measured, folder, path, preload=PRELOAD, timeout_s=3600)
    times = {name: over_ranks([rank[name] for rank in ranks]) for name in ranks[0]}
    ratios = {
        f"{what}, {TRACED} / {PLAIN}": statistics.median(
            sum(rank[f"{what}, {TRACED}"]["cpu"][repeat] for rank in ranks)
            / sum(rank[f"{what}, {PLAIN}"]["cpu"][repeat] for rank in ranks)
            for repeat in range(REPEATS)
        )
        for what in ("encode", "answer")
    }
    return {
        "what": f"SmolLM2-135M, {TOKENS} tokens, answers of {NEW_TOKENS}, float32, {WORLD} gloo"
        f" ranks of one thread; medians of {REPEATS} after {WARM_UPS} warm-up; each repeat is"
        " plain, then traced, and ratios are medians of theirs",
        **times,
        **ratios,
    }


def measured(transport: Transport, folder: str, path: str) -> dict[str, dict[str, list[float]]]:
    """CPU and wall seconds on one rank, by what was done and how."""
    runtimes = {
        name: LongContext.from_config(
            Config(
                model=ModelConfig(path=folder, dtype="float32"),
                cache=CacheConfig(reuse=False),
                profile=ProfileConfig(given),
            ),
            ProcessWorld(transport),
        )
        for name, given in ((PLAIN, None), (TRACED, path))
    }
    found: dict[str, dict[str, list[float]]] = {}
    ids, question = some_ids(TOKENS), some_ids(QUESTION)

    def timed(name: str, work: Callable[[], Any], kept: bool = True) -> Any:
        transport.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        made = work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if kept:
            row = found.setdefault(name, {"cpu": [], "wall": []})
            row["cpu"].append(cpu)
            row["wall"].append(wall)
        return made

    for repeat in range(WARM_UPS + REPEATS):
        for name, runtime in runtimes.items():
            kept = repeat >= WARM_UPS
            document = timed(f"encode, {name}", partial(runtime.encode, ids), kept)
            answer = partial(runtime.ask, document, question, max_new_tokens=NEW_TOKENS)
            timed(f"answer, {name}", answer, kept)
    trace = runtimes[TRACED]._trace
    assert trace is not None
    timed("gathering and writing the trace", lambda: trace.finish({}))
    return found
