"""A document that is kept: what asking it again and loading it cost, beside its encode."""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.measure import cpu_seconds, over_ranks
from benchmarks.model import PRELOAD, rank_runtime, some_ids
from seqpar import Transport
from seqpar.spawn import run_processes

TOKENS, QUESTION, WORLD, WARM_UPS, REPEATS = 6000, 16, 2, 1, 3


def run(folder: str) -> dict[str, Any]:
    """CPU seconds of all ranks together, and ratios to the encode."""
    with tempfile.TemporaryDirectory() as saved:
        ranks = run_processes(
            WORLD, measured, folder, f"{saved}/document", preload=PRELOAD, timeout_s=3600
        )
    times = {name: over_ranks([rank[name] for rank in ranks]) for name in ranks[0]}
    encode, ask = times["encode"]["cpu_s"], times["question to first token"]["cpu_s"]
    return {
        "what": f"SmolLM2-135M, {TOKENS} tokens, a question of {QUESTION}, float32, {WORLD} ranks"
        f" of one thread; medians of {REPEATS} after {WARM_UPS} warm-up",
        **times,
        "second question / first (with its encode)": ask / (encode + ask),
        "encode / load": encode / times["load"]["cpu_s"],
    }


def measured(transport: Transport, folder: str, saved: str) -> dict[str, dict[str, list[float]]]:
    """CPU and wall seconds on one rank, from a barrier on."""
    runtime = rank_runtime(transport, folder, "float32")
    ids, question = some_ids(TOKENS), some_ids(QUESTION)
    document = runtime.encode(ids)
    works = {
        "encode": lambda: runtime.encode(ids),
        "save": lambda: runtime.save(document, saved),
        "load": lambda: runtime.load(saved),
        "question to first token": lambda: runtime.ask(document, question, max_new_tokens=1),
    }
    return {
        name: cpu_seconds(work, transport.barrier, warm_ups=WARM_UPS, repeats=REPEATS)
        for name, work in works.items()
    }
