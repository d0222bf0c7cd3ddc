"""What every benchmark shares: repeated CPU timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

WARM_UPS, REPEATS = 2, 5
MEDIANS = f"medians of {REPEATS} after {WARM_UPS} warm-ups"


def cpu_seconds(
    work: Callable[[], Any],
    before: Callable[[], Any] = lambda: None,
    *,
    warm_ups: int = WARM_UPS,
    repeats: int = REPEATS,
) -> dict[str, list[float]]:
    """CPU and wall seconds of `work` in this process, `repeats` times after `warm_ups`.

    `before` runs untimed each time: a barrier, so that ranks start together.
    """
    cpu, wall = [], []
    for repeat in range(warm_ups + repeats):
        before()
        cpu_started, wall_started = time.process_time(), time.perf_counter()
        work()
        if repeat >= warm_ups:
            cpu.append(time.process_time() - cpu_started)
            wall.append(time.perf_counter() - wall_started)
    return {"cpu": cpu, "wall": wall}


def over_ranks(ranks: list[dict[str, list[float]]]) -> dict[str, float]:
    """Medians over repeats of the ranks' CPU time together, and of the slowest one's wall time."""
    total = [sum(times) for times in zip(*(rank["cpu"] for rank in ranks), strict=True)]
    slowest = [max(times) for times in zip(*(rank["wall"] for rank in ranks), strict=True)]
    return {"cpu_s": statistics.median(total), "wall_s": statistics.median(slowest)}
