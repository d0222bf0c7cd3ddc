"""Running per-rank test code in threads and in real processes (gloo)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from seqpar import ThreadWorld
from seqpar.spawn import Start, run_processes

# with what modules of tests import: a rank is then there in a tenth of a second
_PRELOAD = [
    "torch",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "ringstar",
    "ringattn",
    "hypothesis",
    "pytest",
]


def in_threads(world: int, rank_fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """`rank_fn(transport, *args)` on simulated ranks; results in rank order."""
    ranks = ThreadWorld(world, timeout_s=60, threads_per_rank=1, **options)
    return ranks.run(lambda transport: rank_fn(transport, *args))


def in_processes(
    world: int,
    rank_fn: Callable[..., Any],
    *args: Any,
    start: Start | None = None,
    timeout_s: float = 300,
) -> list[Any]:
    """The same in `world` processes, gloo unless `start` says so; `rank_fn` must be importable."""
    return run_processes(world, rank_fn, *args, timeout_s=timeout_s, preload=_PRELOAD, start=start)
